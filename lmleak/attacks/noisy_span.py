"""The span attack on decoders when the gradient is noisy, rounded or summed: ranks and odds instead of thresholds."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lmleak.adapters.base import ModelAdapter
from lmleak.attacks.base import Assumptions, Attack, reconstruction
from lmleak.attacks.noisy_beam import Evidence, SiteScores, search
from lmleak.attacks.span_layers import Site, first_site, prefix_sites
from lmleak.attacks.span_score import SoftRowSpace, posterior, soft_row_space
from lmleak.attacks.span_sparse import RANGE, SparseFirstLayer
from lmleak.attacks.span_subspace import stacked_gradient
from lmleak.attacks.span_targets import SPREAD, HeadScore
from lmleak.attacks.span_tree import Prefix
from lmleak.errors import UnsupportedCombinationError
from lmleak.gradients.readout import sequence_lengths
from lmleak.gradients.shared import SharedGradient
from lmleak.lookup import lookup
from lmleak.types import AttackCost, Observation, Reconstruction

ODDS = (-10.0, 5.0)
"""Range of the first layer's log odds: it tells which tokens there are, not which belong together."""
WINDOW = 32
"""Positions that are scored together at first; twice as many as long as tokens show in the second half."""
TYPICAL = 16
"""Tokens of a text, where the first layer knows no positions: a target of the batch is at one of so many."""
SLACK = 2
"""Positions that the longest text may have behind the last one that shows."""
LENGTHS = {"given": True, "unknown": False}  # whether the server must be told


