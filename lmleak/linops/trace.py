"""Traces of functions of an operator, tr f(A), by stochastic Lanczos quadrature: one set of products, any number of f.

Ubaru, Chen and Saad, Fast estimation of tr(f(A)) via stochastic Lanczos quadrature, SIAM J. Matrix Anal. Appl. 38(4),
2017; the quadrature is that of Golub and Meurant, Matrices, Moments and Quadrature with Applications, 2010. We add to
both an error of the quadrature that is measured, not assumed: Gauss against Gauss-Radau.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal
from scipy.special import stdtrit
from torch import Tensor

from lmleak.errors import ConfigError, ConvergenceError
from lmleak.linops.base import DENSE_LIMIT, LinearOperator, require_positive_semidefinite
from lmleak.linops.lanczos import (
    Krylov,
    lanczos,
    radau_rule,
    random_start,
    refuse_negative_curvature,
    spectrum_edge,
)


@dataclass(frozen=True)
class TraceEstimate:
    """tr f(A), with its two errors: sampling (probes) and quadrature (steps)."""

    value: float
    """Mean over probes of z^T f(A) z."""
    std_error: float
    """Standard deviation over probes (ddof = 1) / sqrt(num_probes); 0 for an exact spectrum. With few probes it is
    itself uncertain: ``interval`` allows for that, two standard errors do not."""
    quadrature_error: float
    """Mean over probes of |Gauss - Gauss-Radau|. For 1/(x+d), x/(x+d) and log(1+x/d) the two rules bracket
    z^T f(A) z, so this is a bound; for other f an estimate."""
    residual: float
    """quadrature_error / |value|."""
    num_probes: int
    """Random vectors; 0 for an exact spectrum."""
    products: int
    """Products with A of the sample, shared by every f."""
    converged: bool
    """residual <= tol. Says nothing of the sampling error."""

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Return (low, high): Student's t with num_probes - 1 degrees of freedom, widened by the quadrature error."""
        reach = self.quadrature_error
        if self.std_error > 0:
            reach += float(stdtrit(self.num_probes - 1, (1 + confidence) / 2)) * self.std_error
        return self.value - reach, self.value + reach


@dataclass(frozen=True)
class Quadrature:
    """z^T f(A) z = norm_squared * sum_j weights_j f(nodes_j) for one probe z."""

    nodes: Tensor
    """(k,) float64 on the CPU, >= 0: Ritz values."""
    weights: Tensor
    """(k,) squared first components of T's eigenvectors; they sum to one."""
    radau_nodes: Tensor
    """(k + 1,) nodes of the Gauss-Radau rule with a node at 0; the same as ``nodes`` where the rule is exact."""
    radau_weights: Tensor
    """(k + 1,) its weights."""
    norm_squared: float
    """||z||^2, n for Rademacher probes."""


@dataclass(frozen=True)
class SpectralSample:
    """What the products said about the spectrum of A; ask it for the trace of any function."""

    probes: tuple[Quadrature, ...]
    """One quadrature per probe; a single one of n nodes for an exact spectrum."""
    size: int
    """n."""
    products: int
    """Products with A spent."""
    exact: bool
    """The nodes are the eigenvalues of A."""

    def trace(self, f: Callable[[Tensor], Tensor], *, tol: float = 1e-2) -> TraceEstimate:
        """Estimate tr f(A) without a product.

        Args:
            f: Vectorised function of eigenvalues x >= 0, float64, for example ``lambda x: 1 / (x + damping)``. It must
                be finite at 0 unless A is known to have no eigenvalue there: the Radau rule asks for f(0).
            tol: Relative quadrature error above which the estimate is flagged as not converged.

        Returns:
            The estimate with both errors.

        Raises:
            ConfigError: If f is not finite at an eigenvalue, or returns another shape.
        """
        gauss = np.array([p.norm_squared * _integrate(f, p.nodes, p.weights) for p in self.probes])
        if not np.isfinite(gauss).all():
            raise ConfigError(
                f"f is not finite at a (Ritz) eigenvalue in [{self.smallest:.3e}, {self.largest:.3e}]; a singular "
                "operator has the eigenvalue 0. Add a damping: lambda x: 1 / (x + damping)."
            )
        radau = np.array([p.norm_squared * _integrate(f, p.radau_nodes, p.radau_weights) for p in self.probes])
        gaps = np.abs(gauss - radau)
        error = float(gaps.mean()) if np.isfinite(gaps).all() else math.inf
        value = float(gauss.mean())
        residual = error / abs(value) if value else (math.inf if error else 0.0)
        return TraceEstimate(
            value=value,
            std_error=0.0 if self.exact else float(gauss.std(ddof=1) / math.sqrt(len(gauss))),
            quadrature_error=error,
            residual=residual,
            num_probes=0 if self.exact else len(self.probes),
            products=self.products,
            converged=residual <= tol,
        )

    @property
    def smallest(self) -> float:
        """Smallest node: the smallest eigenvalue is at most this."""
        return min(float(p.nodes.min()) for p in self.probes)

    @property
    def largest(self) -> float:
        """Largest node: the largest eigenvalue is at least this."""
        return max(float(p.nodes.max()) for p in self.probes)


