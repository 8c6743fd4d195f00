"""The tasks, and what a language model is asked to predict: targets per task, and the loss on them.

Letters: B examples, T tokens, V vocabulary, C classes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lmleak.errors import DataError
from lmleak.specification import is_whole_number
from lmleak.types import IGNORE

TEXT_TASKS = ("sequence-classification", "token-classification", "causal-lm", "masked-lm")
IMAGE_TASK = "image-classification"
MASKING_PROBABILITY = 0.15  # Devlin et al. 2019, arXiv:1810.04805, section 3.1


def causal_targets(ids: Tensor, mask: Tensor) -> Tensor:
    """Return (B, T) next-token targets aligned with the inputs, ``IGNORE`` on padding.

    A first token behind left padding would be predicted from padding; like any first token it has no loss.

    Args:
        ids: (B, T) token ids.
        mask: (B, T) attention mask.

    Returns:
        The targets.
    """
    after_padding = F.pad(mask, (1, 0), value=1)[:, :-1] == 0
    return ids.masked_fill((mask == 0) | after_padding, IGNORE)


def masked_targets(ids: Tensor, mask: Tensor, special_ids: set[int], mask_id: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return the ids with some positions masked, and the (B, T) targets there.

    At least one position per text is masked, so that every text has a loss. Every chosen position becomes the mask
    token (no random or kept tokens): the plain form of the objective.

    Args:
        ids: (B, T) token ids.
        mask: (B, T) attention mask.
        special_ids: Tokens that are never masked.
        mask_id: The mask token.
        seed: Chooses the positions.

    Returns:
        The masked ids and the targets, ``IGNORE`` elsewhere.
    """
    special = torch.isin(ids, torch.tensor(sorted(special_ids), dtype=ids.dtype))
    scores = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed))
    scores = scores.masked_fill(special | (mask == 0), 2.0)
    chosen = (scores < MASKING_PROBABILITY) | (scores == scores.min(-1, keepdim=True).values)
    return ids.masked_fill(chosen, mask_id), ids.masked_fill(~chosen, IGNORE)


def token_labels(labels: Sequence[Sequence[int]] | None, mask: Tensor, num_classes: int) -> Tensor:
    """Return (B, T) classes of tokens, ``IGNORE`` on padding and where the labels say so (special tokens).

    Args:
        labels: One class per token of each text, its special tokens included, or ``IGNORE``.
        mask: (B, T) attention mask.
        num_classes: Classes lie in [0, num_classes).

    Returns:
        The targets.

    Raises:
        DataError: If they are missing, of other lengths, not integers, out of range, or nothing but ``IGNORE``.
    """
    expected = f"one integer in [0, {num_classes}) per token, {IGNORE} where a token has no label"
    if labels is None:
        raise DataError(f"task 'token-classification' needs labels=: for every text {expected}")
    if len(labels) != len(mask):
        raise DataError(f"got labels of {len(labels)} texts for {len(mask)} texts")
    targets = torch.full(mask.shape, IGNORE)
    for row, (own, real) in enumerate(zip(labels, mask.bool(), strict=True)):
        values = own.tolist() if isinstance(own, Tensor) else own
        if not isinstance(values, Sequence) or isinstance(values, str):
            raise DataError(f"labels of text {row} must be a list: {expected}, got {values!r}")
        if len(values) != int(real.sum()):
            raise DataError(f"got {len(values)} labels for the {int(real.sum())} tokens of text {row}; {expected}")
        for value in values:
            if not is_whole_number(value) or not (value == IGNORE or 0 <= value < num_classes):
                raise DataError(f"label {value!r} in text {row}: expected {expected}")
        targets[row, real] = torch.tensor([int(value) for value in values])
    if bool((targets == IGNORE).all()):
        raise DataError(f"no token of these texts has a label; expected {expected}")
    return targets


def cross_entropy(task: str, logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats over examples (classification) or target positions.

    Args:
        task: One of ``TEXT_TASKS``.
        logits: (B, C), (B, T, C) or (B, T, V).
        targets: (B,) classes, or (B, T) classes or tokens with ``IGNORE``; or probabilities shaped like the logits,
            where a position of all zeros carries no loss. Causal targets are aligned with the inputs and shifted here.

    Returns:
        A scalar.
    """
    if task == "causal-lm":
        logits, targets = logits[:, :-1], targets[:, 1:]
    logits = logits.reshape(-1, logits.shape[-1])
    if not targets.is_floating_point():
        return F.cross_entropy(logits, targets.reshape(-1), ignore_index=IGNORE)
    targets = targets.reshape(-1, logits.shape[-1])
    weight = targets.sum()  # number of positions with a target, if each sums to one
    return -(targets * logits.log_softmax(-1)).sum() / weight
