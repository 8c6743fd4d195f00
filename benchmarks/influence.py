"""Time and memory of the risk numbers at full model shapes, in seconds and in gradients of the same model and run.

    python -m benchmarks.influence                                # the default table: PLAN below
    python -m benchmarks.influence --shapes gpt2 --lengths 16 64 --pieces product bound
    python -m benchmarks.influence --all                          # every shape, 16 to 512 tokens, every piece: hours
    python -m benchmarks.influence --device cuda --budget 450     # the GPU table: GPU_PLAN
    python -m benchmarks.influence --fit                          # slopes over length, layers, width and batch

Pieces, each after those before it in its process:

  product     set-up of the operator and one product A v
  bound       I_lb: set-up, J delta for seeded noise, lambda_max bracketed to 1 % except with probability 1e-3
  certified   the CG lower bound of I2F after 10 products, which needs no eigenvalue
  damped      I2F at damping 1e-4 lambda_max, to a residual of 1e-3
  sweep       the same at 8 noise levels and 4 dampings (1e-4 to 1e-1 lambda_max)
  expected    mean over the noise of I2F at that damping: 2 probes of 280 products, with standard error
  descent     published: fixed-step descent for the damped I2F, 2 of its 2,000 steps measured
  eigsh       published: lambda_max by scipy's eigsh over parameter space, double backward anew each time
  released    the same as the released code writes it, which joins vectors by appending to a copy, piece by piece
  attacks     one step of dlg, tag and gs, times the published number of steps (2,500, 2,500 and 2,000)
  agreement   the same numbers on the CPU and on --device

The published algorithm, attacks and agreement run in processes of their own (benchmarks/reference.py). A case that was
measured at this commit on this machine is not measured again, so that an interrupted run goes on. Appends JSON lines
to --output and writes a table beside it (.md). Numbers that did not converge are marked with *.
"""

import argparse
import json
from pathlib import Path

from rich.console import Console

from benchmarks.cases import device, markdown, run_cases, shape_source, shown, table, whole_number
from benchmarks.meters import report

SHAPES = ["configs/models/bert-base.yaml", "configs/models/gpt2.yaml"]
GROUPS = {
    "influence": ("product", "bound", "certified", "damped", "sweep", "expected"),
    "published": ("descent", "eigsh"),
    "released": ("released",),
    "attacks": ("attacks",),
    "agreement": ("agreement",),
}
PIECES = [piece for pieces in GROUPS.values() for piece in pieces]
LENGTHS = [16, 32, 64, 128, 256, 512]
RISK = ["product", "bound", "certified", "damped", "expected"]
PLAN = [
    ("reference-gpt2", [32], [*RISK, "sweep", "descent", "eigsh", "attacks"]),
    ("bert-base", [32], [*RISK, "sweep", "descent", "attacks"]),
    ("bert-base", [128], ["product", "bound"]),
    ("gpt2", [32], ["product", "bound", "certified", "damped", "attacks"]),
    ("gpt2", [128], ["product", "bound"]),
    ("gpt2-medium", [32], ["product", "bound", "certified"]),
    ("bert-base", [32], ["eigsh", "released"]),
]  # shape, tokens, pieces: about 25 minutes on two cores, of which eigsh takes 6
GPU_PLAN = [
    ("bert-base", [32], ["agreement"]),
    ("gpt2", [32], ["agreement"]),
    ("bert-base", [32, 128, 512], RISK),
    ("gpt2", [32, 128, 512], RISK),
    ("gpt2-medium", [32, 128, 512], RISK),
    ("gpt2-large", [32, 128, 512], ["product", "bound", "certified", "damped"]),
    ("gpt2-xl", [32, 128, 512], ["product", "bound"]),
    ("bert-base", [32], ["attacks"]),
    ("gpt2", [32], ["attacks"]),
    ("bert-base", [32], ["descent", "eigsh"]),
]  # the noise is drawn on the CPU, 1.5 G numbers for XL; meant for eight minutes, in this order of importance


