"""The solver behind the inversion influence function: one Krylov run per perturbation serves everything.

With b = J delta and A = J J^T, the run on A from b gives (A + d I)^-1 b for any damping d and scale of delta, and the
conjugate-gradient bounds; that of Gaussian noise brackets lambda_max as well. A run from x - mu gives what the prior
adds.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from lmleak.adapters.base import Prior
from lmleak.errors import ConfigError, DataError
from lmleak.influence.jacobian import InputJacobian
from lmleak.influence.perturbation import UnitNoise
from lmleak.linops import (
    EigenvalueResult,
    Krylov,
    extend_krylov,
    krylov_solve,
    multishift_krylov,
    top_eigenvalue_from_image,
)
from lmleak.specification import is_finite_number
from lmleak.types import Magnitude

SOLVER_TOLERANCE = 1e-3  # relative residual; the attack errors it is compared with vary far more
ENCLOSURE = 10  # times the tolerance: relative width that the interval of I2F must reach as well
DEVIATION_TOLERANCE = 1e-2  # relative to x - mu itself
PREDICTION_TOLERANCE = 0.1  # what the shrinkage may leave open, relative to the predicted error
MAX_PRODUCTS = 300
# Damping 1e-4 lambda_max, residual 1e-3, float32. CG takes 199 products on BERT-base with random weights, 174 on GPT-2
# small (32 tokens), 19 and 94 on the trained reference models. Tried, and left out:
# - the smallest residual in the same Krylov space (MINRES): 160 to 180 on BERT-base, norms further from the truth;
# - Galerkin's solution in a space that begins with the run for lambda_max and grows by residuals scaled token by token
#   with their mean Rayleigh quotient: BERT-base 98, but GPT-2 small 170, reference-bert 74 and reference-gpt2 133; its
#   norms bound nothing, and four dampings cost 1.3 to 1.7 times one; without the scaling 192 and 163;
# - the smallest residual in that space: 79 on BERT-base, with norms up to 16 % below the truth at residual 1e-3;
# - a preconditioner K x I, K (tokens, tokens) the mean of A over a token's coordinates, which J delta estimates for
#   nothing: by the plain recurrence 97 instead of more than 259 on BERT-base, 153 instead of 244 on GPT-2 small, but
#   188 instead of 78 on reference-bert and 232 instead of 178 on reference-gpt2; K's diagonal alone (block-Jacobi with
#   multiples of I) lies between. It slows down trained models, which are what is audited.
# On the two large shapes the norm is within 0.1 % where the residual is 1e-2: its last digits are what is expensive.
RELATIVE_DAMPING = 1e-5
"""Default damping over lambda_max: the smallest that float32 products resolve.

It does not depend on the noise. The MAP attacker's sigma^2 / tau^2 would shrink the response to large noise to
nothing, and a small I2F reads as "protects little". That attacker's error is ``PerturbationResponse.predicted_error``,
which counts what the shrinking loses as well.
"""


@dataclass(frozen=True)
class InfluenceResult:
    """I2F of one perturbation at one damping. Lengths are in units of x, as ``l2`` and as ``rms = l2 / sqrt(dx)``."""

    influence: Magnitude
    """||(A + damping I)^-1 J delta||. If not ``converged``: the last CG iterate's norm, which is at most that.
    Damping shortens it: it may lie below ``lower_bound`` and ``cg_bound``, which bound the I2F without damping. Of the
    three the largest is the best lower bound of that I2F."""
    upper_bound: Magnitude
    """The damped I2F is at most this: with ``influence`` an interval that holds however early the solve stopped, up to
    the rounding of the products (Gauss-Radau quadrature; ``linops.multishift_cg``). The error vector is then known to
    sqrt(1 - (influence / upper_bound)^2) of its length. Both up to about epsilon lambda_max / damping: 1 % at the
    default damping in float32. Infinite where the dtype does not tell the damping from 0."""
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
    """Probability, over the solver's seeded unit noise, that lambda_max lies above the bracket."""
    damping: float
    """In units of A."""
    residual: float
    """||b - (A + damping I) z|| / ||b|| of the solution z."""
    converged: bool
    """Whether the residual met the tolerance, and ``upper_bound`` lies within ten times that. Where that is infinite
    the residual alone decides, and directions that the gradient hardly shows may hide: ``influence`` is a lower bound.
    """
    products: int
    """Products with A that it rests on: of its Krylov run, and of the run that brackets lambda_max where that is
    another. All results of a sweep share them."""
    dx: int
    """Number of free coordinates of x."""
    by_autodiff: tuple[str, ...]
    """Parameters of layers of unknown kinds: their products went by double backward, as exact but slower."""
    error: Tensor = field(repr=False)
    """The predicted error of the attacker, (A + damping I)^-1 J delta, shaped like x, zero on padding."""

    @property
    def cg_bound(self) -> Magnitude:
        """The best certified lower bound of the undamped I2F."""
        return magnitude(self.cg_bounds[-1] if self.cg_bounds else 0.0, self.dx)


