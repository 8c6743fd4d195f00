"""The numerical rank of a gradient matrix: how many independent inputs a linear map has seen.

Y = X W^T gives dL/dW = D^T X over the tokens of the batch, so rank(dL/dW) <= min(tokens, d_out, d_in), with equality
while the rows of X, and those of D, are independent.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lmleak.gradients.shared import SharedGradient
from lmleak.types import Observation

NOISE_LEVEL = 8.0
"""Singular values below this many machine epsilons, relative to the largest, may be rounding."""
SIGNAL_LEVEL = 1.0
"""Those below this many are. Rounding of the row-equilibrated gradient was measured at 0.1 to 0.6 epsilon."""
SMALLEST_GAP = 3.0
"""Ratio of neighbouring singular values that ends the row space; within rounding it was at most 2.2."""
SMALLEST_ROW = 1e-12
"""Rows of smaller relative norm are not scaled up to unit norm: they hold no signal."""

RANGES = (32, 64, 128)
"""Sizes of the random range that the row space is looked for in."""
OVERSAMPLING = 16
"""Dimensions of the range beyond the rank."""

TINY = torch.finfo(torch.float64).tiny

Released = Observation | SharedGradient
"""What a readout looks at: the released gradient and the public facts that travel with it."""


def layer_ranks(adapter, observation: Released) -> dict[str, tuple[int, int, int]]:
    """Return (numerical rank, rows, columns) of every released gradient matrix.

    The rank of an attention input's map at block 0 counts the distinct (position, token) pairs that reach the loss.
    Void (equal to the smaller side) once that many tokens are in the batch, or under noise.

    Args:
        adapter: The model, for the precision it computes in.
        observation: The released gradient.

    Returns:
        One entry per two-dimensional parameter, in the gradient's order; rank 0 for a zero gradient.
    """
    ranks = {}
    for name, gradient in observation.gradient.items():
        if gradient.dim() == 2:
            wide = gradient if gradient.shape[0] >= gradient.shape[1] else gradient.T
            spectrum = row_spectrum(wide, machine_epsilon(adapter, gradient, observation.defenses))
            ranks[name] = (spectrum.rank if gradient.any() else 0, *gradient.shape)
    return ranks


def machine_epsilon(adapter, gradient: Tensor, defenses: tuple[str, ...] = ()) -> float:
    """Return the coarsest epsilon of the model's arithmetic, the released numbers, and what they were rounded to."""
    rounded = [torch.finfo(torch.bfloat16).eps] if any(d.startswith("bf16") for d in defenses) else []
    return max(torch.finfo(gradient.dtype).eps, torch.finfo(adapter.dtype).eps, *rounded)


@dataclass(frozen=True)
class RowSpectrum:
    """What a gradient matrix holds above rounding."""

    rank: int
    """Numerical rank r; the full width d if the spectrum has no end above rounding."""
    sigma: Tensor
    """(r,) singular values of the row-equilibrated matrix, falling, the largest 1."""
    directions: Tensor
    """(r, d) the right singular vectors, float64."""
    tail: float
    """sigma_{r+1}, the size of rounding."""


def row_spectrum(rows: Tensor, eps: float) -> RowSpectrum:
    """Return the numerical rank of a matrix with rows scaled to unit norm, and the singular vectors above it.

    Scaling rows leaves the row space as it is and makes rounding equally large in all of them. Computed in float64.
    Large ranks cost one singular value decomposition. Small ones are found in a random range (:func:`_leading`),
    which is accepted only if the spectrum ends ``OVERSAMPLING`` before the range does, and the range's last value lies
    below ``SIGNAL_LEVEL`` / 2, where no later value can be the end.

    Args:
        rows: (m, d).
        eps: Machine epsilon of the arithmetic that produced the matrix.

    Returns:
        The spectrum.
    """
    rows = _equilibrated(rows)
    for count in RANGES:
        if 4 * count > min(rows.shape):
            break
        if 16 * count < min(rows.shape):
            continue  # the next one is cheap enough beside the whole decomposition
        sketch = rows @ _random(rows, count)
        seen = torch.linalg.svdvals(torch.linalg.qr(sketch, mode="r").R)
        if seen[-1] > NOISE_LEVEL * eps * seen[0]:
            continue  # the spectrum does not end here
        sigma, directions = _leading(rows, sketch)
        rank, tail = numerical_rank(sigma, count, eps)
        if rank <= count - OVERSAMPLING and sigma[-1] < SIGNAL_LEVEL / 2 * eps:
            return RowSpectrum(rank, sigma[:rank], directions[:rank], tail)
    if len(rows) > rows.shape[1]:
        rows = torch.linalg.qr(rows, mode="r").R
    _, sigma, directions = torch.linalg.svd(rows, full_matrices=False)
    sigma = sigma / sigma[0].clamp(min=TINY)
    rank, tail = numerical_rank(sigma, rows.shape[1], eps)
    return RowSpectrum(rank, sigma[:rank], directions[:rank], tail)


def _equilibrated(rows: Tensor) -> Tensor:
    rows = rows.double()
    norms = rows.norm(dim=1, keepdim=True)
    return rows / norms.clamp(min=max(SMALLEST_ROW * norms.max().item(), TINY))


def _random(rows: Tensor, count: int) -> Tensor:
    start = torch.randn(rows.shape[1], count, dtype=rows.dtype, generator=torch.Generator().manual_seed(0))
    return start.to(rows.device)


def _leading(rows: Tensor, sketch: Tensor) -> tuple[Tensor, Tensor]:
    """Return the leading singular values, relative to the largest, and right singular vectors.

    Subspace iteration from a random range (Halko et al. 2011, algorithm 4.4): a direction i mixes with those left
    out by (sigma_{count+1} / sigma_i)^5, where rounding alone mixes it by the first power of that. Values below
    rounding come out some percent low.

    Args:
        rows: (m, d).
        sketch: (m, count) the rows times a random matrix.

    Returns:
        (count,) and (count, d).
    """
    basis = torch.linalg.qr(sketch).Q
    for _ in range(2):
        basis = torch.linalg.qr(rows @ torch.linalg.qr(rows.T @ basis).Q).Q
    _, sigma, directions = torch.linalg.svd(basis.T @ rows, full_matrices=False)
    return sigma / sigma[0].clamp(min=TINY), directions


def numerical_rank(sigma: Tensor, width: int, eps: float) -> tuple[int, float]:
    """Return the rank r and sigma_{r+1}, the size of rounding.

    The rank is where the spectrum last drops by ``SMALLEST_GAP``, from above ``SIGNAL_LEVEL`` to below ``NOISE_LEVEL``
    machine epsilons.

    Args:
        sigma: Singular values, falling, the largest 1.
        width: Number of columns d.
        eps: Machine epsilon of the arithmetic that produced the matrix.

    Returns:
        r and sigma_{r+1}; d and eps if the spectrum has no end above rounding.
    """
    if len(sigma) < width:  # fewer rows than columns: what follows the last value is exactly zero
        sigma = torch.cat([sigma, sigma.new_zeros(1)])
    drop = sigma[:-1] / sigma[1:].clamp(min=eps * eps)
    ends = (drop >= SMALLEST_GAP) & (sigma[1:] <= NOISE_LEVEL * eps) & (sigma[:-1] >= SIGNAL_LEVEL * eps)
    if not ends.any():
        return width, eps
    rank = int(ends.nonzero().max()) + 1
    return rank, max(sigma[rank].item(), eps * eps)
