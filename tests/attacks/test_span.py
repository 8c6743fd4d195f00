"""The span attack end to end: exact recovery where theory promises it, refusal with the reason where it does not."""

import json
from importlib import resources

import pytest
import torch
import transformers as tf

from lmleak.adapters import adapt, load_adapter
from lmleak.attacks.span import Span
from lmleak.errors import ConfigError, UnsupportedCombinationError
from lmleak.gradients.capture import capture_gradient
from lmleak.types import SINGLE_STEP, Aggregation
from tests.families import FAMILIES, GPT2, LLAMA, OPT, SEQUENCES, build, make

DECODERS = ("gpt2", "gpt2-untied", "gpt2-classifier", "opt", "gpt-neox", "llama", "llama-tied", "unlisted-gemma")
ENCODERS = ("bert", "distilbert", "roberta", "unlisted-electra")
WITHOUT_LAST = sorted(tuple(s[:-1]) for s in SEQUENCES)


def recover(adapter, batch, *, shared="no-word-embeddings", aggregation=SINGLE_STEP, **options):
    released = capture_gradient(
        adapter, batch, shared=shared, reveal_lengths=False, reveal_labels=False, aggregation=aggregation
    )
    return Span(**options).run(adapter, released)


def random_model(model_class, config, *, dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config).to(dtype).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.1)
    return model


def wide_gpt2(vocabulary=500, width=128, **config):
    config = {"vocab_size": vocabulary, "n_embd": width, "n_layer": 3, "n_head": 4, "n_positions": 32} | config
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # As initialised: the LayerNorms have no shift, so every first-layer input lies in one hyperplane.
        return adapt(tf.GPT2LMHeadModel(tf.GPT2Config(**config, bos_token_id=1, eos_token_id=1)).eval())


