"""Multi-shift conjugate gradients: one Krylov run solves (A + s I) x = b for any number of dampings s."""

import math
from collections.abc import Sequence

import numpy as np
from scipy.linalg import eigvalsh_tridiagonal
from torch import Tensor

from lmleak.linops.base import LinearOperator
from lmleak.linops.lanczos import (
    Krylov,
    radau_rule,
    refuse_negative_curvature,
    solve_tridiagonal,
    spectrum_edge,
)
from lmleak.linops.solve import RESOLUTION, SolveResult, StopReason, checked_settings


def multishift_cg(
    operator: LinearOperator,
    b: Tensor,
    dampings: Sequence[float],
    *,
    tol: float = 1e-6,
    max_products: int = 500,
) -> list[SolveResult]:
    """Solve (A + s I) x = b for every damping s from one Krylov run.

    x_k(s) = ||b|| V_k^T y, (T_k + s I) y = e_1: the CG iterate, since shifting A shifts T and leaves V alone. The run
    ends when every damping meets ``tol``. A singular A with damping 0 is solved in its range when b lies there
    (pseudo-inverse); the run ends by itself when the range is exhausted. Stores V, k n numbers: where that is too
    much, ``conjugate_gradient`` stores four vectors. Refuses what ``lanczos`` refuses, with the same errors.

    ``upper_bound`` is a Gauss-Radau rule of the run for (x + s)^-2 with its node just below the spectrum (Golub and
    Meurant 2010): with the last of ``lower_bounds`` it encloses the norm at any length of the run, in exact arithmetic
    without condition, else up to a relative epsilon ||A|| / s. It is infinite where the dtype does not tell s from
    zero.

    The residual is that of the Lanczos relation, |beta_k y_k|, never below the rounding epsilon ||A|| ||y||, of whose
    order a recomputed one is.

    Args:
        operator: A, tagged positive semidefinite, (n, n).
        b: (n,) right-hand side.
        dampings: The shifts s >= 0, in the units of A.
        tol: Relative residual to reach.
        max_products: Most products to spend.

    Returns:
        One result per damping, in the order given.
    """
    krylov = multishift_krylov(operator, b, dampings, tol=tol, max_products=max_products)
    return krylov_solve(krylov, dampings, tol=tol)


def multishift_krylov(
    operator: LinearOperator,
    b: Tensor,
    dampings: Sequence[float],
    *,
    tol: float = 1e-6,
    max_products: int = 500,
) -> Krylov:
    """Return the run behind ``multishift_cg``, long enough for these dampings; ``krylov_solve`` reads more from it.

    Args:
        operator: A, tagged positive semidefinite, (n, n).
        b: (n,) right-hand side.
        dampings: The shifts s >= 0 that decide when to stop.
        tol: Relative residual to reach for each.
        max_products: Most products to spend.

    Returns:
        The Krylov run started at b. Errors as in ``multishift_cg``.
    """
    krylov = Krylov(operator, b)
    extend_krylov(krylov, dampings, tol=tol, max_products=max_products)
    return krylov


def extend_krylov(
    krylov: Krylov, dampings: Sequence[float], *, tol: float = 1e-6, width: float = math.inf, max_products: int = 500
) -> int:
    """Continue a run until it is long enough for these dampings.

    Args:
        krylov: A run started at b, of any length.
        dampings: The shifts s >= 0 that decide when to stop.
        tol: Relative residual to reach for each.
        width: Relative width to reach of the interval from ||x|| to ``upper_bound`` as well, where that is finite. A
            small residual does not make it narrow: at a damping of 1e-6 ||A|| one of 1e-3 left norms 2 % short. Where
            it is infinite the residual decides when to stop.
        max_products: Most products of the run, those already spent included.

    Returns:
        After how many products it was long enough, or its dimension if it is not. Errors as in ``multishift_cg``.
    """
    unfinished = [_IterateNorms(shift) for shift in checked_settings(dampings, tol, max_products)]

    def solved(run: Krylov) -> bool:
        smallest = run.smallest_ritz_value()
        refuse_negative_curvature(smallest, run.operator, run.scale)
        alpha, beta_before = run.alpha[-1], (run.beta[-1] if run.dimension > 1 else 0.0)
        for norms in list(unfinished):
            resolved = smallest + norms.damping >= _floor(run)
            if resolved:
                norms.step(alpha, beta_before)
            if not resolved or (run.beta_last * abs(norms.last_component) <= tol and norms.enclosed(run, width)):
                unfinished.remove(norms)
        return not unfinished

    for products in range(1, min(krylov.dimension, max_products) + 1):
        if solved(krylov.after(products)):
            return products
    krylov.extend(max_products - krylov.dimension, solved)
    return min(krylov.dimension, max_products)


