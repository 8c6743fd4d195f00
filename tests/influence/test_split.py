"""Where the risk sits: per token and per layer, against dense algebra."""

import pytest
import torch

from lmleak.errors import ConfigError, ConvergenceError
from lmleak.influence import (
    GradientJacobian,
    attacker_jacobian,
    influence_by_layer,
    influence_by_token,
    information_by_layer,
    inversion_influence,
)
from tests.families import SEQUENCES, make


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_tokens_add_up_to_the_total(name, side):
    adapter, batch = make(name, padding_side=side)
    result = inversion_influence(adapter, batch, noise_std=1e-2, damping=1e-2, tol=1e-8)
    split = influence_by_token(result, batch.layout["attention_mask"])
    assert [len(row) for row in split] == [len(s) for s in SEQUENCES]
    flat = torch.tensor([value for row in split for value in row], dtype=torch.float64)
    assert flat.square().mean().sqrt().item() == pytest.approx(result.influence.rms, rel=1e-6)
    assert flat.square().sum().item() * 16 == pytest.approx(result.influence.l2**2, rel=1e-6)
    for row in split:  # a causal model's last position gets no gradient: nothing drives it anywhere
        assert row[-1] < 1e-8 * max(row)


def dense_parts(jacobian, roles):
    """Columns of J per layer."""
    matrix, start, parts = jacobian.to_dense(), 0, {role: [] for role in roles}
    for name, shape in jacobian.parameter_shapes.items():
        (role,) = [r for r, names in roles.items() if name in names]
        parts[role].append(matrix[:, start : start + shape.numel()])
        start += shape.numel()
    return {role: torch.cat(columns, 1) for role, columns in parts.items() if columns}


def problem(name, problems, **keywords):
    adapter, batch = problems.small_lenet() if name == "lenet" else make(name, size=2, **keywords)
    return adapter, batch, GradientJacobian(adapter, batch)


NAMES = ["bert", "gpt2", "llama", "lenet"]


@pytest.mark.parametrize("name", NAMES)
def test_layers_share_the_influence(name, problems):
    adapter, batch, jacobian = problem(name, problems)
    roles, delta = adapter.roles(), problems.like_theta(jacobian)
    matrix = jacobian.to_dense()
    a = matrix @ matrix.T
    damping = 1e-3 * torch.linalg.eigvalsh(a)[-1].item()
    result = inversion_influence(adapter, batch, perturbation=delta, damping=damping, tol=1e-8, max_products=1000)
    shares = influence_by_layer(jacobian, delta, result, roles, tol=1e-8, max_products=1000)
    assert sum(shares.values()) == pytest.approx(1.0, rel=1e-6)
    system = a + damping * torch.eye(len(a), dtype=a.dtype)
    z = {
        role: torch.linalg.solve(system, part @ problems.flat(delta, [n for n in roles[role] if n in delta]))
        for role, part in dense_parts(jacobian, roles).items()
    }
    total = sum(z.values())
    assert list(shares) == list(z)
    for role, share in shares.items():
        assert share == pytest.approx((z[role] @ total / total.dot(total)).item(), abs=1e-5)


def test_layers_of_the_cosine_attacker_add_up(problems):
    adapter, batch = make("bert", size=1)
    jacobian = attacker_jacobian(adapter, batch, shared="no-word-embeddings", attacker="cosine")
    delta = problems.like_theta(jacobian)
    damping = 1e-3
    result = inversion_influence(adapter, batch, perturbation=delta, damping=damping, attacker="cosine", tol=1e-8)
    shares = influence_by_layer(jacobian, delta, result, adapter.roles(), tol=1e-8)
    assert sum(shares.values()) == pytest.approx(1.0, rel=1e-6)


def test_a_layer_without_noise_has_no_share(problems):
    adapter, batch, jacobian = problem("gpt2", problems)
    delta = {n: d for n, d in problems.like_theta(jacobian).items() if ".h.0." in n}
    result = inversion_influence(adapter, batch, perturbation=delta, damping=1e-2, tol=1e-8)
    shares = influence_by_layer(jacobian, delta, result, adapter.roles(), tol=1e-8)
    assert shares["block 0"] == pytest.approx(1.0, rel=1e-6)
    assert [shares[r] for r in shares if r != "block 0"] == [0.0] * (len(shares) - 1)


