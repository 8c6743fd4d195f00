"""Perturbations of theta's shape that are made one parameter at a time, and never held as a whole."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from lmleak.defenses.noise import unit_noise
from lmleak.errors import DataError


class UnitNoise(Mapping):
    """Standard Gaussian noise on every parameter, exactly as ``GaussianNoise(std=1, seed=seed)`` adds it.

    A parameter's noise is drawn when it is asked for, the same each time, and not kept.

    Args:
        shapes: Shape per parameter name.
        dtype: Of the noise.
        seed: The defense's seed.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], dtype: torch.dtype, seed: int):
        self.shapes, self.dtype, self.seed = dict(shapes), dtype, seed

    def __getitem__(self, name: str) -> Tensor:
        return unit_noise(name, self.shapes[name], self.dtype, self.seed)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


class Perturbation(Mapping):
    """A theta-shaped mapping whose tensors are checked and moved beside x as they are asked for.

    Args:
        tensors: One per parameter name.
        shapes: Shape per parameter name.
        like: Gives dtype and device.
    """

    def __init__(self, tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], like: Tensor):
        self.tensors, self.shapes, self.like = tensors, shapes, like

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        if tensor.shape != self.shapes[name]:
            expected = tuple(self.shapes[name])
            raise DataError(f"delta of {name!r} has shape {tuple(tensor.shape)}, expected {expected}")
        return tensor.to(self.like)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)
