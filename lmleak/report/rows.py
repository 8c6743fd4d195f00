"""Reading result rows: one place that knows their schema, missing values and order."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

from lmleak.errors import ConfigError
from lmleak.lookup import lookup

Row = Mapping[str, Any]
"""One line of results.jsonl: one gradient ("example") under one defense."""

UNDEFENDED = frozenset({"none", "clean", "undefended", ""})


@dataclass(frozen=True)
class Metric:
    """How an attack's score is named and which way it points."""

    label: str
    leaks_upward: bool = True
    """Larger means that more leaked; an error points the other way."""


METRICS = {
    "token_recall": Metric("token recall"),
    "token_precision": Metric("token precision"),
    "token_f1": Metric("token F1"),
    "position_accuracy": Metric("position accuracy"),
    "exact_match": Metric("exact match"),
    "rouge1": Metric("ROUGE-1"),
    "rouge2": Metric("ROUGE-2"),
    "rougeL": Metric("ROUGE-L"),
    "google_bleu": Metric("Google BLEU"),
    "edit_distance": Metric("edit distance", leaks_upward=False),
    "embedding_rmse": Metric("embedding RMSE", leaks_upward=False),
    "feature_mse": Metric("feature MSE", leaks_upward=False),
}

PREDICTORS = {
    "influence_rms": "I2F",
    "lower_bound_rms": "I2F lower bound",
    "expected_rms": "expected I2F",
    "predicted_rms": "predicted RMSE",
}
CONVERGED = {
    "influence_rms": "influence_converged",
    "predicted_rms": "predicted_converged",
    "expected_rms": "expected_converged",
    "bayes_rms": "bayes_converged",
}
"""Predictions that come from an iteration, and the field that says whether it converged."""


def risk_metric(meta: Mapping[str, Any]) -> str:
    """Return the score, a share in [0, 1], that the verdict is spoken in.

    Args:
        meta: The run's description; ``metric_of_risk`` defaults to "token_recall".

    Returns:
        A key of ``METRICS``.

    Raises:
        ConfigError: If the metric is unknown or is an error instead of a share of the text.
    """
    name = meta.get("metric_of_risk") or "token_recall"
    if not lookup("metric of risk", name, METRICS).leaks_upward:
        raise ConfigError(
            f"metric_of_risk={name!r} is an error without a scale. Write a share of the text instead, "
            "such as 'token_recall' or 'rouge1'"
        )
    return name


def number(value: Any) -> float | None:
    """Return a finite float, or None for anything that carries no number (null, NaN, infinity)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def numbers(rows: Iterable[Row], field: str) -> list[float]:
    """Return the values of one field over the rows that have it."""
    return [value for row in rows if (value := number(row.get(field))) is not None]


def score(row: Row, attack: str, metric: str) -> float | None:
    """Return what an attack scored on a row; None where it was not run, was refused or has no such score."""
    return number((row.get("attacks") or {}).get(attack, {}).get(metric))


def has_score(rows: Iterable[Row], metric: str) -> bool:
    """Return whether any attack was scored by a metric on any of the rows."""
    return any(score(row, attack, metric) is not None for row in rows for attack in row.get("attacks") or {})


def refusal(row: Row, attack: str) -> str | None:
    """Return why an attack was refused on a row, or None if it ran or was not asked for."""
    return (row.get("attacks") or {}).get(attack, {}).get("refused")


def is_undefended(row: Row) -> bool:
    """Return whether the row is the true gradient, released as it is."""
    return str(row["defense"]).strip().lower() in UNDEFENDED


def noise_level(row: Row) -> float | None:
    """Return the noise of a sweep row in multiples of the gradient's RMS; None for every other row."""
    level = number(row.get("noise_rms"))
    return level if level is not None and level > 0 else None


def display_name(defense: str, noise: float | None = None) -> str:
    """Return the defense as a reader should see it; a level of the noise sweep by its noise alone."""
    if noise is not None:
        return f"noise {noise:g}×"
    return "no defense" if str(defense).strip().lower() in UNDEFENDED else str(defense)


def by_defense(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Group rows by defense: the undefended gradient, what the owner asked for, then the sweep by noise.

    Args:
        rows: Result rows in any order.

    Returns:
        Rows per defense, by example number within each.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["defense"], []).append(row)

    def order(item: tuple[str, list[Row]]) -> tuple[int, float]:
        head = item[1][0]
        if is_undefended(head):
            return 0, 0.0
        return (2, noise_level(head) or 0.0) if head.get("sweep") else (1, 0.0)

    return {name: sorted(group, key=lambda row: row["example"]) for name, group in sorted(groups.items(), key=order)}


def by_noise(rows: Sequence[Row]) -> dict[float, list[Row]]:
    """Group the rows of the noise sweep by noise level, smallest first."""
    levels = sorted({level for row in rows if (level := noise_level(row)) is not None})
    return {level: [row for row in rows if noise_level(row) == level] for level in levels}


def attack_names(rows: Sequence[Row]) -> list[str]:
    """Return every attack that ran or was refused, in order of appearance."""
    return list(dict.fromkeys(name for row in rows for name in row.get("attacks") or {}))


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the lower quartile, the median and the upper quartile (inclusive method)."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, _, high = quantiles(values, n=4, method="inclusive")
    return low, median(values), high


def compact(value: float | None, digits: int = 2) -> str:
    """Return a number for a table cell: few significant digits, no needless zeros, a dash if missing."""
    value = number(value)
    if value is None:
        return "–"
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e4:
        return f"{value:.{digits}g}" if abs(value) < 10**digits - 0.5 else f"{value:.0f}"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def bracketed(low: float, high: float, write: Callable[[float], str] = compact) -> str:
    """Return an interval as it follows a number in a table cell, in small print, as HTML."""
    return f" <small>[{write(low)}, {write(high)}]</small>"


def percent(value: float | None) -> str:
    """Return a share as a whole percentage that never rounds a part up to all, or something down to nothing."""
    value = number(value)
    if value is None:
        return "–"
    if 0.995 <= value < 1:
        return ">99%"
    if 0 < value < 0.005:
        return "<1%"
    return f"{100 * value:.0f}%"
