"""Time and memory of I_lb and damped I2F at full model shapes, in units of one gradient of the same model.

    python -m benchmarks.influence                      # BERT-base and GPT-2 small shapes, 32 tokens
    python -m benchmarks.influence --tokens 16 64 --shapes configs/models/gpt2.yaml

Every case runs in a process of its own, so that its peak memory is its own. Writes a JSON line per case to --output
and prints a table. With --reference, the way that is widely used is measured too: scipy's eigsh over parameter space
with a double backward per product, started anew each time.
"""

import argparse
import json
import platform
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.cases import run_cases

SHAPES = ["configs/models/bert-base.yaml", "configs/models/gpt2.yaml"]


def main() -> None:
    """Run every case in a subprocess and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="shape files")
    parser.add_argument("--tokens", nargs="+", type=int, default=[32], help="tokens per text")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--reference", action="store_true", help="also measure eigsh in parameter space")
    parser.add_argument("--output", default="runs/benchmarks/influence.jsonl")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(**json.loads(options.case))))
        return
    cases = [
        {"shape": shape, "tokens": tokens, "threads": options.threads, "device": options.device,
         "reference": options.reference}
        for shape in options.shapes
        for tokens in options.tokens
    ]  # fmt: skip
    Console(width=150).print(table(run_cases("benchmarks.influence", cases, options.output)))


def measure(shape: str, tokens: int, threads: int, device: str, reference: bool) -> dict:
    """Return the figures of one model shape and length."""
    from lmleak import GradientJacobian, capture_gradient, load_adapter
    from lmleak.influence import InfluenceSolver

    torch.set_num_threads(threads)
    adapter = load_adapter(shape, device=device)
    ids = torch.randint(10, 1000, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    batch = adapter.batch([ids], [0] if adapter.task == "sequence-classification" else None)
    baseline_memory = peak_gib()
    gradient = [clock(lambda: capture_gradient(adapter, batch), device) for _ in range(4)]
    gradient_seconds = sorted(seconds for seconds, _ in gradient[1:])[1]  # the first warms up
    std = gradient[0][1].rms
    gradient_memory = peak_gib()

    setup_seconds, jacobian = clock(lambda: GradientJacobian(adapter, batch), device)
    v = jacobian.free.to(jacobian.dtype)
    product_seconds = min(clock(lambda: jacobian.gram(v), device)[0] for _ in range(3))
    report(f"gradient {gradient_seconds:.2f} s, set-up {setup_seconds:.2f} s, product {product_seconds:.2f} s")
    solver = InfluenceSolver(jacobian, adapter.prior())
    bound_seconds, bracket = clock(lambda: solver.lambda_max, device)
    report(f"lambda_max: {bracket.iterations} products, {bound_seconds:.0f} s")
    damping = 1e-4 * bracket.value
    solve_seconds, result = clock(lambda: solver.sweep([std], [damping])[0][0], device)
    report(f"damped I2F: {result.products} products, {solve_seconds:.0f} s, residual {result.residual:.1e}")
    figures = {
        "shape": Path(shape).stem, "tokens": tokens, "device": device, "threads": threads,
        "parameters": jacobian.shape[1], "dx": jacobian.dx,
        "gradient_seconds": gradient_seconds, "setup_gradients": setup_seconds / gradient_seconds,
        "product_gradients": product_seconds / gradient_seconds,
        "lambda_max": bracket.upper, "lambda_max_width": bracket.upper / bracket.value - 1,
        "lambda_max_products": bracket.iterations,
        "lower_bound_seconds": setup_seconds + bound_seconds,
        "lower_bound_gradients": (setup_seconds + bound_seconds) / gradient_seconds,
        "damping_over_lambda_max": 1e-4,
        "influence_rms": result.influence.rms, "influence_residual": result.residual, "converged": result.converged,
        "influence_products": result.products, "influence_gradients": solve_seconds / gradient_seconds,
        "influence_seconds": solve_seconds,
        "peak_gib": peak_gib(), "gradient_peak_gib": gradient_memory, "model_peak_gib": baseline_memory,
        "machine": f"{platform.machine()}, {threads} threads", "torch": torch.__version__,
    }  # fmt: skip
    if reference:
        from benchmarks.reference import parameter_space_lambda_max

        del jacobian, solver, result
        reference_seconds, value = clock(lambda: parameter_space_lambda_max(adapter, batch), device)
        figures |= {
            "reference_lambda_max": value,
            "reference_gradients": reference_seconds / gradient_seconds,
            "reference_peak_gib": peak_gib(),
        }
    return figures


def report(line: str) -> None:
    """Say how far the case is."""
    print(f"  {line}", file=sys.stderr, flush=True)


def clock(action: Callable, device: str) -> tuple[float, object]:
    """Return the seconds an action took, and its value."""
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    value = action()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start, value


def peak_gib() -> float:
    """Return this process's peak memory in GiB: of the GPU if one is in use, else resident."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def table(results: list[dict]) -> Table:
    """Return the figures as a table; times in gradients of the same run."""
    columns = {
        "shape": "shape", "tokens": "tokens", "gradient s": "gradient_seconds", "set-up": "setup_gradients",
        "product": "product_gradients", "I_lb": "lower_bound_gradients", "(products)": "lambda_max_products",
        "I2F damped": "influence_gradients", "(products) ": "influence_products", "residual": "influence_residual",
        "peak GiB": "peak_gib", "of a gradient": "gradient_peak_gib",
        "eigsh": "reference_gradients", "eigsh GiB": "reference_peak_gib",
    }  # fmt: skip
    shown = {title: key for title, key in columns.items() if key in results[0]}
    grid = Table(title="Cost in gradients of the same model (set-up, product, I_lb, I2F, eigsh)")
    for title in shown:
        grid.add_column(title, justify="right")
    for result in results:
        grid.add_row(*(f"{result[k]:.3g}" if isinstance(result[k], float) else str(result[k]) for k in shown.values()))
    return grid


if __name__ == "__main__":
    main()
