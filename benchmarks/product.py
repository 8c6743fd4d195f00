"""Time and memory of the operator: its set-up and one product A v, beside one gradient of the same model.

    python -m benchmarks.product                          # BERT-base and GPT-2 small shapes, 32 and 128 tokens
    python -m benchmarks.product --implementation autodiff

One gradient evaluation is the loss and its backward pass over the shared parameters, which leaves one gradient tensor
per parameter. Times: gradient and product alternate in one process, the least of ``--repeats`` each. Memory: a process
each for the gradient and the operator (set-up and three products), counted from where loading the model left it:
"allocated" is the peak of what torch holds in tensors, "resident" that of the process, with what the allocator does
not give back and what libraries load. The ratios count the model itself on both sides. Appends JSON lines to --output
and writes a table beside it (.md).
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.cases import markdown, run_cases, shape_source, shown, table, whole_number
from benchmarks.influence import SHAPES
from benchmarks.influence_measures import load, random_batch
from benchmarks.meters import clock
from benchmarks.reference import plain_gradient

COLUMNS = {
    "shape": "shape", "tokens": "tokens", "gradient s": "gradient_seconds", "set-up": "setup_gradients",
    "product": "product_gradients", "J delta": "matvec_gradients", "model MiB": "model_mib",
    "gradient, allocated": "gradient_allocated_mib", "operator, allocated": "allocated_mib",
    "ratio, allocated": "allocated_ratio", "gradient, resident": "gradient_resident_mib",
    "operator, resident": "resident_mib", "ratio, resident": "resident_ratio",
}  # fmt: skip
NOTES = (
    "set-up, product, J delta: seconds over those of one gradient, the least of the repeats. Memory in MiB beyond the"
    " model; ratios with the model on both sides. One text of random tokens, random weights, float32."
)


def main() -> None:
    """Measure every case in processes of its own and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", type=shape_source, default=SHAPES, help="shape files")
    parser.add_argument("--tokens", nargs="+", type=whole_number, default=[32, 128], help="tokens per text")
    parser.add_argument("--threads", type=whole_number, default=2)
    parser.add_argument("--repeats", type=whole_number, default=5)
    parser.add_argument("--implementation", choices=["factored", "autodiff"], default="factored")
    parser.add_argument("--output", default="runs/benchmarks/product.jsonl")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        case = json.loads(options.case)
        print(json.dumps(MEASURES[case.pop("measure")](**case)))
        return
    common = {"threads": options.threads, "repeats": options.repeats, "implementation": options.implementation}
    cases = [
        {"measure": measure, "shape": shape, "tokens": tokens, **common}
        for shape in options.shapes
        for tokens in options.tokens
        for measure in MEASURES
    ]
    with run_cases("benchmarks.product", cases, options.output) as results:
        lines = [[shown(row.get(k)) for k in COLUMNS.values()] for row in by_shape_and_length(results)]
        title = f"Set-up and product ({options.implementation}) in gradients of the same model"
        Console(width=180).print(table(title, list(COLUMNS), lines))
        if results:
            notes = f"{NOTES} {options.threads} threads, {options.repeats} repeats."
            page = markdown(title, list(COLUMNS), lines, results[-1]["provenance"], notes)
            Path(options.output).with_suffix(".md").write_text(page, encoding="utf-8")


def by_shape_and_length(results: list[dict]) -> list[dict]:
    """Return the figures of each shape and length as one row; what failed, and what needs it, is not in it."""
    rows: dict[tuple, dict] = {}
    for result in results:
        case = result["case"]
        row = rows.setdefault((case["shape"], case["tokens"]), {"shape": Path(case["shape"]).stem})
        row |= {"tokens": case["tokens"]} | result
    for row in rows.values():
        for kind in ("allocated", "resident"):
            if {f"{kind}_mib", f"gradient_{kind}_mib"} <= row.keys():
                needed, gradient, model = row[f"{kind}_mib"], row[f"gradient_{kind}_mib"], row["model_mib"]
                row[f"{kind}_ratio"] = (needed + model) / (gradient + model)
    return list(rows.values())


