"""Starting processes of our own: without a network, on one thread, those that talk to one another at a free port.

Python and its libraries take seconds to start: a test that is not about starting calls main() here, or forks.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from accelerate import PartialState, debug_launcher

ROOT = Path(__file__).resolve().parents[1]


def environment(**more: str) -> dict[str, str]:
    """The environment of a process that finds this checkout."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), **more}


def free_port() -> str:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def python(*arguments: object, **options) -> subprocess.CompletedProcess:
    """Run python on arguments and keep what it says; options are those of subprocess.run."""
    defaults = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT, "env": environment()}
    return subprocess.run([sys.executable, *map(str, arguments)], check=False, **defaults | options)


def launch(script: Path, *arguments: object, processes: int = 2, **options) -> subprocess.CompletedProcess:
    """Run a program on several processes, as accelerate launches it."""
    hardware = ROOT / "configs" / "accelerate" / f"cpu{processes}.yaml"
    flags = ["--config_file", hardware, "--main_process_port", free_port()]
    return python("-m", "accelerate.commands.launch", *flags, script, *arguments, **options)


def start_by_hand(script: Path, *arguments: object, processes: int = 2) -> list[subprocess.Popen]:
    """Start the processes of one program without a launcher, which would end all when one dies."""
    port, count = free_port(), str(processes)
    return [
        subprocess.Popen(
            [sys.executable, *map(str, (script, *arguments))], text=True, cwd=ROOT, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=environment(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=count, LOCAL_WORLD_SIZE=count,
                            MASTER_ADDR="127.0.0.1", MASTER_PORT=port, ACCELERATE_USE_CPU="1"),
        )
        for rank in range(processes)
    ]  # fmt: skip


def fork(function: Callable, *arguments: object, processes: int = 2) -> None:
    """Run a function, such as the main() of a recipe, on several processes forked from this one."""
    debug_launcher(_anew, (function, *arguments), num_processes=processes)


def _anew(function: Callable, *arguments: object) -> None:
    PartialState._reset_state()  # this process's place was that of one alone
    status = function(*arguments)
    assert not status, f"exit status {status}"


def fate(action: Callable[[], object], patience: float = 120) -> int:
    """Run an action in a process forked from this one; its exit status, or the negative number of what killed it."""
    child, status = os.fork(), 1
    if child == 0:
        try:
            action()
            status = 0
        finally:
            os._exit(status)
    deadline = time.monotonic() + patience
    while True:
        ended, wait_status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(wait_status)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise AssertionError(f"the process did not end in {patience} s")
        time.sleep(0.01)
