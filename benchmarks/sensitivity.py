"""Cost of the sensitivity of all layers, in gradients of the same model and run.

    python -m benchmarks.sensitivity                               # bert-base shape, 32 tokens, 16 probes
    python -m benchmarks.sensitivity --shapes bert-base gpt2 --lengths 32 128 --probes 16 64

One probe is one product J^T v, from which every layer's norm is read. ``probe`` is the time per probe after the
set-up of the operator, ``with set-up`` all of it divided by the number of probes. The claim to check: at most 2.5
gradients per probe for BERT-base at 32 tokens. Appends JSON lines to --output and writes a table beside it (.md).
"""

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.cases import device, markdown, run_cases, shape_source, shown, table, whole_number
from benchmarks.influence_measures import load, random_batch
from benchmarks.meters import clock, median, peak_gib
from benchmarks.reference import plain_gradient

REPEATS = 3  # whole measurements, of which the fastest counts
COLUMNS = (
    "gradient s",
    "set-up / gradient",
    "probe / gradient",
    "with set-up / gradient",
    "largest std. error",
    "GiB",
)


def measure(shape: str, tokens: int, probes: int, device: str, threads: int) -> dict:
    """Return the figures of one case."""
    from lmleak import GradientJacobian
    from lmleak.leakage import input_sensitivity

    torch.set_num_threads(threads)
    adapter = load(shape, None, None, device)
    batch = random_batch(adapter, 1, tokens)
    gradient_seconds, _ = median(lambda: plain_gradient(adapter, batch), device)
    runs = []
    for _ in range(REPEATS):
        setup, jacobian = clock(lambda: GradientJacobian(adapter, batch), device)
        seconds, found = clock(
            lambda jacobian=jacobian: input_sensitivity(jacobian, adapter.roles(), num_probes=probes), device
        )
        runs.append((setup + seconds, setup, seconds, found))
        del jacobian
    total, setup, seconds, found = min(runs, key=lambda run: run[0])
    error = max(layer.frobenius_std_error / layer.frobenius for layer in found.layers.values() if layer.frobenius)
    return {
        "shape": Path(shape).stem, "tokens": tokens, "probes": probes, "layers": len(found.layers),
        "gradient s": gradient_seconds, "set-up / gradient": setup / gradient_seconds,
        "probe / gradient": seconds / probes / gradient_seconds,
        "with set-up / gradient": total / probes / gradient_seconds,
        "largest std. error": error, "GiB": peak_gib(device),
    }  # fmt: skip


def main() -> None:
    """Run every case in a subprocess, print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--shapes", nargs="+", type=shape_source, default=["bert-base"], help="names in configs/models, or files"
    )
    parser.add_argument("--lengths", nargs="+", type=whole_number, default=[32], help="tokens per text")
    parser.add_argument("--probes", nargs="+", type=whole_number, default=[16])
    parser.add_argument("--threads", type=whole_number, default=2)
    parser.add_argument("--device", type=device, default="cpu")
    parser.add_argument("--output", default="runs/benchmarks/sensitivity.jsonl")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(**json.loads(options.case))), flush=True)
        return
    cases = [
        {"shape": shape_source(name), "tokens": tokens, "probes": probes, "device": options.device,
         "threads": options.threads}
        for name in options.shapes for tokens in options.lengths for probes in options.probes
    ]  # fmt: skip
    with run_cases("benchmarks.sensitivity", cases, options.output) as rows:
        if not rows:
            return
        titles = ["shape, tokens, probes", *COLUMNS]
        lines = [
            [f"{row['shape']}, {row['tokens']}, {row['probes']}", *(shown(row[column]) for column in COLUMNS)]
            for row in rows
        ]  # fmt: skip
        Console(width=160).print(table("Sensitivity of all layers", titles, lines))
        note = "Per probe; the standard error is that of the layer known least well, as a share of its norm."
        page = markdown("Cost of the sensitivity of all layers", titles, lines, rows[-1]["provenance"], note)
        Path(options.output).with_suffix(".md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
