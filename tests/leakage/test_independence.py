"""The permutation test that factorises once: equal to fitting anew, uniform p where there is nothing, exact groups."""

import numpy as np
import pytest
from scipy.stats import kstest
from sklearn.linear_model import Ridge
from sklearn.model_selection import KFold

from lmleak.errors import ConfigError, DataError
from lmleak.leakage.families import RIDGE_STRENGTHS
from lmleak.leakage.independence import independence_test


def by_fitting(x, y, folds, seed):
    """The statistic by fitting every strength anew, its generalised cross-validation from the hat matrix."""
    x = (x - x.mean(0)) / x.std(0)
    error = spread = 0.0
    for train, test in KFold(folds, shuffle=True, random_state=seed).split(x):
        centred, mean = x[train] - x[train].mean(0), y[train].mean(0)
        scores = []
        for strength in RIDGE_STRENGTHS:
            hat = centred @ np.linalg.solve(centred.T @ centred + strength * np.eye(x.shape[1]), centred.T)
            residual = np.square(y[train] - mean - hat @ (y[train] - mean)).sum()
            scores.append(residual / (len(train) - 1 - np.trace(hat)) ** 2)
        model = Ridge(RIDGE_STRENGTHS[int(np.argmin(scores))]).fit(x[train], y[train])
        error += np.square(y[test] - model.predict(x[test]).reshape(len(test), -1)).sum()
        spread += np.square(y[test] - mean).sum()
    return 1 - error / spread


@pytest.mark.parametrize("kind", ["two values", "three values", "input"])
def test_the_statistic_is_that_of_fitting_every_ridge_anew(kind):
    generator = np.random.default_rng(0)
    x = generator.standard_normal((60, 5))
    signal = x[:, 0] + 0.5 * generator.standard_normal(60)
    if kind == "input":
        target = np.stack([signal, generator.standard_normal(60)], 1)
        columns = target
    else:
        target = np.digitize(signal, [0] if kind == "two values" else [-0.5, 0.5])
        columns = np.eye(target.max() + 1)[target]
    found = independence_test(x, target, permutations=9, folds=3, seed=4)
    assert found.statistic == pytest.approx(by_fitting(x, columns, 3, 4), rel=1e-9)
    assert found.statistic > 0.1


def test_shuffles_are_those_of_shuffled_targets():
    generator = np.random.default_rng(1)
    x, y = generator.standard_normal((40, 4)), generator.standard_normal((40, 2))
    found = independence_test(x, y, permutations=5, seed=2)
    order = np.random.default_rng(2)
    null = [by_fitting(x, y[order.permutation(40)], 3, 2) for _ in range(5)]
    assert found.null_mean == pytest.approx(np.mean(null), rel=1e-9)
    assert found.null_std == pytest.approx(np.std(null, ddof=1), rel=1e-9)


@pytest.mark.parametrize("kind", ["latent", "original", "grouped", "more features than samples"])
def test_p_values_of_independent_targets_are_uniform(kind):
    generator = np.random.default_rng(2)
    p_values = []
    for seed in range(200):
        x = generator.standard_normal((40, 60 if kind.startswith("more") else 3))
        y = generator.standard_normal((40, 2)) if kind == "original" else generator.permutation(np.arange(40) % 2)
        groups = None
        if kind == "grouped":
            groups = np.repeat(np.arange(20), 2)
            x, y = x + 3 * generator.standard_normal((20, 3))[groups], generator.permutation(np.arange(20) % 2)[groups]
        p_values.append(independence_test(x, y, groups=groups, permutations=19, folds=2, seed=seed).p_value)
    spread = np.array(p_values) - generator.uniform(0, 1 / 20, 200)  # on 20 steps: spread evenly within each
    assert kstest(spread, "uniform").pvalue > 0.01


def test_p_value_of_a_dependent_target_is_the_smallest_possible():
    generator = np.random.default_rng(0)
    x = generator.standard_normal((80, 6))
    found = independence_test(x, x[:, 0] > 0, permutations=99)
    assert found.p_value == 1 / 100
    assert found.statistic > found.null_mean + 3 * found.null_std
    images = (x @ generator.standard_normal((6, 64))).reshape(80, 1, 8, 8)
    assert independence_test(x, images, permutations=19).p_value == 1 / 20


def test_what_cannot_be_tested_is_refused():
    x = np.random.default_rng(0).standard_normal((40, 3))
    with pytest.raises(ConfigError, match="permutations >= 2"):
        independence_test(x, np.arange(40) % 2, permutations=1)
    with pytest.raises(DataError, match="differ within a group"):
        independence_test(x, np.arange(40) % 2, groups=np.repeat(np.arange(20), 2))
    with pytest.raises(DataError, match="cannot be divided"):
        independence_test(x, np.repeat([0, 1], 20), groups=np.repeat([0, 1], 20))
    with pytest.raises(DataError, match="NaN or Inf"):
        independence_test(np.where(x > 2, np.nan, x), np.arange(40) % 2)
