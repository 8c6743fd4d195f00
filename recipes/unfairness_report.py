"""Tables and figures of the study of unfairness."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import torch
from image_study_parts import LOCAL
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from numpy.typing import NDArray
from scipy.stats import spearmanr

from lmleak.evaluation.image_attack import images_of
from lmleak.evaluation.image_study import ImageStudy
from lmleak.metrics import rank_correlation
from lmleak.report.drawing import BLUE, GREY, INK, ORANGE, PURPLE, SKY, VERMILION, house_style, light_grid
from lmleak.report.image_grid import image_grid
from lmleak.report.rows import compact

RESAMPLES = 1000
PUBLISHED_MSE = {2: 0.42, 4: 0.7, 8: 0.7, 9: 0.9, 3: 1.0, 7: 1.0, 5: 1.0, 0: 1.7, 6: 1.7, 1: 1.8}
"""Median of each class of MNIST, read by eye from the figure of Zhang et al. 2023."""
ATTACK_COLOURS = (VERMILION, BLUE, ORANGE, PURPLE)


def predictions(rows: Sequence[dict]) -> list[dict]:
    """Return the rows that predict, one per network and image."""
    return [row for row in rows if row["attack"] is None]


def attacked(rows: Sequence[dict], attack: str) -> list[dict]:
    """Return the rows of an attacker that ended at an image."""
    return [row for row in rows if row["attack"] == attack and row["rmse"] is not None]


def attack_names(rows: Sequence[dict]) -> list[str]:
    """Return the attackers, in the order they were run."""
    return list(dict.fromkeys(row["attack"] for row in rows if row["attack"] is not None))


def by_model_and_image(rows: Sequence[dict], field: str) -> tuple[NDArray, NDArray]:
    """Return a prediction as a matrix (networks, images), infinite where there is no bound, and the images' labels."""
    own = predictions(rows)
    models = list(dict.fromkeys(row["model_seed"] for row in own))
    table = [[np.inf if r[field] is None else r[field] for r in own if r["model_seed"] == m] for m in models]
    return np.array(table, dtype=float), np.array([r["label"] for r in own if r["model_seed"] == models[0]])


def interval(table: NDArray, seed: int) -> tuple[float, float, float]:
    """Return the median of a matrix with a 95 % interval: networks and images are both drawn with replacement."""
    generator, (models, images) = np.random.default_rng(seed), table.shape
    draws = [
        np.median(table[np.ix_(generator.integers(models, size=models), generator.integers(images, size=images))])
        for _ in range(RESAMPLES)
    ]
    return float(np.median(table)), *map(float, np.quantile(draws, [0.025, 0.975], method="nearest"))


def class_entries(rows: Sequence[dict], names: Sequence[str], mnist: bool, seed: int) -> list[dict]:
    """Return one line per class, the least protected first: medians over networks and images, with intervals."""
    unbiased, labels = by_model_and_image(rows, "unbiased_rms")
    bayes, chances = by_model_and_image(rows, "bayes_rms")[0], by_model_and_image(rows, "true_chance")[0]
    entries = []
    for label in np.unique(labels):
        own = labels == label
        entry = {"label": int(label), "class": names[label], "images": int(own.sum()), "networks": len(unbiased)}
        for name, table in (("unbiased", unbiased), ("bayes", bayes)):
            middle, low, high = interval(table[:, own], seed)
            models = np.median(table[:, own], axis=1)
            entry |= {
                f"{name}_rms": middle,
                f"{name}_low": low,
                f"{name}_high": high,
                f"{name}_least_network": float(models.min()),
                f"{name}_largest_network": float(models.max()),
            }
        entry["true_chance"] = float(np.median(chances[:, own]))
        for attack in attack_names(rows):
            errors = [row["rmse"] for row in attacked(rows, attack) if row["label"] == label]
            entry[f"{attack} rmse"] = float(np.median(errors)) if errors else None
        if mnist:
            entry["published_rmse"] = PUBLISHED_MSE[int(label)] ** 0.5
        entries.append(entry)
    return sorted(entries, key=lambda entry: entry["bayes_rms"])


