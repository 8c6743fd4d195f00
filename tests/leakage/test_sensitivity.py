"""Sensitivity per layer: closed form, dense algebra, probes within their error, one example of a batch, an update."""

from dataclasses import replace

import pytest
import torch

from lmleak.adapters import LeNet, adapt
from lmleak.errors import ConfigError, DataError
from lmleak.gradients import capture_gradient
from lmleak.influence import GradientJacobian, UpdateJacobian
from lmleak.leakage import input_sensitivity, largest_entries, spectral_norms
from lmleak.types import Aggregation
from tests.families import make


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lenet(batch=1):
    adapter = adapt(LeNet(size=8, num_classes=3, seed=0).double())
    return adapter, adapter.batch(randn(batch, 1, 8, 8, seed=10), [i % 3 for i in range(batch)])


def problem(name):
    return lenet() if name == "lenet" else make(name, size=2)


def dense_layers(jacobian, roles):
    """J_l (dx, p_l) per layer, from the dense oracle."""
    matrix, start, parts = jacobian.to_dense(), 0, {}
    for name, shape in jacobian.parameter_shapes.items():
        (role,) = [r for r, names in roles.items() if name in names]
        parts.setdefault(role, []).append(matrix[:, start : start + shape.numel()])
        start += shape.numel()
    return {role: torch.cat(columns, 1) for role, columns in parts.items()}


@pytest.mark.parametrize("name", ["lenet", "bert", "gpt2"])
def test_exact_norms_equal_dense_algebra(name):
    adapter, batch = problem(name)
    jacobian = GradientJacobian(adapter, batch)
    gradient = capture_gradient(adapter, batch, shared="no-word-embeddings").gradient
    dense = dense_layers(jacobian, adapter.roles())
    result = input_sensitivity(jacobian, adapter.roles(), gradient=gradient)
    assert result.exact
    assert result.products == result.dx == jacobian.dx
    assert set(result.layers) == set(dense)
    matrix = jacobian.to_dense()
    trace = (matrix @ matrix.T).trace().item()
    assert result.trace == pytest.approx(trace, rel=1e-10)
    assert sum(s.frobenius**2 for s in result.layers.values()) == pytest.approx(trace, rel=1e-10)
    assert sum(s.share for s in result.layers.values()) == pytest.approx(1, rel=1e-12)
    assert list(result.layers.values())[-1].cumulative == pytest.approx(1, rel=1e-12)
    x_norm = jacobian.x[jacobian.free].norm().item()
    for role, part in dense.items():
        got = result.layers[role]
        g = torch.cat([gradient[n].flatten() for n in adapter.roles()[role] if n in gradient]).norm().item()
        assert got.parameters == part.shape[1]
        assert got.frobenius == pytest.approx(part.norm().item(), rel=1e-10)
        assert got.per_element == pytest.approx(part.square().mean().sqrt().item(), rel=1e-10)
        assert got.relative == pytest.approx(part.norm().item() * x_norm / g, rel=1e-10)
        assert got.mean_entry == pytest.approx(part.abs().mean().item(), rel=1e-10)
        assert got.largest_entry == pytest.approx(part.abs().max().item(), rel=1e-10)
        assert got.frobenius_std_error == got.share_std_error == 0


@pytest.mark.parametrize("name", ["lenet", "bert"])
def test_spectral_norms_equal_the_largest_singular_value(name):
    adapter, batch = problem(name)
    jacobian = GradientJacobian(adapter, batch)
    norms = spectral_norms(jacobian, adapter.roles(), tol=1e-6)
    for role, part in dense_layers(jacobian, adapter.roles()).items():
        expected = torch.linalg.svdvals(part)[0].item()
        assert norms[role].converged
        assert norms[role].value == pytest.approx(expected, rel=1e-6)
        assert norms[role].value <= expected * (1 + 1e-12)
        assert norms[role].upper >= expected * (1 - 1e-12)


@pytest.mark.parametrize("name", ["lenet", "bert"])
def test_the_search_for_the_largest_entry_attains_an_entry(name):
    adapter, batch = problem(name)
    jacobian = GradientJacobian(adapter, batch)
    found = largest_entries(jacobian, adapter.roles())
    for role, part in dense_layers(jacobian, adapter.roles()).items():
        entries = part.abs().flatten()
        assert (entries / found[role] - 1).abs().min() < 1e-9  # some entry has this value
        assert found[role] > 0.4 * entries.max()


