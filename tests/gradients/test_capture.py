"""Capture: what the gradient says of itself, and when there is none."""

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from lmleak.adapters import LeNet, adapt
from lmleak.errors import ConfigError, DataError
from lmleak.gradients import capture_gradient, gradient_of
from tests.families import LABELS, SEQUENCES, build, make


def test_public_facts_travel_with_the_gradient():
    adapter, batch = make("bert")
    shared = capture_gradient(adapter, batch, shared="block:0")
    assert (shared.task, shared.batch_size, shared.shared) == ("sequence-classification", 3, "block:0")
    assert shared.model == adapter.name
    assert shared.defenses == ()
    assert torch.equal(shared.layout["attention_mask"], batch.layout["attention_mask"])
    assert shared.labels.tolist() == LABELS


def test_the_gradient_is_detached_and_owned():
    adapter, batch = make("gpt2")
    shared = capture_gradient(adapter, batch)
    assert not any(t.requires_grad for t in shared.gradient.values())
    again = capture_gradient(adapter, batch)
    for name, tensor in shared.gradient.items():
        assert torch.equal(tensor, again.gradient[name])
        assert tensor.data_ptr() != adapter.parameters()[name].data_ptr()


def test_gradients_do_not_share_memory(tmp_path):
    """For one image, a ViT's class token has the first row of the positions' gradient, and torch returns a view."""
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4,
        attn_implementation="eager",
    )  # fmt: skip
    adapter = adapt(ViTForImageClassification(config), task="image-classification")
    shared = capture_gradient(adapter, adapter.batch(torch.ones(1, 3, 8, 8), [0]))
    memory = [t.untyped_storage().data_ptr() for t in shared.gradient.values()]
    assert len(set(memory)) == len(memory)
    loaded = type(shared).load(shared.save(tmp_path / "gradient.safetensors"))
    assert all(torch.equal(loaded.gradient[n], t) for n, t in shared.gradient.items())


def test_a_parameter_that_the_loss_does_not_use_shares_zeros():
    class Spare(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.spare = LeNet(size=8), torch.nn.Parameter(torch.ones(2))

        def forward(self, x):
            return self.net(x)

    adapter = adapt(Spare())
    batch = adapter.batch(torch.ones(1, 1, 8, 8), [0])
    assert capture_gradient(adapter, batch, shared="all").gradient["spare"].tolist() == [0.0, 0.0]
    with pytest.raises(DataError, match="zero: the loss does not depend on it"):
        capture_gradient(adapter, batch, shared="spare")


def test_an_unknown_selection_is_refused():
    adapter, batch = make("bert")
    with pytest.raises(ConfigError, match="Did you mean 'embeddings'"):
        capture_gradient(adapter, batch, shared="embedings")


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_a_guess_can_be_differentiated_further(name):
    """create_graph: the derivative of ||g(x)||^2 in x, against a finite difference."""
    adapter, batch = make(name, size=1)
    names = adapter.select("block:0").names
    x = adapter.input(batch).requires_grad_()

    def norm(guess, create_graph=True):
        gradient, _ = gradient_of(adapter, guess, batch.targets, batch.layout, names, create_graph=create_graph)
        return sum(g.square().sum() for g in gradient.values())

    (slope,) = torch.autograd.grad(norm(x), x)
    direction = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).reshape(x.shape)
    step = 1e-5
    with torch.no_grad():
        ends = [x + step * direction, x - step * direction]
    difference = (norm(ends[0]).item() - norm(ends[1]).item()) / (2 * step)
    assert (slope * direction).sum().item() == pytest.approx(difference, rel=1e-6)
    gradient, loss = gradient_of(adapter, x.detach(), batch.targets, batch.layout, names)
    assert not any(g.requires_grad for g in gradient.values())
    assert loss.dim() == 0


def test_float32_agrees_with_float64():
    values = {}
    for dtype in (torch.float32, torch.float64):
        task, model = build("gpt2", dtype=torch.float32)
        adapter = adapt(model.to(dtype), task=task)
        values[dtype] = capture_gradient(adapter, adapter.batch(SEQUENCES)).gradient
    for name, tensor in values[torch.float64].items():
        assert values[torch.float32][name].dtype == torch.float32
        assert torch.allclose(
            values[torch.float32][name].double(), tensor, atol=1e-5 * tensor.abs().max().item() + 1e-7
        )