def prepared(shape: str, tokens: int, threads: int):
    """Return the adapter and a batch of one text."""
    torch.set_num_threads(threads)
    adapter = load(shape, None, None, "cpu")
    return adapter, random_batch(adapter, 1, tokens)


def measure_time(shape: str, tokens: int, threads: int, repeats: int, implementation: str) -> dict:
    """Return seconds of one gradient, and set-up and products in gradients."""
    from lmleak import GradientJacobian
    from lmleak.influence import InfluenceSolver

    adapter, batch = prepared(shape, tokens, threads)
    plain_gradient(adapter, batch)
    setup, jacobian = clock(lambda: GradientJacobian(adapter, batch, implementation=implementation), "cpu")
    v = torch.randn(jacobian.x.shape, generator=torch.Generator().manual_seed(1))
    jacobian.gram(v)  # the first product makes what the others reuse
    gradient, product = [], []
    for _ in range(repeats):
        gradient.append(clock(lambda: plain_gradient(adapter, batch), "cpu")[0])
        product.append(clock(lambda: jacobian.gram(v), "cpu")[0])
    setups = [setup]
    for _ in range(2):
        del jacobian
        seconds, jacobian = clock(lambda: GradientJacobian(adapter, batch, implementation=implementation), "cpu")
        setups.append(seconds)
    noise = InfluenceSolver(jacobian, adapter.prior()).noise()
    matvec = min(clock(lambda: jacobian.matvec(noise), "cpu")[0] for _ in range(2))
    least = min(gradient)
    return {
        "shape": Path(shape).stem, "tokens": tokens, "threads": threads, "implementation": implementation,
        "gradient_seconds": least, "setup_gradients": min(setups) / least, "product_gradients": min(product) / least,
        "matvec_gradients": matvec / least, "torch": torch.__version__,
    }  # fmt: skip


def measure_gradient_memory(shape: str, tokens: int, threads: int, repeats: int, implementation: str) -> dict:
    """Return what one gradient evaluation needs beyond the model, and the model's size, in MiB."""
    adapter, batch = prepared(shape, tokens, threads)
    model = sum(p.numel() * p.element_size() for p in adapter.model.parameters()) / 2**20
    needs = memory(lambda: plain_gradient(adapter, batch))
    return {"model_mib": model} | {f"gradient_{kind}_mib": peak for kind, peak in needs.items()}


def measure_operator_memory(shape: str, tokens: int, threads: int, repeats: int, implementation: str) -> dict:
    """Return what the operator needs beyond the model, in MiB."""
    from lmleak import GradientJacobian

    adapter, batch = prepared(shape, tokens, threads)

    def operate() -> None:
        jacobian = GradientJacobian(adapter, batch, implementation=implementation)
        for seed in range(3):
            jacobian.gram(torch.randn(jacobian.x.shape, generator=torch.Generator().manual_seed(seed)))

    return {f"{kind}_mib": peak for kind, peak in memory(operate).items()}


def memory(run: Callable[[], object]) -> dict[str, float]:
    """Return the peak MiB that a run needs: resident, and then, in a second run, allocated by torch."""
    resident_peak = peak_resident_mib(run)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return {"resident": resident_peak, "allocated": peak / 2**20}


def peak_resident_mib(run: Callable[[], object]) -> float:
    """Return the peak resident MiB of a run above what was resident before it."""
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def resident(which: str) -> float:
    """Return this process's resident memory ("VmRSS") or its peak ("VmHWM") in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(which)).split()[1]) / 1024


MEASURES = {"time": measure_time, "gradient memory": measure_gradient_memory, "memory": measure_operator_memory}

if __name__ == "__main__":
    main()
