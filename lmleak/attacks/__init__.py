"""Floor 3, the adversary: attacks see a released gradient and public facts, never the truth."""

from dataclasses import fields

from lmleak.adapters.base import ModelAdapter
from lmleak.attacks.bag import Bag
from lmleak.attacks.base import Attack
from lmleak.attacks.film import FILM
from lmleak.attacks.lamp import LAMP
from lmleak.attacks.lora_span import LoraSpan
from lmleak.attacks.matching import DLG, GS, TAG
from lmleak.attacks.noisy_span import NoisySpan
from lmleak.attacks.span import Span
from lmleak.attacks.subspace import Subspace
from lmleak.errors import ConfigError
from lmleak.gradients.shared import SharedGradient
from lmleak.lookup import lookup, suggest
from lmleak.specification import build_parts, refuse_wrong_kinds
from lmleak.types import Reconstruction

ATTACKS: dict[str, type[Attack]] = {
    "dlg": DLG,
    "tag": TAG,
    "gs": GS,
    "lamp": LAMP,
    "bag": Bag,
    "film": FILM,
    "span": Span,
    "noisy-span": NoisySpan,
    "lora-span": LoraSpan,
    "subspace": Subspace,
}


def make_attack(name: str, **options) -> Attack:
    """Return an attack by name.

    Args:
        name: One of ``ATTACKS``.
        **options: Fields of its dataclass.

    Returns:
        The attack.

    Raises:
        ConfigError: On an unknown attack or option.
    """
    if "(" in name:
        raise ConfigError(f"options are keywords here: run_attack({name.partition('(')[0]!r}, ..., option=value)")
    attack_class = lookup("attack", name, ATTACKS)
    valid = [f.name for f in fields(attack_class)]
    for option in options:
        if option not in valid:
            raise ConfigError(f"attack {name!r} has no option {option!r}. {suggest(option, valid)}")
    refuse_wrong_kinds(f"attack {name!r}", attack_class, options, "tag(iterations=500)")
    return attack_class(**options)


def parse_attack(spec: str) -> Attack:
    """Return the attack that a specification string describes.

    Args:
        spec: "span", "tag(iterations=500)", ...

    Returns:
        The attack.

    Raises:
        ConfigError: If it cannot be read, or names more than one attack.
    """
    parts = build_parts(spec, "attack", ATTACKS, "tag(iterations=500)")
    if len(parts) != 1:
        raise ConfigError(f"{spec!r} names {len(parts)} attacks; list them one by one")
    return parts[0]


def run_attack(
    name: str, adapter: ModelAdapter, shared: SharedGradient, *, seed: int = 0, **options
) -> Reconstruction:
    """Recover private input from a released gradient.

    Args:
        name: One of ``ATTACKS``.
        adapter: The model, whose weights the server knows.
        shared: The released gradient.
        seed: Seed of everything random in the attack.
        **options: Options of the attack.

    Returns:
        What was recovered, and at what cost.
    """
    return make_attack(name, **options).run(adapter, shared, seed=seed)


__all__ = [
    "ATTACKS", "DLG", "FILM", "GS", "LAMP", "TAG", "Attack", "Bag", "LoraSpan", "NoisySpan", "Span", "Subspace",
    "make_attack", "parse_attack", "run_attack",
]  # fmt: skip
