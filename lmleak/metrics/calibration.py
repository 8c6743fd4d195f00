"""Are predicted probabilities the shares that come true?"""

import numpy as np
from numpy.typing import ArrayLike

from lmleak.errors import DataError

BINS = 10


def calibration_error(predicted: ArrayLike, hit: ArrayLike, weight: ArrayLike | None = None) -> float:
    """Return the expected calibration error over ten bins of equal width.

        ECE = sum_bins |sum_{i in bin} w_i (predicted_i - hit_i)| / sum_i w_i.

    It is biased upwards: a perfectly calibrated prediction of few tokens has a positive one too.

    Source: Naeini et al. 2015, "Obtaining Well Calibrated Probabilities Using Bayesian Binning", equation 2.

    Args:
        predicted: Probabilities, (n,).
        hit: What came true, (n,), in [0, 1].
        weight: How often each counts, (n,), as in a bootstrap; once each if not given.

    Returns:
        The error in [0, 1].

    Raises:
        DataError: If the columns differ in length, are empty, or hold numbers outside [0, 1].
    """
    predicted, hit = np.asarray(predicted, float), np.asarray(hit, float)
    weight = np.ones(len(predicted)) if weight is None else np.asarray(weight, float)
    if not len(predicted) == len(hit) == len(weight) or not len(predicted):
        raise DataError(
            f"got {len(predicted)} prediction(s), {len(hit)} outcome(s) and {len(weight)} weight(s); expected as many "
            "of each, and at least one"
        )
    for name, column in (("predicted", predicted), ("hit", hit)):
        if not ((column >= 0) & (column <= 1)).all():
            raise DataError(f"{name} holds numbers outside [0, 1]")
    place = np.minimum((predicted * BINS).astype(int), BINS - 1)
    gap = np.bincount(place, weight * (predicted - hit), minlength=BINS)
    return float(np.abs(gap).sum() / weight.sum())
