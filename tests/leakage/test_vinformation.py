"""V-information against closed forms: linear-Gaussian toys, independence, certainty."""

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm

from lmleak.errors import ConfigError, DataError
from lmleak.leakage.cross_fitting import Chosen, Folds, make_target
from lmleak.leakage.families import FAMILIES, calibrate_probabilities, calibrate_values
from lmleak.leakage.independence import independence_test
from lmleak.leakage.vinformation import information_between, learning_curve, v_information, v_information_by_layer


def linear_gaussian(n, p=6, dx=4, noise=0.5, seed=0):
    """X ~ N(0, I); Y = X W + noise with orthonormal columns of W: every coordinate of Y has variance 1 + noise^2."""
    generator = np.random.default_rng(seed)
    mix = np.linalg.qr(generator.standard_normal((p, dx)))[0]
    x = generator.standard_normal((n, p))
    exact = dx / 2 * np.log(1 + 1 / noise**2)
    return x, x @ mix + noise * generator.standard_normal((n, dx)), exact


def two_gaussians(n, distance, seed=0):
    """Y in {0, 1} fair, X | Y ~ N(+-distance / 2, 1) and two coordinates of noise; the logistic model is exact."""
    generator = np.random.default_rng(seed)
    y = generator.integers(2, size=n)
    x = generator.standard_normal((n, 3))
    x[:, 0] += (y - 0.5) * distance
    # H(Y|X) = E log(1 + exp(-s)), s = distance x1 the log odds of the truth, x1 ~ N(distance / 2, 1) given Y = 1
    entropy = quad(lambda t: np.logaddexp(0, -distance * t) * norm.pdf(t, distance / 2), -10, 10 + distance)[0]
    return x, y, np.log(2) - entropy


def test_the_interval_of_the_fraction_is_of_the_ratio_and_at_most_one():
    y = np.arange(100) < 10
    x = np.stack([6.0 * y, np.random.default_rng(0).standard_normal(100)], 1)
    found = v_information(x, y)
    assert found.high / found.baseline_nats > 1.1  # the interval of nats over a fixed H0 passes 1
    assert found.fraction_low <= found.fraction <= found.fraction_high <= 1
    losses = {"without": np.array([0.4, 0.4, 2.0, 1.2]), "given": np.array([0.1, 0.3, 0.9, 1.1])}
    target = make_target(np.repeat([0, 1], 8))
    tiled = {name: Chosen(np.tile(loss, 4), np.log(np.full((16, 2), 0.5)), (), 0.0) for name, loss in losses.items()}
    found = information_between(target, **tiled, family="linear", num_features=1, resamples=4000, confidence=0.9)
    rows = np.random.default_rng(1).integers(16, size=(40000, 16))
    ratios = 1 - tiled["given"].loss[rows].sum(1) / tiled["without"].loss[rows].sum(1)
    assert (found.fraction_low, found.fraction_high) == pytest.approx(np.quantile(ratios, [0.05, 0.95]), abs=0.01)


@pytest.mark.parametrize("noise", [0.3, 1.0, 3.0])
def test_linear_gaussian_inputs_give_the_closed_form(noise):
    x, y, exact = linear_gaussian(2000, noise=noise)
    found = v_information(x, y)
    assert found.target == "original"
    assert found.low < exact < found.high
    assert found.high - found.low < 0.15 * exact + 0.15
    assert found.nats_per_coordinate == pytest.approx(0.5 * np.log(found.constant_mse / found.mse))
    assert found.r_squared == pytest.approx(1 / (1 + noise**2), abs=0.03)
    assert found.bits == pytest.approx(found.nats / np.log(2))
    assert found.fraction is found.fraction_low is found.fraction_high is found.accuracy is found.auc is None


