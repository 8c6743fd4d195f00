"""Pruning against attackers who know the mask: dense oracles, and an attacker who does it."""

import math

import pytest
import torch

from lmleak.errors import DataError
from lmleak.gradients import capture_gradient
from lmleak.influence import GradientJacobian, MaskedJacobian, dense_rows, eigen_directions, mask_aware_influence


@pytest.fixture
def pruned(problems):
    """(J, its directions, dense J, true gradient, released gradient) of softmax regression pruned to 60 %."""
    adapter, batch, *_ = problems.linear_softmax(scale=0.2)
    jacobian = GradientJacobian(adapter, batch, shared="all")
    gradient = dict(capture_gradient(adapter, batch, shared="all").gradient)
    threshold = problems.flat(gradient, jacobian.parameter_names).abs().quantile(0.4)
    released = {n: g * (g.abs() > threshold) for n, g in gradient.items()}
    return jacobian, eigen_directions(jacobian), jacobian.to_dense(), gradient, released


def kept_of(released, jacobian, problems):
    return problems.flat(released, jacobian.parameter_names) != 0


def test_masked_columns_are_zero(pruned, problems):
    jacobian, _, matrix, _, released = pruned
    kept = kept_of(released, jacobian, problems)
    masked = MaskedJacobian(jacobian, {n: r != 0 for n, r in released.items()})
    expected = matrix * kept
    assert masked.num_kept == int(kept.sum()) == 30
    assert torch.allclose(dense_rows(masked), expected, atol=1e-14)
    delta = problems.like_theta(jacobian)
    got = masked.flatten(masked.matvec(delta))
    assert torch.allclose(got, expected @ problems.flat(delta, jacobian.parameter_names), atol=1e-12)
    assert torch.allclose(masked.gram_operator().to_dense(), expected @ expected.T, atol=1e-12)


def test_a_name_that_is_not_released_is_zero_and_a_wrong_mask_refused(pruned):
    jacobian, *_ = pruned
    masked = MaskedJacobian(jacobian, {"1.bias": torch.ones(5, dtype=torch.bool)})
    rows = dense_rows(masked)
    assert rows[:, :-5].abs().max() == 0
    assert rows[:, -5:].abs().max() > 0
    with pytest.raises(DataError, match=r"mask of '1\.bias'"):
        MaskedJacobian(jacobian, {"1.bias": torch.ones(4, dtype=torch.bool)})


def test_both_readings_against_dense_algebra(pruned, problems):
    jacobian, directions, matrix, gradient, released = pruned
    sigma, tau, damping = 0.02, 1.2, 0.05
    got = mask_aware_influence(directions, gradient, released, noise_std=sigma, prior_std=tau, damping=damping)
    columns = matrix[:, kept_of(released, jacobian, problems)]
    a, eye = columns @ columns.T, torch.eye(9, dtype=torch.float64)
    assert got.kept_share == pytest.approx(0.6)
    assert (got.rank, got.nullity) == (9, 0)
    assert got.lambda_min == pytest.approx(torch.linalg.eigvalsh(a)[0].item(), rel=1e-9)
    assert got.aware.l2**2 == pytest.approx(torch.linalg.inv(a / sigma**2 + eye / tau**2).trace().item(), rel=1e-9)
    assert got.aware_unbiased.l2**2 == pytest.approx(sigma**2 * torch.linalg.inv(a).trace().item(), rel=1e-9)
    rank = (a @ torch.linalg.inv(a + (sigma / tau) ** 2 * eye)).trace().item()
    assert got.effective_rank == pytest.approx(rank, rel=1e-9)
    delta = problems.flat(released, jacobian.parameter_names) - problems.flat(gradient, jacobian.parameter_names)
    naive = torch.linalg.solve(matrix @ matrix.T + damping * eye, matrix @ delta).norm().item()
    assert got.naive.l2 == pytest.approx(naive, rel=1e-9)


def test_the_mask_gives_the_image_away_where_the_naive_value_promises_protection(pruned):
    """Without noise J_kept has full rank, so the kept coordinates determine x exactly."""
    _, directions, _, gradient, released = pruned
    got = mask_aware_influence(directions, gradient, released, noise_std=0.0, prior_std=1.0)
    assert got.naive.rms > 0.02
    assert got.aware.l2 == 0
    assert got.aware_unbiased.l2 == 0


def test_an_attacker_who_matches_the_kept_coordinates_errs_as_predicted(pruned, problems):
    """Gauss-Newton from the truth on the kept coordinates under small noise, over draws."""
    jacobian, directions, _, gradient, released = pruned
    sigma = 1e-4
    predicted = mask_aware_influence(directions, gradient, released, noise_std=sigma, prior_std=1e3)
    kept = kept_of(released, jacobian, problems)
    adapter, batch, *_ = problems.linear_softmax(scale=0.2)
    function = problems.gradient_function(adapter, batch, "all")
    truth, x0 = function(jacobian.x).detach(), jacobian.x
    squares = []
    for seed in range(60):
        target = truth + sigma * problems.randn(len(truth), seed=seed)
        x = x0.clone()
        for _ in range(4):
            rows = torch.autograd.functional.jacobian(function, x).reshape(len(truth), -1)[kept]
            residual = (target - function(x).detach())[kept]
            x = x + torch.linalg.lstsq(rows, residual).solution.reshape(x.shape)
        squares.append((x - x0).square().sum().item())
    mean = sum(squares) / len(squares)
    assert mean == pytest.approx(predicted.aware.l2**2, rel=0.3)


def test_a_release_too_small_for_the_image(pruned):
    _, directions, _, gradient, _ = pruned
    few = {n: torch.zeros_like(g) for n, g in gradient.items()}
    few["1.weight"][0, :4] = gradient["1.weight"][0, :4]  # four coordinates for nine pixels
    got = mask_aware_influence(directions, gradient, few, noise_std=0.0, prior_std=1.3)
    assert (got.rank, got.nullity) == (4, 5)
    assert got.lambda_min == 0
    assert got.aware.l2**2 == pytest.approx(5 * 1.3**2)
    noisy = mask_aware_influence(directions, gradient, few, noise_std=1e-3, prior_std=1.3)
    assert noisy.aware_unbiased.l2 == math.inf
    assert noisy.aware.l2 > got.aware.l2
