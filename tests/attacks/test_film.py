"""FILM: a bag from the gradient, an order from a language model, corrections from the gradient."""

import json
from dataclasses import replace
from importlib.resources import files

import pytest
import torch
import transformers as tf

import lmleak
from lmleak.attacks import make_attack
from lmleak.attacks.film_beam import BagBeams, edits, exchanges
from lmleak.errors import ConfigError, UnsupportedCombinationError
from tests.families import make


def generator():
    return torch.Generator().manual_seed(0)


# Beam search --------------------------------------------------------------------------------------------------


def test_a_wide_beam_finds_the_best_sequence():
    """Against every sequence of three bag tokens without a repeated pair."""
    adapter, _ = make("gpt2")
    bag = torch.tensor([7, 12, 33, 41])
    search = BagBeams(adapter, bag, beams=64, repetition=0.5, start=9)
    found, scores = search.search(3, torch.zeros(4, dtype=torch.long))

    def score(places):
        ids = torch.tensor([[9, *bag[list(places)].tolist()]])
        logits = adapter.logits(adapter.embed(ids), {"attention_mask": torch.ones_like(ids)})
        nats = logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None]).sum().item()
        return nats - 0.5 * sum(places[:t].count(places[t]) for t in range(3))

    places = [(i, j, k) for i in range(4) for j in range(4) for k in range(4) if not i == j == k]
    best = max(places, key=score)
    assert found[0].tolist() == bag[list(best)].tolist()
    assert scores[0].item() == pytest.approx(score(best))
    assert len(found) == len(places) == 60
    assert len({tuple(row) for row in found.tolist()}) == 60


def test_tokens_used_before_are_avoided():
    adapter, _ = make("gpt2")
    bag = torch.tensor([7, 12, 33, 41])
    search = BagBeams(adapter, bag, beams=8, repetition=50.0, start=None)
    found, _ = search.search(2, torch.tensor([1, 1, 0, 0]))
    assert set(found[0].tolist()) == {33, 41}


def test_edits_change_one_token_within_the_bag():
    text, bag = (7, 12, 33), [7, 12, 33, 41]
    changed = edits(text, bag, 40, range(2, 5), generator())
    assert changed == edits(text, bag, 40, range(2, 5), generator())
    assert text not in changed
    assert {len(other) for other in changed} == {2, 3, 4}
    assert {len(other) for other in edits(text, bag, 40, range(3, 4), generator())} == {3}
    for other in changed:
        assert set(other) <= set(bag)
        if len(other) == 3:
            assert sum(a != b for a, b in zip(text, other, strict=True)) == 1


def test_exchanges_keep_the_tokens():
    first, second = (1, 2, 3, 4), (5, 6, 7)
    pairs = exchanges(first, second, 40, range(2, 6), generator())
    assert pairs
    for mine, theirs in pairs:
        assert sorted(mine + theirs) == sorted(first + second)
        assert len(mine) in range(2, 6)
        assert len(theirs) in range(2, 6)


# The attack ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", ["no-word-embeddings", "all"])
@pytest.mark.parametrize("name", ["gpt2", "gpt2-untied", "llama"])
def test_recovers_a_text_exactly(name, shared):
    adapter, batch = make(name, size=1, dtype=torch.float32)
    recovered = make_attack("film").run(adapter, lmleak.capture_gradient(adapter, batch, shared=shared))
    assert recovered.token_ids == batch.token_ids
    assert recovered.stopped == "the texts explain the gradient"
    assert recovered.objective < 1e-6
    assert recovered.cost.gradient_evaluations > recovered.cost.iterations > 0
    assert recovered.confidence[0][0] > 0.999


def test_recovers_most_of_two_texts():
    """Exact where the search finds the way out of local minima, which it does not promise."""
    adapter, batch = make("gpt2-untied", size=2, dtype=torch.float32)
    recovered = make_attack("film").run(adapter, lmleak.capture_gradient(adapter, batch))
    assert len(recovered.token_ids) == 2
    assert lmleak.score_text(recovered, batch).token_recall > 0.7


def test_the_bag_alone_needs_no_more_than_the_embedding_layer():
    """Then only the position table is compared."""
    adapter, batch = make("gpt2-untied", size=1, dtype=torch.float32)
    shared = lmleak.capture_gradient(adapter, batch, shared="embeddings")
    recovered = make_attack("film", iterations=5).run(adapter, shared)
    assert set(recovered.token_ids[0]) <= set(batch.token_ids[0])
    assert any("not exactly zero" in note for note in recovered.notes)


def test_refuses_gradients_that_tell_no_bag():
    adapter, batch = make("gpt2", size=1, dtype=torch.float32)
    shared = lmleak.capture_gradient(adapter, batch, shared="block:1")
    with pytest.raises(UnsupportedCombinationError, match="none of them is released"):
        make_attack("film").run(adapter, shared)


@pytest.mark.parametrize(("option", "value"), [("beams", 0), ("candidates", 1), ("prior_weight", -1.0)])
def test_refuses_impossible_options(option, value):
    with pytest.raises(ConfigError, match=option):
        make_attack("film", **{option: value})


def test_a_prior_must_number_tokens_alike(tmp_path):
    adapter = lmleak.load_adapter("reference-gpt2")
    shared = lmleak.capture_gradient(adapter, adapter.batch(["my test came back positive"]), shared="all")
    small = tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=2000, n_embd=16, n_layer=1, n_head=2, n_positions=32))
    small.save_pretrained(tmp_path / "same")
    adapter.tokenizer.save_pretrained(tmp_path / "same")
    quick = make_attack("film", iterations=1, candidates=2, beams=2, prior=str(tmp_path / "same"))
    assert quick.run(adapter, shared).token_ids
    small.save_pretrained(tmp_path / "other")
    lmleak.load_adapter("reference-bert").tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(UnsupportedCombinationError, match="same tokenizer"):
        replace(quick, prior=str(tmp_path / "other")).run(adapter, shared)


def test_orders_a_message_of_the_reference_model():
    """Phase 2 writes with the right words; phase 3 puts most of them in their places."""
    adapter = lmleak.load_adapter("reference-gpt2")
    lines = files("lmleak.data.embedded").joinpath("samples.jsonl").read_text(encoding="utf-8").splitlines()
    batch = adapter.batch([json.loads(lines[0])["text"]])
    shared = lmleak.capture_gradient(adapter, batch, shared="all")
    written = lmleak.score_text(make_attack("film", iterations=0).run(adapter, shared), batch)
    assert written.token_recall > 0.8
    improved = lmleak.score_text(make_attack("film", iterations=8).run(adapter, shared), batch)
    assert improved.rouge2 > written.rouge2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_a_gradient_of_another_precision_is_compared_in_the_models(dtype):
    adapter = lmleak.load_adapter("reference-gpt2")
    shared = lmleak.capture_gradient(adapter, adapter.batch(["my scan came back"]), shared="all")
    other = replace(shared, gradient={name: tensor.to(dtype) for name, tensor in shared.gradient.items()})
    assert len(lmleak.run_attack("film", adapter, other).texts) == 1