def test_a_layer_that_is_not_shared_is_absent(problems):
    adapter, batch = make("gpt2", size=1)
    jacobian = GradientJacobian(adapter, batch, shared="block:1")
    delta = problems.like_theta(jacobian)
    result = inversion_influence(adapter, batch, perturbation=delta, damping=1e-2, shared="block:1", tol=1e-8)
    assert list(influence_by_layer(jacobian, delta, result, adapter.roles())) == ["block 1"]
    assert list(information_by_layer(jacobian, adapter.roles())) == ["block 1"]


def test_no_influence_has_no_shares(problems):
    adapter, batch, jacobian = problem("bert", problems)
    result = inversion_influence(adapter, batch, noise_std=0.0)
    with pytest.raises(ConfigError, match="no influence, so it has no shares"):
        influence_by_layer(jacobian, {}, result, adapter.roles())


def test_shares_of_an_unconverged_solve_are_refused(problems):
    adapter, batch, jacobian = problem("llama", problems)
    delta = problems.like_theta(jacobian)
    result = inversion_influence(adapter, batch, perturbation=delta, damping=1e-4)
    with pytest.raises(ConvergenceError, match="raise max_products"):
        influence_by_layer(jacobian, delta, result, adapter.roles(), max_products=3)


@pytest.mark.parametrize("name", NAMES)
def test_information_shares_are_the_frobenius_norms(name, problems):
    """Within four standard errors of ||J_l||_F^2 / ||J||_F^2, for three seeds; errors shrink as 1 / sqrt(probes)."""
    adapter, _, jacobian = problem(name, problems)
    roles = adapter.roles()
    exact = {role: part.square().sum().item() for role, part in dense_parts(jacobian, roles).items()}
    total = sum(exact.values())
    for seed in range(3):
        shares = information_by_layer(jacobian, roles, num_probes=64, seed=seed)
        assert list(shares) == list(exact)
        assert sum(s.share for s in shares.values()) == pytest.approx(1.0, rel=1e-9)
        for role, got in shares.items():
            assert abs(got.share - exact[role] / total) <= 4 * got.std_error + 1e-12
    few = information_by_layer(jacobian, roles, num_probes=16, seed=9)
    ratio = sum(s.std_error for s in few.values()) / sum(s.std_error for s in shares.values())
    assert 1.3 < ratio < 3.0


def test_information_ignores_padding():
    """A longer neighbour adds padding to the others; the probes there must not count."""
    adapter, batch = make("gpt2")
    jacobian = GradientJacobian(adapter, batch)
    matrix = jacobian.to_dense()
    total = matrix.square().sum().item()
    shares = information_by_layer(jacobian, {"everything": jacobian.parameter_names})
    assert shares["everything"].share == 1.0
    assert shares["everything"].std_error == 0.0
    block = information_by_layer(jacobian, adapter.roles(), num_probes=64, seed=1)
    columns, start = [], 0
    for name, shape in jacobian.parameter_shapes.items():
        if ".h.0." in name:
            columns.append(matrix[:, start : start + shape.numel()])
        start += shape.numel()
    expected = torch.cat(columns, 1).square().sum().item() / total
    assert abs(block["block 0"].share - expected) <= 4 * block["block 0"].std_error


@pytest.mark.parametrize("num_probes", [1, 0])
def test_one_probe_has_no_standard_error(num_probes, problems):
    adapter, _, jacobian = problem("bert", problems)
    with pytest.raises(ConfigError, match="num_probes >= 2"):
        information_by_layer(jacobian, adapter.roles(), num_probes=num_probes)


def test_the_seed_decides_and_nothing_else(problems):
    adapter, _, jacobian = problem("bert", problems)
    one, again, other = (information_by_layer(jacobian, adapter.roles(), seed=s, num_probes=2) for s in (1, 1, 2))
    assert one == again
    assert one != other
