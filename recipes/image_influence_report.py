"""Statistics, tables and figures of the recipe image_influence."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from lmleak.files import write_bytes_atomically, write_csv_atomically
from lmleak.report.drawing import BLUE, GREY, INK, ORANGE, PURPLE, SKY, VERMILION, encode, house_style, light_grid

LOCAL = {"local": "local_rmse", "local-map": "local_map_rmse"}  # attackers who start at the truth: their field
PREDICTED = ("lower_bound_rms", "influence_rms", "map_response_rms", "map_rms", "bayes_rms")
RESAMPLES = 2000
UNIT = "RMS per normalised pixel"
# Hollow and of several sizes: results that agree lie upon each other.
LOOKS = (("o", INK, 62), ("x", BLUE, 16), ("^", PURPLE, 40), ("s", GREY, 26), ("D", ORANGE, 22), ("v", SKY, 22))


# Numbers ---------------------------------------------------------------------------------------------------


def points(rows: Sequence[dict]) -> list[dict]:
    """Return one entry per model, image, level and attacker: predictions and ``rmse``, which is None if diverged."""
    found = []
    for row in rows:
        kept = {k: row[k] for k in ("model", "sample", "noise_variance", *PREDICTED)}
        if row["attack"] == rows[0]["attack"]:  # what starts at the truth is in every row of an image and level
            found += [kept | {"attack": name, "rmse": row[field]} for name, field in LOCAL.items()]
        found.append(kept | {"attack": row["attack"], "rmse": row.get("rmse")})
    return found


def bootstrap(
    chosen: Sequence[dict], statistic: Callable[[list[dict]], float], seed: int
) -> tuple[float, float, float]:
    """Return a statistic of points with its 95 % interval by bootstrap over images."""
    images = list(dict.fromkeys(p["sample"] for p in chosen))
    own = [[p for p in chosen if p["sample"] == image] for image in images]
    generator = np.random.default_rng(seed)
    draws = [
        statistic([p for k in generator.integers(len(own), size=len(own)) for p in own[k]]) for _ in range(RESAMPLES)
    ]
    # One level of noise has no slope, and so no interval.
    low, high = (float("nan"),) * 2 if np.isnan(draws).all() else np.nanquantile(draws, [0.025, 0.975])
    return statistic(list(chosen)), float(low), float(high)


def slope(chosen: Sequence[dict]) -> float:
    """Return the least-squares slope of log RMSE against log I2F / sqrt(dx)."""
    x, y = (np.log([p[name] for p in chosen]) for name in ("influence_rms", "rmse"))
    return float(np.polyfit(x, y, 1)[0]) if np.ptp(x) > 0 else float("nan")


def ratios(chosen: Sequence[dict], prediction: str) -> np.ndarray:
    """Return RMSE over a prediction, per point."""
    return np.array([p["rmse"] / p[prediction] for p in chosen])


def regimes(rows: Sequence[dict], *, linear_below: float, tolerance: float, seed: int) -> list[dict]:
    """Return per model and attacker what holds in the linear regime, and over all levels.

    ``below_bound`` counts results below I_lb by more than the tolerance. I_lb bounds I2F, hence attackers who only
    match the gradient, where the matching is linear; over all levels, prior knowledge may go below it.
    """
    every, found = points(rows), []
    for model, attack in dict.fromkeys((p["model"], p["attack"]) for p in every):
        own = [p for p in every if (p["model"], p["attack"]) == (model, attack) and p["rmse"]]
        linear = [p for p in own if p["influence_rms"] < linear_below]
        entry = {"model": model, "attack": attack, "points": len(own), "linear_points": len(linear)}
        entry |= dict.fromkeys(("slope", "slope_low", "slope_high"), float("nan"))
        entry |= dict.fromkeys(("ratio", "ratio_low", "ratio_high", "ratio_least", "ratio_most"), float("nan"))
        if linear:
            near = ratios(linear, "influence_rms")
            entry |= dict(zip(("slope", "slope_low", "slope_high"), bootstrap(linear, slope, seed), strict=True))
            middle = bootstrap(linear, lambda some: float(np.median(ratios(some, "influence_rms"))), seed)
            entry |= dict(zip(("ratio", "ratio_low", "ratio_high"), middle, strict=True))
            entry |= {"ratio_least": near.min(), "ratio_most": near.max()}
        below = [p["rmse"] < (1 - tolerance) * p["lower_bound_rms"] for p in own]
        entry["below_bound_linear"] = sum(b for b, p in zip(below, own, strict=True) if p in linear)
        entry["below_bound_all"] = sum(below)
        of_map = ratios(own, "map_rms") if own else np.array([np.nan])
        entry |= {"of_map": np.median(of_map), "of_map_least": of_map.min(), "of_map_most": of_map.max()}
        found.append(entry)
    return found


def medians(rows: Sequence[dict]) -> list[dict]:
    """Return per model and noise level the medians over images of predictions, I_eps and every attacker's RMSE."""
    every, found = points(rows), []
    for model, variance in dict.fromkeys((r["model"], r["noise_variance"]) for r in rows):
        same = [r for r in rows if (r["model"], r["noise_variance"]) == (model, variance)]
        first = [r for r in same if r["attack"] == rows[0]["attack"]]
        entry = {"model": model, "noise_variance": variance, "images": len(first)}
        entry |= {name: np.median([r[name] for r in first]) for name in PREDICTED}
        entry |= {f"I_eps {eps}": np.median([r["damped_rms"][eps] for r in first]) for eps in first[0]["damped_rms"]}
        entry["map_damping"] = first[0]["map_damping"]
        for attack in dict.fromkeys(p["attack"] for p in every):
            own = [p["rmse"] for p in every
                   if (p["model"], p["noise_variance"], p["attack"]) == (model, variance, attack)]  # fmt: skip
            finite = [np.inf if rmse is None else rmse for rmse in own]
            entry[f"RMSE {attack}"] = float(np.median(finite))
        found.append(entry)
    return found


