"""Convolutions as factors: grouped, padded and dilated in every way, by kernels and by patches, against autograd."""

import pytest
import torch
from torch import nn

from lmleak.influence import GradientJacobian, dense_gram
from lmleak.influence.convolutions import KernelFactor, PatchFactor, convolution_factor
from tests.families import image_problem
from tests.influence.vectors import randn, relative

LAYERS = {
    "plain": (nn.Conv2d, (4, 6, 3), {"padding": 1, "stride": 2}),
    "pointwise": (nn.Conv2d, (4, 6, 1), {}),
    "grouped": (nn.Conv2d, (4, 6, 3), {"groups": 2, "stride": (1, 2), "padding": (2, 1)}),
    "depthwise": (nn.Conv2d, (4, 8, 3), {"groups": 4, "padding": 2, "dilation": 2}),
    "left over": (nn.Conv2d, (4, 4, 2), {"groups": 2, "stride": 3}),  # the last rows reach no patch
    "same": (nn.Conv2d, (4, 4, (2, 3)), {"padding": "same", "groups": 2}),
    "valid": (nn.Conv2d, (4, 4, 3), {"padding": "valid"}),
    "reflected": (nn.Conv2d, (4, 4, 3), {"padding": (1, 2), "padding_mode": "reflect", "groups": 4}),
    "circular": (nn.Conv2d, (4, 4, 3), {"padding": 1, "padding_mode": "circular"}),
    "one-dimensional": (nn.Conv1d, (4, 6, 3), {"groups": 2, "stride": 2, "padding": 2, "dilation": 2}),
    "replicated": (nn.Conv1d, (4, 4, 5), {"groups": 4, "padding": "same", "padding_mode": "replicate"}),
    "three-dimensional": (nn.Conv3d, (4, 4, 2), {"groups": 2, "padding": 1}),
}  # fmt: skip


