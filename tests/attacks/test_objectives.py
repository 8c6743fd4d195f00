"""Distances of gradients: cosines against hand computation, and coordinates that do not count."""

import pytest
import torch
from torch.nn import functional as F

from lmleak.attacks.objectives import Cosine, LayerCosine, SquaredL2, SquaredL2PlusL1

OBSERVED = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([[0.0, -0.1]])}
GUESS = {"a": torch.tensor([3.0, 2.0]), "b": torch.tensor([[0.2, -0.1]])}


def test_cosines_by_hand():
    # <g, g*> = 9 + 8 + 0.01, ||g||^2 = 13.05, ||g*||^2 = 25.01
    assert Cosine(OBSERVED, balance=0.0)(GUESS).item() == pytest.approx(1 - 17.01 / (13.05 * 25.01) ** 0.5)
    # layers alike: squared scales 1/50 and 1/0.02
    inner, square = 17 / 50 + 0.01 / 0.02, 13 / 50 + 0.05 / 0.02
    assert Cosine(OBSERVED, balance=1.0)(GUESS).item() == pytest.approx(1 - inner / square**0.5)
    a, b = 17 / (5 * 13**0.5), 0.01 / (0.1 * 0.05**0.5)
    assert LayerCosine(OBSERVED)(GUESS).item() == pytest.approx(1 - (a + b) / 2)


@pytest.mark.parametrize("objective", [Cosine(OBSERVED, balance=0.5), LayerCosine(OBSERVED)], ids=["gs", "lamp"])
def test_cosines_are_blind_to_size_and_finite_at_zero(objective):
    assert objective({n: 7 * g for n, g in OBSERVED.items()}).item() == pytest.approx(0, abs=1e-6)
    assert objective({n: -g for n, g in OBSERVED.items()}).item() == pytest.approx(2)
    assert objective({n: 0 * g for n, g in OBSERVED.items()}).item() == pytest.approx(1)


def test_layers_of_rounding_noise_have_no_say_in_the_layer_cosine():
    noisy = OBSERVED | {"key.bias": torch.tensor([1e-9, -1e-9])}
    guess = GUESS | {"key.bias": torch.tensor([5.0, 5.0])}
    assert LayerCosine(noisy)(guess).item() == LayerCosine(OBSERVED)(GUESS).item()


def test_coordinates_that_were_dropped_are_not_compared():
    kept = {"b": torch.tensor([[False, True]])}
    for make in (
        lambda observed, **k: SquaredL2(observed, balance=0.5, **k),
        lambda observed, **k: SquaredL2PlusL1(observed, balance=0.5, alpha=0.3, **k),
        lambda observed, **k: Cosine(observed, balance=0.5, **k),
        LayerCosine,
    ):
        anything = GUESS | {"b": torch.tensor([[99.0, -0.1]])}
        assert make(OBSERVED, kept=kept)(anything).item() == make(OBSERVED, kept=kept)(GUESS).item()
        without = {"a": GUESS["a"], "b": torch.tensor([[0.0, -0.1]])}
        assert make(OBSERVED, kept=kept)(anything).item() == pytest.approx(make(OBSERVED)(without).item())


def test_fused_sums_equal_the_written_formula():
    generator = torch.Generator().manual_seed(0)
    observed = {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in {"a": 5, "b": (3, 4)}.items()}
    guess = {n: torch.randn(g.shape, generator=generator, dtype=torch.float64) for n, g in observed.items()}
    tag = SquaredL2PlusL1(observed, balance=0.7, alpha=0.3)
    scaled = {n: tag.scales[n] * g for n, g in observed.items()}
    differences = [tag.scales[n] * guess[n] - scaled[n] for n in observed]
    l2 = sum(d.square().sum() for d in differences)
    l1 = sum(d.abs().sum() for d in differences) / sum(g.abs().sum() for g in scaled.values())
    assert tag(guess).item() == pytest.approx((l2 + 0.3 * l1).item(), rel=1e-12)
    whole = [torch.cat([t[n].flatten() * tag.scales[n] for n in observed]) for t in (guess, observed)]
    assert Cosine(observed, balance=0.7)(guess).item() == pytest.approx(1 - F.cosine_similarity(*whole, dim=0).item())
