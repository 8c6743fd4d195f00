"""Do larger models leak more? I2F and recovered tokens against model size: same texts, same noise, random weights.

GPT-2 shapes from 1 M to 1.5 B parameters, initialised by seed. For every size, seed and text: I2F, its lower bound and
the predicted error of an attacker with a Gaussian prior, all rms in units of the embedding table's spread; token
recall of ``span`` on the clean gradient and of a noise-tolerant attack at every noise level. Noise is Gaussian, in
multiples of the gradient's own root mean square, from a seed that all sizes share. Then power laws q = a N^s in the
number of parameters N, embeddings aside, with bootstrap intervals over texts and seeds.

    accelerate launch --config_file configs/accelerate/cpu2.yaml recipes/scaling_study.py
        --config configs/scaling_study/two-core.yaml
    accelerate launch --config_file configs/accelerate/multi_gpu.yaml recipes/scaling_study.py
        --config configs/scaling_study/many-gpu.yaml

(each command on one line.) Two machines or more, which share the folder of results: on each of them the same command
with its own rank, and the first one's address,

    accelerate launch --config_file configs/accelerate/multi_node.yaml --machine_rank 0 --main_process_ip 10.0.0.1
        recipes/scaling_study.py --config configs/scaling_study/many-gpu.yaml

num_processes of the file counts the processes of all machines. Where a machine dies, the processes of the others end
with a refusal; the same command continues where the run was. One process or several give the same rows. How fast
several are is another recipe's question: scaling_throughput.py.
"""

import os
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import yaml
from image_tables import publish
from scaling_fits import draw_laws, law_entries, size_entries

from lmleak.adapters import TextAdapter, load_adapter
from lmleak.attacks import parse_attack
from lmleak.config import check_counts, check_positive, parse_config
from lmleak.data import load_examples
from lmleak.defenses import GaussianNoise
from lmleak.errors import ConfigError, DataError
from lmleak.evaluation import ResultFolder, exit_status, finish, process_state, run_items
from lmleak.evaluation.scored import scored_attack
from lmleak.gradients import capture_gradient
from lmleak.influence import GradientJacobian, InfluenceSolver

POSITIONS = 128
EMBEDDINGS = ("transformer.wte.weight", "transformer.wpe.weight")
HEAD_WIDTH = 64  # of the published shapes


@dataclass(frozen=True)
class ScalingConfig:
    """Measure I2F and recovered tokens against model size."""

    shapes: list[str] = field(default_factory=lambda: ["5x128", "5x256", "8x384", "8x640"])
    """GPT-2 shapes, layers x width (heads of 64): 1, 4, 14 and 39 M parameters; GPT-2 small is 12x768, XL 48x1600."""
    seeds: int = 2
    """Initialisations per shape, each with noise of its own."""
    samples: int = 3
    """Texts."""
    max_length: int = 8
    """Truncate texts to this many tokens."""
    data: str | None = None
    """File or datasets id; the embedded samples if not given."""
    noise_levels: list[float] = field(default_factory=lambda: [0.3, 1.0, 3.0, 10.0, 30.0])
    """In multiples of the gradient's root mean square."""
    attack: str = "noisy-span(beam=8, candidates=8)"
    """The attack on noisy gradients; its search takes most of the time."""
    max_products: int = 300
    """Most products with J J^T per solve; what did not converge is left out of the fits."""
    seed: int = 0
    """First of the seeds, and the attacks'."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where; auto: a GPU per process where there are any."""
    threads: int = 1
    """CPU threads per process."""
    processes: int | None = None
    """Refuse to run unless this many processes are running."""
    output: str = "runs/scaling_study"
    """Folder for rows, tables and figure."""

    def __post_init__(self):
        check_counts(self, "seeds", "samples", "max_length", "max_products", "threads")
        if self.max_length > POSITIONS:
            raise ConfigError(f"max_length must be at most {POSITIONS}, got {self.max_length}")
        check_positive(self, "noise_levels")
        if len({layers_and_width(shape) for shape in self.shapes}) < 3:
            raise ConfigError(f"a slope with an interval needs three different shapes, got {self.shapes}")
        parse_attack(self.attack)


def layers_and_width(shape: str) -> tuple[int, int]:
    """Return the numbers of "12x768"."""
    layers, _, width = shape.partition("x")
    if not (layers.isdigit() and width.isdigit() and int(layers) and int(width)) or int(width) % HEAD_WIDTH:
        raise ConfigError(
            f"expected layers x width with a width of {HEAD_WIDTH}, 128, ..., as in 12x768; got {shape!r}"
        )
    return int(layers), int(width)


