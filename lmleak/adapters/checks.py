"""Checks that a language model is a function of its input embeddings, before a derivative is taken."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lmleak.errors import UnsupportedCombinationError, UnsupportedModelError
from lmleak.types import Batch

if TYPE_CHECKING:
    from lmleak.adapters.text import TextAdapter

TOLERANCE = 1e-4  # relative, of logits: float32 sums in another order differ by far less


def refuse_undefined_input(model: nn.Module) -> None:
    """Refuse a model whose embedding table is not the one place where the private text enters.

    Args:
        model: The candidate.

    Raises:
        UnsupportedModelError: With the reason.
    """
    name = type(model).__name__
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if embedding is None:
        raise UnsupportedModelError(f"{name} has no token-embedding table, so x has no definition")
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name} reads the text in its encoder and in its decoder; x is not one tensor")
    trained = [n for n, p in embedding.named_parameters() if p.requires_grad and p is not embedding.weight]
    if trained:
        raise UnsupportedModelError(
            f"the token embeddings of {name} train {trained[0]!r} beside their table (LoRA?), and its gradient "
            "would be missing; leave the embeddings out of target_modules"
        )


def refuse_other_losses(model: nn.Module) -> None:
    """Refuse a classifier that is not trained with the cross-entropy over exclusive classes.

    Args:
        model: A sequence classifier.

    Raises:
        UnsupportedModelError: If its configuration names another loss, or has one class only.
    """
    problem, classes = getattr(model.config, "problem_type", None), model.config.num_labels
    if problem not in (None, "single_label_classification") or classes < 2:
        raise UnsupportedModelError(
            f"{type(model).__name__} has problem_type={problem!r} and {classes} class(es), so it is trained with "
            "another loss than the cross-entropy over exclusive classes, and every number would be wrong"
        )


def check_parity(adapter: "TextAdapter", batch: Batch) -> None:
    """Refuse a model in which the token ids act other than through the embedding table.

    Args:
        adapter: The model.
        batch: Any batch.

    Raises:
        UnsupportedModelError: If logits from embeddings differ from logits from ids, or do not fit the tokens.
    """
    with torch.no_grad():
        from_ids = adapter.logits_from_ids(batch)
        if from_ids.dim() == 3 and from_ids.shape[1] != batch.layout["attention_mask"].shape[1]:
            raise UnsupportedModelError(
                f"{type(adapter.model).__name__} returns {from_ids.shape[1]} positions for "
                f"{batch.layout['attention_mask'].shape[1]} tokens (prompt tuning?), so targets have no place"
            )
        from_x = adapter.logits(adapter.input(batch), batch.layout)
    error = _relative_difference(from_ids, from_x, batch.layout["attention_mask"].bool())
    if math.isnan(error):
        raise UnsupportedModelError(f"{type(adapter.model).__name__} computes logits that are NaN or Inf")
    if not error < TOLERANCE:
        raise UnsupportedModelError(
            f"{type(adapter.model).__name__} computes different logits from embeddings than from token ids (relative "
            f"difference {error:.1e}): it uses the ids elsewhere too, so x does not determine the loss (or it takes a "
            "padding token inside a text for padding)"
        )


def check_padding(adapter: "TextAdapter", batch: Batch, side: str) -> None:
    """Refuse a model whose logits of a text change with the padding beside it.

    Args:
        adapter: The model.
        batch: A batch with padding.
        side: Where the padding is.

    Raises:
        UnsupportedCombinationError: If the shortest text has other logits in the batch than alone.
    """
    mask = batch.layout["attention_mask"].bool()
    row = int(mask.sum(-1).argmin())  # the shortest text has the most padding
    alone, real = slice(row, row + 1), mask[row]
    with torch.no_grad():
        x = adapter.input(batch)
        padded = adapter.logits(x, batch.layout)[alone]
        unpadded = adapter.logits(x[alone, real], {name: value[alone, real] for name, value in batch.layout.items()})
    padded = padded[:, real] if padded.dim() == 3 else padded
    error = _relative_difference(unpadded, padded, real[None, real])
    if not error < TOLERANCE:
        raise UnsupportedCombinationError(
            f"{type(adapter.model).__name__} computes other logits for a text that is padded on the {side} (relative "
            f"difference {error:.1e}): it reads a padding position, or counts it. Pass padding_side="
            f"{'right' if side == 'left' else 'left'!r}, or one text at a time"
        )


def _relative_difference(expected: Tensor, got: Tensor, real: Tensor) -> float:
    """Return the largest difference of logits (B, C) or, at real positions, (B, T, V), over the largest of them."""
    if expected.dim() == 3:
        expected, got = expected[real], got[real]
    return ((expected - got).abs().max() / expected.abs().max().clamp(min=1e-30)).item()
