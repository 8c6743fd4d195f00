"""Time and memory of the span attack at the GPT-2 small shape, beside the published algorithm on the same gradient.

    python -m benchmarks.span                              # batch x tokens: 4x12, 4x24, 8x32
    python -m benchmarks.span --cases 4x12 --no-reference

Every case runs in a process of its own, so that its peak memory is its own. Appends a JSON line per case to --output
and prints a table. The reference (benchmarks/threshold_span.py) recovers no last tokens; what it recovers is compared
without them.
"""

import argparse
import json
import platform
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.cases import device, run_cases, shown, table, whole_number
from benchmarks.meters import clock, median, report

SHAPE = "configs/models/gpt2.yaml"


def main() -> None:
    """Run every case in a subprocess and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", nargs="+", default=["4x12", "4x24", "8x32"], help="batch x tokens per text")
    parser.add_argument("--shape", default=SHAPE, help="a GPT-2 shape file")
    parser.add_argument("--threads", type=whole_number, default=2)
    parser.add_argument("--device", type=device, default="cpu")
    parser.add_argument("--reference", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--output", default="runs/benchmarks/span.jsonl")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(**json.loads(options.case))))
        return
    sizes = [map(int, size.split("x")) for size in options.cases]
    cases = [
        {"shape": options.shape, "batch": batch, "tokens": tokens, "threads": options.threads,
         "device": options.device, "reference": options.reference}
        for batch, tokens in sizes
    ]  # fmt: skip
    with run_cases("benchmarks.span", cases, options.output) as rows:
        Console(width=150).print(as_table(rows))


def measure(shape: str, batch: int, tokens: int, threads: int, device: str, reference: bool) -> dict:
    """Return the figures of one batch size and length: medians of three runs, each after a first that warms up."""
    import lmleak

    torch.set_num_threads(threads)
    adapter = lmleak.load_adapter(shape, device=device)
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(10, adapter.vocabulary_size - 10, (batch, tokens), generator=generator).tolist()
    truth = adapter.batch(texts)
    gradient_seconds, shared = median(lambda: lmleak.capture_gradient(adapter, truth), device, runs=3)
    report(f"gradient {gradient_seconds:.2f} s")
    # Memory by the first run: later ones reuse what the allocator kept.
    peak_bytes = lmleak.run_attack("span", adapter, shared).cost.peak_bytes
    span_seconds, recovered = median(lambda: lmleak.run_attack("span", adapter, shared), device, runs=3)
    score = lmleak.score_text(recovered, truth)
    report(f"span {span_seconds:.2f} s, exact match {score.exact_match:.2f}")
    held = 4 * (sum(p.numel() for p in adapter.model.parameters()) + shared.num_coordinates)
    figures = {
        "shape": Path(shape).stem, "batch": batch, "tokens": tokens, "device": device, "threads": threads,
        "gradient_seconds": gradient_seconds, "span_seconds": span_seconds,
        "span_gradients": span_seconds / gradient_seconds,
        "exact_match": score.exact_match, "token_recall": score.token_recall,
        "memory_over_model_and_gradient": 1 + peak_bytes / held,
        "machine": platform.machine(), "torch": torch.__version__,
    }  # fmt: skip
    if reference:
        from benchmarks.threshold_span import threshold_span

        reference_seconds, sequences = clock(lambda: threshold_span(adapter, shared), device)
        all_but_last = {tuple(text[:-1]) for text in texts}
        figures |= {
            "reference_seconds": reference_seconds,
            "speedup": reference_seconds / span_seconds,
            "reference_exact_but_last": len(all_but_last & set(sequences)) / batch,
        }
    return figures


def as_table(results: list[dict]) -> Table:
    """Return the figures as a table."""
    columns = {
        "batch": "batch", "tokens": "tokens", "gradient s": "gradient_seconds", "span s": "span_seconds",
        "in gradients": "span_gradients", "exact": "exact_match", "memory / (model + gradient)":
        "memory_over_model_and_gradient", "published s": "reference_seconds", "exact but last":
        "reference_exact_but_last", "speed-up": "speedup",
    }  # fmt: skip
    columns = {title: key for title, key in columns.items() if key in results[0]}
    title = f"span on {results[0]['shape']}, {results[0]['device']}, {results[0]['threads']} threads"
    return table(title, list(columns), [[shown(result[key]) for key in columns.values()] for result in results])


if __name__ == "__main__":
    main()
