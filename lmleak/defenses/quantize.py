"""Fewer bits per coordinate: uniform stochastic quantization and bfloat16."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lmleak.defenses.base import Defense
from lmleak.defenses.seeding import random_stream


@dataclass(frozen=True)
class Quantize(Defense):
    """Round every coordinate at random to one of 2^bits - 1 equally spaced levels, without bias.

    Per tensor, with m = max |g| and s = 2^(bits-1) - 1: g -> (m / s) * l, where l in {-s, ..., s} is one of
    the two integers next to y = s g / m, the upper one with probability y - floor(y). So E[released] = g, the
    error of a coordinate is below one step m / s, and 0 and the largest magnitude are exact. QSGD scales by
    the l2 norm of a bucket instead. Computed in float32, or float64 for float64 tensors; narrower dtypes
    round the result once more.
    """

    bits: int = 8
    """Bits per coordinate, 2 to 16."""
    seed: int = field(default=0, repr=False)

    name: ClassVar[str] = "quantize"
    paper: ClassVar[str] = "Alistarh et al., QSGD, NeurIPS 2017"
    random: ClassVar[bool] = True
    example: ClassVar[str] = "quantize(bits=8)"

    def __post_init__(self):
        self._check_integer("bits", "an integer from 2 to 16", lambda bits: 2 <= bits <= 16)
        self._check_seed()

    def apply(self, gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the gradient on the levels of its tensors."""
        return {name: self._quantized(name, tensor) for name, tensor in gradient.items()}

    def _quantized(self, name: str, tensor: Tensor) -> Tensor:
        if not tensor.any():  # no scale to divide by
            return tensor.clone()
        exact = tensor if tensor.dtype == torch.float64 else tensor.float()
        maximum, steps = exact.abs().max(), 2 ** (self.bits - 1) - 1
        y = exact / maximum * steps  # in this order |y| <= steps holds in floating point too
        uniform = torch.rand(
            tensor.shape, generator=random_stream(self.seed, name, self.name), dtype=torch.float64
        ).to(y.device)
        lower = y.floor()
        level = lower + (uniform < y - lower)
        return (level / steps * maximum).to(tensor.dtype)


@dataclass(frozen=True)
class Bfloat16(Defense):
    """Round every coordinate to bfloat16 (8 bits of precision, the range of float32) and back.

    Deterministic: to the nearest, as ``tensor.to(torch.bfloat16)``. Stochastic: to one of the two neighbours,
    with probabilities that make the rounding unbiased; float64 tensors are rounded to float32 first.
    """

    stochastic: bool = False
    """Whether to round at random, without bias, instead of to the nearest."""
    seed: int = field(default=0, repr=False)

    name: ClassVar[str] = "bf16"
    paper: ClassVar[str] = "Gupta et al., Deep Learning with Limited Numerical Precision, ICML 2015"
    example: ClassVar[str] = "bf16(stochastic=True)"

    @property
    def random(self) -> bool:
        """Whether the result depends on the seed."""
        return self.stochastic

    def __post_init__(self):
        self._check_choice("stochastic", (True, False))
        self._check_seed()

    def apply(self, gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the gradient at the precision of bfloat16, in its own dtype."""
        rounded = self._stochastic if self.stochastic else self._to_nearest
        return {name: rounded(name, tensor).to(tensor.dtype) for name, tensor in gradient.items()}

    @staticmethod
    def _to_nearest(name: str, tensor: Tensor) -> Tensor:
        return tensor.to(torch.bfloat16, copy=True)

    def _stochastic(self, name: str, tensor: Tensor) -> Tensor:
        """Add a uniform integer to the 16 bits that bfloat16 lacks, then cut them off: a carry rounds up."""
        dropped = torch.randint(
            1 << 16, tensor.shape, generator=random_stream(self.seed, name, self.name), dtype=torch.int32
        )
        bits = tensor.float().contiguous().view(torch.int32) + dropped.to(tensor.device)
        return (bits & ~0xFFFF).view(torch.float32)
