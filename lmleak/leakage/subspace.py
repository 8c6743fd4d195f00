"""How far apart the gradients of different values of a private attribute lie, layer by layer, without an attack.

Our reading of "subspace distance" in the abstract of Mo et al. (arXiv:2105.13929), whose construction is not public.
Two constructions: the span of the gradients of each value (``sample_subspace_distance``), and the column or row space
of their average kept as a matrix (``weight_subspace_distance``). Finite samples lie apart by chance, so a distance
means nothing without its permutation null; z and p say what it adds. A pure shift of the mean can leave subspaces
equal: ``mean_difference`` and ``kernel_discrepancy`` (:mod:`lmleak.leakage.discrepancy`) see it.

Angles: for orthonormal bases U_a, U_b (p, k), cos theta_i are the singular values of U_a^T U_b. Distances between
subspaces of k dimensions follow Edelman, Arias and Smith (SIAM J. Matrix Anal. Appl. 20(2), 1998).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from lmleak.errors import ConfigError, DataError
from lmleak.leakage.permutation import PermutationTest, permutation_p_value
from lmleak.leakage.rows import attribute_codes, coordinates, finite, gradient_tensor, less_mean, unit_rows
from lmleak.lookup import lookup

ENERGY = 0.95
ROUNDING = 1e-12  # radians: distances below are those of equal subspaces

DISTANCES: dict[str, Callable[[Tensor], Tensor]] = {
    "geodesic": lambda theta: theta.square().sum().sqrt(),
    "normalized-geodesic": lambda theta: theta.square().mean().sqrt() / (math.pi / 2),
    "chordal": lambda theta: theta.sin().square().sum().sqrt(),
    "projection": lambda theta: theta.sin().square().sum().sqrt(),  # ||P_a - P_b||_F / sqrt(2), the same number
    "max-angle": lambda theta: theta.max(),
}
"""Distances as functions of the principal angles (k,), in radians unless normalised to [0, 1]."""


@dataclass(frozen=True)
class SubspaceDistance:
    """Distance between the gradient subspaces of an attribute's values; means over all pairs of values."""

    geodesic: float
    """sqrt(sum theta_i^2), radians, in [0, sqrt(k) pi / 2]."""
    normalized_geodesic: float
    """geodesic / (sqrt(k) pi / 2), in [0, 1]: comparable between layers and between k."""
    chordal: float
    """sqrt(sum sin^2 theta_i) = ||P_a - P_b||_F / sqrt(2), the projection distance, in [0, sqrt(k)]."""
    max_angle: float
    """Largest theta_i, radians."""
    k: int
    """Dimensions used: what was asked for, or the smallest rank of a value's gradients if that is less."""
    angles: dict[tuple, tuple[float, ...]]
    """Principal angles per pair of values, ascending, radians."""
    test: PermutationTest
    """The chosen distance against shuffled attribute values."""

    @property
    def projection(self) -> float:
        """||P_a - P_b||_F / sqrt(2) of the projectors: equal to ``chordal``."""
        return self.chordal


def principal_angles(first: Tensor, second: Tensor) -> Tensor:
    """Return the angles between two subspaces, ascending, in radians, accurate for small and for large ones.

    From the cosines above pi/4 and from the sines, singular values of (I - U U^T) V, below (Bjorck and Golub, Math.
    Comp. 27, 1973): the cosine alone knows an angle of 1e-8 no better than zero.

    Args:
        first: U (p, k) with orthonormal columns.
        second: V (p, l) with orthonormal columns.

    Returns:
        (min(k, l),) float64.
    """
    if second.shape[1] > first.shape[1]:
        first, second = second, first
    first, second = first.double(), second.double()
    inner = first.T @ second
    cosines = torch.linalg.svdvals(inner)  # descending, so angles ascend
    sines = torch.linalg.svdvals(second - first @ inner).flip(0)
    return torch.where(cosines.square() < 0.5, cosines.clamp(max=1).acos(), sines.clamp(max=1).asin())


