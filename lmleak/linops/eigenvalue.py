"""The largest eigenvalue, from below by a Ritz value and from above with a stated probability."""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.special import betaincinv, erfinv
from torch import Tensor

from lmleak.errors import ConfigError
from lmleak.linops.base import LinearOperator
from lmleak.linops.lanczos import Krylov, check_products, random_start, refuse_negative_curvature


@dataclass(frozen=True)
class EigenvalueResult:
    """lambda_max of a positive semidefinite operator, in the operator's units."""

    value: float
    """Ritz value theta <= lambda_max, always. A norm divided by it is no lower bound; divide by ``upper``."""
    residual: float
    """||A u - theta u|| = |beta_k s_k|: some eigenvalue, not necessarily the largest, lies this near to theta."""
    upper: float
    """lambda_max <= upper, except with probability ``failure_probability`` over the random start."""
    failure_probability: float
    """Of ``upper`` only."""
    iterations: int
    """Products spent."""
    converged: bool
    """upper <= (1 + tol) * value: both sides agree."""
    vector: Tensor
    """(n,) unit Ritz vector u."""


def top_eigenvalue(
    operator: LinearOperator,
    *,
    generator: torch.Generator,
    tol: float = 1e-3,
    max_products: int = 200,
    failure_probability: float = 1e-3,
) -> EigenvalueResult:
    """Bracket lambda_max(A): theta <= lambda_max <= upper, by Lanczos from a Gaussian random start.

    Let c = cos(start, top eigenvector). For a start uniform in direction c^2 is a Beta(1/2, (n-1)/2) variable; delta^2
    is its quantile at ``failure_probability``. On the one event |c| > delta two bounds hold, at every k at once, so
    stopping when they are good enough costs no probability:

    (1) theta >= (1 - eps) lambda_max with eps = tanh^2(arccosh(1 / delta) / (2 k - 1)), that is
        lambda_max <= theta * cosh^2(arccosh(1 / delta) / (2 k - 1)).
        If theta <= (1 - eps) lambda_max, the Rayleigh quotient of p(A) b with p(x) = T_{2k-1}(t) / t,
        t^2 = 1 - x / ((1 - eps) lambda_max), T the Chebyshev polynomial, forces |c| <= delta. This is the bound
        of Kuczynski and Wozniakowski, Estimating the largest eigenvalue by the power and Lanczos algorithms with a
        random start, SIAM J. Matrix Anal. Appl. 13(4), 1992: P(failure) <= 1.648 sqrt(n) exp(-sqrt(eps) (2 k - 1)).
        We put the exact Beta quantile in place of their constant and tanh in place of its linear term, which is
        never weaker and is finite for every k.
    (2) v_{k+1} = q(A) v_1 has unit length, so |q(lambda_max)| <= 1 / delta for the Lanczos polynomial
        q(x) = prod_j (x - theta_j) / beta_j; the largest root of q(x) = 1 / delta bounds lambda_max (van Dorsselaer,
        Hochstenbach and van der Vorst, Computing probabilistic bounds for extreme eigenvalues of symmetric matrices
        with the Lanczos method, SIAM J. Matrix Anal. Appl. 22(3), 2000). It converges as fast as theta does.

    ``upper`` is the smaller one plus ten roundings of the dtype. When the space is exhausted, a random start has seen
    every eigenvalue (with probability one) and ``upper`` is theta plus its residual and that rounding. A product that
    is not finite, or an A that shows itself not symmetric or not positive semidefinite, is a ConvergenceError.

    Args:
        operator: A, tagged positive semidefinite, (n, n).
        generator: Draws the start.
        tol: Relative width of the bracket at which to stop.
        max_products: Most products to spend.
        failure_probability: Probability that ``upper`` is allowed to be wrong.

    Returns:
        The bracket; ``converged`` says whether it reached ``tol``.

    Raises:
        ConfigError: If the operator is not tagged or an argument is out of range.
    """
    _check(failure_probability, tol, max_products)
    krylov = Krylov(operator, random_start(operator, generator))
    if operator.shape[0] == 0:
        raise ConfigError(f"{operator!r} has no rows: there is no eigenvalue.")
    cosine = math.sqrt(betaincinv(0.5, (operator.shape[0] - 1) / 2, failure_probability))
    return _bracket(krylov, lambda theta: cosine, tol, max_products, failure_probability)


