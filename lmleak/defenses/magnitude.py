"""Exact selection of the smallest magnitudes among any number of coordinates, with bounded extra memory."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

CHUNK = 1 << 20  # coordinates handled at once; the extra memory is a few times this, whatever P is


def zero_smallest(gradient: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Set the ``count`` coordinates of smallest magnitude, over all tensors together, to zero.

    Equals a stable sort of |g| over the tensors in alphabetical order of name, each flattened: among equal
    magnitudes the earlier coordinate goes first. So the number is exact and the order of the dictionary is
    irrelevant. Unlike torch.quantile it has no limit on the number of coordinates, and unlike a sort it needs
    no copy of them beyond the result.

    Args:
        gradient: Tensors of any floating dtype, in P coordinates together.
        count: How many to set to zero, 0 <= count <= P.

    Returns:
        New contiguous tensors under the same names, in the same order.
    """
    zeroed = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in gradient.items()}
    if count == 0:
        return zeroed
    wide = torch.float64 if any(t.dtype == torch.float64 for t in gradient.values()) else torch.float32
    threshold, ties = _select(zeroed, count, wide)
    for chunk in _chunks(zeroed):
        bits = _magnitude_bits(chunk, wide)
        drop = bits < threshold
        tied = (bits == threshold).nonzero().squeeze(1)[:ties]
        chunk.masked_fill_(drop.index_fill_(0, tied, True), 0)
        ties -= len(tied)
    return zeroed


def _select(gradient: Mapping[str, Tensor], rank: int, wide: torch.dtype) -> tuple[int, int]:
    """Find the magnitude of 1-based ``rank`` in ascending order by radix selection, 16 bits per pass.

    Returns:
        The bit pattern of that magnitude, and how many of the coordinates that share it have a rank up to
        ``rank``.
    """
    prefix = 0
    for shift in range(torch.finfo(wide).bits - 16, -1, -16):
        histogram = torch.zeros(1 << 16, dtype=torch.int64)
        for chunk in _chunks(gradient):
            leading = _magnitude_bits(chunk, wide) >> shift
            digits = leading[leading >> 16 == prefix] & 0xFFFF
            histogram += torch.bincount(digits, minlength=1 << 16).cpu()
        cumulative = histogram.cumsum(0)
        digit = int(torch.searchsorted(cumulative, rank))
        rank -= int(cumulative[digit] - histogram[digit])
        prefix = prefix << 16 | digit
    return prefix, rank


def _magnitude_bits(chunk: Tensor, wide: torch.dtype) -> Tensor:
    """Return |chunk| as integers in the same order: IEEE numbers >= 0 sort like their bit patterns."""
    return chunk.to(wide).abs().view(torch.int64 if wide == torch.float64 else torch.int32)


def _chunks(tensors: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """Yield flat views of at most ``CHUNK`` coordinates, tensors in alphabetical order."""
    for name in sorted(tensors):
        yield from tensors[name].view(-1).split(CHUNK)
