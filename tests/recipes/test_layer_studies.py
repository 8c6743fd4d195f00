"""The studies on layers: their settings, the parts that decide what they say, and one tiny run of each."""

import csv
import importlib
import json

import numpy as np
import pytest
import torch

from lmleak.config import parse_config
from lmleak.errors import ConfigError, DataError
from tests.launching import ROOT, fork

CLASSES = {
    "layer_leakage": "LeakageConfig", "layer_bridge": "BridgeConfig", "layer_aggregation": "AggregationConfig",
    "layer_defenses": "DefensesConfig", "layer_capacity": "CapacityConfig",
}  # fmt: skip
CONFIGS = [path for name in CLASSES for path in sorted((ROOT / "configs" / name).glob("*.yaml"))]
TINY = [
    "--cases", "digits:cnn", "--count", "200", "--gradients", "60", "--features", "8", "--folds", "2",
    "--permutations", "3", "--pairs", "40",
]  # fmt: skip


@pytest.fixture(scope="module")
def recipe():
    return importlib.import_module


def run(recipe, name, tmp_path, *arguments):
    """Run a recipe in a new folder; return its rows and its table."""
    assert recipe(name).main([*TINY, *arguments, "--output", str(tmp_path / "out")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert (tmp_path / "out" / f"{name}.png").stat().st_size > 10_000
    return rows, list(csv.DictReader((tmp_path / "out" / f"{name}.csv").open()))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_every_configuration_is_read_by_the_real_parser(recipe, path):
    name = path.parent.name
    config = parse_config(getattr(recipe(name), CLASSES[name]), ["--config", str(path)])
    assert config.output == f"runs/{name}/{path.stem}"


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("layer_leakage", ["--cases", "digits:bert"], "source of texts"),
        ("layer_leakage", ["--cases", "digits:vgg"], "model"),
        ("layer_leakage", ["--cases", "synthpai:bert"], "no classes"),
        ("layer_leakage", ["--mark", "hat"], "mark"),
        ("layer_leakage", ["--epochs", "-1"], "epochs"),
        ("layer_bridge", ["--cases", "cola:gpt2"], "images only"),
        ("layer_bridge", ["--noise", "0"], "positive"),
        ("layer_aggregation", ["--batch-sizes", "2"], "must hold 1"),
        ("layer_aggregation", ["--local-steps", "3"], "divide"),
        ("layer_defenses", ["--dropouts", "1"], r"\[0, 1\)"),
        ("layer_defenses", ["--cases", "digits:resnet"], "cnn"),
        ("layer_capacity", ["--families", "linearr"], "family"),
        ("layer_capacity", ["--attacked", "3"], "at least 16"),
    ],
)
def test_wrong_settings_are_refused(recipe, name, arguments, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(getattr(recipe(name), CLASSES[name]), arguments)


def layer_row(layer, place, nats, low, high):
    return {"layer": layer, "place": place, "nats": nats, "low": low, "high": high, "group": "latent",
            "baseline_nats": 1.0, "fraction_low": low, "fraction_high": high}  # fmt: skip


def test_a_finding_is_confirmed_or_refuted_by_separate_intervals_only(recipe):
    verdict = recipe("layer_leakage").verdict
    first, second = layer_row("a", 0, 0.5, 0.4, 0.6), layer_row("b", 1, 0.2, 0.1, 0.3)
    assert verdict([first, second], ["a"])["verdict"] == "confirmed"
    assert verdict([first, second], ["b"])["verdict"] == "refuted"
    assert verdict([first, layer_row("b", 1, 0.45, 0.35, 0.55)], ["a"])["verdict"] == "open"


def test_information_is_a_share_of_what_there_is_to_know(recipe):
    information = recipe("layer_cases").information
    latent = layer_row("a", 0, 0.5, 0.4, 0.6) | {"baseline_nats": 2.0, "fraction_low": 0.19, "fraction_high": 0.28}
    assert information(latent) == (0.25, 0.19, 0.28)  # the interval is of the ratio, not that of nats over 2
    with pytest.raises(DataError, match="measure them again"):
        information({name: value for name, value in latent.items() if name != "fraction_high"})
    nats = 10 / 2 * np.log(4.0)  # MSE0 / MSE1 = 4 over 10 coordinates: R^2 = 3/4
    row = {"group": "original", "num_coordinates": 10, "nats": nats, "low": 0.0, "high": nats}
    assert information(row) == pytest.approx((0.75, 0.0, 0.75))


def test_a_decoder_trained_on_other_gradients_is_misled_and_one_of_the_same_kind_is_not(recipe):
    from lmleak.leakage import v_information

    transferred = recipe("layer_aggregation").transferred_information
    generator = np.random.default_rng(0)
    y = np.arange(600) % 2
    single = generator.standard_normal((600, 4)) + 2.0 * y[:, None] * np.eye(4)[0]
    same = transferred(single, single, y, family="linear", folds=3, seed=0)
    assert same.nats == pytest.approx(v_information(single, y, folds=3, seed=0).nats, abs=0.05)
    flipped = single * [-1, 1, 1, 1]
    assert transferred(single, flipped, y, family="linear", folds=3, seed=0).high < 0
    assert v_information(flipped, y, folds=3, seed=0).low > 0.1


def test_nested_families_cost_one_fit_and_say_the_same(recipe):
    from lmleak.leakage import v_information

    generator = np.random.default_rng(1)
    x = generator.standard_normal((150, 3))
    y = (x[:, 0] * x[:, 1] > 0).astype(int)  # no line tells it, a forest does
    linear, forest = recipe("layer_capacity").nested_information(x, y, ["linear", "forest"], folds=2, seed=0)
    assert linear.nats == pytest.approx(v_information(x, y, family="linear", folds=2, seed=0).nats)
    assert forest.nats == pytest.approx(v_information(x, y, family="forest", folds=2, seed=0).nats)
    assert forest.low > linear.high


def test_text_networks_start_from_the_reference_or_at_random_and_training_helps(recipe):
    models, cases = recipe("layer_models"), recipe("layer_cases")
    config = cases.LayerStudyConfig(cases=["messages:gpt2"], count=120)
    private, public = cases.halves(config, "messages")
    losses = {}
    for pretrained, epochs in ((False, 0), (True, 0), (False, 1)):
        network = models.text_network("gpt2", public, pretrained=pretrained, dropout=0.0, seed=0)
        before = torch.get_rng_state()
        models.train("gpt2", public, network, epochs=epochs, batch_size=16, seed=0)
        assert torch.equal(torch.get_rng_state(), before)
        losses[pretrained, epochs] = models.held_out("gpt2", private, network)["loss"]
    assert losses[False, 0] == pytest.approx(np.log(2000), abs=0.2)
    assert losses[True, 0] < losses[False, 1] < losses[False, 0]
    adapter = models.adapter_of("gpt2", network, "gpt2")
    assert "lm_head.weight" in adapter.roles()["head"]  # untied: the head is a layer of its own


def test_private_training_clips_and_adds_noise(recipe):
    models, cases = recipe("layer_models"), recipe("layer_cases")
    config = cases.LayerStudyConfig(count=800)
    private, public = cases.halves(config, "digits")
    accuracy = {}
    for z in (0.0, 30.0):
        network = models.image_network("cnn", public, dropout=0.0, seed=0)
        models.train_privately(public, network, clip=1.0, noise_multiplier=z, epochs=8, batch_size=32, seed=0)
        accuracy[z] = models.held_out("cnn", private, network)["accuracy"]
    assert accuracy[0.0] > 0.6 > 0.35 > accuracy[30.0]


def test_leakage_of_a_tiny_network(recipe, tmp_path):
    rows, table = run(recipe, "layer_leakage", tmp_path, "--epochs", "0")
    assert {r["group"] for r in rows} == {"sensitivity", "subspace", "mean-difference", "latent", "original"}
    assert [line["layer"] for line in table] == ["conv1", "conv2", "fc1", "fc2", "fc3", "all layers"]
    assert all(r["follows_from_label"] is False for r in rows if r["target"] == "mark")
    shares = [float(line["trace share"]) for line in table if line["trace share"]]
    assert sum(shares) == pytest.approx(1, abs=0.02)
    findings = list(csv.DictReader((tmp_path / "out" / "layer_leakage_findings.csv").open()))
    assert {f["finding"] for f in findings} == {"first layer", "fully connected"}


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_give_the_rows_of_one(recipe, tmp_path):
    """Of a trained network too: one process trains and captures, all measure."""
    alone, _ = run(recipe, "layer_leakage", tmp_path / "one", "--epochs", "0", "1")
    folder = tmp_path / "two" / "out"
    main = recipe("layer_leakage").main
    fork(main, [*TINY, "--epochs", "0", "1", "--processes", "2", "--output", str(folder)])
    assert len(list((folder / "shards").glob("rank-*.jsonl"))) == 2
    assert [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()] == alone


@pytest.mark.slow
def test_bridge_of_a_tiny_network(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe("layer_bridge"), "RESAMPLES", 50)
    rows, table = run(
        recipe, "layer_bridge", tmp_path, "--cases", "digits:lenet", "--epochs", "0", "--images", "2", "--iterations",
        "6", "--noise", "1e-3",
    )  # fmt: skip
    attacked = [r for r in rows if r["group"] == "attack"]
    assert len(attacked) == 10
    assert all(r["converged"] for r in attacked)
    for row in attacked:  # at little noise the attacker from the truth errs as predicted, where x is determined
        if row["without_undetermined"] < 1e-6:
            assert row["without_truth"] == pytest.approx(row["without_map"], rel=0.2)
    assert {line["attack"] for line in table} == {"only", "without"}
    images = (tmp_path / "out" / "layer_bridge_images.csv").read_text().splitlines()
    published = (ROOT / "recipes" / "results" / "layer_bridge_images-digits.csv").read_text().splitlines()
    assert (images[0], len(images)) == (published[0], 1 + len(attacked))


@pytest.mark.slow
def test_aggregation_of_a_tiny_network(recipe, tmp_path):
    rows, table = run(
        recipe, "layer_aggregation", tmp_path, "--batch-sizes", "1", "8", "--local-steps", "2", "--local-epochs", "2",
        "--epochs", "0",
    )  # fmt: skip
    assert {line["release"] for line in table} == {
        "1 example", "8 examples", "8 examples, 2 local steps", "8 examples, 2 x 2 local steps"
    }  # fmt: skip
    sensitivity = {line["release"]: float(line["sensitivity"]) for line in table if line["layer"] == "fc3"}
    assert sensitivity["8 examples"] == pytest.approx(sensitivity["1 example"] / 8, rel=0.3)
    assert any(r["group"] == "naive latent" for r in rows)


@pytest.mark.slow
def test_defenses_of_a_tiny_network(recipe, tmp_path):
    _, table = run(
        recipe, "layer_defenses", tmp_path, "--dropouts", "0", "0.5", "--noise-multipliers", "0", "100", "--epochs",
        "1",
    )  # fmt: skip
    assert list(dict.fromkeys(line["defense"] for line in table)) == [
        "none", "dropout 0.5", "DP-SGD z = 0", "DP-SGD z = 100"
    ]  # fmt: skip
    drowned = [float(line["pixels"]) for line in table if line["defense"] == "DP-SGD z = 100"]
    assert max(drowned) < 0.05


@pytest.mark.slow
def test_capacity_of_a_tiny_network(recipe, tmp_path):
    _, table = run(
        recipe, "layer_capacity", tmp_path, "--families", "linear", "forest", "--sizes", "30", "60",
        "--attacked", "16", "--attack", "gauss-newton(iterations=2)", "--epochs", "0", "--layers", "conv1",
    )  # fmt: skip
    assert {line["family"] for line in table if line["what"] == "attack"} == {
        "constant+attack", "linear+attack", "linear"
    }  # fmt: skip
    assert [line["gradients"] for line in table if line["what"] == "curve" and line["target"] == "pixels"] == [
        "30",
        "60",
    ]


def test_rank_correlation_is_spearmans(recipe):
    from scipy.stats import spearmanr

    correlation = recipe("layer_bridge").rank_correlation
    x, y = [3.0, 1.0, 2.0, 2.0, 9.0], [0.5, 0.1, 0.7, 0.2, 0.7]
    assert correlation(x, y) == pytest.approx(spearmanr(x, y).statistic)
    assert np.isnan(correlation([1.0, 1.0], [1.0, 2.0]))
