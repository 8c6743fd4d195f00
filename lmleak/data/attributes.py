"""Private examples with attributes to infer, for texts: topic, author, or what the words show.

An attribute of a text is what stands in the data (topic, sentiment, sex of the author) or what its words show by a
plain rule (``TEXT_RULES``). A classifier's gradient tells its label whatever the text; an attribute that follows from
the label is no secret of the text (:mod:`lmleak.data.attributes_images`, for images). Every source has "coin", a fair
coin thrown per example: what is measured of it is what the estimator reports of nothing.
"""

import csv
import gzip
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmleak.data.embedded import LABELS, messages
from lmleak.errors import ConfigError, DataError
from lmleak.lookup import lookup

COIN = "coin"
NEGATIONS = {"no", "not", "never", "nothing", "nobody", "none", "without", "n't"}


@dataclass(frozen=True)
class AttributeData:
    """Texts or images with classes and private attributes, in the order of their source."""

    name: str
    labels: NDArray | None
    """(n,) classes for a classifier, from 0; None where the data has none."""
    class_names: tuple[str, ...]
    attributes: Mapping[str, NDArray]
    """Name -> (n,) integers, booleans or strings."""
    texts: tuple[str, ...] | None = None
    pixels: Tensor | None = None
    """(n, C, H, W) in [0, 1]."""
    groups: NDArray | None = None
    """(n,) the author of each example, where examples of one author resemble each other."""
    notes: tuple[str, ...] = field(default=())
    """How attributes were made."""

    def __len__(self) -> int:
        return len(self.texts) if self.texts is not None else len(self.pixels)

    def part(self, rows: NDArray) -> "AttributeData":
        """Return some of the examples.

        Args:
            rows: Their numbers.

        Returns:
            The same kind of data, in the order of ``rows``.
        """
        take = lambda values: None if values is None else values[rows]
        return replace(
            self, labels=take(self.labels), groups=take(self.groups),
            attributes={name: values[rows] for name, values in self.attributes.items()},
            texts=None if self.texts is None else tuple(self.texts[i] for i in rows),
            pixels=None if self.pixels is None else self.pixels[torch.as_tensor(rows)],
        )  # fmt: skip

    def halves(self, seed: int) -> tuple["AttributeData", "AttributeData"]:
        """Return two halves at random that share no author: private examples, and those a model was trained on.

        Args:
            seed: Seed of the division.

        Returns:
            The first and the second half, each in the order of the source.
        """
        units = np.arange(len(self)) if self.groups is None else np.unique(self.groups, return_inverse=True)[1]
        number = int(units.max()) + 1
        first = np.isin(units, np.random.default_rng(seed).permutation(number)[: number // 2])
        return self.part(np.flatnonzero(first)), self.part(np.flatnonzero(~first))


# Texts -----------------------------------------------------------------------------------------------------


def _words(text: str) -> list[str]:
    return text.split()


TEXT_RULES: dict[str, Callable[[str], bool]] = {
    "number": lambda text: any(c.isdigit() for c in text),
    "name": lambda text: any(
        word[0].isupper() and word not in ("I", "I'm", "I've", "I'll", "I'd") and not before.endswith((".", "!", "?"))
        for before, word in zip(_words(text), _words(text)[1:], strict=False)
    ),
    "negation": lambda text: any(
        w.lower().strip(".,!?") in NEGATIONS or w.lower().strip(".,!?").endswith("n't") for w in _words(text)
    ),
    "question": lambda text: "?" in text,
}
"""What the words show: a digit; a capital within a sentence; a negation; a question mark."""


def text_attributes(texts: tuple[str, ...]) -> dict[str, NDArray]:
    """Return the attributes that a plain rule reads from the words: ``TEXT_RULES``, and "long".

    Args:
        texts: The texts.

    Returns:
        Name -> (n,) booleans. "long" is more words than the median text.
    """
    counts = np.array([len(_words(text)) for text in texts])
    found = {name: np.array([rule(text) for text in texts]) for name, rule in TEXT_RULES.items()}
    return found | {"long": counts > np.median(counts)}


def _messages(folder: Path, count: int, seed: int) -> tuple[list[str], list[int] | None, tuple[str, ...], dict, None]:
    drawn = messages(count, seed=seed)
    topics = np.array([LABELS[m.label] for m in drawn])
    return [m.text for m in drawn], [m.label for m in drawn], LABELS, {"topic": topics}, None


def _cola(folder: Path, count: int, seed: int):
    rows = _tab_separated(folder / "cola" / "in_domain_train.tsv", columns=4)
    rows = [rows[i] for i in choice(len(rows), count, seed)]
    labels = [int(row[1]) for row in rows]
    attributes = {"acceptable": np.array(labels) == 1}
    return [row[3] for row in rows], labels, ("unacceptable", "acceptable"), attributes, None


def _sst2(folder: Path, count: int, seed: int):
    rows = _tab_separated(folder / "sst2" / "train.tsv.gz", columns=2)[1:]
    rows = [row for row in rows if len(row[0].split()) >= 5]  # its phrases of one word have nothing to hide
    rows = [rows[i] for i in choice(len(rows), count, seed)]
    labels = [int(row[1]) for row in rows]
    return (
        [row[0].strip() for row in rows],
        labels,
        ("negative", "positive"),
        {"positive": np.array(labels) == 1},
        None,
    )


def _synthpai(folder: Path, count: int, seed: int):
    lines = _text_of(folder / "synthpai" / "comments_with_profiles.jsonl.gz").splitlines()
    rows = [json.loads(line) for line in lines]
    rows = [row for row in rows if len(row["text"].split()) >= 5]
    rows = [rows[i] for i in choice(len(rows), count, seed)]
    ages = np.array([row["age"] for row in rows])
    attributes = {
        "sex": np.array([row["sex"] for row in rows]),
        "older": ages > np.median(ages),
        "income": np.array([row["income_level"] in ("high", "very high") for row in rows]),
    }
    return [row["text"].strip() for row in rows], None, (), attributes, np.array([row["author"] for row in rows])


TEXT_SOURCES = {"messages": _messages, "cola": _cola, "sst2": _sst2, "synthpai": _synthpai}


def load_texts(
    source: str, *, folder: str | Path = "../shared/data", count: int = 1000, seed: int = 0
) -> AttributeData:
    """Read texts with private attributes.

    Args:
        source: "messages" (written by the embedded writer, no file; attribute "topic"), "cola" ("acceptable"), "sst2"
            ("positive"; phrases of five words or more), or "synthpai" ("sex", "older" than the median author's
            comment, "income" high or not, of synthetic authors, grouped by author; comments of five words or more).
            All have those of :func:`text_attributes`, and "coin".
        folder: Where the folders cola, sst2 and synthpai lie.
        count: Texts, chosen at random without looking at them.
        seed: Seed of the choice (of the writer, for messages) and of the coin.

    Returns:
        The texts. Attributes with fewer than 2 % of either value are left out: they cannot be fitted.
    """
    read = lookup("text source", source, TEXT_SOURCES)
    texts, labels, names, attributes, groups = read(Path(folder), count, seed)
    attributes = attributes | text_attributes(tuple(texts)) | {COIN: coin(len(texts), seed)}
    rare = [n for n, values in attributes.items() if np.unique(values, return_counts=True)[1].min() < 0.02 * len(texts)
            or len(np.unique(values)) < 2]  # fmt: skip
    return AttributeData(
        name=source, labels=None if labels is None else np.array(labels), class_names=tuple(names),
        attributes={n: values for n, values in attributes.items() if n not in rare}, texts=tuple(texts), groups=groups,
        notes=(f"left out as too rare: {', '.join(rare)}",) if rare else (),
    )  # fmt: skip


def coin(count: int, seed: int) -> NDArray:
    """Return as many True as False, (n,), in random order."""
    return np.random.default_rng([seed, 977]).permutation(np.arange(count) % 2 == 0)


def choice(size: int, count: int, seed: int) -> NDArray:
    """Return ``count`` of ``size`` numbers at random, in growing order; all of them if there are no more."""
    if count < 1:
        raise ConfigError(f"count must be at least 1, got {count}")
    return np.sort(np.random.default_rng(seed).permutation(size)[:count])


def _text_of(path: Path) -> str:
    try:
        return (
            gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")
        ).read()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}); name the folder of the data sets with folder=") from error


def _tab_separated(path: Path, columns: int) -> list[list[str]]:
    rows = list(csv.reader(_text_of(path).splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE))
    if bad := next((i for i, row in enumerate(rows, 1) if len(row) != columns), None):
        raise DataError(f"{path}, line {bad}: {len(rows[bad - 1])} columns where {columns} are expected")
    return rows
