import math

import numpy as np
import pytest
import torch
from scipy.special import betaincinv

from lmleak.errors import ConfigError, ConvergenceError, DataError
from lmleak.linops import (
    FunctionOperator,
    Krylov,
    MatrixOperator,
    extend_krylov,
    krylov_solve,
    lanczos,
    multishift_krylov,
    random_start,
    top_eigenvalue,
    top_eigenvalue_from_image,
)


def tridiagonal(krylov):
    return torch.from_numpy(np.diag(krylov.alpha) + np.diag(krylov.beta, 1) + np.diag(krylov.beta, -1))


SPECTRA = {
    "uniform": torch.linspace(0.1, 1, 60),
    "condition 1e12": torch.logspace(-12, 0, 60),
    "clustered": torch.cat([torch.full((30,), 1.0), torch.linspace(1.5, 2, 30)]),
    "outlier": torch.cat([torch.linspace(0, 1, 59), torch.tensor([1e4])]),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_basis_is_orthonormal_and_the_lanczos_relation_holds(name, operator_with_spectrum, vector):
    operator = operator_with_spectrum(SPECTRA[name])
    krylov = lanczos(operator, vector(60), max_products=40)
    k, basis = krylov.dimension, krylov.basis
    assert k == 40 or krylov.exhausted
    assert (basis @ basis.T - torch.eye(k, dtype=torch.float64)).abs().max() < 1e-12
    rest = operator @ basis.T - basis.T @ tridiagonal(krylov)
    if not krylov.exhausted:
        rest[:, -1] -= krylov.beta_last * krylov.next_vector
        assert (basis @ krylov.next_vector).abs().max() < 1e-12
    assert rest.abs().max() < 1e-13 * operator.matrix.abs().max() * 60
    torch.testing.assert_close(krylov.start_norm * basis[0], vector(60))


def test_extending_equals_one_long_run(operator_with_spectrum, vector):
    operator = operator_with_spectrum(torch.linspace(0, 1, 90))
    whole = lanczos(operator, vector(90), max_products=50)
    parts = lanczos(operator, vector(90), max_products=3).extend(1).extend(40).extend(6)
    assert whole.dimension == parts.dimension == 50
    assert np.array_equal(whole.alpha, parts.alpha)
    assert np.array_equal(whole.beta, parts.beta)
    assert torch.equal(whole.basis, parts.basis)


def test_stop_ends_the_run_and_products_are_counted(matrix_with_spectrum, vector):
    matrix = matrix_with_spectrum(torch.linspace(0, 1, 30))
    operator = FunctionOperator(lambda v: matrix @ v, 30, torch.float64, positive_semidefinite=True)
    krylov = lanczos(operator, vector(30), max_products=20, stop=lambda run: run.dimension == 7)
    assert krylov.dimension == operator.products == 7


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rank", [1, 2, 7, 30])
def test_low_rank_exhausts_the_space(rank, dtype, operator_with_spectrum, vector):
    spectrum = torch.zeros(80, dtype=torch.float64)
    spectrum[:rank] = torch.linspace(0.5, 1, rank, dtype=torch.float64)
    diagonal = spectrum.to(dtype)
    operator = FunctionOperator(lambda v: diagonal * v, 80, dtype, positive_semidefinite=True)
    start = vector(80, dtype=dtype)
    krylov = lanczos(operator, operator.matvec(start), max_products=79)
    assert krylov.exhausted
    assert krylov.dimension == rank
    assert krylov.beta_last == 0
    assert krylov.next_vector is None
    rtol = 1e-12 if dtype == torch.float64 else 1e-5
    np.testing.assert_allclose(krylov.ritz_values(), spectrum[:rank].numpy(), rtol=rtol)
    assert krylov.extend(5).dimension == rank
    # A start outside the range adds the null space as one eigenvector. A rotated basis leaves the range by a rounding
    # per product, and those roundings may add a few directions of noise before the end is seen.
    rotated = operator_with_spectrum(spectrum, dtype=dtype)
    for extra, run in (
        (1, lanczos(operator, start, max_products=79)),
        (0, lanczos(rotated, rotated.matvec(start), max_products=79)),
    ):
        assert run.exhausted
        assert rank + extra <= run.dimension <= rank + extra + 4
        np.testing.assert_allclose(run.ritz_values()[-rank:], spectrum[:rank].numpy(), rtol=10 * rtol)
        assert abs(run.ritz_values()[:-rank]).max(initial=0) < rtol


def test_full_space_gives_the_whole_spectrum(operator_with_spectrum, vector):
    spectrum = torch.logspace(-4, 0, 25, dtype=torch.float64)
    krylov = lanczos(operator_with_spectrum(spectrum), vector(25), max_products=100)
    assert krylov.dimension == 25
    assert krylov.exhausted
    np.testing.assert_allclose(krylov.ritz_values(), spectrum.numpy(), rtol=1e-9)


def test_an_operator_that_returns_its_input_is_not_overwritten(vector):
    identity = FunctionOperator(lambda v: v, 6, torch.float64, positive_semidefinite=True)
    start = vector(6)
    kept = start.clone()
    krylov = lanczos(identity, start, max_products=6)
    assert krylov.dimension == 1
    torch.testing.assert_close(krylov.basis[0], kept / kept.norm())
    assert torch.equal(start, kept)


def test_zero_start_and_zero_operator(vector):
    zero = MatrixOperator(torch.zeros(5, 5, dtype=torch.float64), positive_semidefinite=True)
    assert lanczos(zero, torch.zeros(5, dtype=torch.float64), max_products=3).dimension == 0
    krylov = lanczos(zero, vector(5), max_products=3)
    assert (krylov.dimension, krylov.exhausted) == (1, True)
    result = top_eigenvalue(zero, generator=torch.Generator().manual_seed(0))
    assert (result.value, result.upper, result.converged) == (0.0, 0.0, True)


def test_bad_arguments_are_refused(operator_with_spectrum, vector):
    operator = operator_with_spectrum(torch.ones(4))
    with pytest.raises(ConfigError, match=r"shape \(4,\)"):
        lanczos(operator, vector(5), max_products=2)
    with pytest.raises(ConfigError, match="at least 1"):
        lanczos(operator, vector(4), max_products=0)
    with pytest.raises(DataError, match="NaN or Inf"):
        lanczos(operator, vector(4) * math.nan, max_products=2)
    with pytest.raises(ConfigError, match=r"torch.Generator\(\).manual_seed"):
        random_start(operator, 0)
    with pytest.raises(ConfigError, match="Available: gaussian"):
        random_start(operator, torch.Generator(), "normal")
    with pytest.raises(ConfigError, match="failure_probability"):
        top_eigenvalue(operator, generator=torch.Generator(), failure_probability=0)


def test_an_operator_that_is_not_symmetric_is_named(vector):
    matrix = torch.triu(torch.ones(6, 6, dtype=torch.float64))
    operator = FunctionOperator(lambda v: matrix @ v, 6, torch.float64, positive_semidefinite=True)
    with pytest.raises(ConvergenceError, match="not symmetric"):
        lanczos(operator, vector(6), max_products=6)


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher", "sphere"])
def test_random_start_is_isotropic_and_the_same_in_every_dtype(distribution, operator_with_spectrum):
    generator = torch.Generator().manual_seed(3)
    operator = operator_with_spectrum(torch.ones(3))
    draws = torch.stack([random_start(operator, generator, distribution) for _ in range(4000)])
    covariance = draws.T @ draws / len(draws)
    assert (covariance - torch.eye(3, dtype=torch.float64)).abs().max() < 0.1
    double, single = (
        random_start(
            operator_with_spectrum(torch.ones(3), dtype=dtype), torch.Generator().manual_seed(1), distribution
        )
        for dtype in (torch.float64, torch.float32)
    )
    assert torch.equal(double.float(), single)


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_top_eigenvalue_brackets_the_truth(name, dtype, operator_with_spectrum):
    operator = operator_with_spectrum(SPECTRA[name], dtype=dtype)
    truth = torch.linalg.eigvalsh(operator.matrix.double())[-1].item()
    result = top_eigenvalue(operator, generator=torch.Generator().manual_seed(0), tol=1e-4)
    assert result.converged
    assert result.value <= truth * (1 + 1e-6 if dtype == torch.float32 else 1 + 1e-14)
    assert truth <= result.upper <= truth * (1 + 1.1e-4)
    assert result.vector.dtype == dtype
    assert result.vector.norm().item() == pytest.approx(1, abs=1e-5)
    residual = (operator.matvec(result.vector) - result.value * result.vector).norm().item()
    assert residual == pytest.approx(result.residual, abs=(1e-5 if dtype == torch.float32 else 1e-13) * truth)
    assert result.iterations < 60


@pytest.mark.parametrize("steps", [1, 2, 3, 6])
def test_upper_fails_as_often_as_it_says_or_less(steps, vector):
    """Hard spectrum (one isolated top eigenvalue just above a bulk) and a large allowed failure probability."""
    diagonal = torch.cat([torch.linspace(0, 1, 199, dtype=torch.float64), torch.tensor([1.5], dtype=torch.float64)])
    operator = FunctionOperator(lambda v: diagonal * v, 200, torch.float64, positive_semidefinite=True)
    generator = torch.Generator().manual_seed(steps)
    trials, allowed = 300, 0.1
    results = [
        top_eigenvalue(operator, generator=generator, max_products=steps, tol=1e-12, failure_probability=allowed)
        for _ in range(trials)
    ]
    failures = sum(result.upper < 1.5 for result in results)
    slack = 3 * math.sqrt(trials * allowed * (1 - allowed))
    assert failures <= trials * allowed + slack
    assert all(result.value <= 1.5 + 1e-12 for result in results)
    assert not any(result.converged for result in results)
    assert any(result.upper > result.value * 1.01 for result in results)
    strict = [
        top_eigenvalue(operator, generator=generator, max_products=steps, tol=1e-12).upper for _ in range(trials)
    ]
    assert sum(upper < 1.5 for upper in strict) <= 3  # 300 trials at 1e-3: more than 3 has probability 3e-4


def test_the_chance_statement_is_tight_where_it_can_be():
    """One product with A = e1 e1^T + tiny: theta = c^2, so ``upper`` fails exactly when |c| <= delta."""
    diagonal = torch.full((50,), 1e-9, dtype=torch.float64)
    diagonal[0] = 1.0
    operator = FunctionOperator(lambda v: diagonal * v, 50, torch.float64, positive_semidefinite=True)
    generator = torch.Generator().manual_seed(0)
    failures = 0
    for _ in range(400):
        start = random_start(operator, torch.Generator().set_state(generator.get_state()))
        cosine = abs(start[0] / start.norm()).item()
        result = top_eigenvalue(operator, generator=generator, max_products=1, failure_probability=0.2)
        failed = result.upper < 1
        assert failed == (cosine < math.sqrt(betaincinv(0.5, 24.5, 0.2)))
        failures += failed
    assert 50 <= failures <= 110  # 80 expected, standard deviation 8


def test_bound_is_never_weaker_than_kuczynski_wozniakowski():
    n, k, p = 1000, 12, 1e-3
    diagonal = torch.linspace(0, 1, n, dtype=torch.float64)
    operator = FunctionOperator(lambda v: diagonal * v, n, torch.float64, positive_semidefinite=True)
    result = top_eigenvalue(operator, generator=torch.Generator().manual_seed(0), max_products=k, tol=1e-9)
    eps = (math.log(1.648 * math.sqrt(n) / p) / (2 * k - 1)) ** 2
    assert 0 < eps < 1
    assert 1 <= result.upper <= result.value / (1 - eps)


def test_top_eigenvalue_on_an_exhausted_space(operator_with_spectrum):
    spectrum = torch.zeros(50)
    spectrum[:3] = torch.tensor([3.0, 2.0, 1.0])
    result = top_eigenvalue(operator_with_spectrum(spectrum), generator=torch.Generator().manual_seed(0), tol=1e-12)
    assert result.iterations == 4
    assert result.converged
    assert result.value == pytest.approx(3, abs=1e-13)
    assert 3 <= result.upper <= 3 * (1 + 1e-12)
    single = top_eigenvalue(operator_with_spectrum(torch.tensor([2.0])), generator=torch.Generator().manual_seed(0))
    assert (single.value, single.converged) == (2.0, True)


def test_same_seed_same_numbers(operator_with_spectrum):
    operator = operator_with_spectrum(torch.linspace(0, 1, 40))
    run = lambda seed: top_eigenvalue(operator, generator=torch.Generator().manual_seed(seed), max_products=5)
    assert run(1).value == run(1).value
    assert run(1).value != run(2).value
    assert torch.equal(run(1).vector, run(1).vector)


def image_start(operator, generator):
    """J z for a square root J of A, and z ~ N(0, I)."""
    values, vectors = torch.linalg.eigh(operator.matrix.double())
    z = torch.randn(len(values), generator=generator, dtype=torch.float64)
    return (vectors @ (values.clamp(min=0).sqrt() * z)).to(operator.dtype)


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_run_from_an_image_brackets_the_truth(name, dtype, operator_with_spectrum):
    operator = operator_with_spectrum(SPECTRA[name], dtype=dtype)
    truth = torch.linalg.eigvalsh(operator.matrix.double())[-1].item()
    start = image_start(operator, torch.Generator().manual_seed(0))
    result = top_eigenvalue_from_image(Krylov(operator, start), tol=1e-4)
    assert result.converged
    assert truth <= result.upper <= truth * (1 + 1.1e-4)
    scaled = top_eigenvalue_from_image(Krylov(operator, 8 * start), scale=8, tol=1e-4)
    assert scaled.upper == result.upper  # powers of two: to the last bit


@pytest.mark.parametrize("steps", [1, 2, 3, 6])
def test_upper_from_an_image_fails_as_often_as_it_says_or_less(steps):
    diagonal = torch.cat([torch.linspace(0, 1, 199, dtype=torch.float64), torch.tensor([1.5], dtype=torch.float64)])
    operator = FunctionOperator(lambda v: diagonal * v, 200, torch.float64, positive_semidefinite=True)
    generator = torch.Generator().manual_seed(steps)

    def uppers(allowed, trials=300):
        starts = [diagonal.sqrt() * random_start(operator, generator) for _ in range(trials)]
        settings = {"max_products": steps, "tol": 1e-12, "failure_probability": allowed}
        return [top_eigenvalue_from_image(Krylov(operator, start), **settings).upper for start in starts]

    loose = uppers(0.1)
    assert sum(upper < 1.5 for upper in loose) <= 30 + 3 * math.sqrt(27)
    assert any(upper > 1.51 for upper in loose)
    assert sum(upper < 1.5 for upper in uppers(1e-3)) <= 3


def test_a_run_goes_on_where_the_bracket_left_it(operator_with_spectrum):
    operator = operator_with_spectrum(torch.logspace(-4, 0, 60))
    start = image_start(operator, torch.Generator().manual_seed(1))
    run, dampings = Krylov(operator, start), [1e-4, 1e-2]
    bracket = top_eigenvalue_from_image(run, tol=0.05)
    assert 0 < bracket.iterations == run.dimension < 60
    needed = extend_krylov(run, dampings, tol=1e-5)
    alone = multishift_krylov(operator, start, dampings, tol=1e-5)
    assert needed == run.dimension == alone.dimension > bracket.iterations
    for got, expected in zip(*(krylov_solve(k, dampings, tol=1e-5) for k in (run, alone)), strict=True):
        assert torch.equal(got.solution, expected.solution)
        assert got.converged
    less = extend_krylov(run, [1e-1], tol=1e-5)  # long enough already
    assert less == multishift_krylov(operator, start, [1e-1], tol=1e-5).dimension < run.dimension
    extend_krylov(run, [0.0], tol=1e-12, max_products=alone.dimension + 2)
    assert run.dimension == alone.dimension + 2


def test_an_image_that_is_zero_is_a_zero_operator():
    zero = MatrixOperator(torch.zeros(5, 5, dtype=torch.float64), positive_semidefinite=True)
    result = top_eigenvalue_from_image(Krylov(zero, torch.zeros(5, dtype=torch.float64)))
    assert (result.value, result.upper, result.converged, result.iterations) == (0.0, 0.0, True, 0)
    with pytest.raises(ConfigError, match="failure_probability"):
        top_eigenvalue_from_image(Krylov(zero, torch.zeros(5, dtype=torch.float64)), failure_probability=2)


def test_a_run_as_it_was_before(operator_with_spectrum, vector):
    operator = operator_with_spectrum(torch.logspace(-4, 0, 60))
    run, short = (lanczos(operator, vector(60), max_products=k) for k in (20, 8))
    earlier = run.after(8)
    assert (earlier.dimension, earlier.beta_last, earlier.scale) == (8, short.beta_last, short.scale)
    assert torch.equal(earlier.basis, short.basis)
    kept = run.basis.clone()
    earlier.extend(4)  # on its own: the longer run keeps its numbers
    assert torch.equal(earlier.basis, kept[:12])
    assert torch.equal(run.basis, kept)
    assert run.after(20).dimension == 20
    assert run.after(0).dimension == 0
    with pytest.raises(ConfigError, match="20 products, not 21"):
        run.after(21)
