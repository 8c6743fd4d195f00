"""The spectrum of A = J J^T with its directions, exactly: what noise does along each of them, and on average.

J = U S V^T. A perturbation c v_i along a right singular vector moves the attacker who inverts the gradient by
c u_i / s_i, so its mean squared error is c^2 / (dx lambda_i) with lambda_i = s_i^2 (Zhang et al. 2023,
arXiv:2309.13016, figure 5, whose text has 1 / lambda for what is the squared error). Averages over Gaussian noise of
deviation sigma, per coordinate of x, are traces over this spectrum:
  unbiased   sigma^2 tr(A^-1) / dx                        the Cramer-Rao bound and E[I2F^2] / dx
  damped     sigma^2 tr(A (A + d I)^-2) / dx              E[I2F^2] / dx of the damped influence
  bayes      tr((A / sigma^2 + I / tau^2)^-1) / dx        the best attacker who knows mean and deviation of x
  bayes      tr((A / sigma^2 + Sigma^-1)^-1) / dx         who knows mean and covariance of x, say from public images
``expected_influence`` estimates the first three by random probes where dx is too large for this module.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lmleak.errors import ConfigError, DataError
from lmleak.influence.dense import CHUNK, dense_gram, resolution
from lmleak.influence.jacobian import InputJacobian
from lmleak.influence.solver import magnitude
from lmleak.types import Magnitude


@dataclass(frozen=True)
class EigenDirections:
    """Eigenvalues and eigenvectors of A, and everything that follows from them. Float64, on J's device."""

    jacobian: InputJacobian = field(repr=False)
    values: Tensor = field(repr=False)
    """(dx,) eigenvalues of A, largest first; what rounding cannot tell from zero is zero."""
    vectors: Tensor = field(repr=False)
    """(dx, dx) orthonormal eigenvectors u_i as columns, over the free coordinates of x."""

    @property
    def dx(self) -> int:
        """Number of free coordinates of x."""
        return len(self.values)

    @property
    def rank(self) -> int:
        """How many directions of x the gradient determines at all: eigenvalues that are not zero."""
        return int((self.values > 0).sum())

    @property
    def nullity(self) -> int:
        """How many directions of x the gradient says nothing about, dx - rank."""
        return self.dx - self.rank

    @property
    def singular_values(self) -> Tensor:
        """(dx,) s_i = sqrt(lambda_i)."""
        return self.values.sqrt()

    @property
    def gram(self) -> Tensor:
        """A (dx, dx), put together again."""
        return (self.vectors * self.values) @ self.vectors.T

    def input_direction(self, index: int) -> Tensor:
        """Return u_i, shaped like x: the image that is lost when noise lies along v_i."""
        return self.jacobian.unflatten(self.vectors[:, index].to(self.jacobian.dtype))

    def gradient_direction(self, index: int) -> dict[str, Tensor]:
        """Return v_i = J^T u_i / s_i, a perturbation of norm one per parameter name.

        Args:
            index: i, 0 for the largest eigenvalue.

        Returns:
            The direction in the space of the gradient.
        """
        unit = torch.zeros_like(self.values)
        unit[index] = 1
        return self.gradient_combination(unit)

    def gradient_combination(self, coefficients: Tensor) -> dict[str, Tensor]:
        """Return sum_i c_i v_i, a perturbation per parameter name, by one product.

        Args:
            coefficients: c (dx,); zero where lambda_i is zero.

        Returns:
            The perturbation, of norm ||c||.

        Raises:
            ConfigError: If a coefficient lies on a direction without a v_i, one whose eigenvalue is zero.
        """
        coefficients = coefficients.to(self.values)
        if coefficients[self.rank :].any():
            raise ConfigError(
                f"J has rank {self.rank} of dx = {self.dx}: directions from index {self.rank} on have no counterpart "
                "in the gradient; choose a smaller index"
            )
        scaled = coefficients[: self.rank] / self.singular_values[: self.rank]
        flat = self.vectors[:, : self.rank] @ scaled
        return self.jacobian.rmatvec(self.jacobian.unflatten(flat.to(self.jacobian.dtype)))

    def influence(self, perturbation: Mapping[str, Tensor], *, damping: float = 0.0) -> Tensor:
        """Return the predicted error (A + d I)^-1 J delta of one perturbation, by one product.

        Args:
            perturbation: delta per parameter name.
            damping: d; 0 takes the pseudo-inverse.

        Returns:
            The error, shaped like x, float64.
        """
        response = self.jacobian.flatten(self.jacobian.matvec(perturbation)) * self.jacobian.perturbation_scale
        along = (self.vectors.T @ response.double())[: self.rank] / (self.values[: self.rank] + damping)
        error = self.vectors[:, : self.rank] @ along
        free = self.jacobian.free
        return torch.zeros(free.shape, dtype=torch.float64, device=error.device).masked_scatter(free, error)

    def direction_mse(self, index: int, norm: float) -> float:
        """Return the predicted mean squared error per coordinate of delta = norm v_i: norm^2 / (dx lambda_i)."""
        return norm**2 / (self.dx * self.values[index].item()) if index < self.rank else math.inf

    def undetermined_share(self, deviation: Tensor) -> float:
        """Return the share of ||x - mu||^2 in the null space of A, which I2F, a pseudo-inverse, leaves out.

        Args:
            deviation: x - mu, shaped like x.

        Returns:
            A number in [0, 1].
        """
        along = self.vectors.T @ self.jacobian.flatten(deviation).double()
        return (along[self.rank :].square().sum() / along.square().sum()).item()

    # Averages over noise N(0, sigma^2 I) on the gradient -------------------------------------------------

    def expected_error(self, noise_std: float) -> Magnitude:
        """Return the root mean square of the undamped I2F, sigma sqrt(tr(A^-1)): infinite if A is singular.

        It is the Cramer-Rao bound of unbiased attackers, A / sigma^2 being the Fisher information of x.
        """
        if self.nullity:
            return magnitude(math.inf, self.dx)
        return magnitude(noise_std * self.values.reciprocal().sum().sqrt().item(), self.dx)

    def damped_error(self, noise_std: float, damping: float) -> Magnitude:
        """Return the root mean square of the damped I2F, sigma sqrt(tr(A (A + d I)^-2))."""
        response = self.values / (self.values + damping) ** 2
        return magnitude(noise_std * response[: self.rank].sum().sqrt().item(), self.dx)

    def damped_inverse_trace(self, damping: float) -> float:
        """Return tr((A + d I)^-1); infinite for d = 0 if A is singular."""
        return (self.values + damping).reciprocal().sum().item()

    def mean_inverse_singular_value(self) -> float:
        """Return mean(1 / s_i): what the published initialisation study plots and calls E[I^2]."""
        return self.singular_values.reciprocal().mean().item()

    def effective_rank(self, noise_std: float, prior_std: float) -> float:
        """Return sum lambda / (lambda + sigma^2 / tau^2): coordinates of x that the noisy gradient determines."""
        return (self.values / (self.values + (noise_std / prior_std) ** 2))[: self.rank].sum().item()

    def bayes_error(self, noise_std: float, prior_std: float) -> Magnitude:
        """Return the root mean square error of the best attacker who knows x ~ N(mu, tau^2 I).

        Args:
            noise_std: sigma, in the gradient's unit; 0 leaves the null space alone.
            prior_std: tau, in units of x.

        Returns:
            The error; its ``rms`` never exceeds tau.
        """
        return magnitude(posterior_variances(self.values, noise_std**2, prior_std).sum().sqrt().item(), self.dx)

    def bayes_error_under(self, noise_std: float, covariance: Tensor) -> Magnitude:
        """Return the root mean square error of the best attacker who knows x ~ N(mu, Sigma).

        With Sigma = L L^T the posterior covariance is L (I + L^T A L / sigma^2)^-1 L^T, which allows a singular Sigma
        (pixels that are black in every public image are known).

        Args:
            noise_std: sigma, positive, in the gradient's unit.
            covariance: Sigma (dx, dx) over the free coordinates, in units of x squared, as :func:`image_prior` gives.

        Returns:
            The error; at most sqrt(tr(Sigma)), the prior's own.

        Raises:
            DataError: If the covariance has another shape.
        """
        if covariance.shape != (self.dx, self.dx):
            raise DataError(f"expected a covariance of shape {(self.dx, self.dx)}, got {tuple(covariance.shape)}")
        spread, axes = torch.linalg.eigh(covariance.to(self.values))
        root = axes * spread.clamp(min=0).sqrt()  # L
        gains, rotation = torch.linalg.eigh(root.T @ self.gram @ root)
        variances = (root @ rotation).square().sum(0)
        total = (variances / (1 + gains.clamp(min=0) / noise_std**2)).sum()
        return magnitude(total.sqrt().item(), self.dx)

    def std_for_error(self, target_rms: float, prior_std: float | None = None) -> float:
        """Return the noise level at which this input's predicted root mean square error is a target.

        Without a prior, sigma = target sqrt(dx / tr(A^-1)), exact. With one, the level at which ``bayes_error`` is the
        target, by bisection: more noise, because shrinking to the prior helps the attacker.

        Args:
            target_rms: Wanted error per coordinate, in units of x.
            prior_std: tau; None assumes an attacker without a prior.

        Returns:
            sigma, in the gradient's unit; it depends on the private input, and so tells something about it.

        Raises:
            ConfigError: If no noise gives this error: it reaches the prior's own, or the null space alone exceeds it.
        """
        if prior_std is None:
            unit = self.expected_error(1.0).rms
            if math.isinf(unit):
                raise ConfigError(
                    f"A is singular ({self.nullity} of {self.dx} directions), so an attacker without a prior errs "
                    "without bound; pass prior_std="
                )
            return target_rms / unit
        least = self.bayes_error(0.0, prior_std).rms
        if not least < target_rms < prior_std:
            raise ConfigError(
                f"expected a target between {least:.3g}, the error without noise, and {prior_std:.3g}, the prior's "
                f"own; got {target_rms:.3g}"
            )
        low, high = 0.0, prior_std * self.singular_values[0].item()
        while self.bayes_error(high, prior_std).rms < target_rms:
            low, high = high, 2 * high
        while high - low > 1e-12 * high:
            middle = (low + high) / 2
            low, high = (middle, high) if self.bayes_error(middle, prior_std).rms < target_rms else (low, middle)
        return high