# Tables ----------------------------------------------------------------------------------------------------


def regime_table(entries: Sequence[dict], linear_below: float, tolerance: float) -> Table:
    """Return the table of the linear regime."""
    table = Table(
        "model", "attack", "points", "slope", "RMSE / I2F, median", "its range", "below I_lb, linear / all",
        "RMSE / MAP at all levels",
        title=f"linear regime: I2F / sqrt(dx) < {linear_below:g}; below I_lb: by more than {tolerance:.0%}",
    )  # fmt: skip
    for e in entries:
        table.add_row(
            e["model"], e["attack"], f"{e['linear_points']} of {e['points']}",
            f"{e['slope']:.3f} [{e['slope_low']:.3f}, {e['slope_high']:.3f}]",
            f"{e['ratio']:.3f} [{e['ratio_low']:.3f}, {e['ratio_high']:.3f}]",
            f"{e['ratio_least']:.3g} to {e['ratio_most']:.3g}",
            f"{e['below_bound_linear']} / {e['below_bound_all']}",
            f"{e['of_map']:.2f} ({e['of_map_least']:.3g} to {e['of_map_most']:.3g})",
        )  # fmt: skip
    return table


def damping_table(entries: Sequence[dict]) -> Table:
    """Return the table of I_eps per noise level."""
    dampings = [name for name in entries[0] if name.startswith("I_eps ")]
    table = Table(
        "model", "variance", *dampings, "I_eps, eps = variance / tau^2", "with shrinking (MAP)", "RMSE local-map",
        "RMSE local", title=f"medians over images, {UNIT}",
    )  # fmt: skip
    for e in entries:
        numbers = [*dampings, "map_response_rms", "map_rms", "RMSE local-map", "RMSE local"]
        table.add_row(e["model"], f"{e['noise_variance']:.0e}", *(f"{e[name]:.3g}" for name in numbers))
    return table


# Figures ---------------------------------------------------------------------------------------------------


