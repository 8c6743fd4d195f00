"""What a layer-wise audit measures."""

from dataclasses import dataclass, field
from typing import Any

from lmleak.config import check_counts
from lmleak.errors import ConfigError
from lmleak.evaluation.layers_capture import CaptureSettings
from lmleak.leakage.families import FAMILIES
from lmleak.lookup import lookup

GROUPS = ("sensitivity", "influence", "subspace", "mean-difference", "discrepancy", "latent", "original")
"""The groups of metrics, in the order in which they are measured."""
ALL = "all layers"
"""Stands for the whole shared gradient in the rows of latent and original information."""
Row = dict[str, Any]


@dataclass(frozen=True)
class LayerSettings:
    """What is measured of every layer."""

    capture: CaptureSettings = field(default_factory=CaptureSettings)
    """How gradients are released and kept."""
    groups: tuple[str, ...] = GROUPS
    """Which groups of metrics."""
    families: tuple[str, ...] = ("linear",)
    """Predictive families of the V-information, smaller ones first."""
    folds: int = 5
    """Parts of the cross-fitting."""
    permutations: int = 200
    """Shuffles of every permutation test."""
    subspace: int | float = 8
    """Dimensions of a value's gradient subspace, or the share of energy they keep."""
    gradients: int = 5000
    """Most gradients that V-information is estimated from; of more, a random choice."""
    components: int = 64
    """Principal components of all gradients in which subspaces are compared; the attribute does not enter them."""
    pairs: int = 600
    """Most gradients that are compared in pairs (subspace distance, mean difference, MMD)."""
    sensitivity_examples: int = 16
    """Examples whose Jacobians are measured."""
    probes: int = 16
    """Random directions per Jacobian with more than 256 coordinates."""
    influence_examples: int = 4
    """Examples whose layer-wise I2F is solved for."""
    noise: float = 0.1
    """sigma of the layer-wise I2F, in multiples of the gradient's root mean square."""
    tolerance: float = 1e-3
    """Relative residual of its solves."""
    max_products: int = 200
    """Most products per solve; an unconverged number is marked."""
    seed: int = 0
    """Seed of choices, folds, shuffles and probes."""

    def __post_init__(self):
        for group in self.groups:
            lookup("group of metrics", group, dict.fromkeys(GROUPS))
        for family in self.families:
            lookup("family", family, FAMILIES)
        check_counts(self, "gradients", "pairs", "sensitivity_examples", "influence_examples", "max_products")
        if not self.noise > 0:
            raise ConfigError(f"noise must be positive, got {self.noise!r}: without noise the MAP error ranks nothing")
