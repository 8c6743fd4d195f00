"""LoRA models: theta is the adapter weights."""

import pytest
import torch

from lmleak.adapters import adapt, load_adapter
from lmleak.errors import ConfigError, UnsupportedModelError
from lmleak.gradients import capture_gradient
from lmleak.influence import GradientJacobian
from tests.families import LABELS, SEQUENCES, build

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # peft on Conv1D and on tied tables


def with_lora(name="gpt2", targets=("c_attn",), **options):
    """A tiny model with LoRA layers whose B is not zero, as after some training."""
    task, model = build(name)
    task_type = {"causal-lm": "CAUSAL_LM", "sequence-classification": "SEQ_CLS"}[task]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = peft.LoraConfig(task_type=task_type, r=2, target_modules=list(targets), **options)
        wrapped = peft.get_peft_model(model, config).double()
        with torch.no_grad():
            for parameter_name, p in wrapped.named_parameters():
                if "lora_" in parameter_name:
                    p.add_(0.3 * torch.randn_like(p))
    return wrapped.eval()


@pytest.mark.parametrize("shared", ["lora", "all", "no-word-embeddings"])
def test_only_the_adapter_weights_are_shared(shared):
    model = with_lora()
    adapter = adapt(model)
    assert adapter.task == "causal-lm"
    assert all("lora_" in n for n in adapter.select(shared).names)
    assert adapter.select(shared).names == tuple(n for n, p in model.named_parameters() if p.requires_grad)
    assert len(adapter.blocks) == 2


@pytest.mark.parametrize("side", ["right", "left"])
def test_gradient_equals_backward_of_the_callers_model(side, plain_gradient, largest_difference):
    """Left padding needs position_ids, which PEFT's forward hides behind keyword arguments."""
    model = with_lora()
    adapter = adapt(model)
    batch = adapter.batch(SEQUENCES, padding_side=side)
    model.base_model.model.set_attn_implementation("eager")
    expected = plain_gradient(model, "causal-lm", batch)
    assert largest_difference(capture_gradient(adapter, batch, shared="lora").gradient, expected) < 1e-10


def test_a_classifier_shares_its_new_head_too(plain_gradient, largest_difference):
    model = with_lora("bert", ("query", "value"))
    adapter = adapt(model)
    batch = adapter.batch(SEQUENCES, LABELS)
    assert "token_type_ids" not in batch.layout or batch.layout["token_type_ids"].sum() == 0
    names = adapter.select("all").names
    assert {n for n in names if "lora_" not in n} == {n for n in names if "classifier" in n}
    assert len(adapter.select("lora").names) < len(names)
    model.base_model.model.set_attn_implementation("eager")
    expected = plain_gradient(model, adapter.task, batch)
    assert largest_difference(capture_gradient(adapter, batch, shared="all").gradient, expected) < 1e-10


def test_the_operator_works():
    adapter = adapt(with_lora())
    batch = adapter.batch(SEQUENCES[:1])
    fast, dense = (GradientJacobian(adapter, batch, shared="lora", implementation=i) for i in ("autodiff", "dense"))
    v = torch.linspace(-1, 1, adapter.input(batch).numel(), dtype=torch.float64).reshape(adapter.input(batch).shape)
    assert torch.allclose(fast.gram(v), dense.gram(v), rtol=1e-8, atol=1e-12)


def test_lora_on_the_word_embeddings_is_refused():
    """Its gradient flows through the looked-up rows, which are x: it would silently be zero."""
    with pytest.raises(UnsupportedModelError, match=r"lora_embedding_A.*leave the embeddings out of target_modules"):
        adapt(with_lora(targets=("c_attn", "wte")))


def test_a_trained_copy_of_the_table_is_the_table(plain_gradient, largest_difference):
    model = with_lora(modules_to_save=["wte"])
    adapter = adapt(model)
    table = adapter.lookup_table()
    assert "modules_to_save" in table
    assert table not in adapter.select("no-word-embeddings").names
    batch = adapter.batch(SEQUENCES)
    model.base_model.model.set_attn_implementation("eager")
    expected = plain_gradient(model, "causal-lm", batch)
    assert largest_difference(capture_gradient(adapter, batch, shared="all").gradient, expected) < 1e-10


def test_prompt_tuning_is_refused():
    """Its virtual tokens shift the logits against the targets."""
    with torch.random.fork_rng():
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        model = peft.get_peft_model(build("gpt2")[1], config).double()
    with pytest.raises(UnsupportedModelError, match="returns 9 positions for 6 tokens"):
        adapt(model).batch(SEQUENCES)


def test_a_model_without_lora_has_none_to_share():
    adapter = adapt(build("gpt2")[1])
    with pytest.raises(ConfigError, match="selects none"):
        adapter.select("lora")


@pytest.mark.parametrize(("name", "targets"), [("gpt2", ("c_attn",)), ("bert", ("query", "value"))])
def test_a_saved_folder_loads_with_its_base_model(tmp_path, name, targets):
    wrapped = with_lora(name, targets).float()
    task, plain = build(name)
    plain.save_pretrained(tmp_path / "base")
    wrapped.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    wrapped.save_pretrained(tmp_path / "lora")
    from lmleak.adapters.load import _from_weights

    with torch.random.fork_rng():  # as load_adapter does
        model, found, _ = _from_weights(str(tmp_path / "lora"), "lora", None, None)
    assert found == task
    again, before = adapt(model), adapt(wrapped)
    labels = LABELS if task == "sequence-classification" else None
    a, b = (capture_gradient(side, side.batch(SEQUENCES, labels), shared="lora") for side in (again, before))
    assert a.gradient.keys() == b.gradient.keys()
    for key, value in b.gradient.items():
        torch.testing.assert_close(a.gradient[key], value, rtol=1e-4, atol=1e-6)


def test_a_saved_folder_without_its_base_is_refused(tmp_path):
    wrapped = with_lora()
    wrapped.peft_config["default"].base_model_name_or_path = str(tmp_path / "nowhere")
    wrapped.save_pretrained(tmp_path / "lora")
    with pytest.raises(ConfigError, match="nowhere"):
        load_adapter(str(tmp_path / "lora"))
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="does not name its base model"):
        load_adapter(str(tmp_path / "lora"))
