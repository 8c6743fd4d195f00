r"""Which token follows a prefix, by the noisy gradient of a language model's head.

With h_t the head's input after prefix t, p its prediction and N targets in the batch, row v of the head's gradient is

    g_v = sum_t c_tv h_t + noise,      c_tv = (m_t p_tv - n_tv) / N,

m_t texts going on after t, n_tv of them with v. A row is long where v is a target (:meth:`HeadScore.tokens`), and
-<g_v, h_t> is large where v follows t (:meth:`HeadScore.following`): with the true prefix, the next token is among the
5 best of the vocabulary in 75 to 88 % of cases at noise of one RMS of the gradient, and of three (embedded GPT-2, two
batches). What the model predicts anyway, p near 1, does not show. Once whole texts are known, c follows by least
squares, which separates their prefixes (:meth:`HeadScore.last`).
"""

import math

import torch
from torch import Tensor

from lmleak.attacks.span_layers import forward, head_gradient, random_ids
from lmleak.attacks.span_score import TAIL
from lmleak.attacks.span_tree import Prefix
from lmleak.types import Observation

MOST = 30.0
"""Nats that one source of evidence is worth, at most twice as many: none may silence the others in the sum."""
SPREAD = math.log(10.0)
"""What a surprise u is short of a log likelihood ratio: by chance it has density exp(-u), for real tokens 1 / 10."""
ERASED = 0.5
"""Share of rows that are exactly zero (coarse rounding, pruning) from which the rest has no distribution by chance."""
PREFIXES = 64
"""Texts per forward pass."""


def tail_surprise(values: Tensor) -> Tensor:
    """Return -log P(chance gives at least this value) along the first axis, in nats; the tail taken as exponential.

    Args:
        values: (n, ...), nearly all by chance.

    Returns:
        Shaped like ``values``.
    """
    lower, upper = torch.quantile(values, values.new_tensor(TAIL), dim=0)
    decay = math.log((1 - TAIL[0]) / (1 - TAIL[1])) / (upper - lower).clamp(min=torch.finfo(values.dtype).tiny)
    return within(decay * (values - upper) - math.log(1 - TAIL[1]))


def within(surprise: Tensor) -> Tensor:
    """Return nats as they are up to ``MOST``, and what is beyond scaled to at most as much again; order is kept."""
    beyond = (surprise - MOST).clamp(min=0)
    return surprise.clamp(max=MOST) + beyond * (MOST / beyond.amax(0).clamp(min=MOST))


class HeadScore:
    """Surprise of tokens as targets, in general and after given prefixes.

    Args:
        adapter: The language model.
        gradient: (V, d) of the head.
        path: The head.
        seed: Chooses the random texts whose mean hidden state is taken out.
    """

    def __init__(self, adapter, gradient: Tensor, path: str, *, seed: int):
        self.adapter, self.path = adapter, path
        self.gradient = gradient.to(adapter.device).double()
        limit = adapter.max_positions()
        texts = random_ids(adapter, 32, min(16, limit or 16), seed=seed)
        self.common = forward(adapter, texts, stop_at=path)[:, 1:].double().flatten(0, 1).mean(0)

    @classmethod
    def read(cls, adapter, observation: Observation, *, seed: int) -> "HeadScore | None":
        """Return the scores; None for other tasks, and where the head's gradient is withheld or rounded to nothing."""
        if adapter.task != "causal-lm":
            return None
        path, gradient = head_gradient(adapter, observation.gradient)
        if gradient is None or (gradient == 0).all(1).double().mean() > ERASED:
            return None
        return cls(adapter, gradient, path, seed=seed)

    def tokens(self) -> Tensor:
        """Return how unlikely the length of a token's row is by chance, (V,) nats: high for targets."""
        return tail_surprise(self.gradient.square().sum(1).clamp(min=torch.finfo(torch.float64).tiny).log())

    def following(self, ids: Tensor) -> Tensor:
        """Return how unlikely it is by chance that tokens fit so well behind prefixes.

        The direction common to all hidden states is left out: it tells that a token is a target, not where.

        Args:
            ids: (n, t) prefixes.

        Returns:
            (n, V) nats.
        """
        hidden = torch.cat([forward(self.adapter, part, stop_at=self.path)[:, -1] for part in ids.split(PREFIXES)])
        hidden = hidden.double()
        hidden = hidden - (hidden @ self.common)[:, None] / self.common.square().sum() * self.common
        return tail_surprise(-self.gradient @ hidden.T).T

    def last(self, texts: list[Prefix]) -> list[tuple[int, float]]:
        """Return the token that most likely follows each text, and its log odds against the rest of the vocabulary.

        Args:
            texts: All texts of the batch as far as they are known.

        Returns:
            One pair per text; none if there are too many prefixes for the head's width.
        """
        prefixes = sorted({text[: t + 1] for text in texts for t in range(len(text))})
        if len(prefixes) > self.gradient.shape[1] // 2:
            return []
        known: dict[Prefix, Tensor] = {}
        for text in texts:
            states = forward(self.adapter, torch.tensor([text]), stop_at=self.path)[0].double()
            known |= {text[: t + 1]: state for t, state in enumerate(states)}
        hidden = torch.stack([known[prefix] for prefix in prefixes])  # (K, d)
        surprise = tail_surprise(-self.gradient @ torch.linalg.pinv(hidden))  # (V, K)
        best, token = surprise[:, [prefixes.index(text) for text in texts]].max(dim=0)
        return list(zip(token.tolist(), (best - math.log(len(surprise))).tolist(), strict=True))
