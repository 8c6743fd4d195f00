"""Power laws in model size, with intervals, for scaling_study.py."""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from image_tables import drawable, mean
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lmleak.report.drawing import BLUE, GREY, INK, ORANGE, PURPLE, SKY, VERMILION, house_style, light_grid

RESAMPLES = 1000
COLOURS = (BLUE, ORANGE, PURPLE, VERMILION, SKY, INK, GREY)
HALF = "noise at half recall"


def power_law(
    sizes: Sequence[float], values: NDArray, *, seed: int, reduce: Callable[[NDArray], float] | None = None
) -> dict:
    """Fit q = a N^s by least squares on logarithms; the interval is over texts and seeds.

    Pigeonhole bootstrap (Owen 2007, The pigeonhole bootstrap, Ann. Appl. Stat. 1(2)): seeds and texts are drawn anew,
    each with replacement, and a cell counts as often as its seed and its text together. It is somewhat wide.

    Args:
        sizes: N, (K,).
        values: (K, seeds, texts) positive quantities, NaN where there is none; or (K, seeds, texts, L) with
            ``reduce``.
        seed: Seed of the bootstrap.
        reduce: Turns the weighted means over seeds and texts, (L,), into one quantity per size; by default the
            quantity is the mean of logarithms.

    Returns:
        "exponent", "low", "high" (95 %), "at_1M" (the law's value at a million parameters), and "sizes" used; the
        numbers are None where fewer than three sizes have a value.
    """

    def law(seed_weights: NDArray, text_weights: NDArray) -> tuple[float, float, int]:
        weights = np.outer(seed_weights, text_weights)
        logs = np.array([_log_quantity(cells, weights, reduce) for cells in values])
        known = np.isfinite(logs)
        if known.sum() < 3:
            return math.nan, math.nan, int(known.sum())
        slope, intercept = np.polyfit(np.log(np.asarray(sizes, float))[known], logs[known], 1)
        return float(slope), float(intercept), int(known.sum())

    seeds, texts = values.shape[1:3]
    slope, intercept, used = law(np.ones(seeds), np.ones(texts))
    if math.isnan(slope):
        return {"exponent": None, "low": None, "high": None, "at_1M": None, "sizes": used}
    generator = np.random.default_rng(seed)
    draw = lambda count: generator.multinomial(count, np.full(count, 1 / count)).astype(float)
    slopes = np.array([law(draw(seeds), draw(texts))[0] for _ in range(RESAMPLES)])
    low, high = np.quantile(slopes[np.isfinite(slopes)], [0.025, 0.975])
    at_million = math.exp(intercept + slope * math.log(1e6))
    return {"exponent": slope, "low": float(low), "high": float(high), "at_1M": at_million, "sizes": used}


def _log_quantity(cells: NDArray, weights: NDArray, reduce: Callable[[NDArray], float] | None) -> float:
    """Return the logarithm of one size's quantity under weights of seeds and texts, NaN if there is none."""
    known = np.isfinite(cells) if reduce is None else np.isfinite(cells).all(-1)
    weights = np.where(known, weights, 0.0)
    if weights.sum() == 0:
        return math.nan
    if reduce is None:
        return float((np.log(np.where(known, cells, 1.0)) * weights).sum() / weights.sum())
    means = (np.where(known[..., None], cells, 0.0) * weights[..., None]).sum((0, 1)) / weights.sum()
    return math.log(value) if (value := reduce(means)) > 0 else math.nan


def crossing(levels: Sequence[float], recall: Sequence[float], share: float = 0.5) -> float:
    """Return the noise level at which recall first falls below a share of the tokens, by interpolation in log noise.

    Args:
        levels: Noise levels, rising.
        recall: Recall at each.
        share: The share.

    Returns:
        The level; NaN where recall is below the share already at the first level, or nowhere.
    """
    for (low, before), (high, after) in zip(
        zip(levels, recall, strict=True), list(zip(levels, recall, strict=True))[1:], strict=False
    ):
        if before >= share > after:
            return math.exp(math.log(low) + math.log(high / low) * (before - share) / (before - after))
    return math.nan


def cube(rows: Sequence[Mapping], get: Callable[[Mapping], object]) -> NDArray:
    """Return a quantity as (shapes, seeds, texts, ...), NaN for None, in the order in which they appear."""
    axes = [list(dict.fromkeys(row[name] for row in rows)) for name in ("shape", "seed", "text")]
    found = {tuple(row[n] for n in ("shape", "seed", "text")): get(row) for row in rows}
    return np.array([[[found[s, k, t] for t in axes[2]] for k in axes[1]] for s in axes[0]], dtype=float)


def levels_of(rows: Sequence[Mapping]) -> list[float]:
    """Return the noise levels, rising."""
    return sorted(float(level) for level in rows[0]["recall"])


def recall_cube(rows: Sequence[Mapping]) -> NDArray:
    """Return recall as (shapes, seeds, texts, levels)."""
    return cube(rows, lambda row: [row["recall"][f"{level:g}"] for level in levels_of(rows)])


