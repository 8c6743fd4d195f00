"""The layer-wise audit: released gradients in one store, every metric of every layer, orders, what hiding leaves."""

import json
import math
from functools import partial
from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from lmleak.adapters import LeNet, adapt
from lmleak.data.images import load_images
from lmleak.defenses import parse_defense
from lmleak.errors import ConfigError, DataError
from lmleak.evaluation.attacks import Sharing
from lmleak.evaluation.layers import ALL, GROUPS, LayerAnalysis, LayerSettings, Measure
from lmleak.evaluation.layers_capture import CaptureSettings, audited_layers, capture_store, release_rows
from lmleak.evaluation.layers_examples import image_examples, text_examples
from lmleak.evaluation.layers_order import METRICS, LayerScores, layer_scores, rank_agreement
from lmleak.evaluation.layers_protection import (
    FORWARD,
    Protection,
    ProtectionSettings,
    curves,
    depths,
    hidden_sets,
    hide,
    protection_orders,
)
from lmleak.gradients import GradientStoreWriter, capture_gradient
from lmleak.leakage import direction_and_norm, v_information
from lmleak.types import Aggregation
from tests.families import make

SHARED = Sharing("undefended", shared="all")


@pytest.fixture(scope="module")
def digits():
    data = load_images("digits", limit=60)
    adapter = adapt(LeNet(size=8, seed=0), image_shape=(1, 8, 8), normalization=data.normalization())
    attributes = {"parity": data.labels % 2, "coin": np.arange(60) % 2 == 0}
    return adapter, image_examples(adapter, data.pixels, data.labels, attributes, name="digits")


@pytest.fixture(scope="module")
def settings():
    capture = CaptureSettings(SHARED, features=32)
    return LayerSettings(
        capture,
        folds=2,
        permutations=9,
        subspace=2,
        sensitivity_examples=2,
        influence_examples=1,
        tolerance=0.1,
        max_products=10,
    )


@pytest.fixture(scope="module")
def analysis(digits, settings, tmp_path_factory):
    store = capture_store(*digits, tmp_path_factory.mktemp("layers") / "store", settings.capture)
    return LayerAnalysis(*digits, store, settings)


@pytest.fixture(scope="module")
def rows(analysis):
    return [row for measure in analysis.measures() for row in analysis.rows(measure)]


# Captured gradients ----------------------------------------------------------------------------------------


