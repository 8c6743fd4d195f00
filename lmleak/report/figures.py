"""The report's figures, drawn with matplotlib's object interface (no pyplot, no global state).

Every function returns None where the rows hold nothing to draw; ``missing`` says why in words.
Lines differ in dash and marker as well as in colour, so that a grey print reads.
"""

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lmleak.metrics.agreement import bootstrap_mean
from lmleak.report.drawing import ATTACK_COLOURS, BLUE, GREY, INK, house_style, light_grid
from lmleak.report.noise_curve import noise_figure
from lmleak.report.rows import (
    Row,
    attack_names,
    by_noise,
    has_score,
    is_undefended,
    noise_level,
    number,
    score,
)


def layer_figure(rows: Sequence[Row]) -> Figure | None:
    """Draw where in the model the information about the input sits: each layer's share of tr(J Jᵀ).

    Bars are means over examples; whiskers are the 95 % bootstrap interval over examples or, with one example,
    two standard errors of the trace estimate.

    Args:
        rows: Result rows; one row per example is used, since the split does not depend on the noise.

    Returns:
        The figure, or None if no row has a split.
    """
    chosen = layer_rows(rows)
    if not chosen:
        return None
    names = list(dict.fromkeys(name for row in chosen for name in row["layer_share"]))
    means, below, above = [], [], []
    for name in names:
        values = [100 * (number(row["layer_share"].get(name)) or 0.0) for row in chosen]
        mean = sum(values) / len(values)
        low, high = _whiskers(chosen, name, values)
        means.append(mean)
        below.append(max(mean - low, 0.0))
        above.append(max(high - mean, 0.0))
    with house_style():
        figure = Figure(figsize=(9.2, 1.3 + 0.34 * len(names)), layout="constrained")
        axes = figure.add_subplot()
        places = range(len(names))
        axes.barh(
            places,
            means,
            color=BLUE,
            height=0.66,
            xerr=[below, above],
            error_kw={"ecolor": INK, "capsize": 3},
        )
        axes.set_yticks(places, names)
        axes.invert_yaxis()
        reach = max(mean + whisker for mean, whisker in zip(means, above, strict=True)) or 1.0
        for place, mean, whisker in zip(places, means, above, strict=True):
            axes.text(mean + whisker + 0.012 * reach, place, f"{mean:.1f}%", va="center", fontsize=9.5)
        axes.set_xlim(0, 1.1 * reach)
        axes.set_xlabel("share of the information about the input, tr(J Jᵀ) (percent)")
        axes.spines["right"].set_visible(False)
        light_grid(axes, "x")
    return figure


def layer_rows(rows: Sequence[Row]) -> list[Row]:
    """Return one row with a layer split per example, the undefended gradient's where there is one."""
    chosen: dict[int, Row] = {}
    for row in sorted(rows, key=is_undefended, reverse=True):
        if row.get("layer_share"):
            chosen.setdefault(row["example"], row)
    return [chosen[example] for example in sorted(chosen)]


def _whiskers(rows: Sequence[Row], name: str, values: Sequence[float]) -> tuple[float, float]:
    if len(values) > 1:
        interval = bootstrap_mean(list(values), seed=0)
        return interval.low, interval.high
    error = 100 * (number((rows[0].get("layer_share_std_error") or {}).get(name)) or 0.0)
    return values[0] - 2 * error, values[0] + 2 * error


def agreement_figure(rows: Sequence[Row]) -> Figure | None:
    """Draw prediction against truth, one point per example, defense and attack.

    Left: I2F against the attack's RMSE on embeddings, with the line of equality. Right: I2F against ROUGE-1.
    A panel without data is left out. Undefended rows have I2F zero and no place on a logarithmic axis.

    Args:
        rows: Result rows.

    Returns:
        The figure, or None if no attack was scored on a row with a positive I2F.
    """
    panels = [metric for metric in ("embedding_rmse", "rouge1") if _pairs(rows, metric)]
    if not panels:
        return None
    with house_style():
        figure = Figure(figsize=(4.6 * len(panels) if len(panels) > 1 else 6.2, 4.5), layout="constrained")
        for place, metric in enumerate(panels):
            axes = figure.add_subplot(1, len(panels), place + 1, xscale="log")
            points = _scatter(axes, rows, metric)
            axes.set_xlabel("I2F (RMS per coordinate, input units)")
            axes.spines["right"].set_visible(False)
            light_grid(axes)
            if metric == "embedding_rmse":
                axes.set_yscale("log")
                axes.set_ylabel("embedding RMSE of the attack (input units)")
                ends = [min(min(pair) for pair in points), max(max(pair) for pair in points)]
                axes.plot(ends, ends, color=GREY, linewidth=1, label="prediction = truth", zorder=1)
            else:
                axes.set_ylabel("ROUGE-1 of the attack (share, 0 to 1)")
                axes.set_ylim(-0.04, 1.06)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower left", ncols=min(3, len(labels)))
    return figure


def _pairs(rows: Sequence[Row], metric: str) -> list[tuple[str, Row, float, float]]:
    """Return (attack, row, I2F, score) wherever both can be drawn."""
    return [
        (attack, row, influence, value)
        for attack in attack_names(rows)
        for row in rows
        if (influence := number(row.get("influence_rms"))) is not None and influence > 0
        and (value := score(row, attack, metric)) is not None and (value > 0 or metric != "embedding_rmse")
    ]  # fmt: skip


def _scatter(axes: Axes, rows: Sequence[Row], metric: str) -> list[tuple[float, float]]:
    pairs = _pairs(rows, metric)
    kinds = (("noise sweep", True, "o"), ("other defenses", False, "X"))
    for attack, colour in zip(attack_names(rows), ATTACK_COLOURS, strict=False):
        for kind, swept, marker in kinds:
            points = [
                (influence, value)
                for name, row, influence, value in pairs
                if name == attack and (noise_level(row) is not None) == swept
            ]
            if points:
                axes.scatter(
                    *zip(*points, strict=True), s=22, color=colour, alpha=0.55, linewidths=0, marker=marker,
                    label=f"{attack}, {kind}",
                )  # fmt: skip
    return [(influence, value) for *_, influence, value in pairs]


FIGURES: dict[str, Callable[[Sequence[Row]], Figure | None]] = {
    "risk_versus_noise": noise_figure,
    "layers": layer_figure,
    "agreement": agreement_figure,
}


def missing(name: str, rows: Sequence[Row]) -> str:
    """Return why a figure is absent, in words for the page.

    Args:
        name: A key of ``FIGURES``.
        rows: The rows that gave no figure.

    Returns:
        One sentence.
    """
    if name == "risk_versus_noise" and by_noise(rows):
        return "The noise sweep holds neither a predicted error above zero nor a scored attack."
    if name == "risk_versus_noise":
        return "No noise sweep was run, so there is no curve of risk against noise."
    if name == "layers":
        return "The run did not record how the information is split over layers."
    if not attack_names(rows):
        return "No attack was run, so there is nothing to compare the prediction with."
    if not has_score(rows, "rouge1"):
        return "Every attack was refused, so there is nothing to compare the prediction with."
    return "No attacked row has a predicted error above zero: without noise I2F is zero by definition."
