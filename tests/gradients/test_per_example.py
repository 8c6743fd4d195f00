"""Per-example gradients equal a loop of plain backward passes, for every family and for images."""

import pytest
import torch
from torch import nn

from lmleak.adapters import LeNet, adapt
from lmleak.errors import DataError
from lmleak.gradients import capture_gradient
from lmleak.gradients.per_example import per_example_gradients, shared_layers
from lmleak.types import Batch
from tests.families import FAMILIES, LABELS, SEQUENCES, make

TWICE = [*SEQUENCES, *(list(reversed(s)) for s in SEQUENCES)]  # two texts of every length share a layout


def alone(batch, i):
    rows = slice(i, i + 1)
    return Batch(
        {n: t[rows] for n, t in batch.inputs.items()},
        batch.targets[rows],
        {n: t[rows] for n, t in batch.layout.items()},
    )


def relative_error(adapter, batch, found, shared):
    """Largest distance of one example's gradient from capture_gradient of that example, relative to its norm."""
    worst = 0.0
    for i in range(batch.size):
        plain = capture_gradient(adapter, alone(batch, i), shared=shared).gradient
        assert plain.keys() == found.gradient.keys()
        distance = sum((found.gradient[n][i] - g).double().square().sum() for n, g in plain.items()) ** 0.5
        norm = sum(g.double().square().sum() for g in plain.values()) ** 0.5
        assert norm > 0
        worst = max(worst, (distance / norm).item())
    return worst


@pytest.mark.parametrize("shared", ["no-word-embeddings", "all"])
@pytest.mark.parametrize("family", FAMILIES)
def test_texts_of_unequal_length_equal_a_loop_in_float32(family, shared):
    adapter, _ = make(family, dtype=torch.float32)
    batch = adapter.batch(TWICE, LABELS * 2 if adapter.task == "sequence-classification" else None)
    found = per_example_gradients(adapter, batch, shared=shared)
    assert (found.method, found.reason) == ("vmap", "")
    assert relative_error(adapter, batch, found, shared) < 1e-6


@pytest.mark.parametrize(("family", "padding_side"), [("bert", "right"), ("gpt2", "right"), ("gpt2", "left")])
def test_texts_equal_a_loop_in_float64(family, padding_side):
    adapter, _ = make(family)
    labels = LABELS * 2 if adapter.task == "sequence-classification" else None
    batch = adapter.batch(TWICE, labels, padding_side=padding_side)
    found = per_example_gradients(adapter, batch)
    assert found.method == "vmap"
    assert relative_error(adapter, batch, found, "no-word-embeddings") < 1e-13


def images(model, size=8, side=28, dtype=torch.float32):
    adapter = adapt(model.to(dtype), task="image-classification")
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(size, 1, side, side, generator=generator, dtype=dtype)
    return adapter, adapter.batch(pixels, torch.arange(size) % 3)


def test_lenet_equals_a_loop_in_float64_whatever_class_it_favours():
    adapter, batch = images(LeNet(size=28), dtype=torch.float64)
    labels = adapter.logits(adapter.input(batch)).argmax(-1)
    batch = adapter.batch(batch.inputs["pixel_values"], labels)
    found = per_example_gradients(adapter, batch, shared="all")
    assert found.method == "vmap"
    assert relative_error(adapter, batch, found, "all") < 1e-13


def test_lenet_equals_a_loop_and_its_mean_is_the_gradient_of_the_batch():
    adapter, batch = images(LeNet(size=28))
    # The class that the network favours least: near the favoured one, 1 - p cancels, and two float32 passes, each 2e-6
    # away from float64, are 3e-6 from each other on some processors.
    labels = adapter.logits(adapter.input(batch)).argmin(-1)
    batch = adapter.batch(batch.inputs["pixel_values"], labels)
    found = per_example_gradients(adapter, batch, shared="all")
    assert found.method == "vmap"
    assert relative_error(adapter, batch, found, "all") < 1e-6
    whole = capture_gradient(adapter, batch, shared="all").gradient
    for name, value in whole.items():
        torch.testing.assert_close(found.gradient[name].mean(0), value, rtol=1e-4, atol=1e-6)


