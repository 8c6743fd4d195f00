"""The proof that the layer is shared: images go through the same base, operator and influence function."""

import pytest
import torch

from lmleak.adapters import LeNet, ModelAdapter, VisionAdapter, adapt
from lmleak.errors import DataError, UnsupportedModelError
from lmleak.gradients import capture_gradient
from lmleak.influence import GradientJacobian, inversion_influence


def pixels(batch=2, channels=1, size=28, seed=0):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("channels", "size", "parameters"), [(1, 28, 17_038), (3, 32, 19_438)])
def test_lenet_has_the_published_number_of_parameters(channels, size, parameters):
    model = LeNet(channels, size)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model(pixels(2, channels, size)).shape == (2, 10)
    assert max(p.abs().max().item() for p in model.parameters()) <= 0.5


@pytest.mark.parametrize("size", [8, 9, 10, 11, 27, 31])
def test_lenet_takes_any_size(size):
    assert LeNet(size=size, num_classes=3)(pixels(1, size=size)).shape == (1, 3)


def test_gradient_equals_backward():
    model = LeNet().double()
    adapter = adapt(model)
    assert isinstance(adapter, VisionAdapter)
    assert isinstance(adapter, ModelAdapter)
    assert adapter.task == "image-classification"
    batch = adapter.batch(pixels(), [3, 9])
    shared = capture_gradient(adapter, batch, shared="all")
    torch.nn.functional.cross_entropy(model(pixels().double()), torch.tensor([3, 9])).backward()
    assert all(torch.allclose(shared.gradient[n], p.grad, rtol=1e-10, atol=1e-14) for n, p in model.named_parameters())
    assert shared.labels.tolist() == [3, 9]
    assert not shared.layout


def test_operator_and_influence_are_those_of_the_base():
    adapter = adapt(LeNet(size=8).double())
    batch = adapter.batch(pixels(2, size=8), [3, 9])
    fast, dense = (GradientJacobian(adapter, batch, implementation=i) for i in ("autodiff", "dense"))
    assert fast.shape == (128, sum(p.numel() for p in adapter.parameters().values()))
    v = pixels(2, size=8, seed=1).double()
    assert torch.allclose(fast.gram(v), dense.gram(v), rtol=1e-8)
    result = inversion_influence(adapter, batch, noise_std=1e-3, damping=1e-4)
    assert result.converged
    assert 0 < result.lower_bound.l2 <= result.cg_bounds[0] * (1 + 1e-9)
    assert result.error.shape == batch.inputs["pixel_values"].shape


def test_roles_are_the_modules():
    roles = adapt(LeNet()).roles()
    assert list(roles) == ["body.0", "body.2", "body.4", "body.6", "fc"]
    assert roles["fc"] == ("fc.weight", "fc.bias")
    assert adapt(LeNet()).select("^fc").names == roles["fc"]


def test_outputs_with_logits_are_read():
    class Output(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = LeNet()

        def forward(self, x):
            from types import SimpleNamespace

            return SimpleNamespace(logits=self.net(x))

    plain, wrapped = adapt(LeNet()), adapt(Output())
    assert torch.equal(plain.logits(pixels()), wrapped.logits(pixels()))


def test_pixels_take_the_dtype_of_the_model():
    batch = adapt(LeNet().double()).batch(pixels(), [0, 1])
    assert batch.inputs["pixel_values"].dtype == torch.float64


@pytest.mark.parametrize(
    ("examples", "labels", "message"),
    [
        (pixels(1)[0], [0], r"\(B, C, H, W\), got \(1, 28, 28\)"),
        (pixels(0), [], r"got \(0, 1, 28, 28\)"),
        ([[1.0]], [0], "got list"),
        (pixels(1, 3), [0], r"cannot read pixels of shape \(1, 3, 28, 28\)"),
        (pixels(1, 1, 30), [0], "cannot read pixels"),
        (pixels(1).byte(), [0], "floating point, got torch.uint8"),
        (pixels(1) * torch.inf, [0], "NaN or Inf"),
        (pixels(1) * torch.nan, [0], "NaN or Inf"),
        (pixels(2), [0], "1 labels for 2 examples"),
        (pixels(2), None, "needs labels="),
        (pixels(2), [0, 10], "out of range: this model has classes 0 to 9"),
    ],
)
def test_bad_images_are_refused(examples, labels, message):
    with pytest.raises(DataError, match=message):
        adapt(LeNet()).batch(examples, labels)


def test_an_image_model_in_half_precision_is_refused():
    with pytest.raises(UnsupportedModelError, match="float32 or float64"):
        adapt(LeNet().half())
