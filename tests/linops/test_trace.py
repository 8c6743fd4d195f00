import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmleak.errors import ConfigError, ConvergenceError
from lmleak.linops import FunctionOperator, exact_spectrum, spectral_probes

FUNCTIONS = {
    "inverse": lambda x: 1 / (x + 0.05),
    "effective rank": lambda x: x / (x + 0.05),
    "filtered inverse": lambda x: x / (x + 0.05) ** 2,
    "log determinant": lambda x: torch.log1p(x / 0.05),
}
SPECTRUM = torch.cat([torch.zeros(20), torch.logspace(-3, 1, 80)]).double()  # singular, condition 1e4


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_exact_spectrum_equals_the_dense_trace(name, operator_with_spectrum):
    operator, f = operator_with_spectrum(SPECTRUM), FUNCTIONS[name]
    estimate = exact_spectrum(operator).trace(f)
    assert estimate.value == pytest.approx(f(SPECTRUM).sum().item(), rel=1e-10)
    assert (estimate.std_error, estimate.quadrature_error, estimate.converged) == (0.0, 0.0, True)
    assert estimate.products == 100
    assert estimate.interval() == (estimate.value, estimate.value)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("distribution", ["rademacher", "gaussian", "sphere"])
def test_estimate_lies_within_four_standard_errors(name, distribution, operator_with_spectrum):
    operator, f = operator_with_spectrum(SPECTRUM), FUNCTIONS[name]
    truth = f(SPECTRUM).sum().item()
    for seed in range(4):
        sample = spectral_probes(operator, num_probes=30, steps=40, generator=seeded(seed), distribution=distribution)
        estimate = sample.trace(f)
        assert estimate.converged
        assert estimate.std_error > 0
        assert abs(estimate.value - truth) <= 4 * estimate.std_error + estimate.quadrature_error


def test_interval_covers_as_often_as_it_says_with_three_probes(matrix_with_spectrum):
    """Few probes: the t interval keeps its coverage, where two standard errors would not."""
    matrix = matrix_with_spectrum(torch.linspace(0, 2, 30))
    operator = FunctionOperator(lambda v: matrix @ v, 30, torch.float64, positive_semidefinite=True)
    f = FUNCTIONS["inverse"]
    truth = f(torch.linspace(0, 2, 30).double()).sum().item()
    trials, covered = 200, 0
    generator = seeded(0)
    for _ in range(trials):
        estimate = spectral_probes(operator, num_probes=3, steps=20, generator=generator).trace(f)
        low, high = estimate.interval(0.9)
        covered += low <= truth <= high
    assert covered / trials >= 0.9 - 3 * math.sqrt(0.9 * 0.1 / trials)


@pytest.mark.parametrize("steps", [2, 4, 8, 16, 32])
@pytest.mark.parametrize("name", ["inverse", "effective rank", "log determinant"])
def test_gauss_and_radau_bracket_every_probe(steps, name, operator_with_spectrum):
    """The quadrature error bounds the distance to z^T f(A) z, whatever the number of steps."""
    operator, f = operator_with_spectrum(SPECTRUM), FUNCTIONS[name]
    few = spectral_probes(operator, num_probes=2, steps=steps, generator=seeded(0)).trace(f)
    many = spectral_probes(operator, num_probes=2, steps=100, generator=seeded(0)).trace(f)  # the same probes, exact
    assert many.quadrature_error <= 1e-9 * many.value
    distance = abs(few.value - many.value)
    assert distance <= few.quadrature_error * (1 + 1e-9) + 1e-9 * many.value
    assert few.quadrature_error <= 60 * distance + 1e-9 * many.value  # and it is not wildly pessimistic


def test_too_few_steps_are_flagged(operator_with_spectrum):
    operator = operator_with_spectrum(SPECTRUM)
    f = lambda x: 1 / (x + 1e-4)
    short = spectral_probes(operator, num_probes=2, steps=4, generator=seeded(0)).trace(f)
    assert not short.converged
    assert short.residual > 1e-2
    assert short.residual == short.quadrature_error / short.value
    assert spectral_probes(operator, num_probes=2, steps=85, generator=seeded(0)).trace(f).converged


