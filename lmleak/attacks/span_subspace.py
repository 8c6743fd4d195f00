"""The row space of a linear map's gradient: which inputs the map can have seen.

Y = X W^T gives dL/dW = D^T X with D = dL/dY, (tokens, d_out), and X the inputs of all tokens of the batch,
(tokens, d). The rows of dL/dW lie in the span of the rows of X, and while the rows of D are independent and tokens < d
the two spans are equal (Petrov et al. 2024, arXiv:2405.15586). An input was in the batch only if it lies in that span.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmleak.adapters.structure import weight_rows
from lmleak.errors import UnsupportedCombinationError
from lmleak.gradients.readout_rank import TINY, row_spectrum

FORWARD = 40.0
"""Machine epsilons by which two forward passes over the same tokens may differ, relative to an input's norm."""
ACCEPTED = 2.0
"""Multiple of the expected rounding up to which an input counts as one of the batch."""
LARGEST_RESIDUAL = 0.02
"""No input counts as one of the batch beyond this, whatever rounding would allow. It matters where a token's gradient
is itself near rounding (its text ends in what the model predicts with certainty): its direction is then known so badly
that similar tokens would pass for it."""


@dataclass(frozen=True)
class RowSpace:
    """An orthonormal basis of the inputs a linear map can have seen, with its numerical quality."""

    basis: Tensor
    """(d, r), float64: right singular vectors v_1..v_r of the row-equilibrated gradient."""
    sigma: Tensor
    """(r,) their singular values, the largest 1."""
    tail: float
    """sigma_{r+1}: the size of rounding in the gradient."""
    eps: float
    """Machine epsilon of the arithmetic that produced the gradient."""

    @property
    def rank(self) -> int:
        """Dimension r of the span."""
        return self.basis.shape[1]

    @property
    def width(self) -> int:
        """Dimension d of the space."""
        return self.basis.shape[0]

    def residual(self, x: Tensor) -> Tensor:
        """Return ||x - V V^T x|| / ||x|| over the last axis, in [0, 1], computed in float64."""
        x = x.double()
        outside = x - (x @ self.basis) @ self.basis.T
        return outside.norm(dim=-1) / x.norm(dim=-1).clamp(min=TINY)

    def rounding(self, x: Tensor) -> Tensor:
        """Return the residual that rounding is expected to leave if x was in the batch.

        An input of the batch is x = G^T c, the smallest such c being U diag(1/sigma) V^T x, so an error E of the
        gradient G moves it out of the span by ||E^T c||, at most sigma_{r+1} ||diag(1/sigma) V^T x||. The attacker's
        own forward pass adds some epsilons. Relative to ||x||:

            rounding(x) = sigma_{r+1} ||diag(1/sigma) V^T x|| / ||x|| + FORWARD eps

        Tokens of real batches were measured at 0.4 times this at most, others at 100 times and more. A single bound
        sigma_{r+1} / sigma_r for all x is up to a thousand times larger, and useless near full rank.
        """
        x = x.double()
        error = self.tail * ((x @ self.basis) / self.sigma).norm(dim=-1) / x.norm(dim=-1).clamp(min=TINY)
        return error + FORWARD * self.eps

    def accepts(self, x: Tensor) -> Tensor:
        """Return whether x lies in the span, up to ``ACCEPTED`` times the expected rounding."""
        return self.residual(x) <= (ACCEPTED * self.rounding(x)).clamp(max=LARGEST_RESIDUAL)

    def largest_accepted(self) -> float:
        """Return the largest residual that any x can be accepted with."""
        return min(ACCEPTED * (self.tail / self.sigma[-1].item() + FORWARD * self.eps), LARGEST_RESIDUAL)

    def null(self, x: Tensor) -> float:
        """Return the median residual of inputs that were drawn at random.

        Args:
            x: (..., d) inputs that are unlikely to have been in the batch.

        Returns:
            The residual that chance gives.

        Raises:
            UnsupportedCombinationError: If most of them are accepted, so that the span tells nothing.
        """
        null = self.residual(x).median().item()
        if self.rank >= self.width or self.accepts(x).double().mean() > 0.5:
            raise UnsupportedCombinationError(
                f"the released gradient has rank {self.rank} at hidden size {self.width}, and random tokens lie in "
                f"its row space too (median relative distance {null:.1e}). The attack needs fewer tokens in the batch "
                "than the hidden size (tokens >= hidden size: the row space is everything), and no noise"
            )
        return null


def stacked_gradient(adapter, gradient: Mapping[str, Tensor], paths: Sequence[str]) -> Tensor | None:
    """Return the released weight gradients of maps that read one tensor, stacked by rows: [dQ; dK; dV].

    Args:
        adapter: The model.
        gradient: Released gradient per parameter name.
        paths: Module paths of the maps.

    Returns:
        (sum of d_out, d_in) on the model's device, in the gradient's precision; None if none is released.
    """
    rows = [
        weight_rows(adapter.model.get_submodule(path), gradient[f"{path}.weight"]).to(adapter.device)
        for path in paths
        if f"{path}.weight" in gradient
    ]
    return torch.cat(rows) if rows else None


def row_space(rows: Tensor, eps: float) -> RowSpace:
    """Return the numerical row space of a gradient, in float64.

    Every row is scaled to unit norm first. That leaves the row space as it is, and makes rounding equally large in all
    rows: those of Q and K are often orders of magnitude smaller than those of V and drown in its rounding otherwise
    (measured: the smallest true singular value grows by a factor of 3 to 15 relative to rounding).

    The rank is that of :func:`lmleak.gradients.readout_rank.numerical_rank`.

    Args:
        rows: (m, d).
        eps: Machine epsilon of the arithmetic that produced the gradient.

    Returns:
        The row space; of rank d if the spectrum has no end above rounding.

    Raises:
        UnsupportedCombinationError: If the gradient is zero.
    """
    if not rows.any():
        raise UnsupportedCombinationError(
            "the released gradient of the attention inputs is zero, so its row space says nothing"
        )
    spectrum = row_spectrum(rows, eps)
    return RowSpace(spectrum.directions.T.contiguous(), spectrum.sigma, spectrum.tail, eps)
