"""Tables and figure of the study of initialisations."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
from image_study_parts import LOCAL
from matplotlib.figure import Figure

from lmleak.metrics import rank_correlation
from lmleak.report.drawing import BLUE, GREY, INK, ORANGE, PURPLE, SKY, VERMILION, house_style, light_grid

RESAMPLES = 1000
PUBLISHED_MSE = {"uniform": ".16-.27", "normal": ".13-1.0", "kaiming": "1.0-2.0", "xavier": "1.1-2.0"}
PUBLISHED_AXIS = {"uniform": "~10", "normal": "~3", "kaiming": "~900", "xavier": "~1400"}
"""MNIST, LeNet and DLG, read by eye from the figure of Zhang et al. 2023; the axis is mean(1 / s_i)."""
AXES = {
    "mean_inverse_singular": r"mean of $1 / s_i$ (published axis, x / gradient)",
    "unbiased_mse": r"$\sigma^2\,\mathrm{tr}(A^{-1}) / d_x$ (squared normalised pixels)",
    "bayes_mse": "best attacker who knows the prior, MSE",
}
COLOURS = (VERMILION, ORANGE, BLUE, SKY, PURPLE, GREY)

Cells = dict[tuple[int, int], float]
"""A number per draw of the weights and image."""


def cells(rows: Sequence[dict], initialization: str, field: str, attack: str | None = None) -> Cells:
    """Return a number per network and image, averaged over draws of the noise; infinite where there is none."""
    found: dict[tuple[int, int], list[float]] = {}
    for row in rows:
        if row["initialization"] == initialization and attack in (None, row["attack"]):
            value = row[field]
            found.setdefault((row["model_seed"], row["sample"]), []).append(math.inf if value is None else value)
    return {place: float(np.mean(values)) for place, values in found.items()}


def resampled(tables: Sequence[Cells], statistic: Callable[..., float], seed: int) -> tuple[float, float, float]:
    """Return a statistic of matrices (networks, images) with a 95 % interval, both drawn with replacement together."""
    models, images = (sorted({place[axis] for place in tables[0]}) for axis in (0, 1))
    arrays = [np.array([[table[m, i] for i in images] for m in models]) for table in tables]
    generator = np.random.default_rng(seed)
    draws = []
    for _ in range(RESAMPLES):
        chosen = np.ix_(
            generator.integers(len(models), size=len(models)), generator.integers(len(images), size=len(images))
        )
        draws.append(statistic(*(array[chosen] for array in arrays)))
    return statistic(*arrays), *map(float, np.quantile(draws, [0.025, 0.975], method="nearest"))


def median(values: np.ndarray) -> float:
    """Return the median as a plain number."""
    return float(np.median(values))


def names_of(rows: Sequence[dict], field: str) -> list[str]:
    """Return the values of a field in the order of the rows."""
    return list(dict.fromkeys(row[field] for row in rows))


def initialization_entries(rows: Sequence[dict], mnist: bool, seed: int) -> list[dict]:
    """Return one line per initialisation: medians over networks and images, with intervals."""
    entries = []
    for name in names_of(rows, "initialization"):
        networks, images = (len({row[f] for row in rows}) for f in ("model_seed", "sample"))
        entry = {"initialization": name, "networks": networks, "images": images}
        numbers = {field: (field, None) for field in AXES}
        numbers |= {f"{attack} mse": ("mse", attack) for attack in names_of(rows, "attack")}
        for label, (field, attack) in numbers.items():
            value, low, high = resampled([cells(rows, name, field, attack)], median, seed)
            entry |= {label: value, f"{label} interval": f"{low:.3g} to {high:.3g}"}
        if mnist:
            entry |= {"published mse": PUBLISHED_MSE.get(name), "published axis": PUBLISHED_AXIS.get(name)}
        entries.append(entry)
    return entries


def order_entries(rows: Sequence[dict], seed: int) -> list[dict]:
    """Return, per attacker, whether each initialisation is riskier than the next, and which axis ranks the errors."""
    entries = []
    names, attacks = names_of(rows, "initialization"), names_of(rows, "attack")
    for attack in attacks:
        errors = {name: cells(rows, name, "mse", attack) for name in names}
        for first, second in pairwise(names):
            share, low, high = resampled(
                [errors[first], errors[second]], lambda a, b: float((a[:, :, None, None] < b).mean()), seed
            )
            entries.append({
                "attack": attack, "statement": f"P(MSE under {first} < MSE under {second})", "value": share,
                "low": low, "high": high,
            })  # fmt: skip
        for axis in AXES:
            points = [(cells(rows, name, axis)[p], e, p) for name in names for p, e in errors[name].items()]
            points = [point for point in points if math.isfinite(point[0]) and math.isfinite(point[1])]
            if len(points) > 2:
                x, y, places = zip(*points, strict=True)
                found = rank_correlation(x, y, groups=[image for _, image in places], seed=seed)
                entries.append({
                    "attack": attack, "statement": f"Spearman of {axis} and MSE", "value": found.value,
                    "low": found.low, "high": found.high,
                })  # fmt: skip
    return entries


def initialization_figure(rows: Sequence[dict]) -> Figure:
    """Draw the error of every attacker (rows of panels) over every axis (columns)."""
    names, attacks = names_of(rows, "initialization"), names_of(rows, "attack")
    with house_style():
        figure = Figure(figsize=(11, 0.7 + 2.9 * len(attacks)), layout="constrained")
        panels = figure.subplots(len(attacks), len(AXES), squeeze=False, sharex="col")
        for line, attack in zip(panels, attacks, strict=True):
            errors = {name: cells(rows, name, "mse", attack) for name in names}
            measured = [e for own in errors.values() for e in own.values() if math.isfinite(e)]
            for axes, (axis, label) in zip(line, AXES.items(), strict=True):
                for colour, name in zip(COLOURS, names, strict=False):
                    x = cells(rows, name, axis)
                    axes.scatter([x[place] for place in errors[name]], list(errors[name].values()), s=26, alpha=0.8,
                                 color=colour, linewidths=0, label=name)  # fmt: skip
                axes.set(xscale="log", yscale="log")
                if axis != "mean_inverse_singular":
                    low, high = axes.get_xlim()
                    axes.plot([low, high], [low, high], color=INK, linewidth=0.9, zorder=0, label="equal")
                    axes.set_xlim(low, high)
                axes.set_ylim(min(measured) / 1.7, max(measured) * 1.7)
                light_grid(axes)
                if attack == attacks[-1]:
                    axes.set_xlabel(label)
            line[0].set_ylabel("MSE (squared normalised pixels)")
            line[0].set_title("local (starts at the truth)" if attack == LOCAL else attack.partition("(")[0])
        handles, labels = panels[0][-1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure
