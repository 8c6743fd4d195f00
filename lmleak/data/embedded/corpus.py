"""A seeded writer of short private messages, so that the package needs no downloaded text.

The sentences and word lists in ``grammar/*.txt`` were written for this project. Every name, place, number and
diagnosis is invented; a likeness to a real person is chance.
"""

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lmleak.errors import ConfigError

LABELS = ("health", "money", "work", "home")
"""Topics of the messages, in the order of the class ids of the reference classifier."""

MIN_WORDS, MAX_WORDS = 6, 24
GRAMMAR = Path(__file__).parent / "grammar"
SLOT = re.compile(r"\{(\w+)\}")

Grammar = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Message:
    """A private message and its topic."""

    text: str
    """One to four sentences, 6 to 24 words."""
    label: int
    """Class id: index into ``LABELS``."""


def messages(count: int, *, seed: int) -> list[Message]:
    """Write ``count`` messages, the topics taking turns.

    The same seed gives the same messages everywhere, and a shorter list is a prefix of a longer one. The
    global random state is neither read nor changed.

    Args:
        count: How many messages; class ``i % 4`` for message ``i``, so classes are balanced.
        seed: Any integer.

    Returns:
        The messages. A few may be equal: sentences are drawn independently.

    Raises:
        ConfigError: If ``count`` is negative.
    """
    if count < 0:
        raise ConfigError(f"messages(count={count}): expected a count of at least 0.")
    rng = random.Random(seed)
    return [Message(write(i % len(LABELS), rng), i % len(LABELS)) for i in range(count)]


def write(label: int, rng: random.Random) -> str:
    """Write one message on the topic ``LABELS[label]``, drawing again until its length is in range."""
    while True:
        text = " ".join(expand(template, grammar(topic), rng) for topic, template in outline(LABELS[label], rng))
        if MIN_WORDS <= len(text.split()) <= MAX_WORDS:
            return text


def outline(topic: str, rng: random.Random) -> list[tuple[str, str]]:
    """Choose the sentences of a message as (topic, template); only the opening must be on its topic."""
    sentences = [(topic, rng.choice(grammar(topic)["opening"]))]
    if rng.random() < 0.15:
        sentences.insert(0, (topic, rng.choice(grammar(topic)["greeting"])))
    if rng.random() < 0.55:
        # One detail in eight strays to another topic, as people do; the classifier cannot be too certain.
        aside = rng.choice(LABELS) if rng.random() < 1 / 6 else topic
        sentences.append((aside, rng.choice(grammar(aside)["detail"])))
    if rng.random() < 0.35:
        sentences.append((topic, rng.choice(grammar(topic)["closing"])))
    return sentences


def expand(template: str, lists: Grammar, rng: random.Random) -> str:
    """Fill every ``{name}`` with a draw from the list of that name, inner slots included, and capitalise."""

    def draw(match: re.Match[str]) -> str:
        return SLOT.sub(draw, rng.choice(lists[match[1]]))

    sentence = SLOT.sub(draw, template)
    return sentence[0].upper() + sentence[1:]


@cache
def grammar(topic: str) -> Grammar:
    """Read the lists of a topic together with the shared ones."""
    return _read(GRAMMAR / "shared.txt") | _read(GRAMMAR / f"{topic}.txt")


def _read(path: Path) -> dict[str, tuple[str, ...]]:
    lists: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("== "):
            current = lists.setdefault(line[3:].strip(), [])
        elif line and not line.startswith("#"):
            current.extend(line.split(" | "))
    return {name: tuple(items) for name, items in lists.items()}
