"""What every defense is: a pure function of a gradient, with a public description and a hidden seed."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import ClassVar, NoReturn

import torch
from torch import Tensor

from lmleak.errors import ConfigError
from lmleak.gradients.shared import SharedGradient
from lmleak.specification import is_finite_number, is_whole_number


@dataclass(frozen=True)
class Release:
    """What a defense did, for the owner who holds both sides."""

    shared: SharedGradient
    """What the server receives."""
    perturbation: dict[str, Tensor]
    """delta = released - true per released parameter; what the influence function needs. Keep it private."""


class Defense(ABC):
    """A transformation of the shared gradient: ``noisy = GaussianNoise(std=1e-3, seed=0)(shared)``.

    Subclasses are frozen dataclasses. Their fields are the arguments of the specification string; a field
    ``seed`` belongs to the random ones and never appears in :meth:`describe` or ``repr``. Statistics (norm,
    RMS, ranks of magnitudes) are global, over all released coordinates together, unless a class says
    otherwise.

    A server that guesses the seed can subtract the noise. These defenses are for measuring: torch's CPU
    generator is not cryptographic and keeps 32 bits of its seed, so even a secret one can be searched.
    """

    name: ClassVar[str]
    """Name in specification strings and in :data:`lmleak.defenses.DEFENSES`."""
    paper: ClassVar[str]
    """Where the defense comes from."""
    random: ClassVar[bool] = False
    """Whether the result depends on the seed; a few defenses decide it per instance."""
    example: ClassVar[str]
    """A valid specification, shown in refusals and run by the contract tests."""

    @abstractmethod
    def apply(self, gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the defended gradient in new tensors of the same dtype and device; the input is kept."""

    def __call__(self, shared: SharedGradient) -> SharedGradient:
        """Return the released gradient, with this defense appended to its public list."""
        with torch.no_grad():
            return shared.released(self.apply(shared.gradient), self.describe())

    def release(self, shared: SharedGradient) -> Release:
        """Return the released gradient together with delta = released - true.

        Args:
            shared: The gradient before this defense.

        Returns:
            Both; parameters that were withheld are absent from the perturbation.
        """
        released = self(shared)
        with torch.no_grad():
            return Release(released, released.perturbation_from(shared))

    def describe(self) -> str:
        """Return the public description, a specification string without the seed."""
        settings = ((f.name, getattr(self, f.name)) for f in fields(self) if f.name != "seed")
        written = ", ".join(f"{key}={_written(value)}" for key, value in settings if value is not None)
        return f"{self.name}({written})" if written else self.name

    def __str__(self) -> str:
        return self.describe()

    def with_seed(self, seed: int) -> "Defense":
        """Return the same defense with another seed, or itself if it is not random."""
        return replace(self, seed=seed) if self.random else self

    def _check_number(self, argument: str, expected: str, valid: Callable[[float], bool]) -> None:
        """Normalise a numeric field to float, or refuse it saying what was ``expected``."""
        value = getattr(self, argument)
        if not is_finite_number(value) or not valid(value):
            self._refuse(argument, expected)
        object.__setattr__(self, argument, float(value))

    def _check_integer(self, argument: str, expected: str, valid: Callable[[int], bool]) -> None:
        """Normalise an integer field, or refuse it saying what was ``expected``."""
        value = getattr(self, argument)
        if not is_whole_number(value) or not valid(value):
            self._refuse(argument, expected)
        object.__setattr__(self, argument, int(value))

    def _check_choice(self, argument: str, choices: tuple) -> None:
        """Refuse a field whose value is none of ``choices``."""
        value = getattr(self, argument)
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            self._refuse(argument, " or ".join(map(str, choices)))

    def _refuse(self, argument: str, expected: str) -> NoReturn:
        value = getattr(self, argument)
        raise ConfigError(
            f"{self.name}: {argument} must be {expected}, got {value!r}; write for instance {self.example}"
        )

    def _check_seed(self) -> None:
        self._check_integer("seed", "an integer (pass it beside the specification)", lambda seed: True)


@dataclass(frozen=True)
class NoDefense(Defense):
    """The identity: the gradient as it is."""

    name: ClassVar[str] = "none"
    paper: ClassVar[str] = ""
    example: ClassVar[str] = "none"

    def apply(self, gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the same values in new tensors."""
        return {name: tensor.clone() for name, tensor in gradient.items()}


def num_coordinates(gradient: Mapping[str, Tensor]) -> int:
    """Return P, the number of coordinates of all tensors together."""
    return sum(tensor.numel() for tensor in gradient.values())


def global_norm(gradient: Mapping[str, Tensor], order: int = 2) -> float:
    """Return the l1 or l2 norm over all tensors together, accumulated in float64."""
    norms = [torch.linalg.vector_norm(t, order, dtype=torch.float64).item() for t in gradient.values()]
    return math.fsum(norm**order for norm in norms) ** (1 / order)


def _written(value: object) -> str:
    """Return ``value`` as specifications write it: identifiers bare, other text in quotes, no escapes."""
    if not isinstance(value, str):
        return repr(value)
    if value.isidentifier() and value.lower() not in ("true", "false"):
        return value
    return f'"{value}"' if "'" in value else f"'{value}'"
