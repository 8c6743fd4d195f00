"""The span attack on decoders when the gradient is noisy, rounded or summed: ranks and odds instead of thresholds."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lmleak.adapters.base import ModelAdapter
from lmleak.attacks.base import Assumptions, Attack, reconstruction
from lmleak.attacks.noisy_beam import Evidence, SiteScores, search
from lmleak.attacks.span_layers import Site, prefix_sites
from lmleak.attacks.span_score import FirstLayerScore, SoftRowSpace, posterior, soft_row_space
from lmleak.attacks.span_subspace import stacked_gradient
from lmleak.attacks.span_tree import Prefix
from lmleak.errors import ConfigError, UnsupportedCombinationError
from lmleak.gradients.shared import SharedGradient
from lmleak.types import AttackCost, Observation, Reconstruction

ODDS = (-10.0, 5.0)
"""Range of the first layer's log odds: it tells which tokens there are, not which belong together."""
WINDOW = 32
"""Positions per pass over the vocabulary."""


@dataclass(frozen=True)
class NoisySpan(Attack):
    """Recovery of whole batches from decoders, from gradients with noise, bfloat16, int8, clipping or local steps.

    Where ``span`` accepts what lies in a row space up to rounding, this ranks by calibrated surprise
    (:mod:`lmleak.attacks.span_score`) and always answers.
    1. The attention input of block 0 scores the whole vocabulary at every position.
    2. Prefixes of the best tokens are grown in a beam (:mod:`lmleak.attacks.noisy_beam`), scored at every released map
       behind the first attention up to the attention input of block 1.
    3. Texts are chosen one by one, each by the evidence of the (position, token) pairs that no chosen text explains.
       A text ends where the sum of its tokens' margins over chance is largest, or the fit suddenly fades.

    Assumes the weights and the batch size; no lengths, labels, prior, padding, and nothing about the noise, whose
    level is read off the gradient. No gradient is evaluated. The last token of a language model's text is no input
    that reaches the loss and is left out. Differs from the paper's noise variant: noise level and null distributions
    are estimated (no thresholds), Q, K and V are stacked, several maps vote, a prefix grows by one cached row.

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

    def __post_init__(self):
        for option in ("beam", "candidates"):
            if getattr(self, option) < 1:
                raise ConfigError(f"{option} must be at least 1, got {getattr(self, option)}")

    def check(self, adapter: ModelAdapter, shared: SharedGradient) -> None:
        """Refuse encoders, and gradients without the maps that are read.

        Args:
            adapter: The model.
            shared: The released gradient.

        Raises:
            UnsupportedCombinationError: With the reason.
        """
        super().check(adapter, shared)
        if not adapter.blocks:
            raise UnsupportedCombinationError(f"attack {self.name!r} found no transformer blocks in {adapter.name}")
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
        first, *behind = _sites(adapter)
        tokens = FirstLayerScore(adapter, first.paths[0], _space(adapter, observation, first), seed=seed)
        spaces = {
            site: _space(adapter, observation, site) for site in behind if site.is_released(observation.gradient)
        }
        sites = SiteScores(adapter, spaces, max(spaces, key=lambda site: _depth(adapter, site)), seed=seed)
        count = max(self.candidates, 8 * observation.batch_size)
        evidence = search(
            sites, _candidates(tokens, count, observation.batch_size), beam=max(self.beam, observation.batch_size)
        )
        texts = select(evidence, observation.batch_size)
        margins = [evidence.margins(text) for text in texts]
        known = [m for text in margins for m in text]
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


def _sites(adapter) -> list[Site]:
    """Return the attention input of block 0, then the maps that see prefixes."""
    return [Site(adapter.attention_inputs(0), "the attention input of block 0"), *prefix_sites(adapter)]


def _space(adapter, observation: Observation, site: Site) -> SoftRowSpace:
    return soft_row_space(stacked_gradient(adapter, observation.gradient, site.paths))


def _depth(adapter, site: Site) -> tuple[int, int]:
    """Return a key that grows along the forward pass: block 1, then the order of execution in block 0."""
    paths = [path for path, _ in adapter.model.named_modules()]
    later_block = len(adapter.blocks) > 1 and site.paths[0].startswith(adapter.blocks[1] + ".")
    return int(later_block), paths.index(site.paths[0])


def _candidates(scores: FirstLayerScore, count: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield the best tokens of position 0, 1, ..., their surprise and their log odds at the first layer."""
    limit = scores.adapter.max_positions()
    # A position holds at most B tokens; without positions at the first layer, as many as the gradient has directions.
    real = max(batch_size, scores.space.rank) if scores.position_free else batch_size
    position, window = 0, None
    while limit is None or position < limit:
        column = 0 if scores.position_free else position % WINDOW
        if window is None or (column == 0 and not scores.position_free):
            stop = position + WINDOW if limit is None else min(position + WINDOW, limit)
            window = scores.surprise(position, position + 1 if scores.position_free else stop)
            odds = posterior(window, real).logit().clamp(*ODDS)
        best = window[:, column].topk(min(count, len(window)))
        yield best.indices, best.values, odds[best.indices, column]
        position += 1


def select(evidence: Evidence, batch_size: int) -> list[Prefix]:
    """Return at most B texts, greedily by the margins of the (position, token) pairs not yet explained.

    Args:
        evidence: The prefixes of the beam.
        batch_size: B.

    Returns:
        The texts, the best first; each ends where its sum of margins is largest.
    """
    ended: set[Prefix] = set()
    for prefix in evidence.margin:  # parents come before children
        if prefix[:-1] in ended or evidence.fades(prefix):
            ended.add(prefix)
    margins = {prefix: evidence.margins(prefix) for prefix in evidence.margin if prefix not in ended}
    explained: set[tuple[int, int]] = set()
    chosen: list[Prefix] = []

    def gain(prefix: Prefix) -> float:
        pairs = zip(enumerate(prefix), margins[prefix], strict=True)
        return sum(margin for pair, margin in pairs if pair not in explained)

    while len(chosen) < batch_size and margins:
        best = max(margins, key=gain)
        if gain(best) <= 0 and chosen:
            break
        chosen.append(best)
        del margins[best]
        explained |= set(enumerate(best))
    return chosen
