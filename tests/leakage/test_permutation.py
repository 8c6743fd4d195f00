"""The permutation test: its counting, ties, types and refusals."""

from itertools import permutations as orderings

import numpy as np
import pytest
import torch

from lmleak.errors import ConfigError, DataError
from lmleak.leakage import permutation_p_value


def test_p_approaches_the_share_of_all_orderings():
    """Mean difference of five numbers: of 10 splits exactly one reaches the largest, another the second largest."""
    values = np.array([0.0, 1.0, 2.5, 4.0, 8.0])
    difference = lambda labels: values[labels == 1].mean() - values[labels == 0].mean()
    for labels in ([0, 0, 0, 1, 1], [0, 0, 1, 0, 1]):
        observed = difference(np.array(labels))
        share = np.mean([difference(np.array(o)) >= observed - 1e-12 for o in orderings(labels)])
        got = permutation_p_value(difference, labels, permutations=4000, seed=1)
        assert got.statistic == observed
        assert got.p_value == pytest.approx(share, abs=0.02)  # four deviations
        everywhere = [difference(np.array(o)) for o in orderings(labels)]
        assert got.null_mean == pytest.approx(np.mean(everywhere), abs=0.2)
        assert got.null_std == pytest.approx(np.std(everywhere), rel=0.05)
        assert got.z == pytest.approx((observed - got.null_mean) / got.null_std)


def test_equal_numbers_up_to_rounding_count_as_reached():
    noise = iter(1 + 1e-14 * np.arange(-1, 100) * (-1) ** np.arange(101))
    got = permutation_p_value(lambda labels: next(noise), [0, 1, 0, 1], permutations=50)
    assert got.p_value == 1
    assert got.z is None


def test_labels_keep_their_kind_and_rows_and_the_seed_decides():
    seen = []

    def record(labels):
        seen.append(labels)
        return float(labels[0].sum())

    rows = torch.arange(12.0).reshape(6, 2)
    permutation_p_value(record, rows, permutations=3, seed=5)
    assert all(isinstance(labels, torch.Tensor) for labels in seen)
    assert torch.equal(seen[0], rows)
    for shuffled in seen[1:]:
        assert torch.equal(shuffled.sort(0).values, rows)  # whole rows were moved
        assert torch.equal(shuffled[:, 1] - shuffled[:, 0], torch.ones(6))
    again = permutation_p_value(lambda labels: float(labels[0].sum()), rows.numpy(), permutations=3, seed=5)
    assert again == permutation_p_value(lambda labels: float(labels[0].sum()), rows.tolist(), permutations=3, seed=5)


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    permutation_p_value(lambda labels: float(labels[0]), [0, 1, 2], permutations=5)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()


def test_refusals():
    with pytest.raises(ConfigError, match="permutations >= 2"):
        permutation_p_value(lambda labels: 0.0, [0, 1], permutations=1)
    with pytest.raises(DataError, match="at least 2 labels"):
        permutation_p_value(lambda labels: 0.0, [0])
    with pytest.raises(DataError, match="not finite"):
        permutation_p_value(lambda labels: float("nan"), [0, 1])
