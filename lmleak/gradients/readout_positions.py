"""The length of the longest text, read off the gradient of a learned position table.

(dL/dP)_p = sum over texts of dL/dx_p: row p is non-zero while some text has a position p that reaches the loss. In a
causal language model the last position predicts nothing, so the longest text has one token more than rows show.
"""

from dataclasses import dataclass

import torch
from torch import nn

from lmleak.gradients.readout_bag import significant_rows
from lmleak.gradients.readout_rank import Released


@dataclass(frozen=True)
class LongestText:
    """What the position table tells about lengths."""

    tokens: int | None
    """Tokens of the longest text, special ones included; None if the gradient does not tell."""
    exact: bool
    """True where untouched rows are exactly zero; under noise ``tokens`` may be too small."""
    reason: str
    """How it was read, or why it cannot be."""


def sequence_lengths(adapter, observation: Released) -> LongestText:
    """Return the length of the longest text. Lengths of the others do not show in the position table.

    Void without a learned position table (rotary, ALiBi, sinusoidal), and if its gradient is withheld. With right
    padding, and left padding where positions skip it, all texts start at the table's first row; where a model counts
    padding as positions, the longest text has none, and the answer is the same.

    Args:
        adapter: The model.
        observation: The released gradient.

    Returns:
        The length, or why it is not told.
    """
    name = position_table(adapter)
    if name is None:
        return LongestText(None, False, f"{adapter.name} has no learned position table (rotary, ALiBi, or fixed)")
    if name not in observation.gradient:
        return LongestText(None, False, f"the gradient of {name!r} is not released")
    index, _, exact, how = significant_rows(observation.gradient[name])
    rows = index - _first_row(adapter, name)
    if not (rows >= 0).any():
        return LongestText(None, False, f"{name!r}: {how}")
    return LongestText(int(rows.max()) + 1 + (adapter.task == "causal-lm"), exact, f"{name!r}: {how}")


def position_table(adapter) -> str | None:
    """Return the name of the learned position table: the embedding besides the word table that fits all positions."""
    limit = adapter.max_positions()
    for path, module in adapter.model.named_modules():
        if isinstance(module, nn.Embedding) and module is not adapter.embedding and limit is not None:
            vocabularies = (adapter.vocabulary_size, getattr(adapter.config, "type_vocab_size", 0))
            if module.num_embeddings >= limit and module.num_embeddings not in vocabularies:
                return f"{path}.weight"
    return None


def _first_row(adapter, name: str) -> int:
    """Return the row that position 0 reads, seen by differentiating the logits of a text of one token."""
    # No parameter of the model is touched: the table is replaced by a leaf that shares its storage.
    leaf = dict(adapter.model.named_parameters())[name].detach().requires_grad_()
    layout = {"attention_mask": torch.ones(1, 1, dtype=torch.long, device=adapter.device)}
    if getattr(adapter.config, "type_vocab_size", 0):
        layout["token_type_ids"] = torch.zeros_like(layout["attention_mask"])
    special = adapter.special_ids() | {adapter.pad_id}
    word = next(i for i in range(adapter.vocabulary_size) if i not in special)
    logits = adapter.logits(adapter.embed(torch.tensor([[word]])), layout, {name: leaf})
    (gradient,) = torch.autograd.grad(logits.square().sum(), leaf)
    return int(gradient.double().norm(dim=1).argmax())
