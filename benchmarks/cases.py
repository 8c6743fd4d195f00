"""Running the cases of a benchmark, each in a process of its own so that its peak memory is its own."""

import json
import subprocess
import sys
from pathlib import Path


def run_cases(module: str, cases: list[dict], output: str) -> list[dict]:
    """Return the figures of all cases, each measured by ``python -m module --case JSON``, which prints them.

    Args:
        module: The benchmark, whose ``measure`` takes a case's keys.
        cases: What is measured.
        output: File to which a JSON line per case is appended as soon as it is measured.

    Returns:
        One dictionary per case. A case that fails ends the program.
    """
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    results = []
    for case in cases:
        name = ", ".join(f"{key} {value}" for key, value in case.items())
        print(f"measuring {name} ...", file=sys.stderr)
        command = [sys.executable, "-m", module, "--case", json.dumps(case)]
        finished = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if finished.returncode:
            sys.exit(f"{name} failed with status {finished.returncode}")
        results.append(json.loads(finished.stdout.splitlines()[-1]))
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(results[-1]) + "\n")
    return results
