"""What the first attention of an encoder mixes, for many sentences over few tokens.

Queries, keys and values of block 0 depend on a token and its position only. With those of all candidates looked up, a
sentence costs its attention, T^2 d, instead of the projections, T d^2. The arithmetic is the standard one,

    context_h = softmax(q_h k_h^T / sqrt(d_h)) v_h,    heads h side by side,

and is used only if it gives what the model gives.
"""

import torch
from torch import Tensor

from lmleak.attacks.span_layers import forward


class Contexts:
    """The inputs of the attention's output projection in block 0.

    Args:
        adapter: An encoder.
        path: The map whose input is wanted.
        tokens: (m,) all tokens that will occur, sorted.
        length: Largest number of positions.
    """

    def __init__(self, adapter, path: str, tokens: Tensor, length: int):
        self.adapter, self.path, self.tokens = adapter, path, tokens
        self.heads = getattr(adapter.config, "num_attention_heads", 1)
        outputs: list[Tensor] = []
        handles = [
            adapter.model.get_submodule(p).register_forward_hook(lambda _, __, output: outputs.append(output))
            for p in adapter.attention_inputs(0)
        ]
        try:
            forward(adapter, tokens[:, None].expand(-1, length), stop_at=path)
        finally:
            for handle in handles:
                handle.remove()
        self.projected = outputs
        """Queries, keys and values, (m, length, d) each."""

    def heads_of(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """Return queries, keys and values of (token, position) pairs (n,), (heads, n, d_h) each."""
        rows = torch.searchsorted(self.tokens, tokens)
        return tuple(x[rows, positions].unflatten(-1, (self.heads, -1)).transpose(0, 1) for x in self.projected)

    def __call__(self, ids: Tensor) -> Tensor:
        """Return the contexts of sentences (n, T), (n, T, d)."""
        rows, places = torch.searchsorted(self.tokens, ids), torch.arange(ids.shape[1], device=ids.device)
        q, k, v = (x[rows, places].unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in self.projected)
        attention = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        return (attention @ v).transpose(1, 2).flatten(2)

    def agrees(self, generator: torch.Generator) -> bool:
        """Return whether the contexts of random sentences are those that the model computes."""
        shapes = {x.shape for x in self.projected}
        if len(self.projected) != 3 or len(shapes) > 1 or self.projected[0].shape[-1] % self.heads:
            return False  # a fused map, or grouped keys
        drawn = torch.randint(len(self.tokens), (4, self.projected[0].shape[1]), generator=generator)
        ids = self.tokens[drawn.to(self.tokens.device)]
        truth = forward(self.adapter, ids, stop_at=self.path)
        x = self(ids)
        return x.shape == truth.shape and bool((x - truth).norm() < 1e2 * torch.finfo(x.dtype).eps * truth.norm())
