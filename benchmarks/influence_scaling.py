"""How gradient, product and I_lb scale: sweeps of length, layers, width and batch around one shape, and slopes.

    python -m benchmarks.influence --fit                          # around a BERT of 4 layers, 256 wide, 64 tokens
    python -m benchmarks.influence --fit --shapes gpt2 --device cuda

Each axis is doubled while the others stay. The slope of log(cost) over log(axis) is least squares with Student's 95 %
interval; a cost c n^s + fixed bends, so a slope from few points is a summary of this range, not a law. Widths keep
heads of 64.
"""

import math
from pathlib import Path

import numpy as np
from rich.console import Console
from scipy.special import stdtrit

from benchmarks.cases import markdown, run_cases, shape_source, table

CENTRE = {"tokens": 64, "batch": 1, "layers": 4, "width": 256}
AXES = {
    "tokens": [16, 32, 64, 128, 256, 512], "batch": [1, 2, 4, 8, 16], "layers": [1, 2, 4, 8, 16],
    "width": [64, 128, 256, 512, 1024],
}  # fmt: skip
COSTS = {
    "gradient, s": "gradient_seconds", "product, s": "product_seconds", "product, gradients": "product_gradients",
    "I_lb, s": "bound_seconds", "I_lb, products": "bound_products", "peak GiB, I_lb": "bound_peak_gib",
}  # fmt: skip


def run_fit(options) -> None:
    """Measure every point of the sweeps, fit, print and write the slopes.

    Args:
        options: The command line of benchmarks.influence.
    """
    output = Path(options.output or f"runs/benchmarks/influence-scaling-{options.device.partition(':')[0]}.jsonl")
    (shape,) = options.shapes or ["bert-base"]
    pieces = options.pieces or ["product", "bound"]
    axes = AXES | ({"tokens": options.lengths} if options.lengths else {})
    points = [CENTRE | {axis: value} for axis, values in axes.items() for value in values]
    cases = [
        {"group": "influence", "shape": shape_source(shape), "pieces": pieces, "device": options.device,
         "threads": options.threads, **point, "tokens": [point["tokens"]]}
        for i, point in enumerate(points)
        if point not in points[:i]
    ]  # fmt: skip
    with run_cases("benchmarks.influence", cases, str(output), budget=options.budget) as rows:
        if not rows:
            return
        titles = ["", *(f"over {axis} ({min(values)} to {max(values)})" for axis, values in axes.items())]
        lines = [[title, *(described(rows, axis, key) for axis in axes)] for title, key in COSTS.items()]
        Console(width=200).print(table(f"Slopes of log-log fits, {shape}", titles, lines))
        notes = (
            f"Slopes of log(cost) over log(axis) around {CENTRE} in the {shape} shape, with 95 % intervals and the "
            f"number of points; device {options.device}, {options.threads} threads."
        )
        page = markdown("Scaling of the risk numbers", titles, lines, rows[-1]["provenance"], notes)
        output.with_suffix(".md").write_text(page, encoding="utf-8")


def described(rows: list[dict], axis: str, key: str) -> str:
    """Return slope, interval and number of points of one cost over one axis."""
    others = {name: value for name, value in CENTRE.items() if name != axis}
    points = [(r[axis], r[key]) for r in rows if r.get(key) and all(r[n] == v for n, v in others.items())]
    if len(points) < 3:
        return "too few points"
    slope, low, high = log_log_slope(*zip(*points, strict=True))
    return f"{slope:.2f} [{low:.2f}, {high:.2f}] ({len(points)})"


def log_log_slope(sizes, costs, confidence: float = 0.95) -> tuple[float, float, float]:
    """Return the least-squares slope of log(cost) over log(size), and Student's interval.

    Args:
        sizes: Positive, at least three.
        costs: Positive.
        confidence: Of the interval.

    Returns:
        (slope, low, high).
    """
    x, y = np.log(np.asarray(sizes, float)), np.log(np.asarray(costs, float))
    deviation = x - x.mean()
    slope = float(deviation @ y / (deviation @ deviation))
    residual = y - y.mean() - slope * deviation
    error = math.sqrt(residual @ residual / (len(x) - 2) / (deviation @ deviation))
    reach = float(stdtrit(len(x) - 2, (1 + confidence) / 2)) * error
    return slope, slope - reach, slope + reach
