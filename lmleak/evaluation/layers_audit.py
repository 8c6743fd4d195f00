"""The layer-wise audit: capture, measure every layer, order the layers, verify the orders; killed and resumed."""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import PartialState

from lmleak.adapters import ModelAdapter, TextAdapter
from lmleak.evaluation.circumstances import circumstances, decisive_settings, limit_threads
from lmleak.evaluation.layers import LayerAnalysis, Row
from lmleak.evaluation.layers_capture import CaptureSettings, capture_store
from lmleak.evaluation.layers_config import LayersConfig
from lmleak.evaluation.layers_data import load_labelled
from lmleak.evaluation.layers_examples import LabelledExamples
from lmleak.evaluation.layers_order import LayerScores, layer_scores, rank_agreement
from lmleak.evaluation.layers_protection import Curves, Protection, curves, hidden_sets, protection_orders
from lmleak.evaluation.run import on_main, process_state, progress, run_items
from lmleak.evaluation.shards import ResultFolder
from lmleak.gradients import GradientStore

LIBRARIES = ("torch", "transformers", "scikit-learn", "accelerate")


@dataclass(frozen=True)
class LayersResult:
    """What a layer-wise audit found."""

    rows: list[Row]
    """Every metric of every layer, as in results.jsonl."""
    agreement: list[dict[str, Any]]
    """Rank correlation of every pair of metrics over the layers."""
    orders: dict[str, tuple[str, ...]]
    """Orders of protection, by name."""
    protection: list[Row]
    """What is left with some layers hidden, as in protection/results.jsonl."""
    meta: dict[str, Any]
    """How it was made."""
    folder: Path

    @cached_property
    def scores(self) -> list[LayerScores]:
        """Every metric that all layers have."""
        return layer_scores(self.rows)

    @cached_property
    def curves(self) -> Curves:
        """What is left after hiding the first k layers, per order."""
        return curves(self.orders, self.protection, self.meta["steps"])


def run_layers(config: LayersConfig, *, command: str | None = None) -> LayersResult:
    """Run a layer-wise audit and write its rows; every input is checked before anything is written.

    Folder: ``config.yaml``, ``gradients/`` (the store; it holds private attributes and inputs), ``results.jsonl`` and
    ``protection/results.jsonl``.

    Args:
        config: The settings.
        command: The command that started it, for the report.

    Returns:
        What was found, on every process.
    """
    start = time.perf_counter()
    state = process_state(config.processes)
    adapter, examples = load_labelled(config, state)
    limit_threads(adapter, config.threads)
    settings = config.layer_settings(images=not isinstance(adapter, TextAdapter))
    protection = config.protection_settings(adapter.task)
    decisive = decisive_settings(config)
    columns = {name: values.tolist() for name, values in examples.attributes.items()}
    identified = {
        "weights": adapter.weights_digest(), "examples": examples.digest, "attributes": _digest(columns),
        "groups": _digest(None if examples.groups is None else list(examples.groups)), "lmleak": version("lmleak"),
    }  # fmt: skip
    folder = ResultFolder(config.output, decisive, identity=identified, resume=config.resume)
    store = _captured(folder, adapter, examples, settings.capture, state)
    analysis = LayerAnalysis(adapter, examples, store, settings)
    rows = run_items(
        analysis.measures(), lambda _, measure: analysis.rows(measure), folder, state, label="measuring layers"
    )
    scores = layer_scores(rows)
    orders = on_main(state, lambda: protection_orders(analysis, scores, protection))  # greedy ones take many fits
    sets = hidden_sets(orders, protection.steps)
    guard = Protection(analysis, protection)
    within = ResultFolder(folder.path / "protection", decisive, identity=identified | {"sets": _digest(sets)})
    left = run_items(sets, lambda _, hidden: [guard.row(hidden)], within, state, label="hiding layers")
    meta = describe(config, adapter, examples, analysis, state, command) | {"seconds": time.perf_counter() - start}
    return LayersResult(rows, rank_agreement(scores, seed=config.seed), orders, left, meta, folder.path)


def _captured(
    folder: ResultFolder,
    adapter: ModelAdapter,
    examples: LabelledExamples,
    settings: CaptureSettings,
    state: PartialState,
) -> GradientStore:
    """Write the store on the main process, behind a progress bar, and open it on all."""
    path = folder.path / "gradients"

    def capture() -> None:
        folder.open()
        with progress(state, examples.size, "capturing gradients") as advance:
            capture_store(adapter, examples, path, settings, advance=advance)

    on_main(state, capture)
    return GradientStore(path)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def describe(
    config: LayersConfig,
    adapter: ModelAdapter,
    examples: LabelledExamples,
    analysis: LayerAnalysis,
    state: PartialState,
    command: str | None,
) -> dict[str, Any]:
    """Return the circumstances of a run, for the report."""
    sharing = analysis.settings.capture.sharing
    return {
        "model": config.model,
        "task": adapter.task,
        "data": examples.name,
        "examples": examples.size,
        "attributes": {name: _counts(values.tolist()) for name, values in examples.attributes.items()},
        "originals": list(examples.originals),
        "layers": {layer: analysis.parameters[layer] for layer in analysis.layers},
        "batch_size": config.batch_size,
        "shared": sharing.shared,
        "defense": sharing.defense.describe(),
        "dropout": config.dropout,
        "local_steps": config.local_steps,
        "families": list(config.families),
        "features": config.features,
        "gradients": len(analysis.chosen),
        "protection_gradients": min(config.protection_gradients, examples.size),
        "noise": config.noise,
        "steps": config.steps,
        "seed": config.seed,
    } | circumstances(adapter, state, command, LIBRARIES)


def _counts(values: Sequence) -> Mapping[str, int]:
    return {str(value): values.count(value) for value in sorted(set(values))}
