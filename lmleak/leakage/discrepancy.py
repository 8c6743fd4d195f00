"""Whether gradients of different attribute values have different distributions: mean difference and MMD.

What :mod:`lmleak.leakage.subspace` can miss, a shift of the mean, shows here. The abstract of Mo et al.
(arXiv:2105.13929) names the subspace distance only; these two complements are ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from lmleak.errors import DataError
from lmleak.leakage.permutation import PermutationTest, permutation_p_value
from lmleak.leakage.rows import attribute_codes, coordinates, less_mean

ROUNDING = 1e-12  # relative: gradients nearer than this are equal


@dataclass(frozen=True)
class MeanDifference:
    """How far apart the mean gradients of an attribute's values lie."""

    norm: float
    """||mean_a - mean_b||, mean over pairs of values; unit of the gradient."""
    ratio: float
    """Variance between values over variance within (pseudo-F): about 1 by chance, no unit."""
    test: PermutationTest
    """Of ``ratio``."""


@dataclass(frozen=True)
class KernelDiscrepancy:
    """Maximum mean discrepancy with a Gaussian kernel."""

    squared: float
    """Unbiased MMD^2, mean over pairs of values; about 0 by chance, where it may be negative; no unit."""
    bandwidth: float
    """Of the kernel exp(-||g - h||^2 / (2 bandwidth^2)): the median distance of all pairs of unequal gradients."""
    test: PermutationTest
    """Of ``squared``."""


def mean_difference(
    gradients: ArrayLike, labels: Sequence | np.ndarray | Tensor, *, permutations: int = 200, seed: int = 0
) -> MeanDifference:
    """Compare mean gradients by the pseudo-F ratio of Anderson (Austral Ecology 26, 2001).

        F = [sum_a m_a ||mean_a - mean||^2 / (K - 1)] / [sum_i ||g_i - mean_a(i)||^2 / (n - K)]

    For two values F = ||mean_0 - mean_1||^2 / ((1/m_0 + 1/m_1) tr S), Hotelling's T^2 with the trace of the pooled
    covariance S in place of its inverse (Dempster 1958), which does not exist where parameters outnumber gradients.

    Args:
        gradients: Released gradients of one layer, (n, p) or (n, out, in, ...).
        labels: Value of the attribute per row, (n,).
        permutations: Shuffles of the labels.
        seed: Seed of the shuffles.

    Returns:
        The difference with its permutation test.

    Raises:
        DataError: If the gradients of each value do not vary.
    """
    values, codes = attribute_codes(labels, len(gradients))
    rows = less_mean(coordinates(gradients))
    total, size, kinds = rows.square().sum().item(), len(rows), len(values)
    if total == 0:
        raise DataError("all gradients are equal: there is no variance to compare a difference with")
    counts = torch.bincount(codes).double()
    sums = lambda codes: torch.zeros(kinds, rows.shape[1], dtype=rows.dtype).index_add_(0, codes, rows)
    means = lambda codes: sums(codes) / counts[:, None]

    def ratio(codes: Tensor) -> float:
        between = (counts * means(codes).square().sum(1)).sum().item()
        within = max(total - between, 1e-15 * total)  # identical gradients within every value
        return (between / (kinds - 1)) / (within / (size - kinds))

    test = permutation_p_value(ratio, codes, permutations, seed)
    found = means(codes)
    norms = [(found[a] - found[b]).norm().item() for a, b in combinations(range(kinds), 2)]
    return MeanDifference(sum(norms) / len(norms), test.statistic, test)


def kernel_discrepancy(
    gradients: ArrayLike, labels: Sequence | np.ndarray | Tensor, *, permutations: int = 200, seed: int = 0
) -> KernelDiscrepancy:
    """Compare the distributions of gradients by the maximum mean discrepancy (Gretton et al., JMLR 13, 2012, eq. 3).

        MMD^2 = mean_{i != j} k(g_i, g_j) + mean_{i != j} k(h_i, h_j) - 2 mean_{i, j} k(g_i, h_j)

    with a Gaussian kernel whose bandwidth is the median distance of all unequal gradients, which no label enters.

    Args:
        gradients: Released gradients of one layer, (n, p) or (n, out, in, ...).
        labels: Value of the attribute per row, (n,).
        permutations: Shuffles of the labels.
        seed: Seed of the shuffles.

    Returns:
        The discrepancy with its permutation test.

    Raises:
        DataError: If all gradients are equal.
    """
    values, codes = attribute_codes(labels, len(gradients))
    rows = less_mean(coordinates(gradients))  # distances do not see the mean, their rounding does
    distances = torch.nn.functional.pdist(rows)
    positive = distances[distances > ROUNDING * rows.norm(dim=1).max()]
    if not len(positive):
        raise DataError("all gradients are equal: there is no distance to scale the kernel by")
    bandwidth = positive.median().item()
    squared = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").square()
    kernel = torch.exp(-squared / (2 * bandwidth**2))
    counts = torch.bincount(codes).double()
    pairs = list(combinations(range(len(values)), 2))

    def discrepancy(codes: Tensor) -> float:
        member = torch.nn.functional.one_hot(codes, len(values)).to(kernel)  # (n, K)
        sums = member.T @ kernel @ member
        inside = (sums.diagonal() - counts) / (counts * (counts - 1))  # k(g, g) = 1 left out
        across = sums / (counts[:, None] * counts)
        return sum((inside[a] + inside[b] - 2 * across[a, b]).item() for a, b in pairs) / len(pairs)

    test = permutation_p_value(discrepancy, codes, permutations, seed)
    return KernelDiscrepancy(test.statistic, bandwidth, test)
