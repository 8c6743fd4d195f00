"""How well two numbers agree over many examples, and how sure that is: rank correlation and bootstrap.

Rows of one example (its layers, seeds, noise scales) are dependent. Where ``groups`` names the example of
each row the bootstrap resamples examples, not rows (cluster bootstrap; Davison and Hinkley 1997, section
3.8); resampling rows would give intervals that are too narrow.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lmleak.errors import ConfigError, DataError

CHUNK = 2**21  # numbers per block of resamples, so that memory does not grow with their count


@dataclass(frozen=True)
class Interval:
    """An estimate with its bootstrap interval; what could not be computed is None, with the reason."""

    value: float | None
    """The statistic on all points."""
    low: float | None
    high: float | None
    confidence: float
    """Nominal coverage of [low, high]."""
    num_points: int
    num_groups: int
    """Independent units that were resampled (points, if no groups were given)."""
    resamples: int
    """Resamples that [low, high] rests on."""
    dropped: int
    """Resamples left out because the statistic is not defined on them (a constant column)."""
    method: str
    reason: str = ""
    """Why something is None; empty otherwise."""


@dataclass(frozen=True)
class Correlation(Interval):
    """A rank correlation in [-1, 1] with its interval."""


@dataclass(frozen=True)
class PairedDifference(Interval):
    """A mean difference of two columns with its interval."""

    p_value: float | None = None
    """Two-sided, of the hypothesis that the true mean difference is 0; None where there is no interval."""


def rank_correlation(
    x: ArrayLike,
    y: ArrayLike,
    *,
    groups: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Correlation:
    """Spearman's rank correlation with a percentile bootstrap interval.

    ``rho = sum_i (a_i - mean a)(b_i - mean b) / sqrt(sum_i (a_i - mean a)^2 sum_i (b_i - mean b)^2)`` where
    a and b (n,) are the ranks of x and y, ties sharing their average rank (equal to
    ``scipy.stats.spearmanr``). Ranks are taken anew within each resample.

    Args:
        x: First number per row, (n,).
        y: Second number per row, (n,).
        groups: The example each row belongs to, (n,); None if every row is its own.
        confidence: Nominal coverage of the interval, strictly between 0 and 1.
        resamples: Number of bootstrap resamples.
        seed: Seed of the resampling.

    Returns:
        The correlation. With a constant column ``value`` is None; with a single group, or where no
        resample varies, the bounds are None. ``reason`` then says why.

    Raises:
        DataError: If the columns differ in length, are shorter than two rows, or hold NaN, Inf or None.
    """
    x, y = _column("x", x), _column("y", y)
    if len(x) != len(y):
        raise DataError(f"x has {len(x)} row(s) and y {len(y)}; expected one pair per row")
    if len(x) < 2:
        raise DataError(f"a correlation needs at least two rows, got {len(x)}")
    _check(confidence, resamples)
    units = _units(groups, len(x))
    method = "Spearman, percentile bootstrap" + _over(groups)
    for name, column in (("x", x), ("y", y)):
        if (column == column[0]).all():
            return Correlation(
                value=None, low=None, high=None, confidence=confidence, num_points=len(x),
                num_groups=int(units.max()) + 1, resamples=0, dropped=0, method=method,
                reason=f"{name} is constant: all its values share one rank",
            )  # fmt: skip

    def correlations(weights):  # (R, n) -> (R,)
        return _weighted_spearman(x, y, weights)

    draws = _draws(correlations, units, resamples, seed)
    return Correlation(**_interval(correlations, draws, units, confidence), method=method)


def strongest_correlation(
    columns: Mapping[str, ArrayLike],
    y: ArrayLike,
    *,
    groups: Sequence[Hashable] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, float]:
    """Say which of several columns ranks the rows most like y, and how surely.

    Every resample draws groups once for all columns; in it the winner has the largest Spearman correlation with y.
    Shares are over the resamples in which all correlations exist; columns that tie split the resample.

    Args:
        columns: Name -> numbers, (n,) each, over the same rows; turn the sign of those that should fall with y.
        y: What is to be ranked, (n,).
        groups: The example each row belongs to, (n,); None if every row is its own.
        resamples: Number of bootstrap resamples.
        seed: Seed of the resampling.

    Returns:
        Name -> share of the resamples won, in [0, 1]; empty if there is nothing to resample.

    Raises:
        DataError: If the columns differ in length, are shorter than two rows, or hold NaN, Inf or None.
    """
    y = _column("y", y)
    units = _units(groups, len(y))
    draws = []
    for name, column in columns.items():
        x = _column(name, column)
        if len(x) != len(y) or len(y) < 2:
            raise DataError(f"{name} has {len(x)} row(s) and y {len(y)}; expected one pair per row, and two rows")
        draws.append(_draws(lambda weights, x=x: _weighted_spearman(x, y, weights), units, resamples, seed))
    table = np.stack(draws)  # (columns, R)
    table = table[:, ~np.isnan(table).any(axis=0)]
    if not table.shape[1]:
        return {}
    winners = np.isclose(table, table.max(axis=0), rtol=0, atol=1e-12)
    shares = (winners / winners.sum(axis=0)).mean(axis=1)
    return {name: float(share) for name, share in zip(columns, shares, strict=True)}


def bootstrap_mean(
    values: ArrayLike,
    *,
    groups: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """The mean of a column, ``sum_i v_i / n``, with a percentile bootstrap interval.

    For the difference of two methods on the same rows, see :func:`paired_bootstrap`.

    Args:
        values: One number per row, (n,), in any unit; the interval has the same.
        groups: The example each row belongs to, (n,); None if every row is its own.
        confidence: Nominal coverage of the interval, strictly between 0 and 1.
        resamples: Number of bootstrap resamples.
        seed: Seed of the resampling.

    Returns:
        The mean over rows. With a single group the bounds are None and ``reason`` says why.

    Raises:
        DataError: If there is no row, or one holds NaN, Inf or None.
    """
    values = _column("values", values)
    if not len(values):
        raise DataError("a mean needs at least one row, got none")
    _check(confidence, resamples)
    units, means = _units(groups, len(values)), _means(values)
    method = "mean, percentile bootstrap" + _over(groups)
    return Interval(**_interval(means, _draws(means, units, resamples, seed), units, confidence), method=method)


def paired_bootstrap(
    first: ArrayLike,
    second: ArrayLike,
    *,
    groups: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> PairedDifference:
    """The mean difference of two attacks' scores on the same rows, with an interval and a p-value.

    ``d = sum_i (a_i - b_i) / n``. Resamples d*_r draw rows, or whole groups, with replacement; a row keeps its two
    scores together, so what makes an example easy for both attacks cancels. The interval is the percentile one. The
    p-value centres the resamples on the hypothesis of no difference, ``p = (1 + #{r: |d*_r - d| >= |d|}) / (R + 1)``
    (Davison and Hinkley 1997, sections 4.4 and 4.5; Efron and Tibshirani 1993, section 16.4); its least value is
    1 / (R + 1). With fewer than about ten groups both are too sure of themselves, as every bootstrap is.

    Args:
        first: Scores a of the first attack, (n,), in any unit; the difference has the same.
        second: Scores b of the second on the same rows in the same order, (n,).
        groups: The example each row belongs to, (n,); None if every row is its own.
        confidence: Nominal coverage of the interval, strictly between 0 and 1.
        resamples: Number of bootstrap resamples R.
        seed: Seed of the resampling.

    Returns:
        The difference, positive where the first attack scores higher. With a single group the bounds and the
        p-value are None and ``reason`` says why.

    Raises:
        DataError: If the columns differ in length, are empty, or hold NaN, Inf or None.
    """
    first, second = _column("first", first), _column("second", second)
    if len(first) != len(second):
        raise DataError(f"first has {len(first)} row(s) and second {len(second)}; expected one pair per row")
    if not len(first):
        raise DataError("a difference needs at least one row, got none")
    _check(confidence, resamples)
    units, means = _units(groups, len(first)), _means(first - second)
    draws = _draws(means, units, resamples, seed)
    fields = _interval(means, draws, units, confidence)
    observed = abs(fields["value"])
    # Ties are counted, also those that rounding has split.
    as_far = (np.abs(draws - fields["value"]) >= observed * (1 - 1e-12)).sum()
    p_value = float((1 + as_far) / (len(draws) + 1)) if len(draws) else None
    method = "mean difference, paired percentile bootstrap" + _over(groups)
    return PairedDifference(**fields, method=method, p_value=p_value)


def _means(values: NDArray):
    """Return the mean of a column as a statistic of row weights, (R, n) -> (R,)."""
    return lambda weights: weights @ values / weights.sum(axis=1)


def _draws(statistic, units: NDArray, resamples: int, seed: int) -> NDArray:
    """Return a statistic of row weights, (R, n) -> (R,), on every resample; none if there is one group only."""
    num_points, num_groups = len(units), int(units.max()) + 1
    if num_groups == 1:
        return np.empty(0)
    generator, share = np.random.default_rng(seed), np.full(num_groups, 1 / num_groups)
    block = max(1, CHUNK // num_points)
    sizes = [min(block, resamples - start) for start in range(0, resamples, block)]
    times_drawn = (generator.multinomial(num_groups, share, size=size) for size in sizes)  # (R, groups)
    return np.concatenate([statistic(times[:, units].astype(float)) for times in times_drawn])


def _interval(statistic, draws: NDArray, units: NDArray, confidence: float) -> dict:
    """Return the fields of an Interval from the draws of a statistic, NaN where it is undefined."""
    num_points, num_groups = len(units), int(units.max()) + 1
    kept = draws[~np.isnan(draws)]
    low = high = None
    if len(kept):
        low, high = map(float, np.quantile(kept, [(1 - confidence) / 2, (1 + confidence) / 2]))
    reason = "every resample held a constant column" if len(draws) else "one group only: nothing to resample"
    return {
        "value": float(statistic(np.ones((1, num_points)))[0]),
        "low": low,
        "high": high,
        "confidence": confidence,
        "num_points": num_points,
        "num_groups": num_groups,
        "resamples": len(kept),
        "dropped": len(draws) - len(kept),
        "reason": "" if len(kept) else reason,
    }


def _weighted_spearman(x: NDArray, y: NDArray, weights: NDArray) -> NDArray:
    """Return Spearman's correlation per resample, where row i occurs ``weights[r, i]`` times."""
    total = weights.sum(axis=1, keepdims=True)
    mean_rank = (total + 1) / 2
    a, b = (_weighted_ranks(column, weights) - mean_rank for column in (x, y))
    covariance = (weights * a * b).sum(axis=1)
    scale = np.sqrt((weights * a * a).sum(axis=1) * (weights * b * b).sum(axis=1))
    varies = scale > 0
    correlation = np.full(len(weights), np.nan)
    correlation[varies] = np.clip(covariance[varies] / scale[varies], -1, 1)
    return correlation


def _weighted_ranks(column: NDArray, weights: NDArray) -> NDArray:
    """Return the average rank of each row of ``column`` (n,) within each resample, (R, n).

    The copies of a value that occurs c times, with s copies of smaller values, take the ranks
    s + 1 ... s + c: on average s + (c + 1) / 2.
    """
    order = np.argsort(column, kind="stable")
    ordered = column[order]
    first = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])  # where each distinct value starts
    copies = np.add.reduceat(weights[:, order], first, axis=1)
    ranks = np.cumsum(copies, axis=1) - copies + (copies + 1) / 2
    value_index = np.empty(len(column), dtype=int)
    value_index[order] = np.repeat(np.arange(len(first)), np.diff(first, append=len(column)))
    return ranks[:, value_index]


