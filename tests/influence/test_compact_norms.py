"""Norms with compact graphs: values, first and second derivatives, and what runs as it is."""

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from lmleak.adapters.precision import KeepDouble
from lmleak.influence.compact_norms import Normalised, compact_norms
from tests.influence.vectors import randn


def no_bias(size):
    return nn.LayerNorm(size, bias=False)


class Network(nn.Module):
    def __init__(self, norm: nn.Module):
        super().__init__()
        with torch.random.fork_rng():
            self.first, self.norm, self.second = nn.Linear(5, 7), norm, nn.Linear(7, 4)
        self.double()
        for i, parameter in enumerate(self.parameters()):
            parameter.data = randn(*parameter.shape, seed=10 + i) / 2

    def forward(self, x):
        with KeepDouble():
            return self.second(self.norm(self.first(x))).tanh().square().sum()


def second_derivatives(network, x):
    """Return loss, dL/dtheta, d<dL/dtheta, delta>/dx, and the derivative of that in delta along v."""
    x = x.clone().requires_grad_()
    loss = network(x)
    gradient = torch.autograd.grad(loss, list(network.parameters()), create_graph=True)
    delta = [randn(*g.shape, seed=i).requires_grad_() for i, g in enumerate(gradient)]
    (product,) = torch.autograd.grad(gradient, x, delta, create_graph=True)
    back = torch.autograd.grad(product, delta, randn(*x.shape, seed=9))
    return [loss, *gradient, product, *back]


@pytest.mark.parametrize("make", [nn.LayerNorm, no_bias, nn.RMSNorm, LlamaRMSNorm, T5LayerNorm, GemmaRMSNorm])
def test_products_are_those_of_plain_double_backward(make):
    network, x = Network(make(7) if make is not nn.RMSNorm else nn.RMSNorm(7, eps=0.1)), randn(2, 3, 5)
    plain = second_derivatives(network, x)
    with compact_norms(network) as found:
        compact = second_derivatives(network, x)
    ((y, u),) = found.values()
    assert u.grad_fn.name() == "NormalisedBackward"
    assert y.shape == u.shape == (2, 3, 7)
    for got, expected in zip(compact, plain, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)
    found.clear()
    network(x.requires_grad_())
    assert not found  # the hooks are gone


@pytest.mark.parametrize("centred", [True, False])
def test_the_derivatives_are_those_of_finite_differences(centred):
    x = randn(3, 6).requires_grad_()
    run = lambda t: Normalised.apply(t, 0.05, centred)
    with torch.random.fork_rng():  # the checks draw from the global generator
        assert torch.autograd.gradcheck(run, x)
        assert torch.autograd.gradgradcheck(run, x)


def test_several_products_at_once():
    network, x = Network(nn.LayerNorm(7)), randn(6, 5).requires_grad_()
    with compact_norms(network):
        loss = network(x)
    (gradient,) = torch.autograd.grad(loss, network.first.weight, create_graph=True)
    pull = lambda delta: torch.autograd.grad(gradient, x, delta, retain_graph=True)[0]
    vectors = randn(3, 7, 5, seed=4)
    torch.testing.assert_close(torch.func.vmap(pull)(vectors), torch.stack([pull(v) for v in vectors]))


class Doubled(nn.LayerNorm):
    """A LayerNorm by name and by type, which returns something else."""

    def forward(self, x):
        return 2 * super().forward(x)


class HalfRMSNorm(LlamaRMSNorm):
    """Leaves out half of the coordinates."""

    def forward(self, x):
        return super().forward(x) * (torch.arange(x.shape[-1]) % 2)


class DetachedRMSNorm(LlamaRMSNorm):
    """An RMSNorm whose scale passes no derivative on."""

    def forward(self, x):
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt().detach()


class OutsideRMSNorm(LlamaRMSNorm):
    """Adds epsilon to the root."""

    def forward(self, x):
        return self.weight * x / (x.square().mean(-1, keepdim=True).sqrt() + self.variance_epsilon)


class SquaredRMSNorm(LlamaRMSNorm):
    """Weights all one, which their squares are too."""

    def forward(self, x):
        return super().forward(x) * self.weight


class GatedRMSNorm(LlamaRMSNorm):
    """Gated by a layer that is zero."""

    def __init__(self, size):
        super().__init__(size)
        with torch.random.fork_rng():
            self.gate = nn.Linear(size, size)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def forward(self, x):
        return super().forward(x) * (1 + self.gate(x))


def replaced(size):
    norm = nn.LayerNorm(size)
    norm.forward = lambda x: nn.LayerNorm.forward(norm, x).detach() + 0 * x
    return norm


LOOKALIKES = [DetachedRMSNorm, OutsideRMSNorm, SquaredRMSNorm, GatedRMSNorm, replaced]


@pytest.mark.parametrize(
    "make", [Doubled, HalfRMSNorm, *LOOKALIKES, lambda size: nn.LayerNorm((3, size)), nn.BatchNorm1d]
)
def test_what_is_no_plain_norm_of_the_last_axis_runs_as_it_is(make):
    norm = make(7).double().eval()
    x = randn(2, 3, 7).transpose(1, 2) if isinstance(norm, nn.BatchNorm1d) else randn(2, 3, 7)
    expected = norm(x)
    with compact_norms(norm) as found:
        assert torch.equal(norm(x.requires_grad_()), expected)
    assert not found


def test_a_norm_that_is_told_more_than_its_input_runs_as_it_is():
    class ScaledRMSNorm(LlamaRMSNorm):
        def forward(self, x, scale=1.0):
            return super().forward(x) * scale

    norm, x = ScaledRMSNorm(7).double(), randn(2, 7).requires_grad_()
    with KeepDouble(), compact_norms(norm) as found:
        norm(x, scale=1.0)
        assert not found
        norm(x)
        assert found


def test_epsilon_beside_the_root_is_told_apart_in_float32():
    norm = OutsideRMSNorm(7, eps=1e-4)
    with compact_norms(norm) as found:
        norm(randn(2, 7).float().requires_grad_())
    assert not found


def test_half_precision_runs_as_it_is():
    norm, x = LlamaRMSNorm(7).to(torch.bfloat16), randn(2, 7).to(torch.bfloat16).requires_grad_()
    with compact_norms(norm) as found:
        norm(x)
    assert not found