@dataclass(frozen=True)
class PredictedError:
    """Error of the attacker who knows noise level and prior (MAP), for one batch and one perturbation."""

    error: Magnitude
    damping: float
    """sigma^2 / tau^2."""
    converged: bool


def magnitude(l2: float, dx: int) -> Magnitude:
    """Return both units of a length."""
    return Magnitude(l2, l2 / math.sqrt(dx))


class InfluenceSolver:
    """Risk numbers of many perturbations of one batch; what they have in common is computed once.

    Args:
        jacobian: J, or J_c for the cosine attacker.
        prior: What the attacker may assume of x.
        tol: Relative residual of solves; the interval of I2F is narrowed to ten times that.
        max_products: Most products with A per Krylov run.
        seed: Seed of the noise, from whose response lambda_max is bracketed as well.
    """

    def __init__(
        self,
        jacobian: InputJacobian,
        prior: Prior,
        *,
        tol: float = SOLVER_TOLERANCE,
        max_products: int = MAX_PRODUCTS,
        seed: int = 0,
    ):
        if not is_finite_number(tol) or not 0 < tol < 1:
            raise ConfigError(
                f"tol is a relative residual between 0 and 1, got {tol!r}. The default is {SOLVER_TOLERANCE}."
            )
        self.jacobian, self.prior = jacobian, prior
        self.tol, self.max_products, self.seed = tol, max_products, seed
        self.operator = jacobian.gram_operator()

    @cached_property
    def noise_run(self) -> Krylov:
        """The Krylov run from J delta for ``noise()``: what brackets lambda_max and solves for the noise."""
        return Krylov(self.operator, self.response(self.noise()))

    @cached_property
    def lambda_max(self) -> EigenvalueResult:
        """The largest eigenvalue of A."""
        return top_eigenvalue_from_image(
            self.noise_run, scale=self.jacobian.perturbation_scale, tol=2 * self.tol, max_products=self.max_products
        )

    def response(self, perturbation: Mapping[str, Tensor]) -> Tensor:
        """Return b = J delta on the free coordinates, (dx,), for delta as the attacker sees it."""
        return self.jacobian.flatten(self.jacobian.matvec(perturbation)) * self.jacobian.perturbation_scale

    @property
    def default_damping(self) -> float:
        """``RELATIVE_DAMPING`` times the largest eigenvalue of A."""
        return RELATIVE_DAMPING * self.lambda_max.value

    def map_damping(self, noise_std: float) -> float:
        """Return sigma^2 / tau^2, the damping of the attacker who knows noise and prior."""
        return (noise_std * self.jacobian.perturbation_scale / self.prior.std) ** 2

    @cached_property
    def deviation(self) -> Tensor:
        """The deviation x - mu on the free coordinates, (dx,): what the prior does not know."""
        return self.jacobian.flatten(self.jacobian.x - self.prior.mean.to(self.jacobian.x))

    @cached_property
    def deviation_run(self) -> Krylov:
        """The Krylov run from x - mu; only d (A + d I)^-1 (x - mu), never larger than x - mu, is read from it."""
        return multishift_krylov(
            self.operator,
            self.deviation,
            [self.default_damping],
            tol=DEVIATION_TOLERANCE,
            max_products=self.max_products,
        )

    def undetermined_share(self, damping: float) -> float:
        """Return the share of ||x - mu||^2 that the gradient does not determine at a damping d.

        ||d (A + d I)^-1 (x - mu)||^2 / ||x - mu||^2: the part in the null space of J for d -> 0 (an embedding
        LayerNorm removes a direction per token, a causal model's last position never enters the loss), everything for
        d -> infinity. I2F, defined on range(A), leaves this part out. Gauss quadrature of the run, so a lower bound;
        far below ``default_damping``, which is what the run resolves, it may be far too low.
        """
        values, vectors = self.deviation_run.ritz_pairs()
        return float((vectors[0] ** 2 * (damping / (values.clip(min=0) + damping)) ** 2).sum())

    def respond(
        self, perturbation: Mapping[str, Tensor], dampings: Sequence[float] | None = None
    ) -> "PerturbationResponse":
        """Return everything about one perturbation, from one Krylov run.

        Args:
            perturbation: delta per parameter name; missing names count as zero.
            dampings: Dampings at which the run must converge; by default ``default_damping``.

        Returns:
            The response.
        """
        dampings = [self.default_damping] if dampings is None else list(dampings)
        return PerturbationResponse(self, perturbation, dampings)

    def noise(self) -> UnitNoise:
        """Return unit Gaussian noise, as ``GaussianNoise(seed=seed)`` draws it, parameter by parameter when asked."""
        return self._noise

    @cached_property
    def _noise(self) -> UnitNoise:
        """One object, by which ``respond`` knows that it is this solver's noise."""
        return UnitNoise(self.jacobian.parameter_shapes, self.jacobian.dtype, self.seed)

    def solve(self, perturbation: Mapping[str, Tensor], *, damping: float | None = None) -> InfluenceResult:
        """Return the I2F of one perturbation at one damping, by default ``default_damping``."""
        damping = self.default_damping if damping is None else damping
        response = self.respond(perturbation, [damping])
        self._refuse_zero()
        return response.influence(damping)

    def sweep(
        self, noise_stds: Sequence[float], dampings: Sequence[float] | None = None
    ) -> list[list[InfluenceResult]]:
        """Return the I2F of Gaussian noise at every level and damping, for the cost of one solve.

        I2F is linear in delta, so the noise is drawn once and scaled, and all dampings share one Krylov run.

        Args:
            noise_stds: Standard deviations, in the gradient's unit.
            dampings: Dampings; by default ``default_damping`` alone.

        Returns:
            One list per noise level, one result per damping.

        Raises:
            ConfigError: If a level is negative or not finite.
        """
        if not all(is_finite_number(std) and std >= 0 for std in noise_stds):
            raise ConfigError(f"noise_std must be a finite number >= 0, got {list(noise_stds)}")
        dampings = [self.default_damping] if dampings is None else list(dampings)
        response = self.respond(self.noise(), dampings)
        self._refuse_zero()
        return [[response.influence(d, scale=std) for d in dampings] for std in noise_stds]

    def _refuse_zero(self) -> None:
        """Refuse a J without any product different from zero: an I2F of 0 would read as "the noise protects nothing".

        Raises:
            DataError: If the largest eigenvalue of A is zero in this precision.
        """
        if not self.lambda_max.upper > 0:
            raise DataError(
                f"J J^T is zero in {self.jacobian.dtype} at this batch: the shared gradient does not move with the "
                "input, or by less than this precision holds, so nothing can be inverted and I2F does not exist. If "
                "the network is not dead (no active ReLU), load it in float64"
            )


