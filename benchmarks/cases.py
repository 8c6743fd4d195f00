"""Running the cases of a benchmark, each in a process of its own so that its peak memory is its own; tables."""

import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]


def run_cases(module: str, cases: list[dict], output: str, *, budget: float = float("inf")) -> list[dict]:
    """Return the figures of all cases, each measured by ``python -m module --case JSON``, which prints them.

    A case that ``output`` holds already, measured at this commit on this machine with these versions, is not measured
    again: an interrupted benchmark goes on where it was. A case that fails is said and left out; the program ends with
    status 1 where that leaves nothing.

    Args:
        module: The benchmark, whose ``--case`` prints one JSON line per row of figures.
        cases: What is measured.
        output: File to which the lines are appended as soon as a case is measured.
        budget: Seconds after which no further case is begun.

    Returns:
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
    kept = [row for case in cases for row in results if row["case"] == case]
    if failed and not kept:
        sys.exit("\n".join(failed))
    return kept


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
