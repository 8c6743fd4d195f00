"""Trained models with their tokenizers: the two that the package ships, and a pretrained Llama where it is at hand."""

import pytest
import torch
import transformers as tf

from lmleak.adapters import load_adapter
from lmleak.data.embedded import REFERENCE_MODELS, sample_messages
from lmleak.gradients import capture_gradient
from lmleak.influence import GradientJacobian, inversion_influence


@pytest.fixture
def llama(real_data):
    return str(real_data / "stories260k" / "hf")


@pytest.fixture
def sentences(real_data):
    lines = (real_data / "cola" / "in_domain_dev.tsv").read_text(encoding="utf-8").splitlines()
    return [line.split("\t")[3] for line in lines[:4]]


@pytest.mark.parametrize(
    ("name", "task"), [("reference-bert", "sequence-classification"), ("reference-gpt2", "causal-lm")]
)
def test_reference_models_load_by_name(name, task):
    if not (REFERENCE_MODELS[name] / "model.safetensors").is_file():
        pytest.skip(f"{name} has not been trained in this checkout")
    adapter = load_adapter(name)
    assert (adapter.task, adapter.name, adapter.dtype) == (task, name, torch.float32)
    messages = sample_messages()[:2]
    labels = [m.label for m in messages] if task == "sequence-classification" else None
    batch = adapter.batch([m.text for m in messages], labels)
    assert [len(ids) for ids in batch.token_ids] == [
        len(adapter.tokenizer(m.text, add_special_tokens=False)["input_ids"]) for m in messages
    ]
    assert set(map(len, batch.layout.values())) == {2}
    assert capture_gradient(adapter, batch).rms > 0


def test_a_pretrained_llama_computes_what_transformers_computes(llama, sentences):
    adapter = load_adapter(llama)
    batch = adapter.batch(sentences)
    assert adapter.task == "causal-lm"
    assert batch.texts == tuple(sentences)  # the byte-fallback tokenizer loses nothing
    model = tf.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32, attn_implementation="eager")
    model(input_ids=batch.inputs["input_ids"], labels=batch.targets, **batch.layout).loss.backward()
    gradient = capture_gradient(adapter, batch, shared="all").gradient
    for name, p in model.named_parameters():
        assert torch.allclose(gradient[name], p.grad, rtol=0, atol=1e-5 * p.grad.abs().max().item()), name


def test_the_last_position_of_a_pretrained_llama_is_never_seen(llama, sentences):
    adapter = load_adapter(llama)
    batch = adapter.batch(sentences[:1])
    jacobian = GradientJacobian(adapter, batch)
    v = torch.zeros_like(jacobian.x)
    v[0, -1] = 1.0
    assert jacobian.gram(v).abs().max() == 0
    result = inversion_influence(adapter, batch, noise_std=1e-3, max_products=20)
    assert result.error[0, -1].abs().max() == 0
    assert 0 < result.lower_bound.l2 <= result.cg_bounds[0] * (1 + 1e-3)
