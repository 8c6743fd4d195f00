"""Defenses: what an owner does to a gradient before it is shared."""

from lmleak.defenses.base import Defense, NoDefense, Release
from lmleak.defenses.chain import Chain
from lmleak.defenses.clip import Clip
from lmleak.defenses.hide_layers import HideLayers
from lmleak.defenses.noise import GaussianNoise, LaplaceNoise, unit_noise
from lmleak.defenses.parse import DEFENSES, parse_defense
from lmleak.defenses.quantize import Bfloat16, Quantize
from lmleak.defenses.seeding import derived_seed, random_stream
from lmleak.defenses.sign import Sign
from lmleak.defenses.sparsify import Prune, TopK

__all__ = [
    "DEFENSES", "Bfloat16", "Chain", "Clip", "Defense", "GaussianNoise", "HideLayers", "LaplaceNoise",
    "NoDefense", "Prune", "Quantize", "Release", "Sign", "TopK", "derived_seed", "parse_defense",
    "random_stream", "unit_noise",
]  # fmt: skip
