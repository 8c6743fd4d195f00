"""Random streams that depend on a seed and a parameter's name, and on nothing else."""

import hashlib

import torch

from lmleak.errors import ConfigError
from lmleak.specification import is_whole_number


def random_stream(seed: int, name: str, purpose: str) -> torch.Generator:
    """Return a CPU generator for one parameter.

    The seed is hashed together with ``name`` and ``purpose`` (what is drawn), so the numbers depend neither
    on the order of the parameters nor on which others are shared, are the same in every process and on every
    device, and are independent between two defenses of different kinds that have the same seed.

    Args:
        seed: The defense's seed.
        name: The parameter's name.
        purpose: What is drawn, e.g. "gaussian".

    Returns:
        A freshly seeded generator on the CPU.

    Raises:
        ConfigError: If the seed is no whole number, which would be another stream than the number it looks like.
    """
    if not is_whole_number(seed):
        raise ConfigError(f"seed must be a whole number, got {seed!r}")
    return torch.Generator().manual_seed(_digest(purpose, seed, name))


def derived_seed(seed: int, position: int) -> int:
    """Return the seed of part number ``position`` of something that was given one ``seed``."""
    return _digest("part", seed, position)


def _digest(*parts: object) -> int:
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # 63 bits: fits a signed 64-bit integer