@pytest.mark.parametrize("distance", [0.5, 2.0, 5.0])
def test_two_gaussians_give_the_closed_form(distance):
    x, y, exact = two_gaussians(2000, distance)
    found = v_information(x, y)
    assert found.low < exact < found.high
    assert found.high - found.low < 0.1
    assert found.baseline_nats == pytest.approx(np.log(2), abs=1e-3)
    assert found.fraction == pytest.approx(exact / np.log(2), abs=0.06)
    assert found.accuracy == pytest.approx(norm.cdf(distance / 2), abs=0.03)
    assert found.auc == pytest.approx(norm.cdf(distance / 2**0.5), abs=0.03)
    assert found.r_squared is found.mse is None


def test_the_interval_covers_the_closed_form_as_often_as_it_says():
    covered = 0
    for seed in range(40):
        x, y, exact = linear_gaussian(1500, p=4, dx=2, noise=1.0, seed=seed)
        found = v_information(x, y, confidence=0.9, resamples=300, folds=3, seed=seed)
        covered += found.low < exact < found.high
    assert covered >= 29  # 36 expected of 40; P(fewer than 29) < 0.002 at the nominal coverage


def test_an_independent_attribute_has_no_information():
    generator = np.random.default_rng(0)
    values = [
        v_information(generator.standard_normal((150, 8)), generator.integers(3, size=150), folds=3, seed=seed).nats
        for seed in range(12)
    ]
    assert abs(np.mean(values)) < 0.01
    assert max(map(abs, values)) < 0.05


def test_independent_inputs_have_no_information():
    generator = np.random.default_rng(0)
    values = [
        v_information(generator.standard_normal((150, 8)), generator.standard_normal((150, 5)), seed=seed)
        for seed in range(12)
    ]
    assert abs(np.mean([found.nats for found in values])) < 0.05
    assert max(abs(found.nats_per_coordinate) for found in values) < 0.03


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("family", ["linear", "forest"])
def test_a_feature_that_tells_all_reaches_the_entropy(classes, family):
    generator = np.random.default_rng(0)
    y = generator.integers(classes, size=400)
    x = np.concatenate([3 * np.eye(classes)[y], generator.standard_normal((400, 3))], 1)
    found = v_information(x, y, family=family, folds=3)
    assert found.fraction > 0.97
    assert found.nats <= found.baseline_nats
    assert found.accuracy == 1
    assert found.auc == 1
    assert found.baseline_nats == pytest.approx(np.log(classes), abs=0.02)
    assert found.majority_accuracy < 0.6


def test_the_constant_family_is_exactly_zero():
    x, y, _ = two_gaussians(200, 5.0)
    latent = v_information(x, y, family="constant")
    original = v_information(x, x, family="constant")
    assert (latent.nats, latent.low, latent.high) == (0, 0, 0)
    assert original.nats == pytest.approx(0, abs=1e-12)
    assert set(latent.members) == set(original.members) == {"constant"}


def test_a_larger_family_sees_what_a_linear_one_cannot():
    generator = np.random.default_rng(0)
    x = generator.standard_normal((400, 3))
    y = (x[:, 0] * x[:, 1] > 0).astype(int)  # no linear function tells
    linear, forest = (v_information(x, y, family=f, folds=3) for f in ("linear", "forest"))
    assert linear.fraction < 0.05
    assert forest.fraction > 0.3
    assert "forest" in forest.members


@pytest.mark.parametrize("family", ["mlp", pytest.param("deep-mlp", marks=pytest.mark.slow)])
def test_networks_see_it_too(family):
    generator = np.random.default_rng(0)
    x = generator.standard_normal((240, 2))
    y = (x[:, 0] * x[:, 1] > 0).astype(int)
    assert v_information(x, y, family=family, folds=2).fraction > 0.3
    curve = np.stack([x[:, 0] ** 2, x[:, 1]], 1)
    assert v_information(x, curve, family=family, folds=2).r_squared > v_information(x, curve, folds=2).r_squared


def test_families_are_nested_on_the_validation_part():
    x, y, _ = two_gaussians(120, 1.0)
    folds = Folds(make_target(y), 3, seed=0)
    losses = [
        folds.choose(folds.constant_candidates(), folds.candidates(x, family)).validation_loss
        for family in list(FAMILIES)[:4]
    ]
    assert losses == sorted(losses, reverse=True)


