"""``lmleak attack``: texts or images from a gradient file, without any data."""

import json
import math
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import torch

from lmleak.adapters import TextAdapter
from lmleak.adapters.targets import IMAGE_TASK
from lmleak.attacks import parse_attack
from lmleak.errors import ConfigError
from lmleak.evaluation.image_records import ImageRecords
from lmleak.evaluation.model import ModelConfig, load_model
from lmleak.evaluation.records import file_digest, json_lines, text_record
from lmleak.files import refuse_unwritable, write_text_atomically
from lmleak.gradients import SharedGradient
from lmleak.types import ImageReconstruction, Normalization, Reconstruction


@dataclass(frozen=True, kw_only=True)
class AttackConfig(ModelConfig):
    """Recover texts or images from a gradient file, with nothing but what a server has."""

    gradient: str
    """The gradient file."""
    attack: str | None = None
    """The attack, with options if wanted, such as "tag(iterations=500)"; span, or gauss-newton on images, if not
    given."""
    seed: int = 0
    """Seed of everything random in the attack."""
    output: str | None = None
    """Recovered texts, one JSON line each (recovered.jsonl if not given), or images (recovered.safetensors); how they
    were made goes to OUTPUT.summary.json."""

    def __post_init__(self):
        for task in ("causal-lm", IMAGE_TASK):
            if Path(self.gradient).absolute() in (
                self.output_path(task).absolute(),
                self.summary_path(task).absolute(),
            ):
                raise ConfigError(f"output={self.output!r} would overwrite the gradient; name another file")

    def output_path(self, task: str) -> Path:
        """Return where what was recovered goes."""
        return Path(self.output or f"recovered{'.safetensors' if task == IMAGE_TASK else '.jsonl'}")

    def summary_path(self, task: str) -> Path:
        """Return where the circumstances go."""
        output = str(self.output_path(task)).removesuffix(".jsonl").removesuffix(".safetensors")
        return Path(output + ".summary.json")


@dataclass(frozen=True)
class AttackResult:
    """What was recovered, and where it was written."""

    shared: SharedGradient
    reconstruction: Reconstruction | ImageReconstruction
    recovered: Path
    summary: Path
    normalization: Normalization | None = None
    """How the model reads pixels, for images."""


def run_recovery(config: AttackConfig) -> AttackResult:
    """Attack a gradient file and write what was recovered.

    Args:
        config: The settings.

    Returns:
        The reconstruction. A file that is damaged or does not fit the model, and an attack that cannot be run on it,
        are refused before anything is written.

    Raises:
        ConfigError: If the model cannot be loaded for the gradient's task.
    """
    shared = SharedGradient.load(config.gradient)
    output, summary_path = config.output_path(shared.task), config.summary_path(shared.task)
    refuse_unwritable(output, "output")
    if shared.task == IMAGE_TASK and output.suffix != ".safetensors":
        raise ConfigError(f"output={str(output)!r}: recovered images go to a .safetensors file; name one")
    spec = config.attack or ("gauss-newton" if shared.task == IMAGE_TASK else "span")
    attack = parse_attack(spec, task=shared.task)
    try:
        adapter = load_model(config, task=shared.task)
    except ConfigError as error:
        raise ConfigError(
            f"{error}. The gradient says task {shared.task!r} and model {shared.model!r}; give the model it is from"
        ) from error
    recovered = attack.run(adapter, _on(shared, adapter.device), seed=config.seed)
    digest = file_digest(config.gradient)
    summary = {
        "attack": spec,
        "paper": attack.paper,
        "assumes": asdict(attack.assumes),
        "seed": config.seed,
        "model": config.model,
        "gradient": {
            "sha256": digest,
            "model": shared.model,
            "task": shared.task,
            "shared": shared.shared,
            "batch_size": shared.batch_size,
            "defenses": list(shared.defenses),
            "aggregation": asdict(shared.aggregation),
        },
        "images" if shared.task == IMAGE_TASK else "sequences": _count(recovered),
        "stopped": recovered.stopped,
        "objective": _finite(recovered.objective),
        "notes": list(recovered.notes),
        "cost": asdict(recovered.cost),
        "device": str(adapter.device),
        "versions": {name: version(name) for name in ("lmleak", "torch", "transformers")},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    write_text_atomically(summary_path, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    if isinstance(recovered, ImageReconstruction):
        pixels = adapter.normalization.pixels(recovered.images.double())
        ImageRecords(pixels, recovered.labels, adapter.normalization, digest).save(output)
        return AttackResult(shared, recovered, output, summary_path, adapter.normalization)
    write_text_atomically(output, json_lines(_rows(recovered, adapter, shared.batch_size, digest)))
    return AttackResult(shared, recovered, output, summary_path)


def _rows(recovered: Reconstruction, adapter: TextAdapter, batch_size: int, digest: str) -> list[dict]:
    """Return one line per text of the batch: what was not found is an empty one, without special tokens to credit."""
    rows = [
        text_record(text, ids, adapter) | {"confidence": list(confidence)}
        for text, ids, confidence in zip(recovered.texts, recovered.token_ids, recovered.confidence, strict=True)
    ]
    missing = {"text": "", "token_ids": [], "text_with_special_tokens": "", "confidence": []}
    return [row | {"gradient": digest} for row in rows + [missing] * (batch_size - len(rows))]


def _count(recovered: Reconstruction | ImageReconstruction) -> int:
    return len(recovered.images if isinstance(recovered, ImageReconstruction) else recovered.texts)


def _finite(value: float | None) -> float | None:
    """Return a number as JSON can hold it."""
    return value if value is not None and math.isfinite(value) else None


def _on(shared: SharedGradient, device: torch.device) -> SharedGradient:
    """Return the gradient on the model's device."""

    def moved(tensors):
        return {name: tensor.to(device) for name, tensor in tensors.items()}

    labels = None if shared.labels is None else shared.labels.to(device)
    return replace(shared, gradient=moved(shared.gradient), layout=moved(shared.layout), labels=labels)
