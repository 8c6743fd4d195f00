"""Several defenses, one after the other."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lmleak.defenses.base import Defense
from lmleak.defenses.seeding import derived_seed
from lmleak.errors import ConfigError
from lmleak.gradients.shared import SharedGradient


@dataclass(frozen=True)
class Chain(Defense):
    """Apply ``parts`` from left to right; written with "+" in specification strings.

    The perturbation of a chain is its total: released - true. The released gradient lists every part. Chains
    inside a chain are flattened.
    """

    parts: tuple[Defense, ...]
    """The defenses in order of application, at least one."""

    name: ClassVar[str] = "chain"
    example: ClassVar[str] = "clip(max_norm=1.0)+gaussian(std=0.01)"

    def __post_init__(self):
        flat = []
        for part in self.parts:
            if not isinstance(part, Defense):
                raise ConfigError(f"a chain is made of defenses, got {part!r}; write for instance Chain((Clip(1.0),))")
            flat += part.parts if isinstance(part, Chain) else (part,)
        if not flat:
            raise ConfigError("a chain needs at least one defense, got none; write NoDefense()")
        streams = [(part.name, part.seed) for part in flat if part.random]
        repeated = next((name for name, seed in streams if streams.count((name, seed)) > 1), None)
        if repeated is not None:
            raise ConfigError(
                f"two {repeated!r} parts of a chain have the same seed, so their noise would be identical "
                "instead of independent; give them different seeds"
            )
        object.__setattr__(self, "parts", tuple(flat))

    @property
    def random(self) -> bool:
        """Whether any part depends on its seed."""
        return any(part.random for part in self.parts)

    @property
    def paper(self) -> str:
        """The papers of the parts."""
        return "; ".join(part.paper for part in self.parts if part.paper)

    def apply(self, gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the gradient after all parts."""
        for part in self.parts:
            gradient = part.apply(gradient)
        return dict(gradient)

    def __call__(self, shared: SharedGradient) -> SharedGradient:
        """Return the released gradient, with every part appended to its public list."""
        for part in self.parts:
            shared = part(shared)
        return shared

    def describe(self) -> str:
        """Return the descriptions of the parts, joined by "+"."""
        return "+".join(part.describe() for part in self.parts)

    def with_seed(self, seed: int) -> "Chain":
        """Return the chain with part number i re-seeded by ``derived_seed(seed, i)``, counted from 0."""
        return Chain(seeded_parts(self.parts, seed))


def seeded_parts(parts: tuple[Defense, ...], seed: int) -> tuple[Defense, ...]:
    """Give every part its own seed, derived from ``seed`` and its position."""
    return tuple(part.with_seed(derived_seed(seed, i)) for i, part in enumerate(parts))
