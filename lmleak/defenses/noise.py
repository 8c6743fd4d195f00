"""Additive noise, Gaussian and Laplace, parametrised by its standard deviation so that the two compare."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lmleak.defenses.base import Defense, global_norm, num_coordinates
from lmleak.defenses.seeding import random_stream
from lmleak.lookup import lookup

# Normal numbers are made in groups of 16, the last group of a draw from its end: drawn in pieces of a multiple of 16,
# none of them shorter, they are what one draw would be. Halves of a piece are as long as torch computes in one thread:
# several parameters are drawn at a time (lmleak.influence.perturbation).
GROUP, PIECE = 16, 2**16


def unit_noise(
    name: str, shape: Sequence[int], dtype: torch.dtype, seed: int, distribution: str = "gaussian"
) -> Tensor:
    """Return independent noise of mean 0 and variance 1 for one parameter.

    A defense of absolute standard deviation s adds exactly ``s * unit_noise(...)``, so a sweep over noise
    levels needs one draw per parameter. Drawn on the CPU in float64 and then rounded: the noise is the same
    for every device, and for every dtype up to rounding. Drawn in pieces, so that only the result is held: the
    noise of a 30522 x 768 table takes 97 MiB in float32, and 268 by one draw in float64.

    Args:
        name: The parameter's name; with the seed it selects the random stream.
        shape: Shape of the parameter.
        dtype: Dtype of the result.
        seed: The defense's seed.
        distribution: "gaussian" or "laplace".

    Returns:
        Noise of ``shape`` on the CPU.

    Raises:
        ConfigError: If the distribution is unknown.
    """  # noqa: DOC502 (raised by lookup)
    draw = lookup("noise distribution", distribution, _DISTRIBUTIONS)
    generator = random_stream(seed, name, distribution)
    noise = torch.empty(tuple(shape), dtype=dtype)
    count = max(1, noise.numel() // PIECE)
    sizes = [PIECE] * (count - 1) + [noise.numel() - PIECE * (count - 1)]
    for piece in noise.view(-1).split(sizes):
        piece.copy_(draw(len(piece), generator))
    return noise


def _gaussian(size: int, generator: torch.Generator) -> Tensor:
    """Return the numbers of torch.randn in float64, up to its last digit, in two thirds of its time (torch 2.13)."""
    uniform = lambda count: torch.rand(count, generator=generator, dtype=torch.float64)
    if size < GROUP:
        return torch.randn(size, generator=generator, dtype=torch.float64)
    noise = uniform(size)
    _box_muller(noise[: size - size % GROUP])
    if size % GROUP:
        noise[-GROUP:] = _box_muller(uniform(GROUP))
    return noise


def _box_muller(uniform: Tensor) -> Tensor:
    """Return normal numbers in the place of uniform ones, (n,): sqrt(-2 log(1 - u)) times cos and sin of 2 pi u'.

    In vectors, 8 and 8 as torch pairs them; it makes float64 numbers one by one.
    """
    pairs = uniform.view(-1, 2, GROUP // 2)
    radius, angle = pairs.transpose(0, 1).clone(memory_format=torch.contiguous_format)
    radius = radius.neg_().add_(1).log_().mul_(-2).sqrt_()
    angle.mul_(2 * math.pi)
    pairs[:, 1] = torch.sin(angle).mul_(radius)
    pairs[:, 0] = angle.cos_().mul_(radius)
    return uniform


def _laplace(size: int, generator: torch.Generator) -> Tensor:
    """Invert the distribution function: -sign(w) log(1 - |w|) / sqrt(2), w uniform in (-1, 1)."""
    uniform = torch.rand(size, generator=generator, dtype=torch.float64)  # multiples of 2^-53 in [0, 1)
    w = 2 * uniform - 1 + 2**-53  # the centre of each cell: symmetric, and |w| < 1 keeps the logarithm finite
    return -w.sign() * torch.log1p(-w.abs()) / 2**0.5


_DISTRIBUTIONS = {"gaussian": _gaussian, "laplace": _laplace}


@dataclass(frozen=True)
class _AdditiveNoise(Defense):
    """g + std * unit_noise, independent for every coordinate."""

    std: float
    """Standard deviation per coordinate, in the unit below."""
    unit: str = "absolute"
    """"absolute": the gradient's own unit; "rms": multiples of the root mean square of the incoming gradient
    over all its coordinates (1 = noise as large as the gradient)."""
    seed: int = field(default=0, repr=False)

    random: ClassVar[bool] = True
    distribution: ClassVar[str]

    def __post_init__(self):
        self._check_number("std", "a finite number >= 0", lambda std: std >= 0)
        self._check_choice("unit", ("absolute", "rms"))
        self._check_seed()

    def apply(self, gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return g + s z with z the unit noise and s the absolute standard deviation."""
        std = self.absolute_std(gradient)
        return {name: tensor + std * self._noise(name, tensor) for name, tensor in gradient.items()}

    def absolute_std(self, gradient: Mapping[str, Tensor]) -> float:
        """Return s, ``std`` in the gradient's own unit; 0 for an all-zero gradient if the unit is "rms"."""
        if self.unit == "absolute":
            return self.std
        return self.std * global_norm(gradient) / num_coordinates(gradient) ** 0.5

    def _noise(self, name: str, tensor: Tensor) -> Tensor:
        return unit_noise(name, tensor.shape, tensor.dtype, self.seed, self.distribution).to(tensor.device)


@dataclass(frozen=True)
class GaussianNoise(_AdditiveNoise):
    """Add independent Gaussian noise N(0, std^2) to every coordinate.

    Noise on the mean gradient of the batch, as the inversion influence function assumes; it is no
    differential privacy by itself, which needs per-example clipping as well.
    """

    name: ClassVar[str] = "gaussian"
    paper: ClassVar[str] = "Zhu, Liu and Han, Deep Leakage from Gradients, NeurIPS 2019, noisy gradients"
    example: ClassVar[str] = "gaussian(std=0.1, unit=rms)"
    distribution: ClassVar[str] = "gaussian"


@dataclass(frozen=True)
class LaplaceNoise(_AdditiveNoise):
    """Add independent Laplace noise of standard deviation ``std`` to every coordinate.

    The scale of the density exp(-|z| / b) / (2 b) is b = std / sqrt(2).
    """

    name: ClassVar[str] = "laplace"
    paper: ClassVar[str] = "Zhu, Liu and Han, Deep Leakage from Gradients, NeurIPS 2019, noisy gradients"
    example: ClassVar[str] = "laplace(std=0.1, unit=rms)"
    distribution: ClassVar[str] = "laplace"
