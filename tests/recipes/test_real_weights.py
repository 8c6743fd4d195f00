"""The study of pretrained weights: rows, table and figure on a tiny case; the configuration parses."""

import csv
import math
from pathlib import Path

import pytest
import torch

from lmleak.config import parse_config
from lmleak.evaluation import process_state
from lmleak.evaluation.image_study import image_study, study_images
from lmleak.influence import dense_rows

ROOT = Path(__file__).resolve().parents[2]


def test_the_gradient_of_a_smooth_network_is_linear_farther_than_that_of_relu(recipe):
    settings = ["--data", "digits", "--samples", "1", "--precision", "float64", "--device", "cpu"]
    config = parse_config(recipe.WeightsConfig, settings)

    def reached(model):
        study = image_study(config, model, study_images(config), process_state())
        batch = study.batch(0)
        return recipe.linear_range(study, recipe.GradientJacobian(study.adapter, batch), batch), study, batch

    smooth, study, batch = reached("lenet")
    assert smooth >= 1e-3
    assert reached("mlp-1024x2")[0] < smooth
    x, step = study.adapter.input(batch), 10 * smooth  # ten times as far, it is not
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(config.seed), dtype=x.dtype)
    jacobian = dense_rows(recipe.GradientJacobian(study.adapter, batch))

    def gradient(at):
        found = recipe.capture_gradient(study.adapter, study.adapter.batch(at, batch.targets)).gradient
        return torch.cat([value.reshape(-1) for value in found.values()])

    predicted = step * jacobian.T @ z.reshape(-1)
    assert (gradient(x + step * z) - gradient(x) - predicted).norm() > recipe.LINEAR * predicted.norm()


@pytest.mark.parametrize("name", ["resnet20", "gpu"])
def test_every_configuration_is_read_by_the_real_parser(recipe, name):
    config = parse_config(recipe.WeightsConfig, ["--config", str(ROOT / "configs" / "real_weights" / f"{name}.yaml")])
    assert config.output == f"runs/real_weights/{name}"
    assert config.precision == "float64"


def lines_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "real_weights.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_tiny_run_gives_a_line_per_image_and_attack(recipe, tmp_path):
    arguments = [
        "--model", "lenet", "--data", "digits", "--samples", "2", "--attacks", "gauss-newton(iterations=12)",
        "gs(iterations=3)", "--precision", "float64", "--exact", "1", "--noise", "1e-4", "--output", str(tmp_path),
    ]  # fmt: skip
    assert recipe.main(arguments) == 0
    lines = lines_of(tmp_path)
    searches = ["local", "near(0.001)", "near(0.1)"]
    images = [line["image"] for line in lines]
    assert images == ["0"] * 5 + ["1", "1"] + ["mean"] * 5
    assert [line["attack"] for line in lines[2:5]] == searches
    assert [line["gradient"] for line in lines[2:5]] == ["noisy", "clean", "clean"]
    newton, gs = ([line for line in lines if line["attack"].startswith(name)] for name in ("gauss", "gs"))
    assert all(float(a["rmse"]) < float(b["rmse"]) for a, b in zip(newton, gs, strict=True))
    assert all(0 < float(line["I_lb_rms"]) <= float(line["CG_bound_rms"]) for line in lines if line["image"] != "mean")
    local, *near = lines[2:5]
    # Noise this small, a smooth network: first order is exact, and a search from nearby ends at the truth.
    assert float(local["rmse"]) == pytest.approx(float(local["exact_MAP_rms"]), rel=0.02)
    assert all(float(line["rmse"]) < 1e-3 * float(local["rmse"]) for line in near)
    assert float(local["CG_bound_rms"]) <= 1.001 * float(local["exact_I2F_rms"])
    assert float(local["exact_MAP_rms"]) == pytest.approx(float(local["MAP_rms"]), rel=0.02)
    assert (local["exact_rank"], local["determined_share"]) == ("64", "1")
    assert lines[5]["exact_I2F_rms"] == ""
    for name in ("real_weights", "real_weights_local"):
        assert (tmp_path / f"{name}.png").stat().st_size > 1000


def test_the_share_of_determined_pixels_is_that_of_the_posterior(recipe):
    settings = ["--model", "lenet", "--data", "digits", "--samples", "1", "--precision", "float64", "--device", "cpu"]
    config = parse_config(recipe.WeightsConfig, [*settings, "--pixel-std", "0.5"])
    study = image_study(config, config.model, study_images(config), process_state())
    batch, std = study.batch(0), 0.01
    noisy = study.release(0, f"gaussian(std={std})", batch=batch)
    directions = recipe.linearized(study, batch)
    found = recipe.exact_risk(config, study, batch, noisy, directions, std)
    posterior = torch.linalg.inv(directions.gram / std**2 + torch.eye(64, dtype=torch.float64))
    share = (posterior.diagonal().sqrt() < 0.5).double().mean().item()
    assert 0 < share < 1
    assert found["determined_share"] == share
    assert found["exact_bayes_rms"] == pytest.approx(math.sqrt(posterior.trace().item() / 64), rel=1e-9)


def test_wrong_input_is_refused_in_a_line(recipe, tmp_path, capsys):
    for arguments, said in (
        (["--model", "lenet", "--attacks", "span"], "span"),
        (["--exact", "-1"], "exact must be at least 0 and near positive"),
    ):
        assert recipe.main([*arguments, "--output", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("refused: ")
        assert said in error
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_published_weights_leak_their_label_and_resist_these_attacks(recipe, real_data, tmp_path):
    weights = real_data / "resnet20-cifar10" / "resnet20-12fca82f.th"
    images = real_data / "cifar10-jpg" / "cifar10_test1000.npz"
    arguments = [
        "--config", str(ROOT / "configs/real_weights/resnet20.yaml"), "--model", str(weights), "--data", str(images),
        "--samples", "1", "--attacks", "lbfgs(iterations=50)", "--products", "30", "--exact", "0",
        "--output", str(tmp_path),
    ]  # fmt: skip
    assert recipe.main(arguments) == 0
    line = lines_of(tmp_path)[0]
    assert line["label_read"] == "True"
    assert 0 < float(line["I_lb_rms"]) <= float(line["CG_bound_rms"])
    assert float(line["rmse"]) > 0.5  # L-BFGS from a random start fails, whatever is predicted of a better attacker