def random_ids(size, length, vocabulary=500, seed=0):
    return torch.randint(3, vocabulary, (size, length), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", DECODERS)
def test_every_decoder_gives_up_the_batch(name, dtype, padding_side):
    adapter, batch = make(name, dtype=dtype, padding_side=padding_side)
    found = recover(adapter, batch)
    assert sorted(found.token_ids) == sorted(batch.token_ids)  # the last tokens too, through the head
    assert min(min(c) for c in found.confidence) > 0.999
    assert found.objective < (1e-13 if dtype == torch.float64 else 1e-6)
    assert found.cost.gradient_evaluations == 0
    assert found.cost.iterations > 0


@pytest.mark.parametrize(("size", "length"), [(8, 12), (16, 7), (1, 20)])
def test_wide_model_in_float32(size, length):
    adapter = wide_gpt2()
    batch = adapter.batch(random_ids(size, length))
    assert sorted(recover(adapter, batch).token_ids) == sorted(batch.token_ids)


def test_nearly_full_rank():
    """Sixteen texts, 112 of 128 dimensions, without the head's help."""
    adapter = wide_gpt2()
    batch = adapter.batch(random_ids(16, 8))
    found = recover(adapter, batch, shared="block:0-1")
    assert sorted(found.token_ids) == sorted(tuple(t[:-1]) for t in batch.token_ids)


@pytest.mark.parametrize("size", [11, 16])  # 11 x 12 = 132 inputs; their span is the hyperplane of rank 127
def test_as_many_tokens_as_dimensions_are_refused(size):
    adapter = wide_gpt2()
    batch = adapter.batch(random_ids(size, 13))
    with pytest.raises(UnsupportedCombinationError, match=r"rank 127 at hidden size 128.*tokens >= hidden size"):
        recover(adapter, batch)


def test_full_rank_is_refused():
    adapter, _ = make("llama")
    batch = adapter.batch([[7, 12, 33, 41, 20, 9, 13, 14, 15], [50, 8, 17, 28, 31, 32, 34, 35], [30, 11, 44, 19, 25]])
    with pytest.raises(UnsupportedCombinationError, match="rank 16 at hidden size 16"):
        recover(adapter, batch)


def test_noise_is_refused_with_the_reason():
    adapter, batch = make("gpt2")
    released = capture_gradient(adapter, batch)
    generator = torch.Generator().manual_seed(0)
    noisy = {
        n: g + 1e-3 * torch.randn(g.shape, generator=generator, dtype=g.dtype) for n, g in released.gradient.items()
    }
    with pytest.raises(UnsupportedCombinationError, match="no noise"):
        Span().run(adapter, released.released(noisy, "noise"))


# Partial gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt-neox", "llama"])
@pytest.mark.parametrize(
    ("shared", "where"),
    [
        ("block:0-1", "attention input of block 1"),
        ("block:0", "in block 0"),
        (r"attn|attention", "attention input of block 1"),
    ],
)
def test_two_blocks_or_one_suffice(name, shared, where):
    adapter, batch = make(name)
    found = recover(adapter, batch, shared=shared)
    assert sorted(found.token_ids) == WITHOUT_LAST
    assert any(where in note for note in found.notes)
    assert any("last token" in note for note in found.notes)


def test_one_map_alone():
    """Values carry the whole row space. Keys do not: softmax ignores a shift of all, so their gradients sum to 0."""
    adapter, batch = make("opt")
    assert sorted(recover(adapter, batch, shared=r"v_proj").token_ids) == WITHOUT_LAST
    found = recover(adapter, batch, shared=r"k_proj")
    assert found.token_ids == ()
    assert found.stopped == "no candidate left at position 0"
    assert "no prefix was accepted" in found.notes[0]


@pytest.mark.parametrize("shared", ["block:1", "head", "embeddings"])
def test_withheld_first_block_is_refused(shared):
    adapter, batch = make("llama")
    with pytest.raises(UnsupportedCombinationError, match=r"q_proj.*attention input of block 0"):
        recover(adapter, batch, shared=shared)


def test_first_attention_alone_is_refused():
    adapter, batch = make("gpt2")
    with pytest.raises(UnsupportedCombinationError, match="sees whole prefixes"):
        recover(adapter, batch, shared=r"h\.0\.attn\.c_attn")


def test_tied_table_shared_whole():
    """Rows of looked-up tokens hide their part as targets; what they hide is told, and the rest is exact."""
    adapter, batch = make("gpt2")
    assert sorted(recover(adapter, batch, shared="all").token_ids) == sorted(batch.token_ids)
    batch = adapter.batch([[7, 12, 33, 12], [50, 8, 17, 28]])  # the first text ends with a token that it holds
    found = recover(adapter, batch, shared="all")
    assert sorted(found.token_ids) == [(7, 12, 33), (50, 8, 17, 28)]
    assert any("for 1 of 2 texts" in note for note in found.notes)


# Ambiguity ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_repeated_texts_and_beginnings(name):
    adapter, _ = make(name)
    batch = adapter.batch([[7, 12, 33], [7, 12, 33], [7, 12, 33, 41, 20], [7, 12, 9], [50, 8]])
    found = recover(adapter, batch)
    assert sorted(found.token_ids) == sorted(batch.token_ids)


def test_repeated_texts_of_a_classifier():
    adapter, _ = make("gpt2-classifier")
    batch = adapter.batch([[7, 12, 33], [7, 12, 33], [7, 12], [50, 8]], [0, 1, 2, 2])
    assert sorted(recover(adapter, batch).token_ids) == sorted(batch.token_ids)


def test_repetitions_are_not_invented():
    adapter, _ = make("gpt2")
    batch = adapter.batch([[7, 12, 33, 9], [7, 12, 33, 9], [50, 8, 9]])
    found = recover(adapter, batch, shared="block:0-1")
    assert sorted(found.token_ids) == [(7, 12, 33), (50, 8)]
    assert any("2 distinct texts for a batch of 3" in note for note in found.notes)


def test_text_that_starts_with_a_repetition_under_rotary_positions():
    """A repeated first token adds nothing to the first-layer attention; it is found by what follows it."""
    adapter, _ = make("llama")
    batch = adapter.batch([[7, 7, 7, 12, 33, 9], [50, 8, 17]])
    found = recover(adapter, batch, shared="block:0-1")
    assert sorted(found.token_ids) == [(7, 7, 7, 12, 33), (50, 8)]


# Structure ----------------------------------------------------------------------------------------------------


def test_classifier_whose_second_block_is_not_the_last():
    config = tf.GPT2Config(**GPT2 | {"n_layer": 3}, num_labels=3)
    adapter = adapt(random_model(tf.GPT2ForSequenceClassification, config))
    batch = adapter.batch(SEQUENCES, [0, 2, 1])
    found = recover(adapter, batch)
    assert sorted(found.token_ids) == sorted(batch.token_ids)
    assert any("attention input of block 1" in note for note in found.notes)


def test_post_norm_decoder_without_separable_form():
    config = tf.OPTConfig(**OPT | {"do_layer_norm_before": False})
    adapter = adapt(random_model(tf.OPTForCausalLM, config))
    batch = adapter.batch(SEQUENCES)
    assert sorted(recover(adapter, batch).token_ids) == sorted(batch.token_ids)


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_one_block(model_type):
    model = (
        random_model(tf.GPT2LMHeadModel, tf.GPT2Config(**GPT2 | {"n_layer": 1}))
        if model_type == "gpt2"
        else random_model(tf.LlamaForCausalLM, tf.LlamaConfig(**LLAMA | {"num_hidden_layers": 1}))
    )
    adapter = adapt(model)
    batch = adapter.batch(SEQUENCES)
    assert sorted(recover(adapter, batch).token_ids) == sorted(batch.token_ids)


def test_one_block_classifier_is_refused():
    config = tf.GPT2Config(**GPT2 | {"n_layer": 1}, num_labels=3)
    adapter = adapt(random_model(tf.GPT2ForSequenceClassification, config))
    with pytest.raises(UnsupportedCombinationError, match="one block"):
        recover(adapter, adapter.batch(SEQUENCES, [0, 2, 1]))


# Contract -----------------------------------------------------------------------------------------------------


def test_same_answer_twice_and_nothing_touched():
    task, model = build("llama", dtype=torch.float32)
    model.train()
    adapter = adapt(model, task=task)
    batch = adapter.batch(SEQUENCES)
    released = capture_gradient(adapter, batch)
    weights = {n: p.clone() for n, p in model.named_parameters()}
    gradient = {n: g.clone() for n, g in released.gradient.items()}
    state = torch.get_rng_state()
    first, second = Span().run(adapter, released, seed=3), Span().run(adapter, released, seed=3)
    assert first.token_ids == second.token_ids
    assert first.confidence == second.confidence
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(p, weights[n]) and p.grad is None for n, p in model.named_parameters())
    assert all(torch.equal(g, gradient[n]) for n, g in released.gradient.items())
    hooks = [
        m for m in adapter.model.modules() if m._forward_pre_hooks or (m._forward_hooks and m is not adapter.embedding)
    ]
    assert hooks == []