def _units(groups, num_points: int) -> NDArray:
    """Return the number of the group that each row belongs to, (n,), counted from 0."""
    if groups is None:
        return np.arange(num_points)
    if len(groups) != num_points:
        raise DataError(f"groups names {len(groups)} row(s) of {num_points}; expected one example per row")
    if hasattr(groups, "tolist"):  # the elements of a tensor hash by identity
        groups = groups.tolist()
    number: dict[Hashable, int] = {}
    return np.array([number.setdefault(group, len(number)) for group in groups])


def _over(groups) -> str:
    return " over rows" if groups is None else " over groups"


def _column(name: str, values: ArrayLike) -> NDArray:
    """Return a column as float64, refusing what has no rank."""
    column = np.asarray(values, dtype=float)
    if column.ndim != 1:
        raise DataError(f"{name} has shape {column.shape}; expected one number per row, (n,)")
    if not np.isfinite(column).all():
        bad = int((~np.isfinite(column)).sum())
        raise DataError(f"{name} holds {bad} NaN, Inf or missing value(s); leave those rows out of every column")
    return column


def _check(confidence: float, resamples: int) -> None:
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence must lie strictly between 0 and 1, got {confidence}; write 0.95 for 95 %")
    if resamples < 1:
        raise ConfigError(f"resamples must be at least 1, got {resamples}; 2000 is the default")
