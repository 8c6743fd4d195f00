"""The sentences of a batch that an encoder was given: whole sentences instead of prefixes.

An encoder's position sees the whole sentence, so nothing behind the first attention can be tested token by token.
What is tested is a sentence: the inputs of a map behind the attention of block 0 lie in that map's row space, at all
positions, only if all tokens are right. Sentences are found by local search (:mod:`lmleak.attacks.span_assignment`)
and accepted if every position is inside up to the rounding expected for it, as in the decoder's tree.

Lengths: a text ends where the tokenizer's last special token ([SEP], </s>) is a candidate; without a tokenizer every
length is tried, the longest unexplained one first. The search ends when B sentences are found, or when those found
have as many tokens as the row space has dimensions, so that nothing is left to explain.

Two tokens and two positions can hide who was where: before the norm an input is E_v + P_p, so with (a, 1), (b, 1) and
(b, 2) in the batch, (a, 2) lies in the span too, up to the norm's shift, which joins the span once such a cycle
closes. All pairs of the tokens and positions that true pairs connect then survive. In four similar sentences of real
text they were 19 tokens at each of 14 positions for 35 true pairs, and the rank was 34 = 19 + 14 - 1, the shift and
[CLS]: in exact arithmetic the first layer knows no more. Behind the attention they are told apart.

In floating point a hint remains. The true pairs are the numbers that made the gradient, the false ones are rounded
anew: 6e-9 to 1.6e-7 from the span against 8e-8 to 2e-6 (five batches, gradient and attack on one machine; on another
the hint may be weaker). So the pairs closest to the span are searched first, as many as the row space behind the
attention has dimensions, since the batch has no more; then all, close ones more often in the starts. What is accepted
does not depend on it.

Measured on batches of four CoLA sentences at the MiniLM BERT (6 layers, width 384, float32): all texts exact on 6 of 6
batches that nothing was tuned on, in 0.7 to 11 s of one core and 576 to 127146 scored sentences (0.1 ms each); of the
batches looked at before, the slowest took 180169. Slow is what has true pairs beyond the closest ones: then every
length is searched over all candidates. With the hint destroyed (residuals shuffled) two easier batches stay exact, and
the one of 19 candidates gives 2 of 4 texts when 400000 scored sentences end the search after 34 s.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lmleak.attacks.relaxed_text import token_template
from lmleak.attacks.span_assignment import Assignments, Budget, Sentences
from lmleak.attacks.span_context import Contexts
from lmleak.attacks.span_filter import FirstLayerFilter, Survivors, by_position
from lmleak.attacks.span_layers import Site
from lmleak.attacks.span_relaxation import Relaxation
from lmleak.attacks.span_sentence_test import CHUNK, SentenceTest, sentence_test
from lmleak.attacks.span_subspace import RowSpace
from lmleak.errors import UnsupportedCombinationError
from lmleak.types import Observation

STARTS = 8
"""Random sentences that descend together."""
PLAUSIBLE = 8.0
"""How much more often than the median a start may hold a token of small residual at the first layer."""
KEPT = 64
"""Of all sentences of a length, this many of best score are tested, or those of the whole batch."""

Sentence = tuple[int, ...]


@dataclass
class SentenceSearch:
    """The search for all sentences of a batch."""

    adapter: object
    test: SentenceTest
    survivors: Sequence[Survivors]
    """What the first layer allows at every position."""
    batch_size: int
    restarts: int
    """Random starts per length."""
    budget: Budget
    generator: torch.Generator
    found: list[Sentence] = field(default_factory=list)
    """Accepted sentences, by discovery."""
    rejected: dict[Sentence, float] = field(default_factory=dict)
    """Local minima that were not accepted, with their scores."""
    ends_with: int | None = None
    """The special token that ends every text; None if there is none, or no text of the batch holds it."""

    def __post_init__(self):
        self._contexts = self._cached_contexts()
        _, suffix = token_template(self.adapter)
        if suffix and any(suffix[-1] in s.ids.tolist() for s in self.survivors):
            self.ends_with = suffix[-1]

    def _cached_contexts(self) -> Contexts | None:
        if not self.survivors:
            return None
        tokens, path = torch.cat([s.ids for s in self.survivors]).unique(), self.test.site.paths[0]
        contexts = Contexts(self.adapter, path, tokens, len(self.survivors))
        return contexts if contexts.agrees(self.generator) else None

    def score(self, ids: Tensor) -> Tensor:
        """Return the score of every sentence, (n,)."""
        inputs = self.test.inputs if self._contexts is None else self._contexts
        chunk = max(1, CHUNK // (ids.shape[1] * self.test.span.width))
        return torch.cat([self.test.score(inputs(part)) for part in ids.split(chunk)])

    def run(self) -> None:
        """Search until nothing is left to explain, all restarts are spent, or the budget is."""
        everything = [s.ids for s in self.survivors]
        if sum(map(len, everything)) > self.test.span.rank:
            self._search(closest(self.survivors, self.test.span.rank), math.ceil(self.restarts / 4))
        self._search(everything, self.restarts)

    def _search(self, candidates: Sequence[Tensor], restarts: int) -> None:
        """Search every length, with so many starts each."""
        plausible = plausibility(self.survivors)
        searches = {
            length: Assignments(
                self._allowed(candidates, length), self.score, self.generator, self.test.goal, self.budget, plausible
            )
            for length in self.lengths(candidates)
        }
        spent = dict.fromkeys(searches, 0)
        for goal in range(STARTS, restarts + STARTS, STARTS):
            waiting = {length for length in searches if spent[length] < goal}
            while waiting and not self.complete() and not self.budget.exhausted:
                length = self._most_promising({length: searches[length] for length in waiting})
                fruitful = self._visit(searches[length])
                spent[length] = restarts if searches[length].enumerable else spent[length] + STARTS
                if not fruitful or spent[length] >= restarts:
                    waiting.remove(length)

    def complete(self) -> bool:
        """Whether nothing is left to find: B sentences, or as many tokens as the row space has dimensions."""
        tokens = sum(map(len, self.found))
        return len(self.found) >= self.batch_size or tokens >= self.test.span.rank

    def lengths(self, candidates: Sequence[Tensor]) -> list[int]:
        """Return the lengths that a text can have: where the tokenizer's last token is allowed, else all."""
        return [p + 1 for p, ids in enumerate(candidates) if self.ends_with in (None, *ids.tolist())]

    def _allowed(self, candidates: Sequence[Tensor], length: int) -> list[Tensor]:
        allowed = list(candidates[:length])
        if self.ends_with is not None:
            allowed[-1] = allowed[-1].new_tensor([self.ends_with])
        return allowed

    def _most_promising(self, searches: dict[int, Assignments]) -> int:
        """Return the longest length at whose end some token is not explained yet; the longest if there is none."""
        explained = self.explained()

        def unexplained_end(length: int) -> bool:
            return any((length - 1, token) not in explained for token in searches[length].candidates[-1].tolist())

        return max(searches, key=lambda length: (unexplained_end(length), length))

    def explained(self) -> set[tuple[int, int]]:
        """Return the (position, token) pairs of the accepted sentences."""
        return {pair for sentence in self.found for pair in enumerate(sentence)}

    def _visit(self, search: Assignments) -> bool:
        """Score all sentences or run one set of starts; return whether a new sentence was accepted."""
        if search.enumerable:
            ids, scores = (column[: max(KEPT, self.batch_size)] for column in search.every())
        else:
            ids, scores = search.descend(self._starts(search))
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

    def _starts(self, search: Assignments) -> Sentences:
        """Return starts: known sentences with another token pinned in, and what random mixtures sharpen to."""
        known = [sentence for sentence in self.found if len(sentence) == len(search.candidates)]
        starts = search.draw(STARTS, known, self.explained())
        if self._contexts is None or not Relaxation.fits(self._contexts, search.candidates):
            return starts
        relaxation = Relaxation(self._contexts, search, self.test.log_residual)
        if not known:
            return relaxation.sharpen(starts, self.explained())
        even = torch.arange(STARTS, device=starts.ids.device) % 2 == 0
        return Sentences.join([starts.select(even), relaxation.sharpen(starts.select(~even), self.explained())])

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