def sizes_of(rows: Sequence[Mapping]) -> list[int]:
    """Return the number of parameters of every shape."""
    return list({row["shape"]: row["parameters"] for row in rows}.values())


def law_entries(rows: Sequence[Mapping], seed: int) -> list[dict]:
    """Return the fitted law of every quantity."""
    sizes, levels = sizes_of(rows), levels_of(rows)
    quantities = {
        "I2F at noise 1": cube(rows, lambda row: row["influence"]),
        "I_lb at noise 1": cube(rows, lambda row: row["lower_bound"]),
        "CG bound at noise 1": cube(rows, lambda row: row["cg_bound"]),
        "gradient rms": cube(rows, lambda row: row["gradient_rms"]),
        **{
            f"predicted error at noise {level:g}": cube(rows, lambda row, level=level: row["predicted"][f"{level:g}"])
            for level in levels
        },
    }
    laws = {name: power_law(sizes, values, seed=seed) for name, values in quantities.items()}
    laws[HALF] = power_law(sizes, recall_cube(rows), seed=seed, reduce=lambda recall: crossing(levels, recall))
    units = dict.fromkeys(quantities, "embedding spread") | {"gradient rms": "gradient", HALF: "gradient rms"}
    return [{"quantity": name, "unit": units[name], **law} for name, law in laws.items()]


def size_entries(rows: Sequence[Mapping]) -> list[dict]:
    """Return one line per size: medians of predictions, means of recall."""
    entries = []
    for shape in dict.fromkeys(row["shape"] for row in rows):
        own = [row for row in rows if row["shape"] == shape]
        middle = lambda name, own=own: _median([row[name] for row in own])
        entry = {
            "shape": shape, "parameters": own[0]["parameters"], "gradient_rms": middle("gradient_rms"),
            "I2F": middle("influence"), "I_lb": middle("lower_bound"), "products": middle("products"),
            "unconverged": sum(row["influence"] is None for row in own),
            "span_clean": mean(row["clean_recall"] for row in own),
        }  # fmt: skip
        for level in levels_of(rows):
            name = f"{level:g}"
            entry[f"predicted_{name}"] = _median([row["predicted"][name] for row in own])
            entry[f"recall_{name}"] = mean(row["recall"][name] for row in own)
        entries.append(entry)
    return entries


def _median(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.median(known)) if known else None


def draw_laws(rows: Sequence[Mapping], laws: Sequence[Mapping]) -> Figure:
    """Draw I2F against size with its law, recall against noise per size, and the noise of half recall against size."""
    sizes, levels = sizes_of(rows), levels_of(rows)
    by_name = {law["quantity"]: law for law in laws}
    recall = np.nanmean(recall_cube(rows), axis=(1, 2))  # (shapes, levels)
    with house_style():
        figure = Figure(figsize=(13.5, 4.4), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        for (name, field), colour in zip(
            {"I2F at noise 1": "influence", "I_lb at noise 1": "lower_bound"}.items(), COLOURS, strict=False
        ):
            points = [(row["parameters"], row[field]) for row in rows if row[field]]
            left.scatter(
                [n for n, _ in points], [value for _, value in points], s=12, alpha=0.5, color=colour, linewidths=0
            )
            _draw_law(left, sizes, by_name[name], colour, name)
        left.set(
            xscale="log", yscale="log", xlabel="parameters without embeddings",
            ylabel="predicted error (rms, embedding spreads)", title="Influence at noise = gradient rms",
        )  # fmt: skip
        for index, (size, colour) in enumerate(zip(sizes, COLOURS * len(sizes), strict=False)):
            middle.plot(levels, recall[index], "o-", color=colour, markersize=4, label=f"{size / 1e6:.3g} M")
        middle.set(xscale="log", xlabel="noise (multiples of the gradient's rms)", ylabel="share of tokens recovered",
                   ylim=(-0.04, 1.06), title="Attack on the noisy gradient")  # fmt: skip
        halves = drawable([crossing(levels, line) for line in recall])
        right.plot(sizes, halves, "s", color=INK)
        _draw_law(right, sizes, by_name[HALF], INK, HALF)
        any_half = not all(map(math.isnan, halves))  # a logarithmic axis without a point cannot be drawn
        right.set(xscale="log", yscale="log" if any_half else "linear", xlabel="parameters without embeddings",
                  ylabel="noise (multiples of the gradient's rms)", title="Noise that halves recovery")  # fmt: skip
        for axes in (left, middle, right):
            light_grid(axes)
            axes.legend()
    return figure


def _draw_law(axes, sizes: Sequence[float], law: Mapping, colour: str, name: str) -> None:
    if law["exponent"] is None:
        axes.plot([], [], color=colour, label=f"{name}: too few sizes")
        return
    line = [law["at_1M"] * (size / 1e6) ** law["exponent"] for size in sizes]
    label = f"{name}: N^{law['exponent']:.2f} [{law['low']:.2f}, {law['high']:.2f}]"
    axes.plot(sizes, line, color=colour, label=label)
