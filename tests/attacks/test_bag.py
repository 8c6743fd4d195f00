"""The bag of tokens as an attack: what it gives, under noise and for several texts too, and what it says about it."""

import pytest
import torch

import lmleak
from lmleak.attacks import parse_attack
from lmleak.attacks.bag import Bag
from lmleak.defenses import parse_defense
from lmleak.errors import ConfigError, UnsupportedCombinationError
from lmleak.gradients.capture import capture_gradient
from lmleak.types import Aggregation
from tests.families import MASK_TOKEN, SEQUENCES, make

TEXT = "my blood test came back positive and the rent is due"


def capture(adapter, batch, **options):
    return capture_gradient(adapter, batch, shared="all", reveal_lengths=False, reveal_labels=False, **options)


@pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2-classifier", "gpt2-untied", "llama"])
def test_every_text_is_given_the_whole_bag(name):
    adapter, batch = make(name)
    found = Bag().run(adapter, capture(adapter, batch))
    seen = [ids[:-1] if adapter.task == "causal-lm" else ids for ids in batch.token_ids]  # the last predicts nothing
    assert len(set(found.token_ids)) == 1
    assert len(found.token_ids) == batch.size
    assert sorted(found.token_ids[0]) == sorted({t for ids in seen for t in ids})
    assert set(found.confidence[0]) == {1.0}
    assert any("which token is of which text is not told" in note for note in found.notes)
    score = lmleak.score_text(found, batch)
    assert score.token_recall == pytest.approx(sum(len(s) / len(t) for s, t in zip(seen, batch.token_ids, strict=True))
                                               / 3)  # fmt: skip
    assert score.token_precision < 0.5


def test_one_text_of_a_tied_table_and_repeated_words():
    adapter, _ = make("gpt2")
    batch = adapter.batch([[7, 12, 7, 33, 9]])
    found = Bag().run(adapter, capture(adapter, batch))
    assert sorted(found.token_ids[0]) == [7, 12, 33]
    assert not any("which text" in note for note in found.notes)
    score = lmleak.score_text(found, batch)
    assert score.token_precision == 1
    assert score.token_recall == pytest.approx(3 / 5)


@pytest.mark.parametrize(("name", "rate"), [("bert", 1e-3), ("gpt2-untied", 1e-3), ("gpt2", 0.1)])
def test_local_steps_do_not_hide_it(name, rate):
    adapter, _ = make(name)
    batch = adapter.batch([SEQUENCES[1]], [2] if name == "bert" else None)
    found = Bag().run(adapter, capture(adapter, batch, aggregation=Aggregation(1, 4, 1, rate)))
    seen = SEQUENCES[1] if name == "bert" else SEQUENCES[1][:-1]
    assert sorted(found.token_ids[0]) == sorted(seen)


def test_local_steps_that_fill_the_space_of_a_tied_table_tell_nothing():
    adapter, _ = make("gpt2")
    steps = Aggregation(clients=1, epochs=2, steps_per_epoch=1, learning_rate=1e-3)
    found = Bag().run(adapter, capture(adapter, adapter.batch([SEQUENCES[1]]), aggregation=steps))
    assert found.token_ids == ()
    assert any("seems to fill the space" in note for note in found.notes)


def test_a_masked_word_was_no_input():
    adapter, batch = make("bert-mlm", size=1)
    masked = {t for t, m in zip(batch.token_ids[0], batch.inputs["input_ids"][0].tolist(), strict=True)
              if m == MASK_TOKEN}  # fmt: skip
    assert masked
    found = Bag().run(adapter, capture(adapter, batch))
    assert set(found.token_ids[0]) == set(batch.token_ids[0]) - masked | {MASK_TOKEN}


@pytest.fixture(scope="module")
def trained():
    adapter = lmleak.load_adapter("reference-bert")
    return adapter, adapter.batch([TEXT], [1])


