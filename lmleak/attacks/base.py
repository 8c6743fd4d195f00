"""What every attack has: a name, a paper, assumptions as data, and one entry point that hands out no truth."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from lmleak.adapters.base import ModelAdapter
from lmleak.errors import DataError, UnsupportedCombinationError
from lmleak.gradients.shared import SharedGradient
from lmleak.types import AttackCost, Observation, Reconstruction


class Attack(ABC):
    """Recovers private input from a released gradient. Concrete attacks are frozen dataclasses of options.

    The class attributes state the threat model; what is not assumed is not handed over.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    """Source: authors, year, arXiv number."""
    tasks: ClassVar[tuple[str, ...]]
    """Tasks it works on."""
    needs_lengths: ClassVar[bool]
    """Assumes that lengths and padding are known."""
    needs_labels: ClassVar[bool]
    """Assumes that class labels are known (classification tasks)."""

    @abstractmethod
    def recover(self, adapter: ModelAdapter, observation: Observation, *, seed: int) -> Reconstruction:
        """Return what can be recovered from the observation. Deterministic given the seed."""

    def check(self, adapter: ModelAdapter, shared: SharedGradient) -> None:
        """Refuse what this attack cannot be run on; concrete attacks add their own reasons.

        Args:
            adapter: The model.
            shared: The released gradient.

        Raises:
            UnsupportedCombinationError: With the threat-model or mathematical reason.
        """
        if adapter.task not in self.tasks:
            raise UnsupportedCombinationError(
                f"attack {self.name!r} works on {', '.join(self.tasks)}; this model's task is {adapter.task!r}"
            )
        if self.needs_lengths and not shared.layout:
            raise UnsupportedCombinationError(
                f"attack {self.name!r} assumes that lengths are known, and this gradient does not reveal them "
                "(capture with reveal_lengths=True)"
            )
        if self.needs_labels and adapter.task.endswith("classification") and shared.labels is None:
            raise UnsupportedCombinationError(
                f"attack {self.name!r} assumes that labels are known, and this gradient does not reveal them "
                "(capture with reveal_labels=True)"
            )

    def run(self, adapter: ModelAdapter, shared: SharedGradient, *, seed: int = 0) -> Reconstruction:
        """Check, strip the gradient to what the attack assumes known, and recover.

        Args:
            adapter: The model, whose weights the server knows.
            shared: The released gradient.
            seed: Seed of everything random in the attack.

        Returns:
            The reconstruction.

        Raises:
            DataError: If the gradient does not fit the model.
        """
        if not isinstance(shared, SharedGradient):
            raise DataError(f"an attack sees a SharedGradient, got {type(shared).__name__}")
        shared.check(adapter)
        self.check(adapter, shared)
        observation = shared.observation(lengths=self.needs_lengths, labels=self.needs_labels)
        return self.recover(adapter, observation, seed=seed)


def reconstruction(
    attack: str,
    adapter,
    sequences: Sequence[Sequence[int]],
    confidence: Sequence[Sequence[float]],
    *,
    cost: AttackCost,
    stopped: str,
    objective: float | None = None,
    embeddings: tuple[Tensor, ...] | None = None,
    notes: tuple[str, ...] = (),
) -> Reconstruction:
    """Return a Reconstruction of token sequences, special tokens removed and texts decoded.

    Args:
        attack: Name of the attack.
        adapter: The text adapter, for special tokens and decoding.
        sequences: Recovered token ids, special ones included.
        confidence: One number per token of each sequence.
        cost: What was spent.
        stopped: Why the attack ended.
        objective: Final objective.
        embeddings: Recovered inputs per sequence, special tokens included.
        notes: What the user should know.

    Returns:
        The reconstruction.
    """
    special = adapter.special_ids()
    kept = [
        [(int(t), float(c)) for t, c in zip(ids, conf, strict=True) if int(t) not in special]
        for ids, conf in zip(sequences, confidence, strict=True)
    ]
    token_ids = tuple(tuple(t for t, _ in row) for row in kept)
    return Reconstruction(
        attack=attack,
        token_ids=token_ids,
        texts=tuple(adapter.decode(ids) for ids in token_ids),
        confidence=tuple(tuple(c for _, c in row) for row in kept),
        cost=cost,
        stopped=stopped,
        objective=objective,
        embeddings=embeddings,
        notes=notes,
    )
