"""The calibrated token score: the separable form against direct projection, noise levels, null tails, posteriors."""

import math

import pytest
import torch

from lmleak.attacks.span_layers import forward
from lmleak.attacks.span_score import FirstLayerScore, Null, noise_of_rows, posterior, soft_row_space
from lmleak.attacks.span_subspace import stacked_gradient
from lmleak.defenses import GaussianNoise
from lmleak.errors import UnsupportedCombinationError
from lmleak.gradients.capture import capture_gradient
from tests.families import SEQUENCES, make


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def low_rank(m, d, rank, size, seed=1):
    return size * noise(m, rank, seed=seed) @ noise(rank, d, seed=seed + 1) / math.sqrt(d)


def scores(name, level=0.0, **options):
    adapter, batch = make(name)
    shared = capture_gradient(adapter, batch)
    if level:
        shared = GaussianNoise(std=level, unit="rms").apply(shared.gradient)
    gradient = shared if level else shared.gradient
    paths = adapter.attention_inputs(0)
    space = soft_row_space(stacked_gradient(adapter, gradient, paths))
    return adapter, FirstLayerScore(adapter, paths[0], space, seed=0, **options)


@pytest.mark.parametrize("name", ["gpt2", "llama", "unlisted-gemma", "opt", "bert", "distilbert", "roberta"])
def test_separable_score_equals_direct_projection(name):
    """float64: every token at every position, against the model's own forward pass and the formula."""
    adapter, score = scores(name, level=0.3)
    vocabulary = torch.arange(adapter.vocabulary_size)
    words = vocabulary != adapter.pad_id  # RoBERTa counts no position at a padding token
    x = forward(adapter, vocabulary[:, None].expand(-1, 6), stop_at=score.path)[:, 2:]
    by_hand = ((x @ score.space.basis).square() * score.space.weight).sum(-1) / x.square().sum(-1)
    assert score.norm is not None
    torch.testing.assert_close(score.energy(2, 6)[words], by_hand[words], rtol=0, atol=1e-10)
    whole = scores(name, level=0.3, separable=False)[1]
    torch.testing.assert_close(whole.energy(2, 6)[words], by_hand[words], rtol=0, atol=1e-10)


def test_energy_is_what_ridge_regression_explains():
    rows, h = low_rank(60, 20, 4, 10.0) + noise(60, 20), noise(20)
    space = soft_row_space(rows)
    scaled = rows / (noise_of_rows(rows) * space.noise / noise_of_rows(rows).log().mean().exp())
    penalty = 0.2 * 60
    c = torch.linalg.solve(scaled @ scaled.T + penalty * torch.eye(60, dtype=torch.float64), scaled @ h)
    left = (h - scaled.T @ c).square().sum() + penalty * c.square().sum()
    assert space.energy(h) == pytest.approx((1 - left / h.square().sum()).item(), abs=1e-10)


@pytest.mark.parametrize(("m", "d"), [(96, 32), (64, 64), (24, 64), (300, 100)])
@pytest.mark.parametrize("size", [0.0, 3.0, 1e4])
def test_noise_level_and_rank_are_read_off_the_spectrum(m, d, size):
    space = soft_row_space(7e-3 * (low_rank(m, d, 5, size * math.sqrt(m)) + noise(m, d)))
    assert space.noise == pytest.approx(7e-3, rel=0.15)
    assert space.rank == pytest.approx(5 if size else 0, abs=1)


def test_rows_of_unequal_noise_are_weighed():
    """Two maps of unequal noise. Levels are right up to a factor, and equal ones come out equal."""
    levels = torch.tensor([0.2, 1.0], dtype=torch.float64).repeat_interleave(100)[:, None]
    found = noise_of_rows(levels * (low_rank(200, 60, 5, 100.0) + noise(200, 60)))
    assert (found / levels).log().std() < 0.3 * levels.log().std()
    equal = noise_of_rows(low_rank(200, 60, 5, 100.0) + noise(200, 60))
    assert equal.log().std() < 0.05


def test_zero_gradient_is_refused():
    with pytest.raises(UnsupportedCombinationError, match="zero"):
        soft_row_space(torch.zeros(8, 4))


def test_tail_quantiles_of_random_tokens_are_uniform():
    """Half of the random inputs calibrate, the other half is tested: P(surprise > t) = exp(-t), or less far out."""
    space = soft_row_space(low_rank(300, 64, 8, 200.0) + noise(300, 64))
    energy = space.energy(noise(40_000, 64, seed=5))
    surprise = Null.fit(energy[:20_000]).surprise(energy[20_000:])
    for probability, tolerance in ((0.25, 0.02), (0.1, 0.01), (0.03, 0.01)):
        share = (surprise > -math.log(probability)).double().mean().item()
        assert share == pytest.approx(probability, abs=tolerance)
    assert (surprise > -math.log(1e-3)).double().mean() <= 1e-3  # the exponential tail is on the careful side


def test_tokens_of_the_model_that_are_not_in_the_batch_are_no_surprise():
    adapter, score = scores("gpt2", level=0.1)
    present = {t for ids in SEQUENCES for t in ids}
    absent = [t for t in range(adapter.vocabulary_size) if t not in present]
    surprise = score.surprise(0, 6)
    assert (surprise[absent] > -math.log(0.1)).double().mean() < 0.15
    true = torch.stack([surprise[t, p] for ids in SEQUENCES for p, t in enumerate(ids[:-1])])
    assert true.median() > surprise[absent].quantile(0.9)


@pytest.mark.parametrize("count", [0.5, 3, 40])
def test_posterior_sums_to_the_number_of_real_ones_and_orders_by_surprise(count):
    surprise = noise(50, 2).abs() * 5
    p = posterior(surprise, count)
    torch.testing.assert_close(p.sum(0), torch.full((2,), float(count), dtype=torch.float64))
    assert torch.equal(p.argsort(0), surprise.argsort(0))
    odds = (p / (1 - p)).log()
    torch.testing.assert_close(odds[0] - odds[1], surprise[0] - surprise[1])


def test_posterior_is_calibrated():
    """Where scores follow the two components, a share p of the tokens given probability p is real."""
    generator = torch.Generator().manual_seed(0)
    real = torch.rand(200_000, generator=generator) < 0.02
    chance = -torch.rand(200_000, generator=generator, dtype=torch.float64).log()
    surprise = torch.where(real, 20 * torch.rand(200_000, generator=generator, dtype=torch.float64), chance)
    p = posterior(surprise, int(real.sum()))
    for low, high in ((0.1, 0.3), (0.3, 0.5), (0.5, 0.7), (0.7, 0.9)):
        here = (p >= low) & (p < high)
        assert real[here].double().mean().item() == pytest.approx(p[here].mean().item(), abs=0.08)


def test_position_free_models_have_one_column():
    _, score = scores("llama")
    assert score.position_free
    torch.testing.assert_close(score.surprise(0, 1), score.surprise(3, 4), rtol=1e-6, atol=1e-6)


def test_sparse_rows_without_noise_do_not_overflow():
    rows = torch.zeros(40, 16, dtype=torch.float64)
    rows[::7, 3], rows[::5, 9] = 1.0, -2.0
    noise = noise_of_rows(rows)
    assert torch.isfinite(noise).all()
    assert (noise > 0).all()
    assert torch.isfinite(soft_row_space(rows).weight).all()
