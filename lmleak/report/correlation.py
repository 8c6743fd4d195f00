"""Does a prediction rank what attacks recover? Rank correlations, and which prediction ranks best."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text
from scipy.stats import rankdata

from lmleak.metrics.agreement import rank_correlation, strongest_correlation
from lmleak.report.rows import METRICS, PREDICTORS, Row, attack_names, noise_level, number, score

SAME_NOISE = "influence_rms"
"""The prediction whose correlation is also taken within each noise level."""
FEWEST_TO_RANK = 5
"""Examples below which a ranking within one noise level says nothing."""
RESAMPLED_POINTS = 4_000_000
"""Points that one correlation's bootstrap ranks in all; beyond 2000 points it draws fewer than 2000 resamples."""


def correlations(rows: Sequence[Row], seed: int = 0) -> list[dict[str, Any]]:
    """Spearman rank correlation of each prediction with each score of each attack.

    Taken over the noise sweep where there is one, else over every row; the bootstrap draws whole examples,
    because the noise levels of one example are not independent. Over a sweep most of the correlation is the noise
    level's own doing. ``scope`` "same noise" therefore ranks the examples within each level first (stratified
    Spearman): it says whether the prediction tells a risky text from a safer one under equal noise.

    Args:
        rows: Result rows.
        seed: Seed of the bootstrap.

    Returns:
        One entry per (attack, metric, prediction, scope): ``value``, ``low``, ``high`` (None with the reason in
        ``note`` where no rank correlation exists), ``points`` and ``examples``.
    """
    sweep = [row for row in rows if noise_level(row) is not None]
    basis = sweep or list(rows)
    stratified = len({row["example"] for row in sweep}) >= FEWEST_TO_RANK
    found = []
    for attack in attack_names(rows):
        for metric in METRICS:
            for predictor in PREDICTORS:
                points = [
                    (noise_level(row), row["example"], x, y)
                    for row in basis
                    if (x := number(row.get(predictor))) is not None and (y := score(row, attack, metric)) is not None
                ]
                entry = {"attack": attack, "metric": metric, "predictor": predictor}
                if points:
                    found.append(entry | {"scope": "all"} | _correlation(points, seed))
                if points and predictor == SAME_NOISE and stratified:
                    found.append(entry | {"scope": "same noise"} | _correlation(_ranked_within_levels(points), seed))
    return found