def top_eigenvalue_from_image(
    krylov: Krylov,
    *,
    scale: float = 1.0,
    tol: float = 1e-3,
    max_products: int = 200,
    failure_probability: float = 1e-3,
) -> EigenvalueResult:
    """Bracket lambda_max(J J^T) in a run that starts from b = scale * J z, z ~ N(0, I), and may go on afterwards.

    As ``top_eigenvalue``, on another event: the part of b along the top eigenvector u is scale sqrt(lambda_max) zeta
    with zeta ~ N(0, 1), and |zeta| exceeds its quantile at ``failure_probability``. Hence |cos(b, u)| > delta with
    delta = scale sqrt(theta) quantile / ||b||, theta being at most lambda_max. A run that serves to solve for J z so
    brackets the eigenvalue as well. b = 0 means J = 0 (with probability one), and a bracket of zero.

    Args:
        krylov: The run, of any length; it is continued.
        scale: Of b.
        tol: Relative width of the bracket at which to stop.
        max_products: Most products of the run, those already spent included.
        failure_probability: Probability, over z, that ``upper`` is allowed to be wrong.

    Returns:
        The bracket. Errors as of ``top_eigenvalue``.
    """
    _check(failure_probability, tol, max_products)
    if krylov.start_norm == 0:
        nowhere = torch.zeros(krylov.operator.shape[0], dtype=krylov.operator.dtype, device=krylov.operator.device)
        return EigenvalueResult(0.0, 0.0, 0.0, failure_probability, 0, True, nowhere)
    quantile = math.sqrt(2) * erfinv(failure_probability)
    cosine = lambda theta: min(1.0, scale * math.sqrt(max(theta, sys.float_info.min)) * quantile / krylov.start_norm)
    return _bracket(krylov, cosine, tol, max_products, failure_probability)


def _check(failure_probability: float, tol: float, max_products: int) -> None:
    if not 0 < failure_probability < 1:
        raise ConfigError(f"failure_probability must lie in (0, 1), got {failure_probability}. The default is 1e-3.")
    if not tol > 0:
        raise ConfigError(f"tol must be positive, got {tol}.")
    check_products(max_products)


def _bracket(
    krylov: Krylov, cosine: Callable[[float], float], tol: float, max_products: int, failure_probability: float
) -> EigenvalueResult:
    """Continue a run until its bracket is narrow; ``cosine`` returns delta for a theta."""
    check_at = 1

    def is_narrow(krylov: Krylov) -> bool:
        nonlocal check_at
        if krylov.dimension < check_at:
            return False
        check_at = krylov.dimension + max(1, krylov.dimension // 32)  # the eigenproblem of T costs k^2
        values = krylov.ritz_values()
        return _upper_bound(krylov, values, 0.0, cosine(values[-1])) <= (1 + tol) * values[-1]

    if krylov.dimension == 0 or not is_narrow(krylov):
        krylov.extend(max_products - krylov.dimension, is_narrow)
    values, vectors = krylov.ritz_pairs()
    refuse_negative_curvature(values[0], krylov.operator, krylov.scale)
    value = max(float(values[-1]), 0.0)
    residual = abs(krylov.beta_last * float(vectors[-1, -1]))
    upper = max(value, _upper_bound(krylov, values, residual, cosine(values[-1])))
    return EigenvalueResult(
        value=value,
        residual=residual,
        upper=upper,
        failure_probability=failure_probability,
        iterations=krylov.dimension,
        converged=upper <= (1 + tol) * value,
        vector=krylov.combine(vectors[:, -1]),
    )


def _upper_bound(krylov: Krylov, values: np.ndarray, residual: float, cosine: float) -> float:
    """Return the bound of ``top_eigenvalue`` from the Ritz values (k,), ascending."""
    rounding = 10 * krylov.rounding
    if krylov.exhausted:
        return float(values[-1]) + residual + rounding
    chebyshev = float(values[-1]) * math.cosh(math.acosh(1 / cosine) / (2 * krylov.dimension - 1)) ** 2
    betas = np.append(krylov.beta, krylov.beta_last)
    return min(chebyshev, _lanczos_polynomial_root(values, betas, cosine)) + rounding


def _lanczos_polynomial_root(values: np.ndarray, betas: np.ndarray, cosine: float) -> float:
    """Return the largest x with prod_j (x - values_j) / betas_j = 1 / cosine.

    Solved for log(x - values[-1]), in which the logarithm of the left side is increasing and does not overflow.
    """
    below_top = values[-1] - values
    target = np.log(betas).sum() - math.log(cosine)
    excess = lambda log_gap: np.log(below_top + math.exp(log_gap)).sum() - target
    high = target / len(values)  # every factor is at least x - values[-1]
    low = target - (len(values) - 1) * math.log(below_top[0] + math.exp(high))  # and at most x - values[0]
    low = max(low, -700.0)  # exp(-700) is the smallest gap that a float holds
    if excess(high) <= 0 or low >= high:  # all Ritz values equal: rounding decides the sign
        return float(values[-1]) + math.exp(high)
    if excess(low) >= 0:
        return float(values[-1]) + math.exp(low)
    return float(values[-1]) + math.exp(brentq(excess, low, high, xtol=1e-6))
