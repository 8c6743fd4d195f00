"""The inversion influence function (I2F) of one gradient, with its bounds.

An attacker who inverts g0 + delta instead of g0 errs, to first order, by (J J^T)^-1 J delta (Zhang et al. 2023,
arXiv:2309.13016, eq. 4). Its norm is the risk number: small means that delta protects little. With b = J delta and
A = J J^T all of it is read from one Krylov run on A started at b, for any number of dampings and scales of delta.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lmleak.adapters.base import ModelAdapter
from lmleak.defenses.noise import unit_noise
from lmleak.errors import ConfigError
from lmleak.gradients.capture import capture_gradient
from lmleak.influence.jacobian import CosineJacobian, GradientJacobian, InputJacobian
from lmleak.linops import EigenvalueResult, krylov_solve, multishift_krylov, top_eigenvalue
from lmleak.lookup import lookup
from lmleak.types import Batch, Magnitude

SOLVER_TOLERANCE = 1e-3  # relative residual; the attack errors it is compared with vary far more
MAX_PRODUCTS = 300


@dataclass(frozen=True)
class InfluenceResult:
    """I2F of one perturbation at one damping. Lengths are in units of x, as ``l2`` and as ``rms = l2 / sqrt(dx)``."""

    influence: Magnitude
    """||(A + damping I)^-1 J delta||. If not ``converged``: the last CG iterate's norm, which is at most that."""
    lower_bound: Magnitude
    """I_lb = ||J delta|| / lambda_max(A) (eq. 5), a lower bound of the undamped I2F. Divided by the upper end of the
    eigenvalue's bracket, so that it is a bound except with ``failure_probability``."""
    cg_bounds: tuple[float, ...]
    """l2 norms of the CG iterates of the undamped system: growing, each a lower bound of the undamped I2F that needs
    no eigenvalue; the first is already at least I_lb (Hestenes and Stiefel 1952)."""
    lambda_max: float
    """Largest eigenvalue of A as used in ``lower_bound``: the upper end of its bracket, in gradient^2 / x^2."""
    lambda_max_residual: float
    """Relative width of the bracket."""
    failure_probability: float
    """Probability, over the solver's random start, that lambda_max lies above the bracket."""
    damping: float
    """In units of A. sigma^2 / tau^2 is the attacker who knows the noise and the prior of x (MAP)."""
    residual: float
    """||b - (A + damping I) z|| / ||b|| of the solution z."""
    converged: bool
    """Whether the residual met the tolerance."""
    products: int
    """Products with A that the whole call spent; shared by all results of a sweep."""
    dx: int
    """Number of free coordinates of x."""
    error: Tensor = field(repr=False)
    """The predicted error of the attacker, (A + damping I)^-1 J delta, shaped like x, zero on padding."""

    @property
    def cg_bound(self) -> Magnitude:
        """The best certified lower bound of the undamped I2F."""
        return magnitude(self.cg_bounds[-1] if self.cg_bounds else 0.0, self.dx)


def magnitude(l2: float, dx: int) -> Magnitude:
    """Return both units of a length."""
    return Magnitude(l2, l2 / math.sqrt(dx))


