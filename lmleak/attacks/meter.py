"""What an attack costs: wall time and peak memory, measured around it."""

import threading
import time

import psutil
import torch

INTERVAL = 0.005  # seconds between two looks at the process's memory


class Meter:
    """Measures the seconds and the peak memory of what runs inside ``with Meter(device) as meter:``.

    On a GPU the allocator's own peak is read. On the CPU a thread looks at the resident size of the process every 5
    milliseconds, which may miss shorter peaks and counts whatever else the process does meanwhile.

    Args:
        device: Where the work is done.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds = 0.0
        self.peak_bytes = 0
        """Largest memory in use beyond that at the start."""

    def __enter__(self) -> "Meter":
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        self._before = self._in_use()
        self._stop = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        if self.device.type != "cuda":
            self._watcher.start()
        self._started = time.perf_counter()
        return self

    def __exit__(self, *exception) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.peak_bytes = torch.cuda.max_memory_allocated(self.device) - self._before
        else:
            self._stop.set()
            self._watcher.join()
            self._look()
        self.seconds = time.perf_counter() - self._started

    def _in_use(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return psutil.Process().memory_info().rss

    def _look(self) -> None:
        self.peak_bytes = max(self.peak_bytes, self._in_use() - self._before)

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL):
            self._look()