@dataclass(frozen=True)
class NoisySpan(Attack):
    """Recovery of whole batches from decoders, from gradients with noise, bfloat16, int8, clipping or local steps.

    Where ``span`` accepts what lies in a row space up to rounding, this ranks by calibrated surprise
    (:mod:`lmleak.attacks.span_score`) and always answers.
    1. The gradient of the first map is explained by few (token, position) pairs (:mod:`lmleak.attacks.span_sparse`).
    2. Prefixes of the best tokens are grown in a beam (:mod:`lmleak.attacks.noisy_beam`), scored at every released map
       behind the first attention up to the attention input of block 1, and by the head's gradient where it is
       released and noisy (:mod:`lmleak.attacks.span_targets`).
    3. Texts are chosen one by one, each by the evidence of the (position, token) pairs that no chosen text explains.
       A text ends where it is known to, or where the sum of its tokens' margins over chance is largest.
    4. Its last token, no input that reaches the loss, is read off the head's gradient where that tells.

    Assumes the weights and the batch size; lengths only with ``lengths="given"``; no labels, prior or padding, and
    nothing about the noise, whose level is read off the gradient. No gradient is evaluated. Differs from the paper's
    noise variant: noise level and null distributions are estimated (no thresholds), Q, K and V are stacked, several
    maps vote, a prefix grows by one cached row.

    Confidence per token: the posterior probability of a real token against chance, by its first-layer posterior
    (of the vocabulary, about B tokens are real at a position) and the tail probability of the gain that it brings
    to its prefix among all continuations; never more than that of the tokens before it. It is rough, since the
    tail is extrapolated, and too high where most of a batch is lost. ``objective`` is minus the mean log odds of
    the recovered tokens, ``cost.iterations`` the number of (prefix, next token) pairs that were run.
    """

    name: ClassVar[str] = "noisy-span"
    paper: ClassVar[str] = "after Petrov et al. 2024, arXiv:2405.15586 (DAGER), its variant for noisy gradients"
    assumes: ClassVar[Assumptions] = Assumptions(
        tasks=("causal-lm", "sequence-classification"), lengths=False, labels=False, local_steps=True,
        parameters="the attention inputs of block 0, and a map behind its attention", encoders=False,
    )  # fmt: skip

    beam: int = 64
    """Prefixes kept per position; at least the batch size is used."""
    candidates: int = 32
    """Tokens tried per position and prefix; at least 8 per text are used."""
    lengths: str = "unknown"
    """"given": texts end where the server is told that they end; "unknown": where their evidence ends."""

    def __post_init__(self):
        if lookup("lengths", self.lengths, LENGTHS):
            object.__setattr__(self, "assumes", replace(type(self).assumes, lengths=True))
        self._check_counts("beam", "candidates")

    def check(self, adapter: ModelAdapter, shared: SharedGradient) -> None:
        """Refuse encoders, and gradients without the maps that are read.

        Args:
            adapter: The model.
            shared: The released gradient.

        Raises:
            UnsupportedCombinationError: With the reason.
        """
        super().check(adapter, shared)
        self._check_blocks(adapter)
        first, *behind = _sites(adapter)
        for what, sites in (("which tokens were where", [first]), ("which tokens belong together", behind)):
            if not any(site.is_released(shared.gradient) for site in sites):
                paths = [path for site in sites for path in site.paths]
                raise UnsupportedCombinationError(
                    f"attack {self.name!r} needs the gradient of one of {', '.join(paths)} to tell {what}, and none "
                    "is released. Share them (shared='all' or 'block:0-1') or use a matching attack (dlg, tag)"
                )

    def recover(self, adapter: ModelAdapter, observation: Observation, *, seed: int) -> Reconstruction:
        """Return the most likely texts.

        Args:
            adapter: The model.
            observation: The released gradient and the batch size.
            seed: Chooses the random texts that scores are calibrated on.

        Returns:
            At most as many texts as the batch holds, fewer where nothing is left to explain.
        """
        start = time.perf_counter()
        size = observation.batch_size
        first, *behind = _sites(adapter)
        tokens = SparseFirstLayer(adapter, first.paths[0], _space(adapter, observation, first), seed=seed)
        spaces = {
            site: _space(adapter, observation, site) for site in behind if site.is_released(observation.gradient)
        }
        sites = SiteScores(adapter, spaces, max(spaces, key=lambda site: _depth(adapter, site)), seed=seed)
        head = HeadScore.read(adapter, observation, seed=seed)
        lengths = _visible_lengths(adapter, observation)
        surprise, longest = _surprise(tokens, observation, max(lengths) if lengths else None)
        allowed = _candidates(tokens, surprise, head, max(self.candidates, 8 * size), size, longest)
        sharp = tokens.space.power.max().item() > RANGE  # then row spaces tell all
        evidence = search(sites, allowed, beam=max(self.beam, size), batch_size=size, head=None if sharp else head)
        texts = select(evidence, size, lengths, sharp=sharp)
        margins = [evidence.margins(text) for text in texts]
        known = [m for text in margins for m in text]
        following = head.last(texts) if head is not None else []
        for i, (token, odds) in enumerate(following):
            if odds > 0:
                texts[i], margins[i] = (*texts[i], token), [*margins[i], odds]
        noise = [
            f"{s.noise:.1e} at {site.where} (rank {s.rank})" for site, s in {first: tokens.space, **spaces}.items()
        ]
        return reconstruction(
            self.name, adapter, texts, [torch.tensor(m).sigmoid().cummin(0).values.tolist() for m in margins],
            cost=AttackCost(time.perf_counter() - start, iterations=evidence.rows),
            stopped=evidence.stopped,
            objective=-sum(known) / len(known) if known else None,
            notes=("noise per coordinate: " + ", ".join(noise),),
        )  # fmt: skip


def _visible_lengths(adapter, observation: Observation) -> list[int] | None:
    """Return how many tokens of every text are inputs that reach the loss; None where lengths are not given."""
    if observation.layout is None:
        return None
    lengths = observation.layout["attention_mask"].sum(1) - int(adapter.task == "causal-lm")
    return lengths.clamp(min=1).tolist()


def _sites(adapter) -> list[Site]:
    """Return the attention input of block 0, then the maps that see prefixes."""
    return [first_site(adapter), *prefix_sites(adapter)]


def _space(adapter, observation: Observation, site: Site) -> SoftRowSpace:
    return soft_row_space(stacked_gradient(adapter, observation.gradient, site.paths))


def _depth(adapter, site: Site) -> tuple[int, int]:
    """Return a key that grows along the forward pass: block 1, then the order of execution in block 0."""
    paths = [path for path, _ in adapter.model.named_modules()]
    later_block = len(adapter.blocks) > 1 and site.paths[0].startswith(adapter.blocks[1] + ".")
    return int(later_block), paths.index(site.paths[0])


