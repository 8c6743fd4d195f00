"""Table and figures of the study of shaped noise."""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from private_training import interval
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lmleak.evaluation.image_attack import images_of
from lmleak.files import write_bytes_atomically, write_csv_atomically
from lmleak.report.drawing import BLUE, GREY, ORANGE, VERMILION, encode, house_style, light_grid
from lmleak.report.image_grid import image_grid

UNAWARE = ("dlg", "gs", "gauss-newton")
"""Attackers that assume isotropic noise."""
COLOURS = {"isotropic": BLUE, "spectral": VERMILION, "spectral-floor": ORANGE}
LOSSES = (0.02, 0.05, 0.1, 0.2)
GRID_COLUMNS = 3


def entries_of(rows: list[dict]) -> list[dict]:
    """Return one entry per defense, level and attacker: error over images, accuracy over trainings, with intervals.

    Accuracy lost is paired: each training with noise against the one of the same seed without.
    """
    utility = [r for r in rows if r["kind"] == "utility"]
    clean = {r["number"]: r["accuracy"] for r in utility if r["level"] == 0}
    found = []
    leakage = [r for r in rows if r["kind"] == "leakage"]
    for defense, level, attack in dict.fromkeys((r["defense"], r["level"], r["attack"]) for r in leakage):
        same = [r for r in leakage if (r["defense"], r["level"], r["attack"]) == (defense, level, attack)]
        trained = [r for r in utility if (r["defense"], r["level"]) == (defense, level)]
        names = ("rmse", "accuracy", "lost")
        # An attack that diverged has no error; it is judged where it did not, and the number says where.
        values = (
            [r["rmse"] for r in same if r.get("rmse") is not None],
            [r["accuracy"] for r in trained],
            [clean[r["number"]] - r["accuracy"] for r in trained],
        )
        entry = {"defense": defense, "level": level, "norm": np.mean([r["norm"] for r in same]), "attack": attack}
        entry |= {"images": len(values[0]), "trainings": len(trained)}
        for name, numbers in zip(names, values, strict=True):
            entry |= dict(zip((name, f"{name}_low", f"{name}_high"), interval(numbers), strict=True))
        entry["predicted"] = np.mean([r["predicted"] ** 2 for r in same]) ** 0.5
        entry["psnr"] = np.mean([r["psnr"] for r in same if r.get("psnr") is not None])
        found.append(entry)
    return found


def strongest(entries: list[dict], defense: str, aware: bool) -> list[dict]:
    """Return the entry of lowest error per level, among attackers that could exist."""
    own = [
        e for e in entries if e["defense"] == defense and e["attack"] != "whitened"
        and (aware or e["attack"] in UNAWARE)
    ]  # fmt: skip
    levels = sorted({e["level"] for e in own})
    return [min((e for e in own if e["level"] == level), key=lambda e: e["rmse"]) for level in levels]


def at_equal_loss(chosen: list[dict], lost: float) -> float | None:
    """Return the largest error that costs no more than ``lost``, by straight lines between levels; None if none."""
    points = sorted((max(e["lost"], 0.0), e["rmse"]) for e in chosen)
    costs, errors = [p[0] for p in points], np.maximum.accumulate([p[1] for p in points])
    return float(np.interp(lost, costs, errors)) if lost >= costs[0] else None


def equal_loss_table(entries: list[dict]) -> list[dict]:
    """Return the errors at equal accuracy lost, per defense, for unaware and for all attackers."""
    found = []
    for defense in COLOURS:
        for aware in (False, True):
            chosen = strongest(entries, defense, aware)
            values = {f"lost {lost:g}": at_equal_loss(chosen, lost) for lost in LOSSES}
            found.append({"defense": defense, "attackers": "all" if aware else "unaware"} | values)
    return found


