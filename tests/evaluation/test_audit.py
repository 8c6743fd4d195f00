"""The audit from configuration to rows, and what it refuses."""

import json
import math
from dataclasses import replace

import pytest
import torch

import lmleak
from lmleak.config import parse_config
from lmleak.errors import ConfigError, DataError, UnsupportedModelError
from lmleak.evaluation import AuditConfig, run_audit
from lmleak.influence import InfluenceSolver
from lmleak.influence.factors import LinearFactor

SMALL = {
    "samples": 1, "noise_levels": [0.1, 10.0], "attacks": ["span"], "probes": 2, "probe_steps": 10,
    "max_products": 60, "texts": ["my blood test came back positive"],
}  # fmt: skip


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audit") / "out"
    config = AuditConfig(**SMALL, defenses=["none", "prune(ratio=0.5)"], output=str(folder), device="cpu")
    return config, run_audit(config)


def test_one_row_per_example_and_release(audited):
    _, result = audited
    assert [row["defense"] for row in result.rows] == [
        "none", "prune(ratio=0.5)", "gaussian(std=0.1, unit=rms)", "gaussian(std=10, unit=rms)",
    ]  # fmt: skip
    assert [row["sweep"] for row in result.rows] == [False, False, True, True]
    assert result.worst_recall == max(
        row["attacks"]["span"].get("token_recall", 0) for row in result.rows if not row["sweep"]
    )
    on_disk = [json.loads(line) for line in (result.folder / "results.jsonl").read_text().splitlines()]
    assert on_disk == result.rows


def test_numbers_equal_the_library_called_by_hand(audited):
    _, result = audited
    adapter = lmleak.load_adapter("reference-gpt2")
    batch = adapter.batch(SMALL["texts"])
    shared = lmleak.capture_gradient(adapter, batch)
    from lmleak.defenses import derived_seed

    solver = InfluenceSolver(
        lmleak.GradientJacobian(adapter, batch), adapter.prior(), max_products=60, seed=derived_seed(0, 0)
    )
    for row in result.rows[2:]:
        by_hand = solver.sweep([row["noise_rms"] * shared.rms])[0][0]
        assert row["influence_l2"] == pytest.approx(by_hand.influence.l2, rel=1e-5)
        assert row["lower_bound_rms"] == pytest.approx(by_hand.lower_bound.rms, rel=1e-5)
        assert row["perturbation_rms"] == pytest.approx(row["noise_std"], rel=0.02)
    pruned = lmleak.parse_defense("prune(ratio=0.5)").release(shared)
    by_hand = solver.solve(pruned.perturbation)
    assert result.rows[1]["influence_l2"] == pytest.approx(by_hand.influence.l2, rel=1e-5)


def test_units_and_bounds_hold_in_every_row(audited):
    _, result = audited
    for row in result.rows:
        assert row["influence_rms"] == pytest.approx(row["influence_l2"] / math.sqrt(row["dx"]))
        assert row["lower_bound_l2"] <= row["cg_bound_l2"] * (1 + 1e-6)
        assert 0 <= row["null_share"] <= 1
        assert sum(row["layer_share"].values()) == pytest.approx(1)
        token_squares = [t**2 for t in row["token_influence"][0]]
        assert math.sqrt(sum(token_squares) / len(token_squares)) == pytest.approx(row["influence_rms"], rel=1e-6)
    assert result.rows[0]["influence_l2"] == 0  # nothing was perturbed
    assert result.rows[3]["influence_l2"] == pytest.approx(100 * result.rows[2]["influence_l2"], rel=1e-5)


def test_finished_run_is_not_repeated(audited, monkeypatch):
    config, result = audited
    monkeypatch.setattr("lmleak.evaluation.audit.ExampleEvaluator.rows", lambda *_: pytest.fail("was computed again"))
    assert run_audit(config).rows == result.rows


def without_timing(value):
    """Drop the costs, which differ between two runs of the same thing."""
    if isinstance(value, dict):
        return {k: without_timing(v) for k, v in value.items() if not k.endswith(("seconds", "peak_bytes"))}
    return [without_timing(v) for v in value] if isinstance(value, list) else value


def test_written_configuration_replays_to_equal_rows(audited, tmp_path):
    _, result = audited
    arguments = ["--config", str(result.folder / "config.yaml"), "--output", str(tmp_path / "again")]
    again = run_audit(parse_config(AuditConfig, arguments))
    assert without_timing(again.rows) == without_timing(result.rows)


