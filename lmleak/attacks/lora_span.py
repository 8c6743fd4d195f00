"""The span attack on LoRA gradients: exact texts while the batch has fewer tokens than the LoRA rank r."""

import time
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lmleak.adapters.base import ModelAdapter
from lmleak.attacks.base import Assumptions, Attack, reconstruction
from lmleak.attacks.span_filter import FirstLayerFilter, by_position
from lmleak.attacks.span_layers import PrefixModel
from lmleak.attacks.span_tree import grow_tree
from lmleak.errors import UnsupportedCombinationError
from lmleak.gradients.readout_lora import LoraReadout, lora_readout
from lmleak.gradients.shared import SharedGradient
from lmleak.types import AttackCost, Observation, Reconstruction


@dataclass(frozen=True)
class LoraSpace:
    """The spans of all LoRA maps that read one tensor, as the span attack's filter and tree use a row space."""

    readouts: tuple[LoraReadout, ...]
    width: int

    @property
    def rank(self) -> int:
        """Largest rank among the gradients."""
        return max(max(readout.ranks) for readout in self.readouts)

    def residual(self, x: Tensor) -> Tensor:
        """Return the largest relative distance from the spans."""
        return torch.stack([readout.residual(x) for readout in self.readouts]).amax(0)

    def accepts(self, x: Tensor) -> Tensor:
        """Return whether x lies in all spans."""
        return torch.stack([readout.accepts(x) for readout in self.readouts]).all(0)

    def largest_accepted(self) -> float:
        """Return 0: the separable form, which needs one basis in R^d, is not used."""
        return 0.0

    def null(self, x: Tensor) -> float:
        """Return the median residual of random inputs.

        Args:
            x: (..., d) inputs that are unlikely to have been in the batch.

        Returns:
            The residual that chance gives.

        Raises:
            UnsupportedCombinationError: If most of them are accepted.
        """
        if self.accepts(x).double().mean() > 0.5:
            raise UnsupportedCombinationError(
                "random tokens lie in the span of the LoRA gradients too: it tells nothing"
            )
        return self.residual(x).median().item()


@dataclass(frozen=True)
class LoraSpan(Attack):
    """Texts but for their last tokens, exactly, from the gradients of LoRA weights alone.

    For decoders, while the batch has fewer tokens than the LoRA rank r.

    As the span attack (Petrov et al. 2024, arXiv:2405.15586, section 5.4, takes dL/dA of r = 256 once B has moved),
    with the tests of :mod:`lmleak.gradients.readout_lora`, which hold from the first step on: tokens are those whose
    first-layer attention input x has A x in the row space of dL/dB; prefixes are tested likewise at block 1. The last
    token of a language model's text reaches no loss and is not recovered.

    Confidence per token: 1 - the relative distance from the span at block 1, in [0, 1].
    """

    name: ClassVar[str] = "lora-span"
    paper: ClassVar[str] = "Petrov et al. 2024, arXiv:2405.15586 (DAGER), by dL/dB"
    assumes: ClassVar[Assumptions] = Assumptions(
        tasks=("causal-lm", "sequence-classification"), lengths=False, labels=False,
        parameters="the LoRA weights at the attention inputs of blocks 0 and 1", encoders=False,
    )  # fmt: skip

    beam: int = 256
    """How many prefixes are kept alive per position."""

    def __post_init__(self):
        self._check_counts("beam")

    def check(self, adapter: ModelAdapter, shared: SharedGradient) -> None:
        """Refuse gradients without LoRA weights at both sites, or with a full span.

        Args:
            adapter: The model.
            shared: The released gradient.
        """
        super().check(adapter, shared)
        for block in (0, 1):
            _space(adapter, lora_readout(adapter, shared), block)

    def recover(self, adapter: ModelAdapter, observation: Observation, *, seed: int) -> Reconstruction:
        """Return the texts that the spans allow.

        Args:
            adapter: The model.
            observation: The released gradient and the batch size.
            seed: Chooses the random tokens that the setup is checked on.

        Returns:
            The reconstruction.
        """
        begin = time.perf_counter()
        readouts = lora_readout(adapter, observation)
        first, second = (_space(adapter, readouts, block) for block in (0, 1))
        tokens = FirstLayerFilter(adapter, adapter.attention_inputs(0)[0], first, seed=seed, separable=False)
        tree = grow_tree(
            PrefixModel(adapter, adapter.attention_inputs(1)[0]), second, by_position(tokens), beam=self.beam
        )
        leaves = sorted(tree.leaves(), key=lambda leaf: (-len(leaf), tree.residual[leaf]))[: observation.batch_size]
        confidence = [
            [min(1.0, max(0.0, 1 - tree.residual[leaf[: t + 1]])) for t in range(len(leaf))] for leaf in leaves
        ]
        notes = [f"{readout.path}: {readout.reason}" for readout in (*first.readouts, *second.readouts)]
        if adapter.task == "causal-lm":
            notes.append("the last token of a text is no input that reaches the loss, and was left out")
        return reconstruction(
            self.name, adapter, leaves, confidence,
            cost=AttackCost(time.perf_counter() - begin, iterations=tree.rows),
            stopped="no candidate left", notes=tuple(notes),
        )  # fmt: skip


def _space(adapter, readouts: dict[str, LoraReadout], block: int) -> LoraSpace:
    """Return the spans at the attention input of a block."""
    paths = [path.removesuffix(".base_layer") for path in adapter.attention_inputs(block)]
    there = [readouts[path] for path in paths if path in readouts]
    if not there:
        raise UnsupportedCombinationError(
            f"attack 'lora-span' needs the gradient of LoRA weights at the attention input of block {block} "
            f"({', '.join(paths)}); released are LoRA gradients of {', '.join(readouts) or 'no map'}"
        )
    telling = tuple(readout for readout in there if readout.spaces)
    if not telling:
        raise UnsupportedCombinationError(f"attack 'lora-span': {there[0].path}: {there[0].reason}")
    return LoraSpace(telling, adapter.width)
