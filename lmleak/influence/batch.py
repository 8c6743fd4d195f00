"""I2F of batches: every example's error, when all are unknown and when the attacker knows the others.

The gradient is a mean, so J stacks the blocks J_i / B (per example, over B examples) into (B dx) x P. With all
unknown, example i errs by block i of A^-1 J delta; with the others known, by B (J_i J_i^T)^-1 J_i delta. Rank never
exceeds P, often less: softmax regression with C classes on d pixels has rank at most (C - 1)(d + 1), since the
gradient's rows over the classes sum to zero. Beyond it A is singular and some images are not determined at all.
Ours; Zhang et al. 2023 (arXiv:2309.13016) treat batches of one.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lmleak.errors import DataError
from lmleak.influence.dense import resolution
from lmleak.influence.directions import EigenDirections
from lmleak.influence.jacobian import InputJacobian
from lmleak.influence.solver import MAX_PRODUCTS, SOLVER_TOLERANCE, InfluenceResult, magnitude
from lmleak.linops import multishift_cg
from lmleak.types import Magnitude


class PartialInputJacobian(InputJacobian):
    """J on some coordinates of x, the attacker knowing the others.

    Args:
        jacobian: J.
        unknown: Boolean, shaped like x.

    Raises:
        DataError: If the mask has another shape or leaves nothing unknown.
    """

    def __init__(self, jacobian: InputJacobian, unknown: Tensor):
        if unknown.shape != jacobian.x.shape or not (unknown & jacobian.free).any():
            raise DataError(
                f"expected a mask shaped like x, {tuple(jacobian.x.shape)}, with unknown coordinates; "
                f"got {tuple(unknown.shape)} with {int(unknown.sum())} of them"
            )
        super().__init__(jacobian.x, jacobian.free & unknown, jacobian.parameter_shapes)
        self.jacobian = jacobian
        self.perturbation_scale, self.by_autodiff = jacobian.perturbation_scale, jacobian.by_autodiff
        self.block_size = jacobian.block_size

    @classmethod
    def of_example(cls, jacobian: InputJacobian, index: int) -> "PartialInputJacobian":
        """Return J on one example of the batch."""
        unknown = torch.zeros_like(jacobian.free)
        unknown[index] = True
        return cls(jacobian, unknown)

    def _matvec(self, delta):
        return self.jacobian.matvec(delta)

    def _rmatvec(self, v):
        return self.jacobian.rmatvec(v)

    def _gram(self, v):
        return self.jacobian.gram(v)


@dataclass(frozen=True)
class ExampleInfluence:
    """One example's predicted error."""

    joint: Magnitude
    """With the whole batch unknown."""
    others_known: Magnitude
    """With every other example known to the attacker: never larger on average over noise, usually far smaller."""
    converged: bool = True
    """Whether the solves behind both met the tolerance."""


def influence_by_example(
    jacobian: InputJacobian,
    perturbation: Mapping[str, Tensor],
    result: InfluenceResult,
    *,
    tol: float = SOLVER_TOLERANCE,
    max_products: int = MAX_PRODUCTS,
) -> list[ExampleInfluence]:
    """Return every example's I2F for one perturbation, without forming A: one more solve per example.

    Args:
        jacobian: J of the batch.
        perturbation: The delta that ``result`` was computed from.
        result: Its I2F; its damping, in units of the batch's A, is that of all solves.
        tol: Relative residual of the solves.
        max_products: Most products with A per solve.

    Returns:
        One per example; the squares of ``joint.l2`` add to ``result.influence.l2`` squared.
    """
    response = jacobian.matvec(perturbation) * jacobian.perturbation_scale
    influences = []
    for index in range(len(jacobian.x)):
        part = PartialInputJacobian.of_example(jacobian, index)
        operator = part.gram_operator()
        b = part.flatten(response)
        (solved,) = multishift_cg(operator, b, [result.damping], tol=tol, max_products=max_products)
        joint = part.flatten(result.error).double().norm().item()
        influences.append(
            ExampleInfluence(
                joint=magnitude(joint, part.dx),
                others_known=magnitude(solved.norm, part.dx),
                converged=result.converged and solved.converged,
            )
        )
    return influences


def expected_by_example(
    directions: EigenDirections, noise_std: float, prior_std: float | None = None
) -> list[ExampleInfluence]:
    """Return every example's root mean square error over Gaussian noise, exactly.

    With d = sigma^2 / tau^2 (0 without a prior): joint, sigma sqrt(tr [(A + d I)^-1]_ii); others known, sigma
    sqrt(tr (A_ii + d I)^-1). Without a prior these are Cramer-Rao bounds, infinite where A or A_ii is singular.

    Args:
        directions: Spectrum of the batch's A; its ``rank``, ``nullity`` and ``values`` tell the rank transition.
        noise_std: sigma, positive, in the gradient's unit.
        prior_std: tau, in units of x; None for attackers without a prior.

    Returns:
        One per example.
    """
    jacobian, gram = directions.jacobian, directions.gram
    damping = 0.0 if prior_std is None else (noise_std / prior_std) ** 2
    joint = (directions.vectors.square() / (directions.values + damping)).sum(1) if damping else _inverse(directions)
    smallest = resolution(jacobian) * directions.values[0]
    numbers = torch.arange(len(jacobian.x), device=jacobian.device).reshape(-1, *[1] * (jacobian.x.dim() - 1))
    owner = jacobian.flatten(numbers.expand(jacobian.x.shape))
    influences = []
    for index in range(len(jacobian.x)):
        rows = (owner == index).nonzero().squeeze(1)
        values = torch.linalg.eigvalsh(gram[rows][:, rows])
        alone = (values.where(values > smallest, 0.0) + damping).reciprocal().sum()
        errors = (noise_std * math.sqrt(total.item()) for total in (joint[rows].sum(), alone))
        influences.append(ExampleInfluence(*(magnitude(error, len(rows)) for error in errors)))
    return influences


def _inverse(directions: EigenDirections) -> Tensor:
    """Return the diagonal of A^-1: infinite where the coordinate takes part in the null space."""
    kept, null = directions.vectors[:, : directions.rank], directions.vectors[:, directions.rank :]
    diagonal = (kept.square() / directions.values[: directions.rank]).sum(1)
    return diagonal.masked_fill(null.square().sum(1) > torch.finfo(diagonal.dtype).eps ** 0.5, math.inf)
