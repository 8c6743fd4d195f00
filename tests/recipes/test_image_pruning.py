"""The pruning study: what both attackers reach is what was predicted, and the mask undoes most of the protection."""

import csv
import json
from pathlib import Path

import pytest

from lmleak.config import parse_config
from lmleak.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs" / "image_pruning").glob("*.yaml"))
SETTINGS = [
    "--samples", "1", "--ratios", "0.5", "0.8", "0.95", "--attacks", "gauss-newton(start=mean, iterations=12)",
    "--device", "cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pruning")
    assert recipe.main([*SETTINGS, "--output", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.stem}.yaml")
def test_every_configuration_is_read_by_the_real_parser(recipe, path):
    assert parse_config(recipe.PruningConfig, ["--config", str(path)]).output == f"runs/image_pruning/{path.stem}"


@pytest.mark.parametrize(
    "arguments",
    [["--ratios", "1.0"], ["--noise", "-1"], ["--attacks", "gs", "gs(tv=0)"], ["--attacks", "gs(mask_zeros=true)"]],
)
def test_wrong_settings_are_refused(recipe, arguments):
    with pytest.raises(ConfigError):
        parse_config(recipe.PruningConfig, arguments)


def test_predictions_hold_for_both_attackers_and_the_mask_undoes_the_protection(finished):
    rows = [json.loads(line) for line in (finished / "results.jsonl").read_text().splitlines()]
    found = {(r["attacker"], r["ratio"]): r for r in rows}
    assert len(found) == len(rows) == 6
    for kind in ("naive", "mask-aware"):  # the linear regime; one draw of the noise, so no closer than its own spread
        row = found[kind, 0.5]
        assert row["rank"] == row["dx"] == 64
        assert row["rmse"] == pytest.approx(row["predicted_rms"], rel=0.02 if kind == "naive" else 0.3)
    naive, aware = found["naive", 0.8], found["mask-aware", 0.8]
    assert naive["rmse"] > 0.2
    assert aware["rmse"] < 0.01
    assert found["mask-aware", 0.95]["rank"] == 48  # LeNet's last layer sees the image through 48 features
    assert found["mask-aware", 0.95]["predicted_rms"] == pytest.approx(0.5, rel=0.02)  # sqrt(16 / 64)


def test_table_and_figure_are_written(finished):
    table = list(csv.DictReader((finished / "image_pruning.csv").open()))
    assert [(e["attacker"], e["ratio"]) for e in table] == [
        (kind, ratio) for kind in ("naive", "mask-aware") for ratio in ("0.5", "0.8", "0.95")
    ]
    assert "| gauss-newton | mask-aware | 0.8 |" in (finished / "image_pruning.md").read_text()
    assert 10_000 < (finished / "image_pruning.png").stat().st_size < 200_000
