"""The differential privacy of clipped, noisy gradients, by the accountant of Opacus."""

import math
import warnings

from lmleak.errors import ConfigError

ORDERS = (1.001, 1.01, 1.05, *(1 + x / 10 for x in range(1, 100)), *range(11, 64), 96, 128, 192, 256, 512, 1024)
"""Renyi orders; any set of them gives a valid epsilon, a wider one a smaller epsilon."""


def epsilon(noise_multiplier: float, sample_rate: float, steps: int, delta: float) -> float:
    """Return the epsilon of a training run whose every gradient is released.

    The mechanism, ``steps`` times: every example enters the batch independently with probability q (Poisson sampling);
    its gradient is clipped to norm C; Gaussian noise of standard deviation z C per coordinate is added to the *sum* of
    the clipped gradients, which is z C / B on their sum over B, the expected batch size. All the releases together are
    then (epsilon, delta)-differentially private with respect to adding or removing one example. (For replacing one
    example, the sensitivity of the sum is 2 C: double the noise for the same epsilon.)

    Renyi accounting (Mironov 2017, arXiv:1702.07476; sampled Gaussian: Mironov, Talwar and Zhang 2019,
    arXiv:1908.10530; conversion: Balle et al. 2020, arXiv:1905.09982, theorem 21), computed by ``opacus.accountants``.
    An upper bound, as all Renyi accounting is.

    What it covers: a server that sees every noisy gradient, because noise is added before the release, but does not
    see which examples were drawn. One release alone, seen by someone who knows that the example was in the batch:
    ``sample_rate=1, steps=1``. What it does not cover: batches drawn by shuffling or of a fixed size, whose epsilon
    can be larger; several records of one person; learning rates and settings chosen on private data; seeds and
    floating-point noise that can be told from Gaussian noise.

    Args:
        noise_multiplier: z, standard deviation of the noise on the sum, in units of the clipping norm.
        sample_rate: q, probability with which an example enters a batch, in (0, 1].
        steps: Number of releases.
        delta: Probability of failure, in (0, 1); well below 1 / number of examples.

    Returns:
        epsilon, in nats; infinity without noise.

    Raises:
        ConfigError: If an argument is out of range, or Opacus is not installed.
    """
    whole = isinstance(steps, int) and not isinstance(steps, bool)
    if not (0 <= noise_multiplier < math.inf and 0 < sample_rate <= 1 and 0 < delta < 1 and whole and steps >= 1):
        raise ConfigError(
            "epsilon needs noise_multiplier >= 0, 0 < sample_rate <= 1, steps >= 1 and 0 < delta < 1, got "
            f"noise_multiplier={noise_multiplier!r}, sample_rate={sample_rate!r}, steps={steps!r}, delta={delta!r}"
        )
    if noise_multiplier == 0:
        return math.inf
    try:
        from opacus.accountants import RDPAccountant  # imported here: it takes seconds
    except ImportError as error:
        raise ConfigError("the epsilon of a run is computed by Opacus; install lmleak[dp]") from error
    accountant = RDPAccountant()
    accountant.history = [(noise_multiplier, sample_rate, steps)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "the optimal order is the smallest": a bound all the same
        return float(accountant.get_epsilon(delta=delta, alphas=list(ORDERS)))
