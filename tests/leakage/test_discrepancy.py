"""Mean difference and MMD: closed forms, what each sees, calibration under the null."""

import math

import numpy as np
import pytest
import torch

from lmleak.errors import DataError
from lmleak.leakage import kernel_discrepancy, mean_difference, sample_subspace_distance

FEW = {"permutations": 2}


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("size", [6, 200])
def test_two_means_give_dempsters_form_of_hotelling(size):
    rows, labels = randn(15, size), np.array([0] * 6 + [1] * 9)
    first, second = rows[:6], rows[6:]
    difference = (first.mean(0) - second.mean(0)).norm().item()
    within = ((first - first.mean(0)).square().sum() + (second - second.mean(0)).square().sum()).item() / 13
    got = mean_difference(rows, labels, **FEW)
    assert got.norm == pytest.approx(difference, rel=1e-10)
    assert got.ratio == pytest.approx(difference**2 / ((1 / 6 + 1 / 9) * within), rel=1e-10)


def test_one_coordinate_and_three_values_give_the_f_of_an_analysis_of_variance():
    from scipy.stats import f_oneway

    rows, labels = randn(18, 1), np.arange(18) % 3
    expected = f_oneway(*(rows[labels == a, 0].numpy() for a in range(3))).statistic
    assert mean_difference(rows, labels, **FEW).ratio == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("size", [4, 100])
def test_mmd_equals_the_sums_over_pairs(size):
    rows, labels = randn(11, size), [0] * 5 + [1] * 6
    distance = lambda i, j: (rows[i] - rows[j]).norm().item()
    all_pairs = sorted(distance(i, j) for i in range(11) for j in range(i))
    bandwidth = all_pairs[(len(all_pairs) - 1) // 2]
    kernel = lambda i, j: math.exp(-(distance(i, j) ** 2) / (2 * bandwidth**2))
    a, b = range(5), range(5, 11)
    expected = (
        sum(kernel(i, j) for i in a for j in a if i != j) / 20
        + sum(kernel(i, j) for i in b for j in b if i != j) / 30
        - 2 * sum(kernel(i, j) for i in a for j in b) / 30
    )
    got = kernel_discrepancy(rows, labels, **FEW)
    assert got.bandwidth == pytest.approx(bandwidth, rel=1e-10)
    assert got.squared == pytest.approx(expected, rel=1e-9)


def test_a_shift_of_the_mean_is_seen_here_and_missed_by_centred_subspaces():
    rows, labels = randn(40, 10), [0, 1] * 20
    rows[1::2, 0] += 3
    assert mean_difference(rows, labels, permutations=99).test.p_value == 0.01
    assert kernel_discrepancy(rows, labels, permutations=99).test.p_value == 0.01
    assert sample_subspace_distance(rows, labels, k=1, permutations=99).test.p_value > 0.2


def test_a_change_of_scale_is_seen_by_mmd_and_not_by_the_mean():
    rows, labels = randn(60, 10, seed=3), [0, 1] * 30
    rows[1::2] *= 3
    assert kernel_discrepancy(rows, labels, permutations=99).test.p_value <= 0.02
    assert mean_difference(rows, labels, permutations=99).test.p_value > 0.05


@pytest.mark.parametrize("metric", [mean_difference, kernel_discrepancy])
def test_p_is_uniform_where_the_attribute_says_nothing(metric):
    """Kolmogorov-Smirnov over the values p can take: sqrt(n) D exceeds 1.63 with probability 0.01."""
    draws, grid = 300, np.arange(1, 21) / 20
    p = np.array([
        metric(randn(12, 8, seed=500 + i), [0, 1] * 6, permutations=19, seed=i).test.p_value for i in range(draws)
    ])  # fmt: skip
    assert np.sqrt(draws) * max(abs((p <= g + 1e-12).mean() - g) for g in grid) < 1.63


@pytest.mark.parametrize("metric", [mean_difference, kernel_discrepancy])
def test_equal_gradients_are_refused(metric):
    with pytest.raises(DataError, match="all gradients are equal"):
        metric(torch.ones(6, 20), [0, 1] * 3)
