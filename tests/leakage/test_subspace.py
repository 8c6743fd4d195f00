"""Subspace distance: known rotations, invariances, the two constructions, the permutation null."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from lmleak.errors import ConfigError, DataError
from lmleak.leakage import (
    mean_difference,
    principal_angles,
    sample_subspace_distance,
    subspace_sweep,
    weight_subspace_distance,
)
from lmleak.leakage.rows import coordinates

FEW = {"permutations": 2}


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(rows, columns, seed=0):
    return torch.linalg.qr(randn(rows, columns, seed=seed)).Q


def rotated(angles, size=30, seed=0):
    """Two orthonormal bases (size, k) at exactly these principal angles."""
    k = len(angles)
    axes = orthonormal(size, 2 * k, seed)
    theta = torch.tensor(angles, dtype=torch.float64)
    return axes[:, :k], axes[:, :k] * theta.cos() + axes[:, k:] * theta.sin()


def spanning(first, second, count, seed=0):
    """``count`` gradients in the span of each basis, and their labels."""
    k = first.shape[1]
    rows = torch.cat([randn(count, k, seed=seed + 1) @ first.T, randn(count, k, seed=seed + 2) @ second.T])
    return rows, ["a"] * count + ["b"] * count


ANGLES = [
    [0.3, 0.7, 1.2],
    [1e-9, 1e-5, 0.1],
    [math.pi / 4, math.pi / 2 - 1e-9],
    [0.0, 0.0, 0.0],
    [math.pi / 2] * 3,
]


@pytest.mark.parametrize("angles", ANGLES, ids=str)
def test_known_rotations_are_found(angles):
    first, second = rotated(angles)
    got = principal_angles(first, second)
    assert got.tolist() == pytest.approx(sorted(angles), abs=1e-12)
    assert got.numpy() == pytest.approx(scipy.linalg.subspace_angles(first.numpy(), second.numpy())[::-1], abs=1e-7)


def test_angles_between_unequal_dimensions():
    first, second = orthonormal(20, 5, 1), orthonormal(20, 3, 2)
    expected = scipy.linalg.subspace_angles(first.numpy(), second.numpy())[::-1]
    assert principal_angles(first, second).numpy() == pytest.approx(expected, abs=1e-12)
    assert principal_angles(second, first).numpy() == pytest.approx(expected, abs=1e-12)
    assert principal_angles(first, first[:, :2]).numpy() == pytest.approx(np.zeros(2), abs=1e-12)


@pytest.mark.parametrize("size", [8, 30, 500])  # fewer parameters than gradients, and more
@pytest.mark.parametrize("angles", ANGLES[:4], ids=str)
def test_distances_of_known_rotations_are_exact(angles, size):
    first, second = rotated(angles, size)
    rows, labels = spanning(first, second, 7)
    got = sample_subspace_distance(rows, labels, k=len(angles), centred=False, **FEW)
    theta = np.sort(angles)
    assert got.k == len(angles)
    assert got.angles[("a", "b")] == pytest.approx(theta, abs=1e-8)
    assert got.geodesic == pytest.approx(np.sqrt((theta**2).sum()), abs=1e-8)
    assert got.normalized_geodesic == pytest.approx(got.geodesic / (math.sqrt(len(theta)) * math.pi / 2), abs=1e-12)
    assert got.chordal == pytest.approx(np.sqrt((np.sin(theta) ** 2).sum()), abs=1e-8)
    projectors = first @ first.T - second @ second.T
    assert got.projection == pytest.approx(projectors.norm().item() / math.sqrt(2), abs=1e-8)
    assert got.max_angle == pytest.approx(theta[-1], abs=1e-8)


def test_orthogonal_subspaces_lie_a_right_angle_apart_and_equal_ones_nothing():
    axes = orthonormal(40, 6)
    apart = sample_subspace_distance(*spanning(axes[:, :3], axes[:, 3:], 5), k=3, centred=False, **FEW)
    assert apart.angles[("a", "b")] == pytest.approx([math.pi / 2] * 3, abs=1e-8)
    assert apart.normalized_geodesic == pytest.approx(1, abs=1e-8)
    same = sample_subspace_distance(*spanning(axes[:, :3], axes[:, :3], 5), k=3, centred=False, **FEW)
    assert same.geodesic < 1e-8
    assert same.test.z is None  # every shuffle spans the same space: nothing to compare with


def test_distance_does_not_depend_on_bases_scales_or_rotation():
    rows, labels = randn(16, 50, seed=3), [0, 1] * 8
    got = sample_subspace_distance(rows, labels, k=4, **FEW)
    rotation = orthonormal(50, 50, 4)
    turned = sample_subspace_distance(3.7 * rows @ rotation, labels, k=4, **FEW)
    shifted = sample_subspace_distance(rows + randn(50, seed=5), labels, k=4, **FEW)
    padded = sample_subspace_distance(torch.cat([rows, torch.zeros(16, 900)], 1), labels, k=4, **FEW)
    matrices = sample_subspace_distance(rows.reshape(16, 5, 10), labels, k=4, **FEW)
    names = sample_subspace_distance(rows, ["no", "yes"] * 8, k=4, **FEW)
    for other in (turned, shifted, padded, matrices, names):
        assert next(iter(other.angles.values())) == pytest.approx(got.angles[(0, 1)], abs=1e-10)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    shuffled = sample_subspace_distance(rows[order], torch.tensor(labels)[order], k=4, **FEW)
    assert shuffled.angles[(0, 1)] == pytest.approx(got.angles[(0, 1)], abs=1e-10)


def test_coordinates_keep_all_inner_products_also_when_read_in_blocks(monkeypatch):
    rows = randn(6, 41)
    monkeypatch.setattr("lmleak.leakage.rows.COLUMNS", 7)
    got = coordinates(rows)
    assert got.shape == (6, 6)
    assert torch.allclose(got @ got.T, rows @ rows.T, rtol=1e-12)
    assert coordinates(randn(9, 4)).shape == (9, 4)
    assert coordinates(rows.to(torch.bfloat16)).dtype == torch.float64


def test_samples_equal_the_textbook_construction():
    """Centred, unit columns, energy: against numpy on the parameter-sized matrices."""
    rows, labels = randn(20, 80, seed=7) * torch.linspace(1, 0.05, 80), np.array([0, 1] * 10)
    for centred in (True, False):
        for unit_norm in (True, False):
            m = rows.numpy() - (rows.numpy().mean(0) if centred else 0)
            m = m / np.linalg.norm(m, axis=1, keepdims=True) if unit_norm else m
            bases, counts = [], []
            for a in (0, 1):
                u, s, _ = np.linalg.svd(m[labels == a].T, full_matrices=False)
                bases.append(u)
                counts.append(1 + int((np.cumsum(s**2) / (s**2).sum() < 0.8).sum()))
            expected = scipy.linalg.subspace_angles(*(u[:, : max(counts)] for u in bases))
            got = sample_subspace_distance(rows, labels, k=0.8, centred=centred, unit_norm=unit_norm, **FEW)
            assert got.k == max(counts)
            assert got.angles[(0, 1)] == pytest.approx(expected[::-1], abs=1e-9)


def test_k_is_cut_to_the_smallest_rank():
    axes = orthonormal(30, 8)
    first = randn(6, 2, seed=1) @ axes[:, :2].T
    second = randn(6, 5, seed=2) @ axes[:, 3:].T
    rows, labels = torch.cat([first, second]), [0] * 6 + [1] * 6
    for k in (5, 2, 1.0):
        got = sample_subspace_distance(rows, labels, k=k, centred=False, **FEW)
        assert got.k == 2
        assert got.max_angle == pytest.approx(math.pi / 2, abs=1e-8)


@pytest.mark.parametrize("side", ["columns", "rows"])
def test_weight_matrix_subspaces_are_those_of_the_average(side):
    """Averages with known column and row spaces; zero-mean noise that cancels exactly within each value."""
    out, into = rotated([0.2, 0.9], 10, seed=1), rotated([0.4, 0.5], 12, seed=2)
    core = torch.diag(torch.tensor([3.0, 2.0], dtype=torch.float64))
    means = [out[a] @ core @ into[a].T for a in (0, 1)]
    noise = randn(2, 10, 12, seed=3)
    rows = torch.stack([m + s * n for m, n in zip(means, noise, strict=True) for s in (1, -1)])
    got = weight_subspace_distance(rows, [0, 0, 1, 1], k=2, side=side, **FEW)
    assert got.angles[(0, 1)] == pytest.approx([0.2, 0.9] if side == "columns" else [0.4, 0.5], abs=1e-8)
    taps = weight_subspace_distance(rows.reshape(4, 10, 3, 2, 2), [0, 0, 1, 1], k=2, side=side, **FEW)
    assert taps.angles == got.angles


def test_more_than_two_values_are_averaged_over_pairs():
    axes = orthonormal(30, 6)
    groups = [randn(5, 2, seed=a) @ axes[:, 2 * i : 2 * i + 2].T for a, i in enumerate((0, 0, 2))]
    got = sample_subspace_distance(torch.cat(groups), [0] * 5 + [1] * 5 + [2] * 5, k=2, centred=False, **FEW)
    assert list(got.angles) == [(0, 1), (0, 2), (1, 2)]
    assert got.max_angle == pytest.approx(math.pi / 3, abs=1e-8)  # (0 + pi/2 + pi/2) / 3
    assert got.chordal == pytest.approx(2 * math.sqrt(2) / 3, abs=1e-8)


def test_a_real_difference_stands_out_of_its_null_and_chance_does_not():
    first, second = rotated([1.5, 1.55], 60)
    rows, labels = spanning(first, second, 15)
    rows = rows + 0.1 * randn(*rows.shape, seed=9)
    got = sample_subspace_distance(rows, labels, k=2, permutations=99)
    assert got.test.statistic == got.geodesic
    assert got.test.p_value == 0.01
    assert got.test.z > 3
    noise = sample_subspace_distance(randn(30, 60, seed=4), labels, k=2, permutations=99)
    assert noise.geodesic > 1  # far apart, by chance
    assert noise.test.p_value > 0.05
    assert abs(noise.geodesic - noise.test.null_mean) < 3 * noise.test.null_std


@pytest.mark.parametrize("distance", ["geodesic", "normalized-geodesic", "chordal", "projection", "max-angle"])
def test_the_tested_distance_is_the_one_asked_for(distance):
    rows, labels = randn(12, 20), [0, 1] * 6
    got = sample_subspace_distance(rows, labels, k=3, distance=distance, permutations=5)
    assert got.test.statistic == getattr(got, distance.replace("-", "_"))


def test_the_sweep_equals_single_runs():
    rows, labels = randn(14, 100), [0, 1] * 7
    sweep = subspace_sweep(rows, labels, [1, 3, 0.9], permutations=5, seed=2)
    for k, got in sweep.items():
        alone = sample_subspace_distance(rows, labels, k=k, permutations=5, seed=2)
        assert got.geodesic == pytest.approx(alone.geodesic, rel=1e-10)
        assert got.test.null_mean == pytest.approx(alone.test.null_mean, rel=1e-10)


def uniform_gap(p_values, permutations):
    """Largest |empirical - uniform| distribution function over the values that p can take, times sqrt(n)."""
    p, grid = np.array(p_values), np.arange(1, permutations + 2) / (permutations + 1)
    return np.sqrt(len(p)) * max(abs((p <= g + 1e-12).mean() - g) for g in grid)


@pytest.mark.parametrize("construction", ["samples", "energy", "weight"])
def test_p_is_uniform_where_the_attribute_says_nothing(construction):
    """Kolmogorov-Smirnov: sqrt(n) D exceeds 1.63 with probability 0.01."""
    p_values = []
    for draw in range(200):
        rows = randn(14, 3, 4, seed=1000 + draw)
        labels, options = [0, 1] * 7, {"permutations": 19, "seed": draw}
        if construction == "weight":
            got = weight_subspace_distance(rows, labels, k=2, **options)
        else:
            got = sample_subspace_distance(rows, labels, k=2 if construction == "samples" else 0.7, **options)
        p_values.append(got.test.p_value)
    assert uniform_gap(p_values, 19) < 1.63


class TestRefusals:
    rows, labels = randn(8, 20), [0, 1] * 4

    @pytest.mark.parametrize("k", [0, -1, 0.0, 1.5, True])
    def test_k_out_of_range(self, k):
        with pytest.raises(ConfigError, match="share of energy"):
            sample_subspace_distance(self.rows, self.labels, k=k)

    def test_unknown_distance(self):
        with pytest.raises(ConfigError, match="geodesic"):
            sample_subspace_distance(self.rows, self.labels, distance="geodesik")

    @pytest.mark.parametrize("labels", [[0] * 8, [0] * 7 + [1], [0, 1]])
    def test_labels_that_cannot_be_compared(self, labels):
        with pytest.raises(DataError, match="attribute value"):
            sample_subspace_distance(self.rows, labels)

    def test_not_finite(self):
        rows = self.rows.clone()
        rows[3, 5] = torch.nan
        with pytest.raises(DataError, match="NaN"):
            sample_subspace_distance(rows, self.labels)

    def test_nothing_to_span(self):
        rows = self.rows.clone()
        rows[::2] = 0
        with pytest.raises(DataError, match="spans no subspace"):
            sample_subspace_distance(rows, self.labels, centred=False)
        with pytest.raises(DataError, match="spans no subspace"):
            sample_subspace_distance(torch.ones(8, 20) * 0.1, self.labels)

    def test_a_weight_that_is_no_matrix(self):
        with pytest.raises(DataError, match="sample_subspace_distance"):
            weight_subspace_distance(self.rows, self.labels)

    def test_unknown_side(self):
        with pytest.raises(ConfigError, match="columns"):
            weight_subspace_distance(self.rows.reshape(8, 4, 5), self.labels, side="left")


def test_arrays_are_taken_like_tensors_and_bad_labels_are_refused():
    gradients = torch.randn(12, 5, 4, generator=torch.Generator().manual_seed(0))
    labels = np.arange(12) % 2
    options = {"k": np.int64(2), "permutations": 5}
    for distance in (sample_subspace_distance, weight_subspace_distance):
        assert distance(gradients.numpy(), labels, **options) == distance(gradients, labels, **options)
        with pytest.raises(DataError, match="NoneType"):
            distance(gradients, [0, 1] * 5 + [None, 1], **options)
        with pytest.raises(DataError, match="NaN or Inf"):
            distance(gradients, np.where(labels, np.nan, 0.0), **options)
        with pytest.raises(ConfigError, match="permutations"):
            distance(gradients, labels, k=2, permutations=2.5)
    assert mean_difference(gradients.numpy(), labels, permutations=5) == mean_difference(
        gradients, labels, permutations=5
    )
    with pytest.raises(DataError, match="a tensor or an array"):
        sample_subspace_distance(np.full((12, 3), "a"), labels, **options)
