"""The study of pretrained weights: rows, table and figure on a tiny case; the configuration parses."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "real_weights.py"


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(RECIPE), *arguments], capture_output=True, text=True, env=environment, cwd=ROOT
    )


def test_a_tiny_run_gives_a_line_per_image_and_attack(tmp_path):
    done = run(
        "--model", "lenet", "--data", "digits", "--samples", "2", "--attacks", "gauss-newton(iterations=12)",
        "gs(iterations=3)", "--output", str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with (tmp_path / "real_weights.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["image"] for line in lines] == ["0", "0", "1", "1", "mean", "mean"]
    newton, gs = ([line for line in lines if line["attack"].startswith(name)] for name in ("gauss", "gs"))
    assert all(float(a["rmse"]) < float(b["rmse"]) for a, b in zip(newton, gs, strict=True))
    assert all(0 < float(line["I_lb_rms"]) <= float(line["CG_bound_rms"]) for line in lines if line["image"] != "mean")
    assert (tmp_path / "real_weights.png").stat().st_size > 1000


def test_wrong_input_is_refused_in_a_line(tmp_path):
    done = run("--model", "lenet", "--attacks", "span", "--output", str(tmp_path))
    assert done.returncode == 2
    assert "span" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_published_weights_leak_their_label_and_resist_these_attacks(real_data, tmp_path):
    weights = real_data / "resnet20-cifar10" / "resnet20-12fca82f.th"
    images = real_data / "cifar10-jpg" / "cifar10_test1000.npz"
    done = run(
        "--config", "configs/real_weights/resnet20.yaml", "--model", str(weights), "--data", str(images), "--samples",
        "1", "--attacks", "lbfgs(iterations=50)", "--products", "30", "--output", str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with (tmp_path / "real_weights.csv").open() as file:
        line = next(csv.DictReader(file))
    assert line["label_read"] == "True"
    assert 0 < float(line["I_lb_rms"]) <= float(line["CG_bound_rms"])
    assert float(line["rmse"]) > 0.5  # L-BFGS from a random start fails, whatever is predicted of a better attacker
