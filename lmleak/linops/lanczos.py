"""The Lanczos process with full reorthogonalisation: one growing run that every solver reads.

After k products, A V^T = V^T T + beta_k v_{k+1} e_k^T with V (k, n) of orthonormal rows and T (k, k) tridiagonal:
diagonal alpha_1..alpha_k, off-diagonal beta_1..beta_{k-1}. V stays on the operator's device in its dtype; T is kept on
the CPU in float64.
"""

import math
from collections.abc import Callable
from copy import copy
from numbers import Integral

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal, eigvalsh_tridiagonal, solveh_banded
from torch import Tensor

from lmleak.errors import ConfigError, ConvergenceError, DataError
from lmleak.linops.base import LinearOperator, require_positive_semidefinite

_FIRST_CAPACITY = 32  # rows allocated at the start; doubled when full
_EXHAUSTED = 10.0  # a next vector shorter than this many roundings of ||A|| is noise


class Krylov:
    """A Lanczos run that can be continued: the space span{b, A b, ..., A^(k-1) b}.

    Full reorthogonalisation by two passes of classical Gram-Schmidt ("twice is enough": Parlett, The Symmetric
    Eigenvalue Problem, 1998, section 6.9), two matrix-vector products each; costs 8 k n operations and k n numbers of
    memory at dimension k, and one product of A per dimension. Build one with ``lanczos``.

    Args:
        operator: A, tagged positive semidefinite.
        start: b, (n,).

    Attributes:
        operator: A.
        start_norm: ||b||.
        exhausted: The space is invariant under A: a further product would bring nothing.

    Raises:
        ConfigError: If the operator is not tagged, or the start has the wrong shape or dtype.
        DataError: If the start is not finite.
    """

    def __init__(self, operator: LinearOperator, start: Tensor):
        require_positive_semidefinite(operator, "lanczos")
        size = operator.shape[0]
        if start.shape != (size,) or start.dtype != operator.dtype:
            raise ConfigError(
                f"start must be a flat vector of shape ({size},) in {operator.dtype}, "
                f"got shape {tuple(start.shape)} in {start.dtype}."
            )
        self.operator = operator
        self.start_norm = torch.linalg.vector_norm(start.detach(), dtype=torch.float64).item()
        if not math.isfinite(self.start_norm):
            raise DataError(
                "the start vector holds NaN or Inf (or its norm overflows); a Krylov space needs finite numbers."
            )
        self._scales: list[float] = []
        self.exhausted = self.start_norm == 0
        self._alpha: list[float] = []
        self._beta: list[float] = []  # beta_1..beta_k; the last one leads out of the space
        self._rows = start.new_empty(min(_FIRST_CAPACITY, size + 1), size)
        if not self.exhausted:
            self._rows[0] = start.detach().double() / self.start_norm  # double: a tiny start loses no digits

    @property
    def dimension(self) -> int:
        """k: products spent and vectors in the basis."""
        return len(self._alpha)

    @property
    def scale(self) -> float:
        """Largest ||A v_j|| seen: a lower estimate of lambda_max that sets what counts as rounding."""
        return self._scales[-1] if self._scales else 0.0

    @property
    def basis(self) -> Tensor:
        """(k, n) orthonormal rows; a view, not to be written to."""
        return self._rows[: self.dimension]

    @property
    def alpha(self) -> np.ndarray:
        """(k,) diagonal of T."""
        return np.array(self._alpha)

    @property
    def beta(self) -> np.ndarray:
        """(k - 1,) off-diagonal of T."""
        return np.array(self._beta[:-1])

    @property
    def beta_last(self) -> float:
        """beta_k, the length of what sticks out of the space; 0 when exhausted."""
        return self._beta[-1] if self._beta else 0.0

    @property
    def betas(self) -> np.ndarray:
        """(k,) beta_1..beta_k; the last is what may stick out: rounding if exhausted, nothing of the whole space."""
        hidden = _EXHAUSTED * self.rounding if self.dimension < self.operator.shape[0] else 0.0
        return np.append(self.beta, hidden if self.exhausted else self.beta_last)

    @property
    def next_vector(self) -> Tensor | None:
        """(n,) v_{k+1}, or None when the space is exhausted."""
        return None if self.exhausted else self._rows[self.dimension]

    @property
    def rounding(self) -> float:
        """One rounding of A: machine epsilon of the vectors' dtype times ``scale``."""
        return torch.finfo(self.operator.dtype).eps * self.scale

    def extend(self, products: int, stop: Callable[["Krylov"], bool] | None = None) -> "Krylov":
        """Continue by at most ``products`` products.

        Args:
            products: How many more.
            stop: Asked after every product; True ends the run.

        Returns:
            Itself, longer. Extending twice gives the same numbers as one long run. ConvergenceError where a product is
            not finite, or A shows itself not symmetric or not positive semidefinite.
        """
        for _ in range(products):
            if self.exhausted:
                break
            self.take(self.operator.matvec(self.next_vector))
            if stop is not None and stop(self):
                break
        return self

    def after(self, products: int) -> "Krylov":
        """Return the run as it was after that many products; it does not follow when this one is continued."""
        if products > self.dimension:
            raise ConfigError(f"the run has {self.dimension} products, not {products}")
        earlier = copy(self)
        earlier.exhausted = self.exhausted and products == self.dimension
        earlier._alpha, earlier._beta = self._alpha[:products], self._beta[:products]
        earlier._scales = self._scales[:products]
        earlier._rows = self._rows[: products + (not earlier.exhausted)]  # to grow, it takes memory of its own
        return earlier

    def take(self, product: Tensor) -> None:
        """Continue by one product that the caller made: A times ``next_vector``, (n,). Raises as ``extend`` does."""
        k = self.dimension + 1
        length = torch.linalg.vector_norm(product, dtype=torch.float64)
        basis = self._rows[:k]
        first = basis @ product
        rest = torch.addmv(product, basis.T, first, alpha=-1)  # a new tensor: the product may be the caller's own
        once = torch.linalg.vector_norm(rest, dtype=torch.float64)
        second = basis @ rest
        rest = torch.addmv(rest, basis.T, second, alpha=-1)
        twice = torch.linalg.vector_norm(rest, dtype=torch.float64)
        inner = first[-2:].double() + second[-2:].double()  # (v_{k-1}^T A v_k, v_k^T A v_k)
        length, once, beta, *inner = torch.cat([torch.stack([length, once, twice]), inner]).tolist()  # one transfer
        alpha = inner[-1]
        self._refuse_broken(length + alpha + beta, length, inner)
        self._alpha.append(alpha)
        # A second pass that halves what the first left means that nothing but noise was left (Kahan, in Parlett).
        noise = beta <= _EXHAUSTED * self.rounding or beta < 0.5 * once
        self.exhausted = noise or k == self.operator.shape[0]
        self._beta.append(0.0 if self.exhausted else beta)
        if not self.exhausted:
            self._reserve(k + 1)
            self._rows[k] = rest / beta

    def _refuse_broken(self, total: float, length: float, inner: list[float]) -> None:
        k = self.dimension + 1
        if not math.isfinite(total):
            raise ConvergenceError(
                f"product {k} with {self.operator!r} returned NaN or Inf. "
                "Check the model and the loss at this input, or scale the problem.",
                math.nan,
            )
        self._scales.append(max(self.scale, length))
        refuse_negative_curvature(inner[-1], self.operator, self.scale)
        gap = abs(inner[0] - self._beta[-1]) if k > 1 else 0.0  # v_{k-1}^T A v_k against v_k^T A v_{k-1}
        if gap > torch.finfo(self.operator.dtype).eps ** 0.5 * self.scale:
            raise ConvergenceError(
                f"{self.operator!r} is not symmetric: u^T A v and v^T A u differ by {gap:.3e} "
                f"at ||A|| ~ {self.scale:.3e}. Pass the Gram operator A @ A.T, and a model in eval mode (with dropout "
                "every product is another matrix).",
                math.nan,
            )

    def _reserve(self, rows: int) -> None:
        if rows > len(self._rows):
            size = self.operator.shape[0]
            grown = self._rows.new_empty(min(2 * len(self._rows), size + 1), size)
            grown[: rows - 1] = self._rows[: rows - 1]
            self._rows = grown

    def ritz_values(self) -> np.ndarray:
        """(k,) eigenvalues of T, ascending: what A looks like from inside the space."""
        if self.dimension == 0:
            return np.zeros(0)
        return eigvalsh_tridiagonal(self.alpha, self.beta)

    def ritz_pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """Eigenvalues (k,) of T, ascending, and its eigenvectors (k, k) in columns."""
        return eigh_tridiagonal(self.alpha, self.beta)

    def smallest_ritz_value(self) -> float:
        """Smallest eigenvalue of T, without the others."""
        return float(eigvalsh_tridiagonal(self.alpha, self.beta, select="i", select_range=(0, 0))[0])

    def combine(self, coefficients: np.ndarray) -> Tensor:
        """Return V^T y for y (j,) or (j, s) with j <= k: (n,) or (n, s), on the device, in the operator's dtype."""
        weights = torch.from_numpy(np.ascontiguousarray(coefficients)).to(self._rows.device, self._rows.dtype)
        return self._rows[: len(weights)].T @ weights