def number_entries(rows: Sequence[dict], names: Sequence[str], mnist: bool, seed: int) -> list[dict]:
    """Return what is said of all images together, each number with its 95 % interval or range."""
    unbiased, labels = by_model_and_image(rows, "unbiased_rms")
    bayes, chances = by_model_and_image(rows, "bayes_rms")[0], by_model_and_image(rows, "true_chance")[0]
    entries = []

    def add(quantity: str, value, low=None, high=None, of: str = "", count: int | None = None) -> None:
        entries.append({"quantity": quantity, "value": value, "low": low, "high": high, "range": of, "n": count})

    for name, table in (("unbiased", unbiased), ("bayes", bayes)):
        add(f"predicted RMSE, {name}", *interval(table, seed), "95 %, median over networks and images", table.size)
        spread = [float(np.quantile(r, 0.95) / np.quantile(r, 0.05)) for r in table]
        add(f"spread within one network, 95 % / 5 % quantile, {name}", float(np.median(spread)), min(spread),
            max(spread), "networks", len(spread))  # fmt: skip
    for attack in attack_names(rows):
        own = attacked(rows, attack)
        for predictor in ("unbiased_rms", "bayes_rms"):
            kept = [row for row in own if row[predictor] is not None]
            if len(kept) > 2:
                groups = [f"{row['model_seed']}|{row['sample']}" for row in kept]
                found = rank_correlation(
                    [r[predictor] for r in kept], [r["rmse"] for r in kept], groups=groups, seed=seed
                )
                add(f"Spearman, {predictor} and RMSE of {attack}", found.value, found.low, found.high, "95 %, images",
                    len(kept))  # fmt: skip
    finite = np.isfinite(unbiased)
    found = rank_correlation(1 - chances[finite], unbiased[finite], seed=seed)
    add("Spearman, unbiased_rms and 1 - chance of the true class", found.value, found.low, found.high, "95 %, images",
        int(finite.sum()))  # fmt: skip
    classes = np.unique(labels)
    medians = np.stack([np.median(bayes[:, labels == c], axis=1) for c in classes], axis=1)  # (networks, classes)
    if len(medians) > 1 and len(classes) > 2:
        pairs = [float(spearmanr(a, b).statistic) for a, b in combinations(medians, 2)]
        add("Spearman of the class order between two networks", float(np.mean(pairs)), min(pairs), max(pairs),
            "pairs of networks", len(pairs))  # fmt: skip
        for name, share in variance_shares(np.log(bayes), labels).items():
            add(f"share of the variance of log bayes_rms: {name}", share)
        add("p-value of a class order common to all networks", common_order_p(medians, seed), of="permutations")
    if mnist and len(classes) == len(PUBLISHED_MSE):
        published = [PUBLISHED_MSE[int(c)] for c in classes]
        agreement = [float(spearmanr(own, published).statistic) for own in medians]
        add("Spearman of a network's class order and the published", float(np.mean(agreement)), min(agreement),
            max(agreement), "networks", len(agreement))  # fmt: skip
    return entries


def variance_shares(table: NDArray, labels: NDArray) -> dict[str, float]:
    """Return the parts of the variance of (networks, images): what class, network and both together explain."""
    centred = table - table.mean()
    of_class = np.stack([centred[:, labels == c].mean() for c in labels])
    of_cell = np.stack([centred[:, labels == c].mean(axis=1) for c in labels], axis=1)
    of_model = centred.mean(axis=1)
    total = centred.var()
    parts = {
        "network": of_model.var(),
        "class, the same in all networks": of_class.var(),
        "class, each network its own": of_cell.var() - of_model.var() - of_class.var(),
        "image within its class": (centred - of_cell).var(),
    }
    return {name: float(part / total) for name, part in parts.items()}


def common_order_p(medians: NDArray, seed: int) -> float:
    """Return how often classes shuffled within every network agree as well as the real ones: Friedman's statistic."""
    ranks = medians.argsort(axis=1).argsort(axis=1)
    generator = np.random.default_rng(seed)
    draws = [generator.permuted(ranks, axis=1).mean(axis=0).var() for _ in range(RESAMPLES)]
    return (1 + sum(draw >= ranks.mean(axis=0).var() - 1e-12 for draw in draws)) / (1 + RESAMPLES)


