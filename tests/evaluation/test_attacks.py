"""One attack on one shared gradient: what is shared, which seeds are used, what is scored and what is refused."""

from dataclasses import replace

import pytest
import torch

import lmleak
from lmleak.attacks import ATTACKS, make_attack, parse_attack
from lmleak.defenses import GaussianNoise, derived_seed, parse_defense, unit_noise
from lmleak.evaluation import AuditConfig, ExampleEvaluator
from lmleak.evaluation.attacks import Sharing, attack_result, gradient_seconds
from lmleak.evaluation.audit import example_settings
from lmleak.evaluation.scored import seeded_batch
from lmleak.metrics import lamp_scores
from lmleak.types import Aggregation

TEXT = "the rent is due on monday"
NAME = "transformer.h.0.mlp.c_fc.weight"


@pytest.fixture(scope="module")
def adapter():
    return lmleak.load_adapter("reference-gpt2")


@pytest.fixture(scope="module")
def batch(adapter):
    return seeded_batch(adapter, [TEXT], None, max_length=None, seed=5)


def test_sharing_is_capture_and_then_the_defense(adapter, batch):
    clean = lmleak.capture_gradient(adapter, batch)
    plain = Sharing("plain").release(adapter, batch, seed=5)
    assert plain.defenses == ()
    assert all(torch.equal(plain.gradient[k], g) for k, g in clean.gradient.items())
    noisy = Sharing("noisy", parse_defense("gaussian(std=1, unit=rms)")).release(adapter, batch, seed=5)
    expected = GaussianNoise(std=1, unit="rms", seed=5)(clean)
    assert noisy.defenses == expected.defenses
    assert all(torch.equal(noisy.gradient[k], g) for k, g in expected.gradient.items())


def test_every_option_reaches_the_capture(adapter, batch):
    local = Aggregation(1, 2, 1, 1e-3)
    shared = Sharing("x", shared="all", aggregation=local, reveal_lengths=False).release(adapter, batch, seed=5)
    assert (shared.shared, shared.aggregation, dict(shared.layout)) == ("all", local, {})
    first, again, other = (Sharing("x", dropout=True).release(adapter, batch, seed=s) for s in (5, 5, 6))
    assert first.defenses == ("dropout(on)",)
    assert torch.equal(first.gradient[NAME], again.gradient[NAME])
    assert not torch.equal(first.gradient[NAME], other.gradient[NAME])


def test_the_attack_gets_a_seed_that_gives_other_noise(adapter, batch, monkeypatch):
    seen = []
    recover = ATTACKS["span"].recover

    def spy(self, adapter, observation, *, seed):
        seen.append(seed)
        return recover(self, adapter, observation, seed=seed)

    monkeypatch.setattr(ATTACKS["span"], "recover", spy)
    attack_result(make_attack("span"), adapter, Sharing("plain").release(adapter, batch, seed=5), batch, seed=5)
    assert seen == [derived_seed(5, 1)]
    noise, guess = (unit_noise(NAME, (128, 64), torch.float64, seed) for seed in (5, seen[0]))
    assert abs((noise * guess).mean()) < 0.05


def test_scores_and_cost_of_an_exact_recovery(adapter, batch):
    shared = Sharing("plain").release(adapter, batch, seed=5)
    result = attack_result(make_attack("span"), adapter, shared, batch, seed=5)
    recovered = make_attack("span").run(adapter, shared, seed=derived_seed(5, 1))
    assert result["token_recall"] == result["rougeL"] == result["exact_match"] == 1
    assert result["recovered"] == list(batch.texts)
    assert result["lamp_rouge1"] == lamp_scores(recovered, batch, adapter).rouge1
    assert result["seconds"] > 0
    assert gradient_seconds(adapter, batch, "no-word-embeddings") > 0


def test_an_audit_scores_an_attack_the_same_way(adapter):
    config = AuditConfig(attacks=["subspace(iterations=20, restarts=2)", "bag"], noise_levels=[], probes=0)
    settings = replace(example_settings(config), max_products=5)
    (audited,) = ExampleEvaluator(adapter, settings).rows(3, [TEXT], None)
    seed = derived_seed(config.seed, 3)
    batch = seeded_batch(adapter, [TEXT], None, max_length=None, seed=seed)
    shared = Sharing("plain").release(adapter, batch, seed=seed)
    for spec, row in audited["attacks"].items():
        result = attack_result(parse_attack(spec), adapter, shared, batch, seed=seed)
        same = result.keys() & row.keys() - {"seconds", "peak_bytes", "mse"}
        assert {k: row[k] for k in same} == {k: result[k] for k in same}
        assert ("refused" in row) == ("refused" in result) == (spec == "bag")
        assert spec == "bag" or {"token_recall", "rouge1", "iterations", "stopped", "notes"} <= same


def test_an_impossible_combination_is_a_result_with_its_reason(adapter, batch):
    shared = Sharing("silent", reveal_lengths=False).release(adapter, batch, seed=5)
    result = attack_result(make_attack("tag"), adapter, shared, batch, seed=5)
    assert list(result) == ["refused"]
    assert "lengths are known" in result["refused"]
