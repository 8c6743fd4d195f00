"""The published fixed-step descent, as a reference: right where it can be, and where it fails ours does not."""

import math

import pytest
import torch

from benchmarks.descent_solve import fixed_step_descent, measure, problem
from benchmarks.reference import ParameterSpace
from lmleak.influence import GradientJacobian, InfluenceSolver, eigen_directions


def test_the_descent_is_the_damped_solve_where_it_converges():
    """Damping 10 bounds every eigenvalue from below: 0.9 per step."""
    adapter, batch = problem(1.0, 1, torch.float32)
    jacobian = GradientJacobian(adapter, batch, shared="all")
    delta = InfluenceSolver(jacobian, adapter.prior()).noise()
    space = ParameterSpace(adapter, batch)
    b, residual, steps = fixed_step_descent(space, [delta[name] for name in space.parameters], 10.0, seed=0)
    expected = eigen_directions(jacobian).influence(delta, damping=10.0)
    assert steps < 300
    assert residual < 1e-4
    assert ((b - expected).norm() / expected.norm()).item() < 1e-3


def test_weights_at_which_the_descent_diverges():
    figures = measure(1.5, 7, damping=1e-3, noise_std=1.0)
    assert figures["lambda_max"] > 200
    assert math.isnan(figures["descent"])
    assert figures["converged"]
    assert figures["our_residual"] < 1e-3
    assert figures["ours"] == pytest.approx(figures["truth"], rel=2e-3)


@pytest.mark.slow
def test_a_damping_at_which_the_descent_stops_short():
    figures = measure(1.0, 1, damping=1e-3, noise_std=1.0)
    assert figures["descent_steps"] == 2000
    assert figures["descent"] < 0.5 * figures["truth"]
    assert figures["ours"] == pytest.approx(figures["truth"], rel=2e-3)
