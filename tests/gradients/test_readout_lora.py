"""What LoRA gradients tell of first-layer inputs, against the true ones."""

import pytest
import torch

import lmleak
from lmleak.adapters import adapt
from lmleak.gradients.readout import lora_readout
from tests.families import LABELS, SEQUENCES, build

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # peft on Conv1D
TARGETS = {"gpt2": ["c_attn"], "bert": ["query", "value"]}


def lora_case(name, *, rank, size, steps, dtype=torch.float64):
    """(adapter, batch, LoRA gradient): fresh, or after some SGD steps on the batch."""
    task, model = build(name, dtype=dtype)
    task_type = {"causal-lm": "CAUSAL_LM", "sequence-classification": "SEQ_CLS"}[task]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = peft.LoraConfig(task_type=task_type, r=rank, lora_alpha=8, target_modules=TARGETS[name])
        model = peft.get_peft_model(model, config).to(dtype).eval()
    adapter = adapt(model)
    batch = adapter.batch(SEQUENCES[:size], LABELS[:size] if name == "bert" else None)
    for _ in range(steps):
        gradient = lmleak.capture_gradient(adapter, batch, shared="lora").gradient
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if parameter_name in gradient:
                    parameter.sub_(0.1 * gradient[parameter_name])
    return adapter, batch, lmleak.capture_gradient(adapter, batch, shared="lora")


def inputs_of(adapter, path, sequences):
    """What enters a map for unpadded sequences, (n, T, d)."""
    seen = []
    handle = adapter.model.get_submodule(path).register_forward_pre_hook(
        lambda m, arguments: seen.append(arguments[0])
    )
    ids = torch.tensor(sequences)
    layout = {"attention_mask": torch.ones_like(ids)}
    if getattr(adapter.config, "type_vocab_size", 0):
        layout["token_type_ids"] = torch.zeros_like(ids)
    with torch.no_grad():
        adapter.logits(adapter.embed(ids), layout)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("steps", [0, 3], ids=["fresh", "trained"])
@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_of_the_whole_vocabulary_the_inputs_pass(name, steps, dtype):
    adapter, _, shared = lora_case(name, rank=8, size=1, steps=steps, dtype=dtype)
    truth = SEQUENCES[0][:-1] if name == "gpt2" else SEQUENCES[0]
    readouts = lora_readout(adapter, shared)
    first = [path for path in readouts if ".0." in path]
    assert first
    everything = [[v] * len(truth) for v in range(60)]
    for path in first:
        read = readouts[path]
        assert read.ranks[1] == len(truth)
        assert read.ranks[0] <= len(truth) * (steps > 0)
        passed = read.accepts(inputs_of(adapter, path, everything))  # (V, T)
        assert {(p, v) for v, p in passed.nonzero().tolist()} == set(enumerate(truth))
        assert read.residual(inputs_of(adapter, path, [truth])).max() < (1e-4 if dtype == torch.float32 else 1e-8)


@pytest.mark.parametrize("steps", [0, 3], ids=["fresh", "trained"])
def test_void_with_as_many_tokens_as_ranks(steps):
    adapter, _, shared = lora_case("gpt2", rank=4, size=1, steps=steps)  # five tokens
    for read in lora_readout(adapter, shared).values():
        assert not read.spaces
        assert "void" in read.reason
        assert read.accepts(torch.randn(3, 16, generator=torch.Generator().manual_seed(0))).all()


def test_nothing_without_lora_gradients():
    adapter, batch, _ = lora_case("gpt2", rank=4, size=1, steps=1)
    assert lora_readout(adapter, lmleak.capture_gradient(adapter, batch, shared="lora_A")) == {}
