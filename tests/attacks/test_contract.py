"""What every registered attack promises; an attack joins the suite by being registered."""

import random
from dataclasses import fields, replace

import pytest
import torch

import lmleak
from lmleak.attacks import ATTACKS, make_attack, parse_attack
from lmleak.errors import ConfigError, DataError, UnsupportedCombinationError
from lmleak.types import AttackCost, Batch, Observation, Reconstruction, TextBatch
from tests.families import FAMILIES, make
from tests.gradients.test_readout_lora import lora_case

QUICK = {"iterations": 6, "candidates": 2}  # where an attack has such options: the promises hold at any effort


def quick(name: str):
    valid = {f.name for f in fields(ATTACKS[name])}
    return make_attack(name, **{k: v for k, v in QUICK.items() if k in valid})


@pytest.fixture(params=sorted(ATTACKS))
def name(request):
    return request.param


def case_for(name: str, size: int):
    """A tiny model on which the attack can run, a batch, and its gradient."""
    if name == "lora-span":
        pytest.importorskip("peft")
        return lora_case("gpt2", rank=14, size=size, steps=0, dtype=torch.float32)
    adapter, batch = make(
        "gpt2" if "causal-lm" in ATTACKS[name].assumes.tasks else "bert", size=size, dtype=torch.float32
    )
    shared = "all" if name == "bag" else "no-word-embeddings"  # the bag is read off the rows looked up
    return adapter, batch, lmleak.capture_gradient(adapter, batch, shared=shared)


@pytest.fixture
def case(name):
    return case_for(name, size=2)


def test_names_agree_and_a_paper_is_cited(name):
    attack = ATTACKS[name]
    assert attack.name == name
    assert "arXiv" in attack.paper
    assert set(attack.assumes.tasks) <= {"sequence-classification", "causal-lm", "masked-lm", "image-classification"}


def test_returns_a_well_formed_reconstruction(name, case):
    adapter, batch, shared = case
    recovered = quick(name).run(adapter, shared)
    assert isinstance(recovered, Reconstruction)
    assert recovered.attack == name
    assert 0 < len(recovered.token_ids) <= batch.size
    assert len(recovered.texts) == len(recovered.confidence) == len(recovered.token_ids)
    for ids, confidence in zip(recovered.token_ids, recovered.confidence, strict=True):
        assert len(ids) == len(confidence)
        assert all(0 <= t < 60 for t in ids)
        assert all(0 <= c <= 1 for c in confidence)
    assert recovered.cost.seconds > 0
    assert recovered.stopped


def test_same_seed_same_answer_and_global_randomness_untouched(name, case):
    adapter, _, shared = case
    before = torch.get_rng_state(), random.getstate()
    first, second = (quick(name).run(adapter, shared, seed=3) for _ in range(2))
    assert first.token_ids == second.token_ids
    assert first.confidence == second.confidence
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()


def test_model_and_gradient_are_left_alone(name, case):
    adapter, _, shared = case
    weights = {k: p.detach().clone() for k, p in adapter.model.named_parameters()}
    trained = {k for k, p in adapter.model.named_parameters() if p.requires_grad}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in adapter.model.modules())
    gradient = {k: g.clone() for k, g in shared.gradient.items()}
    quick(name).run(adapter, shared)
    for k, p in adapter.model.named_parameters():
        assert torch.equal(p, weights[k])
        assert p.grad is None
        assert p.requires_grad == (k in trained)
    assert not adapter.model.training
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in adapter.model.modules())
    assert all(torch.equal(shared.gradient[k], g) for k, g in gradient.items())


def test_only_what_is_assumed_is_handed_over(name, case, monkeypatch):
    adapter, _, shared = case
    seen = []

    def spy(self, adapter, observation, *, seed):
        seen.append(observation)
        return Reconstruction(name, (), (), (), AttackCost(0.0), stopped="spied")

    monkeypatch.setattr(ATTACKS[name], "recover", spy)
    quick(name).run(adapter, shared)
    (observation,) = seen
    assert type(observation) is Observation
    assert (observation.layout is not None) == ATTACKS[name].assumes.lengths
    assert observation.labels is None or ATTACKS[name].assumes.labels


def test_poisoned_truth_changes_nothing(name, case):
    adapter, batch, shared = case
    honest = quick(name).run(adapter, shared, seed=1)
    poison = [[9, 9, 9, 9], [8, 8]]
    fresh, _, _ = case_for(name, size=2)
    fresh.batch(poison, [0, 0] if fresh.task == "sequence-classification" else None)  # what it saw last is a lie
    assumes = ATTACKS[name].assumes
    told = replace(
        shared,
        layout=shared.layout if assumes.lengths else {"attention_mask": torch.ones(2, 3, dtype=torch.long)},
        labels=shared.labels if assumes.labels or shared.labels is None else torch.zeros_like(shared.labels),
    )
    poisoned = quick(name).run(fresh, told, seed=1)
    assert poisoned.token_ids == honest.token_ids
    assert poisoned.confidence == honest.confidence
    # The same answer is scored by the truth it is given: the scorer sees it, the attacker does not.
    lie = replace(batch, texts=("9", "9"), token_ids=((9,), (9,)))
    assert lmleak.score_text(poisoned, batch) == lmleak.score_text(honest, batch)
    assert lmleak.score_text(poisoned, lie) != lmleak.score_text(honest, batch)


