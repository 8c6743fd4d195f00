"""The study of defenses at equal utility: what a release is, what is reported of it, and the recipe as launched."""

import csv
import importlib
import json
import math

import pytest
import torch

from lmleak.config import parse_config
from lmleak.errors import ConfigError
from lmleak.gradients import capture_gradient
from tests.launching import ROOT, fork
from tests.recipes.test_influence_vs_attack import assert_same

recipe, report, settings = map(
    importlib.import_module, ("defense_comparison", "defense_report", "defense_settings")
)  # fmt: skip
PRIVATE = "lora(rank=2)+dp(max_norm=1, noise_multiplier=0.5)"
TINY = [
    "--settings", "none", PRIVATE, "--attacks", "bag(lengths=given)", "gs(iterations=2, candidates=2)",
    "--training-texts", "40", "--validation-texts", "8", "--test-texts", "16", "--clients", "2", "--steps", "3",
    "--samples", "1", "--learning-rates", "1e-3",
]  # fmt: skip


def tiny(**changes):
    small = {"settings": ["none"], "training_texts": 8, "clients": 2, "steps": 1, "batch_size": 2, "seed": 3}
    return recipe.ComparisonConfig(**small | changes)


def norm_of(gradient):
    return math.sqrt(sum(g.double().square().sum().item() for g in gradient.values()))


@pytest.fixture(scope="module")
def texts():
    config = tiny()
    return recipe.load_splits(config, recipe.start(config, settings.Setting("none"))).training


# Settings and releases --------------------------------------------------------------------------------------


def test_a_setting_reads_its_parts():
    setting = settings.Setting("freeze-embeddings+dp(max_norm=2, noise_multiplier=0.5)+quantize(bits=4)")
    assert setting.family == "freeze-embeddings+dp+quantize"
    defense = setting.defense(batch_size=4, seed=1)
    assert defense.describe() == "gaussian(std=0.25, unit=absolute)+quantize(bits=4)"
    assert settings.Setting("none").defense(1, 0).describe() == "none"


@pytest.mark.parametrize(("spec", "said"), [
    ("prune(ratio=0.5)+dp(max_norm=1, noise_multiplier=1)", "dp comes before"),
    ("lora(rank=2)+lora(rank=4)", "Lora twice"),
    ("dp(max_norm=1, noise_multiplier=0)", "noise_multiplier > 0"),
    ("dp(max_norm=1)", "noise_multiplier"),
    ("freeze", "freeze-embeddings"),
])  # fmt: skip
def test_settings_that_make_no_sense_are_refused(spec, said):
    with pytest.raises(ConfigError, match=said):
        settings.Setting(spec)


@pytest.mark.parametrize(("changes", "said"), [
    ({"settings": ["sign"]}, "must hold none"), ({"batch_size": 5}, "fewer than batch_size"),
    ({"learning_rates": [0.0]}, "learning_rates"), ({"optimizer": "adagrad"}, "adam, sgd"),
    ({"attacks": []}, "one attack"),
])  # fmt: skip
def test_configurations_that_make_no_sense_are_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        tiny(**changes)


def test_a_private_release_is_the_clipped_sum_over_the_expected_number_plus_noise(texts):
    """Whatever was drawn: three texts, or none."""
    config, z, norm = tiny(), 0.5, 0.1
    setting = settings.Setting(f"dp(max_norm={norm}, noise_multiplier={z})")
    adapter = recipe.start(config, setting)
    noise = recipe.release_of(setting, adapter, None, expected=2, seed=9)
    count = sum(g.numel() for g in noise.values())
    assert norm_of(noise) == pytest.approx(z * norm / 2 * math.sqrt(count), rel=0.01)
    batch = recipe.batch_of(config, adapter, texts[:3])
    signal = {n: g - noise[n] for n, g in recipe.release_of(setting, adapter, batch, expected=2, seed=9).items()}
    for name in signal:
        signal[name] = 2 * signal[name]
    each = [
        capture_gradient(adapter, recipe.batch_of(config, adapter, [text]), shared="all").gradient
        for text in texts[:3]
    ]
    for name, value in signal.items():
        clipped = sum(g[name] * min(1.0, norm / (norm_of(g) + 1e-6)) for g in each)
        assert (value - clipped).abs().max() < 1e-6


