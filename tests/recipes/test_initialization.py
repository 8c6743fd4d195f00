"""The recipe of initialisations: its settings, its statistics, and one tiny run."""

import csv
import importlib
import math
from pathlib import Path

import pytest

from lmleak.config import parse_config
from lmleak.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs" / "initialization").glob("*.yaml"))


@pytest.fixture(scope="module")
def load():
    return importlib.import_module


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_configuration_is_read_by_the_real_parser(load, path):
    config = parse_config(load("initialization").InitializationConfig, ["--config", str(path)])
    assert config.output == f"runs/initialization/{path.stem}"
    published = ["uniform", "normal", "kaiming", "xavier"]
    assert config.initializations == (published if path.stem == "mnist" else [*published, "orthogonal"])


def test_wrong_settings_are_refused(load):
    for arguments in (
        ["--noise-variance", "0"], ["--noise-draws", "0"], ["--attacks", "spam"], ["--initializations", "gaussian"],
        ["--model-seeds", "1", "1"], ["--batch-size", "2"],
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            parse_config(load("initialization").InitializationConfig, arguments)


def made_up(mse: dict[str, float]) -> list[dict]:
    """Rows of two draws of the noise, 0.9 and 1.1 times an error per initialisation."""
    return [
        {"initialization": name, "model_seed": model, "sample": sample, "attack": "dlg",
         "mse": factor * error * (1 + 0.01 * model + 0.02 * sample), "mean_inverse_singular": 1 / error,
         "unbiased_mse": error * (1 + 0.02 * sample), "bayes_mse": None if error > 5 else error}
        for name, error in mse.items() for model in range(3) for sample in range(4) for factor in (0.9, 1.1)
    ]  # fmt: skip


def test_noise_is_averaged_and_what_is_missing_has_no_bound(load):
    report = load("initialization_report")
    rows = made_up({"uniform": 1.0, "xavier": 9.0})
    assert report.cells(rows, "uniform", "mse", "dlg")[2, 3] == pytest.approx(1.08)
    assert report.cells(rows, "xavier", "bayes_mse")[0, 0] == math.inf


def test_order_and_rank_correlations_are_those_of_the_rows(load):
    report = load("initialization_report")
    rows = made_up({"uniform": 1.0, "normal": 3.0, "xavier": 2.0})
    found = {entry["statement"]: entry["value"] for entry in report.order_entries(rows, 0)}
    assert found["P(MSE under uniform < MSE under normal)"] == 1
    assert found["P(MSE under normal < MSE under xavier)"] == 0
    assert found["Spearman of unbiased_mse and MSE"] > 0.95
    assert found["Spearman of mean_inverse_singular and MSE"] < -0.8
    (entry, *_) = report.initialization_entries(rows, False, 0)
    assert entry["dlg mse"] == pytest.approx(1.04, abs=0.01)
    assert (entry["networks"], entry["images"]) == (3, 4)


def test_a_tiny_run_gives_rows_tables_and_a_figure(load, tmp_path):
    arguments = [
        "--initializations", "uniform", "xavier", "--model-seeds", "0", "1", "--samples", "1", "--noise-draws", "1",
        "--attacks", "gauss-newton(prior_weight=0.001, iterations=5)", "--device", "cpu", "--output",
        str(tmp_path / "out"),
    ]  # fmt: skip
    assert load("initialization").main(arguments) == 0
    rows = list(csv.DictReader((tmp_path / "out" / "rows.csv").open()))
    assert len(rows) == 2 * 2 * 1 * 2  # initialisations, networks, images, attackers
    assert {row["attack"] for row in rows} == {"local", "gauss-newton(prior_weight=0.001, iterations=5)"}
    assert all(0 < float(row["bayes_mse"]) <= min(1, float(row["unbiased_mse"])) for row in rows)
    assert "P(MSE under uniform < MSE under xavier)" in (tmp_path / "out" / "tables.md").read_text()
    assert (tmp_path / "out" / "initialization.png").stat().st_size > 5_000
