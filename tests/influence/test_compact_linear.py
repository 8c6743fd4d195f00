"""Linear layers with compact graphs: their rows are mapped right, their graph is theirs, and what runs as it is."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D

from lmleak.influence import row_maps
from lmleak.influence.compact_linear import compact_linears
from lmleak.influence.factored import FactoredProducts
from lmleak.influence.products import AutodiffProducts
from lmleak.influence.row_maps import RowMap, row_map, rows_times
from tests.influence.vectors import randn, relative


@pytest.mark.parametrize("oneDNN", [True, False])
@pytest.mark.parametrize("size", [(512, 640), (8, 6)])
def test_rows_times_a_matrix(size, oneDNN, monkeypatch):
    monkeypatch.setattr(row_maps, "_HAS_ONEDNN", oneDNN and row_maps._HAS_ONEDNN)
    weight = randn(*size, dtype=torch.float32)
    x = randn(3, 7, size[1], seed=1, dtype=torch.float32)
    ways = {
        "flat": x[0], "one row": x[0, :1], "vector": x[0, 0], "three axes": x, "no row": x[:, :0],
        "other layout": x.transpose(0, 1), "sliced": x[:, ::2], "expanded": x[:1, :1].expand(2, 5, -1),
    }  # fmt: skip
    for way, rows in ways.items():
        for matrix in (weight, weight.T.contiguous().T):
            got, expected = rows_times(rows, matrix), rows.double() @ matrix.double().T
            assert (got.shape, got.dtype) == (expected.shape, torch.float32), way
            torch.testing.assert_close(got.double(), expected, rtol=0, atol=2e-5 * size[1] ** 0.5, msg=way)


def test_a_stack_of_matrices_meets_a_stack_of_rows(monkeypatch):
    """As grouped convolutions have them; oneDNN's operator knows no stacks."""
    monkeypatch.setattr(row_maps, "LARGE", 1)
    for groups in (1, 2):
        weight, x = randn(groups, 40, 30, dtype=torch.float32), randn(groups, 7, 30, seed=1, dtype=torch.float32)
        torch.testing.assert_close(rows_times(x, weight), torch.einsum("gnd,god->gno", x, weight))
        transposed = weight.mT.contiguous().mT
        torch.testing.assert_close(rows_times(x, transposed), torch.einsum("gnd,god->gno", x, weight))


def test_a_row_map_is_differentiated_as_often_as_one_likes():
    weight, x = randn(4, 3), randn(2, 5, 3, seed=1).requires_grad_()
    with torch.random.fork_rng():
        assert torch.autograd.gradcheck(lambda x: RowMap.apply(x, weight), x)
        assert torch.autograd.gradgradcheck(lambda x: RowMap.apply(x, weight), x)
    assert RowMap.apply(x, weight).grad_fn.name() == "RowMapBackward"
    with torch.no_grad():
        assert not row_map(x, weight).requires_grad


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_vectors_are_mapped_at_once(dtype, grad):
    weight, x = randn(512, 640, dtype=dtype), randn(3, 2, 5, 640, seed=1, dtype=dtype)
    with torch.set_grad_enabled(grad):
        got = torch.func.vmap(lambda rows: row_map(rows, weight), in_dims=1)(x.transpose(0, 1))
    assert relative(got.double(), x.double() @ weight.double().T) < 1e-6


class Network(nn.Module):
    """A linear layer of either kind within two others; ``use`` sees the layer as well."""

    def __init__(self, make, width=4, use=lambda network, y: 0):
        super().__init__()
        with torch.random.fork_rng():
            self.first, self.layer, self.last, self.use = nn.Linear(5, 6), make(), nn.Linear(width, 3), use
        self.double()
        for i, parameter in enumerate(self.parameters()):
            parameter.data = randn(*parameter.shape, seed=10 + i) / 2

    def forward(self, x):
        y = self.layer(self.first(x).sin())
        return self.last(y.tanh()).square().sum() + self.use(self, y)


def products(network, x):
    """Return the factored products, and those of double backward."""
    theta = {n: p.detach() for n, p in network.named_parameters()}
    loss = lambda theta, x: torch.func.functional_call(network, theta, (x,))
    return FactoredProducts(loss, theta, x, network), AutodiffProducts(loss, theta, x, network)


def compacted(network, x):
    """Return the layers that run by ``Linear``, by name."""
    names = {module: name for name, module in network.named_modules()}
    theta = {n: p for n, p in network.named_parameters() if p.requires_grad}
    with compact_linears(network, theta, []) as found:
        value = network(x)
    assert value == network(x)
    return {names[call.module] for call, _ in found.values()}


@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 4), lambda: Conv1D(4, 6), lambda: nn.Linear(6, 4, bias=False)])
def test_layers_of_both_kinds_keep_their_values_and_products(make):
    network, x = Network(make), randn(2, 3, 5)
    assert compacted(network, x.clone().requires_grad_()) == {"first", "layer", "last"}
    assert compacted(network, x) == {"layer", "last"}  # whose input has a graph: its parameters are in it
    fast, reference = products(network, x)
    names = tuple(fast.theta)
    assert fast.by_autodiff == ()
    assert relative(fast.gram(randn(2, 3, 5), names), reference.gram(randn(2, 3, 5), names)) < 1e-13


def test_a_weight_with_another_use_has_its_gradient():
    """The layer's own gradient is needed then: the model runs once more with that layer as it is, and no other."""
    runs = []
    use = lambda network, y: runs.append(type(y.grad_fn).__name__) or (network.layer.weight.sin() @ y.mT).sum()
    network, x, v = Network(lambda: nn.Linear(6, 6, bias=False), 6, use), randn(2, 3, 5), randn(2, 3, 5, seed=1)
    fast, reference = products(network, x)
    assert runs[:2] == ["LinearBackward", "UnsafeViewBackward0"]
    assert fast.by_autodiff == ("layer.weight",)
    names = tuple(fast.theta)
    assert relative(fast.gram(v, names), reference.gram(v, names)) < 1e-13
    for name, back in reference.rmatvec(v, names).items():
        torch.testing.assert_close(fast.rmatvec(v, names)[name], back, rtol=1e-12, atol=1e-14)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def watched(layer):
    """A layer whose output is given a hook, after it ran, that halves its gradient."""
    layer.register_forward_hook(lambda module, arguments, y: y.register_hook(lambda g: g / 2) and None, prepend=True)
    return layer


@pytest.mark.parametrize(
    ("make", "compact"),
    [
        (lambda: Doubled(6, 4), False),
        (lambda: parametrizations.weight_norm(nn.Linear(6, 4)), False),
        (lambda: watched(nn.Linear(6, 4)), True),
        (lambda: nn.Linear(6, 4).requires_grad_(False), True),
    ],
)
def test_which_layers_run_compactly(make, compact):
    network, x, v = Network(make), randn(2, 3, 5), randn(2, 3, 5, seed=1)
    assert ("layer" in compacted(network, x.clone().requires_grad_())) == compact
    fast, reference = products(network, x)
    names = tuple(fast.theta)
    assert relative(fast.gram(v, names), reference.gram(v, names)) < 1e-13
