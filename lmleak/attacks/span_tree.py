"""Which tokens belong together: the decoder tree of the span attack.

In a causal model the input of a map behind the first attention depends on a token and all tokens before it. A prefix
is grown by every token that the first layer allows next, and kept if that input at the new position lies in its span.
The earlier positions were tested when they were new.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lmleak.attacks.span_filter import Survivors
from lmleak.attacks.span_layers import Prefixes, PrefixModel
from lmleak.attacks.span_subspace import RowSpace

CHUNK = 2**24
"""Numbers held per pass: rows x tokens x width."""

REPEATS = 4
"""How often in a row a token may add nothing. Under rotary positions a text of one repeated token looks the same at
every position (attention averages equal values), so "x x x" cannot be told from "x" until another token follows."""

Prefix = tuple[int, ...]


@dataclass(frozen=True)
class PrefixTree:
    """Every prefix that the gradient allows."""

    residual: dict[Prefix, float]
    """Relative distance from the span at each prefix's last position, in order of discovery."""
    rows: int
    """How many (prefix, next token) pairs were run."""
    cut_at: int | None
    """First position where more prefixes were alive than the beam holds; None if never."""

    def leaves(self) -> list[Prefix]:
        """Return the prefixes that nothing continues."""
        continued = {prefix[:-1] for prefix in self.residual}
        return [prefix for prefix in self.residual if prefix not in continued]


def grow_tree(model: PrefixModel, span: RowSpace, survivors: Iterable[Survivors], *, beam: int) -> PrefixTree:
    """Grow all prefixes, position by position, until none continues.

    Args:
        model: The decoder up to the map that sees the prefix.
        span: Row space of that map.
        survivors: Tokens allowed at position 0, 1, ...
        beam: How many prefixes are kept alive; those of smallest residual stay.

    Returns:
        The tree.
    """
    accepted: dict[Prefix, float] = {}
    silent: dict[Prefix, int] = {}  # prefixes that add nothing to their parents: how many in a row
    rows, cut_at, alive = 0, None, None
    for position, allowed in enumerate(survivors):
        children = _continue(model, span, alive, allowed.ids)
        rows += len(allowed.ids) * (1 if alive is None else len(alive.residual))
        if len(children.residual) > beam:
            cut_at = position if cut_at is None else cut_at
            children = children.select(children.residual.argsort(stable=True)[:beam])
        alive = children
        ids = list(map(tuple, alive.prefixes.ids.tolist()))
        for prefix, adds_nothing in zip(ids, alive.silent.tolist(), strict=True):
            if adds_nothing:
                silent[prefix] = silent.get(prefix[:-1], 0) + 1
        accepted |= zip(ids, alive.residual.tolist(), strict=True)
        going_on = [i for i, prefix in enumerate(ids) if silent.get(prefix, 0) < REPEATS]
        if not going_on:
            break
        alive = alive.select(torch.tensor(going_on, device=alive.residual.device))
    return PrefixTree(_without_silent_ends(accepted, silent), rows, cut_at)


def _without_silent_ends(accepted: dict[Prefix, float], silent: dict[Prefix, int]) -> dict[Prefix, float]:
    """Drop prefixes that add nothing to their parents, unless one that does follows."""
    spoken = {prefix[: t + 1] for prefix in accepted if prefix not in silent for t in range(len(prefix))}
    return {prefix: residual for prefix, residual in accepted.items() if prefix in spoken}


@dataclass(frozen=True)
class _Candidates:
    """Prefixes of one length, what the map sees at their last position, and whether that is accepted."""

    prefixes: Prefixes
    x: Tensor
    residual: Tensor
    silent: Tensor
    """Whether x is that of the prefix without its last token."""

    def select(self, index: Tensor) -> "_Candidates":
        return _Candidates(self.prefixes.select(index), self.x[index], self.residual[index], self.silent[index])


def _continue(model: PrefixModel, span: RowSpace, alive: _Candidates | None, tokens: Tensor) -> _Candidates:
    """Return all continuations whose new input lies in the span."""
    count = 1 if alive is None else len(alive.residual)
    length = 1 if alive is None else alive.prefixes.ids.shape[1] + 1
    parents = torch.arange(count, device=tokens.device).repeat_interleave(len(tokens))
    following = tokens.repeat(count)
    parts = []
    chunk = max(16, CHUNK // (length * span.width))
    for who, what in zip(parents.split(chunk), following.split(chunk), strict=True):
        children, x = model.extend(None if alive is None else alive.prefixes, who, what)
        residual, inside = span.residual(x), span.accepts(x).nonzero()[:, 0]
        silent = torch.zeros_like(residual, dtype=torch.bool)
        if alive is not None:
            silent = (x - alive.x[who]).norm(dim=-1) < 1e2 * torch.finfo(x.dtype).eps * x.norm(dim=-1)
        parts.append(_Candidates(children, x, residual, silent).select(inside))
    return _Candidates(
        Prefixes.join([p.prefixes for p in parts]), torch.cat([p.x for p in parts]),
        torch.cat([p.residual for p in parts]), torch.cat([p.silent for p in parts]),
    )  # fmt: skip
