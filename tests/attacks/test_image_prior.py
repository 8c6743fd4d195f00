"""The generative-prior attack: what a decoder makes is found again, in its range and beside it."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import lmleak
from lmleak.attacks import IMAGE_ATTACKS, make_attack
from lmleak.attacks.image_decoder import ImageDecoder, load_decoder, save_decoder
from lmleak.attacks.image_prior import GIAS
from lmleak.errors import ConfigError, DataError, UnsupportedCombinationError
from lmleak.types import Normalization

SHAPE, LATENT = (1, 6, 6), 3
QUICK = {"latent_iterations": 120, "weight_iterations": 0, "restarts": 4}


class Sigmoidal(nn.Module):
    """A smooth network, with the normalisation that an adapter must honour."""

    image_shape = SHAPE
    normalization = Normalization((0.3,), (0.4,))

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.fc1, self.fc2 = nn.Linear(36, 20), nn.Linear(20, 4)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.4)

    def forward(self, pixels):
        return self.fc2(self.fc1(pixels.flatten(1)).sigmoid())


def public_images(count: int, seed: int = 0) -> torch.Tensor:
    """Bright blots at random places and of random widths: three numbers tell an image."""
    row, column, width = torch.rand(3, count, 1, 1, generator=torch.Generator().manual_seed(seed))
    grid = torch.arange(6.0)
    squares = (grid[:, None] - 1 - 3 * row).square() + (grid - 1 - 3 * column).square()
    return torch.exp(-squares / (1 + 3 * width))[:, None]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A decoder trained in two seconds: its latents are fitted along with its weights."""
    images = public_images(200)
    decoder = ImageDecoder(SHAPE, LATENT, 8)
    row, column = images.amax((1, 3)).argmax(1) - 2.5, images.amax((1, 2)).argmax(1) - 2.5
    latents = torch.stack([row, column, 4 * (images.mean((1, 2, 3)) - images.mean())], 1).requires_grad_()
    optimizer = torch.optim.Adam([{"params": decoder.parameters(), "lr": 1e-2}, {"params": [latents], "lr": 1e-2}])
    for _ in range(300):
        loss = (decoder(latents) - images).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 2e-3
    with torch.no_grad():  # latents of deviation 1, as the attack takes them to be
        mean, std = latents.mean(0), latents.std(0)
        decoder.fc.bias += decoder.fc.weight @ mean
        decoder.fc.weight *= std
    return save_decoder(
        tmp_path_factory.mktemp("decoder") / "d.safetensors", decoder, {"data": "blots", "split": "all"}
    )


def case(pixels: torch.Tensor, *, dtype=torch.float32):
    adapter = lmleak.adapt(Sigmoidal().to(dtype))
    images = adapter.normalization.normalize(pixels)
    batch = adapter.batch(images, [i % 4 for i in range(len(images))])
    return adapter, batch, lmleak.capture_gradient(adapter, batch)


def latent_images(path, count: int) -> torch.Tensor:
    """What the decoder makes of random latents."""
    latents = torch.randn(count, LATENT, generator=torch.Generator().manual_seed(5))
    return load_decoder(path)(latents)


def pixel_mse(recovered, adapter, pixels) -> float:
    return (adapter.normalization.pixels(recovered.images) - pixels).square().mean().item()


@pytest.mark.parametrize("objective", ["l2", "cosine"])
def test_an_image_that_the_decoder_makes_is_found_again(path, objective):
    pixels = latent_images(path, 1)
    adapter, _, shared = case(pixels)
    options = {"decoder": str(path), "objective": objective, "latent_prior": 0.0, **QUICK}
    recovered = lmleak.run_attack("gias", adapter, shared, **options)
    assert recovered.images.shape == (1, *SHAPE)
    assert pixel_mse(recovered, adapter, pixels) < 1e-4  # random latents give 4e-2
    assert recovered.objective < 1e-4
    assert recovered.cost.iterations == 4 * 120
    assert recovered.cost.gradient_evaluations == 3 * 4 * 120