def eigen_directions(
    jacobian: InputJacobian, *, chunk_size: int = CHUNK, largest: int | None = None
) -> EigenDirections:
    """Return the eigendecomposition of A = J J^T, by dx batched products; dx up to a few thousand.

    Args:
        jacobian: J; also J_c, a masked J, or that of a FedAvg update.
        chunk_size: Products computed at once.
        largest: Most numbers that J may hold as a matrix (:func:`dense_gram`).

    Returns:
        The directions.

    Raises:
        DataError: If a product with J is not finite.
    """
    gram = dense_gram(jacobian, chunk_size=chunk_size, largest=largest)
    if not torch.isfinite(gram).all():
        raise DataError("a product with J is NaN or Inf; check the model and the loss at this input")
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0), vectors.flip(1)
    return EigenDirections(jacobian, values.where(values > resolution(jacobian, largest) * values[0], 0.0), vectors)


def posterior_variances(values: Tensor, noise_variances: Tensor | float, prior_std: float) -> Tensor:
    """Return tau^2 q / (q + tau^2 lambda) per direction: what is left of tau^2 after noise of variance q on it.

    Args:
        values: lambda.
        noise_variances: q, one for all or one each.
        prior_std: tau.

    Returns:
        Posterior variances; tau^2 where lambda is 0.
    """
    share = noise_variances / (noise_variances + prior_std**2 * values)
    return prior_std**2 * share.where(values > 0, 1.0)


def image_prior(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean (dx,) and covariance (dx, dx) of public images, the prior for ``bayes_error_under``.

    Args:
        images: (N, C, H, W), normalised as the model reads them.

    Returns:
        Sample mean and unbiased sample covariance, float64; singular where N <= dx.

    Raises:
        DataError: If there are fewer than two images.
    """
    if len(images) < 2:
        raise DataError(f"a covariance needs at least 2 public images, got {len(images)}")
    flat = images.flatten(1).double()
    centred = flat - flat.mean(0)
    return flat.mean(0), centred.T @ centred / (len(flat) - 1)