def lanczos(
    operator: LinearOperator,
    start: Tensor,
    *,
    max_products: int,
    stop: Callable[[Krylov], bool] | None = None,
) -> Krylov:
    """Run the Lanczos process from ``start``; T = V A V^T, (k, k).

    ConvergenceError where a product is not finite, or A shows itself not symmetric or not positive semidefinite;
    DataError where the start is not finite. Breakdown is an answer, not a failure: with an operator of rank r and a
    start in its range the run ends exhausted after at most r products, and what is read from it is exact. ConfigError
    where the operator is not tagged, ``start`` does not fit or ``max_products`` is no whole number from one on.

    Args:
        operator: A, tagged positive semidefinite.
        start: b, (n,).
        max_products: Most products to spend; ``Krylov.extend`` continues later.
        stop: Asked after every product; True ends the run.

    Returns:
        The run, of dimension at most min(max_products, n).
    """
    check_products(max_products)
    return Krylov(operator, start).extend(max_products, stop)


def check_products(count: int) -> None:
    """Refuse what is no number of products to allow.

    Args:
        count: ``max_products`` of a solver.

    Raises:
        ConfigError: If it is no whole number, or below one.
    """
    if not isinstance(count, Integral) or isinstance(count, bool) or count < 1:
        raise ConfigError(f"max_products must be a whole number, at least 1, got {count!r}.")