def test_a_batch_in_the_range_is_found_in_double_precision(path):
    pixels = latent_images(path, 2)
    adapter, _, shared = case(pixels.double(), dtype=torch.float64)
    recovered = GIAS(decoder=path, objective="l2", latent_prior=0.0, **QUICK | {"restarts": 8}).run(adapter, shared)
    assert recovered.images.dtype == torch.float64
    assert pixel_mse(recovered, adapter, pixels) < 1e-3


def test_the_weights_reach_what_the_latents_cannot(path):
    pixels = public_images(1, seed=9).flip(2) * 0.5  # half as bright as any public image
    adapter, _, shared = case(pixels)
    within = GIAS(decoder=path, **QUICK).run(adapter, shared)
    beyond = GIAS(decoder=path, **QUICK | {"weight_iterations": 150, "weight_learning_rate": 1e-2}).run(
        adapter, shared
    )
    assert beyond.objective < 0.1 * within.objective
    assert pixel_mse(beyond, adapter, pixels) < 0.5 * pixel_mse(within, adapter, pixels)
    assert beyond.cost.iterations == within.cost.iterations + 150


def test_under_noise_the_prior_beats_pixels(path):
    errors = {"gias": [], "gs": []}
    for seed in range(3):
        pixels = latent_images(path, 3)[seed : seed + 1]
        adapter, _, shared = case(pixels)
        noisy = lmleak.defenses.GaussianNoise(std=shared.rms, seed=seed)(shared)
        for name, options in (("gias", {"decoder": str(path), **QUICK}), ("gs", {"iterations": 200})):
            errors[name].append(
                pixel_mse(lmleak.run_attack(name, adapter, noisy, seed=seed, **options), adapter, pixels)
            )
    assert sum(errors["gias"]) < 0.5 * sum(errors["gs"])


def test_images_are_valid_and_the_notes_say_where_the_prior_comes_from(path):
    adapter, _, shared = case(public_images(2))
    recovered = GIAS(decoder=path, latent_iterations=3, weight_iterations=2).run(adapter, shared)
    pixels = adapter.normalization.pixels(recovered.images)
    assert -1e-6 <= pixels.min() < pixels.max() <= 1 + 1e-6
    assert recovered.labels.tolist() == [0, 1]
    assert any("trained on (blots, all)" in note for note in recovered.notes)


def test_same_seed_same_images_and_nothing_else_touched(path):
    adapter, _, shared = case(public_images(2))
    attack = GIAS(decoder=path, latent_iterations=5, weight_iterations=3, restarts=2)
    before, file = torch.get_rng_state(), path.read_bytes()
    weights = {n: p.detach().clone() for n, p in adapter.model.named_parameters()}
    first, second, other = (attack.run(adapter, shared, seed=seed).images for seed in (3, 3, 4))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())
    assert path.read_bytes() == file
    for name, p in adapter.model.named_parameters():
        assert torch.equal(p, weights[name])
        assert p.grad is None


def test_restarts_side_by_side_are_restarts_one_by_one(path, monkeypatch):
    adapter, _, shared = case(public_images(1))
    attack = GIAS(decoder=path, latent_iterations=5, weight_iterations=0, restarts=3)
    together = attack.run(adapter, shared)
    monkeypatch.setattr("lmleak.attacks.image_base.GRADIENT_NUMBERS", 1)
    alone = attack.run(adapter, shared)
    torch.testing.assert_close(together.images, alone.images, rtol=1e-3, atol=1e-4)
    assert together.cost.gradient_evaluations == alone.cost.gradient_evaluations


def test_a_lie_about_the_truth_changes_nothing(path):
    adapter, _, shared = case(public_images(2))
    attack = GIAS(decoder=path, labels="inferred", latent_iterations=5, weight_iterations=2)
    honest = attack.run(adapter, shared)
    fresh, *_ = case(public_images(2))
    fresh.batch(torch.ones(2, *SHAPE), [3, 3])  # what it saw last is a lie
    lied_to = attack.run(fresh, replace(shared, labels=torch.tensor([2, 2])))
    assert torch.equal(honest.images, lied_to.images)
    assert torch.equal(honest.labels, lied_to.labels)


