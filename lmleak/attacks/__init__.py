"""Floor 3, the adversary: attacks see a released gradient and public facts, never the truth."""

from dataclasses import fields

from lmleak.adapters.base import ModelAdapter
from lmleak.adapters.targets import IMAGE_TASK
from lmleak.attacks.bag import Bag
from lmleak.attacks.base import Attack
from lmleak.attacks.film import FILM
from lmleak.attacks.image_matching import ImageDLG, ImageGS
from lmleak.attacks.image_newton import LBFGS, GaussNewton
from lmleak.attacks.image_prior import GIAS
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
from lmleak.types import ImageReconstruction, Reconstruction

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


IMAGE_ATTACKS: dict[str, type[Attack]] = {
    "dlg": ImageDLG,
    "gs": ImageGS,
    "gias": GIAS,
    "gauss-newton": GaussNewton,
    "lbfgs": LBFGS,
}


def registry(task: str) -> dict[str, type[Attack]]:
    """Return the attacks on a task by name: ``IMAGE_ATTACKS`` for images, ``ATTACKS`` for text."""
    return IMAGE_ATTACKS if task == IMAGE_TASK else ATTACKS


def make_attack(name: str, *, task: str = "causal-lm", **options) -> Attack:
    """Return an attack by name.

    Args:
        name: One of the task's :func:`registry`.
        task: The model's task; several names stand for an attack on text and one on images.
        **options: Fields of its dataclass.

    Returns:
        The attack.

    Raises:
        ConfigError: On an unknown attack or option.
    """
    if "(" in name:
        raise ConfigError(f"options are keywords here: run_attack({name.partition('(')[0]!r}, ..., option=value)")
    _refuse_other_kind(name, task)
    attack_class = lookup("attack", name, registry(task))
    valid = [f.name for f in fields(attack_class)]
    for option in options:
        if option not in valid:
            raise ConfigError(f"attack {name!r} has no option {option!r}. {suggest(option, valid)}")
    refuse_wrong_kinds(f"attack {name!r}", attack_class, options, "tag(iterations=500)")
    return attack_class(**options)


def parse_attack(spec: str, *, task: str = "causal-lm") -> Attack:
    """Return the attack that a specification string describes.

    Args:
        spec: "span", "tag(iterations=500)", ...
        task: The model's task, which decides the registry.

    Returns:
        The attack.

    Raises:
        ConfigError: If it cannot be read, or names more than one attack.
    """
    if isinstance(spec, str):
        _refuse_other_kind(spec.partition("(")[0].strip(), task)
    parts = build_parts(spec, "attack", registry(task), "tag(iterations=500)")
    if len(parts) != 1:
        raise ConfigError(f"{spec!r} names {len(parts)} attacks; list them one by one")
    return parts[0]


def _refuse_other_kind(name: str, task: str) -> None:
    """Refuse an attack on text for images, and the other way round."""
    others = IMAGE_ATTACKS if registry(task) is ATTACKS else ATTACKS
    if name in others and name not in registry(task):
        raise ConfigError(
            f"attack {name!r} is for {'images' if others is IMAGE_ATTACKS else 'text'}, and this model's task is "
            f"{task!r}; write one of {', '.join(registry(task))}"
        )


def run_attack(
    name: str, adapter: ModelAdapter, shared: SharedGradient, *, seed: int = 0, **options
) -> Reconstruction | ImageReconstruction:
    """Recover private input from a released gradient.

    Args:
        name: One of ``ATTACKS``, or of ``IMAGE_ATTACKS`` for an image classifier.
        adapter: The model, whose weights the server knows.
        shared: The released gradient.
        seed: Seed of everything random in the attack.
        **options: Options of the attack.

    Returns:
        What was recovered, and at what cost.
    """
    return make_attack(name, task=adapter.task, **options).run(adapter, shared, seed=seed)


__all__ = [
    "ATTACKS",
    "DLG",
    "FILM",
    "GS",
    "IMAGE_ATTACKS",
    "LAMP",
    "TAG",
    "Attack",
    "Bag",
    "LoraSpan",
    "NoisySpan",
    "Span",
    "Subspace",
    "make_attack",
    "parse_attack",
    "registry",
    "run_attack",
]  # fmt: skip
