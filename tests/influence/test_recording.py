"""What compact graphs may not touch: models that differentiate on their own, lent weights, wrappers, hooks."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint

from lmleak.influence import row_maps
from lmleak.influence.factored import FactoredProducts
from lmleak.influence.products import AutodiffProducts
from lmleak.influence.row_maps import rows_times
from tests.influence.vectors import randn, relative


class Model(nn.Module):
    """Three linear layers of 6 numbers and a vector; ``run`` is what the model does."""

    def __init__(self, run, middle=lambda: nn.Linear(6, 6)):
        super().__init__()
        with torch.random.fork_rng():
            self.first, self.middle, self.last = nn.Linear(5, 6), middle(), nn.Linear(6, 3)
            self.extra = nn.Parameter(torch.zeros(6, 6))
        self.double()
        for i, parameter in enumerate(self.parameters()):
            parameter.data = randn(*parameter.shape, seed=10 + i) / 2
        self.run = run

    def forward(self, x):
        return self.run(self, x) + (self.extra @ x.new_ones(6)).sin().square().sum() * x.square().sum()


def end(y):
    return y.tanh().square().sum()


def largest_difference(model):
    """Return how far products by factors are from those of double backward, parameter by parameter."""
    x, v = randn(2, 3, 5), randn(2, 3, 5, seed=1)
    theta = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    loss = lambda theta, x: torch.func.functional_call(model, theta, (x,))
    fast, reference = FactoredProducts(loss, theta, x, model), AutodiffProducts(loss, theta, x, model)
    names = tuple(theta)
    got, expected = fast.rmatvec(v, names), reference.rmatvec(v, names)
    scale = max(part.norm() for part in expected.values())
    differences = [((got[n] - expected[n]).norm() / scale).item() for n in names]
    differences.append(relative(fast.gram(v, names), reference.gram(v, names)))
    differences.append(relative(fast.matvec(theta), reference.matvec(theta)))
    assert not any(module._forward_hooks for module in model.modules())
    return max(differences)


def energy(model, x):
    """A gradient by the layer's input is part of the output."""
    h = model.first(x).sin()
    (slope,) = torch.autograd.grad(F.softplus(model.middle(h)).sum(), h, create_graph=True)
    return end(model.last(slope)) + end(model.middle(h))


def energy_of_an_activation(model, x):
    h = model.first(x).sin()
    (slope,) = torch.autograd.grad(nn.GELU()(model.middle(h)).sum(), h, create_graph=True)
    return end(model.last(slope))


def inner_step(model, x):
    """The layer's weight is stepped along its own gradient."""
    h = model.first(x).sin()
    (slope,) = torch.autograd.grad(end(model.middle(h)), model.middle.weight, create_graph=True)
    return end(model.last(F.linear(h, model.middle.weight - slope, model.middle.bias)))


def inner_step_if_used(model, x):
    h = model.first(x).sin()
    (slope,) = torch.autograd.grad(end(model.middle(h)), model.middle.weight, create_graph=True, allow_unused=True)
    return end(model.last(h if slope is None else F.linear(h, model.middle.weight - slope)))


def functional_gradient(model, x):
    return end(model.last(torch.func.grad(lambda h: end(model.middle(h)))(model.first(x).sin())))


def checkpointed(model, x):
    inner = lambda h: model.middle(h).sin()
    return end(model.last(checkpoint(inner, model.first(x), use_reentrant=False)))


def lent_weight(model, x):
    h = torch.func.functional_call(model.middle, {"weight": model.extra}, (model.first(x).sin(),))
    return end(model.last(h))


def plain(model, x):
    return end(model.last(model.middle(model.first(x).sin())))


@pytest.mark.parametrize(
    "run",
    [energy, energy_of_an_activation, inner_step, inner_step_if_used, functional_gradient, checkpointed, lent_weight],
)
@pytest.mark.parametrize("frozen", [False, True])
def test_models_that_need_their_own_graphs(run, frozen):
    model = Model(run)
    if frozen and run not in (inner_step, inner_step_if_used):
        model.middle.requires_grad_(False)
    assert largest_difference(model) < 1e-12


class Wrapper(nn.Module):
    """Owns what stands before a child, and returns the child's output."""

    def __init__(self, child, name):
        super().__init__()
        self.child = child.requires_grad_(False)
        self.register_parameter(name, nn.Parameter(torch.zeros(6, 6) if name == "matrix" else torch.zeros(6)))

    def forward(self, x):
        if hasattr(self, "matrix"):
            return self.child((x @ self.matrix).sin())
        return self.child((x + self.bias if hasattr(self, "bias") else x * self.weight).sin())


@pytest.mark.parametrize("name", ["matrix", "bias", "weight"])
@pytest.mark.parametrize("child", [lambda: nn.Linear(6, 6), lambda: nn.LayerNorm(6)])
def test_a_wrapper_is_not_what_it_wraps(child, name):
    assert largest_difference(Model(plain, lambda: Wrapper(child(), name))) < 1e-12


class Scaled(nn.Module):
    def forward(self, bias):
        return 2 * bias


def scaled_bias():
    layer = nn.Linear(6, 6)
    parametrize.register_parametrization(layer, "bias", Scaled())
    return layer


@pytest.mark.parametrize("make", [scaled_bias, lambda: prune.l1_unstructured(nn.Linear(6, 6), "bias", 2)])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_bias_that_is_computed(make, frozen):
    model = Model(plain, make)
    model.middle.requires_grad_(not frozen)
    x = randn(2, 3, 5)
    theta = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    loss = lambda theta, x: torch.func.functional_call(model, theta, (x,))
    fast, reference = FactoredProducts(loss, theta, x, model), AutodiffProducts(loss, theta, x, model)
    assert relative(fast.gram(x, tuple(theta)), reference.gram(x, tuple(theta))) < 1e-12


def test_a_complex_layer():
    def run(model, x):
        h = model.first(x)
        return model.complex(torch.complex(h.sin(), h.cos())).abs().square().tanh().sum()

    model = Model(run)
    with torch.random.fork_rng():
        model.complex = nn.Linear(6, 6, dtype=torch.complex128).requires_grad_(False)
    assert largest_difference(model) < 1e-12


@pytest.mark.parametrize("frozen", [False, True])
def test_a_hook_on_all_modules_that_bends_the_gradient_alone(frozen):
    model = Model(plain)
    model.middle.requires_grad_(not frozen)
    bend = lambda module, arguments, y: 2 * y - y.detach() if module is model.middle else None
    handle = register_module_forward_hook(bend)
    try:
        assert largest_difference(model) < 1e-12
    finally:
        handle.remove()


def test_a_deprecated_backward_hook():
    model = Model(plain)
    model.middle.register_backward_hook(lambda module, on_inputs, on_outputs: tuple(g / 2 for g in on_inputs))
    assert largest_difference(model) < 1e-12


def test_matrices_in_a_layout_that_onednn_copies_number_by_number(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", None)  # a call would fail
    matrix, x = randn(1024, 1024, dtype=torch.float32), randn(2, 512, seed=1, dtype=torch.float32)
    assert matrix[:512, :512].numel() >= row_maps.LARGE
    torch.testing.assert_close(rows_times(x, matrix[:512, :512]), x @ matrix[:512, :512].T)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert rows_times(x, matrix[:, :512].contiguous()).shape == (2, 1024)
