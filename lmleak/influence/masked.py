"""Pruning against attackers who see where it happened: risk is the conditioning of J on the kept coordinates.

A pruned coordinate is a visible zero. Whoever ignores that inverts g + delta and errs by (J J^T)^-1 J delta; whoever
uses it matches the kept coordinates alone, where delta = 0, and errs only by what J_kept does not determine and by
noise. The naive I2F then says nothing about privacy. Ours; Zhang et al. 2023 (arXiv:2309.13016, figure 13) give the
naive value.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lmleak.errors import DataError
from lmleak.influence.directions import EigenDirections, eigen_directions
from lmleak.influence.jacobian import InputJacobian
from lmleak.influence.solver import magnitude
from lmleak.types import Magnitude


class MaskedJacobian(InputJacobian):
    """J on some coordinates of theta: the columns of the others are zero.

    For an attacker who matches directions, mask J first: ``CosineJacobian(MaskedJacobian(J, kept), kept gradient)``.

    Args:
        jacobian: J.
        kept: Boolean per parameter name: True where the coordinate is released. A missing name is not released.

    Raises:
        DataError: If a name or shape is not J's.
    """

    def __init__(self, jacobian: InputJacobian, kept: Mapping[str, Tensor]):
        super().__init__(jacobian.x, jacobian.free, jacobian.parameter_shapes)
        for name, mask in kept.items():
            if mask.shape != jacobian.parameter_shapes.get(name):
                expected = jacobian.parameter_shapes.get(name)
                raise DataError(f"the mask of {name!r} has shape {tuple(mask.shape)}, J's parameter {expected}")
        self.jacobian = jacobian
        self.perturbation_scale, self.by_autodiff = jacobian.perturbation_scale, jacobian.by_autodiff
        self.kept = {name: mask.to(jacobian.device) for name, mask in kept.items()}
        self.num_kept = sum(int(mask.sum()) for mask in kept.values())

    def _matvec(self, delta):
        return self.jacobian.matvec({n: d * self.kept[n] for n, d in delta.items() if n in self.kept})

    def _rmatvec(self, v):
        product = self.jacobian.rmatvec(v)
        return {n: p * self.kept[n] if n in self.kept else p * 0 for n, p in product.items()}


@dataclass(frozen=True)
class MaskAwareInfluence:
    """What a pruned release leaves to the attacker who knows the mask, beside the naive value."""

    kept_share: float
    """Released coordinates over P."""
    rank: int
    """Rank of J_kept."""
    nullity: int
    """Directions of x that the released coordinates say nothing about."""
    lambda_min: float
    """Smallest eigenvalue of J_kept J_kept^T; 0 if it is singular."""
    effective_rank: float
    """Coordinates of x determined at the noise level, sum lambda / (lambda + sigma^2 / tau^2)."""
    aware: Magnitude
    """Root mean square error of the best attacker who knows mask, noise level and prior."""
    aware_unbiased: Magnitude
    """The same without a prior, sigma sqrt(tr((J_kept J_kept^T)^-1)); infinite if singular."""
    naive: Magnitude
    """I2F of delta = released - true: the attacker who takes pruned coordinates for zeros."""


def mask_aware_influence(
    directions: EigenDirections,
    gradient: Mapping[str, Tensor],
    released: Mapping[str, Tensor],
    *,
    noise_std: float,
    prior_std: float,
    damping: float = 0.0,
) -> MaskAwareInfluence:
    """Return both readings of one pruned gradient, exactly; dx up to a few thousand.

    Args:
        directions: Spectrum of the whole J; one for all pruning ratios.
        gradient: The true gradient, per parameter of J.
        released: The pruned gradient before noise: its zeros are what the attacker sees pruned.
        noise_std: sigma of extra noise on the kept coordinates; 0 for none.
        prior_std: tau, in units of x.
        damping: Of the naive value; 0 takes the pseudo-inverse.

    Returns:
        The influence.
    """
    jacobian = directions.jacobian
    kept = MaskedJacobian(jacobian, {name: value != 0 for name, value in released.items()})
    spectrum = eigen_directions(kept)
    withheld = {n: released[n] - g if n in released else -g for n, g in gradient.items()}
    return MaskAwareInfluence(
        kept_share=kept.num_kept / jacobian.shape[1],
        rank=spectrum.rank,
        nullity=spectrum.nullity,
        lambda_min=spectrum.values[-1].item(),
        effective_rank=spectrum.effective_rank(noise_std, prior_std),
        aware=spectrum.bayes_error(noise_std, prior_std),
        aware_unbiased=spectrum.expected_error(noise_std),
        naive=magnitude(directions.influence(withheld, damping=damping).norm().item(), directions.dx),
    )
