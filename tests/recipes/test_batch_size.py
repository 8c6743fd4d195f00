"""The batch study: predictions met by attacks below the limit of the rank, and the limit where theory puts it."""

import csv
import json
from pathlib import Path

import pytest

from lmleak.config import parse_config
from lmleak.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs" / "batch_size").glob("*.yaml"))
SETTINGS = [
    "--model", "linear", "--samples", "1", "--batch-sizes", "1", "4", "10",
    "--attacks", "gauss-newton(start=mean, iterations=8)", "--device", "cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("batches")
    assert recipe.main([*SETTINGS, "--output", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def rows(finished):
    lines = (finished / "results.jsonl").read_text().splitlines()
    return {(r["batch_size"], r["knows"]): r for r in map(json.loads, lines)}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.stem}.yaml")
def test_every_configuration_is_read_by_the_real_parser(recipe, path):
    assert parse_config(recipe.BatchSizeConfig, ["--config", str(path)]).output == f"runs/batch_size/{path.stem}"


@pytest.mark.parametrize(
    "arguments",
    [["--batch-sizes", "0"], ["--batch-sizes", "2", "2"], ["--batch-size", "2"], ["--noise-std", "0"],
     ["--attacks", "gs(labels=inferred)"]],
)  # fmt: skip
def test_wrong_settings_are_refused(recipe, arguments):
    with pytest.raises(ConfigError):
        parse_config(recipe.BatchSizeConfig, arguments)


def test_the_rank_stops_at_nine_rows_of_classes_times_pixels_and_bias(rows):
    assert rows[4, "given"]["rank"] == rows[4, "given"]["unknowns"] == 4 * 64
    assert rows[10, "given"]["unknowns"] == 640
    assert rows[10, "given"]["rank"] == rows[10, "given"]["rank_limit"] == 9 * 65
    assert rows[4, "given"]["unbiased_joint_rms"] is not None
    assert rows[10, "given"]["unbiased_joint_rms"] is None  # infinite
    assert rows[10, "given"]["predicted_joint_rms"] > 100 * rows[4, "given"]["predicted_joint_rms"]


@pytest.mark.parametrize("size", [1, 4])
def test_attacks_below_the_limit_reach_what_was_predicted(rows, size):
    joint, known = rows[size, "given"], rows[size, "others known"]
    assert joint["rmse"] == pytest.approx(joint["predicted_joint_rms"], rel=0.3)
    assert known["rmse"] == pytest.approx(known["predicted_others_known_rms"], rel=0.3)
    assert joint["predicted_others_known_rms"] <= joint["predicted_joint_rms"] * (1 + 1e-12)
    if size == 1:
        assert joint["predicted_others_known_rms"] == pytest.approx(joint["predicted_joint_rms"])


def test_the_other_layers_decide_the_limit_of_a_network(recipe):
    from lmleak.adapters import adapt, image_model

    adapter = adapt(image_model("lenet", (1, 8, 8)), image_shape=(1, 8, 8))
    assert recipe.rank_limit(adapter, 11_638) == 11_638


def test_table_and_figure_are_written(finished):
    table = list(csv.DictReader((finished / "batch_size.csv").open()))
    assert {e["knows"] for e in table} == {"labels given", "labels inferred", "others known"}
    assert len(table) == 9
    assert 10_000 < (finished / "batch_size.png").stat().st_size < 200_000
