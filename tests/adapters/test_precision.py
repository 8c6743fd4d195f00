"""Float64 models stay in float64, whatever a layer casts to inside."""

import pytest
import torch
from torch.nn import functional as F

from lmleak.adapters.precision import KeepDouble
from tests.families import build, make

X = torch.linspace(-2, 2, 7, dtype=torch.float64) / 3
CASTS = {
    "float": lambda x: x.float(),
    "to": lambda x: x.to(torch.float32),
    "to keyword": lambda x: x.to(dtype=torch.float32),
    "to device and dtype": lambda x: x.to("cpu", torch.float32),
    "type": lambda x: x.type(torch.float32),
    "softmax": lambda x: F.softmax(x, dim=-1, dtype=torch.float32),
    "torch.softmax": lambda x: torch.softmax(x, -1, dtype=torch.float32),
    "method": lambda x: x.softmax(-1, dtype=torch.float32),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS.keys())
def test_a_cast_down_does_nothing_inside_and_everything_outside(cast):
    with KeepDouble():
        inside = cast(X)
    assert inside.dtype == torch.float64
    assert cast(X).dtype == torch.float32
    reference = F.softmax(X, -1) if "softmax" in str(cast.__code__.co_names) else X
    assert torch.equal(inside, reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_other_dtypes_are_cast_as_asked(dtype):
    with KeepDouble():
        assert X.to(dtype).to(torch.float32).dtype == (torch.float64 if dtype == torch.float32 else torch.float32)
        assert X.to(torch.float16).dtype == torch.float16
        assert torch.ones(2, dtype=torch.long).float().dtype == torch.float32
        assert torch.ones(2).double().dtype == torch.float64


@pytest.mark.parametrize("name", ["llama", "unlisted-gemma", "gpt2", "bert"])
def test_two_models_that_differ_by_1e_12_are_told_apart(name):
    """RMSNorm and softmax in float32 would round the difference away."""
    adapter, batch = make(name, size=1)
    x = adapter.input(batch)
    step = 1e-12 * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).reshape(x.shape)
    change = (adapter.logits(x + step, batch.layout) - adapter.logits(x, batch.layout)).abs().max().item()
    assert 1e-14 < change < 1e-10


def test_a_float32_model_is_left_alone():
    adapter, batch = make("llama", dtype=torch.float32)
    assert adapter.logits(adapter.input(batch), batch.layout).dtype == torch.float32
    _, model = build("llama")
    with torch.no_grad():  # the mode ends with the adapter's call: the caller's own forward is what it was
        before = model(input_ids=batch.inputs["input_ids"]).logits
        make("llama")
        assert torch.equal(model(input_ids=batch.inputs["input_ids"]).logits, before)