def test_what_is_trained_is_what_is_released(texts):
    config = tiny(fresh=["block 1", "head"])
    trained = {}
    for spec in ("none", "freeze-embeddings", "lora(rank=2)"):
        setting = settings.Setting(spec)
        adapter = recipe.start(config, setting)
        released = recipe.release_of(setting, adapter, recipe.batch_of(config, adapter, texts[:2]), expected=2, seed=0)
        trained[spec] = {n for n, p in adapter.model.named_parameters() if p.requires_grad}
        assert set(released) == trained[spec]
    assert "bert.embeddings.word_embeddings.weight" in trained["none"]
    assert not any("embeddings" in name for name in trained["freeze-embeddings"])
    assert {"lora_A" in n or "lora_B" in n or ".modules_to_save." in n for n in trained["lora(rank=2)"]} == {True}
    assert any("layer.0" in n and "lora_A" in n for n in trained["lora(rank=2)"])
    assert not any("layer.1" in n and "lora_" in n for n in trained["lora(rank=2)"])


def test_every_setting_starts_from_the_same_model(texts):
    config = tiny(fresh=["block 1", "head"])
    adapters = [recipe.start(config, settings.Setting(s)) for s in ("none", "lora(rank=2)", "dropout(p=0.3)")]
    logits = [a.logits_from_ids(recipe.batch_of(config, a, texts[:3])) for a in adapters]
    assert torch.equal(logits[0], logits[2])  # dropout is off but for the gradient
    assert (logits[0] - logits[1]).abs().max() < 1e-5  # LoRA's B is zero
    pretrained = recipe.start(tiny(fresh=[]), settings.Setting("none"))
    assert (pretrained.logits_from_ids(recipe.batch_of(config, pretrained, texts[:3])) - logits[0]).abs().max() > 0.1


def test_splits_have_no_text_in_common():
    config = tiny(training_texts=60, validation_texts=20, test_texts=20)
    splits = recipe.load_splits(config, recipe.start(config, settings.Setting("none")))
    parts = [{text for text, _ in part} for part in vars(splits).values()]
    assert [len(part) for part in parts] == [60, 20, 20, 6]
    assert len(set.union(*parts)) == 106


# The report -------------------------------------------------------------------------------------------------


def entry(setting, lost, recall):
    return report.Entry(
        setting=setting, family=setting, trained=1, epsilon_run=None, epsilon_release=None, learning_rate=1.0,
        accuracy=1 - lost, accuracy_low=0.0, accuracy_high=1.0, lost=lost, lost_low=None, lost_high=None, attack="a",
        token_recall=recall, recall_low=None, recall_high=None, rouge1=0.0, exact_match=0.0, all_recalls="",
    )  # fmt: skip


def test_recall_at_equal_utility():
    none = entry("none", 0.0, 1.0)
    family = [entry("f", 0.02, 0.6), entry("f", 0.04, 0.8), entry("f", 0.06, 0.2)]
    at = lambda lost: report.at_equal_utility(family, none, lost)
    assert at(0.0) == (1.0, True)
    assert at(0.01) == (pytest.approx(0.8), True)
    assert at(0.03) == (pytest.approx(0.6), True)  # at 0.04 another strength leaks more: nobody would choose it
    assert at(0.05) == (pytest.approx(0.4), True)
    assert at(0.07) == (pytest.approx(0.2), False)
    free = [entry("f", -0.01, 0.7)]
    assert report.at_equal_utility(free, none, 0.0) == (pytest.approx(0.7), True)
    assert report.at_equal_utility(free, none, 0.01) == (pytest.approx(0.7), False)


def test_the_best_learning_rate_is_chosen_on_validation_texts():
    run = lambda rate, validation: {
        "kind": "utility", "setting": "s", "learning_rate": rate, "validation_accuracy": validation
    }  # fmt: skip
    rows = [run(0.1, 0.5), run(0.3, 0.9), run(0.2, 0.9)]
    assert report.best_run(rows, "s")["learning_rate"] == 0.2


