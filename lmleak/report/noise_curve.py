"""The figure of risk against noise: two axes over one sweep."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lmleak.report.drawing import ATTACK_COLOURS, BLUE, GREY, GRID, INK, SKY, VERMILION, house_style
from lmleak.report.rows import (
    METRICS,
    Row,
    attack_names,
    by_noise,
    has_score,
    is_undefended,
    numbers,
    quartiles,
    score,
)

PREDICTED = {  # field: (label, colour, dash, marker)
    "influence_rms": ("I2F of the noise drawn", BLUE, "-", "o"),
    "lower_bound_rms": ("I2F lower bound", SKY, "--", "v"),
    "bayes_rms": ("attacker with a Gaussian prior", INK, ":", "s"),
    "predicted_rms": (
        "attacker with a Gaussian prior",
        INK,
        ":",
        "s",
    ),  # of this noise, where no average is known
}
MEASURED = {  # attacks take the colours in turn; the score decides dash and marker
    "token_recall": ("-", "D"),
    "rouge1": ("--", "^"),
}
RMS_LABEL = "predicted error\n(RMS per coordinate, input units)"


def noise_figure(rows: Sequence[Row]) -> Figure | None:
    """Draw risk against noise: predicted error on the left axis, attack scores on the right axis.

    Lines are medians over examples with the interquartile band for predictions, and means for scores.
    The undefended gradient stands left of a break in the axis.

    Args:
        rows: Result rows.

    Returns:
        The figure, or None without a noise sweep.
    """
    levels = by_noise(rows)
    predicted = any(value > 0 for group in levels.values() for name in PREDICTED for value in numbers(group, name))
    undefended = [row for row in rows if is_undefended(row)]
    bare = bool(levels) and any(has_score(undefended, metric) for metric in MEASURED)
    attacked = bare or any(has_score(group, metric) for group in levels.values() for metric in MEASURED)
    if not levels or not (predicted or attacked):
        return None
    with house_style():
        figure = Figure(figsize=(9.2, 5.0), layout="constrained")
        left = figure.add_subplot(xscale="log", yscale="log")
        right = left.twinx()
        for field, (label, colour, dash, marker) in PREDICTED.items():
            if field == "predicted_rms" and numbers(rows, "bayes_rms"):
                continue
            _prediction(left, levels, field, label, colour, dash, marker)
        spreads = numbers(rows, "prior_std")
        if spreads:
            middle = quartiles(spreads)[1]
            left.axhline(middle, color=GREY, linewidth=1.4, linestyle=(0, (1, 3)), label="spread of the inputs")
        for attack, colour in zip(attack_names(rows), ATTACK_COLOURS, strict=False):
            for metric, (dash, marker) in MEASURED.items():
                _measurement(right, levels, undefended, attack, metric, colour, dash, marker)
        left.set_xlabel("standard deviation of the Gaussian noise (multiples of the gradient's RMS)")
        left.set_ylabel(RMS_LABEL, color=BLUE)
        right.set_ylabel("text recovered by the attack\n(share, 0 to 1)", color=VERMILION)
        left.spines["left"].set_color(BLUE)
        right.spines["right"].set_color(VERMILION)
        left.tick_params(axis="y", which="both", colors=BLUE)
        right.tick_params(axis="y", which="both", colors=VERMILION)
        right.set_ylim(-0.03, 1.06)
        left.grid(axis="x", color=GRID, linewidth=0.8)
        _place_levels(left, levels, bare)
        left.yaxis.set_visible(predicted)
        right.yaxis.set_visible(attacked)
        right.spines["right"].set_visible(attacked)
        _legends_below(figure, left, right)
    return figure


def _prediction(
    axes: Axes,
    levels: Mapping[float, Sequence[Row]],
    field: str,
    label: str,
    colour: str,
    dash: str,
    marker: str,
) -> None:
    spread = {
        level: quartiles(values)
        for level, group in levels.items()
        if (values := [value for value in numbers(group, field) if value > 0])
    }
    if not spread:
        return
    low, middle, high = zip(*spread.values(), strict=True)
    bounds = [
        any(row.get("influence_converged") is False for row in levels[level]) and field == "influence_rms"
        for level in spread
    ]
    axes.fill_between(list(spread), low, high, color=colour, alpha=0.13, linewidth=0)
    axes.plot(list(spread), middle, color=colour, linestyle=dash, marker=marker, markersize=5, label=label)
    at_least = [(level, value) for level, value, bound in zip(spread, middle, bounds, strict=True) if bound]
    if at_least:
        axes.plot(
            *zip(*at_least, strict=True), linestyle="none", marker="^", markersize=10, markerfacecolor="white",
            markeredgecolor=colour, label="≥ : solve stopped early", zorder=4,
        )  # fmt: skip


def _measurement(
    axes: Axes, levels: Mapping[float, Sequence[Row]], undefended: Sequence[Row],
    attack: str, metric: str, colour: str, dash: str, marker: str,
) -> None:  # fmt: skip
    line = {level: mean for level, group in levels.items() if (mean := _mean_score(group, attack, metric)) is not None}
    without = _mean_score(undefended, attack, metric)
    label = f"{attack}: {METRICS[metric].label}"
    look = {"color": colour, "marker": marker, "markersize": 5.5, "markerfacecolor": "white"}
    if line:
        axes.plot(list(line), list(line.values()), linestyle=dash, label=label, **look)
    if without is not None:
        axes.plot(
            [_undefended_place(levels)],
            [without],
            linestyle="none",
            label=None if line else label,
            clip_on=False,
            **look,
        )


def _mean_score(rows: Sequence[Row], attack: str, metric: str) -> float | None:
    values = [value for row in rows if (value := score(row, attack, metric)) is not None]
    return sum(values) / len(values) if values else None


def _undefended_place(levels: Mapping[float, Sequence[Row]]) -> float:
    return min(levels) / 6


def _place_levels(axes: Axes, levels: Mapping[float, Sequence[Row]], undefended: bool) -> None:
    """Name the noise levels, and left of a break the undefended gradient, which a logarithmic axis cannot hold."""
    place, ends = _undefended_place(levels), (min(levels), max(levels))
    axes.set_xlim((place if undefended else ends[0]) / 1.6, ends[1] * 1.6)
    decades = [10.0**power for power in range(-12, 13) if ends[0] * 0.99 <= 10.0**power <= ends[1] * 1.01]
    ticks = decades if len(decades) > 1 else sorted(levels)
    axes.set_xticks(ticks, [f"{level:g}" for level in ticks])
    axes.minorticks_off()
    if not undefended:
        return
    axes.set_xticks([place, *ticks], ["no\nnoise", *(f"{level:g}" for level in ticks)])
    axes.text(
        place * 2.4, 0, "//", transform=axes.get_xaxis_transform(), ha="center", va="center", fontsize=12, color=GREY,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6}, zorder=5,
    )  # fmt: skip


def _legends_below(figure: Figure, left: Axes, right: Axes) -> None:
    """Put the two axes' legends side by side, each under its own heading, so that no line is looked for on both."""
    for axes, side, heading in (
        (left, "left", "left axis (prediction)"),
        (right, "right", "right axis (attack)"),
    ):
        if axes.get_legend_handles_labels()[0]:
            handles, labels = axes.get_legend_handles_labels()
            look = {"title": heading, "alignment": "left", "ncols": 1 + (len(labels) > 4)}
            legend = figure.legend(handles, labels, loc=f"outside lower {side}", **look)
            legend.get_title().set_fontweight("bold")
