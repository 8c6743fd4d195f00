"""Rank correlation and bootstrap intervals."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr, ttest_rel

from lmleak.errors import ConfigError, DataError
from lmleak.metrics import (
    Correlation,
    Interval,
    PairedDifference,
    agreement,
    bootstrap_mean,
    paired_bootstrap,
    rank_correlation,
    strongest_correlation,
)

small = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=3, max_size=12)


@settings(deadline=None)
@given(small)
def test_value_is_that_of_scipy_with_ties(pairs):
    x, y = np.array(pairs, dtype=float).T
    found = rank_correlation(x, y, resamples=3).value
    if np.ptp(x) and np.ptp(y):
        assert found == pytest.approx(spearmanr(x, y).statistic, abs=1e-12)
    else:
        assert found is None


def test_each_resample_is_ranked_anew():
    generator = np.random.default_rng(1)
    x, y = generator.integers(0, 6, size=(2, 15)).astype(float)
    weights = generator.multinomial(15, np.full(15, 1 / 15), size=40)
    found = agreement._weighted_spearman(x, y, weights.astype(float))
    for weight, correlation in zip(weights, found, strict=True):
        rows = np.repeat(np.arange(15), weight)
        assert correlation == pytest.approx(spearmanr(x[rows], y[rows]).statistic, abs=1e-12)


def test_monotone_transforms_change_nothing():
    x, y = np.random.default_rng(0).normal(size=(2, 30))
    first, second = rank_correlation(x, y, seed=3), rank_correlation(np.exp(x), y**3, seed=3)
    assert first == second
    assert rank_correlation(x, -np.exp(x)).value == -1.0


def test_seed_decides_and_global_state_is_untouched():
    x, y = np.random.default_rng(0).normal(size=(2, 30))
    before = np.random.get_state()[1].copy()
    first = rank_correlation(x, y, seed=1)
    assert first == rank_correlation(x, y, seed=1)
    assert first.low != rank_correlation(x, y, seed=2).low
    assert (np.random.get_state()[1] == before).all()


def test_blocks_of_resamples_do_not_change_the_answer(monkeypatch):
    x, y = np.random.default_rng(0).normal(size=(2, 20))
    whole = rank_correlation(x, y, resamples=50)
    monkeypatch.setattr(agreement, "CHUNK", 20 * 7)
    assert rank_correlation(x, y, resamples=50) == whole


@pytest.mark.parametrize(("x", "y", "name"), [([1, 1, 1], [1, 2, 3], "x"), ([1, 2, 3], [0, 0, 0], "y")])
def test_constant_column_has_no_correlation(x, y, name):
    result = rank_correlation(x, y)
    assert (result.value, result.low, result.high) == (None, None, None)
    assert result.reason.startswith(f"{name} is constant")


def test_constant_resamples_are_dropped_and_counted():
    x, y = [0, 0, 0, 1], [0, 1, 2, 3]  # the only 1 is missing from (3/4)^4 = 32 % of resamples
    result = rank_correlation(x, y, resamples=4000)
    assert result.resamples + result.dropped == 4000
    assert result.dropped / 4000 == pytest.approx((3 / 4) ** 4 + (1 / 4) ** 4, abs=0.03)
    assert result.low <= result.value <= result.high


def test_one_group_has_a_value_but_no_interval():
    result = rank_correlation([1, 2, 3], [1, 3, 2], groups=["a"] * 3)
    assert result.value == pytest.approx(0.5)
    assert (result.low, result.high, result.num_groups, result.num_points) == (None, None, 1, 3)
    assert "one group" in result.reason
    assert bootstrap_mean([1.0]).reason == "one group only: nothing to resample"


def test_every_resample_constant():
    results = [rank_correlation([0, 1], [0, 1], resamples=1, seed=seed) for seed in range(30)]
    constant = [result for result in results if result.dropped]  # half of them draw one row twice
    assert constant
    assert len(constant) < len(results)
    for result in constant:
        assert (result.value, result.low, result.resamples, result.dropped) == (1.0, None, 0, 1)
        assert result.reason == "every resample held a constant column"


def test_groups_of_one_row_are_rows():
    x, y = np.random.default_rng(0).normal(size=(2, 25))
    alone, grouped = rank_correlation(x, y), rank_correlation(x, y, groups=[f"text {i}" for i in range(25)])
    assert (alone.low, alone.high) == (grouped.low, grouped.high)
    assert rank_correlation(x, y, groups=torch.arange(25) // 5).num_groups == 5


def test_repeating_every_row_in_its_group_changes_nothing():
    x, y = np.random.default_rng(2).normal(size=(2, 30))
    once = rank_correlation(x, y, groups=range(30))
    thrice = rank_correlation(np.repeat(x, 3), np.repeat(y, 3), groups=np.repeat(np.arange(30), 3))
    assert (thrice.num_points, thrice.num_groups) == (90, 30)
    assert thrice.low == pytest.approx(once.low, abs=1e-12)
    assert thrice.high == pytest.approx(once.high, abs=1e-12)
    naive = rank_correlation(np.repeat(x, 3), np.repeat(y, 3))  # rows as if independent: too narrow
    assert naive.high - naive.low < 0.75 * (once.high - once.low)


def test_intervals_cover_the_truth_as_often_as_they_say():
    rho, covered, runs = 0.6, 0, 300
    truth = 6 / math.pi * math.asin(rho / 2)  # Spearman's correlation of a bivariate normal
    generator = np.random.default_rng(0)
    for run in range(runs):
        x, e = generator.normal(size=(2, 60))
        result = rank_correlation(x, rho * x + math.sqrt(1 - rho**2) * e, resamples=400, seed=run)
        covered += result.low <= truth <= result.high
    assert 0.90 <= covered / runs <= 0.98


def test_grouped_intervals_cover_where_intervals_over_rows_do_not():
    generator, runs, covered = np.random.default_rng(0), 300, {"groups": 0, "rows": 0}
    groups = np.repeat(np.arange(30), 8)
    for run in range(runs):
        values = generator.normal(size=30)[groups] + 0.3 * generator.normal(size=240)  # the true mean is 0
        for name, which in (("groups", groups), ("rows", None)):
            interval = bootstrap_mean(values, groups=which, resamples=400, seed=run)
            covered[name] += interval.low <= 0 <= interval.high
    assert 0.89 <= covered["groups"] / runs <= 0.98
    assert covered["rows"] / runs < 0.65


def test_bootstrap_mean_against_the_standard_error():
    values = np.random.default_rng(0).normal(size=400)
    interval = bootstrap_mean(values, confidence=0.9)
    half = 1.645 * values.std() / math.sqrt(400)
    assert interval.value == pytest.approx(values.mean(), abs=1e-15)
    assert interval.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.1 * half)
    constant = bootstrap_mean([0.25] * 9)
    assert (constant.value, constant.low, constant.high) == (0.25, 0.25, 0.25)


def test_groups_of_different_size_weigh_their_rows():
    interval = bootstrap_mean([0.0, 0.0, 0.0, 1.0], groups=["a", "a", "a", "b"])
    assert interval.value == 0.25
    assert (interval.low, interval.high) == (0.0, 1.0)  # resamples: a a, a b, b b


def test_types_and_method():
    result = rank_correlation([1, 2, 4], [1, 2, 3], groups=[0, 1, 1])
    assert isinstance(result, Correlation)
    assert isinstance(result, Interval)
    assert result.method == "Spearman, percentile bootstrap over groups"
    assert type(result.value) is type(result.low) is float
    assert type(result.num_groups) is type(result.dropped) is int
    assert type(rank_correlation([1, 1], [1, 2]).num_groups) is int


def test_huge_values_do_not_overflow():
    assert rank_correlation([-1.7e308, 0, 1.7e308], [1, 2, 3]).value == 1.0


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: rank_correlation([1, 2], [1]), DataError, "x has 2 row.s. and y 1"),
        (lambda: rank_correlation([1], [1]), DataError, "at least two rows"),
        (lambda: rank_correlation([1, math.nan], [1, 2]), DataError, "x holds 1 NaN"),
        (lambda: rank_correlation([1, 2], [None, 2]), DataError, "y holds 1 NaN"),
        (lambda: rank_correlation([[1, 2]], [1, 2]), DataError, "expected one number per row"),
        (lambda: rank_correlation([1, 2], [1, 2], groups=[0]), DataError, "groups names 1 row"),
        (lambda: rank_correlation([1, 2], [1, 2], confidence=95), ConfigError, "write 0.95"),
        (lambda: bootstrap_mean([], seed=0), DataError, "at least one row"),
        (lambda: bootstrap_mean([1, 2], resamples=0), ConfigError, "resamples must be at least 1"),
    ],
)
def test_refusals(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_paired_difference_is_the_bootstrap_of_the_differences():
    first, second = np.random.default_rng(0).uniform(size=(2, 30))
    paired, alone = paired_bootstrap(first, second, seed=4), bootstrap_mean(first - second, seed=4)
    assert isinstance(paired, PairedDifference)
    assert (paired.value, paired.low, paired.high) == (alone.value, alone.low, alone.high)
    assert paired.value == pytest.approx(first.mean() - second.mean(), abs=1e-15)
    assert paired == paired_bootstrap(first, second, seed=4)
    swapped = paired_bootstrap(second, first, seed=4)
    assert (swapped.value, swapped.low, swapped.high) == pytest.approx((-paired.value, -paired.high, -paired.low))
    assert swapped.p_value == paired.p_value


def test_what_makes_an_example_easy_for_both_cancels():
    generator = np.random.default_rng(0)
    easy = generator.uniform(0, 0.9, size=40)
    result = paired_bootstrap(easy + 0.05 + 0.01 * generator.normal(size=40), easy)
    assert result.p_value == 1 / 2001  # as small as 2000 resamples can say
    assert 0.04 < result.low < 0.05 < result.high < 0.06
    spread = easy.std() / math.sqrt(40)
    assert result.high - result.low < 0.2 * spread


def test_p_value_agrees_with_the_paired_t_test():
    generator = np.random.default_rng(3)
    for shift in (0.0, 0.1, 0.2, 0.3):
        first, second = generator.normal(size=(2, 200)) * 0.7
        ours = paired_bootstrap(first + shift, second, resamples=20000)
        assert ours.p_value == pytest.approx(ttest_rel(first + shift, second).pvalue, abs=0.02)


def test_p_value_is_uniform_where_there_is_no_difference():
    generator, runs, below = np.random.default_rng(0), 300, {0.05: 0, 0.5: 0}
    for run in range(runs):
        groups = np.repeat(np.arange(25), 4)
        difference = generator.normal(size=25)[groups] + 0.3 * generator.normal(size=100)
        p_value = paired_bootstrap(difference, np.zeros(100), groups=groups, resamples=400, seed=run).p_value
        for level in below:
            below[level] += p_value <= level
    assert 0.02 <= below[0.05] / runs <= 0.10
    assert 0.42 <= below[0.5] / runs <= 0.58


def test_two_attacks_that_score_the_same():
    same = paired_bootstrap([0.2, 0.8, 0.5], [0.2, 0.8, 0.5])
    assert (same.value, same.low, same.high, same.p_value) == (0.0, 0.0, 0.0, 1.0)
    balanced = paired_bootstrap([1.0, 0.0], [0.0, 1.0])
    assert (balanced.value, balanced.p_value) == (0.0, 1.0)


def test_paired_refusals():
    with pytest.raises(DataError, match=r"first has 2 row\(s\) and second 1"):
        paired_bootstrap([1, 2], [1])
    with pytest.raises(DataError, match="at least one row"):
        paired_bootstrap([], [])
    with pytest.raises(DataError, match="second holds 1 NaN"):
        paired_bootstrap([1, 2], [1, math.nan])
    with pytest.raises(ConfigError, match="confidence"):
        paired_bootstrap([1, 2], [1, 2], confidence=95)
    single = paired_bootstrap([1.0, 0.5], [0.0, 0.0], groups=["a", "a"])
    assert (single.value, single.low, single.p_value) == (0.75, None, None)
    assert "one group" in single.reason


def test_strongest_correlation_finds_the_better_column_and_splits_ties():
    rng = np.random.default_rng(0)
    y = rng.standard_normal(60)
    good, bad = y + 0.3 * rng.standard_normal(60), y + 3 * rng.standard_normal(60)
    shares = strongest_correlation({"good": good, "bad": bad}, y)
    assert shares["good"] > 0.99
    assert strongest_correlation({"a": good, "b": good}, y) == {"a": 0.5, "b": 0.5}
    assert strongest_correlation({"wrong way": -good, "bad": bad}, y)["bad"] > 0.99
    assert strongest_correlation({"a": good}, y, groups=["one"] * 60) == {}
    with pytest.raises(DataError, match="one pair per row"):
        strongest_correlation({"a": good[:5]}, y)
