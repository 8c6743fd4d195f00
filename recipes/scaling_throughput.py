"""How much faster are several processes? Strong and weak scaling, identical results, and where the time goes.

Starts recipes/scaling_worker.py through ``accelerate launch`` with 1, 2, ... processes: strong scaling shares a fixed
number of examples (or of probes or restarts of one example), weak scaling gives every process that number.

    python recipes/scaling_throughput.py --config configs/scaling_study/throughput-two-core.yaml
    python recipes/scaling_throughput.py --config configs/scaling_study/throughput-two-core.yaml --split probes
    python recipes/scaling_throughput.py --config configs/scaling_study/throughput-many-gpu.yaml

A run that is there already is not done again. Over several machines, start the worker itself with
configs/accelerate/multi_node.yaml (recipes/scaling_study.py says how); this driver is for one.

Columns: rate: examples (probes, restarts) per second from the first start of work to the last end; efficiency: rate
over that of one process times their number; start-up: from the command to the first work, launcher, imports and model
included; gathering: from the last work to all rows being everywhere; overhead: seconds a process spent between its
first and last example outside of them, over the seconds within (writing a row to the disk, progress; examples only);
identical: rows bit for bit those of one process.
"""

import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Literal

from image_tables import publish
from matplotlib.figure import Figure
from scaling_worker import WorkConfig

from lmleak.config import parse_config
from lmleak.errors import ConfigError, DataError
from lmleak.evaluation import ResultFolder, exit_status
from lmleak.report.drawing import BLUE, GREY, ORANGE, house_style, light_grid

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class ThroughputConfig:
    """Measure strong and weak scaling over processes of one machine."""

    processes: list[int] = field(default_factory=lambda: [1, 2])
    """Numbers of processes; one is the reference."""
    scaling: list[str] = field(default_factory=lambda: ["strong", "weak"])
    """strong: samples altogether; weak: samples for each process."""
    repeats: int = 3
    """Runs of each, of which medians are taken."""
    hardware: str = "configs/accelerate/cpu2.yaml"
    """Configuration for accelerate launch; its number of processes is replaced."""
    model: str = "reference-gpt2"
    """Name, directory, shape file or hub id of a causal language model."""
    split: Literal["examples", "probes", "restarts"] = "examples"
    """What the processes divide."""
    samples: int = 16
    """How many examples, probes or restarts."""
    max_length: int = 16
    """Truncate texts to this many tokens."""
    steps: int = 100
    """Products per probe, or most products per solve."""
    seed: int = 0
    """Seed of everything random."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where; auto: a GPU per process where there are any."""
    threads: int = 1
    """CPU threads per process."""
    output: str = "runs/scaling_throughput"
    """Folder for the runs, table and figure."""

    def __post_init__(self):
        if 1 not in self.processes or min(self.processes) < 1:
            raise ConfigError(f"processes must be positive and include 1, the reference; got {self.processes}")
        if unknown := set(self.scaling) - {"strong", "weak"}:
            raise ConfigError(f"scaling is strong or weak, got {min(unknown)!r}")
        if self.repeats < 1 or self.samples < 1:
            raise ConfigError("repeats and samples must be at least 1")
        if not (ROOT / self.hardware).is_file():
            raise ConfigError(f"hardware={self.hardware!r} is no file; see configs/accelerate")

    def work(self, samples: int, output: Path) -> WorkConfig:
        """Return the worker's settings."""
        shared = ("model", "split", "max_length", "steps", "seed", "device", "threads")
        return WorkConfig(**{name: getattr(self, name) for name in shared}, samples=samples, output=str(output))


