"""Which tokens belong together, under noise: a beam of prefixes, scored at every map behind the first attention.

The input of such a map depends on a token and all tokens before it. A prefix and its next token gain the surprise
(:mod:`lmleak.attacks.span_score`) of the token at the first layer plus that of the new input at every such map.
Nothing is rejected; how much a continuation beats others says how sure it is, and where a text ends.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional as F

from lmleak.attacks.span_layers import Prefixes, PrefixModel, Site, forward, random_ids
from lmleak.attacks.span_score import Null, SoftRowSpace
from lmleak.attacks.span_targets import SPREAD, HeadScore, within
from lmleak.attacks.span_tree import CHUNK, Prefix

NULL_TEXTS = 256
"""Random texts that the scores of a site are calibrated on."""
NULL_LENGTH = 32
"""Their length; later positions share the calibration of the last."""
REPEATED = 0.8
"""Worth of a token at a position, for each time that a prefix of the beam holds it already."""
FADED = 0.2
"""Share of the median surprise of a prefix's earlier inputs below which a token is no part of its text."""
TAIL = (0.75, 0.90)
"""Quantiles that the gain of wrong continuations is extrapolated from; variants of a text share its next token, so
that more than one continuation in a hundred is nearly right."""
SAMPLE = 2**23
"""Pairs that they are taken from; torch.quantile takes no more than twice as many."""
FEW = 8
"""Prefixes from which on tokens are compared over prefixes."""
PATIENCE = 3
"""Positions in a row without a continuation beyond chance that end the search."""


@dataclass(frozen=True)
class Beam:
    """Prefixes of equal length and what of their inputs is new, position by position."""

    prefixes: Prefixes | None
    """n prefixes of t tokens; None for the empty one."""
    innovations: tuple[Tensor, ...]
    """Per site (n, t, d), orthonormal along t: each input without what the prefix's earlier inputs span."""

    def __len__(self) -> int:
        """Return n."""
        return 1 if self.prefixes is None else len(self.prefixes.ids)

    @property
    def length(self) -> int:
        """Tokens t."""
        return 0 if self.prefixes is None else self.prefixes.ids.shape[1]


@dataclass(frozen=True)
class Continuations:
    """Every prefix of a beam with every candidate token, those of one prefix together."""

    prefixes: Prefixes
    innovations: tuple[Tensor, ...]
    """Per site (k, d) unit vectors."""
    nats: Tensor
    """(k,) surprise at the new position, summed over the sites."""

    @staticmethod
    def join(parts: "list[Continuations]") -> "Continuations":
        """Return the continuations of several parts of a beam."""
        return Continuations(
            Prefixes.join([p.prefixes for p in parts]),
            tuple(map(torch.cat, zip(*(p.innovations for p in parts), strict=True))),
            torch.cat([p.nats for p in parts]),
        )

    def beam(self, before: Beam, kept: Tensor) -> Beam:
        """Return the beam of those at ``kept``."""
        parents = kept // (len(self.nats) // len(before))
        return Beam(
            self.prefixes.select(kept),
            tuple(
                torch.cat([old[parents], new[kept, None]], dim=1)
                for old, new in zip(before.innovations, self.innovations, strict=True)
            ),
        )


