r"""Which inputs a linear map has seen, read off the gradients of its LoRA weights alone.

Y = X (W + s B A)^T, A (r, d), B (d_out, r), D = dL/dY (tokens, d_out):

    dL/dB = s D^T (X A^T)      rows in span{A x_i}, a subspace of R^r
    dL/dA = s (D B)^T X        rows in span{x_i}, a subspace of R^d, of rank <= min(r, tokens)

With fewer tokens b than r, A x lies in the row space of dL/dB for every x of the batch, and only by coincidence for
another; that holds from the first step on, when B = 0 and dL/dA = 0. Once B has moved, dL/dA tells x itself, in all d
dimensions, as long as its rank is below r. For b >= r both are void: R^r is full, and the rows of dL/dA span a part of
span{x_i} only.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lmleak.gradients.readout_rank import TINY, Released, machine_epsilon, row_spectrum

ACCEPTED = 8.0
"""Multiple of the expected rounding up to which an input counts as one of the batch.

Measured on a tiny GPT-2 in float32 (rank 14, three texts, three steps of training): inputs of the batch at up to 3.1
on one kind of processor and below 2 on another; the last tokens, which are outside the span, at 446 and more.
"""
FORWARD = 40.0
"""Machine epsilons by which two forward passes over the same tokens may differ, relative to an input's norm."""
LARGEST_RESIDUAL = 0.02
"""No input counts as one of the batch beyond this, whatever rounding would allow."""


@dataclass(frozen=True)
class ProjectedRowSpace:
    """The span of z = M x over the inputs x of the batch."""

    projection: Tensor | None
    """M (k, d): the weight A; None for the identity."""
    basis: Tensor
    """(k, rank) float64, orthonormal."""
    sigma: Tensor
    """(rank,) singular values of the row-equilibrated gradient, the largest 1."""
    tail: float
    """The size of rounding in it."""
    eps: float

    def residual(self, x: Tensor) -> Tensor:
        """Return the relative distance of M x from the span, in [0, 1], over the last axis of x (..., d)."""
        z = self._project(x)
        return (z - (z @ self.basis) @ self.basis.T).norm(dim=-1) / z.norm(dim=-1).clamp(min=TINY)

    def accepts(self, x: Tensor) -> Tensor:
        """Return whether M x lies in the span, up to ``ACCEPTED`` times the rounding expected for this x."""
        z = self._project(x)
        size = z.norm(dim=-1).clamp(min=TINY)
        rounding = self.tail * ((z @ self.basis) / self.sigma).norm(dim=-1) / size + FORWARD * self.eps
        return self.residual(x) <= (ACCEPTED * rounding).clamp(max=LARGEST_RESIDUAL)

    def _project(self, x: Tensor) -> Tensor:
        return x.double() if self.projection is None else x.double() @ self.projection.T


@dataclass(frozen=True)
class LoraReadout:
    """What the LoRA gradients of one linear map tell of its inputs."""

    path: str
    """The map."""
    spaces: tuple[ProjectedRowSpace, ...]
    """Spans that an input of the batch must lie in: by dL/dA, by dL/dB, or both; empty if void."""
    ranks: tuple[int, int]
    """Numerical ranks of dL/dA and dL/dB."""
    size: int
    """r."""
    reason: str
    """What the test rests on, or why it is void."""

    def residual(self, x: Tensor) -> Tensor:
        """Return the largest relative distance from the spans, (...) for x (..., d)."""
        return torch.stack([space.residual(x) for space in self.spaces]).amax(0)

    def accepts(self, x: Tensor) -> Tensor:
        """Return whether x can have been an input: boolean (...) for x (..., d). All True if void."""
        if not self.spaces:
            return torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
        return torch.stack([space.accepts(x) for space in self.spaces]).all(0)


def lora_readout(adapter, observation: Released) -> dict[str, LoraReadout]:
    """Return what the released LoRA gradients tell of the inputs of every map that has LoRA weights.

    Args:
        adapter: The model (PEFT), whose A the server knows.
        observation: The released gradient.

    Returns:
        One readout per map and set of LoRA weights, by the map's path; empty if no LoRA gradient is released.
    """
    weights = dict(adapter.model.named_parameters())
    found: dict[str, LoraReadout] = {}
    for name, gradient in observation.gradient.items():
        path, marker, rest = name.partition(".lora_B.")
        if not marker:
            continue
        name_a = f"{path}.lora_A.{rest}"
        a = weights[name_a].detach().double()
        eps = machine_epsilon(adapter, gradient)
        by_b = _space(gradient.to(a.device), eps)
        by_a = _space(observation.gradient[name_a].to(a.device), eps) if name_a in observation.gradient else None
        found[path] = _readout(path, a, by_a, by_b)
    return found


def _readout(path: str, a: Tensor, by_a: ProjectedRowSpace | None, by_b: ProjectedRowSpace | None) -> LoraReadout:
    size = len(a)
    ranks = tuple(0 if space is None else space.basis.shape[1] for space in (by_a, by_b))
    spaces, words = [], []
    # Both ranks count tokens; where B has hardly moved, dL/dA misses some to rounding, and would reject true inputs.
    if 0 < ranks[0] < size and (by_b is None or ranks[0] == ranks[1]):
        spaces.append(by_a)
        words.append(f"dL/dA has rank {ranks[0]} < r = {size}")
    if 0 < ranks[1] < size:
        spaces.append(replace(by_b, projection=a))
        words.append(f"dL/dB has rank {ranks[1]} < r = {size}")
    reason = "; ".join(words) or (
        f"void: at r = {size} the ranks are {ranks[0]} of dL/dA and {ranks[1]} of dL/dB: as many tokens, or zero"
    )
    return LoraReadout(path, tuple(spaces), ranks, size, reason)


def _space(gradient: Tensor, eps: float) -> ProjectedRowSpace | None:
    """Return the row space of a gradient matrix; None if it is zero."""
    if not gradient.any():
        return None
    spectrum = row_spectrum(gradient, eps)
    return ProjectedRowSpace(None, spectrum.directions.T.contiguous(), spectrum.sigma, spectrum.tail, eps)
