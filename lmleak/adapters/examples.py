"""From texts or token ids to one padded tensor."""

import operator
from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor

from lmleak.errors import DataError

DUMMY_WORD = "1"  # any word will do; a digit is in every vocabulary, also in those of numbers


def example_list(examples: Iterable[str | Sequence[int]]) -> list[str | Sequence[int]]:
    """Return the examples as a list.

    Args:
        examples: Texts or token-id sequences.

    Returns:
        The list.

    Raises:
        DataError: If there is none, or one text was given instead of a list.
    """
    if isinstance(examples, str | bytes) or not isinstance(examples, Iterable):
        raise DataError(f"expected a list of texts, got one {type(examples).__name__}")
    listed = list(examples)
    if not listed:
        raise DataError("expected a non-empty list of texts, got none")
    return listed


def token_ids(index: int, example: str | Sequence[int], tokenizer) -> list[int]:
    """Return the tokens of one example, special tokens included.

    Args:
        index: The example's number, for messages.
        example: A text, or token ids.
        tokenizer: The tokenizer, or None.

    Returns:
        The ids.

    Raises:
        DataError: If the example is empty, or neither a text nor token ids.
    """
    if isinstance(example, str):
        if tokenizer is None:
            raise DataError("this adapter has no tokenizer; pass tokenizer=, or token ids instead of texts")
        if not example.strip():
            raise DataError(f"text {index} is empty; there is nothing to protect or to recover in it")
        return list(tokenizer(example, add_special_tokens=True)["input_ids"])
    try:
        return [operator.index(token) for token in example]
    except TypeError as error:
        raise DataError(f"example {index} is neither a text nor a list of token ids: {example!r:.60}") from error


def truncate(sequence: list[int], max_length: int | None, special_ids: Collection[int]) -> list[int]:
    """Return at most ``max_length`` tokens, the closing special token kept.

    Args:
        sequence: Token ids.
        max_length: The most tokens to keep; None keeps all.
        special_ids: Ids of special tokens.

    Returns:
        The tokens.

    Raises:
        DataError: If ``max_length`` is not positive.
    """
    if max_length is not None and max_length < 1:
        raise DataError(f"max_length must be at least 1, got {max_length}")
    if max_length is None or len(sequence) <= max_length:
        return sequence
    closing = sequence[-1:] if sequence[-1] in special_ids else []
    return sequence[: max_length - len(closing)] + closing


def pad(sequences: Sequence[Sequence[int]], pad_id: int, side: str) -> tuple[Tensor, Tensor]:
    """Return ids and attention mask, both (B, T).

    Args:
        sequences: Token ids per example.
        pad_id: The padding token.
        side: Where padding goes, "right" or "left".

    Returns:
        The ids and the mask, 1 on real tokens.

    Raises:
        DataError: If ``side`` is neither.
    """
    if side not in ("right", "left"):
        raise DataError(f"padding_side must be 'right' or 'left', got {side!r}")
    length = max(map(len, sequences))
    ids = torch.full((len(sequences), length), pad_id)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        where = slice(0, len(sequence)) if side == "right" else slice(length - len(sequence), length)
        ids[row, where], mask[row, where] = torch.tensor(sequence), 1
    return ids, mask


def token_template(adapter) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the special tokens that the tokenizer puts before and after any single text.

    Found by tokenising a dummy word with and without special tokens; nothing private is looked at.

    Args:
        adapter: The text adapter.

    Returns:
        Prefix and suffix; both empty without a tokenizer.
    """
    if adapter.tokenizer is None:
        return (), ()
    whole = list(adapter.tokenizer(DUMMY_WORD, add_special_tokens=True)["input_ids"])
    word = list(adapter.tokenizer(DUMMY_WORD, add_special_tokens=False)["input_ids"])
    for start in range(len(whole) - len(word) + 1):
        if whole[start : start + len(word)] == word:
            prefix, suffix = whole[:start], whole[start + len(word) :]
            return tuple(prefix), tuple(suffix)
    return (), ()


def draw_tokens(adapter, count: int, length: int, generator: torch.Generator) -> Tensor:
    """Return (count, length) token ids drawn uniformly from the tokens that are neither special nor padding."""
    usable = torch.ones(adapter.vocabulary_size, dtype=torch.bool)
    usable[sorted(adapter.special_ids() | {adapter.pad_id})] = False
    usable = usable.nonzero()[:, 0]
    return usable[torch.randint(len(usable), (count, length), generator=generator)]
