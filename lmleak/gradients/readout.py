"""Side information read off a released gradient without an attack: tokens, lengths, labels, targets, ranks.

Every readout takes the adapter and what was released (an ``Observation`` or a ``SharedGradient``), evaluates no
gradient, and says in ``reason`` how it was read or why it cannot be; ``exact`` is True only where the answer follows
from the released numbers, up to rounding.
"""

from lmleak.gradients.readout_bag import TokenBag, token_bag
from lmleak.gradients.readout_lora import LoraReadout, lora_readout
from lmleak.gradients.readout_positions import LongestText, sequence_lengths
from lmleak.gradients.readout_rank import Released, layer_ranks
from lmleak.gradients.readout_targets import ClassLabels, TargetTokens, class_labels, next_tokens

__all__ = [
    "ClassLabels",
    "LongestText",
    "LoraReadout",
    "Released",
    "TargetTokens",
    "TokenBag",
    "class_labels",
    "layer_ranks",
    "lora_readout",
    "next_tokens",
    "sequence_lengths",
    "token_bag",
]
