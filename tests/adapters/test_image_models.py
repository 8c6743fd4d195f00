"""The image classifiers of the I2F paper: sizes, initialisations, and derivatives of second order."""

import pytest
import torch

from lmleak.adapters import ARCHITECTURES, LeNet, adapt, image_model
from lmleak.adapters.image_initialization import INITIALIZATIONS
from lmleak.adapters.image_resnet import Bottleneck, CifarResNet, projection_shortcut
from lmleak.adapters.image_vit import SmallViT
from lmleak.errors import ConfigError, DataError
from lmleak.gradients import capture_gradient
from lmleak.influence import GradientJacobian

# Parameters by hand: e.g. linear 784 * 10 + 10; ResNet-20 of He et al. 0.27 M, ResNet-56 0.85 M.
PARAMETERS = {
    "linear": 7_850, "lenet": 17_038, "mlp-512": 784 * 512 + 512 + 5_130,
    "mlp-1024x2": 785 * 1024 + 1025 * 1024 + 10_250, "mlp-1024x4": 785 * 1024 + 3 * 1025 * 1024 + 10_250,
    "conv8": 2_904_970, "resnet20": 269_722, "resnet32": 464_154, "resnet56": 853_018, "resnet32-10": 46_113_450,
    "resnet18": 11_173_962, "resnet101": 42_512_970, "resnet152": 58_156_618, "vit-small": 4_371_438,
}  # fmt: skip
TINY = {"linear": (2, 3, 4), "lenet": (1, 5, 8), "mlp-512": (1, 3, 3), "mlp-1024x2": (1, 2, 2),
        "mlp-1024x4": (1, 2, 2), "conv8": (1, 9, 10), "resnet20": (1, 4, 5), "resnet56": (1, 4, 4),
        "resnet18": (3, 4, 4), "vit-small": (1, 4, 8)}  # fmt: skip


def images(shape, batch=2, seed=0):
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tiny_networks():
    """Every architecture on tiny images; those too large for that by a narrow network of the same blocks."""
    yield from ((name, image_model(name, shape, 3, seed=1)) for name, shape in TINY.items())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        narrow = CifarResNet(1, 3, (1, 1), width=3, block=Bottleneck, shortcut=projection_shortcut)
        narrow.image_shape = (1, 4, 4)
        yield "resnet-bottleneck", narrow
        vit = SmallViT((1, 4, 4), 3, patch=2, dim=6, depth=2, heads=2, head_dim=3, mlp=5)
        vit.image_shape = (1, 4, 4)
        yield "vit-narrow", vit


NETWORKS = dict(tiny_networks())


def train_statistics(model):
    """Give BatchNorm running statistics, scales and shifts other than those it starts with."""
    generator = torch.Generator().manual_seed(5)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            with torch.no_grad():
                module.running_mean.normal_(0, 0.2, generator=generator)
                module.running_var.uniform_(0.5, 2.0, generator=generator)
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.2, generator=generator)
    return model


def adapter_and_batch(name):
    adapter = adapt(train_statistics(NETWORKS[name]).double())
    return adapter, adapter.batch(images(adapter.image_shape), [0, 2])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_size_and_shape_of_every_model(name):
    shape = ARCHITECTURES[name].image_shape
    with torch.device("meta"):
        model = ARCHITECTURES[name].build(shape, 10)
        assert model(torch.empty(2, *shape)).shape == (2, 10)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def test_sizes_on_the_other_data_set():
    assert sum(p.numel() for p in image_model("lenet", (3, 32, 32)).parameters()) == 19_438
    state = image_model("resnet20").state_dict()
    assert sum(t.numel() for n, t in state.items() if "num_batches_tracked" not in n) == 271_098
    assert image_model("resnet18", (1, 28, 28), 7)(torch.zeros(1, 1, 28, 28)).shape == (1, 7)


def test_lenet_by_name_is_lenet():
    ours, theirs = image_model("lenet", seed=3), LeNet(seed=3)
    assert ours.image_shape == theirs.image_shape == (1, 28, 28)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("name", NETWORKS)
def test_gradient_equals_backward(name):
    adapter, batch = adapter_and_batch(name)
    shared = capture_gradient(adapter, batch, shared="all")
    model = NETWORKS[name].eval()
    model.zero_grad()
    torch.nn.functional.cross_entropy(model(batch.inputs["pixel_values"]), batch.targets).backward()
    for parameter_name, p in model.named_parameters():
        assert torch.allclose(shared.gradient[parameter_name], p.grad, rtol=1e-9, atol=1e-13), parameter_name


@pytest.mark.parametrize("name", NETWORKS)
def test_second_derivatives_equal_forward_over_reverse(name):
    """J^T v by forward mode over one reverse pass, which shares no code with the double backward; then J by <., .>."""
    adapter, batch = adapter_and_batch(name)
    x, theta = adapter.input(batch), adapter.parameters()
    jacobian = GradientJacobian(adapter, batch, shared="all")
    v, w = images(adapter.image_shape, seed=1), images(adapter.image_shape, seed=2)
    gradient = lambda x: torch.func.grad(lambda theta: adapter.loss(x, batch.targets, {}, theta))(theta)
    (_, along_v), (_, along_w) = (torch.func.jvp(gradient, (x,), (direction,)) for direction in (v, w))
    product = jacobian.rmatvec(v)
    scale = max(t.abs().max().item() for t in along_v.values())
    assert scale > 0
    for parameter_name, tangent in along_v.items():
        assert torch.allclose(product[parameter_name], tangent, rtol=1e-8, atol=1e-12 * scale), parameter_name
    expected = sum((along_v[n] * along_w[n]).sum() for n in along_v)
    bound = (
        sum(t.square().sum() for t in along_v.values()).sqrt() * sum(t.square().sum() for t in along_w.values()).sqrt()
    )
    assert abs((jacobian.gram(v) * w).sum() - expected) < 1e-10 * bound


