"""The recipe of the image decoder: reproducible to the last bit, and blind to the private half."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lmleak.attacks.image_decoder import load_decoder
from lmleak.config import parse_config
from lmleak.data.images import load_images
from lmleak.errors import ConfigError

ROOT = Path(__file__).parents[2]
TINY = {"steps": 3, "batch_size": 8, "latent_size": 4, "width": 4}


def test_the_recipe_gives_the_same_bytes_twice_and_says_where_they_come_from(recipe, tmp_path):
    before = torch.get_rng_state()
    cards = [recipe.main(recipe.TrainImageDecoder(output=str(tmp_path / run), **TINY)) for run in ("a", "b")]
    assert torch.equal(torch.get_rng_state(), before)
    assert cards[0] == cards[1]
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    card = load_decoder(tmp_path / "a").card
    assert card["data"] == "digits"
    assert card["split"] == "the second half by index"
    assert card["public_images"] == 1797 - 898
    assert (card["image_shape"], card["latent_size"], card["seed"]) == ([1, 8, 8], 4, 0)
    assert str(tmp_path) not in str(card)


def test_another_seed_gives_another_decoder(recipe, tmp_path):
    for seed in (0, 1):
        recipe.main(recipe.TrainImageDecoder(output=str(tmp_path / str(seed)), seed=seed, **TINY))
    assert (tmp_path / "0").read_bytes() != (tmp_path / "1").read_bytes()


def test_private_images_change_nothing(recipe, tmp_path, monkeypatch):
    recipe.main(recipe.TrainImageDecoder(output=str(tmp_path / "true"), **TINY))
    data = load_images("digits")
    for number, rows in enumerate((slice(0, 898), slice(898, None))):
        pixels = data.pixels.clone()
        pixels[rows] = 0.5
        monkeypatch.setattr(recipe, "load_images", lambda *_, p=pixels, **__: replace(data, pixels=p))
        recipe.main(recipe.TrainImageDecoder(output=str(tmp_path / "changed"), **TINY))
        same = (tmp_path / "changed").read_bytes() == (tmp_path / "true").read_bytes()
        assert same == (number == 0)


def test_training_teaches_the_decoder(recipe, tmp_path):
    settings = TINY | {"steps": 400, "batch_size": 32, "latent_size": 8, "width": 8, "learning_rate": 1e-2}
    card = recipe.main(recipe.TrainImageDecoder(output=str(tmp_path / "d"), **settings))
    public = load_images("digits").pixels[898:]
    assert card["results"]["public_rmse"] < 0.8 * (public - public.mean(0)).square().mean().sqrt()


def test_images_are_resized(recipe, tmp_path):
    recipe.main(recipe.TrainImageDecoder(output=str(tmp_path / "d"), size=12, **TINY))
    assert load_decoder(tmp_path / "d").image_shape == (1, 12, 12)


def test_settings_out_of_range_are_refused(recipe, tmp_path, capsys):
    for option, value in (("steps", 0), ("latent_size", 0), ("pixel_std", 0.0), ("learning_rate", float("nan"))):
        with pytest.raises(ConfigError, match=option):
            recipe.TrainImageDecoder(**{option: value})
    assert recipe.command(["--output", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["digits", "mnist"])
def test_the_shipped_configurations_are_read(recipe, name):
    args = parse_config(recipe.TrainImageDecoder, ["--config", str(ROOT / f"configs/train_image_decoder/{name}.yaml")])
    assert args.output == f"runs/image-decoder/{name}.safetensors"
