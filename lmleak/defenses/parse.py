"""Defenses by name: ``parse_defense("clip(max_norm=1)+gaussian(std=0.01)", seed=0)``."""

from lmleak.defenses.base import Defense, NoDefense
from lmleak.defenses.chain import Chain, seeded_parts
from lmleak.defenses.clip import Clip
from lmleak.defenses.hide_layers import HideLayers
from lmleak.defenses.noise import GaussianNoise, LaplaceNoise
from lmleak.defenses.quantize import Bfloat16, Quantize
from lmleak.defenses.sign import Sign
from lmleak.defenses.sparsify import Prune, TopK
from lmleak.specification import build_parts

DEFENSES: dict[str, type[Defense]] = {
    "none": NoDefense,
    "gaussian": GaussianNoise,
    "laplace": LaplaceNoise,
    "clip": Clip,
    "prune": Prune,
    "topk": TopK,
    "sign": Sign,
    "quantize": Quantize,
    "bf16": Bfloat16,
    "hide-layers": HideLayers,
}
"""Every defense by name."""


def parse_defense(spec: str, seed: int = 0) -> Defense:
    """Return the defense that a specification string describes.

    Args:
        spec: "none", "gaussian(std=0.1, unit=rms)", "clip(max_norm=1)+gaussian(std=0.01)", ...; what
            :meth:`Defense.describe` writes. Seeds are no part of it, because specifications are public.
        seed: Seed of the random parts. A single defense gets this seed, part number i of a chain gets
            ``derived_seed(seed, i)``.

    Returns:
        The defense; a :class:`Chain` if there are several parts. What cannot be read is refused as ``ConfigError``.
    """
    parts = build_parts(spec, "defense", DEFENSES, Chain.example)
    return Chain(seeded_parts(parts, seed)) if len(parts) > 1 else parts[0].with_seed(seed)
