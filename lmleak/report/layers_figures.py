"""Figures of a layer-wise audit: every metric over the network, their agreement, and what hiding layers leaves."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lmleak.evaluation.layers_order import LayerScores
from lmleak.evaluation.layers_protection import Curves
from lmleak.evaluation.layers_settings import ALL, Row
from lmleak.report.drawing import BLUE, GREY, INK, ORANGE, PURPLE, SKY, VERMILION, house_style, light_grid, whiskers

COLUMNS = 3
"""Panels side by side."""
PANEL = {"original": BLUE, "latent": PURPLE}
LINES = (VERMILION, BLUE, ORANGE, PURPLE, SKY, INK, GREY)
MARKERS = "osD^vPX"
SHOWN_SCORES = ("token_recall", "rmse")
"""The score of an attack that is drawn: the first of these that it has."""
SCORE_LABELS = {
    "token_recall": "tokens recovered (share, 0 to 1)",
    "rmse": "error (model-input units, rms)",
}


def layer_bars(scores: Sequence[LayerScores], rows: Sequence[Row]) -> Figure | None:
    """Draw every metric as bars over the layers, in the network's order from the top.

    Blue: about the input; purple: about an attribute. Whiskers are 95 % intervals, over examples for sensitivity and
    MAP error, over gradients for information; comparisons of attribute values have none and are drawn as z or ratio.

    Args:
        scores: The metrics.
        rows: The rows they came from, for intervals.

    Returns:
        The figure, or None if there is no metric.
    """
    if not scores:
        return None
    layers = list(scores[0].values)
    height = 0.85 + 0.24 * len(layers)
    count = -(-len(scores) // COLUMNS)
    with house_style():
        figure = Figure(figsize=(11.2, 0.3 + height * count), layout="constrained")
        grid = figure.subplots(count, COLUMNS, sharey=True, squeeze=False)
        for axes, score in zip(grid.flat, scores, strict=False):
            _bars(axes, score, rows, layers)
        for axes in grid.flat[len(scores) :]:
            axes.set_visible(False)
        for axes in grid[:, 0]:
            axes.set_yticks(range(len(layers)), layers)
        grid[0, 0].invert_yaxis()
        return _settled(figure)


def _bars(axes: Axes, score: LayerScores, rows: Sequence[Row], layers: Sequence[str]) -> None:
    values = [score.values[layer] for layer in layers]
    ends = [interval_of(score, rows, layer) for layer in layers]
    known = [(value, value) if None in pair else pair for value, pair in zip(values, ends, strict=True)]
    reach = whiskers(values, *zip(*known, strict=True))
    drawn = {"xerr": reach, "error_kw": {"ecolor": INK, "capsize": 2}} if reach.any() else {}
    axes.barh(range(len(layers)), values, color=PANEL[score.metric.about], height=0.7, **drawn)
    unit = f" ({score.metric.unit})" if score.metric.unit else ""
    axes.set_xlabel(f"{score.metric.title}{unit}" + (f": {score.target}" if score.target else ""), fontsize=9.5)
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.tick_params(labelsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.spines["right"].set_visible(False)
    light_grid(axes, "x")
    if not score.metric.rising:
        axes.set_title("less means more leaked", fontsize=9, fontweight="normal", color=GREY)


def interval_of(score: LayerScores, rows: Sequence[Row], layer: str) -> tuple[float | None, float | None]:
    """Return the 95 % interval of one metric of one layer; None where there is none."""
    if not score.metric.interval:
        return None, None
    row = score.row(rows, layer)
    prefix = "" if score.metric.group in ("latent", "original") else f"{score.metric.column}_"
    return row[f"{prefix}low"], row[f"{prefix}high"]


def agreement_matrix(scores: Sequence[LayerScores], agreement: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Draw Spearman's rank correlation over the layers for every pair of metrics.

    Bold where a permutation of the layers reaches it in less than one case in twenty.

    Args:
        scores: The metrics.
        agreement: Of :func:`lmleak.evaluation.layers_order.rank_agreement`.

    Returns:
        The figure, or None if no pair has a correlation.
    """
    names = [score.name for score in scores]
    if not any(entry["value"] is not None for entry in agreement):
        return None
    size = 1.6 + 0.55 * len(names)
    with house_style():
        figure = Figure(figsize=(size + 1.4, size), layout="constrained")
        axes = figure.add_subplot()
        matrix = np.full((len(names), len(names)), np.nan)
        np.fill_diagonal(matrix, 1)
        for entry in agreement:
            if entry["value"] is None:
                continue
            i, j = names.index(entry["first"]), names.index(entry["second"])
            matrix[i, j] = matrix[j, i] = entry["value"]
            sure = entry["p_value"] <= 0.05
            for a, b in ((i, j), (j, i)):
                axes.text(
                    b, a, f"{entry['value']:+.1f}".replace("-", "−"), ha="center", va="center", fontsize=8.5,
                    fontweight="bold" if sure else "normal", color="white" if abs(entry["value"]) > 0.7 else INK,
                )  # fmt: skip
        image = axes.imshow(matrix, cmap="RdBu", vmin=-1, vmax=1)
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor", fontsize=9)
        axes.set_yticks(range(len(names)), names, fontsize=9)
        bar = figure.colorbar(image, shrink=0.7)
        bar.set_label("Spearman's rank correlation over layers (−1 to 1)")
        return _settled(figure)