def curves(entries: list[dict], blind: float) -> Figure:
    """Draw attack error against the noise's norm, and against accuracy lost.

    Args:
        entries: The table.
        blind: Error of the attacker who answers the mean image.

    Returns:
        The figure.
    """
    with house_style():
        figure = Figure(figsize=(10.4, 4.8), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for defense, colour in COLOURS.items():
            unaware, every = strongest(entries, defense, False), strongest(entries, defense, True)
            for axes, of in ((left, "level"), (right, "lost")):
                draw = partial(_draw, axes, of, colour)
                draw(unaware, "rmse", "o-", f"{defense}: attackers who assume isotropic noise")
                if any(e["attack"] not in UNAWARE for e in every):
                    draw(every, "rmse", "s--", f"{defense}: all attackers")
            _draw(left, "level", colour, every, "predicted", ":", f"{defense}: first-order prediction")
        for axes in (left, right):
            axes.axhline(blind, color=GREY, linewidth=0.9, label="the mean image")
            axes.set_yscale("log")
            light_grid(axes)
        left.set_xscale("log")
        left.set_xlabel("expected norm of the noise (times the gradient's)")
        left.set_ylabel("RMSE of the best attacker (normalised pixels)")
        right.set_xlabel("accuracy lost by training (share of test images)")
        left.set_title("At equal norm")
        right.set_title("At equal accuracy")
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8.5)
    return figure


def _draw(axes: Axes, of: str, colour: str, entries: list[dict], what: str, style: str, label: str) -> None:
    """Draw one curve, its points in the order of the axis."""
    ordered = sorted(entries, key=lambda e: e[of])
    x, y = [e[of] for e in ordered], [e[what] for e in ordered]
    axes.plot(x, y, style, color=colour, markersize=5, linewidth=1.4, label=label)


def grid(rows: list[dict], truth: Tensor, level: float) -> Figure:
    """Draw the first images and what is recovered of them at one level."""
    columns = min(GRID_COLUMNS, len(truth))
    shown = (("isotropic", "gauss-newton"), ("spectral", "gauss-newton-row"), ("spectral", "row-space"))
    recovered = {}
    for defense, attack in shown:
        images = []
        for sample in range(columns):
            key = f"leakage|{defense}|{level:g}|{sample}|{attack}"
            row = next(r for r in rows if r["key"] == key)
            images.append(images_of(row, truth[sample : sample + 1]))
        recovered[f"{defense},\n{attack}"] = torch.cat(images)
    titles = [f"image {sample}" for sample in range(columns)]
    return image_grid(truth[:columns], recovered, column_titles=titles, differences=False)


def write_report(rows: list[dict], truth: Tensor, path: Path) -> None:
    """Write the table and the figures, and print what matters."""
    entries = entries_of(rows)
    equal = equal_loss_table(entries)
    levels = sorted({e["level"] for e in entries})
    middle = levels[len(levels) // 2 - (len(levels) % 2 == 0)]
    blind = np.mean([r["blind_rmse"] for r in rows if r["kind"] == "leakage"])
    figures = {"spectral_defense": curves(entries, blind), "spectral_defense_images": grid(rows, truth, middle)}
    write_csv_atomically(path / "spectral_defense.csv", entries)
    write_csv_atomically(path / "spectral_defense_equal_accuracy.csv", equal)
    for name, figure in figures.items():
        image = encode(figure, "png")
        write_bytes_atomically(path / f"{name}.png", image)
    table = Table("defense", "level", "attack", "RMSE", "predicted", "accuracy", "lost")
    for e in entries:
        said = [f"{e[n]:.3g} [{e[f'{n}_low']:.3g}, {e[f'{n}_high']:.3g}]" for n in ("rmse", "accuracy", "lost")]
        table.add_row(e["defense"], f"{e['level']:g}", e["attack"], said[0], f"{e['predicted']:.3g}", *said[1:])
    console = Console(width=160)
    console.print(table)
    second = Table(*equal[0])
    for line in equal:
        second.add_row(*("–" if v is None else f"{v:.3g}" if isinstance(v, float) else v for v in line.values()))
    console.print("RMSE of the best attacker at equal accuracy lost", second)
    print(f"tables and figures: {path}")
