"""What does a risk number cost, beside the attack that it predicts?

The efficiency study of Zhang et al. 2023 (arXiv:2309.13016): time and memory over models sorted by size, each case in
a process of its own so that its memory is its own. All for one image and one perturbation, Gaussian noise:
  gradient  what training computes anyway, the unit of all costs
  I_lb      ||J delta|| / lambda_max, the published lower bound
  CG-1      the first conjugate gradient's norm: a tighter lower bound by one product with A = J J^T, no eigenvalue
  CG-10     the tenth
  solve     I2F at damping 1e-5 lambda_max, to a relative residual of 1e-3, lambda_max included; up to solve_parameters
  dense     A as a matrix with its spectrum: I2F without damping and everything else; up to dense_unknowns pixels
  dlg, gs   inversion by Adam. EXTRAPOLATED: some steps are measured and multiplied up to the published 24,000

    python recipes/image_efficiency.py --config configs/image_efficiency/digits.yaml

(one line). On a CPU seconds are processor time of one thread, which other programs on the machine hardly change; on a
GPU they are wall time. Memory is the peak beyond model and image: of the process on a CPU (seen every 5 ms, and less
than a MiB tells nothing), of the allocator on a GPU. A model's own image shape is used: other images are resized, grey
ones repeated over its channels.
"""

import json
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from image_tables import Entry, drawable, publish
from matplotlib.figure import Figure
from rich.console import Console

from lmleak.adapters import ARCHITECTURES, VisionAdapter, adapt, image_model, load_adapter
from lmleak.adapters.targets import IMAGE_TASK
from lmleak.attacks import parse_attack
from lmleak.attacks.meter import Meter
from lmleak.config import check_counts, parse_config
from lmleak.data.images import load_images
from lmleak.defenses import GaussianNoise
from lmleak.errors import ConfigError, UnsupportedModelError
from lmleak.evaluation import exit_status
from lmleak.files import write_text_atomically
from lmleak.gradients import capture_gradient
from lmleak.influence import GradientJacobian, InfluenceSolver, eigen_directions
from lmleak.linops import multishift_cg
from lmleak.report.drawing import BLUE, GREY, INK, ORANGE, PURPLE, SKY, VERMILION, house_style, light_grid
from lmleak.types import Batch

PUBLISHED_STEPS = 24_000
IMPORTED_ONCE = ["lmleak.evaluation.image_study", "lmleak.report.drawing", "rich.table", "PIL.Image"]  # for all cases
NOISE = 1e-2  # times the gradient's root mean square; times do not depend on it
MEBIBYTE = 2**20
ATTACKS = ("dlg", "gs")
CG_PRODUCTS = {"cg-1": 1, "cg-10": 10}
STYLES = {
    "gradient": (GREY, "o", "gradient"),
    "cg-1": (SKY, "v", "CG-1 lower bound"),
    "cg-10": (BLUE, "^", "CG-10 lower bound"),
    "lower-bound": (INK, "s", "I_lb lower bound"),
    "solve": (ORANGE, "D", "I2F, solve"),
    "dense": (PURPLE, "P", "I2F, dense"),
    "dlg": (VERMILION, "x", "DLG inversion"),
    "gs": (VERMILION, "+", "GS inversion"),
}
METHODS = tuple(STYLES)


@dataclass(frozen=True, kw_only=True)
class EfficiencyConfig:
    """Measure time and memory of risk numbers and of inversion."""

    models: list[str] = field(default_factory=lambda: ["linear", "lenet", "mlp-512", "resnet20"])
    """Architectures, weights, shape files or hub ids of image classifiers."""
    methods: list[str] = field(default_factory=lambda: list(METHODS))
    """What is measured: gradient, lower-bound, cg-1, cg-10, solve, dense, dlg, gs; the first two are needed."""
    data: str = "digits"
    """Where the image is from."""
    split: str | None = None
    """Which part of the data."""
    steps: int = 20
    """Measured steps of an attack."""
    max_products: int = 300
    """Most products with A for the eigenvalue, and for the solve."""
    dense_unknowns: int = 784
    """Most pixels for which A is formed."""
    solve_parameters: int = 100_000_000
    """Most parameters for which the solve is run."""
    device: str = "cpu"
    """cpu or cuda."""
    seed: int = 0
    """Seed of weights, noise and attacks."""
    output: str = "runs/image_efficiency"
    """Folder for figures, tables and results.jsonl, which starts anew."""

    def __post_init__(self):
        if unknown := set(self.methods) - set(METHODS):
            raise ConfigError(f"methods must be among {', '.join(METHODS)}, got {min(unknown)!r}")
        if missing := {"gradient", "lower-bound"} - set(self.methods):
            raise ConfigError(f"methods must hold {min(missing)}, to which others are compared")
        check_counts(self, "steps", "max_products")
        if not self.models:
            raise ConfigError("models must not be empty")
        if self.device != "cpu" and not torch.cuda.is_available():
            raise ConfigError(f"device={self.device!r}, but no CUDA device is available; use device=cpu")


