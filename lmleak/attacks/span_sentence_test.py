"""What a sentence is tested by: one map behind the first attention, and the row space of its gradient."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmleak.attacks.span_layers import Site, dependence, forward, linear_groups, random_ids
from lmleak.attacks.span_subspace import RowSpace
from lmleak.errors import UnsupportedCombinationError

CHUNK = 2**22
"""Numbers per layer and forward pass: sentences x tokens x width."""
NEARLY = 0.75
"""A site that excludes at least this share of the best is good enough; earlier sites cost less."""
FLOOR = 1e3
"""Residuals below this many machine epsilons count as this in the score: exact is exact, rounding must not decide."""


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

    def log_residual(self, x: Tensor) -> Tensor:
        """Return the log of the relative distance from the span, (...) for inputs (..., d).

        Computed in the model's precision, which suffices above ``floor``.
        """
        basis = self.span.basis.to(x.dtype)
        residual = (x - (x @ basis) @ basis.T).norm(dim=-1) / x.norm(dim=-1)
        return residual.clamp(min=self.floor).log()

    def score(self, x: Tensor) -> Tensor:
        """Return the mean log residual over positions, (n,) for the inputs of n sentences (n, T, d).

        Against the mean residual it rewards a position that fits exactly; found as often or more in trials.
        """
        return self.log_residual(x).mean(dim=1)


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
