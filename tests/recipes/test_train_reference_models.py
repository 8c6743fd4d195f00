"""The recipe of the reference models: reproducible to the last bit, and the one that made the shipped files."""

import json
from types import SimpleNamespace

import pytest
import torch

from lmleak.config import parse_config
from lmleak.data.embedded import REFERENCE_MODELS
from lmleak.errors import ConfigError
from tests.launching import ROOT, launch

TINY = {"vocab_size": 600, "hidden_size": 16, "layers": 1, "heads": 2, "intermediate_size": 32,
        "num_messages": 300, "num_held_out": 40, "batch_size": 8, "mlm_steps": 3, "steps": 3}  # fmt: skip


@pytest.mark.parametrize("model_type", ["bert", "gpt2"])
def test_the_recipe_gives_the_same_bytes_twice(recipe, model_type, tmp_path):
    before = torch.get_rng_state()
    cards = [
        recipe.main(recipe.TrainReferenceModels(model_type=model_type, output=str(tmp_path / run), **TINY))
        for run in ("first", "second")
    ]
    assert torch.equal(torch.get_rng_state(), before)
    assert cards[0] == cards[1]
    files = sorted(file.name for file in (tmp_path / "first").iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json", "training.json"} <= set(files)
    for file in files:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes(), file


def test_another_seed_gives_other_weights(recipe, tmp_path):
    for seed in (0, 1):
        recipe.main(recipe.TrainReferenceModels(output=str(tmp_path / str(seed)), seed=seed, **TINY))
    assert (tmp_path / "0/model.safetensors").read_bytes() != (tmp_path / "1/model.safetensors").read_bytes()


def test_training_moves_the_embeddings_in_both_stages(recipe, tmp_path):
    losses = {}
    for steps in (3, 40):
        tiny = TINY | {"mlm_steps": steps, "steps": steps, "learning_rate": 1e-2, "mlm_learning_rate": 1e-2}
        losses[steps] = recipe.main(recipe.TrainReferenceModels(output=str(tmp_path / str(steps)), **tiny))["results"]
    assert losses[40]["masked_lm_loss"] < losses[3]["masked_lm_loss"] - 0.3
    assert losses[40]["held_out_loss"] < losses[3]["held_out_loss"]


def test_a_width_that_the_heads_do_not_divide_is_refused(recipe):
    with pytest.raises(ConfigError, match="hidden_size=10 is no multiple of heads=4"):
        recipe.TrainReferenceModels(hidden_size=10)


def test_more_than_one_process_is_refused(recipe, monkeypatch):
    monkeypatch.setattr(recipe, "Accelerator", lambda **_: SimpleNamespace(num_processes=2))
    with pytest.raises(ConfigError, match="got 2 processes, expected 1"):
        recipe.main(recipe.TrainReferenceModels())


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_the_shipped_configuration_trained_the_shipped_model(recipe, kind):
    args = parse_config(
        recipe.TrainReferenceModels, ["--config", str(ROOT / f"configs/train_reference_models/{kind}.yaml")]
    )
    trained_on = json.loads((REFERENCE_MODELS[f"reference-{kind}"] / "training.json").read_text())["config"]
    assert {name: getattr(args, name) for name in trained_on} == trained_on
    assert (ROOT / args.output).resolve() == REFERENCE_MODELS[f"reference-{kind}"].resolve()


@pytest.mark.slow
def test_the_recipe_launches_and_gives_the_same_bytes_in_another_process(recipe, tmp_path):
    tiny = [word for name, value in TINY.items() for word in (f"--{name}", str(value))]
    arguments = ["--config", str(ROOT / "configs/train_reference_models/bert.yaml"), *tiny, "--output"]
    assert recipe.command([*arguments, str(tmp_path / "first")]) == 0
    done = launch(ROOT / "recipes/train_reference_models.py", *arguments, tmp_path / "second", processes=1)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(list((tmp_path / "first").iterdir())) > 3
    for file in (tmp_path / "first").iterdir():
        assert file.read_bytes() == (tmp_path / "second" / file.name).read_bytes(), file.name
