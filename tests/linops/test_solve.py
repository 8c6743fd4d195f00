import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmleak.errors import ConfigError, ConvergenceError, DataError
from lmleak.linops import (
    FunctionOperator,
    MatrixOperator,
    StopReason,
    conjugate_gradient,
    krylov_solve,
    lanczos,
    multishift_cg,
)

DAMPINGS = [0.0, 1e-3, 0.1, 1.0, 30.0]


def solve_one(method, operator, b, damping=0.0, **settings):
    if method == "classic":
        return conjugate_gradient(operator, b, damping=damping, **settings)
    return multishift_cg(operator, b, [damping], **settings)[0]


def counted(matrix):
    return FunctionOperator(lambda v: matrix @ v, len(matrix), matrix.dtype, positive_semidefinite=True)


def diagonal_operator(diagonal):
    return FunctionOperator(lambda v: diagonal * v, len(diagonal), diagonal.dtype, positive_semidefinite=True)


@pytest.mark.parametrize("method", ["classic", "multishift"])
@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("size", [1, 2, 50])
def test_solution_equals_the_direct_one(method, damping, size, matrix_with_spectrum, vector):
    matrix = matrix_with_spectrum(torch.linspace(0.05, 5, size))  # condition number at most 100
    b = vector(size)
    kept = b.clone()
    result = solve_one(method, counted(matrix), b, damping, tol=1e-12)
    expected = torch.linalg.solve(matrix + damping * torch.eye(size, dtype=torch.float64), b)
    torch.testing.assert_close(result.solution, expected, rtol=1e-10, atol=1e-10)
    assert result.converged
    assert result.stopped is StopReason.TOLERANCE
    assert result.residual <= 1e-12
    assert result.norm == pytest.approx(expected.norm().item(), rel=1e-10)
    assert result.norm == pytest.approx(result.solution.norm().item(), rel=1e-12)
    assert len(result.lower_bounds) == result.iterations
    assert result.damping == damping
    assert torch.equal(b, kept)


def test_multishift_equals_separate_solves_for_the_products_of_the_hardest(matrix_with_spectrum, vector):
    matrix, b = matrix_with_spectrum(torch.logspace(-3, 1, 80)), vector(80)
    operator = counted(matrix)
    together = multishift_cg(operator, b, DAMPINGS, tol=1e-8)
    spent = operator.products
    assert {result.products for result in together} == {spent}
    alone = [multishift_cg(counted(matrix), b, [damping], tol=1e-8)[0] for damping in DAMPINGS]
    assert spent == max(result.products for result in alone) == alone[0].products
    assert alone[-1].products < spent / 4  # the largest damping alone needs far fewer
    for one, same in zip(together, alone, strict=True):
        assert one.converged
        assert one.damping == same.damping
        torch.testing.assert_close(one.solution, same.solution, rtol=1e-4, atol=1e-7 * same.norm)
        assert one.lower_bounds[: same.iterations] == pytest.approx(same.lower_bounds, rel=1e-9)
        true = (b - matrix @ one.solution - one.damping * one.solution).norm().item() / b.norm().item()
        assert true <= max(1e-8, 3 * one.residual)


def test_both_methods_walk_the_same_iterates(matrix_with_spectrum, vector):
    matrix, b = matrix_with_spectrum(torch.linspace(0.1, 3, 40)), vector(40)
    for k in (1, 2, 5, 9):
        classic = conjugate_gradient(counted(matrix), b, damping=0.2, tol=1e-14, max_products=k)
        shifted = multishift_cg(counted(matrix), b, [0.2], tol=1e-14, max_products=k)[0]
        torch.testing.assert_close(classic.solution, shifted.solution, rtol=1e-10, atol=1e-12)
        assert classic.lower_bounds == pytest.approx(shifted.lower_bounds, rel=1e-10)
        assert classic.residual == pytest.approx(shifted.residual, rel=1e-8)
        assert classic.stopped is shifted.stopped is StopReason.MAX_PRODUCTS
        assert (classic.products, shifted.products) == (k + 1, k)  # the classic one recomputes its residual


