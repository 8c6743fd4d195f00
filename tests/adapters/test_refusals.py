"""Models whose second derivatives would be missing or silently wrong are refused with the reason."""

from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from torch import nn

from lmleak.adapters import TextAdapter, VisionAdapter, adapt
from lmleak.errors import ConfigError, DataError, UnsupportedCombinationError, UnsupportedModelError
from tests.families import BERT, GPT2, SEQUENCES, build


def linear(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(4, 3))


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel_is_refused(process_group):
    _, model = build("gpt2")
    wrapped = nn.parallel.DistributedDataParallel(model)
    with pytest.raises(UnsupportedModelError, match=r"model.module") as raised:
        adapt(wrapped, task="causal-lm")
    assert "DistributedDataParallel" in str(raised.value)
    inside = nn.Sequential(nn.Flatten(), nn.parallel.DistributedDataParallel(linear()))
    with pytest.raises(UnsupportedModelError, match="DistributedDataParallel"):
        adapt(inside)


@pytest.mark.parametrize("wrapper", ["DataParallel", "FullyShardedDataParallel", "FSDPModule", "GradSampleModule"])
def test_other_training_wrappers_are_refused_by_class(wrapper):
    """By the name of a base class, because the real ones need a GPU, a process group or another package."""
    base = type(wrapper, (nn.Module,), {})
    module = type(f"FSDP{wrapper}", (base,), {"forward": lambda self, x: self.inner(x)})()
    module.inner = linear()
    with pytest.raises(UnsupportedModelError, match="pass the plain module"):
        adapt(module)


def test_compiled_models_are_refused():
    _, model = build("gpt2")
    for compiled in (torch.compile(model), nn.Sequential(torch.compile(linear()))):
        with pytest.raises(UnsupportedModelError, match=r"before torch.compile"):
            adapt(compiled, task="causal-lm")
    in_place = linear()
    in_place.compile()
    with pytest.raises(UnsupportedModelError, match=r"before torch.compile"):
        adapt(in_place)
    inner = build("gpt2")[1]
    inner.transformer.h[1].compile()
    with pytest.raises(UnsupportedModelError, match=r"before torch.compile"):
        adapt(inner)
    forward_only = build("gpt2")[1]
    forward_only.forward = torch.compile(forward_only.forward)
    with pytest.raises(UnsupportedModelError, match=r"before torch.compile"):
        adapt(forward_only)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused(dtype):
    _, model = build("bert", dtype=dtype)
    with pytest.raises(UnsupportedModelError, match=r"pass model\.float\(\)"):
        adapt(model)


def test_mixed_precision_weights_are_refused():
    _, model = build("bert", dtype=torch.float32)
    model.classifier.double()
    with pytest.raises(UnsupportedModelError, match="mix float32 and float64"):
        adapt(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(value):
    _, model = build("bert")
    with torch.no_grad():
        model.classifier.bias[1] = value
    with pytest.raises(UnsupportedModelError, match=r"classifier\.bias.*NaN or Inf"):
        adapt(model)


def test_weights_without_data_are_refused():
    with torch.device("meta"):
        model = tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2))
    with pytest.raises(UnsupportedModelError, match="meta device"):
        adapt(model)


def test_a_frozen_model_is_refused():
    _, model = build("bert")
    model.requires_grad_(False)
    with pytest.raises(UnsupportedModelError, match="requires_grad"):
        adapt(model)


@pytest.mark.parametrize("thing", ["bert-base-uncased", None, lambda x: x, SimpleNamespace(forward=None)])
def test_what_is_no_module_is_refused(thing):
    with pytest.raises(UnsupportedModelError, match=r"expected a torch\.nn\.Module"):
        adapt(thing)


def test_a_model_without_a_head_is_refused():
    with torch.random.fork_rng():
        model = tf.BertModel(tf.BertConfig(**BERT))
    with pytest.raises(UnsupportedModelError, match=r"needs a head.*ForSequenceClassification"):
        adapt(model)


def test_a_task_that_does_not_exist_is_refused():
    _, model = build("bert")
    with pytest.raises(ConfigError, match="Did you mean 'causal-lm'"):
        adapt(model, task="causal")


def test_a_vision_model_as_language_model_is_refused():
    with pytest.raises(UnsupportedModelError, match="no token-embedding table"):
        TextAdapter(linear(), task="causal-lm")
    assert isinstance(adapt(linear()), VisionAdapter)


def test_an_encoder_decoder_is_refused():
    config = tf.BartConfig(vocab_size=60, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                           decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, pad_token_id=1,
                           max_position_embeddings=24, num_labels=3)  # fmt: skip
    with torch.random.fork_rng():
        model = tf.BartForSequenceClassification(config)
    with pytest.raises(UnsupportedModelError, match="encoder and in its decoder"):
        adapt(model)


