"""The recipe of perturbation directions: its settings, the law it tests, and one tiny run."""

import csv
import os
from pathlib import Path

import pytest

from lmleak.config import parse_config
from lmleak.errors import ConfigError
from lmleak.evaluation import process_state
from lmleak.evaluation.image_study import image_study, study_images

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("LMLEAK_DATA", ROOT.parent / "shared" / "data"))
CONFIGS = sorted((ROOT / "configs" / "perturbation_directions").glob("*.yaml"))


def study_of(recipe, *arguments):
    config = parse_config(recipe.DirectionsConfig, [*arguments, "--device", "cpu"])
    return image_study(config, config.model, study_images(config), process_state(), initialization="uniform")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_configuration_is_read_by_the_real_parser(recipe, path):
    config = parse_config(recipe.DirectionsConfig, ["--config", str(path)])
    assert config.output == f"runs/perturbation_directions/{path.stem}"
    assert min(config.norms) < recipe.PUBLISHED_NORM or path.stem == "mnist-published"


def test_wrong_settings_are_refused(recipe):
    for arguments in (
        ["--eigenvalues", "0"], ["--norms", "-1"], ["--attacks", "spam"], ["--batch-size", "2"], ["--samples", "0"],
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            parse_config(recipe.DirectionsConfig, arguments)


def test_the_direction_has_norm_one_and_a_sign_that_does_not_depend_on_the_decomposition(recipe):
    study = study_of(recipe, "--samples", "1", "--precision", "float64")
    _, directions = recipe.spectrum(study, 0)
    index = recipe.nearest(directions, 4e-3)
    values = directions.values
    assert values[index + 1] < 4e-3 < values[index - 1]
    unit = recipe.upright(directions, index)
    assert sum(v.square().sum().item() for v in unit.values()) == pytest.approx(1)
    assert directions.influence(unit).sum() > 0  # u_i / s_i, and u_i sums to a positive number
    flipped = type(directions)(directions.jacobian, values, -directions.vectors)
    for name, value in recipe.upright(flipped, index).items():
        assert value.allclose(unit[name])


def test_small_perturbations_obey_the_law_whatever_the_attacker(recipe):
    study = study_of(recipe, "--samples", "1", "--precision", "float64")
    rows = []
    for wanted in (0.016, 1e-3):
        rows += recipe.direction_rows(study, ["gauss-newton(iterations=40)"], (0, wanted, 1e-3, 1))
    assert [row["attack"] for row in rows] == ["local", "gauss-newton(iterations=40)"] * 2
    assert [row["ratio"] for row in rows] == pytest.approx([1] * 4, rel=0.01)
    entries = recipe.summary(rows)
    assert len(entries) == 4
    assert all(entry["gradients"] == 1 and entry["diverged"] == 0 for entry in entries)


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "mnist").is_dir(), reason="needs MNIST's idx files in LMLEAK_DATA")
def test_the_law_holds_within_15_percent_over_the_published_eigenvalues(recipe):
    arguments = ["--data", str(DATA / "mnist"), "--split", "t10k", "--normalization", "mnist", "--samples", "1"]
    study = study_of(recipe, *arguments)
    for wanted in (2.0, 0.01):  # the largest and the smallest
        (row,) = recipe.direction_rows(study, [], (0, wanted, 0.05, 1))
        assert row["eigenvalue"] == pytest.approx(wanted, rel=0.05)
        assert row["ratio"] == pytest.approx(1, rel=0.15)


def test_a_tiny_run_gives_rows_table_and_figures(recipe, tmp_path):
    arguments = [
        "--samples", "1", "--eigenvalues", "0.01", "--norms", "0.005", "--attacks", "gauss-newton(iterations=20)",
        "--device", "cpu", "--output", str(tmp_path / "out"),
    ]  # fmt: skip
    assert recipe.main(arguments) == 0
    rows = list(csv.DictReader((tmp_path / "out" / "rows.csv").open()))
    assert [(row["sign"], row["attack"]) for row in rows] == [
        (sign, attack) for sign in ("1", "-1") for attack in ("local", "gauss-newton(iterations=20)")
    ]
    assert [float(row["ratio"]) for row in rows] == pytest.approx([1] * 4, rel=0.02)
    assert "| 0.005 |" in (tmp_path / "out" / "table.md").read_text()
    for name in ("law", "grid"):
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 5_000