def krylov_solve(
    krylov: Krylov, dampings: Sequence[float], *, tol: float = 1e-6, width: float = math.inf
) -> list[SolveResult]:
    """Read the solutions for more dampings from a finished run, without a product.

    Args:
        krylov: A run that started from b.
        dampings: The shifts s >= 0.
        tol: Relative residual below which a result counts as converged.
        width: As in ``extend_krylov``: what else a converged result must meet, where its interval is finite.

    Returns:
        One result per damping, as ``multishift_cg`` gives; ``converged`` is False where the run is too short.
    """
    shifts = checked_settings(dampings, tol, 1)
    alpha, betas = krylov.alpha, krylov.betas
    if krylov.dimension:
        refuse_negative_curvature(krylov.smallest_ritz_value(), krylov.operator, krylov.scale)
    steps = [_resolved_steps(krylov, alpha, betas, shift) for shift in shifts]
    coefficients = np.zeros((max(steps), len(shifts)))
    for column, (shift, k) in enumerate(zip(shifts, steps, strict=True)):
        if k:
            unit = np.eye(1, k)[0]
            coefficients[:k, column] = krylov.start_norm * solve_tridiagonal(alpha[:k] + shift, betas[: k - 1], unit)
    solutions = krylov.combine(coefficients).T  # (S, n)
    return [
        _read(krylov, alpha[:k], betas[:k], shift, solution.clone(), tol, width)
        for shift, k, solution in zip(shifts, steps, solutions, strict=True)
    ]


class _IterateNorms:
    """||x_k|| / ||b|| of CG on A + s I for k = 1, 2, ..., from T alone: a few operations per step.

    With T + s I = L D L^T (unit lower bidiagonal L, pivots d) and W = V^T L^-T, x_k = x_{k-1} + zeta_k w_k. Because
    x_{k-1} is orthogonal to v_k, the product <x_{k-1}, w_k> = -l_{k-1} <x_{k-1}, w_{k-1}> has the sign of zeta_k:
    every term added to ||x_k||^2 is positive, so the norms grow in floating point as they do on paper.
    """

    def __init__(self, damping: float):
        self.damping = damping
        self.norms: list[float] = []
        self.last_component = math.inf  # zeta_k = y_k; the residual is beta_k |y_k|

    def step(self, alpha: float, beta_before: float) -> None:
        """Add row k of T: its diagonal entry and the off-diagonal entry before it."""
        if not self.norms:
            self._pivot, self._forward = alpha + self.damping, 1.0
            self._direction_squared, cross, squared = 1.0, 0.0, 0.0
        else:
            multiplier = beta_before / self._pivot
            self._pivot = alpha + self.damping - beta_before * multiplier
            self._forward *= -multiplier
            self._direction_squared = 1.0 + multiplier**2 * self._direction_squared  # <w_k, w_k>
            cross, squared = -multiplier * self._overlap, self.norms[-1] ** 2
        zeta = self._forward / self._pivot
        self._overlap = cross + zeta * self._direction_squared  # <x_k, w_k>
        gained = zeta * cross + zeta * self._overlap  # ||x_k||^2 - ||x_{k-1}||^2 >= 0
        self.norms.append(max(math.sqrt(squared + gained), self.norms[-1] if self.norms else 0.0))
        self.last_component = zeta

    def enclosed(self, krylov: Krylov, width: float) -> bool:
        """Return whether the last norm and the upper bound, where there is one, agree to a relative width."""
        if width == math.inf:
            return True
        upper = _radau_norm(krylov, krylov.alpha, krylov.betas, self.damping)
        return upper == math.inf or upper <= (1 + width) * self.norms[-1]


