"""One bit per coordinate."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lmleak.defenses.base import Defense, global_norm, num_coordinates


@dataclass(frozen=True)
class Sign(Defense):
    """Release the sign of every coordinate; zero stays zero.

    With scale "mean", g -> (||g||_1 / P) sign(g), the compressor of EF-signSGD (Karimireddy et al., 2019)
    over all coordinates together and without its error feedback. With scale "none", g -> sign(g) in {-1, 0,
    1}, plain signSGD.
    """

    scale: str = "mean"
    """"mean" (mean magnitude over all P coordinates) or "none"."""

    name: ClassVar[str] = "sign"
    paper: ClassVar[str] = (
        "Bernstein et al., signSGD, ICML 2018; Karimireddy et al., Error Feedback Fixes SignSGD, ICML 2019"
    )
    example: ClassVar[str] = "sign(scale=mean)"

    def __post_init__(self):
        self._check_choice("scale", ("mean", "none"))

    def apply(self, gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the scaled signs."""
        scale = global_norm(gradient, 1) / num_coordinates(gradient) if self.scale == "mean" else 1.0
        return {name: tensor.sign() * scale for name, tensor in gradient.items()}
