"""Per-example clipping, the first half of DP-SGD, against an explicit loop of backward passes."""

import math

import pytest
import torch

from lmleak.defenses import GaussianNoise
from lmleak.errors import ConfigError, UnsupportedCombinationError
from lmleak.gradients import SharedGradient, capture_gradient
from lmleak.types import Aggregation
from tests.families import make
from tests.gradients.training import largest_difference, own_loss


def explicit(adapter, batch, max_norm):
    """(mean of clipped gradients, norms before clipping), by loss.backward() on one example at a time."""
    total, norms = {}, []
    model = adapter.model
    for i in range(batch.size):
        model.zero_grad()
        own_loss(model, batch, slice(i, i + 1)).backward()
        gradient = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        norms.append(math.sqrt(sum(g.square().sum().item() for g in gradient.values())))
        factor = min(1.0, max_norm / (norms[-1] + 1e-6)) / batch.size
        for n, g in gradient.items():
            total[n] = total.get(n, 0) + factor * g
    model.zero_grad()
    return total, norms


@pytest.mark.parametrize("name", ["bert", "gpt2", "gpt2-untied", "bert-mlm"])
def test_equals_the_explicit_loop(name):
    adapter, batch = make(name)
    _, norms = explicit(adapter, batch, math.inf)
    threshold = sorted(norms)[1] * 0.999  # two are clipped, one is not
    expected, _ = explicit(adapter, batch, threshold)
    clipped = capture_gradient(adapter, batch, shared="all", max_example_norm=threshold)
    assert {n for n, g in clipped.gradient.items() if g.any()} == {n for n, g in expected.items() if g.any()}
    assert largest_difference({n: clipped.gradient[n] for n in expected}, expected) < 1e-11
    assert clipped.defenses == (f"clip-examples(max_norm={threshold!r})",)


def test_bounds_what_one_example_changes():
    """The sensitivity of B times the mean, to adding an example, is at most the norm."""
    adapter, batch = make("bert")
    _, fewer = make("bert", size=2)
    for norm in (0.01, 1.0):
        more, less = (capture_gradient(adapter, b, max_example_norm=norm).gradient for b in (batch, fewer))
        change = math.sqrt(sum((3 * more[n] - 2 * less[n]).square().sum().item() for n in more))
        assert change <= norm
        assert change > 0.9 * norm  # the third example's gradient is longer than both


def test_a_large_norm_changes_nothing_but_the_record():
    adapter, batch = make("bert")
    plain, clipped = (capture_gradient(adapter, batch, max_example_norm=norm) for norm in (None, 1e9))
    assert largest_difference(clipped.gradient, plain.gradient) < 1e-12
    assert plain.defenses == ()


def test_the_released_norm_covers_the_shared_parameters_only():
    adapter, batch = make("bert")
    head = capture_gradient(adapter, batch, shared="head", max_example_norm=1e-3).gradient
    norm = math.sqrt(sum(g.square().sum().item() for g in head.values()))
    assert 1e-4 < norm <= 1e-3


def test_dropout_noise_and_file(tmp_path):
    adapter, batch = make("bert")
    shared = capture_gradient(adapter, batch, max_example_norm=1, dropout=True, seed=3)
    released = GaussianNoise(std=0.01, seed=1)(shared)
    assert released.defenses == ("dropout(on)", "clip-examples(max_norm=1.0)", "gaussian(std=0.01, unit=absolute)")
    again = capture_gradient(adapter, batch, max_example_norm=1, dropout=True, seed=3)
    assert all(torch.equal(again.gradient[n], g) for n, g in shared.gradient.items())
    loaded = SharedGradient.load(released.save(tmp_path / "g"), adapter)
    assert loaded.defenses == released.defenses
    assert loaded.observation(lengths=False, labels=False).defenses == released.defenses


@pytest.mark.parametrize("aggregation", [Aggregation(clients=3), Aggregation(epochs=2, learning_rate=0.1)])
def test_several_clients_or_steps_are_refused(aggregation):
    adapter, batch = make("bert")
    with pytest.raises(UnsupportedCombinationError, match="examples interact"):
        capture_gradient(adapter, batch, aggregation=aggregation, max_example_norm=1.0)


@pytest.mark.parametrize("norm", [0, -1.0, math.inf, math.nan])
def test_norms_that_are_not_positive_are_refused(norm):
    adapter, batch = make("bert")
    with pytest.raises(ConfigError, match="max_example_norm"):
        capture_gradient(adapter, batch, max_example_norm=norm)
