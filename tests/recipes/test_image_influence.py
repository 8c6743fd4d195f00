"""The recipe of I2F on images: its predictions against formulas, its statistics, and one tiny run."""

import csv
import importlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from lmleak.config import parse_config
from lmleak.errors import ConfigError
from lmleak.evaluation import process_state
from lmleak.evaluation.image_study import image_study, study_images
from lmleak.influence import dense_rows

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs" / "image_influence").glob("*.yaml"))


@pytest.fixture(scope="module")
def measures():
    return importlib.import_module("image_influence_measures")


@pytest.fixture(scope="module")
def report():
    return importlib.import_module("image_influence_report")


@pytest.fixture(scope="module")
def study(recipe):
    config = recipe.InfluenceConfig(device="cpu", samples=1)
    return image_study(config, "lenet", study_images(config), process_state())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_configuration_is_read_by_the_real_parser(recipe, path):
    config = parse_config(recipe.InfluenceConfig, ["--config", str(path)])
    assert config.output == f"runs/image_influence/{path.stem}"
    assert ("lenet" in config.models) == (path.stem != "cifar-deep")
    newton = any("prior_weight={variance}" in spec for spec in config.attacks)
    assert newton == (not path.stem.startswith("cifar"))  # a step on 3,072 unknowns takes many seconds on a core


