"""The work whose speed scaling_throughput.py measures; it starts this file with 1, 2, ... processes.

    accelerate launch --config_file configs/accelerate/cpu2.yaml recipes/scaling_worker.py --samples 8 --output FOLDER

Examples: lambda_max, I_lb and I2F of each text, split over the processes as every recipe splits them. Probes and
restarts: one text, whose random probes (mean I2F over the noise) or restarts of an attack are split. Writes
results.jsonl, without a time in it, and timing.json: seconds of every process.
"""

import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from typing import Literal

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

from lmleak.adapters import TextAdapter, load_adapter
from lmleak.attacks import parse_attack
from lmleak.config import check_counts, parse_config
from lmleak.data import load_examples
from lmleak.defenses import derived_seed
from lmleak.errors import ConfigError, UnsupportedModelError
from lmleak.evaluation import (
    ResultFolder,
    exit_status,
    finish,
    process_state,
    run_items,
    split_restarts,
    split_spectrum,
)
from lmleak.evaluation.run import gather
from lmleak.files import write_text_atomically
from lmleak.gradients import capture_gradient
from lmleak.influence import GradientJacobian, InfluenceSolver, expected_influence


@dataclass(frozen=True)
class WorkConfig:
    """Measure texts, probes or restarts over the launched processes."""

    model: str = "reference-gpt2"
    """Name, directory, shape file or hub id of a causal language model."""
    split: Literal["examples", "probes", "restarts"] = "examples"
    """What the processes divide: examples, or of the first example the probes or the restarts."""
    samples: int = 8
    """How many of them."""
    max_length: int = 16
    """Truncate texts to this many tokens."""
    steps: int = 40
    """Products per probe, or most products per solve."""
    attack: str = "dlg(iterations=20, candidates=4)"
    """The attack whose restarts are split."""
    seed: int = 0
    """Seed of everything random."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where; auto: a GPU per process where there are any."""
    threads: int = 1
    """CPU threads per process."""
    started: float | None = None
    """When the launcher was started, seconds since 1970; by default when this file was."""
    output: str = "runs/scaling_worker"
    """Folder for rows and times."""

    def __post_init__(self):
        check_counts(self, "samples", "max_length", "steps", "threads")
        if self.split == "probes" and self.samples < 2:
            raise ConfigError("probes have a standard error from 2 on; give samples=2 or more")
        parse_attack(self.attack)

    @property
    def identity(self) -> dict:
        """What the rows depend on: a folder holds rows of one."""
        return {
            name: value
            for name, value in asdict(self).items()
            if name not in ("device", "threads", "started", "output")
        }


class Clock:
    """When a process began and ended its work, and how long it worked in between."""

    def __init__(self):
        self.began, self.ended, self.worked, self.done = None, None, 0.0, 0

    def __call__(self, work, *arguments):
        """Run work on the arguments."""
        start = time.time()
        self.began = start if self.began is None else self.began
        value = work(*arguments)
        self.ended = time.time()
        self.worked, self.done = self.worked + self.ended - start, self.done + 1
        return value


def example_row(config: WorkConfig, adapter: TextAdapter, index: int, text: str) -> dict:
    """Return the risk numbers of one text at noise of the gradient's root mean square."""
    batch = adapter.batch([text], max_length=config.max_length)
    solver = InfluenceSolver(
        GradientJacobian(adapter, batch), adapter.prior(), max_products=config.steps,
        seed=derived_seed(config.seed, index) % 2**31,
    )  # fmt: skip
    ((result,),) = solver.sweep([capture_gradient(adapter, batch).rms])
    return {"key": str(index), "lambda_max": result.lambda_max, "lower_bound_l2": result.lower_bound.l2,
            "influence_l2": result.influence.l2, "residual": result.residual, "products": result.products}  # fmt: skip


def probes_row(config: WorkConfig, adapter: TextAdapter, text: str, state) -> dict:
    """Return the mean I2F over the noise of one text, its probes split."""
    batch = adapter.batch([text], max_length=config.max_length)
    jacobian = GradientJacobian(adapter, batch)
    spectrum = split_spectrum(jacobian, state, num_probes=config.samples, steps=config.steps, seed=config.seed)
    std = capture_gradient(adapter, batch).rms
    (average,) = expected_influence(spectrum, [std], adapter.prior().std, damping=1e-4 * spectrum.largest)
    return {"key": "0", "response_rms": average.response.rms, "std_error": average.response_std_error,
            "information_nats": average.information, "products": average.products}  # fmt: skip


def restarts_row(config: WorkConfig, adapter: TextAdapter, text: str, state) -> dict:
    """Return what the best of all restarts recovers of one text."""
    batch = adapter.batch([text], max_length=config.max_length)
    spec = f"{config.attack.removesuffix(')')}{', ' if '(' in config.attack else '('}restarts={config.samples})"
    found = split_restarts(parse_attack(spec), adapter, capture_gradient(adapter, batch), state, seed=config.seed)
    return {"key": "0", "token_ids": [list(ids) for ids in found.token_ids], "objective": found.objective,
            "gradients": found.cost.gradient_evaluations}  # fmt: skip


@exit_status
def main(argv: list[str]) -> None:
    """Do the work; exit status 2 if the input is refused."""
    began = time.time()
    config = parse_config(WorkConfig, argv, prog="scaling_worker.py")
    state = process_state()
    torch.set_num_threads(config.threads)
    device = str(state.device) if config.device == "auto" else config.device
    adapter = load_adapter(config.model, device=device, seed=config.seed)
    if adapter.task != "causal-lm":
        raise UnsupportedModelError(f"{config.model!r} is of task {adapter.task!r}; give a causal language model")
    texts = load_examples(None).texts
    folder, clock = ResultFolder(config.output, config.identity), Clock()
    gather([None], state)  # all have loaded; what follows is work
    if config.split == "examples":
        items = [texts[i % len(texts)] for i in range(config.samples)]
        work = lambda i, text: [clock(example_row, config, adapter, i, text)]
        rows = run_items(items, work, folder, state, label="measuring")
    else:
        if state.is_main_process:
            folder.open()
        row_of = probes_row if config.split == "probes" else restarts_row
        rows = [clock(row_of, config, adapter, texts[0], state)]
        if state.is_main_process:
            content = "".join(json.dumps(row) + "\n" for row in rows)
            write_text_atomically(folder.path / "results.jsonl", content)
    times = {"process": state.process_index, "started": config.started or began, "began": clock.began,
             "ended": clock.ended, "worked": clock.worked, "done": clock.done, "gathered": time.time()}  # fmt: skip
    everyone = gather([times], state)
    if state.is_main_process:
        write_text_atomically(folder.path / "timing.json", json.dumps(everyone, indent=1))
    finish(state)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
