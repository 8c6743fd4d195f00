"""Models that accelerate placed: by hooks on devices they work, offloaded they are refused."""

import pytest
import torch
from accelerate import cpu_offload, dispatch_model

import lmleak
from lmleak.errors import UnsupportedCombinationError, UnsupportedModelError
from tests.families import SEQUENCES, build, make

PARTS = ["transformer.wte", "transformer.wpe", "transformer.drop", "transformer.h.0", "transformer.h.1",
         "transformer.ln_f", "lm_head"]  # fmt: skip


def on_cpu(model):
    return dispatch_model(model, device_map={"": "cpu"}, force_hooks=True)


def part_by_part(model):
    return dispatch_model(model, device_map=dict.fromkeys(PARTS, "cpu"), main_device="cpu", force_hooks=True)


@pytest.mark.parametrize("implementation", ["autodiff", "factored"])
@pytest.mark.parametrize("place", [on_cpu, part_by_part])
def test_products_of_a_placed_model_are_those_of_the_plain_one(place, implementation):
    """Hooks move inputs before every module; derivatives pass through them, second ones too."""
    adapter, batch = make("gpt2")
    plain = lmleak.GradientJacobian(adapter, batch, implementation="autodiff")
    placed = lmleak.adapt(place(build("gpt2")[1]))
    assert any(hasattr(module, "_hf_hook") for module in placed.model.modules())
    hooked = lmleak.GradientJacobian(placed, placed.batch(SEQUENCES), implementation=implementation)
    v = torch.randn(plain.x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(hooked.gram(v), plain.gram(v), rtol=1e-10, atol=1e-12)
    shared, theirs = lmleak.capture_gradient(placed, placed.batch(SEQUENCES)), lmleak.capture_gradient(adapter, batch)
    assert all(torch.equal(shared.gradient[name], g) for name, g in theirs.gradient.items())


def test_an_offloaded_model_is_refused(tmp_path):
    offloaded = cpu_offload(build("gpt2")[1], execution_device=torch.device("cpu"))
    on_disk = dispatch_model(
        build("gpt2")[1], device_map=dict.fromkeys(PARTS, "cpu") | {"transformer.h.1": "disk"}, main_device="cpu",
        offload_dir=tmp_path,
    )  # fmt: skip
    for model in (offloaded, on_disk):
        with pytest.raises(UnsupportedModelError, match=r"offloaded it to the CPU or the disk.*device_map"):
            lmleak.adapt(model)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_on_two_gpus_gives_the_products_of_one():
    adapter, batch = make("gpt2")
    plain = lmleak.GradientJacobian(adapter, batch, implementation="autodiff")
    first, second = dict.fromkeys(PARTS[:4], 0), dict.fromkeys(PARTS[4:6], 1)
    spread = lmleak.adapt(dispatch_model(build("gpt2")[1], device_map=first | second | {"lm_head": 0}))
    batch = spread.batch(SEQUENCES)
    with pytest.raises(UnsupportedCombinationError, match="implementation='autodiff'"):
        lmleak.GradientJacobian(spread, batch)
    jacobian = lmleak.GradientJacobian(spread, batch, implementation="autodiff")
    v = torch.randn(plain.x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(jacobian.gram(v.cuda()).cpu(), plain.gram(v), rtol=1e-8, atol=1e-10)