def main() -> None:
    """Run every case in a subprocess, print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=shape_source,
        help="shape files, names in configs/models, or names for load_adapter",
    )
    parser.add_argument("--lengths", nargs="+", type=whole_number, help="tokens per text")
    parser.add_argument("--pieces", nargs="+", choices=PIECES, help="what is measured")
    parser.add_argument("--all", action="store_true", help="all shapes, lengths and pieces that are not chosen")
    parser.add_argument("--fit", action="store_true", help="sweep length, layers, width and batch, and fit slopes")
    parser.add_argument("--threads", type=whole_number, default=2, help="CPU threads")
    parser.add_argument("--device", type=device, default="cpu", help="cpu or cuda")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no case is begun")
    parser.add_argument("--output", default=None, help="JSON lines; by default runs/benchmarks/influence-DEVICE.jsonl")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        from benchmarks.influence_measures import measure

        for row in measure(**json.loads(options.case)):
            print(json.dumps(row), flush=True)
        return
    if options.fit:
        from benchmarks.influence_scaling import run_fit

        run_fit(options)
        return
    output = Path(options.output or f"runs/benchmarks/influence-{options.device.partition(':')[0]}.jsonl")
    with run_cases("benchmarks.influence", cases_of(options), str(output), budget=options.budget) as rows:
        if not rows:
            return
        for row in rows:
            if "skipped" in row:
                report(f"{row['shape']}, {row['tokens']} tokens: skipped, {row['skipped']}")
        merged = by_shape_and_length(rows)
        if not merged:
            raise SystemExit("nothing was measured")
        titles, lines = turned(merged)
        Console(width=200).print(table("Cost of the risk numbers († extrapolated)", titles, lines))
        page = markdown("Cost of the risk numbers", titles, lines, rows[-1]["provenance"], notes(merged))
        output.with_suffix(".md").write_text(page, encoding="utf-8")


def cases_of(options: argparse.Namespace) -> list[dict]:
    """Return what to measure: the plan, or the product of what was chosen."""
    on_gpu = options.device != "cpu"
    chosen = options.shapes or options.lengths or options.pieces or options.all
    if chosen:
        default_shapes = ["reference-bert", "reference-gpt2", "bert-base", "gpt2", "gpt2-medium"]
        shapes = options.shapes or (default_shapes if options.all else ["bert-base", "gpt2"])
        lengths = options.lengths or (LENGTHS if options.all else [32])
        pieces = options.pieces or ([p for p in PIECES if p != "agreement"] if options.all else RISK)
        plan = [(shape, lengths, pieces) for shape in shapes]
    else:
        plan = GPU_PLAN if on_gpu else PLAN
    return [
        {"group": group, "shape": shape_source(shape), "tokens": part, "pieces": [p for p in own if p in pieces],
         "device": options.device, "threads": options.threads}
        for shape, lengths, pieces in plan
        for group, own in GROUPS.items()
        if set(own) & set(pieces)
        # On a GPU the peak can be started anew; on the CPU each length has a process and so a peak of its own.
        for part in ([lengths] if on_gpu else [[length] for length in lengths])
    ]  # fmt: skip


def by_shape_and_length(rows: list[dict]) -> list[dict]:
    """Return the figures of all processes of one shape and length as one row each, with ratios between them."""
    merged: dict[tuple, dict] = {}
    for row in rows:
        if "skipped" not in row:
            merged.setdefault((row["shape"], row["tokens"], row["device"]), {}).update(row)
    for row in merged.values():
        for piece, flag in (
            ("bound", "bound_converged"),
            ("damped", "converged"),
            ("expected", "expected_converged"),
        ):
            if row.get(flag) is False:
                row[f"{piece}_cost"] = f"{shown(row[f'{piece}_gradients'])}*"
            elif f"{piece}_gradients" in row:
                row[f"{piece}_cost"] = row[f"{piece}_gradients"]
        if "effective_rank" in row:
            row["rank_shown"] = shown(row["effective_rank"]) + "*" * (not row["effective_rank_converged"])
        if "eigsh_seconds" in row and "bound_seconds" in row:
            row["eigsh_speedup"] = row["eigsh_seconds"] / row["bound_seconds"]
            if row["device"] == "cpu":
                row["eigsh_memory"] = row["eigsh_peak_gib"] / row["bound_peak_gib"]
        if "released_seconds" in row and "bound_seconds" in row:
            row["released_speedup"] = row["released_seconds"] / row["bound_seconds"]
        if "descent_seconds" in row and "damped_seconds" in row:
            row["descent_speedup"] = row["descent_seconds"] / row["damped_seconds"]
        if "dlg_seconds" in row and "bound_seconds" in row:
            row["dlg_over_bound"] = row["dlg_seconds"] / row["bound_seconds"]
    return list(merged.values())


LINES = {
    "coordinates dx": "dx", "one gradient, s": "gradient_seconds", "set-up": "setup_gradients",
    "product A v": "product_gradients", "J delta": "response_gradients", "I_lb, s": "bound_seconds",
    "I_lb": "bound_cost", "I_lb, products": "bound_products", "I_lb, products until within 1 %": "bound_seen_products",
    "I_lb, products at 95 %": "bound_likely_products", "CG bound": "certified_gradients",
    "CG bound over I_lb": "certified_over_bound",
    "damped I2F, s": "damped_seconds", "damped I2F": "damped_cost", "damped I2F, products": "damped_products",
    "damped I2F, residual": "residual", "damped I2F, width of its interval": "damped_width",
    "damped I2F, products until enclosed to 1 %": "damped_enclosed_products",
    "sweep over one solve": "sweep_ratio", "expected I2F": "expected_cost",
    "expected I2F, products": "expected_products", "expected I2F, relative s.e.": "expected_relative_error",
    "effective rank": "rank_shown", "effective rank, s.e.": "effective_rank_std_error",
    "peak GiB, gradient": "gradient_peak_gib", "peak GiB, I_lb": "bound_peak_gib",
    "peak GiB, damped I2F": "damped_peak_gib", "eigsh, s": "eigsh_seconds", "eigsh, calls": "eigsh_calls",
    "eigsh, peak GiB": "eigsh_peak_gib", "eigsh over I_lb, seconds": "eigsh_speedup",
    "eigsh over I_lb, GiB": "eigsh_memory", "eigsh as released, s": "released_seconds",
    "eigsh as released over I_lb, seconds": "released_speedup", "descent, s †": "descent_seconds",
    "descent over damped I2F, seconds": "descent_speedup", "dlg, s †": "dlg_seconds", "tag, s †": "tag_seconds",
    "gs, s †": "gs_seconds", "dlg step": "dlg_step_gradients", "tag step": "tag_step_gradients",
    "gs step": "gs_step_gradients", "dlg over I_lb, seconds": "dlg_over_bound",
    "largest relative difference from the CPU": "agreement",
}  # fmt: skip
NOTES = """
Costs are in gradients of the same model and process where no unit stands: one gradient is the loss and its plain
backward pass over the shared parameters, the median of five. set-up: building the operator;
product: one A v; J delta: drawing the seeded noise on the CPU included; I_lb: set-up, J delta and lambda_max to 1 %,
certified except with probability 1e-3, the median of three; until within 1 %: products after which its value was that
near to where the run ended, as is known then; at 95 %: products after which it is certified except with probability
0.05; damped: I2F at 1e-4 lambda_max to a residual of 1e-3 and an interval of at most 1 %, everything included; until
enclosed to 1 %: products after which its interval was that narrow; expected: 2 probes of 280 products, s.e. relative;
effective rank: of dx, at noise of the gradient's root mean square, from the same products. peak GiB: of the whole
process up to and with what is named (on a GPU: of its memory; eigsh: of both).
Published algorithm: eigsh over parameter space, to machine precision as in the released code; as released: which joins
its vectors by appending each parameter's part to a copy of all before it; fixed-step descent, three products a step.
† extrapolated: the measured seconds of one step times the published number of steps (descent 2,000; dlg and tag 2,500,
gs 2,000). * not converged within the products allowed. One text of random tokens, random weights, float32, no TF32.
"""


def notes(rows: list[dict]) -> str:
    """Return what the figures mean, with the device."""
    devices = sorted({f"{r['device']}, {r['threads']} threads" for r in rows})
    return f"{NOTES.strip()} Device: {'; '.join(devices)}."


def turned(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Return titles and lines with a column per shape and length, of the figures that some have."""
    titles = ["", *(f"{row['shape']}, {row['tokens']}" for row in rows)]
    lines = [
        [title, *(shown(row.get(key)) for row in rows)]
        for title, key in LINES.items()
        if any(row.get(key) is not None for row in rows)
    ]
    return titles, lines


if __name__ == "__main__":
    main()