def layer(name):
    """Return the convolution, its input (3 examples) and a gradient by its output."""
    kind, sizes, settings = LAYERS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = kind(*sizes, **settings).double()
    axes = {nn.Conv1d: (9,), nn.Conv2d: (7, 8), nn.Conv3d: (3, 4, 3)}[kind]
    x = randn(3, 4, *axes)
    return module, x, randn(*module(x).shape, seed=1)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("by_positions", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layers_products_are_those_of_its_gradient(name, by_positions, monkeypatch):
    """dL/dW as autograd gives it, its derivative along the factors, and the transpose of that."""
    monkeypatch.setattr("lmleak.influence.convolutions.positions_are_cheaper", lambda *sizes: by_positions)
    monkeypatch.setattr("lmleak.influence.factors.positions_are_cheaper", lambda *sizes: by_positions)
    module, x, g = layer(name)
    factor = convolution_factor(module, x, g)
    assert isinstance(factor, PatchFactor if by_positions and x.dim() < 5 else KernelFactor)

    def factors(x, g):
        return convolution_factor(module, x, g).tensors

    def gradient(x, g):
        return torch.func.vjp(lambda w: torch.func.functional_call(module, {"weight": w}, x), module.weight)[1](g)[0]

    primes = randn(*x.shape, seed=2), randn(*g.shape, seed=3)
    _, expected = torch.func.jvp(gradient, (x, g), primes)
    _, of_factors = torch.func.jvp(factors, (x, g), primes)
    assert relative(factor.tangent(of_factors), expected) < 1e-12
    theta = randn(*module.weight.shape, seed=4)
    _, to_inputs = torch.func.vjp(factors, x, g)
    _, transposed = torch.func.vjp(gradient, x, g)
    pairs = zip(to_inputs(factor.cotangent(theta)), transposed(theta), strict=True)
    assert all(relative(got, wanted) < 1e-12 for got, wanted in pairs)
    pairs = zip(factor.gram(of_factors), factor.cotangent(factor.tangent(of_factors)), strict=True)
    assert all(relative(got, wanted) < 1e-12 for got, wanted in pairs)


def separable(inputs, outputs, stride):
    """Return a depthwise and a pointwise convolution, each with BatchNorm, as in MobileNet (arXiv:1704.04861)."""
    return nn.Sequential(
        nn.Conv2d(inputs, inputs, 3, stride=stride, padding=1, groups=inputs, bias=False), nn.BatchNorm2d(inputs),
        nn.Hardswish(), nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.SiLU(),
    )  # fmt: skip


class Mobile(nn.Module):
    """Depthwise separable blocks, a dilated grouped one, and a one-dimensional end."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding="same", padding_mode="circular")
        self.blocks = nn.Sequential(separable(8, 12, 2), separable(12, 12, 1))
        self.dilated = nn.Conv2d(12, 36, 3, stride=2, padding=2, dilation=2, groups=2)
        self.row = nn.Conv1d(36, 6, 3, stride=2, groups=3)
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        y = torch.tanh(self.dilated(self.blocks(self.stem(x))))
        return self.fc(self.row(y.flatten(2)).mean(-1))


class Upsampling(nn.Module):
    """A transposed convolution between two others, and one whose input has no axis of examples."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ConvTranspose2d(4, 4, 2, stride=2, groups=2)
        self.single, self.fc = nn.Conv2d(4, 4, 3), nn.Linear(4, 3)

    def forward(self, x):
        y = torch.tanh(self.up(torch.tanh(self.down(x))))
        return self.fc(torch.stack([self.single(image) for image in y]).square().mean((2, 3)))


def problem(model, dtype=torch.float64, size=8):
    adapter, batch = image_problem(model, (2, 3, size, size), dtype)
    return [GradientJacobian(adapter, batch, implementation=i) for i in ("factored", "autodiff")]


@pytest.mark.parametrize("model", [Mobile, Upsampling])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_models_equal_double_backward(model, dtype, tolerance):
    fast, reference = problem(model, dtype)
    v = randn(*fast.x.shape, seed=1, dtype=dtype)
    assert relative(fast.gram(v), reference.gram(v)) < tolerance
    delta = {n: randn(*s, seed=2, dtype=dtype) for n, s in fast.parameter_shapes.items()}
    assert relative(fast.matvec(delta), reference.matvec(delta)) < tolerance
    got, expected = fast.rmatvec(v), reference.rmatvec(v)
    largest = max(t.norm() for t in expected.values())
    assert all((got[n] - expected[n]).norm() < tolerance * largest for n in expected)


def test_depthwise_separable_networks_have_factors_for_every_parameter():
    fast, _ = problem(Mobile)
    assert fast.by_autodiff == ()
    ways = {n: type(f) for n, f in fast._products.factors.items() if isinstance(f, (KernelFactor, PatchFactor))}
    # 2 x 4 positions beside kernels of 18 x 54, and 2 x 1 beside 2 x 36; 2 x 16 or more everywhere else.
    assert ways.pop("dilated.weight") is ways.pop("row.weight") is PatchFactor
    assert set(ways.values()) == {KernelFactor}
    assert len(ways) == 5


def test_products_by_positions_form_nothing_of_the_kernels_size(monkeypatch):
    def forbidden(self, _):
        raise AssertionError("formed")

    (fast, reference), v = problem(Mobile), randn(2, 3, 8, 8, seed=1)
    monkeypatch.setattr(PatchFactor, "tangent", forbidden)
    monkeypatch.setattr(PatchFactor, "cotangent", forbidden)
    names = {"dilated.weight", "row.weight"}
    assert relative(fast.restrict(names).gram(v), reference.restrict(names).gram(v)) < 1e-10


def test_what_stays_with_double_backward_is_named():
    fast, _ = problem(Upsampling)
    assert fast.by_autodiff == ("up.weight", "up.bias", "single.weight", "single.bias")


def test_many_products_at_once():
    fast, reference = problem(Mobile, size=6)
    assert relative(dense_gram(fast, largest=0), dense_gram(reference, largest=0)) < 1e-10
