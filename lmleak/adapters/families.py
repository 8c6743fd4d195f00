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
    position_offset_is_pad_plus_one: bool = False
    """Position rows up to the padding id are never used (RoBERTa)."""

    def reserved_positions(self, config) -> int:
        """Return how many rows of the position table hold no position."""
        return (config.pad_token_id or 0) + 1 if self.position_offset_is_pad_plus_one else 0


FAMILIES: dict[str, Family] = {
    "bert": Family(),
    "distilbert": Family(),
    "roberta": Family(positions=POSITIONS_AUTOMATIC, position_offset_is_pad_plus_one=True),
    "gpt2": Family(),
    "opt": Family(positions=POSITIONS_AUTOMATIC),
    "gpt_neox": Family(),
    "llama": Family(),
}
