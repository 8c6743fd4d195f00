"""Sentences by a continuous search: every position holds a mixture of its candidates, sharpened by gradient descent.

With probabilities y over the pairs a = (position, token), the attention of block 0 has a natural relaxation: query a
sees itself at its own position, and at every other position the mixture,

    context_a = sum_b y_b e_ab v_b / sum_b y_b e_ab,    e_ab = exp(q_a k_b^T / sqrt(d_h)),    per head
    F(y)      = mean over positions of sum_a y_a log residual(context_a)  +  w mean entropy(y),    w from 0 to ENTROPY

At one-hot y this is the score of a sentence. Unlike a change of one token at a time, a step moves all positions
together, and a mixture of the words of one text scores better than one across texts, so the descent sees which words
belong together before any position is decided. Measured on four sentences of CoLA (13 to 15 tokens, 1 to 8 candidates
per position, trained BERT of width 384): 24 of 48 starts end exactly in a text; of 18 starts that exchange single
tokens, none does. With 19 candidates at every position, 1 start of 8 does after single exchanges. It needs the input
of the attention's output projection as the test and standard attention; elsewhere only single tokens are exchanged.
Own idea, not from the span attack's paper.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lmleak.attacks.span_assignment import Assignments, Sentences
from lmleak.attacks.span_context import Contexts

STEPS = 60
"""Gradient steps; of Adam."""
RATE = 0.4
"""Step size, in logits."""
ENTROPY = 0.3
"""Weight of the entropy at the last step, in log residuals per nat."""
LARGEST = 2**25
"""Numbers in the table of e_ab, beyond which there is no relaxation."""


class Relaxation:
    """The relaxed search over the sentences of one length.

    Args:
        contexts: Queries, keys and values of all candidates.
        assignments: The candidates.
        log_residual: (..., d) contexts to (...), the log of their distance from the span.
    """

    def __init__(self, contexts: Contexts, assignments: Assignments, log_residual):
        self.assignments, self.log_residual = assignments, log_residual
        self.tokens = torch.nn.utils.rnn.pad_sequence(assignments.candidates, batch_first=True, padding_value=-1)
        self.allowed = self.tokens >= 0  # (T, C)
        position = self.allowed.nonzero()[:, 0]  # (n,)
        q, k, v = contexts.heads_of(self.tokens[self.allowed], position)  # (heads, n, d_h)
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        attention = (scores - scores.amax(-1, keepdim=True)).exp()
        values = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)  # the ones sum the denominator
        self.of_itself = attention.diagonal(dim1=1, dim2=2)[..., None] * values
        self.of_others = attention * (position[:, None] != position)
        self.values = values

    @staticmethod
    def fits(contexts: Contexts, candidates: Sequence[Tensor]) -> bool:
        """Return whether the table of e_ab is small enough."""
        return contexts.heads * sum(map(len, candidates)) ** 2 <= LARGEST

    @property
    def cost(self) -> int:
        """One start in scored sentences: a step was measured to take the time of n / T of them."""
        return STEPS * int(self.allowed.sum()) // len(self.allowed)

    def contexts(self, probabilities: Tensor) -> Tensor:
        """Return the context of every pair as a query.

        Args:
            probabilities: (s, n) y.

        Returns:
            (s, n, d).
        """
        s, n = probabilities.shape
        weighted = probabilities.T[None, :, :, None] * self.values[:, :, None]  # (heads, n, s, d_h + 1)
        total = (self.of_others @ weighted.flatten(2)).unflatten(2, (s, -1)) + self.of_itself[:, :, None]
        return (total[..., :-1] / total[..., -1:]).permute(2, 1, 0, 3).reshape(s, n, -1)

    def sharpen(self, starts: Sentences, explained: set[tuple[int, int]]) -> Sentences:
        """Return the sentences that random mixtures sharpen to.

        Args:
            starts: Whose pinned tokens are kept.
            explained: (position, token) pairs of all sentences that were found; every other mixture begins at the
                weights of :meth:`Assignments.weights` instead of equal ones.

        Returns:
            As many sentences, scored.
        """
        rows = torch.arange(len(starts.ids), device=starts.ids.device)
        pinned = starts.ids[rows, starts.pinned]
        open_to = self.allowed.repeat(len(rows), 1, 1)  # (s, T, C)
        open_to[rows, starts.pinned] = self.tokens[starts.pinned] == pinned[:, None]
        noise = torch.randn(open_to.shape, generator=self.assignments.generator, dtype=self.values.dtype)
        noise[::2, self.allowed.cpu()] += torch.cat(self.assignments.weights(explained)).log().to(noise)
        logits = noise.to(open_to.device).requires_grad_(True)
        adam = torch.optim.Adam([logits], lr=RATE)
        for step in range(STEPS):
            with torch.enable_grad():
                y = logits.masked_fill(~open_to, -torch.inf).softmax(-1)[:, self.allowed]
                entropy = -y * y.clamp(min=torch.finfo(y.dtype).tiny).log()
                objective = y * self.log_residual(self.contexts(y)) + ENTROPY * step / STEPS * entropy
                (gradient,) = torch.autograd.grad(objective.sum() / len(self.allowed), logits)
            logits.grad = gradient
            adam.step()
        self.assignments.budget.spent += self.cost * len(rows)
        best = logits.detach().masked_fill(~open_to, -torch.inf).argmax(-1)  # (s, T)
        ids = self.tokens.expand(len(rows), -1, -1).gather(2, best[..., None])[..., 0]
        return Sentences(ids, starts.pinned, self.assignments.score(ids))
