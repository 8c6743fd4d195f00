"""``lmleak attack`` and ``lmleak score``: text from a gradient file without any data, and how right it is."""

import json
import math
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch

from lmleak.attacks import parse_attack
from lmleak.errors import ConfigError, DataError
from lmleak.evaluation.model import ModelConfig, load_text_model
from lmleak.evaluation.records import TextRecords, file_digest, json_lines, read_records, text_record
from lmleak.files import refuse_unwritable, write_text_atomically
from lmleak.gradients import SharedGradient
from lmleak.metrics import LampScores, TextScore, lamp_score_strings, score_strings
from lmleak.types import Reconstruction


@dataclass(frozen=True, kw_only=True)
class AttackConfig(ModelConfig):
    """Recover text from a gradient file, with nothing but what a server has."""

    gradient: str
    """The gradient file."""
    attack: str = "span"
    """The attack, with options if wanted: span, "tag(iterations=500)"."""
    seed: int = 0
    """Seed of everything random in the attack."""
    output: str = "recovered.jsonl"
    """Recovered texts, one JSON line each; how they were made goes to OUTPUT.summary.json."""

    def __post_init__(self):
        parse_attack(self.attack)
        if Path(self.gradient).absolute() in (Path(self.output).absolute(), self.summary_path.absolute()):
            raise ConfigError(f"output={self.output!r} would overwrite the gradient; name another .jsonl file")

    @property
    def summary_path(self) -> Path:
        """Where the circumstances go."""
        return Path(self.output.removesuffix(".jsonl") + ".summary.json")


@dataclass(frozen=True)
class AttackResult:
    """What was recovered, and where it was written."""

    shared: SharedGradient
    reconstruction: Reconstruction
    recovered: Path
    summary: Path


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
    refuse_unwritable(config.output, "output")
    shared = SharedGradient.load(config.gradient)
    try:
        adapter = load_text_model(config, task=shared.task)
    except ConfigError as error:
        raise ConfigError(
            f"{error}. The gradient says task {shared.task!r} and model {shared.model!r}; give the model it is from"
        ) from error
    attack = parse_attack(config.attack)
    recovered = attack.run(adapter, _on(shared, adapter.device), seed=config.seed)
    rows = [
        text_record(text, ids, adapter) | {"confidence": list(confidence)}
        for text, ids, confidence in zip(recovered.texts, recovered.token_ids, recovered.confidence, strict=True)
    ]
    # One line per text of the batch: what was not found is an empty one, without special tokens to be credited for.
    missing = {"text": "", "token_ids": [], "text_with_special_tokens": "", "confidence": []}
    digest = file_digest(config.gradient)
    rows = [row | {"gradient": digest} for row in rows + [missing] * (shared.batch_size - len(rows))]
    summary = {
        "attack": config.attack,
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
        "sequences": len(recovered.texts),
        "stopped": recovered.stopped,
        "objective": _finite(recovered.objective),
        "notes": list(recovered.notes),
        "cost": asdict(recovered.cost),
        "device": str(adapter.device),
        "versions": {name: version(name) for name in ("lmleak", "torch", "transformers")},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    write_text_atomically(config.summary_path, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    write_text_atomically(config.output, json_lines(rows))
    return AttackResult(shared, recovered, Path(config.output), config.summary_path)


def _finite(value: float | None) -> float | None:
    """Return a number as JSON can hold it."""
    return value if value is not None and math.isfinite(value) else None


def _on(shared: SharedGradient, device: torch.device) -> SharedGradient:
    """Return the gradient on the model's device."""

    def moved(tensors):
        return {name: tensor.to(device) for name, tensor in tensors.items()}

    labels = None if shared.labels is None else shared.labels.to(device)
    return replace(shared, gradient=moved(shared.gradient), layout=moved(shared.layout), labels=labels)


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Score recovered texts against the private ones."""

    recovered: str
    """What an attack recovered: the output of lmleak attack, or any .jsonl or .txt of texts."""
    reference: str
    """The private texts: the private reference of lmleak capture, or any .jsonl or .txt of texts."""
    lamp_compat: bool = False
    """Also print ROUGE as LAMP and DAGER do, special tokens counted as words."""
    words: Literal["latin", "unicode"] = "latin"
    """How texts are cut for ROUGE: latin (published numbers) or unicode (any script)."""
    any_gradient: bool = False
    """Score texts recovered from another gradient file than the reference's (you changed the file in between)."""


@dataclass(frozen=True)
class ScoreResult:
    """The scores, by both conventions if asked."""

    score: TextScore
    references: tuple[str, ...]
    by_token_ids: bool
    """Whether tokens are the tokenizer's; else they are what white space separates."""
    lamp: LampScores | None = None
    special_tokens_known: bool = True
    """Whether the special tokens of the LAMP scores were put in place, or texts were taken as they stand."""


def run_score(config: ScoreConfig) -> ScoreResult:
    """Score a file of recovered texts against a file of private ones, in any order.

    Args:
        config: The settings.

    Returns:
        The scores.

    Raises:
        DataError: If a file is damaged, a private text is empty, or the files hold different numbers of texts or
            belong to different gradients.
    """
    recovered, reference = read_records(config.recovered), read_records(config.reference)
    if len(recovered.texts) != len(reference.texts):
        raise DataError(
            f"{config.recovered} holds {len(recovered.texts)} text(s) and {config.reference} {len(reference.texts)}; "
            "expected one recovered text per private one (an empty text where nothing was recovered): are they of the "
            "same batch?"
        )
    known = None not in (recovered.gradient, reference.gradient)
    if known and recovered.gradient != reference.gradient and not config.any_gradient:
        raise DataError(
            f"{config.recovered} was recovered from another gradient file ({recovered.gradient:.8}) than "
            f"{config.reference} belongs to ({reference.gradient:.8}): left from an earlier attack? If you changed "
            "the gradient file on purpose, pass --any-gradient"
        )
    for number, text in enumerate(reference.texts, 1):
        if not text.strip():
            raise DataError(f"{config.reference}, line {number}: the private text is empty; there is nothing to score")
    by_ids = recovered.token_ids is not None and reference.token_ids is not None
    score = score_strings(
        recovered.texts,
        reference.texts,
        predicted_ids=recovered.token_ids if by_ids else None,
        true_ids=reference.token_ids if by_ids else None,
        words=config.words,
    )
    if not config.lamp_compat:
        return ScoreResult(score, reference.texts, by_ids)
    lamp, known = _lamp(recovered, reference, config)
    return ScoreResult(score, reference.texts, by_ids, lamp, known)


def _lamp(recovered: TextRecords, reference: TextRecords, config: ScoreConfig) -> tuple[LampScores, bool]:
    sides = recovered.with_special_tokens, reference.with_special_tokens
    if (sides[0] is None) != (sides[1] is None):
        without = config.recovered if sides[0] is None else config.reference
        raise DataError(
            f"lamp_compat counts special tokens, and {without} has no text_with_special_tokens while the other file "
            "has; give two files of lmleak, or two plain ones that keep their special tokens in the text"
        )
    if sides[0] is None:
        return lamp_score_strings(recovered.texts, reference.texts), False
    return lamp_score_strings(*sides), True
