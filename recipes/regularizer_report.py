"""Table and figure of the study of the penalty on leakage."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from private_training import interval
from rich.console import Console
from rich.table import Table

from lmleak.files import write_bytes_atomically, write_csv_atomically
from lmleak.report.drawing import BLUE, ORANGE, VERMILION, encode, house_style, light_grid

COLOURS = {"noise": BLUE, "regularizer": VERMILION, "dp": ORANGE}


def entries_of(rows: list[dict], epsilons: Mapping[tuple[str, float], float | None]) -> list[dict]:
    """Return one entry per setting, with Student's intervals over trainings.

    ``rmse`` is that of the attack that did best on each image, its value per training the mean over images: no
    attacker knows which did best, but a defense must stand against it.
    """
    found = []
    for arm, strength in dict.fromkeys((r["arm"], r["strength"]) for r in rows):
        same = [r for r in rows if (r["arm"], r["strength"]) == (arm, strength)]
        entry = {"arm": arm, "strength": strength, "std": same[0]["std"], "epsilon": epsilons[arm, strength]}
        entry["trainings"] = len(same)
        columns = {
            "accuracy": [r["accuracy"] for r in same],
            "rmse": [np.mean(best_errors(r["attacks"])) for r in same],
            "predicted": [np.mean(r["predicted"]) for r in same],
            "relative": [np.mean(r["relative"]) for r in same],
            "gradient_rms": [np.mean(r["gradient_rms"]) for r in same],
        }
        for name, values in columns.items():
            entry |= dict(zip((name, f"{name}_low", f"{name}_high"), interval(values), strict=True))
        found.append(entry)
    return found


def best_errors(attacks: Mapping[str, list[float | None]]) -> list[float]:
    """Return the lowest error per image; not a number where every attack diverged or was refused."""
    return [
        min((e for e in errors if e is not None), default=math.nan) for errors in zip(*attacks.values(), strict=True)
    ]


def paired_gain(rows: list[dict], measure: str = "predicted") -> list[dict]:
    """Return per budget the error that it adds to that of noise alone at the accuracy that it reached, per training.

    Each training's own curve of noise is read by straight lines between its levels, as the largest error that noise
    gives at no less accuracy; gains are then averaged, with an interval over trainings. Where noise never reached such
    an accuracy there is nothing to compare with.
    """
    found = []
    for strength in dict.fromkeys(r["strength"] for r in rows if r["arm"] == "regularizer"):
        gains = []
        for row in (r for r in rows if (r["arm"], r["strength"]) == ("regularizer", strength)):
            noise = [r for r in rows if (r["arm"], r["number"]) == ("noise", row["number"])]
            points = sorted((-r["accuracy"], np.mean(r[measure])) for r in noise)
            best = np.maximum.accumulate([p[1] for p in points])
            if -row["accuracy"] >= points[0][0]:
                alone = np.interp(-row["accuracy"], [p[0] for p in points], best)
                gains.append(float(np.mean(row[measure]) - alone))
        if gains:
            mean, low, high = interval(gains)
            found.append({"budget": strength, "gain": mean, "low": low, "high": high, "trainings": len(gains)})
    return found


def half_widths(entries: list[dict], name: str) -> np.ndarray:
    """Return the half widths of intervals, 0 where there is none."""
    return np.nan_to_num([e[f"{name}_high"] - e[name] for e in entries])


def curves(entries: list[dict]) -> Figure:
    """Draw the errors of attacks, and those predicted, against accuracy."""
    panels = (
        ("rmse", "RMSE (normalised pixels)", "Attacks"),
        ("predicted", "predicted RMSE (normalised pixels)", "Prediction"),
        ("relative", "predicted RMSE (normalised pixels)", "At relative noise"),
    )
    with house_style():
        figure = Figure(figsize=(9.6, 3.9), layout="constrained")
        for axes, (measure, label, title) in zip(figure.subplots(1, 3), panels, strict=True):
            for arm, colour in COLOURS.items():
                own = [e for e in entries if e["arm"] == arm]
                x, y = [e["accuracy"] for e in own], [e[measure] for e in own]
                bars = {"xerr": half_widths(own, "accuracy"), "yerr": half_widths(own, measure)}
                axes.errorbar(
                    x, y, fmt="o-", color=colour, markersize=5, linewidth=1.4, elinewidth=0.7, label=arm, **bars
                )
                for e in (own[0], own[-1]):  # the others lie too close
                    axes.annotate(f"{e['strength']:g}", (e["accuracy"], e[measure]), fontsize=8, color=colour,
                                  xytext=(4, 4), textcoords="offset points")  # fmt: skip
            axes.set_xlim(max(0.0, min(e["accuracy"] for e in entries) - 0.1), 1)
            axes.set_ylim(0, 1.1 * max(e[measure] for e in entries))
            axes.set_xlabel("accuracy on test images")
            axes.set_ylabel(label)
            axes.set_title(title)
            light_grid(axes)
        figure.legend(
            *figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3,
            title="numbers: first and last sigma, budget r, noise multiplier; bars: 95 % over trainings",
            title_fontsize=9,
        )  # fmt: skip
    return figure


def write_report(rows: list[dict], epsilons: Mapping[tuple[str, float], float | None], path: Path) -> None:
    """Write the table and the figure, and print what matters."""
    entries, gains = entries_of(rows, epsilons), paired_gain(rows)
    image = encode(curves(entries), "png")
    write_csv_atomically(path / "influence_regularizer.csv", entries)
    if gains:
        write_csv_atomically(path / "influence_regularizer_gain.csv", gains)
    write_bytes_atomically(path / "influence_regularizer.png", image)
    names = ("accuracy", "rmse", "predicted", "relative", "gradient_rms")
    table = Table("arm", "strength", "epsilon", *names)
    for e in entries:
        said = [f"{e[n]:.3g} [{e[f'{n}_low']:.3g}, {e[f'{n}_high']:.3g}]" for n in names]
        bound = "" if e["epsilon"] is None else f"{e['epsilon']:.3g}"
        table.add_row(e["arm"], f"{e['strength']:g}", bound, *said)
    console = Console(width=170)
    console.print(table)
    for g in gains:
        print(
            f"budget {g['budget']:g}: predicted RMSE {g['gain']:+.3g} [{g['low']:+.3g}, {g['high']:+.3g}] against "
            f"noise alone at equal accuracy, {g['trainings']} training(s)"
        )
    print(f"table and figure: {path}")