def test_an_attack_that_is_refused_on_one_release_recovers_nothing_there():
    found = {"token_recall": 0.8, "rouge1": 0.6, "exact_match": 1.0}
    config = tiny(attacks=["span", "gs"])
    run = {"kind": "utility", "setting": "none", "learning_rate": 0.1, "validation_accuracy": 1.0, "trained": 5,
           "test_scores": [1.0, 0.0]}  # fmt: skip
    leaks = [{"kind": "leakage", "setting": "none", "attacks": {"span": first, "gs": {"refused": "no"}}}
             for first in (found, {"refused": "noisy"})]  # fmt: skip
    (only,) = report.comparison([run, *leaks], config)
    assert (only.attack, only.token_recall, only.rouge1, only.exact_match) == ("span", 0.4, 0.3, 0.5)
    assert only.all_recalls == "span 0.40; gs refused"
    assert (only.accuracy, only.lost) == (0.5, 0.0)
    safe = [leak | {"attacks": {name: {"refused": "no"} for name in config.attacks}} for leak in leaks]
    (only,) = report.comparison([run, *safe], config)
    assert (only.attack, only.token_recall) == ("", None)


# The recipe -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    pytest.importorskip("opacus")
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("one") / "out"
    assert recipe.main([*TINY, "--output", str(folder)]) == 0
    return folder


def rows_of(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_writes_rows_table_and_figure(one_process, capsys):
    rows = rows_of(one_process)
    assert [r["key"] for r in rows] == [
        "none|utility|0.001", "none|leakage|0", f"{PRIVATE}|utility|0.001", f"{PRIVATE}|leakage|0"
    ]  # fmt: skip
    assert rows[3]["defenses"] == ["clip-examples(max_norm=1.0)", "gaussian(std=0.5, unit=absolute)"]
    assert "refused" in rows[3]["attacks"]["bag(lengths=given)"]
    table = list(csv.DictReader((one_process / "defense_comparison.csv").open()))
    assert [line["setting"] for line in table] == ["none", PRIVATE]
    assert table[0]["epsilon_run"] == ""
    assert float(table[1]["epsilon_release"]) > 1
    assert float(table[0]["token_recall"]) > 0.5  # the rows of the word table
    assert int(table[1]["trained"]) < int(table[0]["trained"])
    assert (one_process / "defense_comparison.png").stat().st_size > 10_000
    assert recipe.main([*TINY, "--output", str(one_process)]) == 0  # finished: reads, and says it again
    assert "at equal utility" in capsys.readouterr().out
    assert rows_of(one_process) == rows


def test_the_same_again(one_process, tmp_path):
    assert recipe.main([*TINY, "--output", str(tmp_path / "again")]) == 0
    again, rows = rows_of(tmp_path / "again"), rows_of(one_process)
    assert_same(again, rows)
    assert [r.get("test_scores") for r in again] == [r.get("test_scores") for r in rows]


@pytest.mark.multiprocess
def test_two_processes_give_the_same_rows(one_process, tmp_path):
    fork(recipe.main, [*TINY, "--output", str(tmp_path / "two")])
    assert len(list((tmp_path / "two" / "shards").glob("rank-*.jsonl"))) == 2
    assert_same(rows_of(tmp_path / "two"), rows_of(one_process))


def test_a_language_model_is_judged_by_its_next_tokens():
    config = tiny(model="reference-gpt2", fresh=["block 1", "head"], validation_texts=4, test_texts=4)
    splits = recipe.load_splits(config, recipe.start(config, settings.Setting("none")))
    (row,) = recipe.utility_rows(config, splits, "none", 1e-3)
    assert len(row["test_scores"]) == 4
    assert 0 <= min(row["test_scores"]) <= max(row["test_scores"]) < 1
    pretrained = recipe.start(tiny(model="reference-gpt2", fresh=[]), settings.Setting("none"))
    known, loss = recipe.scores(config, pretrained, splits.test)
    assert sum(known) > sum(row["test_scores"])
    assert loss < row["test_loss"]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs" / "defense_comparison").glob("*.yaml")), ids=lambda p: p.stem
)  # fmt: skip
def test_every_config_parses(path):
    config = parse_config(recipe.ComparisonConfig, ["--config", str(path)])
    assert config.output.startswith("runs/")