def test_one_sample_serves_every_function(matrix_with_spectrum):
    matrix = matrix_with_spectrum(SPECTRUM)
    operator = FunctionOperator(lambda v: matrix @ v, 100, torch.float64, positive_semidefinite=True)
    sample = spectral_probes(operator, num_probes=4, steps=25, generator=seeded(1))
    estimates = {name: sample.trace(f) for name, f in FUNCTIONS.items()}
    assert operator.products == sample.products == 100
    assert {estimate.products for estimate in estimates.values()} == {100}
    assert all(estimate.num_probes == 4 for estimate in estimates.values())
    # x / (x + d) + d / (x + d) = 1, function by function on the same nodes
    total = estimates["effective rank"].value + 0.05 * estimates["inverse"].value
    assert total == pytest.approx(100, rel=1e-12)
    assert sample.trace(lambda x: x).value == pytest.approx(matrix.trace().item(), rel=0.5)


def test_low_rank_probes_stop_early_and_are_exact():
    diagonal = torch.zeros(50, dtype=torch.float64)
    diagonal[:3] = torch.tensor([3.0, 2.0, 1.0])
    operator = FunctionOperator(lambda v: diagonal * v, 50, torch.float64, positive_semidefinite=True)
    sample = spectral_probes(operator, num_probes=3, steps=40, generator=seeded(0))
    assert sample.products == 12  # three eigenvalues and the null space
    for f in FUNCTIONS.values():
        estimate = sample.trace(f)
        assert estimate.quadrature_error == 0
        assert estimate.value == pytest.approx(f(diagonal).sum().item(), rel=1e-12)  # Rademacher on a diagonal
        assert estimate.std_error <= 1e-12 * estimate.value
    assert sample.smallest == pytest.approx(0, abs=1e-14)
    assert sample.largest == pytest.approx(3)


def test_weights_are_a_distribution_and_nodes_are_not_negative(operator_with_spectrum):
    sample = spectral_probes(operator_with_spectrum(SPECTRUM, dtype=torch.float32), generator=seeded(0), steps=60)
    for probe in sample.probes:
        for nodes, weights in ((probe.nodes, probe.weights), (probe.radau_nodes, probe.radau_weights)):
            assert nodes.dtype == weights.dtype == torch.float64
            assert weights.sum().item() == pytest.approx(1, abs=1e-12)
            assert weights.min() >= 0
            assert nodes.min() >= 0
        assert probe.norm_squared == pytest.approx(100)


def test_float32_agrees_with_float64(operator_with_spectrum):
    f = FUNCTIONS["inverse"]
    single, double = (
        spectral_probes(operator_with_spectrum(SPECTRUM, dtype=dtype), generator=seeded(0), steps=60).trace(f).value
        for dtype in (torch.float32, torch.float64)
    )
    assert single == pytest.approx(double, rel=1e-4)


def test_same_seed_same_numbers(operator_with_spectrum):
    operator, f = operator_with_spectrum(SPECTRUM), FUNCTIONS["inverse"]
    run = lambda seed: spectral_probes(operator, num_probes=3, steps=10, generator=seeded(seed)).trace(f)
    assert run(5) == run(5)
    assert run(5) != run(6)