def test_a_model_that_rearranges_its_tokens_is_refused():
    """XLNet embeds (T, B, D)."""
    with torch.random.fork_rng():
        model = tf.XLNetForSequenceClassification(
            tf.XLNetConfig(vocab_size=60, d_model=16, n_layer=1, n_head=2, d_inner=16, num_labels=3)
        )
    adapter = adapt(model)
    assert adapter.max_positions() is None  # its configuration says -1
    with pytest.raises(DataError, match="rearranges its input"):
        adapter.batch(SEQUENCES, [0, 1, 2])


class UsesIdsTwice(tf.GPT2LMHeadModel):
    """A model that adds a function of the token ids behind the embedding table's back."""

    def forward(self, input_ids=None, **keywords):
        output = super().forward(input_ids=input_ids, **keywords)
        output.logits = output.logits + (input_ids % 7)[..., None]
        return output


def test_a_model_that_uses_ids_elsewhere_is_refused():
    with torch.random.fork_rng():
        model = UsesIdsTwice(tf.GPT2Config(**GPT2))
    adapter = adapt(model, task="causal-lm")
    for _ in range(2):  # refused again, not only the first time
        with pytest.raises(UnsupportedModelError, match="uses the ids elsewhere"):
            adapter.batch(SEQUENCES)


class CountsPadding(tf.GPT2LMHeadModel):
    """A model that ignores the attention mask."""

    def forward(self, input_ids=None, attention_mask=None, **keywords):
        return super().forward(input_ids=input_ids)


def test_a_model_that_reads_padding_is_refused_when_padded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CountsPadding(tf.GPT2Config(**GPT2 | {"initializer_range": 0.5}))
    adapter = adapt(model, task="causal-lm")
    assert adapter.batch(SEQUENCES[:1]).size == 1
    assert adapter.batch(SEQUENCES).size == 3  # causal: right padding comes after every text
    for _ in range(2):
        with pytest.raises(UnsupportedCombinationError, match=r"padded on the left.*padding_side='right'"):
            adapter.batch(SEQUENCES, padding_side="left")


def test_positions_of_a_family_like_roberta_are_counted_by_the_model(rows):
    """XLM-R has no entry: its positions start behind the padding row, on either side of the padding."""
    config = tf.XLMRobertaConfig(**BERT | {"pad_token_id": 1, "max_position_embeddings": 26})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = tf.XLMRobertaForTokenClassification(config).double().eval()
    adapter = TextAdapter(model, task="masked-lm")  # per-token logits; the task does not matter here
    assert adapter.max_positions() == 24
    for side in ("left", "right"):
        ids = torch.full((2, 6), 1)
        where = slice(2, 6) if side == "left" else slice(0, 4)
        ids[0], ids[1, where] = torch.tensor(SEQUENCES[0]), torch.tensor(SEQUENCES[1])
        layout = {"attention_mask": (ids != 1).long()}
        got = adapter.logits(adapter.embed(ids), layout)[1, where]
        with torch.no_grad():
            expected = model(input_ids=torch.tensor(SEQUENCES[1:2])).logits[0]
        assert torch.allclose(got, expected, atol=1e-6)


def test_a_classifier_without_a_padding_token_is_given_one():
    """transformers refuses such a batch: it could not find the last token."""
    settings = {key: value for key, value in GPT2.items() if key != "pad_token_id"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = tf.GPT2ForSequenceClassification(tf.GPT2Config(**settings, num_labels=3)).double().eval()
    assert model.config.pad_token_id is None
    adapter = adapt(model)
    batch = adapter.batch(SEQUENCES, [0, 2, 1])
    got = adapter.logits(adapter.input(batch), batch.layout)
    for row, sequence in enumerate(SEQUENCES):
        with torch.no_grad():
            assert torch.allclose(got[row], model(input_ids=torch.tensor([sequence])).logits[0], atol=1e-6)
    assert model.config.pad_token_id is None


def test_settings_of_the_configuration_do_not_reach_the_derivatives():
    """A tuple-returning configuration works; the caller's stays as it is."""
    task, model = build("gpt2")
    reference = adapt(build("gpt2")[1], task=task)
    model.config.return_dict = False
    adapter = adapt(model, task=task)
    batch = adapter.batch(SEQUENCES)
    assert torch.equal(
        adapter.logits(adapter.input(batch), batch.layout), reference.logits(adapter.input(batch), batch.layout)
    )
    assert model.config.return_dict is False


@pytest.mark.parametrize("change", [{"problem_type": "multi_label_classification"}, {"problem_type": "regression"}])
def test_classifier_with_another_loss(change):
    task, model = build("bert")
    for key, value in change.items():
        setattr(model.config, key, value)
    with pytest.raises(UnsupportedModelError, match="exclusive classes"):
        adapt(model, task=task)


def test_task_that_the_head_is_not_for():
    _, model = build("gpt2")
    with pytest.raises(ConfigError, match="head of task 'causal-lm'"):
        adapt(model, task="sequence-classification")
