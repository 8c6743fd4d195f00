"""The numerical rank of a gradient matrix: how many independent inputs a linear map has seen.

Y = X W^T gives dL/dW = D^T X over the tokens of the batch, so rank(dL/dW) <= min(tokens, d_out, d_in), with equality
while the rows of X, and those of D, are independent.
"""

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
            sigma, _ = equilibrated_spectrum(wide)
            rank, _ = numerical_rank(sigma, wide.shape[1], machine_epsilon(adapter, gradient, observation.defenses))
            ranks[name] = (rank if gradient.any() else 0, *gradient.shape)
    return ranks


def machine_epsilon(adapter, gradient: Tensor, defenses: tuple[str, ...] = ()) -> float:
    """Return the coarsest epsilon of the model's arithmetic, the released numbers, and what they were rounded to."""
    rounded = [torch.finfo(torch.bfloat16).eps] if any(d.startswith("bf16") for d in defenses) else []
    return max(torch.finfo(gradient.dtype).eps, torch.finfo(adapter.dtype).eps, *rounded)


def equilibrated_spectrum(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return singular values, the largest 1, and right singular vectors of a matrix with rows scaled to unit norm.

    Scaling rows leaves the row space as it is and makes rounding equally large in all of them.
    Computed in float64.

    Args:
        rows: (m, d).

    Returns:
        (k,) and (k, d), k = min(m, d).
    """
    rows = rows.double()
    norms = rows.norm(dim=1, keepdim=True)
    rows = rows / norms.clamp(min=max(SMALLEST_ROW * norms.max().item(), TINY))
    if len(rows) > rows.shape[1]:
        rows = torch.linalg.qr(rows, mode="r").R
    _, sigma, directions = torch.linalg.svd(rows, full_matrices=False)
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
