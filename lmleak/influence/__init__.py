"""Floor 3, the data owner's side: the operator J and the inversion influence function."""

from lmleak.influence.expected import ExpectedInfluence, expected_influence, sample_spectrum
from lmleak.influence.i2f import attacker_jacobian, inversion_influence
from lmleak.influence.jacobian import CosineJacobian, GradientJacobian
from lmleak.influence.recovery import RecoveryPrediction, RecoveryPredictor, predict_recovery
from lmleak.influence.solver import InfluenceResult, InfluenceSolver, PerturbationResponse, PredictedError
from lmleak.influence.split import LayerShare, influence_by_layer, influence_by_token, information_by_layer

__all__ = [
    "CosineJacobian", "ExpectedInfluence", "GradientJacobian", "InfluenceResult", "InfluenceSolver", "LayerShare",
    "PerturbationResponse", "PredictedError", "RecoveryPrediction", "RecoveryPredictor", "attacker_jacobian",
    "expected_influence", "influence_by_layer", "influence_by_token", "information_by_layer", "inversion_influence",
    "predict_recovery", "sample_spectrum",
]  # fmt: skip
