"""The inversion influence function (I2F) of one gradient, with its bounds.

An attacker who inverts g0 + delta instead of g0 errs, to first order, by (J J^T)^-1 J delta (Zhang et al. 2023,
arXiv:2309.13016, eq. 4). Its norm is the risk number: small means that delta protects little.
"""

from collections.abc import Mapping

from torch import Tensor

from lmleak.adapters.base import ModelAdapter
from lmleak.errors import ConfigError
from lmleak.gradients.capture import capture_gradient
from lmleak.influence.jacobian import CosineJacobian, GradientJacobian, InputJacobian
from lmleak.influence.solver import MAX_PRODUCTS, SOLVER_TOLERANCE, InfluenceResult, InfluenceSolver
from lmleak.lookup import lookup
from lmleak.types import Batch


def inversion_influence(
    adapter: ModelAdapter,
    batch: Batch,
    *,
    noise_std: float | None = None,
    perturbation: Mapping[str, Tensor] | None = None,
    damping: float | None = None,
    shared: str = "no-word-embeddings",
    attacker: str = "l2",
    implementation: str = "factored",
    tol: float = SOLVER_TOLERANCE,
    max_products: int = MAX_PRODUCTS,
    seed: int = 0,
) -> InfluenceResult:
    """Return the I2F of one batch: how far noise, or any perturbation, drives the perfect attacker from the truth.

    Args:
        adapter: The model.
        batch: The private batch.
        noise_std: Standard deviation of Gaussian noise on every shared coordinate, in the gradient's unit; the
            noise is that of ``GaussianNoise(std=noise_std, seed=seed)``. Give this or ``perturbation``.
        perturbation: delta = released - true, per parameter name.
        damping: Added to A; None takes ``RELATIVE_DAMPING`` times its largest eigenvalue. Any damping makes the value
            a lower bound of the undamped I2F.
        shared: Which parameters are released.
        attacker: "l2" matches gradients by squared distance (DLG), "cosine" by direction (GS).
        implementation: How products with J are computed.
        tol: Relative residual of the solve, and half the relative width of the eigenvalue's bracket.
        max_products: Most products with A per run.
        seed: Seed of the noise and of the eigenvalue's random start.

    Returns:
        The influence, its bounds, and what the solver reached.

    Raises:
        ConfigError: Unless exactly one of ``noise_std`` and ``perturbation`` is given.
    """
    if (noise_std is None) == (perturbation is None):
        raise ConfigError("give exactly one of noise_std= and perturbation=")
    jacobian = attacker_jacobian(adapter, batch, shared=shared, attacker=attacker, implementation=implementation)
    solver = InfluenceSolver(jacobian, adapter.prior(), tol=tol, max_products=max_products, seed=seed)
    if perturbation is not None:
        return solver.solve(perturbation, damping=damping)
    return solver.sweep([noise_std], None if damping is None else [damping])[0][0]


def attacker_jacobian(
    adapter: ModelAdapter, batch: Batch, *, shared: str, attacker: str = "l2", implementation: str = "factored"
) -> InputJacobian:
    """Return the operator whose inverse an attacker applies: J for "l2", J_c for "cosine"."""
    jacobian = GradientJacobian(adapter, batch, shared=shared, implementation=implementation)
    make = {
        "l2": lambda: jacobian,
        "cosine": lambda: CosineJacobian(jacobian, capture_gradient(adapter, batch, shared=shared).gradient),
    }
    return lookup("attacker", attacker, make)()