def test_bad_arguments_are_refused(operator_with_spectrum):
    operator = operator_with_spectrum(SPECTRUM)
    with pytest.raises(ConfigError, match="no standard error"):
        spectral_probes(operator, num_probes=1, generator=seeded(0))
    with pytest.raises(ConfigError, match="steps at least 1"):
        spectral_probes(operator, steps=0, generator=seeded(0))
    with pytest.raises(ConfigError, match=r"manual_seed"):
        spectral_probes(operator, generator=7)
    with pytest.raises(ConfigError, match="sides up to 99"):
        exact_spectrum(operator, max_size=99)
    singular = FunctionOperator(
        lambda v: v * torch.tensor([1.0, 0.0]).double(), 2, torch.float64, positive_semidefinite=True
    )
    with pytest.raises(ConfigError, match="Add a damping"):
        exact_spectrum(singular).trace(lambda x: 1 / x)
    with pytest.raises(ConfigError, match="one number per eigenvalue"):
        exact_spectrum(singular).trace(lambda x: x.sum())
    nan = FunctionOperator(lambda v: v * math.nan, 2, torch.float64, positive_semidefinite=True)
    with pytest.raises(ConvergenceError, match="NaN"):
        spectral_probes(nan, generator=seeded(0))


def test_infinite_at_zero_is_flagged_unless_the_spectrum_is_known(operator_with_spectrum):
    operator = operator_with_spectrum(torch.linspace(1, 2, 30))
    inverse = lambda x: 1 / x
    open_ended = spectral_probes(operator, num_probes=2, steps=10, generator=seeded(0)).trace(inverse)
    assert math.isinf(open_ended.quadrature_error)
    assert not open_ended.converged
    truth = (1 / torch.linspace(1, 2, 30).double()).sum().item()
    assert exact_spectrum(operator).trace(inverse).value == pytest.approx(truth, rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    spectrum=st.lists(st.floats(0, 10), min_size=1, max_size=15),
    damping=st.sampled_from([1e-2, 1.0]),
    seed=st.integers(0, 100),
)
def test_full_quadrature_is_exact_for_any_spectrum(spectrum, damping, seed):
    """With as many steps as dimensions, each probe gives z^T f(A) z; on a diagonal, Rademacher gives the trace."""
    diagonal = torch.tensor(spectrum, dtype=torch.float64)
    operator = FunctionOperator(lambda v: diagonal * v, len(diagonal), torch.float64, positive_semidefinite=True)
    sample = spectral_probes(operator, num_probes=2, steps=len(diagonal), generator=seeded(seed))
    for f in (lambda x: 1 / (x + damping), lambda x: x / (x + damping), lambda x: torch.log1p(x / damping)):
        truth = f(diagonal).sum().item()
        np.testing.assert_allclose(sample.trace(f).value, truth, rtol=1e-9, atol=1e-12)
        assert exact_spectrum(operator).trace(f).value == pytest.approx(truth, rel=1e-12, abs=1e-300)


@pytest.mark.parametrize("block_size", [2, 3, 64])
def test_probes_side_by_side_are_those_one_by_one(block_size, matrix_with_spectrum):
    matrix = matrix_with_spectrum(SPECTRUM)
    settings = {"size": 100, "dtype": torch.float64, "positive_semidefinite": True}
    alone = FunctionOperator(lambda v: matrix @ v, **settings)
    together = FunctionOperator(lambda v: matrix @ v, matmat=lambda v: matrix @ v, block_size=block_size, **settings)
    one, many = (spectral_probes(o, num_probes=7, steps=20, generator=seeded(1)) for o in (alone, together))
    assert one.products == many.products == together.products == 140
    for f in FUNCTIONS.values():
        np.testing.assert_allclose(many.trace(f).value, one.trace(f).value, rtol=1e-12)
        np.testing.assert_allclose(many.trace(f).std_error, one.trace(f).std_error, rtol=1e-9)


def test_probes_that_end_early_leave_the_others_going():
    """On a projector every probe is exhausted after two products, and nothing is multiplied for it afterwards."""
    diagonal = torch.tensor([1.0] * 4 + [0.0] * 6, dtype=torch.float64)
    operator = FunctionOperator(
        lambda v: diagonal * v, 10, torch.float64, positive_semidefinite=True,
        matmat=lambda v: diagonal[:, None] * v, block_size=4,
    )  # fmt: skip
    sample = spectral_probes(operator, num_probes=6, steps=9, generator=seeded(0))
    assert sample.products == operator.products == 12
    assert sample.trace(lambda x: x).value == pytest.approx(4.0, rel=1e-12)
