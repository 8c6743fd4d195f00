"""What runs say of themselves, and what their results depend on: threads, settings, versions, machine."""

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from lmleak.adapters import ModelAdapter

NOT_PART_OF_RESULTS = ("output", "resume", "fail_above", "processes", "threads")
SMALL_MODEL = 5_000_000  # parameters


def decisive_settings(config: Any, *, without: Sequence[str] = ()) -> dict[str, Any]:
    """Return the settings that results depend on.

    Args:
        config: A dataclass.
        without: Fields that results do not depend on, besides ``NOT_PART_OF_RESULTS``.

    Returns:
        Field -> value.
    """
    return {name: value for name, value in asdict(config).items() if name not in (*NOT_PART_OF_RESULTS, *without)}


def limit_threads(adapter: ModelAdapter, threads: int | None) -> None:
    """Set the CPU threads of this process: those asked for, else one for a small model, where more only cost."""
    if threads or parameter_count(adapter) < SMALL_MODEL:
        torch.set_num_threads(threads or 1)


def parameter_count(adapter: ModelAdapter) -> int:
    """Return how many numbers a model's parameters are."""
    return sum(p.numel() for p in adapter.parameters().values())


def circumstances(
    adapter: ModelAdapter, state: PartialState, command: str | None, libraries: Sequence[str]
) -> dict[str, Any]:
    """Return the circumstances of a run, for its report.

    Args:
        adapter: The model.
        state: This process's place.
        command: The command that started it; that of this process if not given.
        libraries: Whose versions matter.

    Returns:
        ``parameters``, ``command``, ``versions``, ``commit``, ``date``, ``world_size`` and ``device``.
    """
    return {
        "parameters": parameter_count(adapter),
        "command": command or shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": {"lmleak": version("lmleak"), "python": platform.python_version()}
        | {name: version(name) for name in libraries},
        "commit": _source_commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "world_size": state.num_processes,
        "device": str(adapter.device),
    }


def _source_commit() -> str | None:
    """Return the commit of a source checkout; None for an installed package."""
    folder = Path(__file__).parents[2]
    if not (folder / ".git").exists():
        return None
    try:
        found = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True, check=True,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):  # git is not installed, or there is no commit yet
        return None
    return found.stdout.strip()
