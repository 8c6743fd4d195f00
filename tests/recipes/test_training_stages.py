"""The recipe of training stages: its training is reproducible and blind to the private half; one tiny run."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lmleak.config import parse_config
from lmleak.data.images import load_images
from lmleak.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs" / "training_stages").glob("*.yaml"))


def weights(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_configuration_is_read_by_the_real_parser(recipe, path):
    config = parse_config(recipe.StagesConfig, ["--config", str(path)])
    assert config.output == f"runs/training_stages/{path.stem}"
    assert config.epochs[0] == 0


def test_wrong_settings_are_refused(recipe):
    for arguments in (
        ["--epochs", "2", "1"], ["--epochs", "-1"], ["--model", "lenot"], ["--defenses", "prune(ratio=0.5)"],
        ["--attacks", "spam"], ["--learning-rate", "0"], ["--train-batch-size", "0"],
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            parse_config(recipe.StagesConfig, arguments)
    with pytest.raises(ConfigError, match="first 898"):
        recipe.halves(recipe.StagesConfig(samples=1000), load_images("digits"))


def test_training_repeats_learns_and_never_sees_the_private_half(recipe):
    config, data = (
        recipe.StagesConfig(model="linear", epochs=[0, 3], learning_rate=1e-2, device="cpu"),
        load_images("digits"),
    )
    before = torch.get_rng_state()
    first, again = recipe.train(config, data, "cpu"), recipe.train(config, data, "cpu")
    assert torch.equal(torch.get_rng_state(), before)
    assert list(first) == [0, 3]
    assert all(torch.equal(weights(first[e]), weights(again[e])) for e in first)
    assert recipe.accuracy(config, data, first[3]) > 0.75 > 0.4 > recipe.accuracy(config, data, first[0])
    labels = data.labels.clone()
    labels[: len(data) // 2] = 0
    blind = recipe.train(config, replace(data, labels=labels), "cpu")
    assert torch.equal(weights(first[3]), weights(blind[3]))


def test_a_tiny_run_gives_rows_table_and_figure(recipe, tmp_path, capsys):
    arguments = [
        "--model", "linear", "--epochs", "0", "1", "--samples", "2", "--attacks", "gs(iterations=2)", "--device",
        "cpu", "--output", str(tmp_path / "out"),
    ]  # fmt: skip
    assert recipe.main(arguments) == 0
    assert "accuracy" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [(row["epoch"], row["sample"]) for row in rows[::2]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    absolute, relative = rows[0], rows[1]
    assert absolute["noise_std"] == pytest.approx(1e-4)
    assert relative["noise_std"] == pytest.approx(relative["perturbation_rms"], rel=0.1)
    assert absolute["local_map_rmse"] == pytest.approx(absolute["map_rms"], rel=0.05)
    table = list(csv.DictReader((tmp_path / "out" / "training_stages.csv").open()))
    assert [(entry["epoch"], entry["defense"][:14]) for entry in table[:2]] == [
        ("0", "gaussian(std=1"),
        ("0", "gaussian(std=0"),
    ]
    assert float(table[0]["accuracy"]) < float(table[-1]["accuracy"])
    assert (tmp_path / "out" / "training_stages.png").stat().st_size > 10_000

    files = sorted((tmp_path / "out-checkpoints").glob("*/epoch-*.safetensors"))
    stamps = [file.stat().st_mtime_ns for file in files]
    assert recipe.main(arguments) == 0
    assert [file.stat().st_mtime_ns for file in files] == stamps  # read, not trained again
