"""Floor 3, the data owner's side: the operator J and the inversion influence function."""

from lmleak.influence.batch import (
    ExampleInfluence,
    PartialInputJacobian,
    expected_by_example,
    influence_by_example,
)
from lmleak.influence.dense import dense_gram, dense_rows
from lmleak.influence.directions import EigenDirections, eigen_directions, image_prior
from lmleak.influence.expected import ExpectedInfluence, expected_influence, sample_spectrum
from lmleak.influence.i2f import attacker_jacobian, inversion_influence
from lmleak.influence.jacobian import CosineJacobian, GradientJacobian
from lmleak.influence.layers import LayerInfluence, PartialRelease, influence_of_layers
from lmleak.influence.masked import MaskAwareInfluence, MaskedJacobian, mask_aware_influence
from lmleak.influence.recovery import RecoveryPrediction, RecoveryPredictor, predict_recovery
from lmleak.influence.solver import InfluenceResult, InfluenceSolver, PerturbationResponse, PredictedError
from lmleak.influence.spectral import SpectralNoise, spectral_noise
from lmleak.influence.split import LayerShare, influence_by_layer, influence_by_token, information_by_layer
from lmleak.influence.update import UpdateJacobian

__all__ = [
    "CosineJacobian", "EigenDirections", "ExampleInfluence", "ExpectedInfluence", "GradientJacobian",
    "InfluenceResult", "InfluenceSolver", "LayerInfluence", "LayerShare", "MaskAwareInfluence", "MaskedJacobian",
    "PartialInputJacobian", "PartialRelease", "PerturbationResponse", "PredictedError", "RecoveryPrediction",
    "RecoveryPredictor", "SpectralNoise", "UpdateJacobian", "attacker_jacobian", "dense_gram", "dense_rows",
    "eigen_directions", "expected_by_example", "expected_influence", "image_prior", "influence_by_example",
    "influence_by_layer", "influence_by_token", "influence_of_layers", "information_by_layer", "inversion_influence",
    "mask_aware_influence", "predict_recovery", "sample_spectrum", "spectral_noise",
]  # fmt: skip