def _correlation(points: Sequence[tuple[float | None, int, float, float]], seed: int) -> dict[str, Any]:
    examples = [example for _, example, _, _ in points]
    entry = {"value": None, "low": None, "high": None, "points": len(points), "examples": len(set(examples))}
    if len(points) < 3:
        return entry | {"note": "too few points"}
    xs, ys = [x for *_, x, _ in points], [y for *_, y in points]
    for what, column in (("prediction", xs), ("score", ys)):
        if min(column) == max(column):
            return entry | {"note": f"constant {what}"}
    resamples = min(2000, max(500, RESAMPLED_POINTS // len(points)))
    found = rank_correlation(xs, ys, groups=examples, seed=seed, resamples=resamples)
    if found.value is None or found.low is None or found.high is None:
        return entry | {"value": found.value, "note": found.reason}
    return entry | {"value": found.value, **around(found.value, found.low, found.high), "note": ""}


def _ranked_within_levels(points: Sequence[tuple[float | None, int, float, float]]) -> list:
    # levels at which every example scores the same (all recovered, or none) say nothing about their order
    ranked = []
    for level in dict.fromkeys(level for level, *_ in points):
        _, examples, xs, ys = zip(*(point for point in points if point[0] == level), strict=True)
        if min(ys) < max(ys) and min(xs) < max(xs):
            ranks = [(rankdata(column) - 0.5) / len(column) for column in (xs, ys)]
            ranked += zip([level] * len(examples), examples, *(column.tolist() for column in ranks), strict=True)
    return ranked


def best_predictors(rows: Sequence[Row], seed: int = 0) -> list[dict[str, Any]]:
    """Say which prediction ranks each score of each attack best, over the rows of the sweep that have them all.

    Predictions that are absent or constant throughout cannot rank and take no part.

    Args:
        rows: Result rows.
        seed: Seed of the bootstrap, which draws whole examples, the same ones for all predictions.

    Returns:
        One entry per (attack, metric) where it can be said: ``predictor``, ``share`` of the resamples it won,
        ``shares`` of all, ``points``.
    """
    found = []
    sweep = [row for row in rows if noise_level(row) is not None]
    varying = [p for p in PREDICTORS if len({number(row.get(p)) for row in sweep} - {None}) > 1]
    complete = [row for row in sweep if all(number(row.get(p)) is not None for p in varying)]
    for attack in attack_names(rows):
        for metric, kind in METRICS.items():
            scored = [row for row in complete if score(row, attack, metric) is not None]
            ys = [score(row, attack, metric) for row in scored]
            if len(scored) < 3 or min(ys) == max(ys) or not varying:
                continue
            sign = -1.0 if kind.leaks_upward else 1.0  # a prediction is an error: leakage falls with it
            columns = {p: [sign * number(row[p]) for row in scored] for p in varying}
            resamples = min(2000, max(500, RESAMPLED_POINTS // len(scored)))
            shares = strongest_correlation(
                columns, ys, groups=[row["example"] for row in scored], resamples=resamples, seed=seed
            )
            if shares:
                winner = max(shares, key=shares.get)
                found.append({"attack": attack, "metric": metric, "predictor": winner, "share": shares[winner],
                              "shares": shares, "points": len(scored)})  # fmt: skip
    return found


def around(value: float, low: float, high: float) -> dict[str, float]:
    """Return an interval's ends with the value inside: percentiles of few or skewed resamples can miss it."""
    return {"low": min(low, value), "high": max(high, value)}


def correlation_table(rows: Sequence[Row], meta: Mapping[str, Any]) -> Table:
    """Build the table of a study: rank correlation of each prediction with each score of each attack.

    Args:
        rows: Result rows.
        meta: Description of the run; its seed is the bootstrap's.

    Returns:
        A rich table: value and 95 % bootstrap interval over examples, and the prediction that ranks best over the
        rows that have them all, with the share of bootstrap resamples in which it does.
    """
    found = correlations(rows, int(meta.get("seed") or 0))
    best = {(b["attack"], b["metric"]): b for b in best_predictors(rows, int(meta.get("seed") or 0))}
    predictors = list(dict.fromkeys((c["predictor"], c["scope"]) for c in found))
    table = Table(title="Spearman rank correlation over noise levels and examples, 95 % interval")
    for column in ("attack", "score"):
        table.add_column(column)
    for predictor, scope in predictors:
        table.add_column(predictor.removesuffix("_rms") + ("" if scope == "all" else f", {scope}"), justify="right")
    table.add_column("best (resamples won)")
    for attack, metric in dict.fromkeys((c["attack"], c["metric"]) for c in found):
        by_predictor = {
            (c["predictor"], c["scope"]): c for c in found if c["attack"] == attack and c["metric"] == metric
        }
        cells = [_correlation_cell(by_predictor.get(predictor)) for predictor in predictors]
        winner = best.get((attack, metric))
        won = "–" if winner is None else f"{winner['predictor'].removesuffix('_rms')} ({winner['share']:.0%})"
        table.add_row(Text(attack), METRICS[metric].label, *cells, won)
    return table


def _correlation_cell(entry: Mapping[str, Any] | None) -> str:
    if entry is None or entry["value"] is None:
        return "–"
    if entry["low"] is None:
        return f"{entry['value']:+.2f}"
    return f"{entry['value']:+.2f} ({entry['low']:+.2f} to {entry['high']:+.2f})"