def error_figure(rows: Sequence[dict], linear_below: float) -> Figure:
    """Draw RMSE against I_lb and I2F per model, both axes in one unit, with y = x and the predicted saturation."""
    every, middle = points(rows), medians(rows)
    models, attacks = (list(dict.fromkeys(p[name] for p in every)) for name in ("model", "attack"))
    looks = dict(zip(attacks, LOOKS * len(attacks), strict=False))
    with house_style():
        figure = Figure(figsize=(8.2, 3.3 * len(models) + 0.9), layout="constrained")
        panels = figure.subplots(len(models), 2, squeeze=False)
        for model, pair in zip(models, panels, strict=True):
            own = [p for p in every if p["model"] == model and p["rmse"]]
            levels = [e for e in middle if e["model"] == model]
            for axes, name, label in zip(pair, ("lower_bound_rms", "influence_rms"), ("I_lb", "I2F"), strict=True):
                for attack in attacks:
                    x, y = ([p[field] for p in own if p["attack"] == attack] for field in (name, "rmse"))
                    marker, colour, size = looks[attack]
                    axes.scatter(x, y, s=size, marker=marker, linewidths=1, label=attack.replace("{variance}", "var"),
                                 **({"color": colour} if marker == "x" else {"ec": colour, "fc": "none"}))  # fmt: skip
                axes.plot([e[name] for e in levels], [e["bayes_rms"] for e in levels], color=VERMILION,
                          linestyle="--", label="predicted: MAP, average over noise")  # fmt: skip
                finish_panel(axes, [p[name] for p in own], [p["rmse"] for p in own])
                if name == "influence_rms":
                    axes.axvspan(axes.get_xlim()[0], linear_below, color=SKY, alpha=0.1, linewidth=0)
                axes.set_title(f"{model}: {label}")
                axes.set_xlabel(f"{label} / sqrt(dx)  ({UNIT})")
                axes.set_ylabel(f"attack's RMSE\n({UNIT})")
        handles, labels = panels[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


def finish_panel(axes: Axes, x: Sequence[float], y: Sequence[float]) -> None:
    """Set both logarithmic axes, and draw y = x."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(min(x) / 2, max(x) * 2)
    axes.set_ylim(min(y) / 2, max(y) * 2)
    ends = (max(min(x), min(y)) / 2, min(max(x), max(y)) * 2)
    axes.plot(ends, ends, color=INK, linewidth=1, label="y = x")
    light_grid(axes)


def damping_figure(rows: Sequence[dict]) -> Figure:
    """Draw, per model, the error against the noise: I_eps at fixed and at the noise's own eps, MAP, and measured."""
    middle = medians(rows)
    models = list(dict.fromkeys(e["model"] for e in middle))
    dampings = [name for name in middle[0] if name.startswith("I_eps ")]
    shades = np.linspace(0.25, 1.0, len(dampings))
    with house_style():
        figure = Figure(figsize=(4.3 * max(2, len(models)), 4.9), layout="constrained")
        panels = figure.subplots(1, max(2, len(models)), squeeze=False)[0]
        for axes in panels[len(models) :]:
            axes.set_visible(False)
        for model, axes in zip(models, panels, strict=False):
            own = [e for e in middle if e["model"] == model]
            x = [e["noise_variance"] for e in own]
            axes.plot(x, [e["influence_rms"] for e in own], color=INK, linewidth=1, label="I2F (eps = 0)")
            labelled = own[0]["influence_rms"]
            for name, shade in zip(dampings, shades, strict=True):
                axes.plot(x, [e[name] for e in own], color=SKY, alpha=shade, linewidth=1.2)
                if own[0][name] > 0.8 * labelled:
                    continue  # its number would lie on the one above
                labelled = own[0][name]
                axes.annotate(name.removeprefix("I_eps "), (x[0], own[0][name]), fontsize=7.5, color=INK,
                              xytext=(-3, 0), textcoords="offset points", ha="right", va="center")  # fmt: skip
            axes.plot([], [], color=SKY, label="I_eps, eps fixed (number at the left)")
            axes.plot(x, [e["map_response_rms"] for e in own], color=ORANGE, linestyle="--",
                      label="I_eps, eps = variance / tau^2")  # fmt: skip
            axes.plot(x, [e["map_rms"] for e in own], color=VERMILION, label="with what shrinking loses (MAP)")
            axes.plot(x, [e["RMSE local"] for e in own], "o", color=INK, mfc="none", label="measured: local")
            axes.plot(x, [e["RMSE local-map"] for e in own], "x", color=BLUE, mew=2, label="measured: local-map")
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xlim(x[0] / 25, x[-1] * 2)
            light_grid(axes)
            axes.set_title(model)
            axes.set_xlabel("variance of the noise  (gradient²)")
            axes.set_ylabel(f"error, median over images\n({UNIT})")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def write_results(
    rows: Sequence[dict], folder: Path, *, linear_below: float, tolerance: float, seed: int
) -> list[Table]:
    """Write tables and figures, and return the tables for people."""
    entries, middle = regimes(rows, linear_below=linear_below, tolerance=tolerance, seed=seed), medians(rows)
    write_csv_atomically(folder / "image_influence.csv", entries)
    write_csv_atomically(folder / "image_influence_levels.csv", middle)
    figures = {"image_influence": error_figure(rows, linear_below), "image_influence_damping": damping_figure(rows)}
    for name, figure in figures.items():
        image = encode(figure, "png")
        write_bytes_atomically(folder / f"{name}.png", image)
    return [regime_table(entries, linear_below, tolerance), damping_table(middle)]