def sample_subspace_distance(
    gradients: ArrayLike,
    labels: Sequence | np.ndarray | Tensor,
    *,
    k: int | float = ENERGY,
    centred: bool = True,
    unit_norm: bool = False,
    distance: str = "geodesic",
    permutations: int = 200,
    seed: int = 0,
) -> SubspaceDistance:
    """Compare the spans of the gradients of each attribute value: U_a = top-k left singular vectors of M_a (p, m_a).

    The columns of M_a are the flattened gradients of value a, less the mean of all values' gradients if ``centred``.
    If p exceeds n, gradients are first replaced by n coordinates with the same inner products (one QR, read in blocks
    of parameters), after which neither distance nor permutations cost anything that grows with p. A permutation costs
    an SVD of about n^3 operations: beyond a thousand gradients, project them to a few hundred features first.

    Where k is less than the rank of all gradients together, shuffled groups disagree on which k directions are their
    largest, so the null is far from zero and wide: look at z, not at the distance.

    Args:
        gradients: Released gradients of one layer, (n, p) or (n, out, in, ...), one row per example; tensor or array.
        labels: Value of the attribute per row, (n,); two values or more.
        k: Dimensions, or a share of energy (a float in (0, 1]): the fewest with which every value's subspace keeps
            that share of ||M_a||_F^2. Either is cut to the smallest rank.
        centred: Subtract the pooled mean. With two values the directions of a mean shift are then the same in both.
        unit_norm: Scale every column to norm 1, so that examples with large gradients do not decide.
        distance: What is tested: "geodesic", "normalized-geodesic", "chordal", "projection" or "max-angle".
        permutations: Shuffles of the labels; k is chosen anew in each, as it depends on them.
        seed: Seed of the shuffles.

    Returns:
        Distances, angles and the permutation test.
    """
    values, codes = attribute_codes(labels, len(gradients))
    rows = coordinates(gradients)
    if centred:
        rows = less_mean(rows)
    if unit_norm:
        rows = unit_rows(rows)
    bases = lambda codes: [_svd(rows[codes == a].T) for a in range(len(values))]
    return _distance(bases, values, codes, k, distance, permutations, seed)


def weight_subspace_distance(
    gradients: ArrayLike,
    labels: Sequence | np.ndarray | Tensor,
    *,
    k: int | float = ENERGY,
    side: str = "columns",
    unit_norm: bool = False,
    distance: str = "geodesic",
    permutations: int = 200,
    seed: int = 0,
) -> SubspaceDistance:
    """Compare column or row spaces of each value's average gradient, kept as a matrix (out, in).

    The average is not centred: with two values of equal size the centred averages are opposite to one another and
    span the same spaces, whatever the attribute does.

    Args:
        gradients: Released gradients of one weight, (n, out, in, ...); a convolution's inputs and taps are joined.
        labels: As for :func:`sample_subspace_distance`.
        k: Likewise, with the average in place of M_a.
        side: "columns" (spans in output space) or "rows" (in input space).
        unit_norm: Scale every example's gradient to norm 1 before averaging.
        distance: As for :func:`sample_subspace_distance`.
        permutations: Shuffles of the labels.
        seed: Seed of the shuffles.

    Returns:
        Distances, angles and the permutation test.

    Raises:
        DataError: If the gradients are not matrices.
        ConfigError: If ``side`` is unknown.
    """
    gradients = gradient_tensor(gradients)
    if gradients.ndim < 3:
        raise DataError(
            f"a weight-matrix subspace needs gradients (n, out, in), got {tuple(gradients.shape)}; "
            "use sample_subspace_distance for biases and flattened gradients"
        )
    if side not in ("columns", "rows"):
        raise ConfigError(f"side must be 'columns' or 'rows', got {side!r}")
    values, codes = attribute_codes(labels, len(gradients))
    matrices = gradients.flatten(2)
    flat = finite(matrices.flatten(1).double()).cpu()
    if unit_norm:
        flat = unit_rows(flat)

    def bases(codes: Tensor) -> list[tuple[Tensor, Tensor]]:
        average = [flat[codes == a].mean(0).reshape(matrices.shape[1:]) for a in range(len(values))]
        return [_svd(mean if side == "columns" else mean.T) for mean in average]

    return _distance(bases, values, codes, k, distance, permutations, seed)


