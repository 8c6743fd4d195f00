"""What every attack has: a name, a paper, assumptions as data, and one entry point that hands out no truth."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from lmleak.adapters.base import ModelAdapter
from lmleak.attacks.meter import Meter
from lmleak.errors import ConfigError, DataError, UnsupportedCombinationError
from lmleak.gradients.shared import SharedGradient
from lmleak.types import AttackCost, ImageReconstruction, Observation, Reconstruction


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """The threat model of an attack: what it must be told and where it applies. What is not assumed is not told.

    Every attacker knows the architecture, the weights, the tokenizer, the batch size and how the update was formed.
    """

    tasks: tuple[str, ...]
    """Tasks it works on."""
    lengths: bool
    """Lengths and padding are known."""
    labels: bool
    """Class labels are known (classification tasks)."""
    parameters: str
    """Whose gradient it reads, in words; the attack's ``check`` refuses if they are withheld."""
    decoders: bool = True
    """Works on causal models."""
    encoders: bool = True
    """Works on models that attend both ways."""
    local_steps: bool = False
    """Works on the update of several local steps, not only on the gradient of one."""
    prior: str = "none"
    """What else it knows, in words: a language model, the spread of the embedding table."""


class Attack(ABC):
    """Recovers private input from a released gradient. Concrete attacks are frozen dataclasses of options."""

    name: ClassVar[str]
    paper: ClassVar[str]
    """Source: authors, year, arXiv number."""
    assumes: ClassVar[Assumptions]

    @abstractmethod
    def recover(
        self, adapter: ModelAdapter, observation: Observation, *, seed: int
    ) -> Reconstruction | ImageReconstruction:
        """Return what can be recovered from the observation. Deterministic given the seed."""

    def check(self, adapter: ModelAdapter, shared: SharedGradient) -> None:
        """Refuse what this attack cannot be run on; concrete attacks add their own reasons.

        Args:
            adapter: The model.
            shared: The released gradient.

        Raises:
            UnsupportedCombinationError: With the threat-model or mathematical reason.
        """
        assumes = self.assumes
        if adapter.task not in assumes.tasks:
            raise UnsupportedCombinationError(
                f"attack {self.name!r} works on {', '.join(assumes.tasks)}; this model's task is {adapter.task!r}"
            )
        if assumes.lengths and not shared.layout:
            raise UnsupportedCombinationError(
                f"attack {self.name!r} assumes that lengths are known, and this gradient does not reveal them "
                "(capture with reveal_lengths=True)"
            )
        if assumes.labels and adapter.task.endswith("classification") and shared.labels is None:
            raise UnsupportedCombinationError(
                f"attack {self.name!r} assumes that labels are known, and this gradient does not reveal them "
                "(capture with reveal_labels=True)"
            )
        if shared.aggregation.steps > 1 and not assumes.local_steps:
            raise UnsupportedCombinationError(
                f"attack {self.name!r} needs the gradient of one step, and this update sums "
                f"{shared.aggregation.steps} local steps at moving weights"
            )
        if not (assumes.decoders and assumes.encoders) and adapter.is_causal != assumes.decoders:
            works, kind = ("decoders", "an encoder") if assumes.decoders else ("encoders", "a decoder")
            raise UnsupportedCombinationError(
                f"attack {self.name!r} works on {works}, and {adapter.name} is {kind} (every position sees "
                f"{'only those before it' if adapter.is_causal else 'the whole text'})"
            )

    def _check_counts(self, *options: str) -> None:
        """Refuse options that count something and are less than one."""
        for option in options:
            if getattr(self, option) < 1:
                raise ConfigError(f"attack {self.name!r}: {option} must be at least 1, got {getattr(self, option)}")

    def _check_blocks(self, adapter: ModelAdapter) -> None:
        """Refuse a model in which no transformer blocks were recognised."""
        if not adapter.blocks:
            raise UnsupportedCombinationError(f"attack {self.name!r} found no transformer blocks in {adapter.name}")

    def run(
        self, adapter: ModelAdapter, shared: SharedGradient, *, seed: int = 0
    ) -> Reconstruction | ImageReconstruction:
        """Check, strip the gradient to what the attack assumes known, and recover.

        Args:
            adapter: The model, whose weights the server knows.
            shared: The released gradient.
            seed: Seed of everything random in the attack.

        Returns:
            The reconstruction.

        Raises:
            DataError: If the gradient does not fit the model.
            ConfigError: If the seed is none.
        """
        if not isinstance(shared, SharedGradient):
            raise DataError(f"an attack sees a SharedGradient, got {type(shared).__name__}")
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise ConfigError(f"attack {self.name!r}: seed must be an integer from 0 to 2^63 - 1, got {seed!r}")
        shared.check(adapter)
        self.check(adapter, shared)
        observation = shared.observation(lengths=self.assumes.lengths, labels=self.assumes.labels)
        with Meter(adapter.device) as meter:
            recovered = self.recover(adapter, observation, seed=seed)
        return replace(recovered, cost=replace(recovered.cost, seconds=meter.seconds, peak_bytes=meter.peak_bytes))


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