# One case, in its own process -----------------------------------------------------------------------------------


def load(config: EfficiencyConfig, model: str) -> tuple[VisionAdapter, Batch]:
    """Return a model on its device and an image of its shape, the first of the data."""
    if model in ARCHITECTURES:
        network = image_model(model, seed=config.seed)
        adapter = adapt(network, name=model, image_shape=network.image_shape)
        adapter.model.to(config.device)
    else:
        adapter = load_adapter(model, task=IMAGE_TASK, device=config.device, seed=config.seed)
    if not isinstance(adapter, VisionAdapter):
        raise UnsupportedModelError(f"{model} is of task {adapter.task!r}; this study needs {IMAGE_TASK!r}")
    channels, height, width = adapter.image_shape
    if height != width:
        raise UnsupportedModelError(f"{model} reads images of {height}x{width}; this study needs square ones")
    data = load_images(config.data, split=config.split, size=height)
    pixels = data.pixels[:1].expand(1, channels, height, width) if data.image_shape[0] == 1 else data.pixels[:1]
    return adapter, adapter.batch(adapter.normalization.normalize(pixels.to(adapter.dtype)), data.labels[:1])


def run(config: EfficiencyConfig, method: str, adapter: VisionAdapter, batch: Batch) -> dict:
    """Return what one method finds of one image's gradient under noise."""
    if method == "gradient":
        return {"gradient_rms": capture_gradient(adapter, batch, shared="all").rms}
    true = capture_gradient(adapter, batch, shared="all")
    noisy = GaussianNoise(std=NOISE * true.rms, seed=config.seed)(true)
    if method in ATTACKS:
        attack = parse_attack(f"{method}(iterations={config.steps}, loss_tolerance=0)", task=IMAGE_TASK)
        return {"steps": attack.run(adapter, noisy, seed=config.seed).cost.iterations}
    delta = noisy.perturbation_from(true)
    jacobian = GradientJacobian(adapter, batch, shared="all")
    if method == "dense":
        directions = eigen_directions(jacobian)
        return {"influence_l2": directions.influence(delta).norm().item(), "rank": directions.rank}
    if method in CG_PRODUCTS:
        response = jacobian.flatten(jacobian.matvec(delta))
        (bound,) = multishift_cg(jacobian.gram_operator(), response, [0.0], max_products=CG_PRODUCTS[method])
        return {"influence_l2": bound.lower_bounds[-1], "products": bound.products}
    solver = InfluenceSolver(jacobian, adapter.prior(), max_products=config.max_products, seed=config.seed)
    if method == "solve":
        result = solver.solve(delta)
        found = {"influence_l2": result.influence.l2, "products": result.products, "converged": result.converged}
        return found | {"residual": result.residual}
    norm, bracket = jacobian.flatten(jacobian.matvec(delta)).double().norm().item(), solver.lambda_max
    found = {"influence_l2": norm / bracket.upper, "products": bracket.iterations, "converged": bracket.converged}
    return found | {"lambda_max": bracket.upper}


def warm_up(config: EfficiencyConfig, method: str) -> None:
    """Run the method on a model of no size, so that what it imports and starts is not measured."""
    tiny = adapt(image_model("linear", (1, 2, 2), seed=0), name="tiny", image_shape=(1, 2, 2))
    tiny.model.to(config.device)
    run(replace(config, steps=2), method, tiny, tiny.batch(torch.full((1, 1, 2, 2), 0.5), [0]))


def measure(config: EfficiencyConfig, model: str, method: str) -> dict:
    """Return time, memory and the number found of one method on one model."""
    torch.set_num_threads(1)
    adapter, batch = load(config, model)
    parameters, dx = sum(p.numel() for p in adapter.parameters().values()), adapter.input(batch).numel()
    row = {"model": Path(model).stem, "parameters": parameters, "dx": dx, "method": method}
    if method == "dense" and dx > config.dense_unknowns:
        return row | {"left_out": f"{dx:,} unknowns, more than dense_unknowns={config.dense_unknowns}"}
    if method == "solve" and parameters > config.solve_parameters:
        return row | {"left_out": f"{parameters:,} parameters, more than solve_parameters={config.solve_parameters}"}
    warm_up(config, method)
    with Meter(adapter.device) as meter:
        started = time.process_time()
        found = run(config, method, adapter, batch)
        busy = time.process_time() - started
    seconds = busy if adapter.device.type == "cpu" else meter.seconds
    row |= {"seconds": seconds, "wall_seconds": meter.seconds, "peak_mib": meter.peak_bytes / MEBIBYTE}
    if method in ATTACKS:
        row |= {"extrapolated_seconds": seconds / found["steps"] * PUBLISHED_STEPS}
    return row | found