@pytest.mark.parametrize("name", ["linear", "lenet", "mlp-512", "resnet-bottleneck", "vit-narrow"])
def test_gram_equals_dense(name):
    adapter, batch = adapter_and_batch(name)
    fast, dense = (
        GradientJacobian(adapter, batch, shared="all", implementation=i) for i in ("autodiff", "dense")
    )  # fmt: skip
    v = images(adapter.image_shape, seed=1)
    expected = dense.gram(v)
    assert torch.allclose(fast.gram(v), expected, rtol=1e-8, atol=1e-12 * expected.abs().max().item())


def test_batchnorm_of_an_adapter_does_not_mix_examples():
    adapter, batch = adapter_and_batch("resnet20")
    pixels = batch.inputs["pixel_values"]
    together = adapter.logits(pixels)
    alone = torch.cat([adapter.logits(pixels[:1]), adapter.logits(pixels[1:])])
    assert torch.allclose(together, alone, atol=1e-12)
    model = NETWORKS["resnet20"].train()
    before = model.bn1.running_mean.clone()
    adapter.logits(pixels)
    assert model.training
    assert torch.equal(model.bn1.running_mean, before)


def test_padded_shortcut_adds_zero_channels_on_both_sides():
    from lmleak.adapters.image_resnet import PaddedShortcut

    x = images((2, 4, 4))
    y = PaddedShortcut(2, 4, 2)(x)
    assert torch.equal(y[:, 1:3], x[:, :, ::2, ::2])
    assert y.shape == (2, 4, 2, 2)
    assert not y[:, [0, 3]].any()


def test_no_token_attends_to_itself():
    attention = NETWORKS["vit-narrow"].double().blocks[0]["attention"][1]
    x = images((5, 6))[:1, 0].expand(1, 5, 6).clone().requires_grad_()
    changed = x.detach().clone()
    changed[0, 2] += 1.0  # with equal queries, what token 2 says reaches every output but its own
    with torch.no_grad():
        difference = (attention(changed) - attention(x)).abs().amax(-1)[0]
    assert difference[[0, 1, 3, 4]].min() > 1e-6
    assert difference[2] < 1e-12


def test_images_of_another_size_are_refused_where_the_model_would_read_them():
    adapter = adapt(image_model("resnet20"))
    assert adapter.logits(torch.zeros(1, 3, 40, 40)).shape == (1, 10)
    with pytest.raises(DataError, match=r"known to read images of shape \(3, 32, 32\).* got \(3, 40, 40\)"):
        adapter.batch(torch.zeros(1, 3, 40, 40), [0])


# Initialisations ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "weight_std", "weight_max"),
    [("uniform", 0.5 / 3**0.5, 0.5), ("normal", 0.5, 5.0), ("kaiming", 784**-0.5, (3 / 784) ** 0.5),
     ("xavier", (2 / (784 + 512)) ** 0.5, (6 / (784 + 512)) ** 0.5), ("orthogonal", 784**-0.5, 1.0),
     ("default", 784**-0.5 / 3**0.5, 784**-0.5)],
)  # fmt: skip
def test_initialisations_have_their_moments(name, weight_std, weight_max):
    layer = image_model("mlp-512", initialization=name, seed=4)[1]
    assert layer.weight.shape == (512, 784)
    assert layer.weight.std().item() == pytest.approx(weight_std, rel=0.01)
    assert layer.weight.abs().max().item() <= weight_max * (1 + 1e-6)
    if name == "orthogonal":
        assert torch.allclose(layer.weight @ layer.weight.T, torch.eye(512), atol=1e-5)
        assert not layer.bias.any()
    elif name != "default":
        assert layer.bias.std().item() == pytest.approx(0.5 / 3**0.5, rel=0.1)
        assert layer.bias.abs().max() <= 0.5


@pytest.mark.parametrize("name", INITIALIZATIONS)
def test_the_seed_alone_decides_and_the_global_generator_stays(name):
    state = torch.random.get_rng_state()
    first, again, other = (image_model("conv8", (1, 9, 9), initialization=name, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    pairs = list(zip(first.parameters(), again.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not torch.equal(pairs[0][0], pairs[0][2])
    norms = [m for m in first.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(norms) == 8
    assert all((m.weight == 1).all() and (m.bias == 0).all() for m in norms)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"name": "lennet"}, "unknown architecture 'lennet'. Did you mean 'lenet'"),
        ({"name": "lenet", "initialization": "he"}, "unknown initialization 'he'"),
        ({"name": "lenet", "image_shape": (28, 28)}, "three positive integers"),
        ({"name": "lenet", "image_shape": (1, 0, 28)}, "three positive integers"),
        ({"name": "lenet", "num_classes": 1}, "at least 2, got 1"),
        ({"name": "lenet", "seed": 0.5}, "seed must be an integer"),
        ({"name": "conv8", "image_shape": (1, 8, 8)}, "at least 9x9"),
        ({"name": "vit-small", "image_shape": (1, 9, 8)}, "multiples of 4"),
    ],
)
def test_wrong_settings_are_refused(keywords, message):
    with pytest.raises(ConfigError, match=message):
        image_model(**keywords)
