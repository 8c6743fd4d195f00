"""The sentences of a batch that an encoder was given: whole sentences instead of prefixes.

An encoder's position sees the whole sentence, so nothing behind the first attention can be tested token by token.
What is tested is a sentence: the inputs of a map behind the attention of block 0 lie in that map's row space, at all
positions, only if all tokens are right. Sentences are found by local search (:mod:`lmleak.attacks.span_assignment`)
and accepted if every position is inside up to the rounding expected for it, as in the decoder's tree.

Lengths: a text ends where the tokenizer's last special token ([SEP], </s>) is a candidate; without a tokenizer every
length is tried, the longest unexplained one first. The search ends when B sentences are found, or when those found
have as many tokens as the row space has dimensions, so that nothing is left to explain.

Two tokens and two positions can hide who was where: before the norm an input is E_v + P_p, so with (a, 1), (b, 1) and
(b, 2) in the batch, (a, 2) lies in the span too, up to the norm's shift. Words that repeat at other positions make
dozens of such candidates in real text (measured: 10 per position for four short sentences of a trained BERT). They
cost time; behind the attention they are told apart.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lmleak.attacks.relaxed_text import token_template
from lmleak.attacks.span_assignment import Assignments
from lmleak.attacks.span_context import Contexts
from lmleak.attacks.span_filter import FirstLayerFilter, by_position
from lmleak.attacks.span_layers import Site, dependence, forward, linear_groups, random_ids
from lmleak.attacks.span_subspace import RowSpace
from lmleak.errors import UnsupportedCombinationError
from lmleak.types import Observation

CHUNK = 2**22
"""Numbers per layer and forward pass: sentences x tokens x width."""
STARTS = 4
"""Random sentences that descend together."""
KEPT = 64
"""Of all sentences of a length, this many of best score are tested, or those of the whole batch."""
NEARLY = 0.75
"""A site that excludes at least this share of the best is good enough; earlier sites cost less."""
FLOOR = 1e3
"""Residuals below this many machine epsilons count as this in the score: exact is exact, rounding must not decide."""

Sentence = tuple[int, ...]


def sentence_sites(adapter, gradient: Mapping[str, Tensor]) -> list[Site]:
    """Return the released sites whose input depends on the whole sentence, and whose gradient spans all of it.

    These are the maps of block 0 behind its attention, and the attention input of block 1. The last block is left out:
    only the positions that the loss reads leave it, so its keys and values carry at most two directions per head and
    such position, and its other maps none of the rest.

    Args:
        adapter: The model.
        gradient: Released gradient per parameter name.

    Returns:
        At least one site.

    Raises:
        UnsupportedCombinationError: If there is none, with the reason.
    """
    if len(adapter.blocks) < 2:
        raise UnsupportedCombinationError(
            f"{adapter.name} has one block, of which only the positions that the loss reads carry a gradient, so it "
            "does not span the tokens. Use a matching attack (dlg, tag)"
        )
    behind = [
        Site(paths, f"the input of {paths[0]}")
        for paths in linear_groups(adapter, adapter.blocks[0] + ".")[1:]
        if any(dependence(adapter, paths[0]))
    ]
    if len(adapter.blocks) > 2:
        behind.append(Site(adapter.attention_inputs(1), "the attention input of block 1"))
    released = [site for site in behind if site.is_released(gradient)]
    if not released:
        raise UnsupportedCombinationError(
            "attack 'span' needs the gradient of a map that sees whole sentences, to tell which tokens belong "
            f"together: one of {', '.join(path for site in behind for path in site.paths)}. None of them is released "
            "(shared='block:0' would do)"
        )
    return released


@dataclass(frozen=True)
class SentenceTest:
    """One map behind the first attention, and what it says of a sentence."""

    adapter: object
    site: Site
    span: RowSpace
    null: float
    """Residual that chance gives."""

    @property
    def floor(self) -> float:
        """Smallest residual that the score tells from 0."""
        return FLOOR * self.span.eps

    @property
    def goal(self) -> float:
        """The score of a sentence that fits at all positions."""
        return math.log(self.floor) + 1e-3

    def inputs(self, ids: Tensor) -> Tensor:
        """Return what the map sees, (n, T, d)."""
        chunk = max(1, CHUNK // (ids.shape[1] * self.span.width))
        return torch.cat([forward(self.adapter, part, stop_at=self.site.paths[0]) for part in ids.split(chunk)])

    def score(self, x: Tensor) -> Tensor:
        """Return the mean log residual over positions, (n,).

        Against the mean residual it rewards a position that fits exactly; found as often or more in trials. Computed
        in the model's precision, which suffices above ``floor``.
        """
        basis = self.span.basis.to(x.dtype)
        residual = (x - (x @ basis) @ basis.T).norm(dim=-1) / x.norm(dim=-1)
        return residual.clamp(min=self.floor).log().mean(dim=1)


def sentence_test(adapter, sites: Sequence[tuple[Site, RowSpace]], seed: int) -> SentenceTest:
    """Return the test at the first site that excludes about as much as any: where random tokens lie far out.

    A site of lower rank than another lacks inputs of the batch (a key map alone lacks one direction per text), and one
    of full rank excludes nothing. One site is enough: a sentence fits at all its positions by rounding, or by none.

    Args:
        adapter: The model.
        sites: Released sites with their row spaces.
        seed: Chooses the random tokens.

    Returns:
        The test.

    Raises:
        UnsupportedCombinationError: If every site is of full rank.
    """
    rank = max((span.rank for _, span in sites if span.rank < span.width), default=0)
    ids = random_ids(adapter, 64, 4, seed=seed)
    tests = [
        SentenceTest(adapter, site, span, span.null(forward(adapter, ids, stop_at=site.paths[0])))
        for site, span in sites
        if span.rank == rank
    ]
    if not tests:
        raise UnsupportedCombinationError(
            "the released gradient excludes nothing behind the first attention: "
            + "; ".join(f"rank {span.rank} at hidden size {span.width} at {site.where}" for site, span in sites)
            + ". The attack needs fewer tokens in the batch than the hidden size (tokens >= hidden size: the row "
            "space is everything), and no noise"
        )
    largest = max(test.null for test in tests)
    return next(test for test in tests if test.null >= NEARLY * largest)


@dataclass
class SentenceSearch:
    """The search for all sentences of a batch."""

    adapter: object
    test: SentenceTest
    candidates: Sequence[Tensor]
    """(n_p,) token ids that the first layer allows at position p."""
    batch_size: int
    restarts: int
    """Random starts per length."""
    generator: torch.Generator
    found: list[Sentence] = field(default_factory=list)
    """Accepted sentences, by discovery."""
    rejected: dict[Sentence, float] = field(default_factory=dict)
    """Local minima that were not accepted, with their scores."""
    evaluations: int = 0
    """Sentences scored."""
    ends_with: int | None = None
    """The special token that ends every text; None if there is none, or no text of the batch holds it."""

    def __post_init__(self):
        self._contexts = self._cached_contexts()
        _, suffix = token_template(self.adapter)
        if suffix and any(suffix[-1] in ids.tolist() for ids in self.candidates):
            self.ends_with = suffix[-1]

    def _cached_contexts(self) -> Contexts | None:
        if not self.candidates:
            return None
        tokens, path = torch.cat(list(self.candidates)).unique(), self.test.site.paths[0]
        contexts = Contexts(self.adapter, path, tokens, len(self.candidates))
        return contexts if contexts.agrees(self.generator) else None

    def score(self, ids: Tensor) -> Tensor:
        """Return the score of every sentence, (n,)."""
        inputs = self.test.inputs if self._contexts is None else self._contexts
        chunk = max(1, CHUNK // (ids.shape[1] * self.test.span.width))
        return torch.cat([self.test.score(inputs(part)) for part in ids.split(chunk)])

    def run(self) -> None:
        """Search every length until nothing is left to explain or all restarts are spent."""
        searches = {
            length: Assignments(self._allowed(length), self.score, self.generator, self.test.goal)
            for length in self.lengths()
        }
        spent = dict.fromkeys(searches, 0)
        for goal in range(STARTS, self.restarts + STARTS, STARTS):
            waiting = {length for length in searches if spent[length] < goal}
            while waiting and not self.complete():
                length = self._most_promising(waiting)
                fruitful = self._visit(searches[length])
                spent[length] = self.restarts if searches[length].enumerable else spent[length] + STARTS
                if not fruitful or spent[length] >= self.restarts:
                    waiting.remove(length)
        self.evaluations = sum(search.evaluations for search in searches.values())

    def complete(self) -> bool:
        """Whether nothing is left to find: B sentences, or as many tokens as the row space has dimensions."""
        tokens = sum(map(len, self.found))
        return len(self.found) >= self.batch_size or tokens >= self.test.span.rank

    def lengths(self) -> list[int]:
        """Return the lengths that a text can have: where the tokenizer's last token is allowed, else all."""
        return [p + 1 for p, ids in enumerate(self.candidates) if self.ends_with in (None, *ids.tolist())]

    def _allowed(self, length: int) -> list[Tensor]:
        allowed = list(self.candidates[:length])
        if self.ends_with is not None:
            allowed[-1] = allowed[-1].new_tensor([self.ends_with])
        return allowed

    def _most_promising(self, lengths: set[int]) -> int:
        """Return the longest length at whose end some token is not explained yet; the longest if there is none."""
        explained = self.explained()

        def unexplained_end(length: int) -> bool:
            return any((length - 1, token) not in explained for token in self._allowed(length)[-1].tolist())

        return max(lengths, key=lambda length: (unexplained_end(length), length))

    def explained(self) -> set[tuple[int, int]]:
        """Return the (position, token) pairs of the accepted sentences."""
        return {pair for sentence in self.found for pair in enumerate(sentence)}

    def _visit(self, search: Assignments) -> bool:
        """Score all sentences or run one set of starts; return whether a new sentence was accepted."""
        if search.enumerable:
            ids, scores = (column[: max(KEPT, self.batch_size)] for column in search.every())
        else:
            known = [sentence for sentence in self.found if len(sentence) == len(search.candidates)]
            ids, scores = search.descend(search.draw(STARTS, known, self.explained()))
        accepted = self.test.span.accepts(self.test.inputs(ids)).all(dim=1)
        news = False
        for row, score, inside in zip(ids.tolist(), scores.tolist(), accepted.tolist(), strict=True):
            sentence = tuple(row)
            if not inside:
                self.rejected[sentence] = score
            elif sentence not in self.found and len(self.found) < self.batch_size:
                self.found.append(sentence)
                news = True
        return news

    def guesses(self) -> list[Sentence]:
        """Return the best sentences that were not accepted, as many as are missing.

        Near every sentence that was found lie others that score well and are wrong: a guess must be new in at least
        half of its tokens.
        """
        explained, chosen = self.explained(), []
        for sentence in sorted(self.rejected, key=self.rejected.get):
            if self.complete() or len(self.found) + len(chosen) == self.batch_size:
                break
            pairs = set(enumerate(sentence))
            if 2 * len(pairs - explained) >= len(pairs):
                chosen.append(sentence)
                explained |= pairs
        return chosen

    def residuals(self, sentence: Sentence) -> Tensor:
        """Return the residual per position, (T,)."""
        ids = torch.tensor([sentence], device=self.adapter.device)
        return self.test.span.residual(self.test.inputs(ids))[0]

    def confidence(self, sentence: Sentence) -> list[float]:
        """Return per token 1 - residual / null; for a guess, where its residual lies from chance (0) to rounding (1).

        A guess is wrong somewhere, and a wrong order of the right words can fit to a percent: on the linear scale it
        would pass for nearly certain. The scale of guesses is logarithmic.
        """
        residual = self.residuals(sentence) / self.test.null
        if sentence in self.found:
            return (1 - residual).clamp(min=0).tolist()
        exact = self.test.span.largest_accepted() / self.test.null
        return (residual.log() / math.log(exact)).clamp(min=0, max=1).tolist()


def search_sentences(
    adapter, observation: Observation, tokens: FirstLayerFilter, sites: Sequence[tuple[Site, RowSpace]],
    *, restarts: int, seed: int,
) -> SentenceSearch:  # fmt: skip
    """Find the sentences of a batch.

    Args:
        adapter: An encoder.
        observation: The released gradient and the batch size.
        tokens: The first-layer filter.
        sites: Sites behind the first attention with their row spaces.
        restarts: Random starts per length.
        seed: Seed of the starts.

    Returns:
        The finished search.

    Raises:
        UnsupportedCombinationError: If tokens cannot be told apart by position.
    """
    if tokens.position_free:
        raise UnsupportedCombinationError(
            f"the attention input of block 0 of {adapter.name} does not tell positions (rotary or relative ones), so "
            "every token may stand everywhere and lengths are unknown; attack 'span' reads encoders with absolute "
            "positions. Use a matching attack (dlg, tag)"
        )
    search = SentenceSearch(
        adapter, sentence_test(adapter, sites, seed), [s.ids for s in by_position(tokens)],
        observation.batch_size, restarts, torch.Generator().manual_seed(seed),
    )  # fmt: skip
    search.run()
    return search
