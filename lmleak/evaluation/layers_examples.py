"""Private examples with attributes: what a layer-wise audit reads of example i, for texts and for images alike."""

import hashlib
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmleak.adapters import TextAdapter, VisionAdapter
from lmleak.adapters.examples import token_ids, truncate
from lmleak.errors import DataError
from lmleak.leakage.cross_fitting import LatentTarget
from lmleak.types import Batch

HASHED_AT_ONCE = 64
BAG_TOKENS = 256  # words of the bag that a decoder is asked for: those in most examples


@dataclass(frozen=True)
class LabelledExamples:
    """A private data set in the order of its source; batches are made when they are asked for."""

    name: str
    """Where they come from, for reports."""
    size: int
    """n."""
    batch: Callable[[Sequence[int]], Batch]
    """Numbers of examples -> their batch, as the model reads it."""
    originals: Mapping[str, Callable[[Batch], Tensor]]
    """What of the input is to be reconstructed: name -> function of a batch, (B, d), or (B, C, H, W) for images."""
    attributes: Mapping[str, NDArray] = field(default_factory=dict)
    """What is to be inferred: name -> (n,) integers, booleans or strings."""
    groups: Sequence[Hashable] | None = None
    """(n,) the author or source of each example, if examples of one source resemble each other."""

    @cached_property
    def digest(self) -> str:
        """What decides the gradients, as a short digest: inputs, targets and layouts of all examples, in order."""
        digest = hashlib.sha256()
        for start in range(0, self.size, HASHED_AT_ONCE):
            batch = self.batch(range(start, min(start + HASHED_AT_ONCE, self.size)))
            for tensor in (*batch.inputs.values(), batch.targets, *batch.layout.values()):
                digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def __post_init__(self):
        if self.size < 1:
            raise DataError(f"{self.name} holds no example")
        for what, values in {**self.attributes, **({} if self.groups is None else {"groups": self.groups})}.items():
            if len(values) != self.size:
                raise DataError(f"{self.name}: {what!r} has {len(values)} value(s) for {self.size} examples")


def text_examples(
    adapter: TextAdapter,
    texts: Sequence[str],
    attributes: Mapping[str, Sequence],
    *,
    labels: Sequence[int] | None = None,
    groups: Sequence[Hashable] | None = None,
    max_length: int | None = None,
    name: str = "texts",
) -> LabelledExamples:
    """Return texts with private attributes.

    Their originals are "bag-of-tokens", (B, m): 1 where one of the m <= 256 tokens that most of the texts hold (but
    not all of them) occurs in the text, 0 elsewhere; and "mean-embedding", (B, D): the mean of x over the text's free
    positions, in units of x. Both forget the order of words; the attacks do not.

    Args:
        adapter: The model.
        texts: The texts.
        attributes: Name -> one value per text.
        labels: Classes, for a classifier.
        groups: Author of each text.
        max_length: Truncate to this many tokens.
        name: Where they come from.

    Returns:
        The examples.
    """
    texts = list(texts)

    def batch(rows: Sequence[int]) -> Batch:
        chosen = None if labels is None else [int(labels[i]) for i in rows]
        return adapter.batch([texts[i] for i in rows], labels=chosen, max_length=max_length)

    tokens = _bag(adapter, texts, max_length)
    place = {token: column for column, token in enumerate(tokens)}

    def bag_of_tokens(batch: Batch) -> Tensor:
        bag = torch.zeros(batch.size, len(tokens))
        for row, ids in enumerate(batch.token_ids):
            bag[row, [place[token] for token in set(ids) if token in place]] = 1
        return bag

    def mean_embedding(batch: Batch) -> Tensor:
        x, free = adapter.input(batch), adapter.free(batch)
        return ((x * free).sum(1) / free.sum(1).clamp(min=1)).float()

    originals = {"bag-of-tokens": bag_of_tokens, "mean-embedding": mean_embedding}
    if not tokens:  # no token is in two texts and not in all: there is no bag to tell apart
        del originals["bag-of-tokens"]
    return LabelledExamples(name, len(texts), batch, originals, _columns(attributes), groups)


def _bag(adapter: TextAdapter, texts: Sequence[str], max_length: int | None) -> list[int]:
    """Return the ids of the tokens that the most texts hold, but not all, and at least two do."""
    counts, special = Counter(), adapter.special_ids()
    for number, text in enumerate(texts):
        counts.update(set(truncate(token_ids(number, text, adapter.tokenizer), max_length, special)) - special)
    usual = [token for token, count in counts.most_common() if 2 <= count < len(texts)]
    return sorted(usual[:BAG_TOKENS])


def image_examples(
    adapter: VisionAdapter,
    pixels: Tensor,
    labels: Sequence[int] | Tensor,
    attributes: Mapping[str, Sequence],
    *,
    groups: Sequence[Hashable] | None = None,
    name: str = "images",
) -> LabelledExamples:
    """Return images with private attributes; their original is "pixels", (B, C, H, W), as the model reads them.

    Args:
        adapter: The model.
        pixels: (n, C, H, W) in [0, 1].
        labels: (n,) classes.
        attributes: Name -> one value per image.
        groups: Source of each image.
        name: Where they come from.

    Returns:
        The examples.
    """
    labels = torch.as_tensor(labels)

    def batch(rows: Sequence[int]) -> Batch:
        rows = list(rows)
        return adapter.batch(adapter.normalization.normalize(pixels[rows].to(adapter.dtype)), labels[rows])

    originals = {"pixels": lambda batch: adapter.input(batch).float()}
    return LabelledExamples(name, len(pixels), batch, originals, _columns(attributes), groups)


def _columns(attributes: Mapping[str, Sequence]) -> dict[str, NDArray]:
    columns = {}
    for name, values in attributes.items():
        column = values.cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
        if column.dtype.kind not in "biuUS":
            raise DataError(
                f"attribute {name!r} holds {column.dtype} values; expected whole numbers, truth values or words"
            )
        try:
            LatentTarget(column)  # refuses values too rare to be fitted and tested
        except DataError as error:
            raise DataError(f"attribute {name!r}: {error}") from error
        columns[name] = column
    return columns