def spectral_probes(
    operator: LinearOperator,
    *,
    num_probes: int = 8,
    steps: int = 30,
    generator: torch.Generator,
    distribution: str = "rademacher",
) -> SpectralSample:
    """Run ``steps`` Lanczos steps from each of ``num_probes`` random vectors, ``operator.block_size`` side by side.

    Costs at most num_probes * steps products; fewer where a probe exhausts its space, and then its quadrature is
    exact. ConvergenceError as in ``lanczos``.

    Args:
        operator: A, tagged positive semidefinite, (n, n).
        num_probes: At least 2, or there is no standard error.
        steps: Nodes per probe; the rule is exact for polynomials of degree 2 * steps - 1.
        generator: Draws the probes.
        distribution: "rademacher" (smallest variance for near-diagonal A), "gaussian" or "sphere".

    Returns:
        The sample.

    Raises:
        ConfigError: If the operator is not tagged or an argument is out of range.
    """
    require_positive_semidefinite(operator, "spectral_probes")
    if num_probes < 2 or steps < 1:
        raise ConfigError(
            f"num_probes must be at least 2 (one probe has no standard error) and steps at least 1, "
            f"got {num_probes} and {steps}. For a small operator, exact_spectrum needs no probe."
        )
    probes, products = [], 0
    for count in _even_parts(num_probes, operator.block_size):
        runs = [Krylov(operator, random_start(operator, generator, distribution)) for _ in range(count)]
        _extend_together(runs, operator, steps)
        probes += map(_quadrature, runs)
        products += sum(run.dimension for run in runs)
    return SpectralSample(tuple(probes), operator.shape[0], products, exact=False)


def _even_parts(total: int, largest: int) -> list[int]:
    """Return nearly equal whole numbers of at most ``largest`` that add up to ``total``."""
    parts = math.ceil(total / largest)
    return [total // parts + (i < total % parts) for i in range(parts)]


def _extend_together(runs: Sequence[Krylov], operator: LinearOperator, products: int) -> None:
    """Continue every run by the same number of products, those of one step at once."""
    for _ in range(products):
        going = [run for run in runs if not run.exhausted]
        if not going:
            break
        made = operator.matmat(torch.stack([run.next_vector for run in going], dim=1))
        for run, product in zip(going, made.T.contiguous(), strict=True):
            run.take(product)


def probe_quadrature(operator: LinearOperator, start: Tensor, *, steps: int) -> tuple[Quadrature, int]:
    """Return the quadrature of one probe, and the products spent; ``spectral_probes`` averages several.

    Args:
        operator: A, tagged positive semidefinite, (n, n).
        start: The probe z, (n,).
        steps: Most products.

    Returns:
        The quadrature and the number of products.
    """
    krylov = lanczos(operator, start, max_products=steps)
    return _quadrature(krylov), krylov.dimension


def exact_spectrum(operator: LinearOperator, *, max_size: int = DENSE_LIMIT) -> SpectralSample:
    """Form the matrix by n products and take its eigenvalues in float64; for small n.

    ConfigError where the operator is not tagged or too large.

    Args:
        operator: A, tagged positive semidefinite, (n, n).
        max_size: Refuse above this n.

    Returns:
        A sample whose traces have neither sampling nor quadrature error.

    Raises:
        ConvergenceError: If a product is not finite, or A is not positive semidefinite.
    """
    require_positive_semidefinite(operator, "exact_spectrum")
    dense = operator.to_dense(max_size).double()
    size = len(dense)
    if not torch.isfinite(dense).all():
        raise ConvergenceError(
            f"a product with {operator!r} returned NaN or Inf. Check the model and the loss at this input.", math.nan
        )
    values = torch.linalg.eigvalsh((dense + dense.T) / 2).cpu()
    refuse_negative_curvature(float(values[0]), operator, float(values.abs().max()))
    values = values.clamp(min=0)
    weights = torch.full((size,), 1 / size, dtype=torch.float64)
    return SpectralSample((Quadrature(values, weights, values, weights, float(size)),), size, size, exact=True)


def _quadrature(krylov: Krylov) -> Quadrature:
    """Gauss and Gauss-Radau rules of the measure that the start of the run puts on the spectrum."""
    values, vectors = krylov.ritz_pairs()
    refuse_negative_curvature(values[0], krylov.operator, krylov.scale)
    gauss = (values.clip(min=0), vectors[0] ** 2)
    radau = gauss if krylov.exhausted else _radau(krylov, values[0])
    return Quadrature(*(torch.from_numpy(np.array(a)) for a in (*gauss, *radau)), norm_squared=krylov.start_norm**2)


def _radau(krylov: Krylov, smallest: float) -> tuple[np.ndarray, np.ndarray]:
    edge = spectrum_edge(krylov, smallest)
    values, vectors = eigh_tridiagonal(*radau_rule(krylov.alpha, krylov.beta, krylov.beta_last, edge))
    return values.clip(min=0), vectors[0] ** 2


def _integrate(f: Callable[[Tensor], Tensor], nodes: Tensor, weights: Tensor) -> float:
    """Return sum_j weights_j f(nodes_j)."""
    images = f(nodes)
    if images.shape != nodes.shape:
        raise ConfigError(f"f must return one number per eigenvalue, {tuple(nodes.shape)}, got {tuple(images.shape)}.")
    return float(weights @ images.double())
