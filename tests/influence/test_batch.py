"""Batches: joint and others-known errors against the dense closed form of softmax regression; the rank transition."""

import math

import pytest
import torch

from lmleak.adapters import adapt
from lmleak.adapters.base import Prior
from lmleak.errors import DataError
from lmleak.influence import (
    GradientJacobian,
    InfluenceSolver,
    PartialInputJacobian,
    eigen_directions,
    expected_by_example,
    influence_by_example,
)  # fmt: skip
from tests.families import make

PIXELS, CLASSES = 20, 10  # the table of batch sizes: P = 210, rank at most 9 * 21 = 189


def softmax_regression(size, problems):
    """Return (J, its closed form): J_i[a, (k, j)] = M[k, a] x_j + r_k [a = j], biases M[k, a], all over B."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(PIXELS, CLASSES, device="meta"))
    model = model.to_empty(device="cpu").double()
    with torch.no_grad():
        model[1].weight.copy_(0.3 * problems.randn(CLASSES, PIXELS, seed=1))
        model[1].bias.copy_(0.3 * problems.randn(CLASSES, seed=2))
    adapter = adapt(model, image_shape=(1, 4, 5))
    batch = adapter.batch(problems.randn(size, 1, 4, 5, seed=3), [i % CLASSES for i in range(size)])
    weight, bias = model[1].weight.detach(), model[1].bias.detach()
    blocks = []
    for x, y in zip(batch.inputs["pixel_values"].flatten(1), batch.targets.tolist(), strict=True):
        p = torch.softmax(weight @ x + bias, 0)
        r = p.clone()
        r[y] -= 1
        m = (torch.diag(p) - torch.outer(p, p)) @ weight
        of_weight = torch.einsum("ka,j->akj", m, x) + torch.einsum("k,aj->akj", r, torch.eye(PIXELS).double())
        blocks.append(torch.cat([of_weight.flatten(1), m.T], 1) / size)
    return GradientJacobian(adapter, batch, shared="all"), torch.cat(blocks)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_below_the_rank_limit(size, problems):
    jacobian, matrix = softmax_regression(size, problems)
    directions = eigen_directions(jacobian)
    a = matrix @ matrix.T
    assert (directions.rank, directions.nullity) == (PIXELS * size, 0)
    assert directions.values[-1].item() == pytest.approx(torch.linalg.eigvalsh(a)[0].item(), rel=1e-9)
    inverse = torch.linalg.inv(a)
    for i, example in enumerate(expected_by_example(directions, 1e-4)):
        rows = slice(PIXELS * i, PIXELS * (i + 1))
        joint = 1e-8 * inverse[rows, rows].trace().item()
        alone = 1e-8 * torch.linalg.inv(a[rows, rows]).trace().item()
        assert example.joint.l2**2 == pytest.approx(joint, rel=1e-8)
        assert example.joint.rms**2 == pytest.approx(joint / PIXELS, rel=1e-8)
        assert example.others_known.l2**2 == pytest.approx(alone, rel=1e-8)
        assert example.others_known.l2 <= example.joint.l2 * (1 + 1e-9)


def test_the_smallest_eigenvalue_falls_with_the_batch_and_vanishes_at_the_rank_limit(problems):
    values, ranks = [], []
    for size in (1, 2, 4, 8, 9, 10, 12):
        jacobian, matrix = softmax_regression(size, problems)
        directions = eigen_directions(jacobian)
        values.append(directions.values[-1].item())
        ranks.append((directions.rank, directions.nullity))
        assert directions.rank == torch.linalg.matrix_rank(matrix, rtol=1e-9)
    assert ranks == [(20, 0), (40, 0), (80, 0), (160, 0), (180, 0), (189, 11), (189, 51)]
    assert values[:5] == sorted(values[:5], reverse=True)
    assert values[4] > 0
    assert values[5:] == [0, 0]


def test_beyond_the_rank_limit(problems):
    """Without a prior the joint attacker errs without bound; who knows the others inverts each image still."""
    jacobian, matrix = softmax_regression(10, problems)
    directions = eigen_directions(jacobian)
    a, sigma, tau = matrix @ matrix.T, 1e-2, 1.5
    posterior = torch.linalg.inv(a / sigma**2 + torch.eye(200, dtype=torch.float64) / tau**2)
    bounds, bayes = expected_by_example(directions, sigma), expected_by_example(directions, sigma, tau)
    for i, (bound, known_prior) in enumerate(zip(bounds, bayes, strict=True)):
        rows = slice(PIXELS * i, PIXELS * (i + 1))
        alone = torch.linalg.inv(a[rows, rows]).trace().item() * sigma**2
        assert bound.joint.l2 == math.inf
        assert bound.others_known.l2**2 == pytest.approx(alone, rel=1e-8)
        assert known_prior.joint.l2**2 == pytest.approx(posterior[rows, rows].trace().item(), rel=1e-6)
        alone = torch.linalg.inv(a[rows, rows] / sigma**2 + torch.eye(PIXELS).double() / tau**2).trace().item()
        assert known_prior.others_known.l2**2 == pytest.approx(alone, rel=1e-8)
    total = sum(example.joint.l2**2 for example in bayes)
    assert total == pytest.approx(directions.bayes_error(sigma, tau).l2 ** 2, rel=1e-9)


@pytest.mark.parametrize("damping", [0.0, 1e-3])
def test_one_perturbation_without_forming_a(damping, problems):
    size = 4
    jacobian, matrix = softmax_regression(size, problems)
    delta = problems.like_theta(jacobian)
    b = matrix @ problems.flat(delta, jacobian.parameter_names)
    a = matrix @ matrix.T
    prior = Prior(torch.zeros((), dtype=torch.float64), 1.0)
    result = InfluenceSolver(jacobian, prior, tol=1e-9, max_products=400).solve(delta, damping=damping)
    examples = influence_by_example(jacobian, delta, result, tol=1e-9)
    joint = torch.linalg.solve(a + damping * torch.eye(len(a), dtype=torch.float64), b)
    for i, example in enumerate(examples):
        rows = slice(PIXELS * i, PIXELS * (i + 1))
        own = size * matrix[rows]  # J_i of the example's own loss
        shift = size**2 * damping * torch.eye(PIXELS, dtype=torch.float64)
        alone = size * torch.linalg.solve(own @ own.T + shift, own @ problems.flat(delta, jacobian.parameter_names))
        assert example.converged
        assert example.joint.l2 == pytest.approx(joint[rows].norm().item(), rel=1e-6)
        assert example.others_known.l2 == pytest.approx(alone.norm().item(), rel=1e-6)
    total = math.sqrt(sum(example.joint.l2**2 for example in examples))
    assert total == pytest.approx(result.influence.l2, rel=1e-9)


def test_texts_of_unequal_length(problems):
    """The mean is over tokens, padding is nobody's: blocks of the dense A by example."""
    adapter, batch = make("gpt2", size=2)
    jacobian = GradientJacobian(adapter, batch)
    matrix, sigma = jacobian.to_dense(), 1e-2
    examples = expected_by_example(eigen_directions(jacobian), sigma, 1.0)
    lengths = [int(n) * adapter.width for n in batch.layout["attention_mask"].sum(1)]
    a = matrix @ matrix.T / sigma**2
    posterior = torch.linalg.inv(a + torch.eye(len(a), dtype=torch.float64))
    start = 0
    for example, length in zip(examples, lengths, strict=True):
        rows = slice(start, start + length)
        assert example.joint.l2**2 == pytest.approx(posterior[rows, rows].trace().item(), rel=1e-6)
        assert example.joint.rms == pytest.approx(example.joint.l2 / math.sqrt(length), rel=1e-12)
        alone = torch.linalg.inv(a[rows, rows] + torch.eye(length, dtype=torch.float64)).trace().item()
        assert example.others_known.l2**2 == pytest.approx(alone, rel=1e-6)
        start += length


def test_known_coordinates(problems):
    jacobian, matrix = softmax_regression(2, problems)
    part = PartialInputJacobian.of_example(jacobian, 1)
    delta = problems.like_theta(jacobian)
    assert part.dx == PIXELS
    got = part.flatten(part.matvec(delta))
    assert torch.allclose(got, matrix[PIXELS:] @ problems.flat(delta, jacobian.parameter_names))
    assert torch.allclose(part.gram_operator().to_dense(), matrix[PIXELS:] @ matrix[PIXELS:].T)
    with pytest.raises(DataError, match="mask shaped like x"):
        PartialInputJacobian(jacobian, torch.zeros_like(jacobian.free))