def test_the_search_from_every_row_finds_the_largest_entry():
    adapter, batch = lenet()
    jacobian = GradientJacobian(adapter, batch)
    everywhere = largest_entries(jacobian, adapter.roles(), starts=jacobian.dx)
    result = input_sensitivity(jacobian, adapter.roles())
    assert everywhere == pytest.approx({r: s.largest_entry for r, s in result.layers.items()}, rel=1e-9)


@pytest.mark.parametrize("name", ["lenet", "gpt2"])
def test_probes_stay_within_their_standard_error(name):
    """z-scores over independent seeds: mean near 0, root mean square near 1 (it scatters by 1/sqrt(2 n))."""
    adapter, batch = problem(name)
    jacobian = GradientJacobian(adapter, batch)
    truth = input_sensitivity(jacobian, adapter.roles())
    scores = []
    for seed in range(12):
        got = input_sensitivity(jacobian, adapter.roles(), exact_below=0, num_probes=24, seed=seed)
        assert not got.exact
        assert got.products == 24
        assert sum(s.share for s in got.layers.values()) == pytest.approx(1, rel=1e-12)
        assert all(s.largest_entry is None and s.mean_entry is None for s in got.layers.values())
        scores.append([(got.trace - truth.trace) / got.trace_std_error])
        for role, s in got.layers.items():
            scores[-1].append((s.frobenius - truth.layers[role].frobenius) / s.frobenius_std_error)
            if truth.layers[role].share > 1e-6:
                scores[-1].append((s.share - truth.layers[role].share) / s.share_std_error)
    scores = torch.tensor(scores)
    assert scores.mean(0).abs().max() < 1.0  # 3.5 deviations of a mean of 12
    assert 0.7 < scores.square().mean().sqrt() < 1.4


