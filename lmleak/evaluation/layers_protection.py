"""Hiding layers: what is left in those still shared, by V-information and by attacks on the protected gradient."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmleak.adapters import TextAdapter
from lmleak.attacks import parse_attack
from lmleak.defenses import HideLayers, derived_seed
from lmleak.errors import ConfigError
from lmleak.evaluation.image_attack import scored_image_attack
from lmleak.evaluation.layers import LayerAnalysis, Measure, Row
from lmleak.evaluation.layers_capture import release_rows
from lmleak.evaluation.layers_measures import with_interval
from lmleak.evaluation.layers_order import LayerScores
from lmleak.evaluation.scored import scored_attack
from lmleak.gradients import SharedGradient
from lmleak.leakage import protection_order, v_information

FORWARD = "first layers first"
GREEDY_LAYERS = 8  # a greedy order of more layers costs too many fits
TEXT_SCORES = ("token_recall", "token_f1", "rouge1", "rougeL", "position_accuracy")
IMAGE_SCORES = ("rmse", "mse", "psnr", "ssim")
Curves = Mapping[str, Sequence[tuple[int, tuple[str, ...], Row]]]
"""Name of an order -> (k, hidden layers in the order of hiding, what is left), for every k tried."""


@dataclass(frozen=True)
class ProtectionSettings:
    """How orders of protection are verified."""

    attacks: tuple[str, ...] = ()
    """Specifications of attacks on the protected gradient."""
    attack_examples: int = 8
    """Private examples attacked per set of hidden layers."""
    gradients: int = 1000
    """Most gradients that the information left is estimated from: joined layers have many features."""
    steps: int = 4
    """Most numbers k of hidden layers tried per order; of more layers, k = 0, 1, 2, 4, ... and all but one."""
    greedy: bool = True
    """Whether to add the greedy order of conditional information, for at most 8 layers."""

    def __post_init__(self):
        if self.attack_examples < 1 or self.steps < 2 or self.gradients < 2:
            raise ConfigError(
                f"expected attack_examples >= 1, steps >= 2 and gradients >= 2, got {self.attack_examples}, "
                f"{self.steps} and {self.gradients}"
            )


def protection_orders(
    analysis: LayerAnalysis, scores: Sequence[LayerScores], settings: ProtectionSettings
) -> dict[str, tuple[str, ...]]:
    """Return the orders in which layers might be hidden, the first one first.

    By each metric, the layer that leaks most first; "greedy:<attribute>" by what leaves the least information to the
    linear family (:func:`lmleak.leakage.protection_order`); and, as a baseline that looks at nothing, from the input
    on.

    Args:
        analysis: The layers and their features.
        scores: The metrics.
        settings: Whether greedy orders are wanted.

    Returns:
        Name of the order -> layers.
    """
    layers = tuple(analysis.layers)
    orders = {FORWARD: layers} | {score.name: score.order() for score in scores}
    if settings.greedy and 1 < len(layers) <= GREEDY_LAYERS:
        rows = analysis.choice(settings.gradients)
        features = {layer: analysis.features([layer], rows) for layer in layers}
        for attribute, values in analysis.examples.attributes.items():
            steps = protection_order(
                features, values[rows], groups=analysis.groups_of(rows), folds=analysis.settings.folds,
                seed=analysis.settings.seed,
            )  # fmt: skip
            orders[f"greedy:{attribute}"] = tuple(step.layer for step in steps)
    return orders


def depths(layers: int, most: int) -> list[int]:
    """Return the numbers of hidden layers to try: all of 0 .. L - 1, or 0, 1, 2, 4, ... and L - 1 at last."""
    if layers <= most:
        return list(range(layers))
    return [0, *(2**i for i in range(most - 2) if 2**i < layers - 1), layers - 1]


def hidden_sets(orders: Mapping[str, Sequence[str]], most: int) -> list[tuple[str, ...]]:
    """Return every set of layers that some order hides first, once, in the network's order, smaller ones first.

    Args:
        orders: Name -> layers, :data:`FORWARD` among them.
        most: Most numbers k per order.

    Returns:
        The sets; the empty one first.
    """
    network = list(orders[FORWARD])
    found = {tuple(sorted(order[:k], key=network.index)) for order in orders.values()
             for k in depths(len(network), most)}  # fmt: skip
    return sorted(found, key=lambda hidden: (len(hidden), [network.index(layer) for layer in hidden]))


class Protection:
    """What is left when some layers are hidden; a set's row depends on itself and the settings alone.

    Args:
        analysis: Data, model and features.
        settings: The attacks.
    """

    def __init__(self, analysis: LayerAnalysis, settings: ProtectionSettings):
        self.analysis, self.settings = analysis, settings
        self.attacks = {spec: parse_attack(spec, task=analysis.adapter.task) for spec in settings.attacks}

    def row(self, hidden: Sequence[str]) -> Row:
        """Return the residual risk with some layers hidden.

        Args:
            hidden: Layers whose gradient is withheld; at least one is left.

        Returns:
            ``hidden``, ``remaining``, ``parameters`` (shared numbers left), ``latent`` and ``original`` (per target
            the V-information of all remaining layers together), ``attacks`` (per specification the mean scores over
            the attacked examples, with ``_low`` and ``_high``, or why it cannot run).
        """
        analysis = self.analysis
        remaining = [layer for layer in analysis.layers if layer not in hidden]
        features = analysis.features(remaining, analysis.choice(self.settings.gradients))
        information = lambda group, targets: {name: self._information(group, name, features) for name in targets}
        return {
            "key": "hidden|" + "|".join(hidden),
            "hidden": list(hidden),
            "remaining": remaining,
            "parameters": sum(analysis.parameters[layer] for layer in remaining),
            "latent": information("latent", analysis.examples.attributes),
            "original": information("original", analysis.examples.originals),
            "attacks": {spec: self._attack(spec, hidden) for spec in self.attacks},
        }

    def _information(self, group: str, target: str, features: NDArray) -> dict[str, Any]:
        analysis, family = self.analysis, self.analysis.families(group)[-1]
        rows = analysis.choice(self.settings.gradients)
        found = v_information(
            features, analysis.target(Measure(group, target=target), rows), family=family,
            groups=analysis.groups_of(rows), folds=analysis.settings.folds, seed=analysis.settings.seed,
        )  # fmt: skip
        return {
            "nats": found.nats, "low": found.low, "high": found.high, "fraction": found.fraction,
            "fraction_low": found.fraction_low, "fraction_high": found.fraction_high,
            "accuracy": found.accuracy, "r_squared": found.r_squared, "family": family,
        }  # fmt: skip

    def _attack(self, spec: str, hidden: Sequence[str]) -> dict[str, Any]:
        """Return the attack's mean scores on the protected gradients of the first few chosen examples."""
        analysis, scored = self.analysis, []
        count = min(self.settings.attack_examples, analysis.examples.size)
        for victim in analysis.victims(count):
            seed = derived_seed(analysis.settings.seed, victim)
            batch = analysis.examples.batch(release_rows(analysis.examples, victim, analysis.settings.capture))
            shared = analysis.settings.capture.sharing.release(analysis.adapter, batch, seed=seed)
            shared = hide(shared, [name for layer in hidden for name in analysis.layers[layer]])
            if isinstance(analysis.adapter, TextAdapter):
                found = scored_attack(self.attacks[spec], analysis.adapter, shared, batch, seed=seed)
            else:
                found = scored_image_attack(self.attacks[spec], analysis.adapter, shared, batch, seed=seed)
            if "refused" in found:
                return {"refused": found["refused"]}
            scored.append(found)
        names = TEXT_SCORES if isinstance(analysis.adapter, TextAdapter) else IMAGE_SCORES
        means = {}
        for name in names:
            means |= with_interval(name, [_finite(each.get(name)) for each in scored])
        return means | {"examples": len(scored), "seconds": sum(each["seconds"] for each in scored)}


def hide(shared: SharedGradient, names: Sequence[str]) -> SharedGradient:
    """Return a gradient with some parameters withheld by the defense "hide-layers", or itself if there are none."""
    if not names:
        return shared
    return HideLayers(names="^(" + "|".join(re.escape(name) for name in sorted(names)) + ")$")(shared)


def _finite(value: float | None) -> float | None:
    return value if value is not None and np.isfinite(value) else None


def curves(orders: Mapping[str, Sequence[str]], rows: Sequence[Row], most: int) -> Curves:
    """Return per order what is left after hiding its first k layers.

    Args:
        orders: Name -> layers.
        rows: Of :class:`Protection`, one per set.
        most: As for :func:`hidden_sets`.

    Returns:
        The curves, of every order.
    """
    by_set = {frozenset(row["hidden"]): row for row in rows}
    return {
        name: [(k, tuple(order[:k]), by_set[frozenset(order[:k])]) for k in depths(len(order), most)]
        for name, order in orders.items()
    }