def solve_tridiagonal(alpha: np.ndarray, beta: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return T^-1 r for a positive definite T with diagonal ``alpha`` (k,) and off-diagonal ``beta`` (k - 1,)."""
    if len(alpha) == 1:  # scipy refuses the empty off-diagonal
        return right / alpha
    return solveh_banded(np.vstack([alpha, np.append(beta, 0.0)]), right, lower=True)


def radau_rule(alpha: np.ndarray, beta: np.ndarray, beta_last: float, edge: float) -> tuple[np.ndarray, np.ndarray]:
    """Extend T by a row that makes ``edge`` an eigenvalue: the Gauss-Radau rule with a node there.

    (T_k - edge I) d = beta_k^2 e_k, new diagonal entry edge + d_k (Golub and Meurant, Matrices, Moments and Quadrature
    with Applications, 2010, chapter 6). For functions whose derivatives alternate in sign, 1 / (x + s)^2 among them,
    the rule of T lies below the integral and this one above it, for any edge below the spectrum.

    Args:
        alpha: (k,) diagonal of T.
        beta: (k - 1,) off-diagonal of T.
        beta_last: beta_k.
        edge: Below the smallest eigenvalue of A.

    Returns:
        (k + 1,) diagonal and (k,) off-diagonal.
    """
    last = np.eye(1, len(alpha), len(alpha) - 1)[0]
    corner = edge + beta_last**2 * solve_tridiagonal(alpha - edge, beta, last)[-1]
    return np.append(alpha, corner), np.append(beta, beta_last)


def spectrum_edge(krylov: Krylov, smallest: float) -> float:
    """Return a number just below the spectrum of A, so that T - edge I is positive definite also when A is singular.

    Args:
        krylov: The run.
        smallest: Its smallest Ritz value.
    """
    return min(smallest, 0.0) - 16 * krylov.rounding


def refuse_negative_curvature(value: float, operator: LinearOperator, scale: float) -> None:
    """Refuse a Rayleigh quotient that is negative beyond rounding.

    Args:
        value: v^T A v for a unit v, or a Ritz value.
        operator: A.
        scale: ||A||, or what is known of it.

    Raises:
        ConvergenceError: If ``value`` < -sqrt(epsilon) * ||A||.
    """
    if value < -(torch.finfo(operator.dtype).eps ** 0.5) * scale:
        raise ConvergenceError(
            f"{operator!r} has negative curvature {value:.3e} at ||A|| ~ {scale:.3e}: it is not positive "
            "semidefinite, although tagged so. Pass a Gram operator A @ A.T; a Hessian is not one.",
            math.nan,
        )


def random_start(operator: LinearOperator, generator: torch.Generator, distribution: str = "gaussian") -> Tensor:
    """Draw a vector z with E[z z^T] = I; the same numbers whatever the operator's device and dtype.

    Args:
        operator: Gives the length, dtype and device.
        generator: Source of randomness; the global state is not touched.
        distribution: "gaussian", "rademacher" (entries +-1) or "sphere" (Gaussian scaled to norm sqrt(n)).

    Returns:
        (n,) vector.

    Raises:
        ConfigError: If the generator is not a torch.Generator or the distribution is unknown.
    """
    if not isinstance(generator, torch.Generator):
        raise ConfigError(
            f"generator must be a torch.Generator, got {type(generator).__name__}. "
            "Write torch.Generator().manual_seed(0)."
        )
    size = operator.shape[1]
    options = {"device": generator.device, "generator": generator}
    if distribution == "rademacher":
        vector = torch.randint(0, 2, (size,), **options).double() * 2 - 1
    elif distribution in ("gaussian", "sphere"):
        vector = torch.randn(size, dtype=torch.float64, **options)
    else:
        raise ConfigError(f"unknown distribution {distribution!r}. Available: gaussian, rademacher, sphere.")
    if distribution == "sphere":
        vector *= math.sqrt(size) / torch.linalg.vector_norm(vector)
    return vector.to(operator.device, operator.dtype)