class PerturbationResponse:
    """What one perturbation, or any multiple of it, does to attackers.

    Args:
        solver: The batch's solver.
        perturbation: delta per parameter name.
        dampings: Dampings at which the Krylov run from J delta must converge; others are read from it for nothing.
    """

    def __init__(self, solver: InfluenceSolver, perturbation: Mapping[str, Tensor], dampings: Sequence[float]):
        self.solver = solver
        self.bracket = solver.lambda_max
        own = perturbation is solver.noise()
        run = solver.noise_run if own else Krylov(solver.operator, solver.response(perturbation))
        self.norm = run.start_norm
        settings = {"tol": solver.tol, "width": ENCLOSURE * solver.tol, "max_products": solver.max_products}
        needed = extend_krylov(run, dampings, **settings)
        # As long as these dampings need, and no longer: other calls may have continued the run, or will.
        self.krylov = run.after(max(needed, self.bracket.iterations) if own else needed)
        # Damping 0 is read from the run the others needed: certified lower bounds, rarely a converged solution.
        (undamped,) = krylov_solve(self.krylov, [0.0], tol=solver.tol)
        self.bounds = undamped.lower_bounds
        self.products = self.krylov.dimension + (0 if own else self.bracket.iterations)

    def influence(self, damping: float, *, scale: float = 1.0) -> InfluenceResult:
        """Return the I2F of ``scale`` times the perturbation.

        Args:
            damping: d >= 0, in units of A.
            scale: Multiple of the perturbation; free, because I2F is linear in it.

        Returns:
            The influence with its bounds.
        """
        tol = self.solver.tol
        (solved,) = krylov_solve(self.krylov, [damping], tol=tol, width=ENCLOSURE * tol)
        dx, bracket = self.solver.jacobian.dx, self.bracket
        return InfluenceResult(
            influence=magnitude(scale * solved.norm, dx),
            upper_bound=magnitude(scale * solved.upper_bound if scale else 0.0, dx),
            lower_bound=magnitude(scale * self.norm / bracket.upper if bracket.upper else 0.0, dx),
            cg_bounds=tuple(scale * bound for bound in self.bounds),
            lambda_max=bracket.upper,
            lambda_max_residual=bracket.upper / bracket.value - 1 if bracket.value > 0 else math.inf,
            failure_probability=bracket.failure_probability,
            damping=damping,
            residual=solved.residual,
            converged=solved.converged,
            products=self.products,
            dx=dx,
            by_autodiff=self.solver.jacobian.by_autodiff,
            error=self.solver.jacobian.unflatten(scale * solved.solution),
        )

    def predicted_error(self, noise_std: float, *, scale: float = 1.0) -> PredictedError:
        """Return the error of the attacker who knows the noise level and the prior (MAP), to first order.

        xhat - x = (A + d I)^-1 (J delta - d (x - mu)), d = sigma^2 / tau^2: the noise's response minus what shrinking
        towards the prior's mean loses. Unlike I2F it saturates, at x - mu, when noise drowns the gradient.

        Args:
            noise_std: sigma, what the attacker believes the perturbation's standard deviation to be; positive.
            scale: Multiple of the perturbation.

        Returns:
            The error and its converged flag.
        """
        damping = self.solver.map_damping(noise_std)
        (response,) = krylov_solve(self.krylov, [damping], tol=self.solver.tol)
        (shrinkage,) = krylov_solve(self.solver.deviation_run, [damping], tol=DEVIATION_TOLERANCE)
        error = scale * response.solution - damping * shrinkage.solution
        size = error.double().norm().item()
        # d (A + d I)^-1 maps the shrinkage's residual to an error of at most its own size.
        open_part = shrinkage.residual * self.solver.deviation.double().norm().item()
        return PredictedError(
            error=magnitude(size, self.solver.jacobian.dx),
            damping=damping,
            converged=response.converged and open_part <= PREDICTION_TOLERANCE * size,
        )