def test_forest_predicts_many_coordinates_through_their_components():
    generator = np.random.default_rng(0)
    x = generator.uniform(-1, 1, (120, 2))
    y = np.abs(x) @ generator.standard_normal((2, 50))
    assert v_information(x, y, family="forest", folds=2).r_squared > 0.6


def test_groups_keep_an_identity_from_passing_for_an_attribute():
    """Samples of an author look alike and share the attribute: only a split within authors learns it."""
    generator = np.random.default_rng(0)
    author = np.repeat(np.arange(20), 10)
    x = generator.standard_normal((20, 40))[author] + 0.1 * generator.standard_normal((200, 40))
    y = np.tile([0, 1], 10)[author]
    assert v_information(x, y).fraction > 0.8
    grouped = v_information(x, y, groups=author)
    assert grouped.fraction < 0.1
    assert independence_test(x, y, permutations=9, groups=author).p_value > 0.1
    assert v_information(x, generator.standard_normal((200, 2)), groups=[f"author {a}" for a in author]).nats < 0.3
    with pytest.raises(DataError, match="differ within a group"):
        independence_test(x, np.arange(200) % 2, groups=author)
    with pytest.raises(DataError, match="one group per sample"):
        v_information(x, y, groups=author[:10])
    with pytest.raises(DataError, match="too few groups"):
        v_information(x, author == 3, groups=author)
    with pytest.raises(DataError, match="cannot be divided"):
        v_information(x, y, groups=np.zeros(200))


def test_learning_curve_rises_towards_the_closed_form():
    x, y, exact = linear_gaussian(800, p=30, dx=2, noise=0.5)
    curve = learning_curve(x, y, [40, 200, 800])
    assert list(curve) == [40, 200, 800]
    assert curve[40].nats < curve[200].nats < curve[800].high
    assert curve[800].num_samples == 800
    assert abs(curve[800].nats - exact) < abs(curve[40].nats - exact)
    with pytest.raises(DataError, match="no point at 801"):
        learning_curve(x, y, [801])
    for sizes in ([], [0], [-1], [50.5]):
        with pytest.raises(ConfigError, match="one or more numbers of samples"):
            learning_curve(x, y, sizes)