def test_it_is_registered_and_refuses_without_a_decoder():
    adapter, _, shared = case(public_images(1))
    assert IMAGE_ATTACKS["gias"] is GIAS
    with pytest.raises(UnsupportedCombinationError, match=r"recipes/train_image_decoder.py"):
        lmleak.run_attack("gias", adapter, shared)


def test_a_decoder_of_another_shape_is_refused(tmp_path):
    adapter, _, shared = case(public_images(1))
    path = save_decoder(tmp_path / "d.safetensors", ImageDecoder((3, 6, 6), 2, 4), {})
    with pytest.raises(UnsupportedCombinationError, match=r"shape \(3, 6, 6\).* reads \(1, 6, 6\)"):
        lmleak.run_attack("gias", adapter, shared, decoder=str(path))


@pytest.mark.parametrize(
    ("option", "value"),
    [("decoder", 3), ("weight_iterations", -1), ("weight_iterations", 1.5), ("latent_iterations", 0),
     ("objective", "l3"), ("latent_learning_rate", 0.0), ("latent_prior", float("nan"))],
)  # fmt: skip
def test_options_out_of_range_are_refused(option, value):
    with pytest.raises(ConfigError, match=option if option != "objective" else "l3"):
        make_attack("gias", task="image-classification", **{option: value})


# The file -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 7), (1, 28, 28), (2, 1, 1)])
def test_a_file_gives_the_same_decoder_back(tmp_path, shape):
    decoder = ImageDecoder(shape, 4, 6, seed=2)
    loaded = load_decoder(save_decoder(tmp_path / "d.safetensors", decoder, {"data": "x"}))
    latents = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    pixels = loaded(latents)
    assert pixels.shape == (3, *shape)
    assert torch.equal(pixels, decoder(latents))
    assert not any(p.requires_grad for p in loaded.parameters())
    assert loaded.card == {"image_shape": list(shape), "latent_size": 4, "width": 6, "data": "x"}


def damaged_card(**changes):
    return json.dumps({"image_shape": [1, 6, 6], "latent_size": 3, "width": 8} | changes)


@pytest.mark.parametrize(
    "card",
    ["", "{", "[]", "null", "{}", damaged_card(image_shape=6), damaged_card(image_shape=[6, 6]), damaged_card(width=0),
     damaged_card(latent_size=True), damaged_card(latent_size="3"), damaged_card(width=10**9)],
)  # fmt: skip
def test_a_damaged_header_is_refused(path, tmp_path, card):
    with safe_open(path, framework="pt") as file:
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    damaged = tmp_path / "d.safetensors"
    save_file(weights, damaged, metadata={"lmleak-decoder-1": card})
    with pytest.raises(DataError, match=r"header of .* is damaged"):
        load_decoder(damaged)


def test_damaged_missing_and_foreign_files_are_refused(path, tmp_path):
    with pytest.raises(DataError, match="no decoder file"):
        load_decoder(tmp_path / "absent")
    damaged = tmp_path / "d.safetensors"
    damaged.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="truncated"):
        load_decoder(damaged)
    save_file({"x": torch.ones(1)}, damaged)
    with pytest.raises(DataError, match="not a decoder file of version 1"):
        load_decoder(damaged)
    metadata = {"lmleak-decoder-1": damaged_card()}
    weights = ImageDecoder(SHAPE, 3, 8).state_dict()
    save_file({**weights, "fc.bias": weights["fc.bias"][1:].clone()}, damaged, metadata=metadata)
    with pytest.raises(DataError, match="weights are not those"):
        load_decoder(damaged)
    save_file({**weights, "fc.bias": weights["fc.bias"] / 0}, damaged, metadata=metadata)
    with pytest.raises(DataError, match="NaN or Inf"):
        load_decoder(damaged)