def test_krylov_solve_reads_new_dampings_without_a_product(matrix_with_spectrum, vector):
    matrix, b = matrix_with_spectrum(torch.linspace(0.05, 5, 60)), vector(60)
    operator = counted(matrix)
    krylov = lanczos(operator, b, max_products=60)
    spent = operator.products
    for result in krylov_solve(krylov, [0.0, 0.3, 7.0], tol=1e-10):
        expected = torch.linalg.solve(matrix + result.damping * torch.eye(60, dtype=torch.float64), b)
        torch.testing.assert_close(result.solution, expected, rtol=1e-9, atol=1e-9)
        assert result.converged
    short = lanczos(operator, b, max_products=4)
    (unfinished,) = krylov_solve(short, [0.0], tol=1e-10)
    assert not unfinished.converged
    (finished,) = krylov_solve(short.extend(56), [0.0], tol=1e-10)
    assert finished.converged
    assert finished.lower_bounds[:4] == pytest.approx(unfinished.lower_bounds, rel=1e-12)
    assert operator.products == spent + 60


@pytest.mark.parametrize("method", ["classic", "multishift"])
@pytest.mark.parametrize("rank", [1, 4, 20])
def test_singular_consistent_system_gives_the_pseudo_inverse(method, rank, matrix_with_spectrum, vector):
    spectrum = torch.zeros(60)
    spectrum[:rank] = torch.linspace(0.2, 2, rank)
    matrix = matrix_with_spectrum(spectrum)
    b = matrix @ vector(60)
    operator = counted(matrix)
    result = solve_one(method, operator, b, tol=1e-10)
    expected = torch.linalg.pinv(matrix, hermitian=True, rtol=1e-10) @ b
    torch.testing.assert_close(result.solution, expected, rtol=1e-8, atol=1e-8)
    assert result.converged
    assert operator.products <= rank + 2
    # damping shrinks it, and every damped bound holds for the undamped value
    damped = solve_one(method, operator, b, 0.1, tol=1e-10)
    assert damped.norm < result.norm
    assert all(bound <= expected.norm().item() * (1 + 1e-12) for bound in (*damped.lower_bounds, *result.lower_bounds))