def test_the_store_holds_every_examples_gradient_and_what_is_to_be_reconstructed(digits, tmp_path):
    adapter, examples = digits
    names = dict(adapter.roles())["fc"]
    size = sum(adapter.parameters()[name].numel() for name in names)
    store = capture_store(adapter, examples, tmp_path / "s", CaptureSettings(SHARED, features=4 * (size // 4 + 1)))
    for victim in (0, 31, 59):
        gradient = capture_gradient(adapter, examples.batch([victim]), shared="all").gradient
        expected = torch.cat([gradient[name].flatten() for name in names])
        torch.testing.assert_close(store.features("fc")[victim], expected, rtol=1e-4, atol=1e-6 * expected.norm())
    pixels = adapter.input(examples.batch(range(60)))
    torch.testing.assert_close(store.attribute("original/pixels"), pixels)
    some = [3, 40, 59]
    torch.testing.assert_close(store.attribute("original/pixels", some), pixels[some])
    torch.testing.assert_close(store.features("body.0", some), store.features("body.0")[some])


def test_a_killed_capture_goes_on_and_gives_the_same_store(digits, tmp_path, monkeypatch):
    from lmleak.evaluation import layers_capture

    monkeypatch.setattr(layers_capture, "MOST_AT_ONCE", 7)
    settings = CaptureSettings(SHARED, features=16)
    whole = capture_store(*digits, tmp_path / "whole", settings)
    seen = []

    def die(count):
        seen.append(count)
        if sum(seen) >= 28:
            raise KeyboardInterrupt

    monkeypatch.setattr(layers_capture, "GradientStoreWriter", partial(GradientStoreWriter, shard_size=8))
    with pytest.raises(KeyboardInterrupt):
        capture_store(*digits, tmp_path / "killed", settings, advance=die)
    resumed = capture_store(*digits, tmp_path / "killed", settings, advance=seen.append)
    assert seen[5] == 24  # three shards of eight were safe on disk
    for layer in whole.layers:
        torch.testing.assert_close(resumed.features(layer), whole.features(layer), rtol=1e-4, atol=1e-5)


def test_a_release_is_the_gradient_of_the_victim_with_others(digits, tmp_path):
    adapter, examples = digits
    settings = CaptureSettings(SHARED, batch_size=4, features=32)
    together = [release_rows(examples, victim, settings) for victim in range(60)]
    assert all(rows[0] == victim and len(set(rows)) == 4 for victim, rows in enumerate(together))
    assert len({tuple(rows[1:]) for rows in together}) > 50
    store = capture_store(adapter, examples, tmp_path / "s", settings)
    single = capture_store(adapter, examples, tmp_path / "one", CaptureSettings(SHARED, features=32))
    # projection is linear, so the release of a batch is the mean of its examples' releases
    for layer in store.layers:
        for victim in (0, 59):
            expected = single.features(layer)[together[victim]].mean(0)
            torch.testing.assert_close(store.features(layer)[victim], expected, rtol=1e-3, atol=1e-5)
    with pytest.raises(DataError, match="fewer than batch_size=61"):
        release_rows(examples, 0, CaptureSettings(SHARED, batch_size=61))


def test_defenses_and_local_steps_are_part_of_the_release(digits, tmp_path):
    adapter, examples = digits
    plain = capture_store(adapter, examples, tmp_path / "plain", CaptureSettings(SHARED, features=32))
    clipped = Sharing("clip", parse_defense("clip(max_norm=0.5)"), "all")
    store = capture_store(adapter, examples, tmp_path / "clip", CaptureSettings(clipped, features=32))
    total = sum(plain.features(layer).square().sum(1) for layer in plain.layers).sqrt()
    assert total.median() > 1
    for layer in plain.layers:  # one factor per example for all layers
        ratio = store.features(layer).norm(dim=1) / plain.features(layer).norm(dim=1)
        assert (ratio < 0.5).all()
    local = Sharing("local", shared="all", aggregation=Aggregation(epochs=3, learning_rate=0.5))
    stepped = capture_store(adapter, examples, tmp_path / "local", CaptureSettings(local, features=32))
    assert not torch.allclose(stepped.features("fc"), plain.features("fc"), rtol=1e-2)
    with pytest.raises(ConfigError, match="another"):
        capture_store(adapter, examples, tmp_path / "plain", CaptureSettings(clipped, features=32))


def test_layers_are_roles_or_modules_and_cover_what_is_shared():
    adapter, _ = make("bert", size=1)
    names = set(adapter.select("no-word-embeddings").names)
    sharing = Sharing("undefended")
    for granularity, count in (("role", 4), ("module", 10)):
        layers = audited_layers(adapter, CaptureSettings(sharing, granularity=granularity))
        listed = [name for members in layers.values() for name in members]
        assert sorted(listed) == sorted(names)
        assert len(layers) >= count
    with pytest.raises(ConfigError, match="granularity"):
        CaptureSettings(sharing, granularity="block")


# Metrics ---------------------------------------------------------------------------------------------------


def test_every_layer_has_every_metric_and_rows_are_json(rows, digits):
    layers = [*digits[0].roles(), ALL]
    assert json.loads(json.dumps(rows, allow_nan=False)) == json.loads(json.dumps(rows))
    assert len({row["key"] for row in rows}) == len(rows)
    assert {row["group"] for row in rows} == set(GROUPS)
    for group in GROUPS:
        found = [row for row in rows if row["group"] == group]
        wanted = layers if group in ("latent", "original") else layers[:-1]
        for target in {row["target"] for row in found}:
            assert [row["layer"] for row in found if row["target"] == target] == wanted
    for row in rows:
        assert row["place"] == layers.index(row["layer"])
        assert row["parameters"] > 0


def test_information_is_that_of_directions_and_norms_of_the_stored_features(rows, analysis):
    features = direction_and_norm(analysis.store.features("fc"))
    parity = analysis.examples.attributes["parity"]
    expected = v_information(features, parity, folds=2)
    (row,) = [r for r in rows if r["key"] == "fc|latent|parity|linear"]
    assert row["nats"] == expected.nats > 0.3
    assert row["num_features"] == 33
    assert row["by_value"]["0"]["count"] + row["by_value"]["1"]["count"] == 60
    assert row["p_value"] == 1 / 10
    (whole,) = [r for r in rows if r["key"] == f"{ALL}|latent|parity|linear"]
    assert whole["num_features"] == 33 * 5
    (coin,) = [r for r in rows if r["key"] == f"{ALL}|latent|coin|linear"]
    assert abs(coin["nats"]) < 0.1
    (pixels,) = [r for r in rows if r["key"] == "body.0|original|pixels|linear"]
    assert pixels["num_coordinates"] == 64
    assert pixels["r_squared"] > 0.3


def test_directions_and_norms_lose_nothing():
    g = np.random.default_rng(0).standard_normal((5, 3)) * 10.0 ** np.arange(-2, 3)[:, None]
    features = direction_and_norm(g)
    np.testing.assert_allclose(np.exp(features[:, 3:]) * features[:, :3], g, rtol=1e-12)
    assert np.isfinite(direction_and_norm(np.zeros((2, 3)))).all()


def test_shares_of_sensitivity_add_up_and_intervals_hold_the_mean(rows):
    found = [row for row in rows if row["group"] == "sensitivity"]
    assert sum(row["share"] for row in found) == pytest.approx(1)
    assert found[-1]["cumulative"] == pytest.approx(1)
    for row in found:
        assert row["exact"]
        assert row["frobenius_low"] <= row["frobenius"] <= row["frobenius_high"]
        assert row["frobenius_probe_error"] == 0


def test_examples_of_one_source_are_compared_once_and_not_divided(digits, analysis):
    adapter, _ = digits
    author = np.repeat(np.arange(30), 2)
    pixels = load_images("digits", limit=60).pixels
    grouped = image_examples(
        adapter, pixels, torch.arange(60) % 10, {"sex": author % 2, "label": np.arange(60) % 4 // 2}, groups=author
    )
    found = LayerAnalysis(adapter, grouped, analysis.store, analysis.settings)
    (row,) = found.rows(Measure("mean-difference", "fc", "sex"))
    assert row["gradients"] == 30
    (row,) = found.rows(Measure("latent", "fc", "sex", "linear"))
    assert "p_value" in row
    differing = image_examples(adapter, pixels, torch.arange(60) % 10, {"half": np.arange(60) % 2}, groups=author)
    (row,) = LayerAnalysis(adapter, differing, analysis.store, analysis.settings).rows(
        Measure("latent", "fc", "half", "linear")
    )
    assert "p_value" not in row  # shuffling what differs within an author is no null


def test_texts_are_reconstructed_as_bags_and_mean_embeddings():
    adapter, _ = make("bert", size=1)
    adapter.tokenizer = None
    texts = [[2, 9, 9, 3], [2, 9, 11, 12, 3], [2, 11, 13, 3], [2, 11, 9, 3]]
    examples = text_examples(adapter, texts, {}, labels=[0, 1, 0, 1])
    batch = examples.batch(range(4))
    special = adapter.special_ids()
    bag = examples.originals["bag-of-tokens"](batch)
    kept = [t for t in (9, 11) if t not in special]
    assert bag.shape == (4, len(kept))
    expected = [[float(t in text) for t in kept] for text in texts]
    assert bag.tolist() == expected
    mean = examples.originals["mean-embedding"](batch)
    torch.testing.assert_close(mean[0].double(), adapter.table()[texts[0]].mean(0).double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"a": np.zeros(60, int)}, "attribute 'a'.*nothing to infer"),
        ({"a": np.arange(60) == 0}, "attribute 'a'.*1 sample"),
        ({"a": np.arange(59) % 2}, "59 value"),
        ({"a": np.arange(60) / 2}, "float64 values"),
    ],
)
def test_attributes_that_cannot_be_inferred_are_refused_by_name(digits, attributes, message):
    data = load_images("digits", limit=60)
    with pytest.raises(DataError, match=message):
        image_examples(digits[0], data.pixels, data.labels, attributes)


# Orders ----------------------------------------------------------------------------------------------------


def scores_of(**values):
    return [
        LayerScores(name, METRICS[name], None, None, dict(zip("abcdefgh", column, strict=False)))
        for name, column in values.items()
    ]


def test_orders_put_first_what_leaks_most_by_each_metrics_own_direction():
    sensitivity, only = scores_of(sensitivity=[1.0, 3.0, 2.0], only=[0.2, 0.1, 0.1])
    assert sensitivity.order() == ("b", "c", "a")
    assert only.order() == ("b", "c", "a")  # a small error leaks; of equal ones the layer nearer to the input


def test_the_table_gives_every_metric_once_per_target(rows):
    names = [score.name for score in layer_scores(rows)]
    assert "latent:parity" in names
    assert "original:pixels" in names
    assert "only" in names
    assert len(names) == len(set(names))
    for score in layer_scores(rows):
        assert list(score.values) == ["body.0", "body.2", "body.4", "body.6", "fc"]
    missing = [dict(row, z=None) if row["key"] == "fc|subspace|parity" else row for row in rows]
    assert "subspace:parity" not in [score.name for score in layer_scores(missing)]


@pytest.mark.parametrize("size", [3, 5, 8])
def test_agreement_is_spearmans_with_the_share_of_orders_that_reach_it(size):
    generator = np.random.default_rng(size)
    a = generator.standard_normal(size)
    b = a + generator.standard_normal(size)
    (entry,) = rank_agreement(scores_of(sensitivity=a.tolist(), without=b.tolist()))
    assert entry["value"] == pytest.approx(spearmanr(a, b).statistic)
    assert entry["low"] <= entry["value"] <= entry["high"]
    if size < 8:
        every = [abs(spearmanr(a, b[list(order)]).statistic) for order in permutations(range(size))]
        assert entry["p_value"] == pytest.approx(np.mean(np.array(every) >= abs(entry["value"]) - 1e-9))
    else:
        assert entry["p_value"] == pytest.approx(spearmanr(a, b).pvalue, abs=0.05)
    (short,) = rank_agreement(scores_of(sensitivity=[1.0, 2.0], without=[1.0, 2.0]))
    assert short["value"] is None
    assert "three layers" in short["note"]


# Protection ------------------------------------------------------------------------------------------------


def test_depths_and_sets_are_what_orders_begin_with():
    assert depths(4, 6) == [0, 1, 2, 3]
    assert depths(60, 6) == [0, 1, 2, 4, 8, 59]
    assert depths(5, 4) == [0, 1, 2, 4]
    orders = {FORWARD: ("a", "b", "c"), "x": ("b", "a", "c"), "y": ("c", "b", "a")}
    assert hidden_sets(orders, 6) == [(), ("a",), ("b",), ("c",), ("a", "b"), ("b", "c")]


def test_hidden_layers_are_withheld_from_metrics_and_attacks(analysis, rows):
    settings = ProtectionSettings(("gs(iterations=3)",), attack_examples=1)
    orders = protection_orders(analysis, layer_scores(rows), settings)
    assert orders[FORWARD] == tuple(analysis.layers)
    assert all(sorted(order) == sorted(analysis.layers) for order in orders.values())
    assert {"greedy:parity", "greedy:coin", "without", "latent:parity"} <= set(orders)
    guard = Protection(analysis, settings)
    left = [guard.row(hidden) for hidden in ((), ("body.0", "fc"))]
    json.dumps(left, allow_nan=False)
    features = analysis.features(["body.2", "body.4", "body.6"], analysis.chosen)
    expected = v_information(features, analysis.examples.attributes["parity"], folds=2)
    assert left[1]["latent"]["parity"]["nats"] == expected.nats
    assert left[1]["remaining"] == ["body.2", "body.4", "body.6"]
    assert left[1]["parameters"] == sum(analysis.parameters[layer] for layer in left[1]["remaining"])
    for row in left:
        assert math.isfinite(row["attacks"]["gs(iterations=3)"]["rmse"])
    found = curves({FORWARD: ("body.0", "fc")}, [left[0] | {"hidden": ["body.0"]}, left[0]], 6)
    assert [(k, hidden) for k, hidden, _ in found[FORWARD]] == [(0, ()), (1, ("body.0",))]


def test_attacks_are_means_over_several_examples_with_their_interval(analysis):
    spec = "gs(iterations=2)"
    one, two = (Protection(analysis, ProtectionSettings((spec,), attack_examples=n)).row(("fc",)) for n in (1, 3))
    alone, several = one["attacks"][spec], two["attacks"][spec]
    assert (alone["examples"], several["examples"]) == (1, 3)
    assert (alone["rmse_low"], alone["rmse_high"]) == (None, None)
    assert several["rmse_low"] < several["rmse"] < several["rmse_high"]


def test_hiding_removes_exactly_the_named_parameters(digits):
    adapter, examples = digits
    shared = capture_gradient(adapter, examples.batch([0]), shared="all")
    names = ["body.0.weight", "fc.bias"]
    found = hide(shared, names)
    assert set(shared.gradient) - set(found.gradient) == set(names)
    assert found.defenses[-1].startswith("hide-layers")
    assert hide(shared, []) is shared


def test_settings_that_cannot_be_right_are_refused():
    for wrong, message in (
        ({"groups": ("sensitivty",)}, "sensitivity"),
        ({"families": ("lienar",)}, "linear"),
        ({"noise": 0.0}, "noise must be positive"),
        ({"pairs": 0}, "pairs must be at least 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            LayerSettings(**wrong)
    with pytest.raises(ConfigError, match="attack_examples >= 1"):
        ProtectionSettings(attack_examples=0)
