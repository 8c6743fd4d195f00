"""Floor 3, the data owner's side: which layer's gradient leaks what, with and without an attack.

Mo, Borovykh, Malekzadeh, Haddadi and Demetriou, Quantifying and Localizing Usable Information Leakage from Gradients,
arXiv:2105.13929. The definitions here are our reading of its abstract.
"""

from lmleak.leakage.conditional import (
    ProtectionStep,
    conditional_information,
    information_chain,
    protection_order,
)
from lmleak.leakage.discrepancy import KernelDiscrepancy, MeanDifference, kernel_discrepancy, mean_difference
from lmleak.leakage.extremes import SpectralNorm, largest_entries, spectral_norms
from lmleak.leakage.families_attack import attack_information
from lmleak.leakage.independence import independence_test
from lmleak.leakage.permutation import PermutationTest, permutation_p_value
from lmleak.leakage.pointwise import PointwiseSummary, pointwise_by_class
from lmleak.leakage.rows import direction_and_norm
from lmleak.leakage.sensitivity import LayerSensitivity, Sensitivity, input_sensitivity
from lmleak.leakage.subspace import (
    SubspaceDistance,
    principal_angles,
    sample_subspace_distance,
    subspace_sweep,
    weight_subspace_distance,
)
from lmleak.leakage.vinformation import (
    VInformation,
    learning_curve,
    v_information,
    v_information_by_layer,
)

__all__ = [
    "KernelDiscrepancy",
    "LayerSensitivity",
    "MeanDifference",
    "PermutationTest",
    "PointwiseSummary",
    "ProtectionStep",
    "Sensitivity",
    "SpectralNorm",
    "SubspaceDistance",
    "VInformation",
    "attack_information",
    "conditional_information",
    "direction_and_norm",
    "independence_test",
    "information_chain",
    "input_sensitivity",
    "kernel_discrepancy",
    "largest_entries",
    "learning_curve",
    "mean_difference",
    "permutation_p_value",
    "pointwise_by_class",
    "principal_angles",
    "protection_order",
    "sample_subspace_distance",
    "spectral_norms",
    "subspace_sweep",
    "v_information",
    "v_information_by_layer",
    "weight_subspace_distance",
]
