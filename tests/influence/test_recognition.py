"""Which layers have factors: what only looks like a known layer goes by double backward, and stays right."""

from types import MethodType

import pytest
import torch
from torch import nn

from lmleak.adapters import adapt
from lmleak.influence import GradientJacobian
from tests.families import image_problem
from tests.influence.vectors import randn, relative


class PerToken(nn.Module):
    """A gain per token, of as many tokens as a token has coordinates."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))

    def forward(self, x):
        return x * self.weight[:, None]


class ByName(nn.Module):
    """A module that is called Conv1D and is none."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(6, 6)), nn.Parameter(torch.zeros(6))

    def forward(self, x):
        return torch.tanh(x) @ self.weight.T * 2 + self.bias


ByName.__name__ = "Conv1D"


class Gain(nn.Module):
    """x f(w): at the weights it has, f(w) = w."""

    def __init__(self, f, start):
        super().__init__()
        self.f, self.weight = f, nn.Parameter(torch.full((6,), start))

    def forward(self, x):
        return x * self.f(self.weight)


class Elsewhere(nn.Module):
    """A gain, and what another layer's weight adds behind the module's back."""

    def __init__(self):
        super().__init__()
        self.weight, self.lent = nn.Parameter(torch.ones(6)), [nn.Parameter(torch.ones(6))]

    def forward(self, x):
        return x * self.weight + (self.lent[0] - self.lent[0].detach())


def replaced_linear():
    layer = nn.Linear(6, 6)
    layer.forward = MethodType(lambda layer, x: nn.functional.linear(x, 2 * layer.weight, layer.bias), layer)
    return layer


class Equalised(nn.Conv2d):
    """Changes its weight where torch lets subclasses do so."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, 0.3 * weight, bias)


def hooked(layer, hook, before=False):
    (layer.register_forward_pre_hook if before else layer.register_forward_hook)(hook)
    return layer


def tripled_gradient(module, arguments, output):
    if output.requires_grad:
        output.register_hook(lambda g: 3 * g)


LOOKALIKES = {
    "equalised": lambda: Equalised(6, 6, 1),
    "elsewhere": Elsewhere, "twice": lambda: Gain(lambda w: w.square() / w, 1.0),
    "pre-hook": lambda: hooked(nn.BatchNorm2d(6), lambda module, arguments: (torch.tanh(arguments[0]),), before=True),
    "partly frozen": lambda: Gain(lambda w: torch.cat([w[:3], w[3:].detach()]), 1.0),
    "tensor hook": lambda: hooked(nn.Linear(6, 6), tripled_gradient),
    "group norm": lambda: nn.GroupNorm(2, 6), "instance norm": lambda: nn.InstanceNorm2d(6, affine=True),
    "prelu": lambda: nn.PReLU(6), "per token": PerToken, "conv1d by name": ByName, "linear": replaced_linear,
    "square": lambda: Gain(torch.square, 1.0), "exponential": lambda: Gain(torch.exp, 0.0),
}  # fmt: skip


@pytest.mark.parametrize("name", LOOKALIKES)
def test_what_looks_like_a_known_layer_at_these_weights_goes_by_double_backward(name):
    """Channels as many as the last axis is long, weights all equal, as at initialisation."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.layer, self.head = nn.Conv2d(3, 6, 3), LOOKALIKES[name](), nn.Linear(216, 3)

        def forward(self, x):
            return self.head(torch.tanh(self.layer(self.stem(x))).flatten(1))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapter = adapt(Network().double().eval(), task="image-classification")
    batch = adapter.batch(randn(2, 3, 8, 8), [0, 1])
    fast, reference = (GradientJacobian(adapter, batch, implementation=i) for i in ("factored", "autodiff"))
    assert "layer.weight" in fast.by_autodiff
    v = randn(*fast.x.shape)
    assert relative(fast.gram(v), reference.gram(v)) < 1e-10


class Lent(nn.Module):
    """Lends a layer another weight for one call."""

    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = torch.func.functional_call(self.fc, {"weight": 2 * self.fc.weight}, x.flatten(1, 2))
        return self.head(torch.tanh(x).mean(1))


class OneAxis(nn.Module):
    """A linear map and a norm of a single vector."""

    def __init__(self):
        super().__init__()
        self.fc, self.norm, self.head = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x):
        y = x.flatten(1, 2)
        return self.head(torch.tanh(y * self.fc(torch.arange(8.0).to(x) / 8) + self.norm(y.mean((0, 1)))).mean(1))


@pytest.mark.parametrize(("network", "left"), [(Lent, ("fc.weight", "fc.bias")), (OneAxis, ())])
def test_a_lent_weight_and_outputs_of_one_axis(network, left):
    adapter, batch = image_problem(network)
    fast, reference = (GradientJacobian(adapter, batch, implementation=i) for i in ("factored", "autodiff"))
    assert fast.by_autodiff == left
    v = randn(*fast.x.shape)
    assert relative(fast.gram(v), reference.gram(v)) < 1e-10
    got, expected = fast.rmatvec(v), reference.rmatvec(v)
    largest = max(t.norm() for t in expected.values())
    assert all((got[n] - expected[n]).norm() < 1e-10 * largest for n in expected)


class Attention(nn.Module):
    """torch's own attention, which takes fused kernels unless told otherwise."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.layer(x.flatten(1, 2)).mean(1))


def test_torch_s_own_attention():
    adapter, batch = image_problem(Attention)
    fast, dense = (GradientJacobian(adapter, batch, implementation=i) for i in ("factored", "dense"))
    assert "layer.self_attn.in_proj_weight" in fast.by_autodiff
    assert "layer.linear1.weight" not in fast.by_autodiff
    v = randn(*fast.x.shape)
    assert relative(fast.gram(v), dense.gram(v)) < 1e-10