def residual_curves(curves: Curves) -> Figure | None:
    """Draw what is left when the first k layers of each order are hidden: information and attacks.

    A panel about an attribute leaves out the orders that other attributes give, a panel about the input those of all
    attributes; the table has them all, and the intervals, which would cover one another here. A cross below zero is an
    attack that cannot run.

    Args:
        curves: Of :func:`lmleak.evaluation.layers_protection.curves`.

    Returns:
        The figure, or None if nothing was hidden.
    """
    panels = residual_panels(curves)
    if not panels:
        return None
    styles = dict(zip(curves, zip(cycle(LINES), cycle(MARKERS), cycle(("-", "--", ":"))), strict=False))
    count = -(-len(panels) // 2)
    with house_style():
        figure = Figure(figsize=(11.2, 3.3 * count + 0.5 + 0.09 * len(curves)), layout="constrained")
        grid = figure.subplots(count, 2, squeeze=False)
        for axes, panel in zip(grid.flat, panels, strict=False):
            for name in panel.orders:
                colour, marker, dash = styles[name]
                points = [(k, value) for k, _, row in curves[name] if (value := panel.value(row)) is not None]
                axes.plot(
                    [k for k, _ in points], [value for _, value in points], color=colour, marker=marker,
                    linestyle=dash, linewidth=1.3, markersize=5, alpha=0.85, label=name,
                )  # fmt: skip
            _axes_of_panel(axes, panel, curves)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        found = {}
        for axes in grid.flat:
            found |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        figure.legend(
            found.values(), found.keys(), loc="outside lower left", ncols=4, title="order of hiding", fontsize=9
        )  # fmt: skip
        return _settled(figure)


def _settled(figure: Figure) -> Figure:
    """Return the figure with its layout computed once, which would otherwise be done again for every file."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


def _axes_of_panel(axes: Axes, panel: "Panel", curves: Curves) -> None:
    stopped = sorted({k for name in panel.orders for k, _, row in curves[name] if panel.refused(row)})
    low, high = axes.get_ylim()
    top = 1.05 if panel.share else high + 0.05 * (high - min(low, 0))
    if stopped:
        axes.plot(stopped, [-0.06 * top] * len(stopped), linestyle="none", marker="x", color=INK, label="cannot run")
    axes.set_ylim(min(low if low < 0 else 0, -0.12 * top if stopped else 0), top)
    axes.set_xlabel("layers hidden (count)")
    axes.set_ylabel(panel.label, fontsize=9.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines["right"].set_visible(False)
    light_grid(axes)


@dataclass(frozen=True)
class Panel:
    """One number that is left when layers are hidden."""

    label: str
    orders: tuple[str, ...]
    """Whose curves are drawn."""
    value: Callable[[Row], float | None]
    refused: Callable[[Row], bool] = lambda row: False
    share: bool = False
    """Whether it lies in [0, 1]."""


def residual_panels(curves: Curves) -> list[Panel]:
    """Return the panels of residual risk: one per attribute, per original and per attack."""
    steps = next(iter(curves.values()), [])
    if len(steps) < 2:
        return []
    row = steps[0][2]
    about = lambda name: name.partition(":")[2]
    of_input = tuple(name for name in curves if about(name) not in row["latent"])
    panels = []
    for name in row["latent"]:
        orders = tuple(order for order in curves if about(order) in ("", name))
        panels.append(Panel(
            f"information left about {name} (nats)", orders, lambda row, name=name: row["latent"][name]["nats"]
        ))  # fmt: skip
    for name in row["original"]:
        panels.append(Panel(
            f"information left about {name} (nats)", of_input, lambda row, name=name: row["original"][name]["nats"]
        ))  # fmt: skip
    for spec in row["attacks"]:
        every = [r["attacks"][spec] for curve in curves.values() for _, _, r in curve]
        shown = next((score for score in SHOWN_SCORES if any(each.get(score) is not None for each in every)), None)
        if shown:
            panels.append(Panel(
                f"{SCORE_LABELS[shown]}\n{spec}, {mean_of(every)}", of_input,
                lambda row, spec=spec, shown=shown: row["attacks"][spec].get(shown),
                refused=lambda row, spec=spec: "refused" in row["attacks"][spec], share=shown == "token_recall",
            ))  # fmt: skip
    return panels


def mean_of(attacked: Sequence[Mapping[str, Any]]) -> str:
    """Return in words over how many examples the outcomes of an attack are means."""
    counts = {each["examples"] for each in attacked if "examples" in each}
    if not counts:
        return "cannot run"
    count = max(counts)  # the same for every set of hidden layers
    return f"mean of {count} example{'s' * (count != 1)}"


def whole_information(rows: Sequence[Row]) -> dict[tuple[str, str], Row]:
    """Return the rows of all layers together, by group and target; of the largest family measured."""
    return {(row["group"], row["target"]): row for row in rows if row["layer"] == ALL}
