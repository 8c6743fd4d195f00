"""Attacks compared: mean scores with intervals, cost, and the difference to the best attack; table, csv and figure.

A row is one attack on one gradient: ``model``, ``data``, ``batch_size``, ``defense``, ``sample``, ``attack``,
``gradient_seconds`` and what :func:`lmleak.evaluation.attacks.attack_result` returns.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from lmleak.errors import DataError
from lmleak.metrics import bootstrap_mean, paired_bootstrap
from lmleak.report.drawing import BLUE, GREY, INK, ORANGE, PURPLE, SKY, VERMILION, house_style, light_grid
from lmleak.report.rows import compact

GROUP = ("model", "data", "batch_size", "defense")
"""What an attack is compared with others within."""
SHOWN = {
    "rouge1": "R-1", "rouge2": "R-2", "rougeL": "R-L", "token_precision": "precision", "token_recall": "recall",
    "exact_match": "exact",
}  # fmt: skip
SCORES = (*SHOWN, "token_f1", "position_accuracy", "edit_distance", "lamp_rouge1", "lamp_rouge2", "lamp_rougeL")
RANKED_BY = "rougeL"
"""The score by which an attack is the best, and in which the others' difference to it is measured."""
FEWEST_FOR_P = 6
"""Pairs below which no p-value is given: with five, even five differences of one sign have p = 2 / 2^5 > 0.05."""
COLOURS, MARKERS = (BLUE, VERMILION, PURPLE, ORANGE, SKY, GREY), ("o", "s", "^", "D", "v", "P")  # by batch size

Entry = dict[str, Any]


def compare(rows: Sequence[Mapping[str, Any]], *, seed: int = 0) -> list[Entry]:
    """Summarise the rows per (model, data, batch size, defense) and attack.

    Scores are means over samples, one sample being one gradient, with a 95 % percentile bootstrap interval over
    samples. Costs are medians: counted gradient evaluations, and seconds over those of one gradient of the same model
    and batch in the same run. Within a group every attack is compared with the one of highest mean ``RANKED_BY`` by a
    paired bootstrap over the samples on which both ran. The best is chosen on the same samples and no correction
    for several comparisons is made: a p-value near 0.05 means little. Below ten samples bootstrap intervals are too
    narrow; below ``FEWEST_FOR_P`` there is no p-value.

    Args:
        rows: Result rows.
        seed: Seed of the bootstrap.

    Returns:
        Flat entries: the group, ``attack``, ``samples`` that were scored, ``refused`` samples with the first
        ``reason``; per score its mean, ``_low`` and ``_high``; ``gradients``, ``gradient_evaluations``,
        ``seconds``, ``peak_bytes``; ``best``, ``difference`` (to the best attack, so at most zero up to pairing) with
        ``_low``, ``_high`` and ``p_value``. None where there is no number.

    Raises:
        DataError: If there are no rows.
    """
    if not rows:
        raise DataError("nothing to compare: there are no rows")
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in GROUP), []).append(row)
    entries = []
    for key, group in groups.items():
        attacks = list(dict.fromkeys(row["attack"] for row in group))
        scored = {
            a: {row["sample"]: row for row in group if row["attack"] == a and "refused" not in row} for a in attacks
        }
        found = [
            dict(zip(GROUP, key, strict=True)) | _entry(a, scored[a], [r for r in group if r["attack"] == a], seed)
            for a in attacks
        ]
        ran = [entry for entry in found if entry["samples"]]
        best = max(ran, key=lambda entry: entry[RANKED_BY], default={"attack": None})["attack"]
        entries += [entry | _difference(scored[entry["attack"]], scored.get(best, {}), best, seed) for entry in found]
    return entries


