"""Running items over processes: the only place, with the recipes, that knows accelerate.

The model is replicated on every process and never wrapped; items are split. An item's result depends on its number and
the configuration alone, so one process or many give the same rows.
"""

import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cache, wraps
from typing import TypeVar

import torch
from accelerate import PartialState
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lmleak.errors import ConfigError, DataError, LmleakError
from lmleak.evaluation.shards import ResultFolder

T = TypeVar("T")
REFUSED = 2  # exit status, as of the command line
PATIENCE = timedelta(days=1)
"""How long a process that has finished waits for the others, which may have far more left than the usual half hour.
Not for ever: a run that gives up resumes."""


def process_state(expected: int | None = None) -> PartialState:
    """Return this process's place among all.

    Args:
        expected: Number of processes the user asked for.

    Returns:
        The state; on a machine without GPUs the processes talk over gloo.

    Raises:
        ConfigError: If another number of processes is really running.
    """
    threads = torch.get_num_threads()
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
    torch.set_num_threads(threads)  # accelerate sets another number among several processes: other last bits
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    wanted = launched if expected is None else expected
    if state.num_processes != wanted:
        raise ConfigError(
            f"{state.num_processes} process(es) are running, {wanted} were asked for. Two CPU processes need "
            "'accelerate launch --config_file configs/accelerate/cpu2.yaml' (MULTI_GPU with use_cpu)"
        )
    return state


def finish(state: PartialState) -> None:
    """Wait for all processes and end their group: a process that exits with its group alive may abort.

    Args:
        state: This process's place.
    """
    gather([None], state)
    state.destroy_process_group()
    _gloo.cache_clear()


def gather(values: list[T], state: PartialState) -> list[T]:
    """Return the values of all processes, in the order of their numbers; every process must call it.

    Over gloo on every hardware: its connections break, and the call raises, as soon as a process dies, where NCCL
    waits until its time is up.

    Args:
        values: Anything that can be pickled.
        state: This process's place.

    Returns:
        The lists of all processes, joined.

    Raises:
        DataError: If a process has died, or does not come within ``PATIENCE``.
    """
    if state.num_processes == 1:
        return values
    everyone: list[list[T]] = [[] for _ in range(state.num_processes)]
    try:
        torch.distributed.all_gather_object(everyone, values, group=_gloo())
    except RuntimeError as error:  # gloo's and torch.distributed's errors are of this kind
        raise DataError(
            f"another of the {state.num_processes} processes died or does not answer; what is finished is kept, run "
            f"the same command again to resume ({str(error).strip().splitlines()[0][:200]})"
        ) from error
    return [value for part in everyone for value in part]


@cache
def _gloo() -> torch.distributed.ProcessGroup:
    """Return all processes as one gloo group, made at first use."""
    return torch.distributed.new_group(backend="gloo", timeout=PATIENCE)


def exit_status(study: Callable[[list[str]], None]) -> Callable[[list[str]], int]:
    """Let the main function of a recipe say a refusal in one line and return an exit status.

    Args:
        study: Takes the command line's arguments.

    Returns:
        The function that returns 0, or ``REFUSED`` where ``study`` refuses its input. One of several processes that
        refuses ends with that status at once.
    """

    @wraps(study)
    def main(argv: list[str]) -> int:
        try:
            study(argv)
        except LmleakError as error:
            print(f"refused: {error}", file=sys.stderr)
            return leave_group(REFUSED)
        return 0

    return main


def leave_group(status: int) -> int:
    """Return a status; one of several processes ends with it instead, without waiting for the others.

    Not through the interpreter, whose way out takes the group down with threads still running: it aborts now and then
    (status -6). Nor after destroying the group as ``finish`` does, when all have met: that joins the same threads, and
    NCCL's may wait for a process that has died. What a run keeps is on the disk before it refuses.
    """
    if not torch.distributed.is_initialized():
        return status
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def run_items(
    items: Sequence[T], work: Callable[[int, T], list[dict]], folder: ResultFolder, state: PartialState, *, label: str
) -> list[dict]:
    """Work through the items that are not finished yet, split over the processes, and merge.

    Args:
        items: All items of the run, the same on every process.
        work: Returns the rows of one item from its number and itself.
        folder: Where rows are kept.
        state: This process's place.
        label: What is being done, for the progress bar.

    Returns:
        All rows in item order, on every process. If one process refuses an item, all stop and raise its refusal;
        what was finished stays.
    """
    # What remains is read by one process for all: another, later, would find what the first has finished since, take
    # it off the list, and split another list.
    remaining = on_main(state, lambda: _remaining(folder, len(items)))
    failure: Exception | None = None
    with state.split_between_processes(remaining) as mine, progress(state, len(mine), label) as advance:
        for i in mine:
            try:
                folder.append(state.process_index, i, work(i, items[i]))
            except LmleakError as error:
                failure = error
                break
            advance()
    # Every process learns of a refusal, or those that wait in the gather below would wait for ever.
    failures = [f for f in gather([failure], state) if f is not None]
    if failures:
        raise failures[0]
    rows = on_main(state, lambda: folder.merge(range(len(items))))
    return rows


def _remaining(folder: ResultFolder, count: int) -> list[int]:
    folder.open()
    done = folder.finished()
    return [i for i in range(count) if i not in done]


def on_main(state: PartialState, action: Callable[[], T]) -> T:
    """Run an action on the main process; every process must call it, and all raise its refusal.

    Args:
        state: This process's place.
        action: What to do.

    Returns:
        The action's result, on all processes.
    """
    outcome: list = []
    if state.is_main_process:
        try:
            outcome = [(True, action())]
        except LmleakError as error:
            outcome = [(False, error)]
    ((succeeded, value),) = gather(outcome, state)
    if not succeeded:
        raise value
    return value


class progress:
    """A progress bar on the main process, over its own share; silent elsewhere.

    Args:
        state: This process's place.
        total: Units of work of this process.
        label: What is being done.
    """

    def __init__(self, state: PartialState, total: int, label: str):
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                   TextColumn("left"), TimeRemainingColumn()]  # fmt: skip
        share = f" (share of {state.num_processes})" if state.num_processes > 1 else ""
        self.bar = Progress(*columns, console=Console(stderr=True), disable=not state.is_main_process)
        self.label, self.total = label + share, total

    def __enter__(self) -> Callable[..., None]:
        self.bar.start()
        task = self.bar.add_task(self.label, total=self.total)
        return lambda count=1: self.bar.advance(task, count)

    def __exit__(self, *exception) -> None:
        self.bar.stop()
