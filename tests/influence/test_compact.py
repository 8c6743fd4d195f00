"""Activations and cross-entropy with compact graphs: values, first and second derivatives, and what is refused."""

import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2CLS, ACT2FN

from lmleak.influence.compact import CrossEntropy, Elementwise, compact_functions
from tests.influence.vectors import randn

SMOOTH = ["gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "quick_gelu", "silu"]


class Network(nn.Module):
    def __init__(self, activation: nn.Module):
        super().__init__()
        with torch.random.fork_rng():
            self.first, self.second, self.activation = nn.Linear(5, 7), nn.Linear(7, 4), activation
        self.double()
        for i, parameter in enumerate(self.parameters()):
            parameter.data = randn(*parameter.shape, seed=10 + i) / 2

    def forward(self, x):
        return self.second(self.activation(self.first(x)))


def second_derivatives(network, x, targets, **settings):
    """Return loss, dL/dtheta, d<dL/dtheta, delta>/dx, and the derivative of that in delta along v."""
    x = x.clone().requires_grad_()
    loss = F.cross_entropy(network(x), targets, **settings)
    theta = list(network.parameters())
    gradient = torch.autograd.grad(loss, theta, create_graph=True)
    delta = [randn(*g.shape, seed=i).requires_grad_() for i, g in enumerate(gradient)]
    (product,) = torch.autograd.grad(gradient, x, delta, create_graph=True)
    back = torch.autograd.grad(product, delta, randn(*x.shape, seed=9))
    return [loss, *gradient, product, *back]


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("settings", [{}, {"reduction": "sum"}, {"ignore_index": 2}])
def test_products_are_those_of_plain_double_backward(name, settings):
    network, x = Network(ACT2FN[name]), randn(6, 5)
    targets = torch.tensor([0, 2, 1, 3, 2, 0])
    plain = second_derivatives(network, x, targets, **settings)
    with compact_functions(network):
        compact = second_derivatives(network, x, targets, **settings)
        ran = network(x.requires_grad_())
    assert ran.grad_fn.next_functions[1][0].name() == "ElementwiseBackward"
    assert compact[0].grad_fn.name() == "CrossEntropyBackward"
    for got, expected in zip(compact, plain, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)
    after = network(x)
    assert torch.equal(after, ran)  # the values are the module's own
    assert "Elementwise" not in after.grad_fn.next_functions[1][0].name()  # and the hooks are gone


def test_the_gradient_of_a_loss_times_a_factor_that_moves_with_x():
    """The loss's own incoming gradient is differentiated too: sum(x) * CE(x)."""
    logits, targets = randn(3, 4).requires_grad_(), torch.tensor([1, 0, 3])
    weight = torch.full((3,), 1 / 3, dtype=torch.float64)
    results = []
    for entropy in (lambda: CrossEntropy.apply(logits, targets, weight), lambda: F.cross_entropy(logits, targets)):
        (gradient,) = torch.autograd.grad(entropy() * logits.sum(), logits, create_graph=True)
        results.append(torch.autograd.grad(gradient, logits, randn(3, 4, seed=3))[0])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)


def test_several_products_at_once():
    network, x = Network(ACT2FN["gelu_new"]), randn(6, 5).requires_grad_()
    with compact_functions(network):
        loss = F.cross_entropy(network(x), torch.tensor([0, 2, 1, 3, 2, 0]))
    (gradient,) = torch.autograd.grad(loss, network.first.weight, create_graph=True)
    vectors = randn(3, 7, 5, seed=4)
    product = lambda v: torch.autograd.grad(gradient, x, v, retain_graph=True)[0]
    batched = torch.func.vmap(product)(vectors)
    torch.testing.assert_close(batched, torch.stack([product(v) for v in vectors]), rtol=1e-12, atol=1e-14)


@pytest.mark.filterwarnings("ignore:size_average and reduce args")
def test_other_losses_and_activations_stay_torch_s_own():
    inplace = nn.SiLU(inplace=True)
    with compact_functions(inplace):
        assert "Silu" in inplace(randn(3).requires_grad_() * 1).grad_fn.name()
    network, x = Network(nn.Tanh()), randn(6, 5).requires_grad_()
    targets = torch.tensor([0, 2, 1, 3, 2, 0])
    with compact_functions(network):
        assert "Tanh" in network(x).grad_fn.next_functions[1][0].name()
        logits = network(x)
        other = ({"weight": torch.ones(4).double()}, {"label_smoothing": 0.1}, {"reduction": "none"}, {"reduce": True})
        for settings in other:
            value = F.cross_entropy(logits, targets, **settings)
            assert "CrossEntropyBackward" not in str(value.grad_fn)
        soft = F.cross_entropy(logits, logits.softmax(-1).detach())
        assert "CrossEntropyBackward" not in str(soft.grad_fn)


def test_the_graph_of_an_activation_holds_two_tensors_more():
    """f' and f''; x and g are other nodes' already. torch's own second derivative keeps a dozen."""
    assert tensors_held(compact=True) <= 6 < tensors_held(compact=False)


def tensors_held(compact: bool) -> int:
    """Return how many tensors like x the graphs of two derivatives keep."""
    kept = weakref.WeakValueDictionary()  # what the module's own graph kept is gone with it

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor
        return tensor

    x, g, c = (randn(8, 16, seed=seed).requires_grad_() for seed in range(3))
    module = ACT2CLS["gelu_new"]()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with compact_functions(module) if compact else nullcontext():
            y = module(x)
        (slope,) = torch.autograd.grad(y, x, g, create_graph=True)
        graph = torch.autograd.grad(slope, (x, g), c, create_graph=True)
    assert len(graph) == 2
    return sum(tensor.shape == x.shape for tensor in kept.values())


def test_elementwise_needs_no_graph_where_nothing_is_differentiated():
    module, x = ACT2CLS["gelu"](), randn(3)
    with compact_functions(module):
        assert module(x).grad_fn is None
    assert Elementwise.apply(x, x, x, x).grad_fn is None