@pytest.mark.parametrize("method", ["classic", "multishift"])
def test_breakdown_ends_the_run(method):
    diagonal = torch.tensor([3.0, 2.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    b = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    result = solve_one(method, diagonal_operator(diagonal), b, tol=1e-15)
    torch.testing.assert_close(result.solution, b / torch.tensor([3, 2, 1, 1, 1]), rtol=1e-14, atol=0)
    assert result.iterations == 2


@pytest.mark.parametrize("method", ["classic", "multishift"])
def test_inconsistent_system_is_flagged(method):
    diagonal = torch.tensor([3.0, 2.0, 0.0], dtype=torch.float64)
    result = solve_one(method, diagonal_operator(diagonal), torch.ones(3, dtype=torch.float64), tol=1e-10)
    assert not result.converged
    assert result.residual > 0.5
    with pytest.raises(ConvergenceError, match="raise the damping") as caught:
        result.require_converged()
    assert caught.value.residual == result.residual
    null = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)  # b in the null space: nothing can be done
    nothing = solve_one(method, diagonal_operator(diagonal), null, tol=1e-10)
    assert (nothing.norm, nothing.residual, nothing.iterations) == (0.0, 1.0, 0)
    assert nothing.stopped is StopReason.PRECISION


@pytest.mark.parametrize("method", ["classic", "multishift"])
def test_zero_right_hand_side_and_zero_operator(method, vector):
    zero = diagonal_operator(torch.zeros(4, dtype=torch.float64))
    result = solve_one(method, zero, torch.zeros(4, dtype=torch.float64))
    assert result.converged
    assert torch.equal(result.solution, torch.zeros(4, dtype=torch.float64))
    assert (result.norm, result.residual, result.products, result.lower_bounds) == (0.0, 0.0, 0, ())
    b = vector(4)
    torch.testing.assert_close(solve_one(method, zero, b, 2.0).solution, b / 2)
    assert not solve_one(method, zero, b, 0.0).converged


@pytest.mark.parametrize("method", ["classic", "multishift"])
def test_running_out_of_products_is_flagged(method, operator_with_spectrum, vector):
    result = solve_one(method, operator_with_spectrum(torch.logspace(-6, 0, 100)), vector(100), max_products=5)
    assert not result.converged
    assert result.stopped is StopReason.MAX_PRODUCTS
    assert result.residual > 1e-6
    assert result.iterations == 5
    with pytest.raises(ConvergenceError, match="raise max_products"):
        result.require_converged()


@pytest.mark.parametrize("seed", range(5))
def test_chain_of_lower_bounds(seed, matrix_with_spectrum, vector):
    """||b|| / lambda_max <= ||b||^2 / ||A b|| <= ||b||^3 / (b^T A b) = ||x_1|| <= ||x_2|| <= ... <= ||A^-1 b||."""
    matrix, b = matrix_with_spectrum(torch.logspace(-2, 1, 40), seed), vector(40, seed)
    length, product = b.norm(), matrix @ b
    (result,) = multishift_cg(counted(matrix), b, [0.0], tol=1e-11)
    truth = torch.linalg.solve(matrix, b).norm()
    assert result.lower_bounds[0] == pytest.approx((length**3 / (b @ product)).item(), rel=1e-12)
    chain = [length / torch.linalg.eigvalsh(matrix)[-1], length**2 / product.norm(), *result.lower_bounds]
    assert all(a <= b * (1 + 1e-14) for a, b in itertools.pairwise(chain))
    assert all(bound <= truth * (1 + 1e-10) for bound in chain)
    assert result.lower_bounds[-1] == pytest.approx(truth.item(), rel=1e-8)


@pytest.mark.parametrize("method", ["classic", "multishift"])
@pytest.mark.parametrize("damping", [0.0, 1e-6, 1e-3])
@pytest.mark.parametrize("seed", range(3))
def test_bounds_are_monotone_and_true_in_float32_at_condition_1e8(method, damping, seed, vector):
    diagonal = torch.logspace(-8, 0, 120, dtype=torch.float64).float()
    b = vector(120, seed, torch.float32)
    result = solve_one(method, diagonal_operator(diagonal), b, damping, tol=1e-4, max_products=120)
    truth = (b.double() / (diagonal.double() + damping)).norm().item()
    assert all(a <= b for a, b in itertools.pairwise(result.lower_bounds))
    assert all(bound <= truth * (1 + 1e-4) for bound in result.lower_bounds)
    assert result.converged == (result.residual <= 1e-4)
    residual = b.double() - (diagonal.double() + damping) * result.solution.double()
    true = residual.norm().item() / b.double().norm().item()
    assert true <= 5 * max(result.residual, 1e-6)  # what is reported is what is there
    if damping == 0.0:
        assert not result.converged  # condition 1e8 cannot be solved in float32, and it says so
        assert result.stopped in (StopReason.PRECISION, StopReason.MAX_PRODUCTS)
    if damping == 1e-3:
        assert result.converged
        assert result.norm == pytest.approx(truth, rel=1e-3)


def test_lower_bounds_in_float32_follow_those_in_float64(matrix_with_spectrum, vector):
    matrix, b = matrix_with_spectrum(torch.logspace(-4, 0, 60)), vector(60)
    single, double = (
        multishift_cg(counted(matrix.to(dtype)), b.to(dtype), [1e-3], tol=1e-4)[0]
        for dtype in (torch.float32, torch.float64)
    )
    assert single.solution.dtype == torch.float32
    assert single.lower_bounds == pytest.approx(double.lower_bounds[: single.iterations], rel=1e-4)


def test_result_scales_with_the_right_hand_side(matrix_with_spectrum, vector):
    matrix, b = matrix_with_spectrum(torch.linspace(0.1, 1, 30), dtype=torch.float32), vector(30, dtype=torch.float32)
    one = multishift_cg(counted(matrix), b, [0.01])[0]
    tiny = multishift_cg(counted(matrix * 1e-20), b * 1e-30, [1e-22])[0]
    assert tiny.norm == pytest.approx(one.norm * 1e-10, rel=1e-4)


@pytest.mark.parametrize("method", ["classic", "multishift"])
def test_bad_arguments_are_refused(method, operator_with_spectrum, vector):
    operator = operator_with_spectrum(torch.ones(4))
    with pytest.raises(ConfigError, match=">= 0"):
        solve_one(method, operator, vector(4), -0.1)
    with pytest.raises(ConfigError, match="tol must be positive"):
        solve_one(method, operator, vector(4), tol=0.0)
    with pytest.raises(ConfigError, match="at least 1"):
        solve_one(method, operator, vector(4), max_products=0)
    with pytest.raises(ConfigError, match=r"\(4,\)"):
        solve_one(method, operator, vector(5))
    with pytest.raises(DataError, match="NaN or Inf"):
        solve_one(method, operator, vector(4) / 0)
    with pytest.raises(ConfigError, match="one or more"):
        multishift_cg(operator, vector(4), [])


@pytest.mark.parametrize("method", ["classic", "multishift"])
def test_nan_in_a_later_product_is_named(method, matrix_with_spectrum, vector):
    matrix = matrix_with_spectrum(torch.linspace(0.1, 1, 20))
    calls = itertools.count(1)
    operator = FunctionOperator(
        lambda v: matrix @ v * (float("nan") if next(calls) == 4 else 1), 20, torch.float64, positive_semidefinite=True
    )
    with pytest.raises(ConvergenceError, match=r"product 4 .* returned NaN or Inf"):
        solve_one(method, operator, vector(20))


spectra = st.lists(st.floats(0.0, 100.0).map(lambda x: 0.0 if x < 1e-3 else x), min_size=1, max_size=25).filter(
    lambda values: max(values) > 0
)


@settings(max_examples=60, deadline=None)
@given(spectrum=spectra, damping=st.sampled_from([0.0, 1e-2, 1.0]), seed=st.integers(0, 1000))
def test_any_positive_semidefinite_spectrum(spectrum, damping, seed):
    """Bounds grow and hold, the residual is the true one, the converged solution is the (pseudo-inverse) solution."""
    diagonal = torch.tensor(spectrum, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    b = diagonal * torch.randn(len(diagonal), generator=generator, dtype=torch.float64)
    denominator = diagonal + damping
    expected = torch.where(denominator > 0, b / denominator.clamp(min=1e-300), torch.zeros_like(b))
    truth = expected.norm().item()
    for method in ("classic", "multishift"):
        result = solve_one(method, diagonal_operator(diagonal), b, damping, tol=1e-8, max_products=200)
        bounds = result.lower_bounds
        assert all(a <= b for a, b in itertools.pairwise(bounds))
        # The classic recurrence loses orthogonality near the end: its bounds hold up to the error left in x.
        condition = (denominator.max() / denominator[denominator > 0].min()).item()
        excess = 1e-9 if method == "multishift" else 1e-8 * condition
        assert all(bound <= truth * (1 + excess) for bound in bounds)
        true = (b - denominator * result.solution).norm().item()
        assert true <= max(3 * result.residual, 1e-12) * b.norm().item()
        assert result.converged
        np.testing.assert_allclose(result.solution, expected, atol=1e-4 * truth)


def test_identity_matrix_is_solved_in_one_product(vector):
    operator = MatrixOperator(torch.eye(10, dtype=torch.float64) * 4, positive_semidefinite=True)
    for result in multishift_cg(operator, vector(10), [0.0, 4.0]):
        assert result.products == result.iterations == 1
        torch.testing.assert_close(result.solution, vector(10) / (4 + result.damping))
