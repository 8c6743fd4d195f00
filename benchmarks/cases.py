"""Running the cases of a benchmark, each in a process of its own so that its peak memory is its own; tables."""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
from rich.table import Table

from lmleak.adapters.load import REFERENCE_MODELS, refuse_absent_device
from lmleak.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]


@contextmanager
def run_cases(module: str, cases: list[dict], output: str, *, budget: float = float("inf")) -> Iterator[list[dict]]:
    """Give a block the figures of all cases, each measured by ``python -m module --case JSON``, which prints them.

    A case that ``output`` holds already, measured at this commit on this machine with these versions, is not measured
    again: an interrupted benchmark goes on where it was. A case that fails is said and left out; the program ends with
    status 1 then, after the block has shown what there is.

    Args:
        module: The benchmark, whose ``--case`` prints one JSON line per row of figures.
        cases: What is measured.
        output: File to which the lines are appended as soon as a case is measured.
        budget: Seconds after which no further case is begun.

    Yields:
        One dictionary per row: the figures, and under "case" and "provenance" what was measured and where.
    """
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    start, here, failed = time.monotonic(), provenance(), []
    results = measured(path, here)
    for case in cases:
        name = ", ".join(f"{key} {value}" for key, value in case.items() if value is not None)
        if any(r["case"] == case for r in results):
            print(f"measured before: {name}", file=sys.stderr)
            continue
        if time.monotonic() - start > budget:
            print(f"left for a later run, the {budget:g} s are over: {name}", file=sys.stderr)
            continue
        print(f"measuring {name} ...", file=sys.stderr)
        command = [sys.executable, "-m", module, "--case", json.dumps(case)]
        finished = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if finished.returncode:
            failed.append(f"failed with status {finished.returncode}: {name}")
            print(failed[-1], file=sys.stderr)
            continue
        rows = [json.loads(line) for line in finished.stdout.splitlines() if line.startswith("{")]
        rows = [row | {"case": case, "provenance": here} for row in rows]
        results += rows
        with open(path, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
    yield [row for case in cases for row in results if row["case"] == case]
    if failed:
        sys.exit("\n".join(failed))


def whole_number(text: str) -> int:
    """Return a count of the command line: tokens, repeats, threads.

    Args:
        text: What was written.

    Raises:
        argparse.ArgumentTypeError: If it is no whole number from 1 on.
    """
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text}")
    return int(text)


def device(text: str) -> str:
    """Return a device of the command line.

    Args:
        text: What was written.

    Raises:
        argparse.ArgumentTypeError: If there is no such device here.
    """
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:N, got {text}")
    try:
        refuse_absent_device(text)
    except ConfigError as error:  # argparse would not show what it says
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def shape_source(name: str) -> str:
    """Return the name of a shape as ``load_adapter`` reads it.

    Args:
        name: Of an embedded model, a shape in configs/models, or a path.

    Raises:
        argparse.ArgumentTypeError: If there is none of that name.
    """
    known = ROOT / "configs" / "models" / f"{name}.yaml"
    if known.exists():
        return str(known.relative_to(ROOT))
    if name not in REFERENCE_MODELS and not Path(name).exists():
        shapes = sorted(path.stem for path in known.parent.glob("*.yaml"))
        raise argparse.ArgumentTypeError(
            f"no shape {name!r}; there are {', '.join([*REFERENCE_MODELS, *shapes])}, and paths"
        )
    return name


def measured(path: Path, here: dict) -> list[dict]:
    """Return what a file holds of the same machine, commit and versions; a torn last line is passed over."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    rows = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
    same = lambda row: {**row.get("provenance", {}), "date": ""} == {**here, "date": ""}
    return [row for row in rows if same(row) and "case" in row]


def provenance() -> dict:
    """Return machine, commit, versions and date."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {
        "machine": machine(),
        "commit": described.stdout.strip() or None,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "scipy")},
        "date": time.strftime("%Y-%m-%d"),
    }


def machine() -> str:
    """Return processor, cores, memory and GPU."""
    description = platform.processor() or platform.machine()
    if (information := Path("/proc/cpuinfo")).exists():
        models = [
            line.partition(":")[2].strip() for line in information.read_text().splitlines() if "model name" in line
        ]
        description = models[0] if models else description
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{description}, {os.cpu_count()} cores, {gib:.0f} GiB{gpu}"


def markdown(title: str, titles: list[str], lines: list[list[str]], here: dict, notes: str) -> str:
    """Return a generated page: title, where it was made, notes, the table.

    Args:
        title: Heading.
        titles: Of the columns.
        lines: The table, row by row.
        here: As :func:`provenance` gives.
        notes: What the figures mean.

    Returns:
        Markdown.
    """
    facts = "; ".join(f"{key} {value}" for key, value in here.items())
    page = [f"# {title}", "", f"Generated: {facts}.", "", notes.strip(), ""]
    page += ["| " + " | ".join(titles) + " |", "|---|" + "---:|" * (len(titles) - 1)]
    return "\n".join([*page, *("| " + " | ".join(line) + " |" for line in lines)]) + "\n"


def table(title: str, titles: list[str], lines: list[list[str]]) -> Table:
    """Return the same table for the console."""
    grid = Table(title=title)
    for column, name in enumerate(titles):
        grid.add_column(name, justify="right" if column else "left")
    for line in lines:
        grid.add_row(*line)
    return grid


def shown(value) -> str:
    """Return a figure for people: three digits, nothing where there is none."""
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