def test_real_words_come_back_without_their_order(trained):
    adapter, batch = trained
    found = Bag().run(adapter, capture(adapter, batch))
    score = lmleak.score_text(found, batch)
    assert sorted(found.token_ids[0]) == sorted(batch.token_ids[0])
    assert found.token_ids[0] != batch.token_ids[0]
    assert score.token_precision == score.token_recall == 1
    assert score.rouge1 > 0.7
    assert score.rouge2 < 0.5


def test_under_noise_given_lengths_add_guesses_and_say_so(trained):
    adapter, batch = trained
    defense = parse_defense("gaussian(std=3, unit=rms)", 0)
    noisy = defense(capture_gradient(adapter, batch, shared="all"))
    sure = Bag().run(adapter, noisy)
    filled = Bag(lengths="given").run(adapter, noisy)
    truth = set(batch.token_ids[0])
    assert set(sure.token_ids[0]) < truth
    assert set(sure.token_ids[0]) < set(filled.token_ids[0])
    guesses = [t for t, c in zip(filled.token_ids[0], filled.confidence[0], strict=True) if c == 0]
    assert 0 < len(set(guesses) & truth) < len(guesses)
    assert len(filled.token_ids[0]) <= int(batch.layout["attention_mask"].sum())
    assert any("tokens are guesses: the longest rows" in note for note in filled.notes)
    # Together they are the longest rows, as many as there are tokens.
    norms = noisy.gradient[adapter.lookup_table()].norm(dim=1)
    longest = norms.topk(int(batch.layout["attention_mask"].sum())).indices.tolist()
    assert set(filled.token_ids[0]) == set(longest) - adapter.special_ids()


def test_where_nothing_stands_out_nothing_is_claimed(trained):
    adapter, batch = trained
    noisy = parse_defense("gaussian(std=1000, unit=rms)", 0)(capture(adapter, batch))
    found = Bag().run(adapter, noisy)
    assert found.token_ids == ()
    assert found.stopped == "no row stands out"
    assert lmleak.score_text(found, batch).token_recall == 0


def test_given_lengths_cut_a_bag_that_holds_more_than_inputs():
    """Of a tied table under noise, targets and probable tokens stand out too."""
    adapter = lmleak.load_adapter("reference-gpt2")
    batch = adapter.batch([TEXT])
    noisy = parse_defense("gaussian(std=1, unit=rms)", 0)(capture_gradient(adapter, batch, shared="all"))
    whole, cut = Bag().run(adapter, noisy), Bag(lengths="given").run(adapter, noisy)
    count = int(batch.layout["attention_mask"].sum())
    assert len(whole.token_ids[0]) > count >= len(cut.token_ids[0])
    assert cut.token_ids[0] == whole.token_ids[0][: len(cut.token_ids[0])]
    assert any("stand out besides inputs" in note for note in whole.notes)


def test_what_it_is_told_follows_its_option():
    assert not Bag.assumes.lengths
    assert parse_attack("bag(lengths=given)").assumes.lengths
    adapter, batch = make("bert")
    with pytest.raises(UnsupportedCombinationError, match="lengths are known"):
        Bag(lengths="given").run(adapter, capture(adapter, batch))
    with pytest.raises(ConfigError, match="Did you mean 'given'"):
        Bag(lengths="give")


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_gradient_without_the_rows_looked_up_is_refused(name):
    adapter, batch = make(name)
    with pytest.raises(UnsupportedCombinationError, match=r"looked-up rows .*shared='all' or 'embeddings'"):
        Bag().run(adapter, capture_gradient(adapter, batch))
    assert Bag().run(adapter, capture_gradient(adapter, batch, shared="embeddings")).token_ids


def test_frozen_embeddings_are_refused():
    adapter, _ = make("bert")
    adapter.model.get_parameter(adapter.lookup_table()).requires_grad_(False)
    batch = adapter.batch(SEQUENCES[:1], [0])
    with pytest.raises(UnsupportedCombinationError, match="not released"):
        Bag().run(adapter, capture(adapter, batch))
    assert torch.is_grad_enabled()
