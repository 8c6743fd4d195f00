"""Matrix-free linear algebra on positive semidefinite operators: Lanczos, conjugate gradients, trace estimation.

Knows torch only. Every result says how far it got: value, residual, iterations, converged.
"""

from lmleak.linops.base import FunctionOperator, LinearOperator, MatrixOperator, ProductOperator, ShiftedOperator
from lmleak.linops.eigenvalue import EigenvalueResult, top_eigenvalue, top_eigenvalue_from_image
from lmleak.linops.lanczos import Krylov, lanczos, random_start
from lmleak.linops.multishift import extend_krylov, krylov_solve, multishift_cg, multishift_krylov
from lmleak.linops.solve import SolveResult, StopReason, conjugate_gradient
from lmleak.linops.trace import (
    Quadrature,
    SpectralSample,
    TraceEstimate,
    exact_spectrum,
    probe_quadrature,
    spectral_probes,
)

__all__ = [
    "EigenvalueResult",
    "FunctionOperator",
    "Krylov",
    "LinearOperator",
    "MatrixOperator",
    "ProductOperator",
    "Quadrature",
    "ShiftedOperator",
    "SolveResult",
    "SpectralSample",
    "StopReason",
    "TraceEstimate",
    "conjugate_gradient",
    "exact_spectrum",
    "extend_krylov",
    "krylov_solve",
    "lanczos",
    "multishift_cg",
    "multishift_krylov",
    "probe_quadrature",
    "random_start",
    "spectral_probes",
    "top_eigenvalue",
    "top_eigenvalue_from_image",
]
