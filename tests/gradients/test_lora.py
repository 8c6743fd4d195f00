"""LoRA through PEFT: the shared gradient is that of the adapter weights A (r, d_in) and B (d_out, r)."""

from dataclasses import replace

import pytest
import torch

from lmleak.adapters import adapt
from lmleak.gradients import SharedGradient, capture_gradient, update_of
from lmleak.types import Aggregation
from tests.families import LABELS, SEQUENCES, build
from tests.gradients.training import backward, fedavg, largest_difference, own_loss

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # peft on Conv1D
RANK, ALPHA = 2, 8
TARGETS = {"gpt2": ["c_attn"], "bert": ["query", "value"]}
FIRST_MAP = {"gpt2": "transformer.h.0.attn.c_attn", "bert": "bert.encoder.layer.0.attention.self.query"}


def case(name, *, steps=0, dropout=0.0):
    """(PEFT model, adapter, batch), as PEFT initialises it or after some steps of SGD."""
    task, model = build(name)
    task_type = {"causal-lm": "CAUSAL_LM", "sequence-classification": "SEQ_CLS"}[task]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = peft.LoraConfig(
            task_type=task_type, r=RANK, lora_alpha=ALPHA, target_modules=TARGETS[name], lora_dropout=dropout
        )
        model = peft.get_peft_model(model, config).double().eval()
    model.base_model.model.set_attn_implementation("eager")
    adapter = adapt(model)
    batch = adapter.batch(SEQUENCES, LABELS if name == "bert" else None)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        own_loss(model, batch, slice(None)).backward()
        optimizer.step()
    return model, adapter, batch


@pytest.mark.parametrize("shared", ["lora", "no-word-embeddings"])
@pytest.mark.parametrize("steps", [0, 3], ids=["fresh", "trained"])
@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_capture_equals_backward(name, steps, shared):
    model, adapter, batch = case(name, steps=steps)
    expected = backward(model, batch)
    got = capture_gradient(adapter, batch, shared=shared).gradient
    assert set(got) == {n for n in expected if shared != "lora" or "lora_" in n}
    assert largest_difference(got, expected) < 1e-11
    sizes = {kind: max(g.abs().max().item() for n, g in got.items() if f"lora_{kind}" in n) for kind in "AB"}
    assert sizes["B"] > 1e-6
    assert (sizes["A"] > 1e-6) == (steps > 0)  # dL/dA = scaling B^T D X^T, and B starts at zero


def inputs_and_output_gradients(model, path, batch):
    """X (tokens, d_in) and D (tokens, d_out) of a linear map, by hooks on a plain backward pass."""
    seen = {}

    def keep(module, arguments, output):
        output.retain_grad()
        seen.update(x=arguments[0], y=output)

    handle = model.base_model.model.get_submodule(path).register_forward_hook(keep)
    own_loss(model, batch, slice(None)).backward()
    handle.remove()
    return seen["x"].detach().flatten(0, 1), seen["y"].grad.flatten(0, 1)


@pytest.mark.parametrize("steps", [0, 3], ids=["fresh", "trained"])
@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_the_gradients_are_the_formulas(name, steps):
    """dL/dB = scaling D (A X)^T and dL/dA = scaling B^T D X^T, sums over tokens."""
    model, adapter, batch = case(name, steps=steps)
    got = capture_gradient(adapter, batch, shared="lora").gradient
    inputs, outputs = inputs_and_output_gradients(model, FIRST_MAP[name], batch)
    module = model.base_model.model.get_submodule(FIRST_MAP[name])
    a, b = (getattr(module, f"lora_{kind}")["default"].weight.detach() for kind in "AB")
    path = f"base_model.model.{FIRST_MAP[name]}"
    expected = {
        f"{path}.lora_B.default.weight": ALPHA / RANK * outputs.T @ (inputs @ a.T),
        f"{path}.lora_A.default.weight": ALPHA / RANK * (outputs @ b).T @ inputs,
    }
    assert largest_difference({n: got[n] for n in expected}, expected) < 1e-11


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_local_steps_train_the_adapter_weights_alone(name):
    """The word table is frozen, so that an attacker's simulation is exact at the true input."""
    model, adapter, batch = case(name, steps=1)
    local = Aggregation(steps_per_epoch=3, epochs=2, learning_rate=0.1)
    captured = capture_gradient(adapter, batch, shared="lora", aggregation=local).gradient
    expected = fedavg(model, batch, [[[0], [1], [2]] * 2], learning_rate=0.1)
    assert largest_difference(captured, expected) < 1e-10
    names = adapter.select("lora").names
    update, _ = update_of(adapter, adapter.input(batch), batch.targets, batch.layout, names, local)
    assert largest_difference(update, captured) < 1e-10


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_the_file_round_trip(name, tmp_path):
    _, adapter, batch = case(name, steps=1)
    shared = capture_gradient(adapter, batch, shared="lora")
    loaded = SharedGradient.load(shared.save(tmp_path / "g"), adapter)
    assert all(torch.equal(loaded.gradient[n], t) for n, t in shared.gradient.items())
    assert replace(loaded, gradient=shared.gradient).shared == "lora"


def test_dropout_of_the_adapter_layers():
    """Only LoRA's own dropout is on here: the base model has none left."""
    model, adapter, batch = case("gpt2", steps=1, dropout=0.3)
    for module in adapter.model.modules():
        if isinstance(module, torch.nn.Dropout) and module.p != 0.3:
            module.p = 0.0
    clean = capture_gradient(adapter, batch, shared="lora").gradient
    noisy = capture_gradient(adapter, batch, shared="lora", dropout=True).gradient
    assert largest_difference(clean, backward(model, batch)) < 1e-11
    assert largest_difference(noisy, clean) > 1e-2
