"""``shared=``: which parameters it names, and that their gradient is the one a client would share."""

import pytest
import torch
import transformers as tf

from lmleak.adapters import adapt
from lmleak.errors import ConfigError
from lmleak.gradients import capture_gradient
from tests.families import ENCODER, LABELS, SEQUENCES, build, make

GPT2_BLOCK = {"ln_1", "attn", "ln_2", "mlp"}


def test_all_is_every_trained_parameter_with_the_looked_up_rows():
    adapter, _ = make("bert")
    selection = adapter.select("all")
    assert selection.names == tuple(adapter.parameters())
    assert selection.through_lookup


@pytest.mark.parametrize(("name", "kept"), [("bert", False), ("bert-mlm", True),
                                            ("gpt2", True), ("gpt2-untied", False),
                                            ("llama", False), ("llama-tied", True)])  # fmt: skip
def test_the_default_leaves_out_an_untied_table_only(name, kept):
    adapter, _ = make(name)
    selection = adapter.select("no-word-embeddings")
    assert (adapter.lookup_table() in selection.names) is kept
    assert adapter.lookup_table_is_tied() is kept
    assert not selection.through_lookup
    assert set(adapter.parameters()) - set(selection.names) == (set() if kept else {adapter.lookup_table()})


def test_embeddings_alone():
    adapter, _ = make("bert")
    selection = adapter.select("embeddings")
    assert {n.split(".")[2] for n in selection.names} == {
        "word_embeddings", "position_embeddings", "token_type_embeddings", "LayerNorm",
    }  # fmt: skip
    assert selection.through_lookup
    assert make("gpt2")[0].select("embeddings").names == ("transformer.wte.weight", "transformer.wpe.weight")


def test_blocks_and_head():
    adapter, _ = make("gpt2-untied")
    one, both = adapter.select("block:1").names, adapter.select("block:0-1").names
    assert {n.split(".")[3] for n in one} == GPT2_BLOCK
    assert all(n.startswith("transformer.h.1.") for n in one)
    assert set(one) < set(both)
    assert set(both) | set(adapter.select("embeddings").names) | set(adapter.select("head").names) == set(
        adapter.parameters()
    )
    assert adapter.select("head").names == ("transformer.ln_f.weight", "transformer.ln_f.bias", "lm_head.weight")
    assert adapter.select("block:1-1").names == one


def test_a_regular_expression_is_searched_in_the_names():
    adapter, _ = make("gpt2")
    assert adapter.select(r"attn\..*bias$").names == tuple(
        n for n in adapter.parameters() if "attn" in n and n.endswith("bias")
    )
    assert not adapter.select(r"attn\..*bias$").through_lookup


def test_a_regular_expression_on_an_untied_table_includes_its_looked_up_rows():
    adapter, batch = make("gpt2-untied")
    assert adapter.select("wte").through_lookup
    gradient = capture_gradient(adapter, batch, shared="wte").gradient["transformer.wte.weight"]
    used = sorted({t for s in SEQUENCES for t in s[:-1]})  # a last token is predicted, never read
    assert torch.nonzero(gradient.abs().sum(1)).flatten().tolist() == used


@pytest.mark.parametrize("name", ["bert", "gpt2", "gpt2-untied", "llama-tied", "roberta"])
@pytest.mark.parametrize("shared", ["all", "embeddings", "block:0", "block:0-1", "head", r"0.*weight"])
def test_the_gradient_is_that_of_backward(name, shared, plain_gradient, largest_difference):
    adapter, batch = make(name)
    task, model = build(name)
    model.set_attn_implementation("eager")
    expected = plain_gradient(model, task, batch)
    got = capture_gradient(adapter, batch, shared=shared).gradient
    assert tuple(got) == adapter.select(shared).names
    assert largest_difference(got, expected) < 1e-10


@pytest.mark.parametrize(
    ("shared", "message"),
    [
        ("embedings", "selects none.*Did you mean 'embeddings'"),
        ("al1", "Did you mean 'all'"),
        ("block:2", "the model has no block 2; it has embeddings, block 0, block 1, head"),
        ("block:1-0", "selects none"),
        ("block:0-9", "no block 2"),
        ("block:x", "selects none"),
        ("lora", "selects none of the .* trained parameters.*Available: embeddings, block 0"),
        ("(unclosed", "neither a known choice nor a regular expression"),
    ],
)
def test_a_selection_of_nothing_is_refused(shared, message):
    adapter, _ = make("bert")
    with pytest.raises(ConfigError, match=message):
        adapter.select(shared)


def test_blocks_are_found_where_layers_share_or_differ():
    """ALBERT runs one group of weights twice; a hybrid model's layers are of several classes."""
    with torch.random.fork_rng():
        albert = tf.AlbertForSequenceClassification(tf.AlbertConfig(**ENCODER, embedding_size=8, num_labels=3))
    roles = adapt(albert).roles()
    assert list(roles) == ["embeddings", "block 0", "head"]
    assert all("classifier" in n or "pooler" in n for n in roles["head"])
    _, hybrid = build("gpt2")
    hybrid.transformer.h[1].__class__ = type("OtherBlock", (type(hybrid.transformer.h[1]),), {})
    assert adapt(hybrid, task="causal-lm").blocks == ["transformer.h.0", "transformer.h.1"]


def test_frozen_parameters_are_never_shared():
    _, model = build("bert")
    model.bert.embeddings.requires_grad_(False)
    adapter = adapt(model)
    assert not [n for n in adapter.select("all").names if "embeddings" in n]
    assert not adapter.select("all").through_lookup
    with pytest.raises(ConfigError, match="selects none"):
        adapter.select("embeddings")
    batch = adapter.batch(SEQUENCES, LABELS)
    assert set(capture_gradient(adapter, batch, shared="all").gradient) == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
