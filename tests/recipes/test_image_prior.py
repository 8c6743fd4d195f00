"""The study of the generative prior: private images no decoder read, priors weighed by the noise, paired gains."""

import csv
import importlib
import json
from pathlib import Path

import pytest
import torch

from lmleak.attacks.image_decoder import ImageDecoder, save_decoder
from lmleak.config import parse_config
from lmleak.data.images import load_images
from lmleak.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs" / "image_prior").glob("*.yaml"))
TINY = [
    "--samples", "2", "--kinds", "like", "negative", "--noise", "1", "--pruned", "0.9", "--gs-iterations", "2",
    "--newton-iterations", "2", "--latent-iterations", "2", "--weight-iterations", "1", "--restarts", "2",
    "--device", "cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def report(recipe):
    return importlib.import_module("image_prior_report")


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prior")
    save_decoder(folder / "d.safetensors", ImageDecoder((1, 8, 8), 4, 4), {"data": "digits", "split": "second half"})
    assert recipe.main([*TINY, "--decoder", str(folder / "d.safetensors"), "--output", str(folder / "run")]) == 0
    return folder


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.stem}.yaml")
def test_every_configuration_is_read_by_the_real_parser(recipe, path):
    assert parse_config(recipe.PriorConfig, ["--config", str(path)]).output == f"runs/image_prior/{path.stem}"


@pytest.mark.parametrize(
    "arguments",
    [["--kinds", "blurred"], ["--kinds", "like", "like"], ["--noise", "-1"], ["--pruned", "1"], ["--floor", "0"],
     ["--batch-size", "2"], ["--restarts", "0"], ["--gs-iterations", "0"], ["--noise", "--pruned"]],
)  # fmt: skip
def test_wrong_settings_are_refused(recipe, arguments):
    with pytest.raises(ConfigError):
        parse_config(recipe.PriorConfig, arguments)


def test_private_images_are_of_the_first_half(recipe):
    data = load_images("digits")
    config = parse_config(recipe.PriorConfig, ["--samples", "3"])
    kinds = recipe.private_kinds(config, data)
    assert torch.equal(kinds["like"].pixels, data.pixels[:3])
    assert torch.equal(kinds["negative"].pixels, 1 - data.pixels[:3])
    assert torch.equal(kinds["rotated"].pixels[0, 0, 0], data.pixels[0, 0, :, -1])  # a quarter turn to the left
    with pytest.raises(ConfigError, match="first half of digits, on which no decoder was trained, holds 898"):
        recipe.private_kinds(parse_config(recipe.PriorConfig, ["--samples", "899"]), data)


def test_priors_are_weighed_as_the_posterior_says(recipe):
    """-log p(z | g) times 2 sigma^2 / norm^2 is (||g(z) - g||^2 + sigma^2 |z|^2) / norm^2; gias takes mean(z^2)."""
    config = parse_config(recipe.PriorConfig, [])
    attackers = config.attackers(0.2, norm=5.0, latent_size=24, prior_std=2.0)
    assert attackers["latents"].latent_prior == pytest.approx(0.2**2 / 5**2 * 24)
    assert (attackers["latents"].weight_iterations, attackers["gias"].weight_iterations) == (0, 150)
    assert attackers["gaussian prior"].prior_weight == pytest.approx(0.01)
    assert attackers["gauss-newton"].prior_weight == 0


def test_the_nearest_image_of_a_decoder_is_found(recipe):
    decoder = ImageDecoder((1, 8, 8), 3, 4, seed=1)
    with torch.no_grad():
        made = decoder(torch.tensor([[1.0, -2.0, 0.5]]))
    found = recipe.nearest_in_range(decoder, made, seed=0)
    assert (found - made).abs().max() < 1e-3
    assert (recipe.nearest_in_range(decoder, 1 - made, seed=0) - (1 - made)).abs().max() > 0.01


def test_rows_tables_and_figures_are_written(finished):
    rows = [json.loads(line) for line in (finished / "run/results.jsonl").read_text().splitlines()]
    assert len(rows) == len({row["key"] for row in rows}) == 2 * 2 * (1 + 2 * 5)
    noisy = [row for row in rows if row["what"] == "noise"]
    assert {row["attack"] for row in noisy} == {"gs", "gauss-newton", "gaussian prior", "latents", "gias"}
    assert all(row["rmse_pixel"] > 0 for row in rows)
    table = list(csv.DictReader((finished / "run/image_prior.csv").open()))
    assert len(table) == 2 * (2 * 5 + 1)
    line = next(e for e in table if (e["images"], e["release"], e["attack"]) == ("like", "noise 1x", "gs"))
    own = [r["psnr"] for r in noisy if (r["kind"], r["attack"]) == ("like", "gs")]
    assert line["PSNR_dB"].startswith(f"{sum(own) / 2:.1f} (")
    for name in ("image_prior.png", "image_prior-noise-1x.png", "image_prior-0.9-pruned.png"):
        assert 5_000 < (finished / "run" / name).stat().st_size < 500_000


def test_another_decoder_is_not_mixed_in(recipe, finished, capsys):
    save_decoder(finished / "d.safetensors", ImageDecoder((1, 8, 8), 4, 4, seed=1), {"data": "digits"})
    options = [*TINY, "--decoder", str(finished / "d.safetensors"), "--output", str(finished / "run")]
    assert recipe.main(options) == 2
    assert "different configuration" in capsys.readouterr().err
    assert recipe.main([*TINY, "--decoder", "absent", "--output", str(finished / "other")]) == 2
    assert "no decoder file at absent" in capsys.readouterr().err


def test_gains_are_paired_and_over_the_strongest_attack_without_a_decoder(report):
    psnrs = {"gs": (10.0, 20.0), "gauss-newton": (5.0, 6.0), "gaussian prior": (12.0, 14.0), "latents": (13.0, 21.0),
             "gias": (9.0, 20.0)}  # fmt: skip
    rows = [
        {"kind": "like", "what": "noise", "strength": 1.0, "attack": attack, "sample": i, "psnr": value}
        for attack, values in psnrs.items()
        for i, value in enumerate(values)
    ]
    (entry,) = report.gains(rows)
    assert entry["strongest_without_decoder"] == "gs"
    assert entry["latents_gains_dB"] == "2.0 (1.0 to 3.0)"
    assert entry["gias_gains_dB"].startswith("-0.5 (")
