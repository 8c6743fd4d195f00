"""Noise shaped to the directions in which the attacker is weakest, at a given expected norm.

delta = sum_i z_i c_i v_i with z_i ~ N(0, 1) independent and v_i the right singular vectors of J: noise off the row
space of J costs accuracy and hides nothing from who linearises. Let q_i = c_i^2. The best attacker among those knows
the levels q (a defense is public) and the prior N(mu, tau^2 I), and errs on direction i by the posterior variance
    e_i(q_i) = (lambda_i / q_i + 1 / tau^2)^-1 = tau^2 q_i / (q_i + a_i),   a_i = tau^2 lambda_i,
concave in q_i and at most tau^2. Maximise sum_i e_i subject to sum_i q_i = norm^2, q_i >= 0. Stationarity,
tau^2 a_i / (q_i + a_i)^2 = mu, gives, with the level w = tau / sqrt(mu),
    q_i = sqrt(a_i) (w - sqrt(a_i))   where sqrt(a_i) < w, else 0
    w = (norm^2 + sum_active a_i) / sum_active sqrt(a_i)
so noise starts at the smallest singular values, spreads upwards as the norm grows, and stays near zero where almost
nothing is needed to reach tau^2. The error is (tau^2 sum_active (1 - sqrt(a_i) / w) + tau^2 nullity). Isotropic noise
of the same norm, q_i = norm^2 / P, is feasible, so this is never worse against that attacker.

**Do not use it to protect anything.** An attacker who does not linearise removes it: the noise is J(x)^T w for some w,
so the release g(x) + J(x)^T w holds P equations without noise in 2 dx unknowns, and Levenberg-Marquardt on (x, w)
returned the image exactly in 9 of 9 releases, under noise as large as the gradient too
(``recipes/spectral_defense.py``). Noise that is shaped by the input carries the input. It is kept as the tool of
that study.

Without the saturation at tau^2 all noise would go to lambda_min, the error c^2 / lambda_min of I2F being unbounded:
true of an attacker without any prior only. The scheme answers a suggestion of Zhang et al. 2023 (arXiv:2309.13016,
figure 5); the derivation is ours. The noise's covariance depends on the private input: it gives no differential
privacy, and an attacker who sees many releases of one input can estimate the shape and learn from it.
"""

from dataclasses import dataclass, field
from math import inf, isfinite

import torch
from torch import Tensor

from lmleak.defenses.base import Release
from lmleak.defenses.noise import unit_noise
from lmleak.errors import ConfigError, UnsupportedCombinationError
from lmleak.gradients.shared import SharedGradient
from lmleak.influence.directions import EigenDirections, posterior_variances
from lmleak.influence.solver import magnitude
from lmleak.types import Magnitude


@dataclass(frozen=True)
class SpectralNoise:
    """Noise levels per direction, and what they do."""

    directions: EigenDirections = field(repr=False)
    stds: Tensor = field(repr=False)
    """(dx,) c_i, in the order of ``directions.values``."""
    prior_std: float
    """tau."""

    @property
    def norm(self) -> float:
        """sqrt(E ||delta||^2)."""
        return self.stds.norm().item()

    @property
    def num_directions(self) -> int:
        """How many directions carry noise."""
        return int((self.stds > 0).sum())

    @property
    def predicted_error(self) -> Magnitude:
        """Root mean square error of the best attacker who linearises g and knows the levels and the prior.

        No bound for others, who remove the noise (see the module).
        """
        variances = posterior_variances(self.directions.values, self.stds.square(), self.prior_std)
        return magnitude(variances.sum().sqrt().item(), self.directions.dx)

    @property
    def unbiased_error(self) -> Magnitude:
        """Root mean square of I2F, sqrt(sum c_i^2 / lambda_i): the attacker who inverts and knows no prior."""
        rank = self.directions.rank
        total = (self.stds[:rank].square() / self.directions.values[:rank]).sum()
        return magnitude(total.sqrt().item(), self.directions.dx)

    def draw(self, seed: int) -> dict[str, Tensor]:
        """Return delta per parameter name.

        Args:
            seed: Seed of z; whoever knows it can subtract the noise.

        Returns:
            The perturbation, in J's precision.
        """
        z = unit_noise("spectral", self.stds.shape, torch.float64, seed).to(self.stds)
        return self.directions.gradient_combination(self.stds * z)

    def release(self, shared: SharedGradient, *, seed: int) -> Release:
        """Return the gradient with the noise on it, and the noise.

        Args:
            shared: The gradient of the input that the directions belong to, over the same parameters.
            seed: Seed of the noise.

        Returns:
            What the server receives, described as "spectral(norm=...)", and delta.

        Raises:
            UnsupportedCombinationError: If the gradient shares other parameters than J.
        """
        if set(shared.gradient) != set(self.directions.jacobian.parameter_names):
            raise UnsupportedCombinationError(
                f"the gradient is of shared={shared.shared!r} and J of other parameters; build both with the same "
                "shared="
            )
        delta = self.draw(seed)
        noisy = {name: value + delta[name].to(value) for name, value in shared.gradient.items()}
        released = shared.released(noisy, f"spectral(norm={self.norm:.6g})")
        return Release(released, released.perturbation_from(shared))


def spectral_noise(directions: EigenDirections, *, norm: float, prior_std: float) -> SpectralNoise:
    """Return the noise of a given expected norm that maximises the best attacker's error.

    Args:
        directions: Spectrum of J at the input to protect.
        norm: sqrt(E ||delta||^2), positive, in the gradient's unit.
        prior_std: tau, in units of x.

    Returns:
        The noise.

    Raises:
        ConfigError: If norm or prior is not positive and finite, or J is zero.
    """
    if not all(isfinite(value) and value > 0 for value in (norm, prior_std)):
        raise ConfigError(f"expected a positive norm and prior_std, got norm={norm!r}, prior_std={prior_std!r}")
    if not directions.rank:
        raise ConfigError("J is zero: the gradient tells nothing about x and needs no noise")
    roots = prior_std * directions.singular_values  # sqrt(a_i), largest first
    ascending = roots[: directions.rank].flip(0)
    # The level if the k weakest directions were active; the right k is the first whose next one lies above its level.
    levels = (norm**2 + ascending.square().cumsum(0)) / ascending.cumsum(0)
    above = torch.cat([ascending[1:], ascending.new_tensor([inf])])
    level = levels[(levels <= above).nonzero()[0]]
    return SpectralNoise(directions, (roots * (level - roots)).clamp(min=0).sqrt(), prior_std)
