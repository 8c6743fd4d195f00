"""From the rows of ``defense_comparison.py`` to its numbers, table and figure."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from defense_settings import Setting
from matplotlib.figure import Figure
from rich.table import Table
from scipy.stats import binomtest

from lmleak.defenses.privacy import epsilon
from lmleak.files import write_bytes_atomically
from lmleak.metrics.agreement import bootstrap_mean, paired_bootstrap
from lmleak.report.drawing import BLUE, GREY, ORANGE, PURPLE, SKY, VERMILION, encode, house_style, light_grid

BUDGETS = (0.01, 0.02, 0.05)
"""Accuracy lost at which families are compared."""
TICKS = (-20, -10, -5, -2, -1, 0, 1, 2, 5, 10, 20, 50)
"""Points lost that the figure marks, where they lie in its range."""


@dataclass(frozen=True)
class Entry:
    """What was measured of one setting; accuracies and recoveries are shares in [0, 1], intervals 95 %."""

    setting: str
    family: str
    trained: int
    """Parameters that are trained, all of them released."""
    epsilon_run: float | None
    """Of all releases of the fine-tuning; None without differential privacy, as is the next."""
    epsilon_release: float | None
    """Of one release, to who knows that the text was in it."""
    learning_rate: float
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    lost: float
    """Accuracy of "none" minus this one, on the same texts; negative if the setting did better."""
    lost_low: float | None
    lost_high: float | None
    attack: str
    """The attack of highest mean token recall; empty if every attack was refused."""
    token_recall: float | None
    recall_low: float | None
    recall_high: float | None
    rouge1: float | None
    exact_match: float | None
    all_recalls: str
    """Mean token recall of every attack, or that it was refused."""


def comparison(rows: Sequence[dict], config) -> list[Entry]:
    """Return one entry per setting, in the order of the configuration."""
    best = {spec: best_run(rows, spec) for spec in config.settings}
    reference = best["none"]["test_scores"]
    return [entry_of(rows, spec, best[spec], reference, config) for spec in config.settings]


def best_run(rows: Sequence[dict], spec: str) -> dict:
    """Return the run of highest validation accuracy, of equals the one of the smallest learning rate."""
    runs = [r for r in rows if r["kind"] == "utility" and r["setting"] == spec]
    return max(runs, key=lambda r: (r["validation_accuracy"], -r["learning_rate"]))


def entry_of(rows: Sequence[dict], spec: str, run: dict, reference: Sequence[float], config) -> Entry:
    """Return the entry of one setting."""
    setting, scores = Setting(spec), run["test_scores"]
    lost = paired_bootstrap(reference, scores, seed=config.seed)
    low, high = accuracy_interval(scores, config.seed)
    attacked = [r["attacks"] for r in rows if r["kind"] == "leakage" and r["setting"] == spec]
    ran = {a: [f[a] for f in attacked] for a in config.attacks if any("refused" not in f[a] for f in attacked)}
    # An attack that refuses one release of several has recovered nothing of it.
    values = lambda attack, name: [f.get(name, 0.0) for f in ran[attack]]
    recalls = {a: float(np.mean(values(a, "token_recall"))) for a in ran}
    strongest = max(recalls, key=recalls.get, default="")
    interval = bootstrap_mean(values(strongest, "token_recall"), seed=config.seed) if strongest else None
    mean = lambda name: float(np.mean(values(strongest, name))) if strongest else None
    spent = lambda q, steps: epsilon(setting.dp.noise_multiplier, q, steps, config.delta) if setting.dp else None
    return Entry(
        setting=spec, family=setting.family, trained=run["trained"],
        epsilon_run=spent(config.sample_rate, config.steps), epsilon_release=spent(1.0, 1),
        learning_rate=run["learning_rate"], accuracy=float(np.mean(scores)), accuracy_low=low, accuracy_high=high,
        lost=lost.value, lost_low=lost.low, lost_high=lost.high, attack=strongest,
        token_recall=recalls.get(strongest), recall_low=interval and interval.low,
        recall_high=interval and interval.high, rouge1=mean("rouge1"), exact_match=mean("exact_match"),
        all_recalls="; ".join(f"{a} {recalls[a]:.2f}" if a in recalls else f"{a} refused" for a in config.attacks),
    )  # fmt: skip


def accuracy_interval(scores: Sequence[float], seed: int) -> tuple[float, float]:
    """Return the 95 % interval: Wilson's of right and wrong answers, a bootstrap over texts of shares."""
    if set(scores) <= {0.0, 1.0}:
        return tuple(map(float, binomtest(int(sum(scores)), len(scores)).proportion_ci(method="wilson")))
    interval = bootstrap_mean(scores, seed=seed)
    return interval.low, interval.high


