"""Permutation tests: how large a statistic becomes when labels carry no information about the gradients."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lmleak.errors import ConfigError, DataError

TIE = 1e-9  # relative: permutations that only rename the values give the same number up to rounding


@dataclass(frozen=True)
class PermutationTest:
    """A statistic beside what it is by chance; unit of the statistic unless said otherwise."""

    statistic: float
    """With the true labels."""
    null_mean: float
    """Mean over permuted labels: the level that finite samples reach by chance."""
    null_std: float
    """Standard deviation (ddof = 1) over permuted labels."""
    z: float | None
    """(statistic - null_mean) / null_std; None where the null does not vary."""
    p_value: float
    """(1 + #{permuted >= statistic}) / (1 + permutations), in (0, 1]; one-sided, small means informative."""
    permutations: int


def permutation_p_value(
    statistic: Callable[[np.ndarray], float] | Callable[[Tensor], float],
    labels: Sequence | np.ndarray | Tensor,
    permutations: int = 200,
    seed: int = 0,
) -> PermutationTest:
    """Test whether a statistic is larger with the true labels than with shuffled ones.

    Exact at any sample size if the rows are exchangeable under the null (Phipson and Smyth, Stat. Appl. Genet. Mol.
    Biol. 9(1), 2010: the true labelling counts as one of the permutations): P(p_value <= a) <= a. Everything that
    looks at labels must happen inside ``statistic``, the choice of hyper-parameters included. Rows of one person or
    one text are not exchangeable with others; pass one row for each.

    Args:
        statistic: Number to test, larger meaning more information, as a function of the labels.
        labels: One per row, (n,) or (n, ...); shuffled along the first axis. A tensor is handed on as a tensor,
            anything else as a numpy array.
        permutations: Number of shuffles; p_value is at least 1 / (1 + permutations).
        seed: Seed of the shuffles.

    Returns:
        The statistic with its null distribution's mean and deviation, z and p.

    Raises:
        ConfigError: If ``permutations`` is less than 2.
        DataError: If there are fewer than two labels, or the statistic is not finite.
    """
    if not isinstance(permutations, (int, np.integer)) or permutations < 2:
        raise ConfigError(f"the deviation of the null needs permutations >= 2, got {permutations!r}; write 200")
    if not isinstance(labels, Tensor):
        labels = np.asarray(labels)
    size = len(labels)
    if size < 2:
        raise DataError(f"a permutation test needs at least 2 labels, got {size}")
    generator = torch.Generator().manual_seed(seed)
    observed = float(statistic(labels))
    null = np.empty(permutations)
    for i in range(permutations):
        order = torch.randperm(size, generator=generator)
        null[i] = statistic(labels[order.to(labels.device) if isinstance(labels, Tensor) else order.numpy()])
    return tested_against(observed, null)


def tested_against(observed: float, null: np.ndarray) -> PermutationTest:
    """Return where a statistic stands among those of shuffled labels.

    Args:
        observed: The statistic with the true labels.
        null: The statistics with shuffled labels, two or more.

    Returns:
        The test.

    Raises:
        DataError: If a statistic is not finite.
    """
    permutations = len(null)
    if not (math.isfinite(observed) and np.isfinite(null).all()):
        raise DataError(
            f"the statistic is not finite: {observed} with the true labels, {int((~np.isfinite(null)).sum())} of "
            f"{permutations} shuffles NaN or Inf. Check the gradients for NaN and for constant columns."
        )
    reached = int((null >= observed - TIE * abs(observed)).sum())
    deviation = float(null.std(ddof=1))
    constant = deviation <= TIE * max(abs(observed), float(np.abs(null).max()))
    return PermutationTest(
        statistic=observed,
        null_mean=float(null.mean()),
        null_std=deviation,
        z=None if constant else (observed - float(null.mean())) / deviation,
        p_value=(1 + reached) / (1 + permutations),
        permutations=permutations,
    )
