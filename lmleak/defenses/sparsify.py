"""Sparsification by magnitude: pruning (how much to drop) and top-k (how much to keep)."""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor
from typing import ClassVar

from torch import Tensor

from lmleak.defenses.base import Defense, num_coordinates
from lmleak.defenses.magnitude import zero_smallest
from lmleak.errors import ConfigError


def _share_of(share: float, total: int) -> Fraction:
    """Return share * total, the share taken as the decimal it is written as: 0.29 of 100 is 29, not 28.99."""
    return Fraction(repr(share)) * total


@dataclass(frozen=True)
class Prune(Defense):
    """Set the floor(ratio * P) coordinates of smallest magnitude to zero, over all tensors together.

    ``prune(ratio=r)`` and ``topk(fraction=1-r)`` are the same function. The zeros stay visible: an attacker
    who knows the defense restricts J to the kept coordinates. The paper's code thresholds at a quantile;
    here the count is exact and ties are broken by parameter name, then position.
    """

    ratio: float
    """Share of the P coordinates that is dropped, in [0, 1)."""

    name: ClassVar[str] = "prune"
    paper: ClassVar[str] = (
        "Zhu, Liu and Han, Deep Leakage from Gradients, NeurIPS 2019; "
        "Zhang et al., Inversion Influence Function, NeurIPS 2023, pruning study"
    )
    example: ClassVar[str] = "prune(ratio=0.9)"

    def __post_init__(self):
        self._check_number("ratio", "a number in [0, 1)", lambda ratio: 0 <= ratio < 1)

    def apply(self, gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the gradient without its smallest coordinates."""
        return zero_smallest(gradient, floor(_share_of(self.ratio, num_coordinates(gradient))))


@dataclass(frozen=True)
class TopK(Defense):
    """Keep the ``k`` or ceil(fraction * P) coordinates of largest magnitude, over all tensors together.

    One round without error feedback. Ties as in :class:`Prune`.
    """

    k: int | None = None
    """How many coordinates are kept, 1 <= k <= P; give this or the fraction."""
    fraction: float | None = None
    """Share of the P coordinates that is kept, in (0, 1]."""

    name: ClassVar[str] = "topk"
    paper: ClassVar[str] = "Aji and Heafield, Sparse Communication for Distributed Gradient Descent, EMNLP 2017"
    example: ClassVar[str] = "topk(fraction=0.1)"

    def __post_init__(self):
        if (self.k is None) == (self.fraction is None):
            raise ConfigError(
                f"topk needs exactly one of k and fraction, got k={self.k!r}, fraction={self.fraction!r}; "
                f"write for instance {self.example} or topk(k=1000)"
            )
        if self.k is None:
            self._check_number("fraction", "a number in (0, 1]", lambda fraction: 0 < fraction <= 1)
        else:
            self._check_integer("k", "an integer >= 1", lambda k: k >= 1)

    def apply(self, gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the gradient with only its largest coordinates.

        Args:
            gradient: The P coordinates.

        Returns:
            The same shapes, all but the kept coordinates zero.

        Raises:
            ConfigError: If k > P.
        """
        total = num_coordinates(gradient)
        kept = ceil(_share_of(self.fraction, total)) if self.k is None else self.k
        if kept > total:
            raise ConfigError(
                f"topk cannot keep k={kept} of {total} coordinates; write k <= {total} or topk(fraction=...)"
            )
        return zero_smallest(gradient, total - kept)