def test_beam_bounds_the_work_and_says_so():
    adapter, batch = make("gpt2")
    found = recover(adapter, batch, beam=2)
    assert len(found.token_ids) <= 3
    assert any("more than 2 prefixes" in note for note in found.notes)
    with pytest.raises(ConfigError, match="beam must be at least 1"):
        Span(beam=0)


def test_every_family_is_either_attacked_or_refused():
    assert {*DECODERS, *ENCODERS, "bert-mlm"} == set(FAMILIES)


# Several clients ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "gpt2-classifier"])
def test_mean_of_several_clients(name):
    adapter, batch = make(name, dtype=torch.float64, size=2)
    first, second = [7, 12, 33, 41], [7, 12, 50, 8, 17, 28]
    labels = [0, 2] if adapter.task == "sequence-classification" else None
    batch = adapter.batch([first, second], labels)
    found = recover(adapter, batch, aggregation=Aggregation(clients=2))
    assert sorted(found.token_ids) == sorted(batch.token_ids)


# Trained weights, real text -----------------------------------------------------------------------------------


def test_trained_reference_model_on_its_samples():
    adapter = load_adapter("reference-gpt2")
    samples = (resources.files("lmleak.data.embedded") / "samples.jsonl").read_text().splitlines()
    batch = adapter.batch([json.loads(line)["text"] for line in samples[:4]])
    found = recover(adapter, batch)
    assert sorted(found.texts) == sorted(batch.texts)


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_trained_llama_on_real_sentences(real_data, padding_side):
    folder = real_data / "stories260k" / "hf"
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    adapter = adapt(tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tokenizer=tokenizer)
    lines = (real_data / "cola" / "in_domain_train.tsv").read_text().splitlines()
    short = [t for t in (line.split("\t")[3] for line in lines) if len(tokenizer(t)["input_ids"]) <= 14]
    for start in (0, 20, 28):  # the last four share words and first tokens: rank 16 at block 0
        batch = adapter.batch(short[start : start + 4], padding_side=padding_side)
        assert int(batch.layout["attention_mask"].sum()) < 60  # of width 64
        found = recover(adapter, batch)
        assert sorted(found.texts) == sorted(batch.texts)
