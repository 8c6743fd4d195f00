"""What each metric says about the order of layers: which to hide first, and how far the metrics agree."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, permutations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from lmleak.evaluation.layers import ALL, Row
from lmleak.metrics.agreement import rank_correlation

EXACT_LAYERS, DRAWN_ORDERS = 7, 9_999


@dataclass(frozen=True)
class LayerMetric:
    """One number per layer by which layers can be ordered."""

    title: str
    """For people."""
    unit: str
    """Of the number; empty if it has none."""
    group: str
    """Which rows hold it."""
    column: str
    """Under which name."""
    about: str
    """"original" (the input) or "latent" (an attribute)."""
    rising: bool = True
    """Whether a larger number means that the layer leaks more."""
    interval: bool = False
    """Whether the rows hold <column>_low and <column>_high, or low and high where ``group`` is an information."""


METRICS: dict[str, LayerMetric] = {
    "sensitivity": LayerMetric(
        "sensitivity", "gradient / input", "sensitivity", "frobenius", "original", interval=True
    ),
    "sensitivity-per-element": LayerMetric(
        "sensitivity per element", "gradient / input", "sensitivity", "per_element", "original", interval=True
    ),
    "sensitivity-relative": LayerMetric(
        "relative sensitivity", "", "sensitivity", "relative", "original", interval=True
    ),
    "only": LayerMetric(
        "MAP error, this layer alone", "input, rms", "influence", "only_error_rms", "original", rising=False,
        interval=True,
    ),
    "without": LayerMetric(
        "MAP error, all layers but this", "input, rms", "influence", "without_error_rms", "original", interval=True
    ),
    "original": LayerMetric("information about the input", "nats", "original", "nats", "original", interval=True),
    "subspace": LayerMetric("subspace distance", "z", "subspace", "z", "latent"),
    "mean-difference": LayerMetric("mean difference", "pseudo-F", "mean-difference", "ratio", "latent"),
    "discrepancy": LayerMetric("MMD²", "", "discrepancy", "squared", "latent"),
    "latent": LayerMetric("information about the attribute", "nats", "latent", "nats", "latent", interval=True),
}  # fmt: skip
"""Every metric by which layers are ordered. A shares-of-trace column would order them as "sensitivity" does."""


@dataclass(frozen=True)
class LayerScores:
    """One metric of one target, for every layer."""

    name: str
    """Metric, and behind a colon its target where there is one: "latent:topic"."""
    metric: LayerMetric
    target: str | None
    family: str | None
    """Of an information: the largest family measured."""
    values: Mapping[str, float]
    """Layer, in forward order -> number."""

    def row(self, rows: Sequence[Row], layer: str) -> Row:
        """Return the row that holds one layer's number."""
        wanted = (layer, self.metric.group, self.target, self.family)
        return next(row for row in rows if (row["layer"], row["group"], row["target"], row["family"]) == wanted)

    def leak(self) -> list[float]:
        """Return the numbers, turned so that larger means more leakage."""
        return [value if self.metric.rising else -value for value in self.values.values()]

    def order(self) -> tuple[str, ...]:
        """Return the layers, the one that leaks most first; of equal ones that nearer to the input."""
        ranked = sorted(zip(self.leak(), self.values, strict=True), key=lambda pair: -pair[0])
        return tuple(layer for _, layer in ranked)


def layer_scores(rows: Sequence[Row]) -> list[LayerScores]:
    """Return every metric that the rows hold for all layers.

    A metric that does not exist for a layer (a z-score whose null does not vary) orders nothing and is left out. Where
    several families were measured the largest counts.

    Args:
        rows: Of :meth:`lmleak.evaluation.layers.LayerAnalysis.rows`, of all measures.

    Returns:
        The metrics, in the order of ``METRICS``.
    """
    layers = [row["layer"] for row in sorted(rows, key=lambda r: r["place"]) if row["layer"] != ALL]
    layers, found = list(dict.fromkeys(layers)), []
    for name, metric in METRICS.items():
        of_group = [row for row in rows if row["group"] == metric.group and row["layer"] != ALL]
        for target in dict.fromkeys(row["target"] for row in of_group):
            families = [row["family"] for row in of_group if row["target"] == target]
            values = {
                row["layer"]: row[metric.column]
                for row in of_group
                if row["target"] == target and row["family"] == families[-1]
            }
            if all(values.get(layer) is not None for layer in layers):
                full = name if target is None else f"{name}:{target}"
                ordered = {layer: values[layer] for layer in layers}
                found.append(LayerScores(full, metric, target, families[-1], ordered))
    return found


def rank_agreement(scores: Sequence[LayerScores], *, seed: int = 0) -> list[dict[str, Any]]:
    """Return Spearman's rank correlation over layers of every pair of metrics, larger meaning more leakage in both.

    The 95 % percentile bootstrap interval is over layers: it asks what other layers might say. Of a handful of layers
    it says little (four in the same order give [1, 1]), so the two-sided p-value against random orders of the layers
    stands beside it: all orders of up to seven layers, else 9,999 drawn ones and the one observed.

    Args:
        scores: The metrics.
        seed: Seed of the bootstrap and of the orders.

    Returns:
        One entry per pair: ``first``, ``second``, ``layers``, ``value``, ``low``, ``high``, ``p_value`` and, where
        something is None, the ``note`` why.
    """
    found = []
    for a, b in combinations(scores, 2):
        entry = {"first": a.name, "second": b.name, "layers": len(a.values)}
        if len(a.values) < 3:
            empty = dict.fromkeys(("value", "low", "high", "p_value"))
            found.append(entry | empty | {"note": "fewer than three layers"})
            continue
        c = rank_correlation(a.leak(), b.leak(), seed=seed)
        p = None if c.value is None else _p_value(a.leak(), b.leak(), seed)
        found.append(entry | {"value": c.value, "low": c.low, "high": c.high, "p_value": p, "note": c.reason})
    return found


def _p_value(a: Sequence[float], b: Sequence[float], seed: int) -> float:
    """Return how often random orders of the layers correlate as strongly, in either direction."""
    first, second = (rankdata(values) - (len(a) + 1) / 2 for values in (a, b))
    reached = np.abs(first[_orders(len(a), seed)] @ second) >= np.abs(first @ second) - 1e-9
    return float(reached.mean())


@lru_cache(maxsize=1)  # the same for every pair of metrics
def _orders(layers: int, seed: int) -> NDArray:
    """Return all orders of a few layers, or of many the one observed and random ones, (orders, layers)."""
    if layers <= EXACT_LAYERS:
        return np.array(list(permutations(range(layers))))
    generator = np.random.default_rng(seed)
    return np.stack([np.arange(layers), *(generator.permutation(layers) for _ in range(DRAWN_ORDERS))])
