"""What can be audited without a network: sample messages, a message writer, two reference models."""

import json
from functools import lru_cache
from pathlib import Path

from lmleak.data.embedded.corpus import LABELS, Message, messages

HERE = Path(__file__).parent

REFERENCE_MODELS = {name: HERE / name for name in ("reference-bert", "reference-gpt2")}
"""Directories for ``from_pretrained``; ``recipes/train_reference_models.py`` trained what is in them."""


@lru_cache(maxsize=1)
def _samples() -> tuple[Message, ...]:
    lines = (HERE / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    return tuple(Message(row["text"], LABELS.index(row["label"])) for row in map(json.loads, lines))


def sample_messages() -> list[Message]:
    """Return the 36 hand-written messages that an audit tries to recover; no model was trained on them."""
    return list(_samples())


__all__ = ["LABELS", "REFERENCE_MODELS", "Message", "messages", "sample_messages"]
