"""Solving (A + damping I) x = b by conjugate gradients, with every iterate's norm as a certified lower bound.

From x_0 = 0 the norms ||x_1|| < ||x_2|| < ... grow towards ||(A + damping I)^-1 b|| (Hestenes and Stiefel, Methods of
conjugate gradients for solving linear systems, J. Res. NBS 49(6), 1952; proof in Steihaug, SIAM J. Numer. Anal. 20(3),
1983, Theorem 2.1). So a run that is cut short still says "at least this much". As ||(A + damping I)^-1 b|| falls with
damping, it says so for every smaller damping too, down to the pseudo-inverse, for b in range(A).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from numbers import Real

import torch
from torch import Tensor

from lmleak.errors import ConfigError, ConvergenceError, DataError
from lmleak.linops.base import LinearOperator, require_positive_semidefinite
from lmleak.linops.lanczos import check_products, refuse_negative_curvature

# An eigenvalue of A + damping I below this many roundings of ||A|| cannot be told from zero in the vectors' dtype: the
# norms would follow rounding noise, so they stop there. At the edge noise moves a norm by 1/32 at most.
RESOLUTION = 32.0
_DRIFT = 0.99  # the recurrence aims a little below tol, so that the recomputed residual meets it


class StopReason(Enum):
    """Why a solver stopped; the value is the advice."""

    TOLERANCE = "the residual met the tolerance"
    MAX_PRODUCTS = "the products ran out: raise max_products, the damping or tol"
    PRECISION = "the dtype cannot resolve more: raise the damping or tol, or work in float64"


@dataclass(frozen=True)
class SolveResult:
    """x of (A + damping I) x = b, with what is known about its error."""

    solution: Tensor
    """(n,) x_k, in the operator's dtype, on its device."""
    norm: float
    """||x_k||, in units of b over A."""
    residual: float
    """||b - (A + damping I) x|| / ||b||; each solver says how it is measured."""
    iterations: int
    """k."""
    products: int
    """Products with A of the whole run; shared by all dampings of a multi-shift run."""
    converged: bool
    """residual <= tol."""
    lower_bounds: tuple[float, ...]
    """||x_1|| <= ... <= ||x_k||: each at most ||(A + damping I)^-1 b||, up to rounding; see the solver."""
    damping: float
    """The one that was used."""
    stopped: StopReason
    """Why the run ended here."""
    upper_bound: float = math.inf
    """||(A + damping I)^-1 b|| is at most this, up to rounding; multi-shift runs know it, other solvers do not."""

    def require_converged(self) -> "SolveResult":
        """Return itself, or raise ConvergenceError with the residual and the advice."""
        if not self.converged:
            raise ConvergenceError(
                f"no convergence in {self.iterations} iterations at damping {self.damping:.3e}: {self.stopped.value}",
                self.residual,
            )
        return self


def conjugate_gradient(
    operator: LinearOperator,
    b: Tensor,
    *,
    damping: float = 0.0,
    tol: float = 1e-6,
    max_products: int = 500,
) -> SolveResult:
    """Solve (A + damping I) x = b by the classic recurrence, in the memory of four vectors.

    For n too large to store a Krylov basis. Without reorthogonalisation rounding delays convergence (it takes more
    products than ``multishift_cg`` where A is ill-conditioned) and may dent the growth of ||x_k||; ``lower_bounds``
    holds the running maximum, a lower bound because the largest of several lower bounds is one. Near
    convergence they hold up to the error that is left in x (in float64 an excess of 4e-9 was seen at residual 7e-9),
    not to the last digit as those of ``multishift_cg`` do: take that one where the bound must be certified.

    The residual is recomputed from x at the end, by one product more than ``max_products`` allows for. ConfigError
    where the operator is not tagged or an argument is out of range.

    Args:
        operator: A, tagged positive semidefinite, (n, n).
        b: (n,) right-hand side; in range(A) when damping is 0.
        damping: Shift >= 0, in the units of A.
        tol: Relative residual to reach.
        max_products: Most iterations, one product each.

    Returns:
        The solution, with its recomputed residual.

    Raises:
        DataError: If b is not finite.
        ConvergenceError: If a product is not finite, or A shows itself not positive semidefinite.
    """
    require_positive_semidefinite(operator, "conjugate_gradient")
    (damping,) = checked_settings([damping], tol, max_products)
    b = b.detach()
    b_norm = _norm(b)
    if not math.isfinite(b_norm):
        raise DataError("b holds NaN or Inf (or its norm overflows); conjugate gradients need finite numbers.")
    x = torch.zeros_like(b)
    if b_norm == 0:
        return SolveResult(x, 0.0, 0.0, 0, 0, True, (), damping, StopReason.TOLERANCE)
    eps = torch.finfo(operator.dtype).eps
    residual, direction, residual_norm, scale = b, b, b_norm, 0.0
    bounds: list[float] = []
    stopped = StopReason.MAX_PRODUCTS
    products = 0
    while products < max_products and stopped is StopReason.MAX_PRODUCTS:
        product = operator.matvec(direction)
        products += 1
        length = _norm(direction)
        scale = max(scale, _norm(product) / length)
        rayleigh = torch.dot(direction.double(), product.double()).item() / length**2
        if not math.isfinite(scale + rayleigh):
            raise ConvergenceError(
                f"product {products} with {operator!r} returned NaN or Inf. "
                "Check the model and the loss at this input, or scale the problem.",
                residual_norm / b_norm,
            )
        refuse_negative_curvature(rayleigh, operator, scale)
        if rayleigh + damping <= RESOLUTION * eps * scale:
            stopped = StopReason.PRECISION
            break
        step = (residual_norm / length) ** 2 / (rayleigh + damping)
        x = x + step * direction
        residual = residual - step * (product + damping * direction)
        previous, residual_norm = residual_norm, _norm(residual)
        direction = residual + (residual_norm / previous) ** 2 * direction
        bounds.append(max(_norm(x), bounds[-1] if bounds else 0.0))
        if residual_norm <= _DRIFT * tol * b_norm:
            stopped = StopReason.TOLERANCE
    true_residual = _norm(b - operator.matvec(x) - damping * x) / b_norm
    if stopped is StopReason.TOLERANCE and true_residual > tol:
        stopped = StopReason.PRECISION
    return SolveResult(
        solution=x,
        norm=_norm(x),
        residual=true_residual,
        iterations=len(bounds),
        products=products + 1,
        converged=true_residual <= tol,
        lower_bounds=tuple(bounds),
        damping=damping,
        stopped=stopped,
    )


def checked_settings(dampings: Sequence[float], tol: float, max_products: int) -> list[float]:
    """Return the dampings as floats, or raise ConfigError for a setting that no solver can use."""
    dampings = list(dampings)
    if not dampings or not all(
        isinstance(d, Real) and not isinstance(d, bool) and 0 <= d < math.inf for d in dampings
    ):
        raise ConfigError(f"dampings must be one or more finite numbers >= 0, got {dampings}.")
    if not tol > 0:
        raise ConfigError(f"tol must be positive, got {tol}. A relative residual of 1e-6 is the default.")
    check_products(max_products)
    return [float(damping) for damping in dampings]


def _norm(vector: Tensor) -> float:
    """Return ||v||, accumulated in float64."""
    return torch.linalg.vector_norm(vector, dtype=torch.float64).item()