def inversion_influence(
    adapter: ModelAdapter,
    batch: Batch,
    *,
    noise_std: float | None = None,
    perturbation: Mapping[str, Tensor] | None = None,
    damping: float | None = None,
    shared: str = "no-word-embeddings",
    attacker: str = "l2",
    implementation: str = "autodiff",
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
        damping: Added to A. None takes the MAP attacker's sigma^2 / tau^2, with sigma the noise's standard deviation
            (of a perturbation, its root mean square) and tau that of the prior of x.
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
    solver = InfluenceSolver(jacobian, adapter.prior().std, tol=tol, max_products=max_products, seed=seed)
    if perturbation is not None:
        return solver.solve(perturbation, damping=damping)
    dampings = None if damping is None else [damping]
    return solver.sweep([noise_std], dampings)[0][0]


def attacker_jacobian(
    adapter: ModelAdapter, batch: Batch, *, shared: str, attacker: str = "l2", implementation: str = "autodiff"
) -> InputJacobian:
    """Return the operator whose inverse an attacker applies: J for "l2", J_c for "cosine"."""
    jacobian = GradientJacobian(adapter, batch, shared=shared, implementation=implementation)
    make = {
        "l2": lambda: jacobian,
        "cosine": lambda: CosineJacobian(jacobian, capture_gradient(adapter, batch, shared=shared).gradient),
    }
    return lookup("attacker", attacker, make)()


class InfluenceSolver:
    """I2F of many perturbations of one batch; what they have in common is computed once.

    Args:
        jacobian: J, or J_c for the cosine attacker.
        prior_std: tau, for the MAP damping.
        tol: Relative residual of solves.
        max_products: Most products with A per run.
        seed: Seed of noise and of random starts.
    """

    def __init__(
        self,
        jacobian: InputJacobian,
        prior_std: float,
        *,
        tol: float = SOLVER_TOLERANCE,
        max_products: int = MAX_PRODUCTS,
        seed: int = 0,
    ):
        self.jacobian, self.prior_std = jacobian, prior_std
        self.tol, self.max_products, self.seed = tol, max_products, seed
        self.operator = jacobian.gram_operator()
        self._lambda_max: EigenvalueResult | None = None

    @property
    def lambda_max(self) -> EigenvalueResult:
        """The largest eigenvalue of A, computed on first use."""
        if self._lambda_max is None:
            generator = torch.Generator().manual_seed(self.seed)
            self._lambda_max = top_eigenvalue(
                self.operator, generator=generator, tol=2 * self.tol, max_products=self.max_products
            )
        return self._lambda_max

    def map_damping(self, noise_std: float) -> float:
        """Return sigma^2 / tau^2, the damping of the attacker who knows noise and prior."""
        return (noise_std * self.jacobian.perturbation_scale / self.prior_std) ** 2

    def solve(self, perturbation: Mapping[str, Tensor], *, damping: float | None = None) -> InfluenceResult:
        """Return the I2F of one perturbation, by default at the MAP damping of its root mean square.

        Args:
            perturbation: delta per parameter name; missing names count as zero.
            damping: Added to A.

        Returns:
            The influence; zero for a zero perturbation.
        """
        if damping is None:
            squares = sum(d.double().square().sum().item() for d in perturbation.values())
            damping = self.map_damping(math.sqrt(squares / self.jacobian.shape[1]))
        return self._solve(perturbation, [1.0], [[damping]])[0][0]

    def sweep(
        self, noise_stds: Sequence[float], dampings: Sequence[float] | None = None
    ) -> list[list[InfluenceResult]]:
        """Return the I2F of Gaussian noise at every level and damping, for the cost of one solve.

        I2F is linear in delta, so the noise is drawn once and scaled, and all dampings share one Krylov run.

        Args:
            noise_stds: Standard deviations, in the gradient's unit.
            dampings: Dampings for every level; None takes the MAP damping of each level alone.

        Returns:
            One list per noise level, one result per damping.
        """
        noise = {
            name: unit_noise(name, shape, self.jacobian.dtype, self.seed)
            for name, shape in self.jacobian.parameter_shapes.items()
        }
        per_level = [[self.map_damping(s)] if dampings is None else list(dampings) for s in noise_stds]
        return self._solve(noise, noise_stds, per_level)

    def _solve(self, perturbation, scales, dampings) -> list[list[InfluenceResult]]:
        """Solve (A + d I) z = s J delta for every scale s and each of its dampings d by one Krylov run."""
        before = self.operator.products
        bracket = self.lambda_max
        b = self.jacobian.flatten(self.jacobian.matvec(perturbation)) * self.jacobian.perturbation_scale
        shifts = sorted({d for row in dampings for d in row})
        krylov = multishift_krylov(self.operator, b, shifts, tol=self.tol, max_products=self.max_products)
        # Shift 0 is read from the run the others needed: certified lower bounds, rarely a converged solution.
        undamped, *solutions = krylov_solve(krylov, [0.0, *shifts], tol=self.tol)
        solved = dict(zip(shifts, solutions, strict=True))
        spent = self.operator.products - before
        norm = b.double().norm().item()
        width = bracket.upper / bracket.value - 1 if bracket.value > 0 else math.inf

        def result(scale: float, damping: float) -> InfluenceResult:
            solution = solved[damping]
            return InfluenceResult(
                influence=magnitude(scale * solution.norm, self.jacobian.dx),
                lower_bound=magnitude(scale * norm / bracket.upper, self.jacobian.dx),
                cg_bounds=tuple(scale * bound for bound in undamped.lower_bounds),
                lambda_max=bracket.upper,
                lambda_max_residual=width,
                failure_probability=bracket.failure_probability,
                damping=damping,
                residual=solution.residual,
                converged=solution.converged,
                products=spent,
                dx=self.jacobian.dx,
                error=self.jacobian.unflatten(solution.solution * scale),
            )

        return [[result(s, d) for d in row] for s, row in zip(scales, dampings, strict=True)]