def _entry(attack: str, scored: Mapping[int, Mapping[str, Any]], rows: Sequence, seed: int) -> Entry:
    refused = [row["refused"] for row in rows if "refused" in row]
    entry: Entry = {"attack": attack, "samples": len(scored), "refused": len(refused)}
    entry["reason"] = refused[0] if refused else None
    for name in SCORES:
        mean = bootstrap_mean([row[name] for row in scored.values()], seed=seed) if scored else None
        entry |= {name: mean and mean.value, f"{name}_low": mean and mean.low, f"{name}_high": mean and mean.high}
    costs = {
        "gradients": [row["seconds"] / row["gradient_seconds"] for row in scored.values()],
        **{name: [row[name] for row in scored.values()] for name in ("gradient_evaluations", "seconds", "peak_bytes")},
    }
    known = {name: [value for value in values if value is not None] for name, values in costs.items()}
    return entry | {name: median(values) if values else None for name, values in known.items()}


def _difference(own: Mapping[int, Mapping], best: Mapping[int, Mapping], name: str | None, seed: int) -> Entry:
    both = [sample for sample in own if sample in best]
    entry: Entry = {"best": name, "difference": None, "difference_low": None, "difference_high": None, "p_value": None}
    if not both or own is best:
        return entry
    found = paired_bootstrap([own[s][RANKED_BY] for s in both], [best[s][RANKED_BY] for s in both], seed=seed)
    ends = {"difference_low": found.low, "difference_high": found.high}
    p_value = found.p_value if len(both) >= FEWEST_FOR_P else None
    return entry | {"difference": found.value, **ends, "p_value": p_value}


def comparison_table(entries: Sequence[Mapping[str, Any]]) -> Table:
    """Build the study's table: one line per group and attack, scores in percent with their 95 % interval.

    Args:
        entries: What :func:`compare` returned.

    Returns:
        A rich table.
    """
    table = Table(
        title="Attacks compared: percent (95 % bootstrap interval over samples); cost in gradients of the same model",
        caption="n: gradients that could be attacked; below ten, intervals are too narrow. Δ R-L: difference to the "
        "best attack by mean ROUGE-L on the same gradients; p is not corrected for the number of comparisons.",
        box=SIMPLE_HEAD,
    )
    for name in ("model", "data", "B", "defense", "attack", "n"):
        table.add_column(name, overflow="fold", min_width=20 if name == "attack" else None)
    for name in (*SHOWN.values(), "cost", "seconds", "Δ R-L"):
        table.add_column(name, justify="right")
    before: tuple = ()
    for entry in entries:
        group = (short(entry["model"]), short(entry["data"]), str(entry["batch_size"]), entry["defense"])
        head = [Text(word if group != before else "") for word in group]
        before = group
        name, count = Text(entry["attack"]), str(entry["samples"])
        if not entry["samples"]:
            table.add_row(*head, name, count, Text("impossible", style="dim"), *[""] * (len(SHOWN) + 2))
            continue
        scores = [_interval_cell(entry, score) for score in SHOWN]
        cost = [compact(entry["gradients"], 3), compact(entry["seconds"])]
        table.add_row(*head, name, count, *scores, *cost, _difference_cell(entry))
    return table


