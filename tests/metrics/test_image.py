"""Image scores against numpy and scikit-image, and what becomes of wrong, permuted and diverged reconstructions."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import lmleak
from lmleak.adapters import LeNet, adapt
from lmleak.defenses import GaussianNoise, HideLayers, Prune
from lmleak.errors import DataError
from lmleak.metrics.image import LARGEST_PSNR, mse, psnr, ssim
from lmleak.metrics.image_score import match_images
from lmleak.types import AttackCost, ImageReconstruction, Normalization

COLOURS = Normalization((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261))


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def answer(images, labels=None):
    return ImageReconstruction("test", images, labels, AttackCost(0.0), "by hand")


@pytest.fixture
def case():
    """A LeNet in double precision, three coloured images of three classes, and their gradient."""
    adapter = adapt(LeNet(3, 12).double(), normalization=COLOURS)
    batch = adapter.batch(COLOURS.normalize(uniform(3, 3, 12, 12)), [3, 1, 4])
    return adapter, batch, lmleak.capture_gradient(adapter, batch, shared="all")


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (1, 11, 11), (3, 11, 40), (3, 64, 17)])
@pytest.mark.parametrize("noise", [0.0, 0.02, 0.5])
def test_ssim_and_psnr_are_those_of_scikit_image(shape, noise):
    metrics = pytest.importorskip("skimage.metrics")
    true = uniform(*shape)
    guess = (true + noise * (uniform(*shape, seed=1) - 0.5)).clamp(0, 1)
    options = {"data_range": 1.0, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    expected = metrics.structural_similarity(true.numpy(), guess.numpy(), channel_axis=0, **options)
    assert ssim(guess, true) == pytest.approx(expected, abs=1e-10)
    if noise:
        expected = metrics.peak_signal_noise_ratio(true.numpy(), guess.numpy(), data_range=1.0)
        assert psnr(guess, true) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize(("size", "window"), [(10, 9), (9, 9), (8, 7), (5, 5), (4, 3), (3, 3)])
def test_ssim_of_small_images_shrinks_the_window_and_its_deviation(size, window):
    metrics = pytest.importorskip("skimage.metrics")
    true, guess = uniform(2, size, size), uniform(2, size, size, seed=1)
    expected = metrics.structural_similarity(
        true.numpy(), guess.numpy(), channel_axis=0, data_range=1.0, gaussian_weights=True, sigma=1.5 * window / 11,
        use_sample_covariance=False,
    )  # fmt: skip
    assert ssim(guess, true) == pytest.approx(expected, abs=1e-10)


def test_other_data_ranges_are_units():
    true, guess = uniform(1, 16, 16), uniform(1, 16, 16, seed=1)
    assert ssim(255 * guess, 255 * true, data_range=255.0) == pytest.approx(ssim(guess, true), abs=1e-12)
    assert psnr(255 * guess, 255 * true, data_range=255.0) == pytest.approx(psnr(guess, true), abs=1e-12)


def test_equal_images_score_best_and_undefined_is_none():
    true = uniform(1, 8, 8)
    assert mse(true, true) == 0
    assert psnr(true, true) == psnr(true + 1e-12, true) == LARGEST_PSNR
    assert ssim(true, true) == pytest.approx(1, abs=1e-12)
    for bad in (float("nan"), float("inf"), 1e200):
        broken = true.clone()
        broken[0, 0, 0] = bad
        assert mse(broken, true) is psnr(broken, true) is ssim(broken, true) is None
    assert ssim(uniform(1, 2, 9), uniform(1, 2, 9)) is None
    with pytest.raises(DataError, match="one shape"):
        mse(uniform(1, 8, 8), uniform(3, 8, 8))
    with pytest.raises(DataError, match="one shape"):
        mse(torch.empty(0), torch.empty(0))
    with pytest.raises(DataError, match="C, H, W"):
        ssim(uniform(8, 8), uniform(8, 8))


def test_scores_are_the_formulas_in_both_units(case):
    adapter, batch, _ = case
    truth = batch.inputs["pixel_values"]
    images = truth + 0.3 * (uniform(*truth.shape, seed=2) - 0.5)
    score = lmleak.score_images(answer(images), batch, adapter)
    std = torch.tensor(COLOURS.std, dtype=torch.float64)[:, None, None]
    for i, example in enumerate(score.per_example):
        error = (images[i] - truth[i]).numpy()
        assert example.mse == pytest.approx((error**2).mean(), rel=1e-12)
        assert example.rmse == pytest.approx(np.sqrt((error**2).mean()), rel=1e-12)
        assert example.rmse_pixel == pytest.approx(np.sqrt(((error * std.numpy()) ** 2).mean()), rel=1e-12)
        pixels, true_pixels = (COLOURS.pixels(x[i]).numpy() for x in (images, truth))
        seen = pixels.clip(0, 1)
        assert (seen != pixels).any()  # so that clipping matters
        assert example.psnr == pytest.approx(-10 * np.log10(((seen - true_pixels) ** 2).mean()), rel=1e-12)
        logits = adapter.logits(images)[i] - adapter.logits(truth)[i]
        assert example.feature_mse == pytest.approx(logits.square().mean().item(), rel=1e-10)
    assert score.mse == pytest.approx((images - truth).square().mean().item(), rel=1e-12)
    assert score.rmse == pytest.approx((images - truth).square().mean().sqrt().item(), rel=1e-12)  # pooled
    assert score.psnr == pytest.approx(np.mean([example.psnr for example in score.per_example]))
    assert score.matching_loss is score.label_accuracy is None


def test_clipping_touches_psnr_and_ssim_alone(case):
    adapter, batch, _ = case
    black = adapter.valid_range()[0].expand(3, -1, -1, -1)
    dark = replace(batch, inputs={"pixel_values": black})
    score = lmleak.score_images(answer(black - 5), dark, adapter)  # five units below black is seen as black
    assert score.mse == pytest.approx(25)
    assert score.psnr == LARGEST_PSNR
    assert score.ssim == pytest.approx(1)


def test_perfect_recovery_in_another_order_is_perfect(case):
    adapter, batch, shared = case
    truth = batch.inputs["pixel_values"]
    order = [2, 0, 1]  # recovered image j is the private one order[j]
    score = lmleak.score_images(answer(truth[order], batch.targets[order]), batch, adapter, shared)
    assert score.order == tuple(order.index(i) for i in range(3))
    assert [example.label for example in score.per_example] == [3, 1, 4]
    assert score.mse == score.rmse == score.rmse_pixel == 0
    assert score.feature_mse == pytest.approx(0, abs=1e-28)
    assert score.psnr == LARGEST_PSNR
    assert score.ssim == pytest.approx(1)
    assert score.matching_loss == pytest.approx(0, abs=1e-24)
    assert score.label_accuracy == 1
    assert score.num_references == 3
    assert score.num_diverged == 0


@pytest.mark.parametrize("seed", range(5))
def test_assignment_is_the_best_of_all_orders_and_ignores_the_attacks_own(seed):
    truth, images = uniform(4, 1, 3, 3, seed=seed), uniform(4, 1, 3, 3, seed=seed + 10)
    best = min(itertools.permutations(range(4)), key=lambda p: (images[list(p)] - truth).square().sum().item())
    assert match_images(images, truth) == best
    shuffled = [3, 1, 0, 2]
    assert [shuffled[j] for j in match_images(images[shuffled], truth)] == list(best)


def test_matching_loss_is_the_relative_squared_distance(case):
    adapter, batch, shared = case
    images = batch.inputs["pixel_values"] + 0.1 * uniform(3, 3, 12, 12, seed=5)
    labels = torch.tensor([3, 1, 5])
    other = lmleak.capture_gradient(adapter, adapter.batch(images, labels), shared="all").gradient
    distance = sum((other[k] - g).square().sum() for k, g in shared.gradient.items())
    norm = sum(g.square().sum() for g in shared.gradient.values())
    score = lmleak.score_images(answer(images, labels), batch, adapter, shared)
    assert score.matching_loss == pytest.approx((distance / norm).item(), rel=1e-10)
    assert score.label_accuracy == pytest.approx(2 / 3)


@pytest.mark.parametrize("defense", [GaussianNoise(std=0.01, seed=3), Prune(ratio=0.5), HideLayers(names="fc")])
def test_matching_loss_at_the_truth_is_what_the_defense_changed(case, defense):
    adapter, batch, shared = case
    release = defense.release(shared)
    score = lmleak.score_images(answer(batch.inputs["pixel_values"]), batch, adapter, release.shared)
    delta = sum(d.square().sum() for d in release.perturbation.values())
    norm = sum(g.square().sum() for g in release.shared.gradient.values())
    assert score.matching_loss == pytest.approx((delta / norm).item(), rel=1e-10, abs=1e-24)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e200])
def test_a_diverged_image_has_no_scores_and_gives_no_flattering_mean(case, bad):
    adapter, batch, shared = case
    images = batch.inputs["pixel_values"][[1, 2, 0]].clone()
    images[0, 0, 0, 0] = bad
    score = lmleak.score_images(answer(images), batch, adapter, shared)
    assert score.order == (2, 0, 1)
    assert score.num_diverged == 1
    assert score.mse is score.rmse is score.rmse_pixel is score.psnr is score.ssim is None
    assert score.per_example[1].mse is score.per_example[1].ssim is None
    assert score.per_example[0].mse == score.per_example[2].mse == 0
    assert json.loads(json.dumps(score.to_dict(), allow_nan=False))["mse"] is None
    if not np.isfinite(bad):
        assert score.matching_loss is None


def test_dictionary_holds_everything(case):
    adapter, batch, shared = case
    score = lmleak.score_images(answer(batch.inputs["pixel_values"], batch.targets), batch, adapter, shared)
    row = score.to_dict()
    assert list(row) == [
        "mse", "rmse", "rmse_pixel", "psnr", "ssim", "feature_mse", "matching_loss", "label_accuracy",
        "num_references", "num_diverged", "per_example",
    ]  # fmt: skip
    assert len(row["per_example"]) == 3
    assert row["per_example"][0]["prediction"] == 0


def test_scoring_leaves_everything_alone(case):
    adapter, batch, shared = case
    images = batch.inputs["pixel_values"] + 1
    before, state = images.clone(), torch.get_rng_state()
    lmleak.score_images(answer(images), batch, adapter, shared)
    assert torch.equal(images, before)
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in adapter.model.parameters())


def test_wrong_shapes_are_refused(case):
    adapter, batch, _ = case
    truth = batch.inputs["pixel_values"]
    for images in (truth[:2], truth[:, :1], truth[..., :5]):
        with pytest.raises(DataError, match="one recovered image of the same size"):
            lmleak.score_images(answer(images), batch, adapter)
    with pytest.raises(DataError, match="one label per image"):
        lmleak.score_images(answer(truth, torch.tensor([1])), batch, adapter)


def test_what_holds_no_images_is_refused():
    text_adapter = lmleak.load_adapter("reference-gpt2")
    text = text_adapter.batch(["my scan came back"])
    recovered = lmleak.run_attack("span", text_adapter, lmleak.capture_gradient(text_adapter, text))
    adapter = adapt(LeNet(size=8))
    images = adapter.batch(torch.zeros(1, 1, 8, 8), [0])
    found = lmleak.run_attack("gs", adapter, lmleak.capture_gradient(adapter, images), iterations=1)
    for arguments in ((recovered, text, text_adapter), (found, text, adapter), (found, images, text_adapter)):
        with pytest.raises(DataError, match="score_images"):
            lmleak.score_images(*arguments)
    with pytest.raises(DataError, match="score_text"):
        lmleak.score_text(found, text)
