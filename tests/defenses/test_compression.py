"""Clipping, sparsification, signs, quantization and hiding against independent oracles."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmleak.defenses import Bfloat16, Clip, HideLayers, Prune, Quantize, Sign, TopK
from lmleak.defenses.magnitude import CHUNK
from lmleak.errors import ConfigError


def flat(gradient):
    return torch.cat([gradient[name].flatten() for name in sorted(gradient)])


def naive_pruned(gradient, count):
    """A stable sort of all magnitudes."""
    together = flat(gradient).clone()
    together[together.abs().sort(stable=True).indices[:count]] = 0
    return together


# clip


@pytest.mark.parametrize("max_norm", [1e-3, 0.7, 5.0])
def test_clipped_norm(max_norm, make_shared):
    shared = make_shared()
    norm = flat(shared.gradient).norm().item()
    clipped = flat(Clip(max_norm)(shared).gradient)
    assert clipped.norm().item() == pytest.approx(max_norm * norm / (norm + 1e-6), rel=1e-12)
    assert clipped.norm() < max_norm
    torch.testing.assert_close(clipped / clipped.norm(), flat(shared.gradient) / norm, rtol=1e-12, atol=0)


def test_gradient_within_the_norm_is_not_scaled(make_shared):
    shared = make_shared()
    norm = flat(shared.gradient).norm().item()
    assert torch.equal(flat(Clip(norm + 2e-6)(shared).gradient), flat(shared.gradient))


def test_clip_norm_is_accumulated_in_float64(make_shared):
    shared = make_shared(gradient={"a": torch.full((10_000,), 300.0, dtype=torch.float16)})  # squares overflow
    clipped = Clip(100.0)(shared).gradient["a"]
    assert clipped.double().norm().item() == pytest.approx(100.0, rel=1e-3)


@pytest.mark.parametrize("max_norm", [0, -1.0, float("nan"), float("inf"), "1"])
def test_norm_that_cannot_be_is_refused(max_norm):
    with pytest.raises(ConfigError, match="max_norm must be a finite number > 0"):
        Clip(max_norm)


# prune and top-k


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.4, 0.55, 0.9, 0.999])
def test_prune_equals_a_stable_sort(ratio, dtype, make_shared):
    shared = make_shared(dtype)
    count = math.floor(ratio * shared.num_coordinates)
    assert torch.equal(flat(Prune(ratio)(shared).gradient), naive_pruned(shared.gradient, count))


@settings(deadline=None)
@given(
    values=st.lists(st.sampled_from([-2.0, -1.0, -1e-310, 0.0, 1e-45, 0.5, 1.0, 2.0, 1e300]), min_size=1, max_size=30),
    split=st.integers(0, 30),
    data=st.data(),
)
def test_top_k_keeps_exactly_k_whatever_the_ties(values, split, data):
    together = torch.tensor(values, dtype=torch.float64)
    gradient = {"a": together[:split], "b": together[split:]}
    k = data.draw(st.integers(1, len(values)))
    result = flat(TopK(k=k).apply(gradient))
    assert torch.equal(result, naive_pruned(gradient, len(values) - k))


def test_ties_between_tensors_are_broken_by_name_not_by_dictionary_order():
    for names in ("ab", "ba"):
        pruned = TopK(k=3).apply({name: torch.tensor([1.0, -1.0]) for name in names})
        assert {name: tensor.tolist() for name, tensor in pruned.items()} == {"a": [0.0, -1.0], "b": [1.0, -1.0]}


def test_mixed_dtypes_are_ranked_as_numbers():
    gradient = {"a": torch.tensor([1.0, 3.0], dtype=torch.bfloat16), "b": torch.tensor([2.0, 1.0 + 1e-12]).double()}
    pruned = TopK(k=2).apply(gradient)
    assert pruned["a"].tolist() == [0.0, 3.0]
    assert pruned["b"].tolist() == [2.0, 0.0]


@pytest.mark.parametrize("total", [10, 100, 1000, 3001])
def test_count_follows_the_decimal_as_written(total):
    gradient = {"a": torch.arange(1.0, total + 1)}
    for percent in range(0, 100):
        pruned = Prune(percent / 100).apply(gradient)["a"]
        assert (pruned == 0).sum() == percent * total // 100
        assert torch.equal(pruned, TopK(fraction=round(1 - percent / 100, 2)).apply(gradient)["a"])


def test_selection_beyond_two_to_the_24_coordinates():
    total = 2**24 + CHUNK // 2 + 3
    values = torch.randn(total, generator=torch.Generator().manual_seed(2))
    gradient = {"a": values[: CHUNK + 5].view(1, -1), "b": values[CHUNK + 5 :]}
    count = math.floor(0.4 * total)
    threshold = values.abs().kthvalue(count + 1).values
    pruned = flat(Prune(0.4).apply(gradient))
    dropped = pruned == 0
    assert dropped.sum() == count
    assert torch.equal(pruned[~dropped], values[~dropped])
    assert values[dropped].abs().max() <= threshold <= values[~dropped].abs().min()


def test_top_k_refuses_more_than_there_is(make_shared):
    shared = make_shared()
    assert torch.equal(flat(TopK(k=shared.num_coordinates)(shared).gradient), flat(shared.gradient))
    with pytest.raises(ConfigError, match=r"cannot keep k=\d+ of \d+ coordinates"):
        TopK(k=shared.num_coordinates + 1)(shared)


@pytest.mark.parametrize("ratio", [1, 1.0, -0.1, float("nan"), "half"])
def test_ratio_that_cannot_be_is_refused(ratio):
    with pytest.raises(ConfigError, match=r"ratio must be a number in \[0, 1\)"):
        Prune(ratio)


@pytest.mark.parametrize(
    "settings", [{}, {"k": 3, "fraction": 0.1}, {"k": 0}, {"k": 2.5}, {"fraction": 0}, {"fraction": 1.1}]
)
def test_top_k_settings_that_cannot_be_are_refused(settings):
    with pytest.raises(ConfigError, match="topk"):
        TopK(**settings)


# sign


def test_sign_values(make_shared):
    shared = make_shared()
    true = flat(shared.gradient)
    assert torch.equal(flat(Sign("none")(shared).gradient), true.sign())
    scaled = flat(Sign()(shared).gradient)
    torch.testing.assert_close(scaled, true.abs().mean() * true.sign(), rtol=1e-13, atol=0)
    assert torch.equal(scaled == 0, true == 0)
    with pytest.raises(ConfigError, match="scale must be mean or none"):
        Sign("median")


# quantization


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_quantized_values_lie_on_the_levels_next_to_the_true_ones(bits, dtype, make_shared):
    shared = make_shared(dtype)
    steps = 2 ** (bits - 1) - 1
    for name, released in Quantize(bits, seed=3)(shared).gradient.items():
        true = shared.gradient[name].double()
        step = true.abs().max() / steps
        if step == 0:
            assert not released.any()
            continue
        levels = released.double() / step
        torch.testing.assert_close(levels, levels.round(), rtol=0, atol=steps * 4 * torch.finfo(dtype).eps)
        assert levels.abs().max().round() == steps
        assert ((released - true).abs() < step * (1 + steps * 4 * torch.finfo(dtype).eps)).all()
        assert torch.equal(released[true == 0], torch.zeros_like(released[true == 0]))
        largest = true.abs() == true.abs().max()
        assert torch.equal(released[largest], shared.gradient[name][largest])
        assert len(released.unique()) <= 2**bits - 1


def assert_unbiased(kind, true, gap, seeds=400):
    """The mean over seeds deviates by at most 5 standard errors, each below gap / 2 / sqrt(seeds)."""
    mean = torch.stack([kind(seed).apply({"a": true})["a"].double() for seed in range(seeds)]).mean(0)
    assert ((mean - true.double()).abs() <= 5 * gap / 2 / seeds**0.5 + 1e-7 * gap).all()


@pytest.mark.parametrize("bits", [2, 8])
def test_quantization_is_unbiased(bits):
    true = torch.linspace(-1, 0.8, 500, dtype=torch.float64)
    assert_unbiased(lambda seed: Quantize(bits, seed), true, gap=1 / (2 ** (bits - 1) - 1))


def test_stochastic_bf16_is_unbiased_and_rounds_to_a_neighbour():
    generator = torch.Generator().manual_seed(4)
    true = torch.randn(500, generator=generator) * torch.logspace(-30, 30, 500)
    gap = 2.0 ** (true.double().abs().log2().floor() - 7)  # spacing of 8-bit significands
    assert_unbiased(lambda seed: Bfloat16(True, seed), true, gap)
    rounded = Bfloat16(True, seed=3).apply({"a": true})["a"]
    assert torch.equal(rounded.to(torch.bfloat16).float(), rounded)
    assert ((rounded.double() - true.double()).abs() < gap).all()
    already = true.to(torch.bfloat16).float()
    assert torch.equal(Bfloat16(True, seed=3).apply({"a": already})["a"], already)


def test_bf16_to_nearest_is_the_cast(make_shared):
    shared = make_shared(torch.float32)
    for name, tensor in Bfloat16()(shared).gradient.items():
        assert torch.equal(tensor, shared.gradient[name].to(torch.bfloat16).float())
    assert not Bfloat16().random
    assert Bfloat16(stochastic=True).random


@pytest.mark.parametrize("bits", [1, 17, 8.0, "8", True])
def test_bits_that_cannot_be_are_refused(bits):
    with pytest.raises(ConfigError, match="bits must be an integer from 2 to 16"):
        Quantize(bits)


def test_flag_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="stochastic must be True or False, got 1"):
        Bfloat16(stochastic=1)


# hide-layers


def test_hidden_names_are_absent(make_shared):
    shared = make_shared()
    anchored = HideLayers(r"^encoder\.[01]\.dense")(shared)
    assert list(anchored.gradient) == ["embeddings.word.weight", "encoder.1.scale", "head.weight"]
    anywhere = HideLayers("weight$").release(shared)
    assert list(anywhere.shared.gradient) == ["encoder.0.dense.bias", "encoder.1.scale"]
    assert list(anywhere.perturbation) == ["encoder.0.dense.bias", "encoder.1.scale"]
    assert not any(delta.any() for delta in anywhere.perturbation.values())


def test_hiding_nothing_or_everything_is_refused(make_shared):
    with pytest.raises(ConfigError, match="matches none of the 6 shared parameters"):
        HideLayers("decoder")(make_shared())
    with pytest.raises(ConfigError, match="matches all 6 shared parameters"):
        HideLayers(".")(make_shared())


@pytest.mark.parametrize("names", ["(", "", 3, None, "a'b\"c"])
def test_pattern_that_cannot_be_is_refused(names):
    with pytest.raises(ConfigError, match="hide-layers: names"):
        HideLayers(names)