class Thresholded(nn.Module):
    """Decides by a value of its input in Python, which cannot be vectorised."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 3)

    def forward(self, pixels):
        flat = pixels.flatten(1)
        return self.linear(flat if flat.sum() > 0 else -flat)


class Mixing(nn.Module):
    """Adds noise by the position in the batch: an example's gradient depends on how it is computed."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 3)
        self.calls = 0

    def forward(self, pixels):
        self.calls += 1
        return self.linear(pixels.flatten(1) * (1 + self.calls % 2))


def build(model_class):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model_class()


def test_a_model_that_cannot_be_vectorised_is_looped_with_the_reason():
    adapter, batch = images(build(Thresholded), side=4)
    found = per_example_gradients(adapter, batch)
    assert found.method == "loop"
    assert "Thresholded cannot be vectorised over examples" in found.reason
    assert relative_error(adapter, batch, found, "no-word-embeddings") == 0


def test_a_model_that_answers_otherwise_when_vectorised_is_looped_with_the_reason():
    adapter, batch = images(build(Mixing), side=4)
    found = per_example_gradients(adapter, batch)
    assert found.method == "loop"
    assert "another gradient when vectorised" in found.reason


def test_what_float32_loses_is_small_beside_the_gradients_of_the_batch():
    """An example that the model is sure of has a small gradient p - y, a difference of nearly equal numbers.

    In float32 either way of computing it is a few 1e-6 of its own norm away from the exact one.
    """
    adapter, batch = images(LeNet(size=28), size=64)
    exact_adapter, exact_batch = images(LeNet(size=28), size=64, dtype=torch.float64)
    found = per_example_gradients(adapter, batch, shared="all")
    plain = [capture_gradient(adapter, alone(batch, i), shared="all").gradient for i in range(64)]
    exact = per_example_gradients(exact_adapter, exact_batch, shared="all")
    assert relative_error(exact_adapter, exact_batch, exact, "all") < 1e-13
    rows = torch.cat([value.flatten(1).double() for value in found.gradient.values()], 1)
    looped = torch.stack([torch.cat([value.flatten().double() for value in g.values()]) for g in plain])
    truth = torch.cat([value.flatten(1) for value in exact.gradient.values()], 1)
    assert (rows - looped).norm(dim=1).max() < 1e-6 * looped.square().sum(1).mean().sqrt()
    assert (rows - truth).norm() < 3 * (looped - truth).norm()


def test_one_example_and_the_callers_model_untouched():
    model = LeNet(size=8)
    model.train()
    before = {n: p.clone() for n, p in model.named_parameters()}
    adapter, batch = images(model, size=1, side=8)
    state = torch.random.get_rng_state()
    found = per_example_gradients(adapter, batch)
    assert {n: g.shape[0] for n, g in found.gradient.items()} == dict.fromkeys(before, 1)
    assert torch.equal(state, torch.random.get_rng_state())
    assert model.training
    assert all(p.grad is None and torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_layers_hold_the_shared_parameters_in_forward_order():
    adapter, _ = make("bert")
    layers = shared_layers(adapter)
    assert list(layers) == ["embeddings", "block 0", "block 1", "head"]
    assert adapter.lookup_table() not in layers["embeddings"]
    assert list(shared_layers(adapter, "head")) == ["head"]


def test_a_gradient_that_is_not_finite_is_refused():
    adapter, batch = images(LeNet(size=8, num_classes=3), size=4, side=8)
    with torch.no_grad():
        adapter.model.fc.weight.fill_(torch.inf)
    with pytest.raises(DataError, match="NaN or Inf"):
        per_example_gradients(adapter, batch)
