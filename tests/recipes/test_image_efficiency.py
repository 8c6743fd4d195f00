"""The efficiency study: every case in a process of its own, bounds in their order, extrapolation said."""

import csv
import json
from pathlib import Path

import pytest

from lmleak.config import parse_config
from lmleak.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs" / "image_efficiency").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.stem}.yaml")
def test_every_configuration_names_known_models(recipe, path):
    arguments = ["--config", str(path), "--device", "cpu"]
    config = parse_config(recipe.EfficiencyConfig, arguments)
    assert config.output == f"runs/image_efficiency/{path.stem}"
    assert all(model in recipe.ARCHITECTURES or (ROOT / model).exists() for model in config.models)


@pytest.mark.parametrize(
    "arguments", [["--methods", "gradient"], ["--methods", "gradient", "lower-bound", "lbfgs"], ["--steps", "0"]]
)
def test_wrong_settings_are_refused(recipe, arguments):
    with pytest.raises(ConfigError):
        parse_config(recipe.EfficiencyConfig, arguments)


def test_an_extrapolated_time_is_the_time_per_step_times_the_published_steps(recipe):
    config = recipe.EfficiencyConfig(steps=3)
    row = recipe.measure(config, "linear", "dlg")
    assert row["steps"] == 3
    assert row["extrapolated_seconds"] == pytest.approx(row["seconds"] / 3 * 24_000)
    assert "extrapolated_seconds" not in recipe.measure(config, "linear", "gradient")


def test_what_does_not_fit_is_left_out_and_says_why(recipe):
    row = recipe.measure(recipe.EfficiencyConfig(dense_unknowns=100), "linear", "dense")
    assert "784 unknowns" in row["left_out"]
    assert "seconds" not in row


def test_a_run_orders_the_bounds(recipe, tmp_path):
    methods = ["gradient", "lower-bound", "cg-1", "dense", "gs"]
    arguments = ["--models", "lenet", "linear", "--steps", "2", "--output", str(tmp_path), "--methods", *methods]
    assert recipe.main(arguments) == 0
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * len(methods)
    assert all(row["seconds"] > 0 for row in rows)
    value = {(row["model"], row["method"]): row.get("influence_l2") for row in rows}
    for model in ("linear", "lenet"):
        order = [value[model, method] for method in ("lower-bound", "cg-1", "dense")]
        assert order == sorted(order)
    times = list(csv.DictReader((tmp_path / "image_efficiency.csv").open()))
    assert [entry["model"] for entry in times] == ["linear", "lenet"]  # by size
    assert float(times[0]["gs_over_I_lb"]) == pytest.approx(
        float(times[0]["gs_s"]) / float(times[0]["lower-bound_s"]), rel=1e-2
    )
    bounds = list(csv.DictReader((tmp_path / "image_efficiency_bounds.csv").open()))
    assert float(bounds[1]["lower-bound_over_I2F"]) < 1
    assert 10_000 < (tmp_path / "image_efficiency.png").stat().st_size < 200_000
