"""Layers that hand out more than their output, write into what they are given or are changed from outside."""

from types import MethodType

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.checkpoint import checkpoint

from lmleak.influence import GradientJacobian
from tests.families import image_problem
from tests.influence.vectors import randn, relative


class Layer(nn.Module):
    """A gain and a shift of the last axis, with something besides."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias, self.kept = nn.Parameter(torch.ones(6)), nn.Parameter(torch.zeros(6)), None

    def more(self):
        return 0 if self.kept is None else self.kept


class Early(Layer):
    """What comes before the output is used later."""

    def forward(self, x):
        self.kept = F.normalize(x, dim=-1) * self.weight + self.bias
        return self.kept.clone()


class LateGain(Layer):
    def forward(self, x):
        self.kept = 1 + self.weight
        return F.normalize(x, dim=-1) * self.kept + self.bias


class TwoOutputs(Layer):
    """Two outputs of one node, of which a hook sees one."""

    def forward(self, x):
        first, self.kept = (torch.stack([x, x.sin()]) * self.weight + self.bias).unbind(0)
        return first


class OtherOutput(TwoOutputs):
    def forward(self, x):
        return super().forward(x).detach() + self.kept


class SteepBias(Layer):
    def forward(self, x):
        return x * self.weight + (3 * self.bias - 2 * self.bias.detach())


class WritesIntoInput(Layer):
    def forward(self, x):
        return x.sub_(x.mean(-1, keepdim=True)) * self.weight + self.bias


class Absolute(Layer):
    def forward(self, x):
        return x.abs() * self.weight + F.softsign(x) + F.normalize(x, p=1, dim=-1) + self.bias


class Sampled(Layer):
    """Sampled where its own values say."""

    def forward(self, x):
        image = x.mT.reshape(len(x), 6, 6, 6)
        grid = image[:, :2].permute(0, 2, 3, 1).tanh()
        return F.grid_sample(image, grid, align_corners=False).flatten(2).mT * self.weight + self.bias


class Sparse(Layer):
    def __init__(self):
        super().__init__()
        self.mixing = (torch.eye(36) + torch.ones(36, 36).triu(34)).to_sparse()

    def forward(self, x):
        mixed = torch.stack([torch.sparse.mm(self.mixing.to(x.dtype), each) for each in x])
        return mixed * self.weight + self.bias


def replaced(layer, name, function):
    setattr(layer, name, MethodType(function, layer))
    return layer


def patched_convolution():
    layer = nn.Conv1d(36, 36, 1)
    layer._conv_forward = lambda x, w, b: F.conv1d(x, 2 * w, b)
    return layer


def placed_after_replacement():
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    layer = replaced(nn.Linear(6, 6), "forward", lambda self, x: F.linear(x, 2 * self.weight, self.bias))
    return add_hook_to_module(layer, AlignDevicesHook())


LAYERS = {
    "early": Early, "late gain": LateGain, "two outputs": TwoOutputs, "other output": OtherOutput,
    "steep bias": SteepBias, "in place": WritesIntoInput, "absolute": Absolute, "sampled": Sampled, "sparse": Sparse,
    "patched convolution": patched_convolution, "placed after replacement": placed_after_replacement,
}  # fmt: skip


def problem(layer):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.layer, self.head = nn.Conv2d(3, 6, 3), layer(), nn.Linear(216, 3)

        def forward(self, x):
            hidden = self.layer(self.stem(x).flatten(2).mT)
            more = self.layer.more() if isinstance(self.layer, Layer) else 0
            return self.head(torch.tanh(hidden + torch.sin(torch.as_tensor(more, dtype=x.dtype))).flatten(1))

    return image_problem(Network)


def compare(adapter, batch):
    """Return the largest relative difference of all products, and what went by double backward."""
    fast, reference = (GradientJacobian(adapter, batch, implementation=i) for i in ("factored", "autodiff"))
    v, differences = randn(*fast.x.shape), []
    got, expected = fast.rmatvec(v), reference.rmatvec(v)
    largest = max(t.norm() for t in expected.values())
    differences += [((got[n] - expected[n]).norm() / largest).item() for n in expected]
    delta = {n: torch.ones_like(t) for n, t in expected.items()}
    for one, other in (
        (fast.gram(v), reference.gram(v)),
        (fast.matvec(delta), reference.matvec(delta)),
        (fast.gram_operator().matmat(fast.flatten(v)[:, None])[:, 0], reference.flatten(reference.gram(v))),
    ):
        differences.append(relative(one, other))
    return max(differences), fast.by_autodiff


@pytest.mark.parametrize("name", LAYERS)
def test_products_are_those_of_double_backward(name):
    difference, left = compare(*problem(LAYERS[name]))
    assert difference < 1e-10
    if name not in ("in place", "absolute", "sampled", "sparse"):
        assert left


@pytest.mark.parametrize(
    ("kind", "hook"),
    [(nn.Linear, lambda output: 2 * output), (nn.GELU, lambda output: output**2)],
)
def test_what_a_hook_on_all_modules_returns_is_no_layer(kind, hook):
    adapter, batch = problem(lambda: nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6)))
    handle = register_module_forward_hook(lambda module, _, output: hook(output) if isinstance(module, kind) else None)
    try:
        difference, left = compare(adapter, batch)
    finally:
        handle.remove()
    assert difference < 1e-10
    assert bool(left) == (kind is nn.Linear)


def test_a_patched_class_is_no_layer(monkeypatch):
    adapter, batch = problem(lambda: nn.Linear(6, 6))
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: F.linear(x, 2 * self.weight, self.bias))
    difference, left = compare(adapter, batch)
    assert difference < 1e-10
    assert "layer.weight" in left


def test_a_model_that_writes_into_its_input_leaves_the_data_alone():
    adapter, batch = image_problem(lambda: nn.Sequential(Centred(), nn.Flatten(), nn.Linear(192, 3)))
    before = adapter.input(batch).clone()
    assert adapter.loss(*(adapter.input(batch), batch.targets, batch.layout)) == adapter.loss(
        *(adapter.input(batch), batch.targets, batch.layout)
    )
    assert compare(adapter, batch)[0] < 1e-10
    assert torch.equal(adapter.input(batch), before)


class Centred(nn.Module):
    def forward(self, x):
        return x.sub_(0.5).div_(0.25)


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.GELU())

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


class Half(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.inner(x).to(x.dtype)


def test_a_checkpoint_runs_without_compact_graphs():
    """What it recomputes later has no hooks."""
    assert compare(*problem(Checkpointed))[0] < 1e-10


def test_a_layer_in_another_precision_goes_by_double_backward():
    adapter, batch = problem(Half)
    adapter.model.float()
    jacobian = GradientJacobian(adapter, adapter.batch(adapter.input(batch).float(), batch.targets))
    assert {"layer.inner.weight", "layer.inner.bias"} <= set(jacobian.by_autodiff)