# All cases --------------------------------------------------------------------------------------------------------


def run_cases(config: EfficiencyConfig) -> list[dict]:
    """Return the rows of all cases, each measured in a process that has done nothing before."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED_ONCE)
    rows = []
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        for model in config.models:
            for method in config.methods:
                print(f"measuring {method} of {model} ...", file=sys.stderr, flush=True)
                rows.append(pool.submit(measure, config, model, method).result())
    return rows


def cost(row: dict | None) -> float | None:
    """Return the seconds of a method; of an attack, those of the published number of steps."""
    return None if row is None else row.get("extrapolated_seconds", row.get("seconds"))


def summary(rows: Sequence[dict]) -> tuple[list[Entry], list[Entry]]:
    """Return two tables with a line per model, sorted by size: time, and what it buys with which memory."""
    times, gains = [], []
    for model in sorted(dict.fromkeys(r["model"] for r in rows), key=lambda m: _first(rows, m)["parameters"]):
        own = {r["method"]: r for r in rows if r["model"] == model}
        first, bound, solved = _first(rows, model), cost(own["lower-bound"]), own.get("solve", {})
        size = {"model": model, "parameters": first["parameters"], "dx": first["dx"]}
        ratios = {f"{m}_over_I_lb": c / bound for m in ATTACKS if (c := cost(own.get(m))) is not None}
        times.append(size | {f"{m}_s": cost(own.get(m)) for m in METHODS} | ratios)
        products = {"I_lb_products": own["lower-bound"]["products"], "solve_products": solved.get("products")}
        exact = own.get("dense", {}).get("influence_l2") or solved.get("influence_l2")
        bounds = {
            f"{m}_over_I2F": value / exact
            for m in ("lower-bound", *CG_PRODUCTS, "solve")
            if exact and (value := own.get(m, {}).get("influence_l2")) is not None
        }
        memory = {f"{m}_mib": own.get(m, {}).get("peak_mib") for m in METHODS}
        gains.append(size | products | {"solve_converged": solved.get("converged")} | bounds | memory)
    return times, gains


def _first(rows: Sequence[dict], model: str) -> dict:
    return next(r for r in rows if r["model"] == model)


def figure(times: Sequence[Entry], gains: Sequence[Entry]) -> Figure:
    """Draw seconds and memory of every method over the models, smallest first."""
    with house_style():
        drawing = Figure(figsize=(9.4, 5.2), layout="constrained")
        seconds, memory = drawing.subplots(1, 2)
        for axes, entries, unit, title, label in (
            (seconds, times, "s", "time (inversion extrapolated to 24,000 steps)", "seconds"),
            (memory, gains, "mib", "memory", "peak beyond model and image, MiB"),
        ):
            for method, (colour, marker, name) in STYLES.items():
                values = drawable(e[f"{method}_{unit}"] for e in entries)
                axes.plot(range(len(entries)), values, marker=marker, color=colour, linewidth=0.9, markersize=6,
                          linestyle="--" if method in ATTACKS else "-", label=name)  # fmt: skip
            axes.set_yscale("log")
            names = [f"{e['model']}\n{_short(e['parameters'])}" for e in entries]
            axes.set_xticks(range(len(entries)), names, rotation=0 if len(entries) < 6 else 40, fontsize=9)
            axes.set_title(title)
            axes.set_xlabel("model and its number of parameters")
            axes.set_ylabel(label)
            light_grid(axes)
        drawing.legend(*seconds.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return drawing


def _short(count: int) -> str:
    return f"{count / 1e6:.3g} M" if count >= 1e6 else f"{count / 1e3:.3g} k"


@exit_status
def main(argv: list[str]) -> None:
    """Run the study; exit status 2 if the input is refused."""
    config = parse_config(EfficiencyConfig, argv, prog="image_efficiency.py")
    folder = Path(config.output)
    rows = run_cases(config)
    write_text_atomically(folder / "results.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_text_atomically(
        folder / "settings.json", json.dumps(asdict(config) | {"torch": torch.__version__}, indent=1)
    )
    times, gains = summary(rows)
    publish(folder, "image_efficiency", times, lambda _: figure(times, gains))
    publish(folder, "image_efficiency_bounds", gains)
    for row in rows:
        if "left_out" in row:
            Console(stderr=True).print(f"{row['model']}: {row['method']} was left out: {row['left_out']}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
