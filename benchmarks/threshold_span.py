"""The published span attack for GPT-2, written plainly, to compare with.

Petrov et al. 2024 (arXiv:2405.15586): the rank is the largest of ten numerical ranks; two random-projection bases; for
every position the whole vocabulary is projected; every step runs all prefixes from their first token; an input counts
as one of the batch if its distance from the span is below a fixed threshold.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lmleak.adapters.text import TextAdapter
from lmleak.attacks.span_layers import forward
from lmleak.gradients.shared import SharedGradient

FIRST_LAYER, PREFIX = 1e-5, 1e-3  # thresholds, as published
RANK_LAYERS, MARGIN = 10, 20
ROWS = 64  # prefixes per pass


def threshold_span(
    adapter: TextAdapter, shared: SharedGradient, *, first_layer: float = FIRST_LAYER, prefix: float = PREFIX,
    query_only: bool = False, longest: int = 64,
) -> list[tuple[int, ...]]:  # fmt: skip
    """Return at most B recovered token sequences.

    Args:
        adapter: A GPT-2 language model.
        shared: The released gradient.
        first_layer: Largest distance of a token's input of block 0 from its span.
        prefix: Largest distance of a prefix's inputs of block 1 from their span.
        query_only: Whether to read the query's third of the fused gradient only, as for models with separate maps.
        longest: Positions at which to stop.

    Returns:
        The sequences, surest first.
    """
    blocks = len(adapter.blocks)
    gradients = [_attention_gradient(shared, i, adapter.width, query_only) for i in range(min(blocks, RANK_LAYERS))]
    rank = min(max(int(np.linalg.matrix_rank(g.numpy())) for g in gradients), adapter.width - MARGIN)
    first, second = (torch.svd_lowrank(g, q=rank, niter=10)[2] for g in gradients[:2])
    prefixes: list[tuple[int, ...]] = [()]
    finished: list[tuple[float, tuple[int, ...]]] = []
    for position in range(longest):
        tokens = _tokens_at(adapter, position, first, first_layer)
        children = [(*p, v) for p in prefixes for v in tokens]
        alive = _within(adapter, children, second, prefix) if children else {}
        continued = {child[:-1] for child in alive}
        finished += [(0.0, p) for p in prefixes if p and p not in continued]
        if not alive:
            break
        prefixes = list(alive)
    return [p for _, p in sorted(finished, key=lambda pair: pair[0])][: shared.batch_size]


def _attention_gradient(shared: SharedGradient, block: int, width: int, query_only: bool) -> Tensor:
    rows = shared.gradient[f"transformer.h.{block}.attn.c_attn.weight"].T.contiguous()
    return rows[:width] if query_only else rows


def _tokens_at(adapter: TextAdapter, position: int, basis: Tensor, threshold: float) -> list[int]:
    """Return the tokens whose input of block 0 at a position lies in the span: one projection per token."""
    model = adapter.model.transformer
    with torch.no_grad():
        x = model.h[0].ln_1(model.wte.weight + model.wpe.weight[position])
        x = F.normalize(x, dim=-1)
        projector = basis @ basis.T  # (d, d), as published
        distance = (x - x @ projector).norm(dim=-1)
    return (distance < threshold).nonzero()[:, 0].tolist()


def _within(adapter: TextAdapter, sequences: list[tuple[int, ...]], basis: Tensor, threshold: float) -> dict:
    """Return the sequences whose every input of block 1 lies in the span, in order."""
    kept = {}
    for start in range(0, len(sequences), ROWS):
        chunk = sequences[start : start + ROWS]
        x = F.normalize(forward(adapter, torch.tensor(chunk), stop_at="transformer.h.1.attn.c_attn"), dim=-1)
        distance = (x - (x @ basis) @ basis.T).norm(dim=-1).amax(dim=1)
        kept |= {sequence: None for sequence, d in zip(chunk, distance.tolist(), strict=True) if d < threshold}
    return kept
