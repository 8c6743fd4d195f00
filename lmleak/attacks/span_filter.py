"""Which tokens were where: the first-layer filter of the span attack, over the whole vocabulary.

The attention input of block 0 depends on one token v and its position p only. For a norm over their sum it is

    f(v, p) = s_vp * (u_v + w_p) + shift,    u_v = gain * (A_v - mean A_v),    w_p = gain * (P_p - mean P_p),
    s_vp = (mean((A'_v + P'_p)^2) + epsilon)^(-1/2)      with primes where the mean is removed (RMSNorm keeps it),

so ||Q^T f||^2 and ||f||^2 need inner products per token and per position, and one between both: matrix products
instead of one projection per pair. Cancellation limits this form to relative distances of about 5e-3 in float32, so
it only proposes; what it proposes is run through the model itself and projected in float64.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lmleak.adapters.precision import KeepDouble
from lmleak.attacks.span_layers import forward, random_ids
from lmleak.attacks.span_subspace import RowSpace
from lmleak.errors import UnsupportedModelError

PROPOSAL = 1e-2
"""Relative distance below which the separable form proposes a token."""
CHUNK = 2**21
"""Numbers per intermediate tensor."""


@dataclass(frozen=True)
class SeparableNorm:
    """f(v, p) = gain * normalised(A_v + P_p) + shift, read off a norm module by probing it."""

    path: str
    """The norm module."""
    gain: Tensor
    shift: Tensor
    """(d,) each."""
    epsilon: float
    centred: bool
    """Whether the mean is removed (LayerNorm) or not (RMSNorm)."""

    @classmethod
    def probe(cls, path: str, module: nn.Module, width: int) -> "SeparableNorm | None":
        """Return the form of a norm module, whatever its parameters are called; None if it states no epsilon."""
        epsilon = getattr(module, "eps", getattr(module, "variance_epsilon", None))
        if not isinstance(epsilon, float):
            return None
        parameter = next(module.parameters(), torch.zeros(0))
        flat = torch.ones(1, 1, width, dtype=parameter.dtype, device=parameter.device)
        signs = flat.clone()
        signs[..., ::2] = -1.0
        with torch.no_grad(), KeepDouble():
            shift, of_flat, of_signs = (module(z)[0, 0] for z in (0.0 * flat, flat, signs))
        centred = bool((of_flat - shift).norm() < 1e-3 * (of_signs - shift).norm())
        plain = cls(path, torch.ones_like(shift), torch.zeros_like(shift), epsilon, centred)
        return cls(path, (of_signs - shift) / plain(signs)[0, 0], shift, epsilon, centred)

    def primed(self, z: Tensor) -> Tensor:
        """Return z with its mean removed where the norm removes it."""
        return z - z.mean(-1, keepdim=True) if self.centred else z

    def __call__(self, z: Tensor) -> Tensor:
        """Return the norm of z, (..., d)."""
        z = self.primed(z)
        return self.gain * z * (z.square().mean(-1, keepdim=True) + self.epsilon).rsqrt() + self.shift

    def squared_residual(self, tokens: Tensor, positions: Tensor, basis: Tensor) -> Tensor:
        """Return 1 - ||Q^T f||^2 / ||f||^2 for all pairs, from Gram terms.

        The tokens are read twice: in one product with everything they meet, and squared. Where the mean is removed, it
        is removed from what they meet: (a - mean a) . w = a . (w - mean w).

        Args:
            tokens: (V, d) what a token adds before the norm, A.
            positions: (L, d) what a position adds, P.
            basis: (d, r) Q.

        Returns:
            (V, L).
        """
        p = self.primed(positions)
        width, count = p.shape[1], len(p)
        q = self.gain[:, None] * basis  # (d, r)
        met = [p, self.primed(self.gain.square() * p), self.primed(self.gain * self.shift)[None], self.primed(q.T)]
        sizes = [count, count, 1, q.shape[1], 1, 1]
        met += [torch.full_like(p[:1], 1 / width), self.gain.square()[None]]
        with_p, scaled_with_p, with_shift, coordinates, mean, with_square = (tokens @ torch.cat(met).T).split(sizes, 1)
        squares, scaled_squares = (
            tokens.square() @ torch.stack([torch.ones_like(self.gain), self.gain.square()], 1)
        ).split(1, 1)
        if self.centred:
            squares = squares - width * mean.square()
            scaled_squares = scaled_squares + mean.square() * self.gain.square().sum() - 2 * mean * with_square
        spread = (squares + p.square().sum(-1) + 2 * with_p) / width
        scale = (spread.clamp(min=0) + self.epsilon).rsqrt()
        whole = _squared_norm(
            scale, scaled_squares + (self.gain * p).square().sum(-1) + 2 * scaled_with_p,
            with_shift + (self.gain * p) @ self.shift, self.shift,
        )  # fmt: skip
        p, shift = p @ q, self.shift @ basis  # from here on in the coordinates of the basis
        inside = _squared_norm(
            scale, coordinates.square().sum(-1, keepdim=True) + p.square().sum(-1) + 2 * (coordinates @ p.T),
            (coordinates @ shift)[:, None] + p @ shift, shift,
        )  # fmt: skip
        return 1 - inside / whole.clamp(min=torch.finfo(whole.dtype).tiny)


def _squared_norm(scale: Tensor, squared: Tensor, with_shift: Tensor, shift: Tensor) -> Tensor:
    """Return ||s z + shift||^2 from s, ||z||^2, z . shift, all (V, L), and the shift."""
    return scale * (scale * squared + 2 * with_shift) + shift.square().sum()


@dataclass(frozen=True)
class Survivors:
    """Tokens whose first-layer input at one position lies in the span."""

    ids: Tensor
    """(n,), by rising residual."""
    residual: Tensor
    """(n,) relative distance from the span."""


class FirstLayerFilter:
    """The tokens at every position that the gradient of block 0 allows.

    Args:
        adapter: The model.
        path: The first linear map of block 0.
        span: Its row space.
        seed: Chooses the tokens that the setup is checked on.
        separable: Whether to try the separable form; the whole vocabulary is run through the model otherwise.

    Raises:
        UnsupportedModelError: If the input of block 0 depends on more than token and position.
        UnsupportedCombinationError: If the span excludes no token.
    """

    def __init__(self, adapter, path: str, span: RowSpace, *, seed: int, separable: bool = True):
        self.adapter, self.path, self.span = adapter, path, span
        limit = adapter.max_positions()
        length = 8 if limit is None else min(8, limit)
        ids = random_ids(adapter, 32, length, seed=seed).to(adapter.device)
        truth = forward(adapter, ids, stop_at=path)  # (32, length, d)
        alone = forward(adapter, ids[:, :1].expand(-1, length), stop_at=path)
        tolerance = 1e3 * torch.finfo(adapter.dtype).eps
        mixed = torch.cat([ids[:, 1:], ids[:, :1]], dim=1)
        mixed[:, -1] = ids[:, -1]  # the same token at the same place, in other company
        error = (forward(adapter, mixed, stop_at=path)[:, -1] - truth[:, -1]).norm() / truth[:, -1].norm()
        if not error < tolerance:
            raise UnsupportedModelError(
                f"the attention input of block 0 of {adapter.name} depends on more than one token and its position "
                f"(relative change {error:.1e}), so tokens cannot be tested one by one"
            )
        self.position_free = bool((alone - alone[:, :1]).norm() < tolerance * alone.norm())
        span.null(truth)
        self.proposal = max(PROPOSAL, span.largest_accepted())
        self.norm = self._separable_norm(ids, truth, tolerance) if separable else None

    def _separable_norm(self, ids: Tensor, truth: Tensor, tolerance: float) -> SeparableNorm | None:
        """Return the separable form if it reproduces the model on random pairs, else None."""
        found = self._norm_before(ids)
        norm = SeparableNorm.probe(*found, truth.shape[-1]) if found else None
        if norm is None:
            return None
        tokens, positions = self._token_parts(norm, ids.reshape(-1)), self._position_parts(norm, ids.shape[1])
        pairs = tokens.reshape(*ids.shape, -1) + positions
        if not (norm(pairs) - truth).norm() < tolerance * truth.norm():
            return None
        squared = norm.squared_residual(tokens, positions, self.span.basis.to(tokens))
        proposed = squared.reshape(*ids.shape, -1).diagonal(dim1=1, dim2=2)
        error = (proposed - self.span.residual(truth).square()).abs().max()
        return norm if error < 0.5 * self.proposal**2 else None

    def _norm_before(self, ids: Tensor) -> tuple[str, nn.Module] | None:
        """Return the module whose output is the input of the map, if a module's output is."""
        outputs: dict[str, Tensor] = {}
        handles = [
            module.register_forward_hook(lambda module, _, output, path=path: outputs.update({path: output}))
            for path, module in self.adapter.model.named_modules()
            if not any(True for _ in module.children())
        ]
        try:
            x = forward(self.adapter, ids, stop_at=self.path)
        finally:
            for handle in handles:
                handle.remove()
        for path, output in outputs.items():
            if isinstance(output, Tensor) and output.data_ptr() == x.data_ptr():
                return path, self.adapter.model.get_submodule(path)
        return None

    def _token_parts(self, norm: SeparableNorm, tokens: Tensor) -> Tensor:
        """Return what tokens add before the norm, (n, d), position 0 included."""
        return forward(self.adapter, tokens[:, None], stop_at=norm.path)[:, 0]

    def _position_parts(self, norm: SeparableNorm, length: int) -> Tensor:
        """Return what positions add before the norm beyond position 0, (length, d)."""
        repeated = forward(self.adapter, random_ids(self.adapter, 1, 1, seed=0).expand(1, length), stop_at=norm.path)[
            0
        ]
        return repeated - repeated[:1]

    def survivors(self, start: int, stop: int) -> list[Survivors]:
        """Return the survivors at positions ``start`` to ``stop`` - 1."""
        proposed = self._proposed(start, stop)
        nothing = (proposed[:0], torch.zeros(0, dtype=torch.float64, device=proposed.device))
        kept = [[nothing] for _ in range(start, stop)]
        chunk = max(1, CHUNK // (stop * self.span.width))
        for ids in proposed.split(chunk) if len(proposed) else ():
            x = forward(self.adapter, ids[:, None].expand(-1, stop), stop_at=self.path)[:, start:]
            residual, accepted = self.span.residual(x), self.span.accepts(x)  # (n, stop - start)
            for i in range(stop - start):
                kept[i].append((ids[accepted[:, i]], residual[accepted[:, i], i]))
        found = []
        for parts in kept:
            ids, residual = (torch.cat(column) for column in zip(*parts, strict=True))
            order = residual.argsort(stable=True)
            found.append(Survivors(ids[order], residual[order]))
        return found

    def _proposed(self, start: int, stop: int) -> Tensor:
        """Return the tokens worth running through the model, at any of the positions."""
        vocabulary = torch.arange(self.adapter.vocabulary_size, device=self.adapter.device)
        if self.norm is None:
            return vocabulary
        basis = self.span.basis.to(self.adapter.dtype)
        positions = self._position_parts(self.norm, stop)[start:]
        proposed = []
        for ids in vocabulary.split(max(1, CHUNK // self.span.width)):
            squared = self.norm.squared_residual(self._token_parts(self.norm, ids), positions, basis)
            proposed.append(ids[(squared <= self.proposal**2).any(dim=1)])
        return torch.cat(proposed)


def by_position(tokens: FirstLayerFilter, *, window: int = 32) -> Iterator[Survivors]:
    """Yield the survivors of position 0, 1, ...; the sequences end where there is none.

    A model without positions at the first layer (rotary, ALiBi) has one set, which is yielded forever.

    Args:
        tokens: The filter.
        window: Positions per pass over the vocabulary.

    Yields:
        Survivors with at least one token.
    """
    limit = tokens.adapter.max_positions()
    if tokens.position_free:
        everywhere = tokens.survivors(0, 1)[0]
        position = 0
        while len(everywhere.ids) and (limit is None or position < limit):
            yield everywhere
            position += 1
        return
    start = 0
    while limit is None or start < limit:
        stop = start + window if limit is None else min(start + window, limit)
        for found in tokens.survivors(start, stop):
            if not len(found.ids):
                return
            yield found
        start = stop