def linear_softmax(batch):
    """Flatten and one linear map: J has a closed form. Returns (adapter, batch, W, b)."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(9, 5)).double()
    with torch.no_grad():
        model[1].weight.copy_(randn(5, 9, seed=1))
        model[1].bias.copy_(randn(5, seed=2))
    adapter = adapt(model)
    data = adapter.batch(randn(batch, 1, 3, 3), [i % 5 for i in range(batch)])
    return adapter, data, model[1].weight.detach(), model[1].bias.detach()


@pytest.mark.parametrize("size", [1, 3])
def test_closed_form_of_linear_softmax_also_for_one_example_of_a_batch(size):
    """dg_W[k, j] / dx_i = M_ki x_j + r_k [i = j] and dg_b / dx = M, r = p - e_y, M = (diag p - p p^T) W; over B."""
    with torch.random.fork_rng():
        adapter, batch, weight, bias = linear_softmax(size)
    layers = {"weight": ["1.weight"], "bias": ["1.bias"]}
    jacobian = GradientJacobian(adapter, batch)
    for i in range(size):
        x, y = batch.inputs["pixel_values"][i].flatten(), int(batch.targets[i])
        p = torch.softmax(weight @ x + bias, 0)
        r = p.clone()
        r[y] -= 1
        m = (p.diag() - torch.outer(p, p)) @ weight
        expected = m.norm() ** 2 * x.norm() ** 2 + 2 * r @ m @ x + r.norm() ** 2 * 9
        got = input_sensitivity(jacobian, layers, rows=[i])
        assert got.dx == 9
        assert got.layers["weight"].frobenius ** 2 == pytest.approx(expected.item() / size**2, rel=1e-10)
        assert got.layers["bias"].frobenius == pytest.approx(m.norm().item() / size, rel=1e-10)
        assert got.layers["bias"].largest_entry == pytest.approx(m.abs().max().item() / size, rel=1e-10)
        spectral = spectral_norms(jacobian, layers, rows=[i], tol=1e-8)["bias"]
        assert spectral.value == pytest.approx(torch.linalg.svdvals(m)[0].item() / size, rel=1e-8)
        attained = largest_entries(jacobian, layers, rows=[i], starts=9)["bias"]
        assert attained == pytest.approx(m.abs().max().item() / size, rel=1e-10)


def test_rows_add_up_to_the_batch_and_padding_counts_for_nothing():
    adapter, batch = make("bert", size=2)
    jacobian = GradientJacobian(adapter, batch)
    whole = input_sensitivity(jacobian, adapter.roles())
    parts = [input_sensitivity(jacobian, adapter.roles(), rows=[i]) for i in range(2)]
    assert [p.dx for p in parts] == [6 * 16, 4 * 16]
    assert sum(p.trace for p in parts) == pytest.approx(whole.trace, rel=1e-10)
    probes = input_sensitivity(jacobian, adapter.roles(), rows=[1], exact_below=0, num_probes=64)
    assert abs(probes.trace - parts[1].trace) < 4 * probes.trace_std_error


def test_an_update_is_served_like_a_gradient():
    adapter, batch = lenet(batch=2)
    one_step = UpdateJacobian(adapter, batch, Aggregation(learning_rate=0.1))
    gradient = input_sensitivity(GradientJacobian(adapter, batch), adapter.roles())
    update = input_sensitivity(one_step, adapter.roles())
    assert update.trace == pytest.approx(gradient.trace, rel=1e-8)
    two_epochs = UpdateJacobian(adapter, batch, replace(Aggregation(learning_rate=0.5), epochs=2))
    moved = input_sensitivity(two_epochs, adapter.roles(), rows=[1])
    total = sum(torch.cat([t.flatten() for t in two_epochs.rmatvec(v).values()]).square().sum() for v in unit(1))
    assert moved.trace == pytest.approx(total.item(), rel=1e-10)


def unit(example):
    for i in range(64):
        v = torch.zeros(2, 64, dtype=torch.float64)
        v[example, i] = 1
        yield v.reshape(2, 1, 8, 8)


class MatrixJacobian:
    """The least that the metrics ask for: J as one matrix (dx, p) per parameter."""

    def __init__(self, matrices):
        self.matrices = matrices
        self.x = torch.ones(len(next(iter(matrices.values()))), dtype=torch.float64)[None]
        self.free = torch.ones_like(self.x, dtype=torch.bool)
        self.parameter_shapes = {n: torch.Size([m.shape[1]]) for n, m in matrices.items()}

    def matvec(self, delta):
        return sum((self.matrices[n] @ d for n, d in delta.items()), torch.zeros_like(self.x[0]))[None]

    def rmatvec(self, v):
        return {n: v[0] @ m for n, m in self.matrices.items()}


def test_a_layer_that_does_not_answer_to_the_input():
    jacobian = MatrixJacobian({"a": randn(6, 4), "dead": torch.zeros(6, 3).double(), "unlisted": randn(6, 2, seed=1)})
    layers = {"first": ["a", "absent"], "second": ["dead"], "third": ["absent"]}
    gradient = {"a": torch.ones(4), "dead": torch.zeros(3)}
    for options in ({}, {"exact_below": 0}):
        got = input_sensitivity(jacobian, layers, gradient=gradient, **options)
        assert list(got.layers) == ["first", "second"]
        assert got.layers["second"].frobenius == got.layers["second"].share == 0
        assert got.layers["second"].frobenius_std_error == got.layers["second"].share_std_error == 0
        assert got.layers["second"].relative is None
        assert got.layers["second"].cumulative == got.layers["first"].cumulative < 1  # tr A counts what is unlisted
    exact = input_sensitivity(jacobian, layers)
    assert exact.trace == pytest.approx(sum(m.square().sum().item() for m in jacobian.matrices.values()), rel=1e-12)
    assert spectral_norms(jacobian, layers)["second"].upper == 0
    assert largest_entries(jacobian, layers)["second"] == 0
    nothing = input_sensitivity(MatrixJacobian({"dead": torch.zeros(6, 3).double()}), layers)
    assert nothing.layers["second"].share is nothing.layers["second"].cumulative is None


def test_a_product_that_is_not_finite_is_refused():
    with pytest.raises(DataError, match="NaN or Inf"):
        input_sensitivity(MatrixJacobian({"a": torch.full((3, 2), torch.inf).double()}), {"layer": ["a"]})


class TestRefusals:
    def setup_method(self):
        self.adapter, batch = lenet()
        self.jacobian = GradientJacobian(self.adapter, batch)

    def test_one_probe(self):
        with pytest.raises(ConfigError, match="num_probes >= 2"):
            input_sensitivity(self.jacobian, self.adapter.roles(), num_probes=1)

    def test_no_shared_layer(self):
        with pytest.raises(ConfigError, match="none of the layers"):
            input_sensitivity(self.jacobian, {"head": ["no.such.weight"]})

    def test_a_parameter_in_two_layers(self):
        name = self.jacobian.parameter_names[0]
        with pytest.raises(ConfigError, match="in two layers"):
            spectral_norms(self.jacobian, {"a": [name], "b": [name]})

    @pytest.mark.parametrize("rows", [[], [1], [-1]])
    def test_rows_outside_the_batch(self, rows):
        with pytest.raises(DataError, match="0 to 0"):
            input_sensitivity(self.jacobian, self.adapter.roles(), rows=rows)

    def test_a_gradient_of_other_parameters(self):
        with pytest.raises(DataError, match="lacks"):
            input_sensitivity(self.jacobian, self.adapter.roles(), gradient={})