def closest(survivors: Sequence[Survivors], count: int) -> list[Tensor]:
    """Return the candidates per position among the ``count`` of smallest residual, up to the first empty position."""
    residual = torch.cat([s.residual for s in survivors])
    largest = residual.sort().values[count - 1]
    kept = [s.ids[s.residual <= largest] for s in survivors]
    return kept[: next((p for p, ids in enumerate(kept) if not len(ids)), len(kept))]


def plausibility(survivors: Sequence[Survivors]) -> dict[tuple[int, int], float]:
    """Return median residual / residual per (position, token) pair, within a factor of ``PLAUSIBLE`` around 1."""
    if not survivors:
        return {}
    residual = torch.cat([s.residual for s in survivors])
    weight = (residual.median() / residual).nan_to_num(1.0).clamp(1 / PLAUSIBLE, PLAUSIBLE)
    pairs = [(position, token) for position, s in enumerate(survivors) for token in s.ids.tolist()]
    return dict(zip(pairs, weight.tolist(), strict=True))


def search_sentences(
    adapter, observation: Observation, tokens: FirstLayerFilter, sites: Sequence[tuple[Site, RowSpace]],
    *, restarts: int, evaluations: int, seed: int,
) -> SentenceSearch:  # fmt: skip
    """Find the sentences of a batch.

    Args:
        adapter: An encoder.
        observation: The released gradient and the batch size.
        tokens: The first-layer filter.
        sites: Sites behind the first attention with their row spaces.
        restarts: Random starts per length.
        evaluations: Sentences that may be scored; the search ends with the visit that reaches this.
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
        adapter, sentence_test(adapter, sites, seed), list(by_position(tokens)),
        observation.batch_size, restarts, Budget(evaluations), torch.Generator().manual_seed(seed),
    )  # fmt: skip
    search.run()
    return search
