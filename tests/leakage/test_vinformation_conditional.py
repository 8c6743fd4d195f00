"""Pointwise and conditional V-information, and the order in which layers are to be hidden."""

import numpy as np
import pytest

from lmleak.errors import ConfigError, DataError
from lmleak.leakage.conditional import conditional_information, information_chain, protection_order
from lmleak.leakage.pointwise import pointwise_by_class
from lmleak.leakage.vinformation import v_information


def layers(n=600, seed=0):
    """Y = sign of a sum of two parts: "first" sees one, "copy" the same again, "second" the other, "noise" neither."""
    generator = np.random.default_rng(seed)
    a, b = generator.standard_normal((2, n))
    noise = 0.1 * generator.standard_normal((4, n))
    features = {"first": a + noise[0], "copy": a + noise[1], "second": b + noise[2], "noise": 10 * noise[3]}
    return {name: value[:, None] for name, value in features.items()}, (a + b > 0).astype(int)


def test_pointwise_values_average_to_the_information_and_summarise_by_class():
    features, y = layers()
    found = v_information(np.concatenate(list(features.values()), 1), y)
    assert found.pointwise.mean() == pytest.approx(found.nats)
    summary = pointwise_by_class(found, y)
    assert list(summary) == [0, 1]
    assert sum(s.count * s.mean for s in summary.values()) / 600 == pytest.approx(found.nats)
    for label, s in summary.items():
        values = found.pointwise[y == label]
        assert s.low < s.mean < s.high
        assert s.quartiles == tuple(np.quantile(values, [0.25, 0.5, 0.75]))
        assert s.misleading == (values < 0).mean()
        assert y[s.largest] == label
        assert found.pointwise[s.largest] == values.max()
    with pytest.raises(DataError, match="600 of them"):
        pointwise_by_class(found, y[:10])


def test_pointwise_values_of_inputs_average_to_the_information_too():
    generator = np.random.default_rng(0)
    x = generator.standard_normal((200, 3))
    found = v_information(x, x + 0.5 * generator.standard_normal((200, 3)))
    assert found.pointwise.mean() == pytest.approx(found.nats)
    assert found.pointwise.shape == (200,)
    assert set(pointwise_by_class(found, ["odd", "even"] * 100)) == {"odd", "even"}


def test_a_rare_class_has_more_to_lose():
    generator = np.random.default_rng(0)
    y = (np.arange(300) % 10 == 0).astype(int)
    found = v_information(np.stack([y, generator.standard_normal(300)], 1) * 4.0, y, folds=3)
    summary = pointwise_by_class(found, y)
    assert summary[1].low > summary[0].high
    assert summary[1].mean == pytest.approx(np.log(10), rel=0.1)


def test_what_a_copy_tells_beyond_the_original_is_nothing():
    features, y = layers()
    alone = v_information(features["copy"], y)
    beyond = conditional_information(features, y, "copy", ["first"])
    assert alone.nats > 0.15
    assert abs(beyond.nats) < 0.03
    both = conditional_information(features, y, "second", ["first"])
    assert both.nats > 1.5 * v_information(features["second"], y).nats  # parts of a sum tell more together
    unconditional = conditional_information(features, y, "first", [])
    assert unconditional.nats == v_information(features["first"], y).nats


def test_conditional_linear_gaussian_information_is_the_closed_form():
    """Y = a + b + e, s = Var e: I(b -> Y | a) = log(1 + 1/s) / 2, and I(b -> Y) = log((2 + s) / (1 + s)) / 2."""
    generator = np.random.default_rng(0)
    a, b = generator.standard_normal((2, 2000, 1))
    y = a + b + 0.5 * generator.standard_normal((2000, 1))
    given = conditional_information({"a": a, "b": b}, y, "b", ["a"])
    alone = v_information(b, y)
    assert given.low < 0.5 * np.log(1 + 4) < given.high
    assert alone.low < 0.5 * np.log(2.25 / 1.25) < alone.high


def test_the_chain_sums_to_the_information_of_all_layers():
    features, y = layers()
    chain = information_chain(features, y, folds=3)
    assert list(chain) == list(features)
    together = conditional_information(features, y, "noise", ["first", "copy", "second"], folds=3)
    total = sum(found.nats for found in chain.values())
    assert together.baseline_nats - together.nats == pytest.approx(chain["first"].baseline_nats - total, abs=0.02)
    assert abs(chain["copy"].nats) < 0.03
    assert abs(chain["noise"].nats) < 0.02


def test_protection_hides_what_leaves_least_and_says_what_is_left():
    features, y = layers()
    steps = protection_order(features, y, folds=3)
    order = [step.layer for step in steps]
    assert sorted(order) == sorted(features)
    # Hiding one of the two copies gains nothing; the part that has no copy goes first, the noise last.
    assert order[0] == "second"
    assert order[-1] == "noise"
    residual = [step.residual.nats for step in steps]
    assert residual[0] == pytest.approx(v_information(features["first"], y, folds=3).nats, abs=0.04)
    assert residual[1] == pytest.approx(residual[0], abs=0.04)  # the copy is still shared
    assert residual[2] == pytest.approx(0, abs=0.02)
    assert residual[3] == 0
    assert [step.residual.num_features for step in steps] == [3, 2, 1, 0]


def test_orders_are_the_same_each_time():
    features, y = layers(n=200)
    one, two = (protection_order(features, y, folds=2, seed=4) for _ in range(2))
    assert [(s.layer, s.residual.nats) for s in one] == [(s.layer, s.residual.nats) for s in two]


def test_unknown_layers_are_refused():
    features, y = layers(n=60)
    with pytest.raises(ConfigError, match="copy"):
        conditional_information(features, y, "copi", ["first"])
    with pytest.raises(ConfigError, match="leave it out"):
        conditional_information(features, y, "copy", ["copy"])
    with pytest.raises(ConfigError, match="at least one layer"):
        information_chain({}, y)
    with pytest.raises(DataError, match="n = 60"):
        protection_order({"a": np.zeros((5, 2))}, y)
