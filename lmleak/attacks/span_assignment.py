"""Which tokens form a sentence where every position sees every other: coordinate descent over assignments.

At every position one of a few tokens stands, and a score tells how far a whole sentence is from fitting the gradient.
B sentences of T tokens leave up to B^T sentences to choose from. If they are few, all are scored. Otherwise local
moves find the minima, since the score also falls when only part of a sentence is right:
- put another token at one position, for every position in turn, until nothing changes;
- then swap two tokens, or move one past others, which no single change can do: where candidates repeat over
  positions, a half-right sentence is often right up to the order.

Random starts seldom suffice where many candidates are false; :mod:`lmleak.attacks.span_relaxation` gives better ones.

Every start has one token pinned, preferably one that no known sentence explains, so that the descent cannot end in a
known sentence, whose basin may be the widest.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ENUMERABLE = 4096
"""So few sentences are all scored."""
NOVELTY = 8.0
"""How much more often a start holds a token that no sentence has explained so far."""
PROGRESS = 1e-6
"""A smaller step down does not count, so that rounding cannot keep a descent going."""


@dataclass
class Budget:
    """How many sentences may be scored."""

    limit: float = math.inf
    spent: int = 0

    @property
    def exhausted(self) -> bool:
        """Whether the limit is reached."""
        return self.spent >= self.limit


@dataclass(frozen=True)
class Sentences:
    """Sentences on their way down."""

    ids: Tensor
    """(n, T)."""
    pinned: Tensor
    """(n,) position of the token that stays."""
    score: Tensor
    """(n,)."""

    def select(self, index: Tensor) -> "Sentences":
        """Return the sentences at ``index``."""
        return Sentences(self.ids[index], self.pinned[index], self.score[index])

    @staticmethod
    def join(parts: "Sequence[Sentences]") -> "Sentences":
        """Return all sentences of several sets, those that are equal (and pinned alike) once."""
        ids, pinned, score = (torch.cat([getattr(p, name) for p in parts]) for name in ("ids", "pinned", "score"))
        once, where = torch.cat([ids, pinned[:, None]], dim=1).unique(dim=0, return_inverse=True)
        score_once = score.new_empty(len(once))
        score_once[where] = score
        return Sentences(once[:, :-1], once[:, -1], score_once)


class Assignments:
    """All sentences of one length over given candidates, and the search among them.

    Args:
        candidates: (n_p,) token ids per position p.
        score: (m, T) token ids to (m,); lower is better.
        generator: Chooses starts and the order of positions.
        goal: A descent ends as soon as one sentence scores this low.
        budget: A descent also ends when this is exhausted; unlimited by default.
        plausibility: Weight of a (position, token) pair among starts, 1 where it is not given.
    """

    def __init__(
        self,
        candidates: Sequence[Tensor],
        score: Callable[[Tensor], Tensor],
        generator: torch.Generator,
        goal: float = -math.inf,
        budget: Budget | None = None,
        plausibility: Mapping[tuple[int, int], float] | None = None,
    ):
        self.candidates, self.generator = candidates, generator
        self.enumerable = math.prod(map(len, candidates)) <= ENUMERABLE
        """Whether there are few enough sentences to score all."""
        self.budget, self._plausibility = budget or Budget(), plausibility or {}
        self._score, self._goal = score, goal
        self._rearranged = rearrangements(len(candidates)).to(candidates[0].device)

    def score(self, ids: Tensor) -> Tensor:
        """Return the score of every sentence, counting them."""
        self.budget.spent += len(ids)
        return self._score(ids)

    def every(self) -> tuple[Tensor, Tensor]:
        """Return all sentences (m, T) and their scores (m,), best first."""
        ids = torch.cartesian_prod(*self.candidates).reshape(-1, len(self.candidates))
        return _sorted(ids, self.score(ids))

    def draw(self, count: int, known: Sequence[Sequence[int]], explained: set[tuple[int, int]]) -> Sentences:
        """Return starts: half of them known sentences with another token pinned in, since texts may differ in one.

        Args:
            count: How many.
            known: Sentences of this length that were found.
            explained: (position, token) pairs of all sentences that were found.

        Returns:
            The starts, scored.
        """
        weights = self.weights(explained)
        ids = torch.stack([c[self._choose(w, count)] for c, w in zip(self.candidates, weights, strict=True)], dim=1)
        if known:
            ids[::2] = ids.new_tensor(known)[self._choose(torch.ones(len(known)), len(ids[::2]))]
        pairs = ids.new_tensor([(p, token) for p, c in enumerate(self.candidates) for token in c.tolist()])
        leaves_a_choice = torch.cat([torch.full_like(w, float(len(w) > 1)) for w in weights])
        pinned, token = pairs[self._choose(torch.cat(weights) * leaves_a_choice, count)].T
        ids[torch.arange(count), pinned] = token
        return Sentences(ids, pinned, self.score(ids))

    def weights(self, explained: set[tuple[int, int]]) -> list[Tensor]:
        """Return how often a start holds a candidate, up to a factor, (n_p,) per position."""

        def weight(pair: tuple[int, int]) -> float:
            return self._plausibility.get(pair, 1.0) * (1.0 if pair in explained else NOVELTY)

        return [
            torch.tensor([weight((position, token)) for token in ids.tolist()])
            for position, ids in enumerate(self.candidates)
        ]

    def _choose(self, weight: Tensor, count: int) -> Tensor:
        drawn = torch.multinomial(weight, count, replacement=True, generator=self.generator)
        return drawn.to(self.candidates[0].device)

    def descend(self, current: Sentences) -> tuple[Tensor, Tensor]:
        """Follow sentences down to local minima, their pinned tokens kept, while the budget lasts.

        The descent ends as soon as one sentence reaches the goal.

        Args:
            current: The starts.

        Returns:
            The distinct sentences reached (m, T) and their scores (m,), best first.
        """
        minima = []
        while len(current.ids):
            current = self._change_single_tokens(current)
            if self._stops(current):
                minima.append(current)
                break
            better = [self._rearrange(current.select(slice(i, i + 1))) for i in range(len(current.ids))]
            stuck = torch.tensor([b is None for b in better], device=current.ids.device)
            minima.append(current.select(stuck))
            current = Sentences.join([current.select(slice(0)), *(b for b in better if b is not None)])
        found = Sentences.join(minima)
        once, which = found.ids.unique(dim=0, return_inverse=True)
        score = found.score.new_empty(len(once))
        score[which] = found.score
        return _sorted(once, score)

    def _stops(self, current: Sentences) -> bool:
        return self.budget.exhausted or bool((current.score <= self._goal).any())

    def _change_single_tokens(self, current: Sentences) -> Sentences:
        """Sweep over the positions until no single token can be exchanged for a better one, or one is at the goal."""
        finished = [current.select(slice(0))]
        while len(current.ids) and not self._stops(current):
            before = current.score
            for position in torch.randperm(len(self.candidates), generator=self.generator).tolist():
                free = (current.pinned != position).nonzero()[:, 0]
                tokens = self.candidates[position]
                if len(tokens) == 1 or not len(free) or self.budget.exhausted:
                    continue
                tried = current.ids[free].repeat_interleave(len(tokens), dim=0)
                tried[:, position] = tokens.repeat(len(free))
                score, best = self.score(tried).view(len(free), -1).min(dim=1)
                ids, scores = current.ids.clone(), current.score.clone()
                ids[free, position], scores[free] = tokens[best], score
                current = Sentences(ids, current.pinned, scores)
            going_on = current.score < before - PROGRESS
            finished.append(current.select(~going_on))
            current = Sentences.join([current.select(going_on)])
        return Sentences.join([*finished, current])

    def _rearrange(self, one: Sentences) -> Sentences | None:
        """Return the best of one sentence's rearrangements, None if none is better."""
        tried = one.ids[0, self._rearranged]  # (m, T)
        possible = (tried != one.ids).any(dim=1) & (tried[:, one.pinned[0]] == one.ids[0, one.pinned[0]])
        for position, tokens in enumerate(self.candidates):
            possible &= torch.isin(tried[:, position], tokens)
        tried = tried[possible].unique(dim=0)
        if not len(tried) or self.budget.exhausted:
            return None
        score, which = self.score(tried).min(dim=0)
        return Sentences(tried[which][None], one.pinned, score[None]) if score < one.score - PROGRESS else None


def rearrangements(length: int) -> Tensor:
    """Return (m, T) index lists: every swap of two of T positions, and every move of one past at least two others."""
    found = []
    for i in range(length):
        for j in range(length):
            order = list(range(length))
            if i < j:
                order[i], order[j] = j, i
                found.append(order)
            if abs(i - j) > 1:
                order = [p for p in range(length) if p != i]
                order.insert(j, i)
                found.append(order)
    return torch.tensor(found, dtype=torch.long).reshape(-1, length)


def _sorted(ids: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    order = score.argsort(stable=True)
    return ids[order], score[order]