def test_wrong_products_end_an_audit_before_it_begins_and_double_backward_serves(audited, tmp_path, monkeypatch):
    config, result = audited
    assert 0 < result.meta["product_difference"] < 1e-4
    gram = LinearFactor.gram
    monkeypatch.setattr(LinearFactor, "gram", lambda *arguments: tuple(1.01 * part for part in gram(*arguments)))
    folder = tmp_path / "out"
    with pytest.raises(UnsupportedModelError, match=r"A v differs from double backward by 0\.0.*'autodiff'"):
        run_audit(replace(config, output=str(folder)))
    assert not folder.exists()
    slow = run_audit(replace(config, output=str(folder), implementation="autodiff"))
    assert slow.meta["product_difference"] is None
    for row, fast in zip(slow.rows, result.rows, strict=True):
        assert row["influence_l2"] == pytest.approx(fast["influence_l2"], rel=1e-2)
        assert row["lambda_max"] == pytest.approx(fast["lambda_max"], rel=1e-4)


def test_withheld_layers_restrict_the_operator(tmp_path):
    config = AuditConfig(
        **SMALL | {"noise_levels": [], "attacks": []}, defenses=["none", "hide-layers(names='transformer.h.0')"],
        output=str(tmp_path / "out"),
    )  # fmt: skip
    clean, hidden = run_audit(config).rows
    assert hidden["influence_l2"] == 0
    assert hidden["lambda_max"] < clean["lambda_max"]
    assert hidden["null_share"] > clean["null_share"]


def test_example_does_not_depend_on_its_neighbours(tmp_path):
    texts = ["my blood test came back positive", "please wire the deposit before friday"]
    both = AuditConfig(**SMALL | {"texts": texts, "samples": 2}, output=str(tmp_path / "both"))
    rows = run_audit(both).rows
    one = run_audit(AuditConfig(**SMALL, output=str(tmp_path / "one"))).rows
    for first, alone in zip(rows, one, strict=False):
        assert first["influence_l2"] == alone["influence_l2"]


def test_classifier_labels_by_number_and_by_name(tmp_path):
    config = AuditConfig(
        **SMALL | {"noise_levels": [], "attacks": [], "texts": []},
        model="reference-bert",
        output=str(tmp_path / "out"),
    )
    assert run_audit(config).rows[0]["labels"][0] in range(4)
    adapter = lmleak.load_adapter("reference-bert")
    name = next(iter(adapter.config.label2id))
    data = tmp_path / "named.csv"
    data.write_text(f"text,label\nthe rent is due,{name}\n")
    named = AuditConfig(**SMALL | {"noise_levels": [], "attacks": [], "texts": []}, model="reference-bert",
                        data=str(data), output=str(tmp_path / "named"))  # fmt: skip
    assert run_audit(named).rows[0]["labels"] == [adapter.config.label2id[name]]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"samples": 0}, ConfigError, "samples must be at least 1"),
        ({"probes": 1}, ConfigError, "at least 2"),
        ({"tolerance": 2.0}, ConfigError, "tolerance must lie"),
        ({"noise_levels": [0.0]}, ConfigError, "must be positive"),
        ({"noise_levels": [float("nan")]}, ConfigError, "must be positive"),
        ({"damping": -1.0}, ConfigError, "damping must be at least 0"),
        ({"defenses": ["gausian(std=1)"]}, ConfigError, "Did you mean 'gaussian'"),
        ({"attacks": ["spam"]}, ConfigError, "Did you mean 'span'"),
        ({"fail_above": 1.5}, ConfigError, r"in \[0, 1\]"),
        ({"fail_above": 0.5, "attacks": []}, ConfigError, "give attacks="),
        ({"data": "x.csv"}, ConfigError, "not both"),
        ({"labels": [1, 2]}, ConfigError, "2 labels for 1 texts"),
        ({"model": "reference-bart"}, ConfigError, "Did you mean 'reference-bert'"),
        ({"model": "reference-bert"}, DataError, "has no labels"),
        ({"model": "reference-bert", "labels": [9]}, DataError, "label 9 is out of range"),
        ({"texts": ["  "]}, DataError, "text 0 is empty"),
        ({"texts": ["word " * 200]}, DataError, "the model has 64 positions"),
        ({"batch_size": 3}, DataError, "fewer than batch_size=3"),
        ({"device": "cuda"}, ConfigError, "no CUDA device"),
        ({"shared": "block:7"}, ConfigError, "no block 7"),
        ({"processes": 2}, ConfigError, "1 process"),
        ({"tokenizer": "nowhere"}, ConfigError, "tokenizer 'nowhere'"),
        ({"threads": -3}, ConfigError, "threads must be at least 1"),
        ({"shared": ""}, ConfigError, "shared must be all"),
    ],
)
def test_refused_before_anything_is_written(tmp_path, settings, error, message):
    if settings.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    folder = tmp_path / "out"
    with pytest.raises(error, match=message):
        run_audit(AuditConfig(**SMALL | {"output": str(folder)} | settings))
    assert not folder.exists() or not (folder / "results.jsonl").exists()
