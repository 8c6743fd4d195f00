"""The recipe of predicted recovery: its settings, its statistics, and one tiny run."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from lmleak.config import parse_config
from lmleak.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs" / "predicted_recovery").glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_configuration_is_read_by_the_real_parser(recipe, path):
    config = parse_config(recipe.RecoveryConfig, ["--config", str(path)])
    assert config.models[-1] == "reference-gpt2"
    assert config.output == f"runs/predicted_recovery/{path.stem}"


def test_wrong_settings_are_refused(recipe):
    for arguments in (["--samples", "0"], ["--noise-levels", "0"], ["--attack-levels", "7"], ["--attacks", "spam"]):
        with pytest.raises(ConfigError):
            parse_config(recipe.RecoveryConfig, arguments)


def test_a_tiny_run_gives_rows_table_and_figure(recipe, tmp_path):
    arguments = [
        "--models", "reference-bert", "--samples", "2", "--max-length", "4", "--candidates", "8", "--noise-levels",
        "0.01", "1000", "--attack-levels", "0.01", "--attacks", "tag(iterations=5)", "--iterations", "5",
        "--measured-draws", "1", "--predicted-draws", "8", "--output", str(tmp_path / "out"),
    ]  # fmt: skip
    assert recipe.main(arguments) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [row["noise_rms"] for row in rows] == [0.01, 1000.0] * 2
    clean, noisy = rows[0], rows[1]
    assert clean["predicted"]["substitution"] == [1.0] * len(clean["tokens"])
    assert clean["measured"]["local-discrete"] == [[True] * len(clean["tokens"])]
    assert np.mean(noisy["predicted"]["gaussian"]) < 0.5
    assert "tag(iterations=5)" in clean["measured"]
    assert "tag(iterations=5)" not in noisy["measured"]
    table = list(csv.DictReader((tmp_path / "out" / "calibration.csv").open()))
    assert {"substitution", "gaussian"} <= {entry["method"] for entry in table}
    assert (tmp_path / "out" / "calibration.png").stat().st_size > 10_000