def test_seeds_decide_everything_and_nothing_global_is_drawn():
    x, y, _ = two_gaussians(100, 1.0)
    np.random.seed(3)
    before = np.random.get_state()[1].copy()
    one, two, three = (v_information(x, y, family="forest", folds=2, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(before, np.random.get_state()[1])
    assert np.array_equal(one.pointwise, two.pointwise)
    assert (one.low, one.high) == (two.low, two.high)
    assert not np.array_equal(one.pointwise, three.pointwise)


def test_strings_and_booleans_are_attributes_and_layers_share_folds():
    x, y, _ = two_gaussians(100, 3.0)
    names = np.array(["no", "yes"])[y]
    by_layer = v_information_by_layer({"a": x, "b": x[:, 1:]}, names)
    assert by_layer["a"].nats == v_information(x, y.astype(bool)).nats == v_information(x, y).nats
    assert by_layer["a"].nats > by_layer["b"].high


def test_calibration_cannot_do_worse_than_ignoring_the_features_where_it_is_fitted():
    generator = np.random.default_rng(0)
    labels, prior = generator.integers(3, size=60), np.full(3, 1 / 3)
    sure_and_wrong = np.eye(3)[(labels + 1) % 3]
    q = calibrate_probabilities(sure_and_wrong, labels, prior)(sure_and_wrong)
    np.testing.assert_allclose(q, np.log(1 / 3), atol=1e-12)
    sure_and_right = calibrate_probabilities(np.eye(3)[labels], labels, prior)(np.eye(3)[labels])
    np.testing.assert_allclose(np.exp(sure_and_right).sum(1), 1)
    assert -sure_and_right[np.arange(60), labels].mean() < 1 / 60
    mean, truth = np.zeros(2), generator.standard_normal((50, 2))
    np.testing.assert_array_equal(calibrate_values(-truth, truth, mean)(truth), np.zeros_like(truth))
    np.testing.assert_allclose(calibrate_values(4 * truth, truth, mean)(4 * truth), truth)


@pytest.mark.parametrize(
    ("features", "targets", "options", "message"),
    [
        (np.zeros((20, 2)), np.zeros(20, int), {}, "nothing to infer"),
        (np.zeros((20, 2)), np.arange(20) == 0, {}, "1 sample"),
        (np.zeros((20, 2)), np.zeros((20, 3)), {}, "nothing to reconstruct"),
        (np.zeros((5, 2)), np.linspace(0, 1, 5), {}, "5 inputs"),
        (np.zeros((19, 2)), np.arange(20) % 2, {}, "n = 20 rows"),
        (np.full((20, 2), np.nan), np.arange(20) % 2, {}, "NaN or Inf"),
        (np.zeros((20, 2)), np.full(20, np.inf), {}, "NaN or Inf"),
        (np.zeros((20, 2)), np.arange(20) % 2, {"folds": 1}, "folds must be"),
        (np.zeros((20, 2)), np.arange(20) % 2, {"family": "forrest"}, "forest"),
        (np.zeros((20, 2)), np.arange(20) % 2, {"confidence": 95}, "confidence"),
        (np.zeros((20, 2)), np.arange(20) % 2, {"resamples": 10.5}, "whole number resamples"),
        (np.zeros((20, 2)), np.arange(20) % 2, {"folds": 2.5}, r"whole number from 2 to the 20 samples, got 2\.5"),
        (np.full((20, 2), "a"), np.arange(20) % 2, {}, "real numbers"),
        (np.zeros((20, 2)), [0, 1] * 9 + [None, 1], {}, "NoneType, number; expected one"),
        (np.zeros((20, 2)), [0, "1"] * 10, {}, "number, str; expected one"),
        (np.zeros((20, 2)), np.array([0, "1"] * 10, dtype=object), {}, "number, str; expected one"),
        (np.zeros((20, 2)), [[0, 1]] * 19 + [[0]], {}, "equal length"),
        (np.zeros((20, 2)), [["a"]] * 20, {}, "dtype <U1"),
        (np.zeros((20, 2)), [0.0, 1.0] * 9 + [np.nan, 1.0], {}, "leave out samples without a value"),
        (np.zeros((20, 2)), [0.0, 1.0] * 10, {}, r"pass integers for an attribute .* or shape \(n, 1\)"),
        (np.zeros((20, 2)), torch.tensor([0.0, 1.0] * 10), {}, "pass integers for an attribute"),
        (np.zeros((20, 2)), np.array(["x"] * 20), {}, "value 'x'; there"),
        (np.zeros((20, 2)), np.arange(20) // 18, {}, "^attribute value 1 has 2"),
        (np.zeros((20, 2)), [], {}, "one target per sample, got none"),
    ],
)
def test_what_cannot_be_used_is_refused(features, targets, options, message):
    with pytest.raises((ConfigError, DataError), match=message):
        v_information(features, targets, **options)


def test_whole_numbers_are_a_quantity_with_a_second_axis_and_an_attribute_as_integers():
    x, y, _ = two_gaussians(100, 3.0)
    assert v_information(x, y.astype(float)[:, None], folds=2).target == "original"
    assert v_information(x, y + 0.5, folds=2).target == "original"
    latent = v_information(x, y, folds=2)
    for same in (list(y), [bool(v) for v in y], y.astype(object), torch.from_numpy(y)):
        assert v_information(x, same, folds=2).nats == latent.nats


def test_few_independent_samples_give_negative_numbers_and_never_more_than_chance():
    generator = np.random.default_rng(0)
    y = np.arange(40) % 4
    found = [v_information(generator.standard_normal((40, 8)), y, seed=seed) for seed in range(8)]
    assert -0.15 < np.mean([f.nats for f in found]) <= 0
    assert max(f.low for f in found) <= 0


def test_features_without_variance_have_no_information():
    found = v_information(np.ones((40, 3)), np.arange(40) % 2)
    assert abs(found.nats) < 1e-3