def subspace_sweep(
    gradients: ArrayLike, labels: Sequence | np.ndarray | Tensor, ks: Sequence[int | float], **options
) -> dict[int | float, SubspaceDistance]:
    """Return :func:`sample_subspace_distance` for several k on the same gradients and shuffles.

    A p-value picked as the smallest of the sweep is no p-value; fix k, or correct for the number of them.

    Args:
        gradients: (n, p) or (n, out, in, ...).
        labels: Value of the attribute per row.
        ks: Dimensions or shares of energy.
        **options: Of :func:`sample_subspace_distance`.

    Returns:
        The distance per k.
    """
    rows = coordinates(gradients)
    return {k: sample_subspace_distance(rows, labels, k=k, **options) for k in ks}


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return left singular vectors (p, rank) and squared singular values (rank,) of a matrix (p, m)."""
    if matrix.shape[1] > matrix.shape[0]:  # M^T = Q R, so R^T has M's left vectors and values, in p columns
        matrix = torch.linalg.qr(matrix.T, mode="r").R.T
    left, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    rank = int((values > max(matrix.shape) * torch.finfo(values.dtype).eps * values[0]).sum())
    return left[:, :rank], values[:rank].square()


def _dimensions(bases: list[tuple[Tensor, Tensor]], k: int | float) -> int:
    if isinstance(k, float):
        shares = [energy.cumsum(0) / energy.sum() for _, energy in bases if len(energy)]
        # The slack keeps a share of 1.0 from asking for one more than there are.
        k = max((int((share < k - 1e-12).sum()) + 1 for share in shares), default=1)
    return min(k, *(len(energy) for _, energy in bases))


def _distance(bases, values: list, codes: Tensor, k, distance: str, permutations: int, seed: int) -> SubspaceDistance:
    formula = lookup("distance", distance, DISTANCES)
    k = k.item() if isinstance(k, np.number) else k
    if isinstance(k, bool) or not (k >= 1 if isinstance(k, int) else 0 < k <= 1):
        raise ConfigError(f"k must be a number of dimensions (int >= 1) or a share of energy in (0.0, 1.0], got {k!r}")
    used, angles = _angles(bases(codes), k)
    if used == 0:
        raise DataError("every gradient of one attribute value is zero (or all are equal), so it spans no subspace")

    def mean(formula, angles) -> float:
        value = torch.stack([formula(theta) for theta in angles.values()]).mean().item()
        return value if value > ROUNDING else 0.0

    def statistic(codes: Tensor) -> float:
        used, angles = _angles(bases(codes), k)
        return mean(formula, angles) if used else 0.0  # a shuffle that leaves one value nothing but zeros

    return SubspaceDistance(
        geodesic=mean(DISTANCES["geodesic"], angles),
        normalized_geodesic=mean(DISTANCES["normalized-geodesic"], angles),
        chordal=mean(DISTANCES["chordal"], angles),
        max_angle=mean(DISTANCES["max-angle"], angles),
        k=used,
        angles={(values[a], values[b]): tuple(theta.tolist()) for (a, b), theta in angles.items()},
        test=permutation_p_value(statistic, codes, permutations, seed),
    )


def _angles(bases: list[tuple[Tensor, Tensor]], k: int | float) -> tuple[int, dict[tuple[int, int], Tensor]]:
    """Return the dimensions used and the principal angles of every pair."""
    used = _dimensions(bases, k)
    pairs = combinations(range(len(bases)), 2) if used else ()
    return used, {(a, b): principal_angles(bases[a][0][:, :used], bases[b][0][:, :used]) for a, b in pairs}
