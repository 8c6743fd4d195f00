"""Private text as continuous unknowns: what is public about it, what is free, and how numbers become tokens again.

Public, by the threat model: lengths and padding (the layout), and the special tokens that the tokenizer puts around
every text. Free: one embedding per remaining token, in units of the prior, and for language models the targets.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from lmleak.adapters.examples import token_template
from lmleak.adapters.text import TextAdapter
from lmleak.types import Observation

SHARPNESS = 16.0
"""Cosine 1 against 0 counts exp(16) to 1: enough to single out one token of 10^5, soft enough to move."""


@dataclass
class Unknowns:
    """The free numbers of one guess, all leaves. N is the number of free positions in the batch."""

    u: Tensor
    """(N, D) embeddings of the free positions, standardised by the prior: x = mean + std u."""
    logits: Tensor | None = None
    """(N, V) free part of the soft targets; language models only."""
    gate: Tensor | None = None
    """(N,) log-odds that a position is masked; masked language models only."""
    labels: Tensor | None = None
    """(B, C) logits of the class labels; classification with unknown labels only."""
    masks: tuple[Tensor, ...] = ()
    """One mask per dropout of the forward pass, in order; only where dropout was on."""

    def tensors(self) -> list[Tensor]:
        """Return the leaves that exist, u first."""
        return [t for t in (self.u, self.logits, self.gate, self.labels, *self.masks) if t is not None]

    def with_tensors(self, tensors: Iterable[Tensor]) -> "Unknowns":
        """Return the same kind of guess made of other tensors, in the order of :meth:`tensors`."""
        rest = iter(tensors)
        named = [None if t is None else next(rest) for t in (self.u, self.logits, self.gate, self.labels)]
        return Unknowns(*named, masks=tuple(rest))

    def detached(self) -> "Unknowns":
        """Return a copy without graph."""
        return self.with_tensors(t.detach().clone() for t in self.tensors())

    def permuted(self, order: Tensor) -> "Unknowns":
        """Return the guess with the free positions in another order, (N,); u and targets move together."""
        moved = (None if t is None else t[order] for t in (self.u, self.logits, self.gate))
        return Unknowns(*moved, labels=self.labels, masks=self.masks)


@dataclass
class RelaxedText:
    """The map from unknowns to (x, targets), and back to tokens.

    Positions are enumerated row by row over real tokens, so that a guess does not depend on where the padding is.
    """

    adapter: TextAdapter
    observation: Observation
    table: Tensor = field(init=False)
    """(V, D) token embeddings E."""
    labels: Tensor | None = field(init=False)
    """(B,) class labels as observed or inferred; None if they are unknowns too, or the task has none."""
    label_start: Tensor | None = field(init=False, default=None)
    """(B, C) logits where unknown labels start; None where labels are no unknowns."""
    mask_shapes: tuple[torch.Size, ...] = field(init=False, default=())
    """Shapes of the dropout masks that are unknowns."""

    def __post_init__(self):
        adapter, device = self.adapter, self.adapter.device
        self.layout = {name: tensor.to(device) for name, tensor in self.observation.layout.items()}
        self.real = self.layout["attention_mask"].bool()
        self.table, self.prior = adapter.table(), adapter.prior()
        self.mean_norm = self.table.norm(dim=-1).mean()
        # Cosines are taken around the mean embedding: a trained table's mean is long, and shared by all tokens.
        self.directions = F.normalize(self.table - self.prior.mean, dim=-1)
        self.excluded = torch.tensor(sorted(adapter.special_ids()), dtype=torch.long, device=device)
        self.known = self._known_tokens()
        self.free = self.real & (self.known < 0)
        self.labels = None if self.observation.labels is None else self.observation.labels.to(device)
        self.base = self.table[self.known.clamp(min=0)]
        self._prepare_targets()

    def _known_tokens(self) -> Tensor:
        """Return the public token per position (B, T), -1 where it is private; padding counts as public."""
        known = torch.where(self.real, -1, self.adapter.pad_id)
        prefix, suffix = token_template(self.adapter)
        for row, positions in enumerate(mask.nonzero().flatten().tolist() for mask in self.real):
            if len(positions) <= len(prefix) + len(suffix):
                continue  # shorter than the template: not made by this tokenizer, so nothing is known
            public = zip(positions, prefix, strict=False), zip(reversed(positions), reversed(suffix), strict=False)
            for position, token in (pair for pairs in public for pair in pairs):
                known[row, position] = token
        return known

    def _prepare_targets(self) -> None:
        task = self.adapter.task
        self.has_token_targets = task in ("causal-lm", "masked-lm")
        if not self.has_token_targets:
            return
        predicted = torch.zeros_like(self.real)
        predicted[:, 1:] = self.real[:, 1:] & self.real[:, :-1]  # a first token has no predecessor and no loss
        fixed = predicted & (self.known >= 0) if task == "causal-lm" else torch.zeros_like(self.real)
        self.public_targets = F.one_hot(self.known.clamp(min=0), len(self.table)) * fixed[..., None]
        self.public_targets = self.public_targets.to(self.table.dtype)
        self.is_target = predicted[self.free]

    # Unknowns to (x, targets) ----------------------------------------------------------------------------

    def draw(self, generator: torch.Generator, init_scale: float) -> Unknowns:
        """Return a random guess: x from the prior, targets undecided.

        Args:
            generator: A CPU generator.
            init_scale: Standard deviation of u.

        Returns:
            New leaves; u alone is random.
        """
        shape = int(self.free.sum()), self.table.shape[-1]
        u = init_scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        guess = Unknowns(u.to(self.table))
        if self.has_token_targets:
            guess.logits = self.table.new_zeros(shape[0], len(self.table))
        if self.adapter.task == "masked-lm":
            guess.gate = self.table.new_zeros(shape[0])
        if self.label_start is not None:
            guess.labels = self.label_start.clone()
        guess.masks = tuple(self.table.new_ones(shape) for shape in self.mask_shapes)  # the mean of a true mask
        for tensor in guess.tensors():
            tensor.requires_grad_()
        return guess

    def places(self) -> list[Tensor]:
        """Return, for each text, which rows of u are its own, (N_i,)."""
        return list(torch.arange(int(self.free.sum())).split(self.free.sum(-1).tolist()))

    def rows(self, guess: Unknowns) -> Tensor:
        """Return the embeddings of the free positions, (N, D)."""
        return self.prior.mean + self.prior.std * guess.u

    def x(self, guess: Unknowns) -> Tensor:
        """Return the input (B, T, D), public tokens at their true embeddings."""
        return self.base.index_put((self.free,), self.rows(guess))

    def targets(self, guess: Unknowns) -> Tensor:
        """Return class labels, or token targets as probabilities (B, T, V).

        Causal: the target at t is the input at t, so its probabilities are softmax(SHARPNESS cos(x_t, E) + free
        logits). Tried on random GPT-2 (2 x 64, V = 500, T = 8, 3 seeds, tokens in place): the cosine alone is a
        bottleneck (0.83, objective 5e-2); free logits alone find the targets but not x at the last position, which
        enters no loss (x 0.88, objective 3e-4); the sum has neither fault (1.00, objective 4e-5).
        Masked: which positions carry loss is private too. Each has a weight sigmoid(gate) and free logits.
        """
        if not self.has_token_targets:
            return self.labels if guess.labels is None else guess.labels.softmax(-1)
        if guess.gate is None:
            probabilities = self.scores(guess).softmax(-1) * self.is_target[:, None]
        else:
            probabilities = guess.logits.softmax(-1) * guess.gate.sigmoid()[:, None]
        return self.public_targets.index_put((self.free,), probabilities)

    # Tokens ----------------------------------------------------------------------------------------------

    def scores(self, guess: Unknowns) -> Tensor:
        """Return the log-weight of every token at the free positions, (N, V)."""
        cosines = F.normalize(guess.u, dim=-1) @ self.directions.T
        tied = (
            SHARPNESS * cosines
            if guess.logits is None or guess.gate is not None
            else SHARPNESS * cosines + guess.logits
        )
        return tied.index_fill(-1, self.excluded, -torch.inf)

    def decode(self, guess: Unknowns) -> tuple[list[list[int]], list[list[float]]]:
        """Return tokens and confidences per sequence, public tokens included, padding removed.

        The token is the one of largest score, confidence its probability under softmax(score); 1 for public ones.
        A masked position of a masked language model takes the target's token instead.
        """
        probabilities = self.scores(guess).softmax(-1)
        if guess.gate is not None:
            mask_token = self.adapter.tokenizer.mask_token_id
            masked = (guess.gate > 0) | (probabilities.argmax(-1) == mask_token)
            probabilities[:, mask_token] = 0
            probabilities = torch.where(masked[:, None], guess.logits.softmax(-1), probabilities)
        confidence, token = probabilities.max(-1)
        tokens = self.known.masked_scatter(self.free, token)
        confidences = torch.ones_like(self.real, dtype=confidence.dtype).masked_scatter(self.free, confidence)
        return self._per_sequence(tokens), self._per_sequence(confidences)

    def _per_sequence(self, values: Tensor) -> list[list]:
        return [row[mask].tolist() for row, mask in zip(values, self.real, strict=True)]

    def embeddings(self, guess: Unknowns) -> tuple[Tensor, ...]:
        """Return the recovered input of each sequence, (T_i, D), padding removed."""
        return tuple(row[mask] for row, mask in zip(self.x(guess), self.real, strict=True))