def unfairness_figure(rows: Sequence[dict], classes: Sequence[dict]) -> Figure:
    """Draw predicted errors of classes, predicted against measured errors, and why they differ."""
    own = predictions(rows)
    with house_style():
        measured = [(a, attacked(rows, a)) for a in attack_names(rows)]
        figure = Figure(figsize=(9.6 if measured else 6.8, 3.7), layout="constrained")
        left, *others = figure.subplots(1, 3 if measured else 2)
        middle, right = others[0], others[-1]
        names = [entry["class"] for entry in classes]
        models = list(dict.fromkeys(row["model_seed"] for row in own))
        for place, entry in enumerate(classes):
            same = [
                [r["bayes_rms"] for r in own if (r["model_seed"], r["label"]) == (m, entry["label"])] for m in models
            ]
            left.scatter([place] * len(models), [np.median(v) for v in same], s=16, color=SKY, linewidths=0,
                         label="" if place else "one network's median")  # fmt: skip
            error = [[entry["bayes_rms"] - entry["bayes_low"]], [entry["bayes_high"] - entry["bayes_rms"]]]
            left.errorbar([place + 0.2], [entry["bayes_rms"]], yerr=error, fmt="o", color=INK, markersize=5,
                          label="" if place else "median, 95 % over networks and images")  # fmt: skip
            if "published_rmse" in entry:
                left.scatter([place - 0.2], [entry["published_rmse"]], marker="x", color=VERMILION, s=26,
                             label="" if place else "published attack, read by eye")  # fmt: skip
        left.set_xticks(range(len(names)), names)
        left.set_xlabel("class")
        left.set_ylabel("predicted RMSE, bayes (norm. pixels)")
        left.set_title("Classes")
        for number, (attack, found) in enumerate(measured):
            style = {"facecolors": "none", "edgecolors": INK} if attack == LOCAL else {
                "color": ATTACK_COLOURS[(number - 1) % 4], "linewidths": 0}  # fmt: skip
            middle.scatter([r["bayes_rms"] for r in found], [r["rmse"] for r in found], s=26, alpha=0.8,
                           label="local (starts at the truth)" if attack == LOCAL else attack.partition("(")[0],
                           **style)  # fmt: skip
        if measured:
            values = [v for _, found in measured for r in found for v in (r["bayes_rms"], r["rmse"])]
            ends = [min(values) / 1.2, max(values) * 1.2]
            middle.plot(ends, ends, color=GREY, linewidth=1, zorder=0, label="equal")
            across = [r["bayes_rms"] for _, found in measured for r in found]
            middle.set(xscale="log", yscale="log", xlim=(min(across) / 1.05, max(across) * 1.05), ylim=ends)
            readable(middle.xaxis, middle.yaxis)
            middle.set_xlabel("predicted RMSE, bayes")
            middle.set_ylabel("RMSE of attackers (norm. pixels)")
            middle.set_title("Attacked images")
        bounded = [row for row in own if row["unbiased_rms"] is not None]
        right.scatter([1 - r["true_chance"] for r in bounded], [r["unbiased_rms"] for r in bounded], s=4, color=BLUE,
                      linewidths=0)  # fmt: skip
        right.set(xscale="log", yscale="log")
        readable(right.xaxis, right.yaxis)
        right.set_xlabel("1 - chance of the true class")
        right.set_ylabel("predicted RMSE, unbiased (same unit)")
        right.set_title("Confidence and risk")
        for axes in figure.axes:
            light_grid(axes)
        handles = [h for axes in (left, middle) for h in axes.get_legend_handles_labels()[0]]
        figure.legend(handles=handles, loc="outside lower center", ncols=4 if measured else 2)
    return figure


def readable(*scales: Axis) -> None:
    """Write 1, 2 and 5 times powers of ten on logarithmic axes of few decades as plain numbers."""
    for scale in scales:
        low, high = scale.get_view_interval()
        subs = (1, 2, 5) if high > 4 * low else (1, 2, 3, 4, 5, 7)
        scale.set_major_locator(LogLocator(subs=subs if high < 300 * low else (1,)))
        scale.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        scale.set_minor_formatter(NullFormatter())


def grid_figure(study: ImageStudy, rows: Sequence[dict], columns: int = 2) -> Figure:
    """Draw images of the classes that one network protects worst and best; all errors are per normalised pixel."""
    first = rows[0]["model_seed"]
    own = [row for row in rows if row["model_seed"] == first]
    hit = sorted({row["sample"] for row in own if row["attack"] is not None})
    plain = {row["sample"]: row for row in own if row["attack"] is None}
    labels = {plain[sample]["label"] for sample in hit}
    middle = {c: np.median([r["bayes_rms"] for r in plain.values() if r["label"] == c]) for c in labels}
    shown, titles = [], []
    for label, kind in ((min(middle, key=middle.get), "worst"), (max(middle, key=middle.get), "best")):
        samples = [sample for sample in hit if plain[sample]["label"] == label][:columns]
        shown += samples
        titles += [
            f"{kind}: {study.data.class_names[label]}\npredicted RMSE {compact(plain[s]['bayes_rms'])}"
            for s in samples
        ]
    original = study.data.pixels[[study.indices(sample)[0] for sample in shown]]
    recovered, captions = {}, {}
    for attack in attack_names(rows):
        name = attack.partition("(")[0]
        images = [next(r for r in own if (r["sample"], r["attack"]) == (sample, attack)) for sample in shown]
        recovered[name] = torch.cat([images_of(row, original[:1]) for row in images])
        captions[name] = ["diverged" if row["rmse"] is None else f"RMSE {compact(row['rmse'])}" for row in images]
    return image_grid(original, recovered, column_titles=titles, captions=captions, differences=False)