def families(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    """Return the settings of every family but "none", in the order of the accuracy that they lose."""
    found: dict[str, list[Entry]] = {}
    for entry in sorted(entries, key=lambda e: e.lost):
        if entry.setting != "none" and entry.token_recall is not None:
            found.setdefault(entry.family, []).append(entry)
    return dict(sorted(found.items()))


def at_equal_utility(members: Sequence[Entry], none: Entry, lost: float) -> tuple[float, bool]:
    """Return the token recall of a family at an accuracy loss, and whether that loss lies within what was measured.

    Linear between "none", which loses nothing, and the family's strengths in the order of their loss; of two strengths
    the one that leaks less at no greater loss counts, and one that did better than "none" lost nothing. Beyond the
    largest loss measured, the least recall that was: all strengths cost less than the budget, stronger ones may leak
    less still.

    Args:
        members: The settings of the family, as :func:`families` orders them.
        none: The setting "none".
        lost: The accuracy that may be lost.

    Returns:
        Recall, and False beyond the range.
    """
    places = [0.0, *(max(0.0, e.lost) for e in members)]
    recall = np.minimum.accumulate([none.token_recall, *(e.token_recall for e in members)])
    least = dict(zip(places, recall, strict=True))  # of several at one loss, the last and so the least
    return float(np.interp(lost, list(least), list(least.values()))), lost <= places[-1]


def tables(entries: Sequence[Entry], config) -> tuple[Table, Table]:
    """Return the table of all settings, and that of the families at equal utility."""
    number = lambda value, form="{:.2f}": "-" if value is None else form.format(value)
    span = lambda low, high: "" if low is None else f" [{low:.2f}, {high:.2f}]"
    every = Table(
        "setting", "trained", "eps run", "eps release", "rate", "accuracy", "lost (points)", "best attack",
        "token recall", "ROUGE-1", "exact",
        title=f"{config.model}: {config.steps} steps of {config.clients} x {config.batch_size} texts; "
        f"{config.samples} releases attacked; 95 % intervals; delta = {config.delta:g}",
    )  # fmt: skip
    for e in entries:
        lost = f"{100 * e.lost:.1f}"
        if e.lost_low is not None:
            lost += f" [{100 * e.lost_low:.1f}, {100 * e.lost_high:.1f}]"
        every.add_row(
            e.setting, f"{e.trained:,}", number(e.epsilon_run, "{:.3g}"), number(e.epsilon_release, "{:.3g}"),
            f"{e.learning_rate:g}", f"{e.accuracy:.3f}{span(e.accuracy_low, e.accuracy_high)}", lost,
            e.attack or "all refused", number(e.token_recall) + span(e.recall_low, e.recall_high), number(e.rouge1),
            number(e.exact_match),
        )  # fmt: skip
    equal = Table(
        "family", *(f"recall at {100 * b:g} point(s) lost" for b in BUDGETS), "least recall measured",
        title="at equal utility: linear between measured strengths; *: beyond range, all measured strengths cost less",
    )  # fmt: skip
    (none,) = [e for e in entries if e.setting == "none"]
    for family, members in families(entries).items():
        least = min(members, key=lambda e: (e.token_recall, e.lost))
        found = [at_equal_utility(members, none, budget) for budget in BUDGETS]
        cells = [number(recall) + ("" if within else "*") for recall, within in found]
        equal.add_row(family, *cells, f"{least.token_recall:.2f} at {100 * least.lost:.1f} lost ({least.setting})")
    return every, equal


def figure(entries: Sequence[Entry], path: Path) -> None:
    """Draw token recall of the strongest attack against the accuracy lost, one line per family."""
    colours, markers = (BLUE, VERMILION, ORANGE, PURPLE, SKY, GREY), "osD^vPX*"
    (none,) = [e for e in entries if e.setting == "none"]
    with house_style():
        drawing = Figure(figsize=(8.6, 5.0), layout="constrained")
        axes = drawing.add_subplot()
        axes.plot(0, none.token_recall, "*", color="black", markersize=13, label="none", zorder=4)
        for i, (family, members) in enumerate(families(entries).items()):
            losses, recalls = [100 * e.lost for e in members], [e.token_recall for e in members]
            colour = colours[i % len(colours)]
            axes.plot(losses, recalls, color=colour, marker=markers[i % len(markers)], label=family,
                      linestyle=("-", "--", ":")[i // len(colours) % 3])  # fmt: skip
            for e in members:
                if e.recall_low is not None:
                    axes.plot(
                        [100 * e.lost] * 2, [e.recall_low, e.recall_high], color=colour, linewidth=0.8, alpha=0.6
                    )
        axes.set_xlabel("accuracy lost to none (points)")
        axes.set_ylabel("token recall of the strongest attack")
        axes.set_xscale("symlog", linthresh=2)
        axes.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
        axes.xaxis.minorticks_off()
        lost = [100 * e.lost for e in entries]
        axes.set_xlim(min(lost) - 0.5, 1.2 * max(*lost, 1))
        axes.set_ylim(-0.04, 1.06)
        light_grid(axes)
        drawing.legend(loc="outside right upper")
    write_bytes_atomically(path, encode(drawing, "png"))