def test_no_field_of_an_observation_holds_the_truth():
    assert not isinstance(Observation(gradient={}, task="causal-lm", batch_size=1), Batch | TextBatch)
    assert {f.name for f in fields(Observation)} == {
        "gradient", "task", "batch_size", "shared", "aggregation", "defenses", "layout", "labels",
    }  # fmt: skip


def test_refuses_what_it_assumes_and_is_not_told(name, case):
    adapter, batch, shared = case
    silent = lmleak.capture_gradient(adapter, batch, shared=shared.shared, reveal_lengths=False, reveal_labels=False)
    if ATTACKS[name].assumes.lengths:
        with pytest.raises(UnsupportedCombinationError, match="lengths are known"):
            quick(name).run(adapter, silent)
    else:
        assert quick(name).run(adapter, silent).token_ids


def test_refuses_a_task_it_does_not_work_on(name, case):
    adapter, _, shared = case
    adapter.task = "image-classification"
    with pytest.raises(UnsupportedCombinationError, match="works on"):
        quick(name).run(adapter, replace(shared, task="image-classification"))


def test_refuses_the_gradient_of_another_model(name, case):
    _, _, shared = case
    other, _ = make("llama", size=1, dtype=torch.float32)
    with pytest.raises(DataError, match="another model"):
        quick(name).run(other, shared)
    with pytest.raises(DataError, match="SharedGradient"):
        quick(name).run(other, shared.gradient)


def test_refuses_a_seed_that_is_none(name, case):
    adapter, _, shared = case
    for seed in (10**23, -1, 1.5):
        with pytest.raises(ConfigError, match="seed must be"):
            quick(name).run(adapter, shared, seed=seed)


def test_unknown_option_and_name_are_refused_with_a_suggestion(name):
    option = next((f.name for f in fields(ATTACKS[name])), "beam")
    with pytest.raises(ConfigError, match=rf"Did you mean '{option}'"):
        make_attack(name, **{option[:-1] + "_": 1})
    with pytest.raises(ConfigError, match="Did you mean"):
        make_attack(name + "x")
    assert parse_attack(name) == ATTACKS[name]()


def test_beats_guessing_on_an_easy_case(name):
    adapter, batch, shared = case_for(name, size=1)
    recovered = make_attack(name).run(adapter, shared)
    score = lmleak.score_text(recovered, batch)
    assert score.token_recall >= 0.6  # chance is 6 of 60 tokens


def test_audited_attack_cannot_compute_the_noise_it_is_up_against(monkeypatch):
    from lmleak.defenses import unit_noise
    from lmleak.evaluation import AuditConfig
    from lmleak.evaluation.audit import example_settings
    from lmleak.evaluation.example import ExampleEvaluator

    adapter = lmleak.load_adapter("reference-gpt2")
    seen = []

    def spy(self, adapter, observation, *, seed):
        seen.append((observation, seed))
        return make_attack("dlg", **QUICK).recover(adapter, observation, seed=seed)

    monkeypatch.setattr(ATTACKS["tag"], "recover", spy)
    config = AuditConfig(attacks=["tag"], noise_levels=[1.0], defenses=["laplace(std=1, unit=rms)"], probes=0)
    settings = replace(example_settings(config), max_products=5)
    texts = ["my blood test came back positive"]
    (laplace, gaussian) = ExampleEvaluator(adapter, settings).rows(0, texts, None)
    clean = lmleak.capture_gradient(adapter, adapter.batch(texts)).gradient
    name = "transformer.h.0.mlp.c_fc.weight"
    for row, distribution, (observation, seed) in zip((laplace, gaussian), ("laplace", "gaussian"), seen, strict=True):
        noise = (observation.gradient[name] - clean[name]) / row["perturbation_rms"]
        guess = unit_noise(name, noise.shape, noise.dtype, seed, distribution)
        assert noise.std() == pytest.approx(1, rel=0.05)
        assert abs((guess * noise).mean()) < 0.05  # the seed it was given makes other noise


def test_every_listed_family_has_a_tiny_model():
    from lmleak.adapters.families import FAMILIES as LISTED

    tiny = {config().model_type for _, _, config in FAMILIES.values()}
    assert set(LISTED) <= tiny
