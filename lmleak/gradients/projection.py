"""A gradient of millions of numbers as a few hundred features: seeded random projection, or principal components."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from lmleak.errors import DataError

NONZEROS = 4  # s: entries per column of the random projection
CHUNK = 2**20  # coordinates whose part of the projection is drawn at once, so that memory does not grow with p


def random_projection(gradient: Sequence[Tensor], features: int, *, layer: str, seed: int) -> Tensor:
    """Project gradients at random, preserving inner products on average.

    z_i = R g_i with R (k, p): every column has s = 4 entries +-1/sqrt(s), one in each block of k/s rows, at a place
    and with a sign drawn independently. E <R g, R h> = <g, h> and Var <R g, R h> <= (|g|^2 |h|^2 + <g, h>^2) / k, as
    for Gaussian entries, at s additions per coordinate in place of k, and R is never stored: it is drawn again from
    the seed, part by part. A layer of at most k numbers is left as it is. Source: Kane and Nelson 2014,
    arXiv:1012.1577, the block construction; they draw with limited independence, here independently.

    Args:
        gradient: The layer's parameters, (n, *shape) each; p numbers per example together.
        features: k, a multiple of s.
        layer: Name of the layer; with the seed it decides R, whatever other layers there are.
        seed: Seed of R.

    Returns:
        Features (n, min(k, p)) in float32, on the CPU. On a GPU, the order of additions may move the last digits.
    """
    flat = [value.flatten(1) for value in gradient]
    if sum(value.shape[1] for value in flat) <= features:
        return torch.cat(flat, 1).float().cpu()
    block = features // NONZEROS
    out = flat[0].new_zeros(len(flat[0]), features)
    for number, value in enumerate(flat):
        for start in range(0, value.shape[1], CHUNK):
            part = value[:, start : start + CHUNK]
            generator = torch.Generator().manual_seed(_number(f"{seed}/{layer}/{number}/{start}"))
            draw = torch.randint(2 * block, (NONZEROS, part.shape[1]), generator=generator)
            place, sign = (draw // 2).to(part.device), (draw % 2 * 2 - 1).to(part)
            for j in range(NONZEROS):
                out.scatter_add_(1, (j * block + place[j]).expand(len(part), -1), part * sign[j])
    return (out / NONZEROS**0.5).float().cpu()


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def principal_components(gradient: Sequence[Tensor], features: int) -> tuple[Tensor, Tensor]:
    """Return the mean and the leading principal axes of some gradients, from their n x n Gram matrix.

    Args:
        gradient: The layer's parameters, (n, *shape) each; p numbers per example together.
        features: k.

    Returns:
        Mean (p,) and orthonormal axes (min(k, n - 1, p), p), float32 on the CPU; directions without variance are
        left out.

    Raises:
        DataError: If all gradients are equal.
    """
    flat = torch.cat([value.flatten(1) for value in gradient], 1).double().cpu()
    mean = flat.mean(0)
    centred = flat - mean
    values, vectors = torch.linalg.eigh(centred @ centred.T)
    values, vectors = values.flip(0), vectors.flip(1)
    # The square root of float32's rounding: the Gram matrix of float32 gradients holds no smaller direction.
    rank = int((values > 1e-7 * values[0]).sum()) if values[0] > 0 else 0
    if not rank:
        raise DataError(f"the first {len(flat)} gradients of a layer are all equal; they have no principal component")
    kept = min(features, rank)
    axes = (vectors[:, :kept].T @ centred) / values[:kept, None].sqrt()
    return mean.float(), axes.float()


def project_on(gradient: Sequence[Tensor], mean: Tensor, axes: Tensor) -> Tensor:
    """Return the coordinates (n, k) of gradients about the mean (p,) in the axes (k, p), float32 on the CPU."""
    flat = torch.cat([value.flatten(1) for value in gradient], 1).float().cpu()
    return (flat - mean) @ axes.T
