"""Do some features say anything about a target? A permutation test whose shuffles share one factorisation."""

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.decomposition import PCA
from sklearn.model_selection import KFold

from lmleak.errors import ConfigError, DataError
from lmleak.leakage.cross_fitting import feature_matrix, make_target
from lmleak.leakage.families import RIDGE_STRENGTHS
from lmleak.leakage.permutation import PermutationTest, tested_against
from lmleak.leakage.rows import checked_values

TESTED_COORDINATES = 16  # principal components of an input that the test predicts; labels do not enter their choice
COLUMNS = 2**13  # target columns of shuffles that are solved at once


def independence_test(
    features: ArrayLike,
    targets: ArrayLike,
    *,
    groups: Sequence[Hashable] | None = None,
    permutations: int = 199,
    folds: int = 3,
    seed: int = 0,
) -> PermutationTest:
    """Test independence of X and Y by how much of Y's held-out variance a ridge regression on X explains.

        T = 1 - sum ||y_i - f_{-k(i)}(x_i)||^2 / sum ||y_i - mean_{-k(i)}||^2

    f_{-k} is fitted without fold k, its strength by generalised cross-validation (Golub, Heath and Wahba 1979) on the
    same samples. An attribute is Y as indicators of its values, an input as its first 16 principal components. The
    statistic leaves out the constant fallback and the calibration of ``v_information``: with them it would be exactly
    0 on most shuffled targets and p not uniform. It may be below 0, which is no information either; and information
    that is not linear can escape it.

    Folds do not look at Y, so one factorisation of X serves all shuffles: a shuffle costs two products.

    Args:
        features: X (n, p).
        targets: Y, as in :func:`lmleak.leakage.vinformation.v_information`.
        groups: (n,) if samples of one group resemble each other; targets must then be equal within each group, and
            are shuffled among groups, which are not divided between fitting and testing.
        permutations: Shuffles, at least 2; the smallest possible p-value is 1 / (permutations + 1).
        folds: K of the cross-fitting.
        seed: Seed of folds and shuffles.

    Returns:
        T, a share (no unit), with its null distribution and p-value.

    Raises:
        ConfigError: If there are too few shuffles or folds.
        DataError: If targets differ within a group, or there are fewer groups than folds.
    """
    if not all(isinstance(count, (int, np.integer)) and count >= 2 for count in (permutations, folds)):
        raise ConfigError(
            f"expected whole numbers permutations >= 2 and folds >= 2, got {permutations!r} and {folds!r}"
        )
    values = checked_values(targets)
    x = feature_matrix(features, len(values)).astype(np.float64)
    _, first, of_sample = np.unique(
        np.arange(len(values)) if groups is None else np.asarray(groups), return_index=True, return_inverse=True
    )
    if not np.array_equal(values[first][of_sample], values):
        raise DataError("targets differ within a group, so shuffling them among groups is no null; drop groups=")
    if len(first) < folds:
        raise DataError(f"{len(first)} group(s) cannot be divided into {folds} parts; take fewer folds")
    scale = x.std(0)
    x = (x - x.mean(0)) / np.where(scale > 0, scale, 1)
    y = _columns(values, seed)[first]  # (groups, d)
    generator = np.random.default_rng(seed)
    orders = np.stack([np.arange(len(first)), *(generator.permutation(len(first)) for _ in range(permutations))])
    errors, spreads = np.zeros(len(orders)), np.zeros(len(orders))
    for train, test in KFold(folds, shuffle=True, random_state=seed).split(np.arange(len(first))):
        fit = _Ridge(x[np.isin(of_sample, train)], x[np.isin(of_sample, test)])
        inside, outside = of_sample[np.isin(of_sample, train)], of_sample[np.isin(of_sample, test)]
        at_once = max(1, COLUMNS // y.shape[1])
        for start in range(0, len(orders), at_once):
            part = slice(start, start + at_once)
            error, spread = fit.errors(y[orders[part]][:, inside], y[orders[part]][:, outside])
            errors[part] += error
            spreads[part] += spread
    statistics = 1 - errors / spreads
    return tested_against(float(statistics[0]), statistics[1:])


def _columns(values: NDArray, seed: int) -> NDArray:
    """Return the target as centred columns (n, d): indicators of an attribute's values, or principal components."""
    target = make_target(values)
    if target.kind == "latent":
        indicators = np.eye(len(target.names))[target.values]
        return (indicators - indicators.mean(0))[:, 1 if len(target.names) == 2 else 0 :]
    inputs = target.values
    if inputs.shape[1] <= TESTED_COORDINATES:
        return inputs - inputs.mean(0)
    return PCA(TESTED_COORDINATES, svd_solver="randomized", random_state=seed).fit_transform(inputs)


class _Ridge:
    """Ridge regression from one set of samples to another, factorised once: x = u d v^T after centring."""

    def __init__(self, x: NDArray, new: NDArray):
        mean = x.mean(0)
        u, d, v = np.linalg.svd(x - mean, full_matrices=False)
        kept = d > 1e-10 * max(d.max(initial=0), 1e-300)
        self.u, self.d, self.new = u[:, kept], d[kept], (new - mean) @ v[kept].T  # new: (m, r) in the right basis

    def errors(self, y: NDArray, truth: NDArray) -> tuple[NDArray, NDArray]:
        """Return squared errors of the fit and of the mean on the new samples, per shuffle.

        Args:
            y: (shuffles, n, d) targets of the samples fitted on.
            truth: (shuffles, m, d) of the new ones.

        Returns:
            Two arrays (shuffles,), summed over samples and coordinates.
        """
        mean = y.mean(1, keepdims=True)
        along = np.einsum("nr,snd->srd", self.u, y - mean, optimize=True)
        energy = np.square(along).sum(2)  # (shuffles, r)
        total, count = np.square(y - mean).sum((1, 2)), y.shape[1]
        shrinkage = self.d**2 / (self.d**2 + RIDGE_STRENGTHS[:, None])  # (strengths, r)
        residual = total[:, None] - energy @ (2 * shrinkage - shrinkage**2).T
        # One strength for all coordinates of the target: they are coordinates of one thing.
        gcv = residual / (count - 1 - shrinkage.sum(1)).clip(1e-9) ** 2
        chosen = shrinkage[gcv.argmin(1)] / np.where(self.d > 0, self.d, 1)  # (shuffles, r)
        predicted = mean + np.einsum("mr,srd->smd", self.new, chosen[:, :, None] * along, optimize=True)
        return np.square(truth - predicted).sum((1, 2)), np.square(truth - mean).sum((1, 2))