def refusal_lines(entries: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return why attacks were refused: one line per attack and reason, with how many gradients that was.

    Args:
        entries: What :func:`compare` returned.

    Returns:
        Sentences.
    """
    counts: dict[tuple[str, str], int] = {}
    for entry in entries:
        if entry["refused"]:
            key = (entry["attack"], entry["reason"])
            counts[key] = counts.get(key, 0) + entry["refused"]
    return [f"impossible on {count} gradient(s): {reason}" for (_, reason), count in counts.items()]


def _interval_cell(entry: Mapping[str, Any], name: str) -> str:
    value, low, high = (entry[key] for key in (name, f"{name}_low", f"{name}_high"))
    return f"{100 * value:.0f}" + ("" if low is None else f" ({100 * low:.0f}–{100 * high:.0f})")


def _difference_cell(entry: Mapping[str, Any]) -> str:
    if entry["attack"] == entry["best"]:
        return "best"
    if entry["difference"] is None:
        return "–"
    value = f"{100 * entry['difference']:+.0f}"
    if entry["difference_low"] is None:
        return value
    ends = f"{100 * entry['difference_low']:+.0f} to {100 * entry['difference_high']:+.0f}"
    return f"{value} ({ends})" + ("" if entry["p_value"] is None else f", p={entry['p_value']:.2g}")


def comparison_figure(entries: Sequence[Mapping[str, Any]], score: str = "token_recall") -> Figure:
    """Draw one score by attack and batch size, a panel per model, data and defense; whiskers are 95 % intervals.

    Args:
        entries: What :func:`compare` returned.
        score: One of ``SHOWN``.

    Returns:
        The figure.
    """
    columns = list(dict.fromkeys(entry["model"] for entry in entries))
    lines = list(dict.fromkeys((entry["data"], entry["defense"]) for entry in entries))
    attacks = list(dict.fromkeys(entry["attack"] for entry in entries))
    sizes = sorted({entry["batch_size"] for entry in entries})
    height = 1.1 + 0.2 * len(attacks) * max(2, len(sizes))
    with house_style():
        figure = Figure(figsize=(1.6 + 3.9 * len(columns), 0.6 + height * len(lines)), layout="constrained")
        panels = figure.subplots(len(lines), len(columns), sharex=True, sharey=True, squeeze=False)
        for line, (data, defense) in enumerate(lines):
            for column, model in enumerate(columns):
                own = [e for e in entries if (e["model"], e["data"], e["defense"]) == (model, data, defense)]
                _panel(panels[line][column], own, attacks, sizes, score)
                panels[line][column].set_title(f"{short(model)}, {short(data)}, {defense}", fontsize=9.5)
        for axes in panels[-1]:
            axes.set_xlabel({"token_recall": "share of tokens recovered"}.get(score, SHOWN[score]))
        handles = {label: handle for axes in panels.flat for handle, label in zip(*axes.get_legend_handles_labels(),
                   strict=True)}  # fmt: skip
        figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=max(len(handles), 1))
    return figure


def _panel(axes: Axes, entries: Sequence[Mapping], attacks: Sequence[str], sizes: Sequence[int], score: str) -> None:
    """Draw one panel: an attack per line, batch sizes one below the other."""
    for place, attack in enumerate(attacks):
        for number, size in enumerate(sizes):
            found = [e for e in entries if (e["attack"], e["batch_size"]) == (attack, size)]
            height = place + (number - (len(sizes) - 1) / 2) * 0.8 / len(sizes)
            if found and found[0]["samples"]:
                entry, style = found[0], number % len(COLOURS)
                ends = [[entry[score]] if entry[f"{score}_{end}"] is None else [entry[f"{score}_{end}"]]
                        for end in ("low", "high")]  # fmt: skip
                reach = [[max(entry[score] - ends[0][0], 0)], [max(ends[1][0] - entry[score], 0)]]
                axes.errorbar(
                    [entry[score]], [height], xerr=reach, fmt=MARKERS[style], color=COLOURS[style], ecolor=INK,
                    elinewidth=1, capsize=2, markersize=5, label=f"batch size {size}", clip_on=False, zorder=3,
                )  # fmt: skip
        tried = [e for e in entries if e["attack"] == attack]
        if tried and not any(e["samples"] for e in tried):
            axes.text(0.02, place, "impossible", va="center", fontsize=8, color=GREY)
    axes.set_yticks(range(len(attacks)), attacks)
    axes.set_ylim(len(attacks) - 0.5, -0.5)
    axes.set_xlim(-0.02, 1.02)
    light_grid(axes, "x")
    axes.spines["right"].set_visible(False)


def short(name: str) -> str:
    """Return the last part of a path, or a hub id as it is."""
    return Path(name).name if Path(name).suffix else name
