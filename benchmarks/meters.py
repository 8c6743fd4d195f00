"""Clocks and meters of the benchmarks."""

import gc
import resource
import sys
import time
from collections.abc import Callable

import torch


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


def median(action: Callable, device: str, runs: int = 5, *, warm_up: bool = True) -> tuple[float, object]:
    """Return the median seconds of an action, after a run that warms up, and its last value."""
    value, times = action() if warm_up else None, []
    for _ in range(runs):
        del value  # or two would count in the peak memory
        seconds, value = clock(action, device)
        times.append(seconds)
    return sorted(times)[runs // 2], value


def restart_peak(device: str) -> None:
    """Count the GPU's peak anew; the CPU's is that of the whole process."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib(device: str) -> float:
    """Return the peak memory in GiB: of the GPU since ``restart_peak``, or resident of this process."""
    return host_peak_gib() if device == "cpu" else device_peak_gib(device)


def host_peak_gib() -> float:
    """Return this process's peak resident memory in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def device_peak_gib(device: str) -> float:
    """Return the GPU's peak memory in GiB; 0 on the CPU."""
    return 0.0 if device == "cpu" else torch.cuda.max_memory_allocated() / 2**30
