"""What a model family does differently. A family that is not listed here runs with the generic defaults.

To add one, add an entry. What is asked of it is little, because x enters by a hook (``adapters.text``) and the
layers are found by structure (``adapters.structure``).
"""

from dataclasses import dataclass

POSITIONS_FROM_MASK = "mask"
POSITIONS_AUTOMATIC = "automatic"


@dataclass(frozen=True)
class Family:
    """The quirks of one architecture family."""

    positions: str = POSITIONS_FROM_MASK
    """Who skips left padding when positions are counted: ``POSITIONS_FROM_MASK``, the adapter passes
    position_ids; ``POSITIONS_AUTOMATIC``, the model does it itself and must not be given any."""


FAMILIES: dict[str, Family] = {
    "bert": Family(),
    "distilbert": Family(),
    "roberta": Family(),
    "gpt2": Family(),
    "opt": Family(positions=POSITIONS_AUTOMATIC),
    "gpt_neox": Family(),
    "llama": Family(),
}