def test_wrong_settings_are_refused(recipe):
    for arguments in (
        ["--noise-variances", "0"], ["--dampings", "-1"], ["--attacks", "spam"], ["--attacks", "gs(tv={variants})"],
        ["--local-iterations", "0"], ["--local-curvature", "mine"], ["--largest-matrix", "0"],
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            parse_config(recipe.InfluenceConfig, arguments)


def test_predictions_are_the_formulas_on_j_as_a_matrix(measures, study):
    batch, std, eps = study.batch(0), 0.03, 1e-3
    release = study.release(0, f"gaussian(std={std})", batch=batch)
    directions = measures.linearized(study, batch)
    found = measures.predictions(directions, study, batch, release.perturbation, std, [eps])

    jacobian = dense_rows(directions.jacobian)
    delta = torch.cat([release.perturbation[n].reshape(-1) for n in directions.jacobian.parameter_names])
    gram, response = jacobian @ jacobian.T, jacobian @ delta
    identity, x = torch.eye(64, dtype=torch.float64), batch.inputs["pixel_values"].reshape(-1)

    def solve(damping, right):
        return torch.linalg.solve(gram + damping * identity, right).norm().item() / 8

    assert found["influence_rms"] == pytest.approx(solve(0.0, response), rel=1e-6)
    assert found["damped_rms"] == {"0.001": pytest.approx(solve(eps, response), rel=1e-9)}
    assert found["map_response_rms"] == pytest.approx(solve(std**2, response), rel=1e-9)
    assert found["map_rms"] == pytest.approx(solve(std**2, response - std**2 * x), rel=1e-9)
    top = torch.linalg.eigvalsh(gram)[-1]
    assert found["lower_bound_rms"] == pytest.approx((response.norm() / top).item() / 8, rel=1e-9)
    posterior = torch.linalg.inv(gram / std**2 + identity).trace().item()
    assert found["bayes_rms"] == pytest.approx(math.sqrt(posterior / 64), rel=1e-9)


def test_attackers_from_the_truth_err_as_predicted(measures, study):
    batch = study.batch(0)
    directions = measures.linearized(study, batch)
    for std, weight, name in ((1e-4, 0.0, "influence_rms"), (1e-2, 1e-4, "map_rms")):
        release = study.release(0, f"gaussian(std={std})", batch=batch)
        found = measures.predictions(directions, study, batch, release.perturbation, std)
        rmse = measures.local_rmse(study, batch, release, prior_weight=weight, iterations=30)
        assert rmse == pytest.approx(found[name], rel=0.1)


def test_steps_by_the_curvature_at_the_truth_end_in_the_same_minimum(measures, study):
    batch = study.batch(0)
    release = study.release(0, "gaussian(std=0.01)", batch=batch)
    settings = {"prior_weight": 1e-4, "iterations": 60}
    own = measures.local_rmse(study, batch, release, **settings)
    of_truth = measures.local_rmse(study, batch, release, directions=measures.linearized(study, batch), **settings)
    assert of_truth == pytest.approx(own, rel=1e-4)


def rows_of(error, samples=4, attack="gs"):
    """Rows whose attack errs by a function of I2F and the image, and whose local attackers err by I2F."""
    return [
        {"model": "m", "sample": i, "noise_variance": v, "attack": attack, "rmse": error(math.sqrt(v) * (1 + i), i)}
        | dict.fromkeys(("influence_rms", "local_rmse", "local_map_rmse", "map_rms"), math.sqrt(v) * (1 + i))
        | {"lower_bound_rms": math.sqrt(v) / 10, "map_response_rms": 1.0, "bayes_rms": 1.0}
        for i in range(samples)
        for v in (1e-8, 1e-6, 1e-4, 1.0)
    ]


def test_slope_ratio_and_results_below_the_bound_are_found(report):
    settings = {"linear_below": 0.1, "tolerance": 0.05, "seed": 0}
    local, _, found = report.regimes(rows_of(lambda i2f, image: 2 * i2f**0.9), **settings)
    assert (local["attack"], found["attack"]) == ("local", "gs")
    assert (found["points"], found["linear_points"]) == (16, 12)
    assert [found[n] for n in ("slope", "slope_low", "slope_high")] == pytest.approx([0.9] * 3)
    assert local["slope"] == pytest.approx(1)
    assert local["ratio_least"] == pytest.approx(1)
    assert found["below_bound_linear"] == found["below_bound_all"] == 0

    *_, low = report.regimes(rows_of(lambda i2f, image: 0.09 * i2f if image == 0 else i2f), **settings)
    assert (low["below_bound_linear"], low["below_bound_all"]) == (3, 4)
    assert low["ratio_least"] == pytest.approx(0.09)
    assert low["ratio_low"] < low["ratio_high"]


def test_an_attack_that_diverged_everywhere_has_no_ratio(report):
    *_, found = report.regimes(rows_of(lambda i2f, image: None), linear_below=0.1, tolerance=0.05, seed=0)
    assert found["points"] == 0
    assert math.isnan(found["slope"])
    assert math.isnan(found["of_map"])


def test_a_tiny_run_gives_rows_tables_and_figures(recipe, tmp_path, capsys):
    arguments = [
        "--models", "linear", "--samples", "2", "--noise-variances", "1e-8", "1e-6", "--attacks",
        "gauss-newton(iterations=20, prior_weight={variance})", "gs(iterations=2)", "--dampings", "1e-3",
        "--device", "cpu", "--output", str(tmp_path / "out"),
    ]  # fmt: skip
    assert recipe.main(arguments) == 0
    assert "linear regime" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 2 * 2
    assert rows[0]["noise_std"] == pytest.approx(1e-4)
    strong = [row for row in rows if row["attack"].startswith("gauss")]
    assert {row["attack"] for row in strong} == {"gauss-newton(iterations=20, prior_weight={variance})"}
    assert all(row["rmse"] == pytest.approx(row["influence_rms"], rel=0.02) for row in strong)
    table = list(csv.DictReader((tmp_path / "out" / "image_influence.csv").open()))
    assert [entry["below_bound_all"] for entry in table[:3]] == ["0"] * 3
    levels = list(csv.DictReader((tmp_path / "out" / "image_influence_levels.csv").open()))
    assert [float(entry["noise_variance"]) for entry in levels] == [1e-8, 1e-6]
    assert np.all([float(entry["I_eps 0.001"]) <= float(entry["influence_rms"]) for entry in levels])
    for name in ("image_influence", "image_influence_damping"):
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 10_000
    assert recipe.main(arguments) == 0  # the same settings continue, and have nothing left to do
