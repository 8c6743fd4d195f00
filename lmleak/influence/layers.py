"""What each layer's gradient would give away by itself, and what would be left if that layer were withheld.

A = sum_l A_l with A_l = J_l J_l^T, so a partial release is a partial sum: A_l alone, or A - A_l. Neither follows from
the shares of ``split``, which divide the error of the whole release: layers are redundant (a share of tr(A) near 1
says nothing about what the others determine) and they complete one another (each may be singular where the sum is
not). Ours: Mo et al. (arXiv:2105.13929) localise leakage by layer, with other measures; Zhang et al. 2023
(arXiv:2309.13016) take the whole gradient.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lmleak.adapters.base import ModelAdapter, Prior
from lmleak.errors import ConfigError
from lmleak.influence.jacobian import GradientJacobian, InputJacobian
from lmleak.influence.solver import (
    MAX_PRODUCTS,
    PREDICTION_TOLERANCE,
    SOLVER_TOLERANCE,
    InfluenceSolver,
    magnitude,
)
from lmleak.linops import multishift_cg
from lmleak.types import Batch, Magnitude

SHRINKAGE_ACCURACY = 1e-2  # of the solve from x - mu, in multiples of tol


@dataclass(frozen=True)
class PartialRelease:
    """What the attacker makes of some of the parameters' noisy gradient. Lengths in units of x, ``l2`` and ``rms``."""

    map_error: Magnitude
    """||(A + d I)^-1 (J delta - d (x - mu))||, d = sigma^2 / tau^2: the error of the attacker who knows noise level
    and prior. Small means leaked; at most about ||x - mu||, what is known without any gradient."""
    influence: Magnitude
    """||(A + d I)^-1 J delta||, the noise's part of it. By itself it ranks nothing: a layer that says little lets
    little noise through too, and its I2F is small for that reason."""
    undetermined: float
    """||d (A + d I)^-1 (x - mu)||^2 / ||x - mu||^2: the share of x that this release does not determine at this noise
    level, in [0, 1]."""
    converged: bool
    """Whether the solves behind ``map_error``, ``influence`` and ``undetermined`` met their tolerances."""
    products: int
    """Products with A that it took."""


@dataclass(frozen=True)
class LayerInfluence:
    """One layer, alone and withheld."""

    only: PartialRelease
    """This layer's gradient is released and nothing else."""
    without: PartialRelease
    """All shared layers but this one are released."""
    dx: int
    """Number of free coordinates of x."""

    @property
    def converged(self) -> bool:
        """Whether both parts are."""
        return self.only.converged and self.without.converged

    @property
    def products(self) -> int:
        """Products with parts of A, both parts together."""
        return self.only.products + self.without.products


def influence_of_layers(
    adapter: ModelAdapter,
    batch: Batch,
    *,
    noise_std: float,
    shared: str = "no-word-embeddings",
    layers: Mapping[str, Sequence[str]] | None = None,
    seed: int = 0,
    tol: float = SOLVER_TOLERANCE,
    max_products: int = MAX_PRODUCTS,
) -> dict[str, LayerInfluence]:
    """Return what every layer leaks alone, and what the others leak without it, under Gaussian noise of one level.

    Every release is judged at the same noise (the layer's part of ``GaussianNoise(std=noise_std, seed=seed)``), the
    same prior and therefore the same damping sigma^2 / tau^2, so the numbers compare between layers. On average over
    the noise more parameters never give a larger MAP error; for one draw they may. All parts share J's graphs.

    Args:
        adapter: The model.
        batch: The private batch.
        noise_std: sigma, positive, in the gradient's unit.
        shared: Which parameters are released at all.
        layers: Parameter names per layer; names that are not shared are ignored, and layers without any left out.
            None takes ``adapter.roles()``.
        seed: Seed of the noise and of the solver's random starts.
        tol: Relative residual of the solves.
        max_products: Most products per Krylov run; dx of them end every run.

    Returns:
        Layer -> influence.

    Raises:
        ConfigError: If the noise is not positive or no layer has a shared parameter.
    """
    if not noise_std > 0:
        raise ConfigError(
            f"noise_std must be positive, got {noise_std!r}: without noise any layer of full rank gives x away, and "
            "the MAP error ranks nothing; write noise_std=1e-3"
        )
    whole = GradientJacobian(adapter, batch, shared=shared)
    names = {layer: [n for n in members if n in whole.parameter_shapes]
             for layer, members in (adapter.roles() if layers is None else layers).items()}  # fmt: skip
    names = {layer: members for layer, members in names.items() if members}
    if not names:
        raise ConfigError(f"none of the layers has a parameter that shared={shared!r} shares; pass adapter.roles()")
    release = lambda kept: (
        _release(whole.restrict(kept), adapter.prior(), noise_std, seed, tol, max_products)
        if kept else _nothing(whole, adapter.prior())
    )  # fmt: skip
    return {
        layer: LayerInfluence(
            only=release(members),
            without=release([n for n in whole.parameter_names if n not in members]),
            dx=whole.dx,
        )
        for layer, members in names.items()
    }


def _release(
    jacobian: InputJacobian, prior: Prior, noise_std: float, seed: int, tol: float, max_products: int
) -> PartialRelease:
    solver = InfluenceSolver(jacobian, prior, tol=tol, max_products=max_products, seed=seed)
    damping, deviation = solver.map_damping(noise_std), solver.deviation
    influence = solver.respond(solver.noise(), [damping]).influence(damping, scale=noise_std)
    # At this noise level's own damping, and closely: what shrinking leaves open must be small beside a small error.
    settings = {"tol": SHRINKAGE_ACCURACY * tol}
    (shrinkage,) = multishift_cg(solver.operator, deviation, [damping], max_products=max_products, **settings)
    lost, size = damping * shrinkage.solution, deviation.double().norm().item()
    error = (jacobian.flatten(influence.error) - lost).double().norm().item()
    return PartialRelease(
        map_error=magnitude(error, jacobian.dx),
        influence=influence.influence,
        undetermined=(lost.double().norm().item() / size) ** 2,
        # d (A + d I)^-1 maps the shrinkage's residual to an error of at most its own size.
        converged=influence.converged and shrinkage.residual * size <= PREDICTION_TOLERANCE * error,
        products=solver.operator.products,
    )


def _nothing(jacobian: InputJacobian, prior: Prior) -> PartialRelease:
    """Return what an attacker without any gradient has: the prior."""
    deviation = InfluenceSolver(jacobian, prior).deviation.double().norm().item()
    return PartialRelease(
        map_error=magnitude(deviation, jacobian.dx), influence=magnitude(0.0, jacobian.dx),
        undetermined=1.0, converged=True, products=0,
    )  # fmt: skip