def launch(config: ThroughputConfig, name: str, samples: int, processes: int) -> dict:
    """Run the worker unless its results are there, and return its times and rows."""
    folder = Path(config.output) / config.split / name
    work = config.work(samples, folder)
    ResultFolder(folder, work.identity).open()  # refuses what other settings left
    if not (folder / "timing.json").exists():
        settings = [f"--{name}={value}" for name, value in vars(work).items() if value is not None]
        command = [
            sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / config.hardware),
            "--num_processes", str(processes), "--main_process_port", "0",  # a free one
            str(ROOT / "recipes" / "scaling_worker.py"), *settings,
        ]  # fmt: skip
        started = time.time()
        finished = subprocess.run(
            [*command, f"--started={started}"], cwd=Path.cwd(), stderr=subprocess.PIPE, text=True
        )
        if finished.returncode:
            said = [line for line in finished.stderr.splitlines() if "refused:" in line or "Error" in line]
            raise DataError(f"{shlex.join(command)} failed: {said[0] if said else finished.stderr[-1000:]}")
    times = json.loads((folder / "timing.json").read_text(encoding="utf-8"))
    if len(times) != processes:
        raise DataError(
            f"{folder} was run by {len(times)} processes, not {processes}; delete it or name another output"
        )
    rows = (folder / "results.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    return {"samples": samples, "times": times, "rows": rows}


def figures_of(run: dict) -> dict:
    """Return rate, start-up, gathering and overhead of one run."""
    times, busy = run["times"], [t for t in run["times"] if t["done"]]
    began, ended = min(t["began"] for t in busy), max(t["ended"] for t in busy)
    worked = sum(t["worked"] for t in busy)
    between = sum(t["ended"] - t["began"] - t["worked"] for t in busy)
    return {
        "rate": run["samples"] / (ended - began), "startup_seconds": began - times[0]["started"],
        "gathering_seconds": max(t["gathered"] for t in times) - ended, "overhead": between / worked,
    }  # fmt: skip


def entries_of(config: ThroughputConfig) -> list[dict]:
    """Run everything and return one line per kind of scaling and number of processes."""
    entries, reference = [], {}
    for scaling in config.scaling:
        for processes in sorted(config.processes):
            samples = config.samples * (processes if scaling == "weak" else 1)
            names = [f"{scaling}-{processes}-{repeat}" for repeat in range(config.repeats)]
            runs = [launch(config, name, samples, processes) for name in names]
            numbers = [figures_of(run) for run in runs]
            entry = {name: median(n[name] for n in numbers) for name in numbers[0]}
            rates = [n["rate"] for n in numbers]
            if processes == 1:
                reference[scaling] = (entry["rate"], runs[0]["rows"])
            rate, rows = reference[scaling]
            if samples != config.samples:  # as many by one process, to be compared in whole
                rows = launch(config, f"{scaling}-{processes}-by-one", samples, 1)["rows"]
            entries.append({
                "scaling": scaling, "processes": processes, config.split: samples,
                "rate": entry.pop("rate"), "slowest": min(rates), "fastest": max(rates),
                "efficiency": median(rates) / (processes * rate), **entry,
                "identical": all(run["rows"] == rows for run in runs),
            })  # fmt: skip
    return entries


def draw(entries: list[dict], unit: str) -> Figure:
    """Draw rate and efficiency against the number of processes."""
    with house_style():
        figure = Figure(figsize=(8.6, 3.8), layout="constrained")
        left, right = figure.subplots(1, 2)
        for scaling, colour in (("strong", BLUE), ("weak", ORANGE)):
            own = [e for e in entries if e["scaling"] == scaling]
            if own:
                processes, rate = [e["processes"] for e in own], [e["rate"] for e in own]
                spread = [[e["rate"] - e["slowest"] for e in own], [e["fastest"] - e["rate"] for e in own]]
                left.errorbar(processes, rate, yerr=spread, fmt="o-", color=colour, capsize=3, label=scaling)
                left.plot(processes, [rate[0] * p for p in processes], ":", color=colour)
                right.plot(processes, [e["efficiency"] for e in own], "o-", color=colour, label=scaling)
        right.axhline(1, color=GREY, linewidth=1)
        left.set(xlabel="processes", ylabel=f"{unit} per second", title="Rate (dotted: proportional)", ylim=(0, None))
        right.set(xlabel="processes", ylabel="efficiency", title="Efficiency", ylim=(0, 1.15))
        for axes in (left, right):
            axes.set_xticks(sorted({e["processes"] for e in entries}))
            light_grid(axes)
            axes.legend()
    return figure


@exit_status
def main(argv: list[str]) -> None:
    """Measure, print the table and write it; exit status 2 if the input is refused."""
    config = parse_config(ThroughputConfig, argv, prog="scaling_throughput.py")
    entries = entries_of(config)
    publish(Path(config.output), f"throughput-{config.split}", entries, lambda lines: draw(lines, config.split))
    if not all(entry["identical"] for entry in entries):
        raise DataError("several processes gave other rows than one")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
