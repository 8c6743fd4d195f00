"""Floor 3, the data owner's side: the operator J and the inversion influence function."""

from lmleak.influence.expected import ExpectedInfluence, expected_influence, null_share, sample_spectrum
from lmleak.influence.i2f import InfluenceResult, InfluenceSolver, attacker_jacobian, inversion_influence
from lmleak.influence.jacobian import CosineJacobian, GradientJacobian
from lmleak.influence.split import LayerShare, influence_by_layer, influence_by_token, information_by_layer

__all__ = [
    "CosineJacobian", "ExpectedInfluence", "GradientJacobian", "InfluenceResult", "InfluenceSolver", "LayerShare",
    "attacker_jacobian", "expected_influence", "influence_by_layer", "influence_by_token", "information_by_layer",
    "inversion_influence", "null_share", "sample_spectrum",
]  # fmt: skip
