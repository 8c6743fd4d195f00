"""The Gauss-Radau bound: with the last iterate's norm it encloses the solution's, however early the run stops."""

import itertools
import math

import pytest
import torch

from lmleak.linops import MatrixOperator, conjugate_gradient, krylov_solve, lanczos, multishift_cg

SPECTRA = {
    "decaying": torch.logspace(0, -7, 40),
    "singular": torch.cat([torch.logspace(0, -3, 30), torch.zeros(10)]),
    "clustered": torch.tensor([1.0] * 5 + [0.1] * 30 + [1e-6] * 5),
    "one far": torch.cat([torch.tensor([1e4]), torch.linspace(0.5, 1.0, 39)]),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("damping", [1e-6, 1e-3, 0.5])
@pytest.mark.parametrize("seed", range(3))
def test_it_encloses_the_norm_and_the_error_at_every_length(spectrum, damping, seed, operator_with_spectrum, vector):
    operator = operator_with_spectrum(SPECTRA[spectrum], seed)
    b = vector(40, seed)
    exact = torch.linalg.solve(operator.matrix + damping * torch.eye(40, dtype=torch.float64), b)
    run = lanczos(operator, b, max_products=40)
    uppers = []
    for length in range(1, run.dimension + 1):
        (found,) = krylov_solve(run.after(length), [damping])
        assert found.norm <= exact.norm() * (1 + 1e-8)
        assert found.upper_bound >= exact.norm() * (1 - 1e-8)
        known_to = math.sqrt(max(0.0, found.upper_bound**2 - found.norm**2))
        assert (found.solution - exact).norm() <= known_to + 1e-4 * exact.norm()
        uppers.append(found.upper_bound)
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in itertools.pairwise(uppers))
    assert uppers[-1] == pytest.approx(exact.norm().item(), rel=1e-6)
    assert uppers[0] > uppers[-1]


def test_it_holds_in_float32_up_to_rounding(operator_with_spectrum, vector):
    operator = operator_with_spectrum(SPECTRA["decaying"], dtype=torch.float32)
    b = vector(40, dtype=torch.float32)
    for damping in (1e-4, 1e-2):
        dense = operator.matrix.double() + damping * torch.eye(40, dtype=torch.float64)
        exact = torch.linalg.solve(dense, b.double()).norm().item()
        for products in (2, 5, 10, 20):
            (found,) = multishift_cg(operator, b, [damping], max_products=products, tol=1e-9)
            assert found.norm * (1 - 1e-2) <= exact <= found.upper_bound * (1 + 1e-2)


def test_it_is_infinite_where_the_damping_is_not_told_from_zero(operator_with_spectrum, vector):
    operator = operator_with_spectrum(SPECTRA["singular"], dtype=torch.float32)
    results = multishift_cg(operator, vector(40, dtype=torch.float32), [0.0, 1e-9, 1e-2], max_products=5)
    assert [math.isfinite(result.upper_bound) for result in results] == [False, False, True]


def test_an_exhausted_run_knows_the_norm():
    operator = MatrixOperator(
        torch.diag(torch.tensor([2.0, 2.0, 5.0], dtype=torch.float64)), positive_semidefinite=True
    )
    (found,) = multishift_cg(operator, torch.tensor([3.0, 4.0, 0.0], dtype=torch.float64), [0.5])
    assert found.products == 1
    assert found.upper_bound == pytest.approx(2.0)
    assert found.norm == pytest.approx(2.0)


def test_zero_has_no_length_and_other_solvers_do_not_know(operator_with_spectrum, vector):
    operator = operator_with_spectrum(SPECTRA["one far"])
    (found,) = multishift_cg(operator, torch.zeros(40, dtype=torch.float64), [1.0])
    assert found.upper_bound == 0
    assert conjugate_gradient(operator, vector(40), damping=1.0).upper_bound == math.inf


@pytest.mark.parametrize(("dtype", "damping", "least"), [(torch.float64, 50, 1.01), (torch.float32, 84, 1.003)])
def test_what_rounding_hides_from_an_exhausted_run_is_allowed_for(dtype, damping, least):
    """b has a part along the null space that is too small to continue with, and that a small damping blows up."""
    eps = torch.finfo(dtype).eps
    operator = MatrixOperator(torch.diag(torch.tensor([1.0, 0.0], dtype=dtype)), positive_semidefinite=True)
    b = torch.tensor([1.0, 9 * eps], dtype=dtype)
    (found,) = multishift_cg(operator, b, [damping * eps], tol=1e-3)
    exact = math.hypot(1 / (1 + damping * eps), 9 / damping)
    assert found.products == 1
    assert exact > least
    assert found.norm <= exact * (1 + 1e-6) <= found.upper_bound * (1 + 2e-6)
    assert found.residual >= 9 * eps
