"""Clipping the norm of the gradient."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lmleak.defenses.base import Defense, global_norm

STABILISER = 1e-6  # Opacus adds the same to the norm


@dataclass(frozen=True)
class Clip(Defense):
    """Scale the whole gradient to a global l2 norm of at most ``max_norm``.

    g -> g * min(1, C / (||g|| + 1e-6)), with C = ``max_norm`` and the norm over all coordinates together, in
    float64. This is the factor of Opacus; because of the 1e-6 a clipped gradient ends just below C. It clips
    the mean gradient of the batch once, not each example's gradient as DP-SGD does. The direction is
    unchanged, so it hides nothing from an attacker who matches directions (cosine).
    """

    max_norm: float
    """C, in the gradient's own unit."""

    name: ClassVar[str] = "clip"
    paper: ClassVar[str] = "Abadi et al., Deep Learning with Differential Privacy, CCS 2016, norm clipping"
    example: ClassVar[str] = "clip(max_norm=1.0)"

    def __post_init__(self):
        self._check_number("max_norm", "a finite number > 0", lambda norm: norm > 0)

    def apply(self, gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the gradient times min(1, C / (norm + 1e-6))."""
        factor = min(1.0, self.max_norm / (global_norm(gradient) + STABILISER))
        return {name: tensor * factor for name, tensor in gradient.items()}
