"""The recipe as it is launched: one process, two processes, killed and resumed; the same rows every time."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lmleak.config import parse_config

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "influence_vs_attack.py"
SETTINGS = [
    "--model", "reference-gpt2", "--samples", "4", "--noise-levels", "0.1", "10", "--attacks", "tag(iterations=8)",
    "--probes", "2", "--probe-steps", "8", "--max-products", "40", "--device", "cpu",
]  # fmt: skip


def launch(hardware: str, *arguments: str) -> list[str]:
    config = ROOT / "configs" / "accelerate" / f"{hardware}.yaml"
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), str(RECIPE), *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def run(hardware: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(launch(hardware, *arguments), capture_output=True, text=True, env=environment(), cwd=ROOT)


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def assert_same(left, right, path="row"):
    """Text equal, numbers to 1e-5, timing aside."""
    assert type(left) is type(right), path
    if isinstance(left, dict):
        assert left.keys() == right.keys(), path
        for key in left:
            if not key.endswith(("seconds", "peak_bytes")):
                assert_same(left[key], right[key], f"{path}.{key}")
    elif isinstance(left, list):
        assert len(left) == len(right), path
        for i, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_same(a, b, f"{path}[{i}]")
    elif isinstance(left, float):
        assert left == pytest.approx(right, rel=1e-5, abs=1e-12), path
    else:
        assert left == right, path


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one") / "out"
    finished = run("cpu1", *SETTINGS, "--output", str(folder), "--processes", "1")
    assert finished.returncode == 0, finished.stderr
    return folder, finished


@pytest.mark.slow
@pytest.mark.multiprocess
def test_one_process_writes_everything(one_process):
    folder, finished = one_process
    assert len(rows(folder)) == 4 * 3
    assert (folder / "report.html").stat().st_size > 10_000
    assert json.loads((folder / "summary.json").read_text())["correlations"]
    assert "Spearman rank correlation" in finished.stdout
    assert "report:" in finished.stdout


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_give_the_same_rows(one_process, tmp_path):
    folder = tmp_path / "two"
    finished = run("cpu2", *SETTINGS, "--output", str(folder), "--processes", "2")
    assert finished.returncode == 0, finished.stderr
    assert len(list((folder / "shards").glob("rank-*.jsonl"))) == 2  # both really worked
    assert_same(rows(folder), rows(one_process[0]))


@pytest.mark.slow
@pytest.mark.multiprocess
def test_killed_run_resumes_to_the_same_rows(one_process, tmp_path):
    folder = tmp_path / "killed"
    arguments = [*SETTINGS, "--output", str(folder)]
    process = subprocess.Popen(
        launch("cpu1", *arguments), env=environment(), cwd=ROOT, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    shard, deadline = folder / "shards" / "rank-0.jsonl", time.monotonic() + 300
    while not (shard.exists() and shard.read_text().count("\n") >= 1):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "no item was finished in time"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (folder / "results.jsonl").exists()
    kept = shard.read_text().splitlines()[0]
    resumed = run("cpu2", *arguments)  # even on another number of processes
    assert resumed.returncode == 0, resumed.stderr
    assert shard.read_text().splitlines()[0] == kept  # what was finished was not computed again
    assert_same(rows(folder), rows(one_process[0]))


@pytest.mark.multiprocess
def test_wrong_number_of_processes_is_refused(tmp_path):
    folder = tmp_path / "out"
    finished = run("cpu1", *SETTINGS, "--output", str(folder), "--processes", "2")
    assert finished.returncode != 0
    assert "2 were asked for" in finished.stderr
    assert not folder.exists()


def recipe_config():
    import importlib.util

    spec = importlib.util.spec_from_file_location("influence_vs_attack", RECIPE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.StudyConfig


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs" / "influence_vs_attack").glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_config_parses(path):
    config = parse_config(recipe_config(), ["--config", str(path)])
    assert config.output.startswith("runs/")
