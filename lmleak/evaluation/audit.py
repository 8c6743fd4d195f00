"""The main job: what do the gradients of this model leak of these texts, under these defenses?"""

import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from accelerate import PartialState
from transformers.utils.logging import disable_progress_bar

from lmleak.adapters import TextAdapter, load_adapter
from lmleak.attacks import parse_attack
from lmleak.config import check_counts
from lmleak.defenses import parse_defense
from lmleak.errors import ConfigError, DataError, UnsupportedModelError
from lmleak.evaluation.circumstances import circumstances, decisive_settings, limit_threads
from lmleak.evaluation.example import ExampleEvaluator, ExampleSettings
from lmleak.evaluation.labels import batch_labels, named_texts
from lmleak.evaluation.model import device_of
from lmleak.evaluation.run import process_state, run_items
from lmleak.evaluation.shards import ResultFolder

LIBRARIES = ("torch", "transformers", "datasets", "accelerate", "evaluate")


@dataclass(frozen=True)
class AuditConfig:
    """Measure what the gradients of a language model leak, with and without defenses."""

    model: str = "reference-gpt2"
    """Embedded name (reference-bert, reference-gpt2), local directory, shape file (.yaml) or hub id."""
    task: str | None = None
    """sequence-classification, causal-lm or masked-lm; read from the model if not given."""
    tokenizer: str | None = None
    """Name or directory of the tokenizer, if it is not beside the model."""
    data: str | None = None
    """A .txt, .csv, .tsv, .jsonl or .parquet file, or a datasets id; the embedded samples if not given."""
    texts: list[str] = field(default_factory=list)
    """Texts given here instead of data."""
    labels: list[int] = field(default_factory=list)
    """Their classes, for a classifier."""
    text_column: str | None = None
    """Column that holds the text; a number in a file without a header."""
    label_column: str | None = None
    """Column that holds the class, for a classifier."""
    split: str | None = None
    """Split of a datasets id."""
    samples: int = 4
    """Number of gradients to audit; each takes the next batch_size texts."""
    batch_size: int = 1
    """Texts per gradient."""
    max_length: int | None = None
    """Truncate texts to this many tokens; too long texts are refused otherwise."""
    padding_side: Literal["right", "left"] = "right"
    """Side on which shorter texts of a batch are padded."""
    shared: str = "no-word-embeddings"
    """Parameters whose gradient is shared: all, no-word-embeddings, embeddings, block:0-3, head, lora or a regex."""
    defenses: list[str] = field(default_factory=lambda: ["none"])
    """Defenses in use or considered, e.g. none "clip(max_norm=1)+gaussian(std=0.01)" "prune(ratio=0.9)"."""
    noise_levels: list[float] = field(default_factory=lambda: [0.01, 0.1, 1.0, 3.0, 10.0, 100.0])
    """Sweep of Gaussian noise, in multiples of the gradient's root mean square."""
    attacks: list[str] = field(default_factory=lambda: ["span", "tag(iterations=120)"])
    """Attacks to run, with options if wanted: span "tag(iterations=500)"."""
    damping: float | None = None
    """Damping of the influence function; if not given, 1e-5 times the largest eigenvalue of J J^T."""
    tolerance: float = 1e-3
    """Relative residual of the solver."""
    max_products: int = 200
    """Most operator products per solve; an unconverged number is marked as a lower bound."""
    implementation: Literal["factored", "autodiff"] = "factored"
    """How products with J are made: by layers' factors (checked on the first example), or all by double backward."""
    probes: int = 2
    """Random probes for averages over the noise; 0 leaves them out."""
    probe_steps: int = 120
    """Products per probe."""
    seed: int = 0
    """Seed of noise, probes and attacks."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    threads: int | None = None
    """CPU threads per process; if not given, one for small models, where more only cost, else torch's choice."""
    output: str = "lmleak-report"
    """Folder for results.jsonl, summary.json, config.yaml, figures and report.html."""
    resume: bool = True
    """Continue a run of the same configuration that was interrupted."""
    processes: int | None = None
    """Refuse to run unless this many processes are running."""
    fail_above: float | None = None
    """Exit with status 3 if an attack recovers more than this share of tokens under one of the defenses."""

    def __post_init__(self):
        check_counts(self, "samples", "batch_size", "max_products", "probe_steps", "threads")
        if self.probes == 1 or self.probes < 0:
            raise ConfigError(f"probes must be 0 or at least 2 (a standard error needs two), got {self.probes}")
        if not 0 < self.tolerance < 1:
            raise ConfigError(f"tolerance must lie between 0 and 1, got {self.tolerance}")
        if self.damping is not None and not self.damping >= 0:
            raise ConfigError(f"damping must be at least 0, got {self.damping}")
        if bad := [level for level in self.noise_levels if not 0 < level < float("inf")]:
            raise ConfigError(f"noise_levels must be positive, got {bad[0]}; the clean gradient is the defense 'none'")
        if self.data and self.texts:
            raise ConfigError("give data= or texts=, not both")
        if self.labels and len(self.labels) != len(self.texts):
            raise ConfigError(f"got {len(self.labels)} labels for {len(self.texts)} texts")
        if not self.defenses and not self.noise_levels:
            raise ConfigError("nothing to measure: give defenses= or noise_levels=")
        if self.fail_above is not None:
            if not 0 <= self.fail_above <= 1:
                raise ConfigError(f"fail_above is a share of tokens in [0, 1], got {self.fail_above}")
            if not self.attacks or not self.defenses:
                raise ConfigError("fail_above judges what attacks recover under defenses; give attacks= and defenses=")
        for spec in self.defenses:
            parse_defense(spec)
        for spec in self.attacks:
            parse_attack(spec)


