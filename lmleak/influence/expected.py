"""What noise does on average, without drawing it: traces of functions of A = J J^T.

For noise N(0, sigma^2 I) on the gradient and damping d, with eigenvalues lambda of A (dx of them):
  response   E ||(A + d I)^-1 J delta||^2 = sigma^2 sum lambda / (lambda + d)^2: the mean of I2F^2
  bayes      E ||x - E[x | released]||^2  = sigma^2 sum 1 / (lambda + d),  d = sigma^2 / tau^2
The second is the mean squared error of the best possible attacker for Gaussian x and linearised gradients: sigma^2
tr(A^-1) (the Cramer-Rao bound, A / sigma^2 being the Fisher information) for small noise, and tau^2 dx, the prior
alone, for large. Beyond Zhang et al. 2023, whose initialisation study plots mean(1 / sqrt(lambda)) instead.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lmleak.errors import ConfigError
from lmleak.influence.jacobian import InputJacobian
from lmleak.influence.solver import magnitude
from lmleak.linops import SpectralSample, TraceEstimate, exact_spectrum, spectral_probes
from lmleak.types import Magnitude


@dataclass(frozen=True)
class ExpectedInfluence:
    """Averages over Gaussian noise of one level.

    Standard errors are those of the random probes; of ``response`` and ``bayes``, of their ``rms``. Whether a number
    converged says nothing of them.
    """

    noise_std: float
    damping: float
    """Of ``response``; the other fields are at the MAP damping sigma^2 / tau^2."""
    response: Magnitude
    """Root mean square over the noise of I2F."""
    response_std_error: float
    bayes: Magnitude
    """Root mean square error of the best attacker who knows the prior: its ``rms`` never exceeds the prior's tau."""
    bayes_std_error: float
    effective_rank: float
    """sum lambda / (lambda + d): how many coordinates of x the released gradient determines, out of dx."""
    effective_rank_std_error: float
    information: float
    """1/2 sum log(1 + lambda / d), in nats: mutual information of x and the released gradient, likewise linearised."""
    information_std_error: float
    response_converged: bool
    """Whether the quadrature behind ``response`` met its tolerance."""
    bayes_converged: bool
    """Likewise for ``bayes``, ``effective_rank`` and ``information``."""
    products: int
    """Products with A behind the spectrum; shared by all levels."""


def sample_spectrum(
    jacobian: InputJacobian, *, num_probes: int = 8, steps: int = 40, exact_below: int = 0, seed: int = 0
) -> SpectralSample:
    """Sample the spectrum of A once, for any number of noise levels.

    Args:
        jacobian: J.
        num_probes: Random probes of stochastic Lanczos quadrature; they set the standard error.
        steps: Products per probe; they set the quadrature's error.
        exact_below: If dx is at most this, compute all eigenvalues instead, by dx products.
        seed: Seed of the probes.

    Returns:
        The sample.
    """
    operator = jacobian.gram_operator()
    if jacobian.dx <= exact_below:
        return exact_spectrum(operator)
    generator = torch.Generator().manual_seed(seed)
    return spectral_probes(operator, num_probes=num_probes, steps=steps, generator=generator)


def expected_influence(
    spectrum: SpectralSample, noise_stds: Sequence[float], prior_std: float, *, damping: float, tol: float = 0.05
) -> list[ExpectedInfluence]:
    """Return the averages for every noise level, from one sample of the spectrum.

    Args:
        spectrum: As :func:`sample_spectrum` gives.
        noise_stds: Standard deviations of the noise, positive, in the gradient's unit.
        prior_std: tau, in units of x.
        damping: Damping of the I2F whose mean is wanted; the MAP quantities have their own.
        tol: Relative error of the quadrature up to which a level counts as converged.

    Returns:
        One result per level.

    Raises:
        ConfigError: If a level or the prior's deviation is not positive and finite.
    """
    if not all(math.isfinite(std) and std > 0 for std in [*noise_stds, prior_std]):
        raise ConfigError(f"expected positive noise levels and prior, got {list(noise_stds)} and tau = {prior_std}")
    response = spectrum.trace(lambda x: x / (x + damping) ** 2, tol=tol)
    return [_at_level(spectrum, response, damping, std, (std / prior_std) ** 2, tol) for std in noise_stds]


def _at_level(
    spectrum: SpectralSample, response: TraceEstimate, damping: float, std: float, map_damping: float, tol: float
) -> ExpectedInfluence:
    dx = spectrum.size
    inverse = spectrum.trace(lambda x: 1 / (x + map_damping), tol=tol)
    rank = spectrum.trace(lambda x: x / (x + map_damping), tol=tol)
    information = spectrum.trace(lambda x: 0.5 * torch.log1p(x / map_damping), tol=tol)
    response_rms, response_error = _root(response, std, dx)
    bayes_rms, bayes_error = _root(inverse, std, dx)
    return ExpectedInfluence(
        noise_std=std,
        damping=damping,
        response=magnitude(response_rms * math.sqrt(dx), dx),
        response_std_error=response_error,
        bayes=magnitude(bayes_rms * math.sqrt(dx), dx),
        bayes_std_error=bayes_error,
        effective_rank=rank.value,
        effective_rank_std_error=rank.std_error,
        information=information.value,
        information_std_error=information.std_error,
        response_converged=response.converged,
        bayes_converged=inverse.converged and rank.converged and information.converged,
        products=spectrum.products,
    )


def _root(trace: TraceEstimate, std: float, dx: int) -> tuple[float, float]:
    """Return std * sqrt(trace / dx) and its standard error, to first order."""
    rms = std * math.sqrt(max(trace.value, 0.0) / dx)
    return rms, std * trace.std_error / (2 * math.sqrt(max(trace.value, 1e-300) * dx))
