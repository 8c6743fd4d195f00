"""lmleak tells what a gradient leaks before it is shared, and proves it by attacking it.

>>> adapter = lmleak.load_adapter("reference-bert")
>>> batch = adapter.batch(["my scan results came back on monday"], labels=[0])
>>> risk = lmleak.inversion_influence(adapter, batch, noise_std=1e-3)
>>> risk.influence.rms  # predicted error of the perfect attacker, per embedding coordinate
"""

from lmleak import defenses, metrics
from lmleak.adapters import adapt, load_adapter
from lmleak.attacks import ATTACKS, run_attack
from lmleak.defenses import DEFENSES, parse_defense
from lmleak.gradients import SharedGradient, capture_gradient
from lmleak.influence import GradientJacobian, InfluenceResult, inversion_influence, predict_recovery
from lmleak.metrics import score_images, score_text

__version__ = "0.1.0"

__all__ = [
    "ATTACKS",
    "DEFENSES",
    "GradientJacobian",
    "InfluenceResult",
    "SharedGradient",
    "adapt",
    "capture_gradient",
    "defenses",
    "inversion_influence",
    "load_adapter",
    "metrics",
    "parse_defense",
    "predict_recovery",
    "run_attack",
    "score_images",
    "score_text",
]