@dataclass(frozen=True)
class AuditResult:
    """What an audit found."""

    rows: list[dict]
    """One per example and release, as in results.jsonl."""
    meta: dict
    """How it was made."""
    folder: Path
    worst_recall: float | None
    """Largest mean token recall of an attack under one of the owner's defenses; None if no attack could run."""


def run_audit(config: AuditConfig, *, command: str | None = None) -> AuditResult:
    """Run an audit and write results.jsonl and config.yaml; every input is checked before anything is written.

    Args:
        config: The settings.
        command: The command that started it, for the report.

    Returns:
        The rows and how they were made, on every process.
    """
    start = time.perf_counter()
    state = process_state(config.processes)
    adapter = load_text_adapter(config, state)
    limit_threads(adapter, config.threads)
    items, origin = make_items(config, adapter)
    if state.is_main_process and len(items) < config.samples:
        print(f"{origin} holds enough for {len(items)} of the {config.samples} gradients asked for", file=sys.stderr)
    evaluator = ExampleEvaluator(adapter, example_settings(config))
    for number, (texts, labels) in enumerate(items):  # refuse bad input now, not in the middle of the run
        evaluator.check(texts, labels, thoroughly=number == 0)
    difference = evaluator.verify(*items[0])
    identified = identity(adapter, items)
    folder = ResultFolder(config.output, decisive_settings(config), identity=identified, resume=config.resume)
    rows = run_items(items, lambda i, item: evaluator.rows(i, *item), folder, state, label="auditing")
    meta = describe(config, adapter, origin, len(items), state, command)
    meta |= {"product_difference": difference, "seconds": time.perf_counter() - start}
    return AuditResult(rows, meta, folder.path, worst_recall(rows))


def identity(adapter: TextAdapter, items: Sequence) -> dict[str, str]:
    """Return digests of what the settings name but do not fix: weights, texts with labels, and this version."""
    weights = hashlib.sha256()
    for name, tensor in adapter.model.state_dict().items():
        weights.update(name.encode())
        weights.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    texts = hashlib.sha256(json.dumps([list(item) for item in items]).encode())
    return {"weights": weights.hexdigest()[:16], "texts": texts.hexdigest()[:16], "lmleak": version("lmleak")}


def load_text_adapter(config: AuditConfig, state: PartialState) -> TextAdapter:
    """Load the model on this process's device.

    Args:
        config: The settings.
        state: This process's place.

    Returns:
        The adapter.

    Raises:
        UnsupportedModelError: If it is no language model.
    """
    disable_progress_bar()  # of weight loading; the audit has its own
    device = device_of(config.device, state)
    adapter = load_adapter(config.model, task=config.task, tokenizer=config.tokenizer, device=device, seed=config.seed)
    if not isinstance(adapter, TextAdapter):
        raise UnsupportedModelError(
            f"the audit works on language models; {config.model!r} is of task {adapter.task!r}"
        )
    return adapter


def make_items(
    config: AuditConfig, adapter: TextAdapter
) -> tuple[list[tuple[tuple[str, ...], list[int] | None]], str]:
    """Return the batches of texts and labels to audit, and where they come from.

    Args:
        config: The settings.
        adapter: The model, which says whether labels are needed and what they are called.

    Returns:
        (texts, labels) per gradient, and the origin.

    Raises:
        DataError: If there are too few examples.
    """
    size = config.batch_size
    examples = named_texts(config, config.samples * size)
    count = min(config.samples, len(examples.texts) // size)
    if count == 0:
        raise DataError(f"{examples.origin} holds {len(examples.texts)} examples, fewer than batch_size={size}")
    labels = batch_labels(examples, adapter, given=config.labels)
    starts = range(0, count * size, size)
    items = [(examples.texts[i : i + size], None if labels is None else labels[i : i + size]) for i in starts]
    return items, examples.origin


def example_settings(config: AuditConfig) -> ExampleSettings:
    """Return what is measured on each example."""
    return ExampleSettings(
        shared=config.shared,
        defenses=tuple((str(parse_defense(spec)), parse_defense(spec)) for spec in config.defenses),
        noise_levels=tuple(config.noise_levels),
        attacks=tuple((spec, parse_attack(spec)) for spec in config.attacks),
        damping=config.damping,
        tolerance=config.tolerance,
        max_products=config.max_products,
        implementation=config.implementation,
        probes=config.probes,
        probe_steps=config.probe_steps,
        max_length=config.max_length,
        padding_side=config.padding_side,
        seed=config.seed,
    )


def worst_recall(rows: list[dict]) -> float | None:
    """Return the largest mean token recall of any attack under any of the owner's defenses."""
    by_pair: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        for name, attack in row["attacks"].items():
            if not row["sweep"] and "refused" not in attack:
                by_pair.setdefault((row["defense"], name), []).append(attack["token_recall"])
    return max((sum(values) / len(values) for values in by_pair.values()), default=None)


def describe(
    config: AuditConfig, adapter: TextAdapter, origin: str, samples: int, state: PartialState, command: str | None
) -> dict:
    """Return the circumstances of a run, for the report."""
    return {
        "model": config.model,
        "task": adapter.task,
        "data": origin,
        "samples": samples,
        "batch_size": config.batch_size,
        "attacks": list(config.attacks),
        "defenses": [str(parse_defense(spec)) for spec in config.defenses],
        "noise_levels": list(config.noise_levels),
        "shared": config.shared,
        "implementation": config.implementation,
        "seed": config.seed,
        "metric_of_risk": "token_recall",
    } | circumstances(adapter, state, command, LIBRARIES)