def _surprise(scores: SparseFirstLayer, observation: Observation, length: int | None) -> tuple[Tensor, int | None]:
    """Return the surprise of every token at every position, (V, positions), and how many positions texts have.

    Where lengths are not given, that is up to where a token beats the best that chance gives, or up to where the
    position table has a gradient, if it is exactly zero behind; else as many as the model has.
    """
    if scores.position_free:
        # Every token of a text is an input of its own, and there are no more of them than directions.
        width, limit = len(scores.space.basis), scores.adapter.max_positions()
        return scores.surprise(0, 1), length or (width if limit is None else min(width, limit))
    if length is not None:
        return scores.surprise(0, length), length
    limit, causal = scores.adapter.max_positions(), scores.adapter.task == "causal-lm"
    table = sequence_lengths(scores.adapter, observation)
    touched = table.tokens - causal if table.exact else 0
    stop = WINDOW
    while True:
        found = scores.surprise(0, stop if limit is None else min(stop, limit))
        shown = (found.amax(0) > math.log(found.numel())).nonzero()[:, 0]
        longest = max(touched, 1 + SLACK + int(shown.max()) if len(shown) else 1)
        if longest <= stop // 2 or found.shape[1] == limit:
            return found, min(longest, found.shape[1])
        stop *= 2


def _candidates(
    scores: SparseFirstLayer, window: Tensor, head: HeadScore | None, count: int, batch_size: int, longest: int | None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield the best tokens of position 0, 1, ..., their surprise and their log odds at the first layer.

    Where the head's gradient is released, tokens behind the first must also be targets.
    """
    # A position holds at most B tokens; without positions at the first layer, as many as the gradient has directions.
    real = max(batch_size, scores.space.rank) if scores.position_free else batch_size
    target = head.tokens() if head is not None else torch.zeros_like(window[:, 0])
    # That a token is a target somewhere makes it one of about B T, and says no more of this position.
    length = TYPICAL if scores.position_free else longest
    target = (target - SPREAD).clamp(0.0, max(0.0, math.log(len(target) / (batch_size * length))))
    # A token that is surely in the batch is at this place of one of the texts with probability B / real.
    highest = min(ODDS[1], math.log(batch_size / (real - batch_size))) if real > batch_size else ODDS[1]
    position = 0
    while longest is None or position < longest:
        surprise = window[:, 0 if scores.position_free else position]
        evidence = surprise + (target if position else 0.0)
        # At most B of the vocabulary are real, fewer behind the end of a text: the smaller of the odds by both.
        odds = posterior(evidence, real).logit().minimum(evidence - SPREAD + math.log(real / len(evidence)))
        best = evidence.topk(min(count, len(window))).indices
        yield best, surprise[best], odds.clamp(ODDS[0], highest)[best]
        position += 1


def select(
    evidence: Evidence, batch_size: int, lengths: list[int] | None = None, *, sharp: bool = True
) -> list[Prefix]:
    """Return at most B texts, greedily by the margins of the (position, token) pairs not yet explained.

    Args:
        evidence: The prefixes of the beam.
        batch_size: B.
        lengths: Of the B texts, where they are given; the longest text is chosen first.
        sharp: Whether noise is so small that a sudden loss of fit means the end of a text.

    Returns:
        The texts, the best first; where lengths are not given, each ends where its sum of margins is largest.
    """
    ended: set[Prefix] = set()
    for prefix in evidence.margin if sharp and lengths is None else ():  # parents come before children
        if prefix[:-1] in ended or evidence.fades(prefix):
            ended.add(prefix)
    margins = {prefix: evidence.margins(prefix) for prefix in evidence.margin if prefix not in ended}
    explained: set[tuple[int, int]] = set()
    chosen: list[Prefix] = []

    def gain(prefix: Prefix) -> float:
        pairs = zip(enumerate(prefix), margins[prefix], strict=True)
        return sum(margin for pair, margin in pairs if pair not in explained)

    for length in sorted(lengths, reverse=True) if lengths else [None] * batch_size:
        possible = [prefix for prefix in margins if length is None or len(prefix) == length]
        if not possible:
            continue
        best = max(possible, key=gain)
        if gain(best) <= 0 and chosen and lengths is None:
            break
        chosen.append(best)
        del margins[best]
        explained |= set(enumerate(best))
    return chosen
