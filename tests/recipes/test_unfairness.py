"""The recipe of unfairness: its settings, its statistics, and one tiny run."""

import csv
import importlib
from pathlib import Path

import numpy as np
import pytest
import torch

from lmleak.config import parse_config
from lmleak.data.images import ImageData
from lmleak.errors import ConfigError
from lmleak.evaluation import process_state
from lmleak.evaluation.image_attack import images_of
from lmleak.evaluation.image_study import image_study, study_images
from lmleak.report.rows import compact

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs" / "unfairness").glob("*.yaml"))


@pytest.fixture(scope="module")
def load():
    return importlib.import_module


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_configuration_is_read_by_the_real_parser(load, path):
    config = parse_config(load("unfairness").UnfairnessConfig, ["--config", str(path)])
    assert config.output == f"runs/unfairness/{path.stem}"
    assert config.noise_variance == 1e-3
    assert any(f"prior_weight={config.noise_variance:g}" in spec for spec in config.attacks)


def test_wrong_settings_are_refused(load):
    for arguments in (
        ["--noise-variance", "0"], ["--attacked", "99"], ["--attacks", "spam"], ["--model-seeds", "1", "1"],
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            parse_config(load("unfairness").UnfairnessConfig, arguments)


def test_classes_take_turns(load):
    labels = torch.tensor([2, 2, 0, 1, 0, 2])
    data = ImageData(torch.arange(6.0).reshape(6, 1, 1, 1) / 6, labels, ("a", "b", "c"), "six")
    ordered = load("image_study_parts").classes_in_turn(data)
    assert ordered.labels.tolist() == [0, 1, 2, 0, 2, 2]
    assert (ordered.pixels.flatten() * 6).round().tolist() == [2, 3, 0, 4, 1, 5]


def test_the_variance_is_taken_apart_without_remainder(load):
    report = load("unfairness_report")
    labels = np.array([0, 1, 0, 1])
    table = np.array([[1.0, 4.0, 2.0, 5.0], [3.0, 1.0, 2.0, 2.0], [0.0, 0.0, 1.0, 2.0]])
    shares = report.variance_shares(table, labels)
    assert sum(shares.values()) == pytest.approx(1)
    only_class = np.array([[1.0, 2.0, 1.0, 2.0]] * 3)
    assert report.variance_shares(only_class, labels)["class, the same in all networks"] == pytest.approx(1)
    own_order = np.array([[1.0, 2.0, 1.0, 2.0], [2.0, 1.0, 2.0, 1.0]])
    assert report.variance_shares(own_order, labels)["class, each network its own"] == pytest.approx(1)


def test_a_common_order_is_told_from_an_order_of_each_network(load):
    report = load("unfairness_report")
    generator = np.random.default_rng(0)
    common = np.arange(10.0) + generator.normal(size=(6, 10))
    assert report.common_order_p(common, 0) < 0.01
    assert report.common_order_p(generator.normal(size=(6, 10)), 0) > 0.05


def test_an_interval_bounds_its_median_and_allows_what_has_no_bound(load):
    report = load("unfairness_report")
    table = np.array([[1.0, 2.0, 3.0], [2.0, 3.0, np.inf]])
    middle, low, high = report.interval(table, 0)
    assert low <= middle == 2.5 <= high


def test_the_grid_gives_errors_in_the_unit_of_the_predictions(load):
    recipe, report = load("unfairness"), load("unfairness_report")
    config = parse_config(
        recipe.UnfairnessConfig,
        ["--device", "cpu", "--samples", "2", "--attacked", "2", "--attacks", "dlg(iterations=2)"],
    )
    data = load("image_study_parts").classes_in_turn(study_images(config))
    study = image_study(config, "lenet", data, process_state(), initialization="uniform")
    rows = [row for sample in range(2) for row in recipe.image_rows(config, study, 0, sample, True)]
    figure = report.grid_figure(study, rows)
    titles = [axes.get_title() for axes in figure.axes]
    protected = sorted(rows[::3], key=lambda row: row["bayes_rms"])  # the prediction precedes its two attackers
    assert [title.split("\n")[1] for title in titles[:2]] == [
        f"predicted RMSE {compact(r['bayes_rms'])}" for r in protected
    ]
    (deviation,) = study.adapter.normalization.std
    for row, caption in zip([rows[3 * r["sample"] + 2] for r in protected], titles[4:], strict=True):
        assert row["attack"].startswith("dlg")
        error = (images_of(row, data.pixels[:1]) - data.pixels[row["sample"]]) / deviation
        assert caption == f"RMSE {compact(error.square().mean().sqrt().item())}"


def test_a_tiny_run_gives_rows_tables_and_figures(load, tmp_path):
    arguments = [
        "--model-seeds", "0", "1", "--samples", "10", "--attacked", "2", "--attacked-models", "1", "--attacks",
        "gauss-newton(prior_weight=0.001, iterations=5)", "--device", "cpu", "--output", str(tmp_path / "out"),
    ]  # fmt: skip
    assert load("unfairness").main(arguments) == 0
    rows = list(csv.DictReader((tmp_path / "out" / "rows.csv").open()))
    assert len(rows) == 2 * 10 + 2 * 2
    assert [row["label"] for row in rows if not row["attack"]] == [str(c) for c in range(10)] * 2
    assert all(0 < float(row["bayes_rms"]) <= min(1, float(row["unbiased_rms"])) for row in rows)
    tables = (tmp_path / "out" / "tables.md").read_text()
    assert "| label | class | images | networks |" in tables
    assert "Spearman of the class order between two networks" in tables
    for name in ("unfairness", "grid"):
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 5_000
