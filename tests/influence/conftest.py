"""What the influence tests share: small full-rank problems, flat vectors, dense oracles."""

from types import SimpleNamespace

import pytest
import torch

from lmleak.adapters import LeNet, adapt
from tests.families import LABELS, SEQUENCES, make
from tests.influence.vectors import randn


def linear_softmax(batch=1, channels=1, side=3, classes=5, seed=0, scale=1.0):
    """Flatten and one linear map: which has a closed form. Returns (adapter, batch, W, b)."""
    with torch.random.fork_rng():
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(channels * side * side, classes)).double()
    with torch.no_grad():
        model[1].weight.copy_(scale * randn(classes, channels * side * side, seed=seed + 1))
        model[1].bias.copy_(scale * randn(classes, seed=seed + 2))
    adapter = adapt(model)
    pixels = randn(batch, channels, side, side, seed=seed)
    return adapter, adapter.batch(pixels, [i % classes for i in range(batch)]), model[1].weight, model[1].bias


def small_lenet(seed=0):
    """LeNet on one 8x8 image with 3 classes, float64: dx = 64, full rank."""
    adapter = adapt(LeNet(size=8, num_classes=3, seed=seed).double())
    return adapter, adapter.batch(randn(1, 1, 8, 8, seed=seed + 10), [1])


def flat(gradient, names):
    """Return theta-shaped tensors as one vector, in the order of the names."""
    return torch.cat([gradient[n].reshape(-1) for n in names])


def like_theta(jacobian, seed=0):
    """Random theta-shaped tensors."""
    return {n: randn(*s, seed=seed + i) for i, (n, s) in enumerate(jacobian.parameter_shapes.items())}


def gradient_function(adapter, batch, shared="no-word-embeddings"):
    """Return x -> the flat shared gradient, differentiable, by plain autograd and nothing of the operator."""
    selection = adapter.select(shared)
    theta = {n: adapter.parameters()[n].requires_grad_() for n in selection.names}

    def gradient(x):
        x = x if x.requires_grad else x.detach().requires_grad_()
        loss = adapter.shared_loss(batch, x, theta, selection)
        values = torch.autograd.grad(loss, list(theta.values()), create_graph=True, allow_unused=True)
        return torch.cat([
            torch.zeros_like(p).reshape(-1) if v is None else v.reshape(-1)
            for v, p in zip(values, theta.values(), strict=True)
        ])  # fmt: skip

    return gradient


@pytest.fixture(autouse=True)
def global_random_state_untouched():
    """Every test of this folder also checks that the library draws from explicit generators only."""
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def problems():
    """The helpers of this file, for tests to call by name."""
    return SimpleNamespace(
        randn=randn, linear_softmax=linear_softmax, small_lenet=small_lenet, flat=flat, like_theta=like_theta,
        gradient_function=gradient_function, make=make, sequences=SEQUENCES, labels=LABELS,
    )  # fmt: skip