@lru_cache(maxsize=16)
def adapter_of(shape: str, seed: int, device: str) -> TextAdapter:
    """Return the model of one shape and seed: GPT-2 as transformers initialises it, the embedded vocabulary."""
    layers, width = layers_and_width(shape)
    sizes = {"n_layer": layers, "n_embd": width, "n_head": width // HEAD_WIDTH}
    vocabulary = {"n_positions": POSITIONS, "vocab_size": load_adapter("reference-gpt2").vocabulary_size}
    description = {"model_type": "gpt2", "task": "causal-lm", "tokenizer": "reference-gpt2"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"gpt2-{shape}.yaml"
        path.write_text(yaml.safe_dump(description | {"config": sizes | vocabulary}), encoding="utf-8")
        return load_adapter(str(path), device=device, seed=seed)


def text_row(config: ScalingConfig, device: str, shape: str, seed: int, index: int, text: str) -> dict:
    """Return everything about one text under one model."""
    adapter = adapter_of(shape, seed, device)
    batch = adapter.batch([text], max_length=config.max_length)
    true = capture_gradient(adapter, batch)
    jacobian = GradientJacobian(adapter, batch)
    solver = InfluenceSolver(jacobian, adapter.prior(), max_products=config.max_products, seed=seed)
    response = solver.respond(solver.noise())
    influence = response.influence(solver.default_damping, scale=true.rms)
    spread = solver.prior.std
    predicted, recall = {}, {}
    for level in config.noise_levels:
        std = level * true.rms
        error = response.predicted_error(std, scale=std)
        predicted[f"{level:g}"] = error.error.rms / spread if error.converged else None
        noisy = GaussianNoise(std=std, seed=seed)(true)
        recall[f"{level:g}"] = recalled(config.attack, adapter, noisy, batch, seed)
    return {
        "key": f"{shape}|{seed}|{index}", "shape": shape, "seed": seed, "text": index,
        "tokens": len(batch.token_ids[0]), "dx": jacobian.dx,
        "parameters": sum(p.numel() for n, p in adapter.parameters().items() if n not in EMBEDDINGS),
        "shared_parameters": jacobian.shape[1], "gradient_rms": true.rms, "embedding_spread": spread,
        "lambda_max": influence.lambda_max, "damping": influence.damping, "residual": influence.residual,
        "influence": influence.influence.rms / spread if influence.converged else None,
        "lower_bound": influence.lower_bound.rms / spread, "cg_bound": influence.cg_bound.rms / spread,
        "predicted": predicted, "clean_recall": recalled("span", adapter, true, batch, seed), "recall": recall,
        "products": influence.products,
    }  # fmt: skip


def recalled(spec: str, adapter: TextAdapter, shared, batch, seed: int) -> float | None:
    """Return the share of tokens that an attack recovers; None where it cannot run."""
    scores = scored_attack(parse_attack(spec), adapter, shared, batch, seed=seed, more=lambda *_: {})
    return scores.get("token_recall")


@exit_status
def main(argv: list[str]) -> None:
    """Run the study; exit status 2 if the input is refused."""
    config = parse_config(ScalingConfig, argv, prog="scaling_study.py")
    state = process_state(config.processes)
    torch.set_num_threads(config.threads)
    device = str(state.device) if config.device == "auto" else config.device
    texts = load_examples(config.data, limit=config.samples).texts
    if len(texts) < config.samples:
        raise DataError(f"{len(texts)} texts, fewer than samples={config.samples}")
    # Size innermost: neighbouring processes get shares of equal work.
    seeds = range(config.seed, config.seed + config.seeds)
    items = [(s, seed, i, text) for seed in seeds for i, text in enumerate(texts) for s in config.shapes]
    settings = {k: v for k, v in asdict(config).items() if k not in ("output", "device", "threads", "processes")}
    folder = ResultFolder(config.output, settings)
    rows = run_items(items, lambda i, item: [text_row(config, device, *item)], folder, state, label="measuring")
    if state.is_main_process:
        publish(folder.path, "sizes", size_entries(rows))
        publish(folder.path, "laws", law_entries(rows, config.seed), lambda laws: draw_laws(rows, laws))
    finish(state)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
