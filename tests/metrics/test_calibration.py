"""The calibration error on cases that can be done by hand."""

import numpy as np
import pytest

from lmleak.errors import DataError
from lmleak.metrics import calibration_error


def test_known_cases():
    assert calibration_error([0.25] * 4, [1, 0, 0, 0]) == pytest.approx(0.0)
    # Two bins that err by .9 and .3 in opposite directions, weighted 3 : 1.
    predicted, hit = [0.95, 0.95, 0.95, 0.15], [0.05, 0.05, 0.05, 0.45]
    assert calibration_error(predicted, hit) == pytest.approx((3 * 0.9 + 0.3) / 4)
    assert calibration_error(predicted, hit, [1.0, 0, 0, 2.0]) == pytest.approx((0.9 + 0.6) / 3)


def test_a_calibrated_prediction_comes_near_zero_with_many_tokens():
    rng = np.random.default_rng(0)
    p = rng.random(40_000)
    assert calibration_error(p, rng.random(len(p)) < p) < 0.01
    assert calibration_error(p, rng.random(len(p)) < p**2) > 0.1


@pytest.mark.parametrize("wrong", [([], []), ([0.5], [1, 0]), ([1.2], [1]), ([0.5], [float("nan")])])
def test_wrong_columns_are_refused(wrong):
    with pytest.raises(DataError):
        calibration_error(*wrong)