class SiteScores:
    """Surprise of prefixes, summed over the maps of the first blocks that see a whole prefix.

    Scored is the part of an input that the same prefix's earlier inputs do not span (Gram-Schmidt along the prefix).
    For a text of the batch it lies in the row space like the input itself; a repeated token, or garbage after a text's
    end, whose input resembles one that is in the batch, has nothing left to show.

    Args:
        adapter: The decoder.
        spaces: The sites and their soft row spaces.
        deepest: The site that a forward pass reaches last.
        seed: Chooses the random texts of the null distributions.
    """

    def __init__(self, adapter, spaces: Mapping[Site, SoftRowSpace], deepest: Site, *, seed: int):
        self.adapter, self.paths, self.spaces = adapter, [site.paths[0] for site in spaces], list(spaces.values())
        self.deepest = deepest.paths[0]
        self.model = PrefixModel(adapter, self.deepest)
        limit = adapter.max_positions()
        texts = random_ids(adapter, NULL_TEXTS, min(NULL_LENGTH, limit or NULL_LENGTH, adapter.width // 2), seed=seed)
        energies: list[list[Tensor]] = [[] for _ in self.paths]
        for ids in texts.split(32):
            with _inputs(adapter, self.paths) as seen:
                seen[self.deepest] = forward(adapter, ids, stop_at=self.deepest)
            for path, space, found in zip(self.paths, self.spaces, energies, strict=True):
                x = seen[path].reshape(*ids.shape, -1)
                found.append(space.energy(torch.linalg.qr(x.mT).Q.mT))
        self.nulls = [Null.fit(torch.cat(parts)) for parts in energies]

    def start(self) -> Beam:
        """Return the beam of the empty prefix."""
        return Beam(None, tuple(space.basis.new_zeros(1, 0, len(space.basis)) for space in self.spaces))

    def extend(self, beam: Beam, tokens: Tensor) -> Continuations:
        """Return all continuations of a beam by the tokens (C,)."""
        size = max(1, CHUNK // ((beam.length + 1) * self.adapter.width * len(tokens)))
        parts = torch.arange(len(beam), device=tokens.device).split(size)
        return Continuations.join([self._extend(beam, part, tokens) for part in parts])

    def _extend(self, beam: Beam, part: Tensor, tokens: Tensor) -> Continuations:
        parents, following = part.repeat_interleave(len(tokens)), tokens.repeat(len(part))
        with _inputs(self.adapter, self.paths) as seen:
            longer, seen[self.deepest] = self.model.extend(beam.prefixes, parents, following)
        innovations, nats = [], 0.0
        for path, space, null, before in zip(self.paths, self.spaces, self.nulls, beam.innovations, strict=True):
            x = seen[path].reshape(len(parents), -1, seen[path].shape[-1])[:, -1]
            x = F.normalize(x.double(), dim=-1).reshape(len(part), len(tokens), -1)
            for _ in range(2 if beam.length else 0):  # twice is enough for orthogonality in floating point
                x = x - (x @ before[part].mT) @ before[part]
            x = F.normalize(x.flatten(0, 1), dim=-1)
            innovations.append(x)
            nats = nats + null.at(min(beam.length, len(null.upper) - 1)).surprise(space.energy(x))
        return Continuations(longer, tuple(innovations), nats)


@contextmanager
def _inputs(adapter, paths: list[str]) -> Iterator[dict[str, Tensor]]:
    """Yield a dictionary that receives the last input of each named map."""
    seen: dict[str, Tensor] = {}
    handles = [
        adapter.model.get_submodule(path).register_forward_pre_hook(
            lambda module, arguments, path=path: seen.update({path: arguments[0]})
        )
        for path in paths
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Evidence:
    """Every prefix that the beam kept."""

    margin: dict[Prefix, float]
    """Log odds that a prefix's last token is real, from its first-layer posterior and the surprise of the pair."""
    nats: dict[Prefix, float]
    """Surprise of each prefix's last input at the sites behind the first attention."""
    rows: int
    """How many (prefix, next token) pairs were run."""
    stopped: str

    def fades(self, prefix: Prefix) -> bool:
        """Return whether the last input of a prefix fits far worse than those before: then its text has ended."""
        earlier = [self.nats[prefix[:t]] for t in range(2, len(prefix))]  # the first position is unlike the others
        return bool(earlier) and self.nats[prefix] < FADED * median(earlier)

    def margins(self, prefix: Prefix) -> list[float]:
        """Return the margin of each token of a prefix."""
        return [self.margin[prefix[: t + 1]] for t in range(len(prefix))]


def search(
    sites: SiteScores,
    allowed: Iterator[tuple[Tensor, Tensor, Tensor]],
    *,
    beam: int,
    batch_size: int,
    head: HeadScore | None = None,
) -> Evidence:
    """Grow the beam position by position until no continuation is better than chance.

    A token that is real at a position continues one of B texts, so a continuation's odds by chance are those of its
    token divided by B.

    Args:
        sites: Scores of prefixes.
        allowed: Candidate tokens, their first-layer surprise and log odds, (C,) each, for position 0, 1, ...
        beam: How many prefixes are kept.
        batch_size: B.
        head: Scores of next tokens, where the head's gradient is released.

    Returns:
        The prefixes and their evidence.
    """
    margin: dict[Prefix, float] = {}
    nats: dict[Prefix, float] = {}
    alive = sites.start()
    gains = torch.zeros(1, 0)
    rows = idle = 0
    for position, (tokens, first, prior) in enumerate(allowed):
        children = sites.extend(alive, tokens)
        gain = within(first) + children.nats.reshape(len(alive), -1)
        if head is not None and alive.prefixes is not None:
            gain = gain + head.following(alive.prefixes.ids)[:, tokens]
        rows += gain.numel()
        margins = surprise_of_pairs(gain) - SPREAD + prior - math.log(batch_size)
        gains = torch.cat([gains.to(gain).repeat_interleave(len(tokens), 0), gain.reshape(-1, 1)], dim=1)
        kept = _diverse(children.prefixes.ids, gains, beam)
        alive, gains = children.beam(alive, kept), gains[kept]
        chosen = margins.reshape(-1)[kept]
        ids = list(map(tuple, alive.prefixes.ids.tolist()))
        margin |= zip(ids, chosen.tolist(), strict=True)
        nats |= zip(ids, children.nats[kept].tolist(), strict=True)
        by_chance = math.log(gain.numel() / batch_size) - SPREAD + min(0.0, prior.max().item())
        idle = 0 if chosen.max() > by_chance else idle + 1
        if idle == PATIENCE:
            return Evidence(margin, nats, rows, f"no continuation beyond chance at position {position + 1 - PATIENCE}")
    return Evidence(margin, nats, rows, "all positions of the model are filled")


def surprise_of_pairs(gain: Tensor) -> Tensor:
    """Return -log P(a wrong continuation of a prefix gains at least as much), in nats.

    What makes a continuation right is neither its token nor its prefix but that they belong together: the median of
    each prefix over tokens, and then of each token over prefixes, is subtracted. Nearly all pairs are wrong and tell
    what chance leaves: an exponential tail between the two quantiles ``TAIL``, one for all pairs of a step.

    Args:
        gain: (prefixes, candidates) nats.

    Returns:
        Shaped like ``gain``.
    """
    above = gain - gain.median(dim=1, keepdim=True).values
    if len(gain) >= FEW:
        above = above - above.median(dim=0, keepdim=True).values
    lower, upper = torch.quantile(above.reshape(-1)[:SAMPLE], above.new_tensor(TAIL))
    decay = math.log((1 - TAIL[0]) / (1 - TAIL[1])) / (upper - lower).clamp(min=1e-6)
    return decay * (above - upper) - math.log(1 - TAIL[1])


def _diverse(ids: Tensor, gains: Tensor, beam: int) -> Tensor:
    """Return the indices of the prefixes that are kept: the best, each judged by what the others have not shown.

    Taken one by one; a (position, token) pair counts ``REPEATED`` times as much for every prefix taken that holds it.
    Else the variants of the text with the largest gradient crowd out the other texts.

    Args:
        ids: (n, t) prefixes.
        gains: (n, t) nats of each of their tokens.
        beam: How many are kept.

    Returns:
        At most ``beam`` indices, in order of choice.
    """
    gains = gains.clamp(min=0)
    discount = torch.ones_like(gains)
    free = torch.ones_like(gains[:, 0], dtype=torch.bool)
    chosen = []
    for _ in range(min(beam, len(ids))):
        best = int((gains * discount).sum(1).masked_fill(~free, -1.0).argmax())
        chosen.append(best)
        free[best] = False
        discount = torch.where(ids == ids[best], REPEATED * discount, discount)
    return torch.tensor(chosen, device=ids.device)