def _resolved_steps(krylov: Krylov, alpha: np.ndarray, betas: np.ndarray, shift: float) -> int:
    """Return the largest k at which the smallest eigenvalue of T_k + s I stands above rounding.

    It falls with k (the Ritz values of T_k and T_{k+1} interlace), so the largest k is found by bisection.
    """
    resolved = lambda k: (
        eigvalsh_tridiagonal(alpha[:k], betas[: k - 1], select="i", select_range=(0, 0))[0] + shift >= _floor(krylov)
    )
    good, bad = 0, krylov.dimension + 1
    if krylov.dimension and resolved(krylov.dimension):
        good = krylov.dimension
    else:
        bad = krylov.dimension
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if resolved(middle) else (good, middle)
    return good


def _floor(krylov: Krylov) -> float:
    """Return the smallest eigenvalue of A + s I that is told from zero; positive also for A = 0."""
    return max(RESOLUTION * krylov.rounding, float(np.finfo(float).tiny))


def _read(
    krylov: Krylov, alpha: np.ndarray, betas: np.ndarray, shift: float, solution: Tensor, tol: float, width: float
) -> SolveResult:
    """Assemble the result of one damping at dimension k = len(alpha)."""
    if krylov.start_norm == 0:
        return SolveResult(solution, 0.0, 0.0, 0, 0, True, (), shift, StopReason.TOLERANCE, 0.0)
    run = _IterateNorms(shift)
    for row, diagonal in enumerate(alpha):
        run.step(float(diagonal), float(betas[row - 1]) if row else 0.0)
    lanczos_residual = float(betas[-1]) * abs(run.last_component) if len(alpha) else 1.0
    residual = max(lanczos_residual, krylov.rounding * run.norms[-1]) if len(alpha) else 1.0
    bounds = tuple(krylov.start_norm * norm for norm in run.norms)
    upper = max(krylov.start_norm * _radau_norm(krylov, alpha, betas, shift), bounds[-1] if bounds else 0.0)
    enclosed = upper == math.inf or upper <= (1 + width) * bounds[-1]
    if residual <= tol and enclosed:
        stopped = StopReason.TOLERANCE
    elif len(alpha) < krylov.dimension or (lanczos_residual <= tol and enclosed):
        stopped = StopReason.PRECISION
    else:
        stopped = StopReason.MAX_PRODUCTS
    return SolveResult(
        solution=solution,
        norm=bounds[-1] if bounds else 0.0,
        residual=residual,
        iterations=len(bounds),
        products=krylov.dimension,
        converged=residual <= tol and enclosed,
        lower_bounds=bounds,
        damping=shift,
        stopped=stopped,
        upper_bound=upper,
    )


def _radau_norm(krylov: Krylov, alpha: np.ndarray, betas: np.ndarray, shift: float) -> float:
    """Return an upper bound of ||(A + s I)^-1 b|| / ||b||: the square root of the Gauss-Radau rule for (x + s)^-2."""
    k = len(alpha)
    if not k:
        return math.inf
    smallest = eigvalsh_tridiagonal(alpha, betas[:-1], select="i", select_range=(0, 0))[0]
    if betas[-1] == 0:  # nothing is left to be seen
        diagonal, beside, lowest = alpha, betas[:-1], smallest
    else:
        lowest = spectrum_edge(krylov, smallest)
        diagonal, beside = radau_rule(alpha, betas[:-1], betas[-1], lowest)
    if lowest + shift < _floor(krylov):
        return math.inf
    return float(np.linalg.norm(solve_tridiagonal(diagonal + shift, beside, np.eye(1, len(diagonal))[0])))
