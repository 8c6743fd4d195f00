"""The image classifiers of the I2F paper (Zhang et al. 2023, arXiv:2309.13016), by name."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lmleak.adapters.image_initialization import initialize
from lmleak.adapters.image_resnet import Bottleneck, CifarResNet, projection_shortcut
from lmleak.adapters.image_vit import SmallViT
from lmleak.errors import ConfigError
from lmleak.lookup import lookup

ImageShape = tuple[int, int, int]


class LeNet(nn.Module):
    """The sigmoid network of the gradient-inversion papers.

    Four 5x5 convolutions of 12 channels (strides 2, 2, 1, 1, padding 2) and one linear layer: 17,038 parameters
    for 1x28x28. Source: Zhu et al. 2019, arXiv:1906.08935; used by Zhang et al. 2023, arXiv:2309.13016.

    Args:
        channels: Channels of the image.
        size: Height and width, one number if they are equal.
        num_classes: Classes.
        init_range: Weights and biases are drawn from U(-init_range, init_range), as in those papers.
        seed: Seed of that draw.
    """

    def __init__(
        self, channels: int = 1, size: int | tuple[int, int] = 28, num_classes: int = 10, *, init_range=0.5, seed=0
    ):
        super().__init__()
        height, width = (size, size) if isinstance(size, int) else size
        filters, strides = 12, (2, 2, 1, 1)
        inputs = (channels, filters, filters, filters)
        self.image_shape = (channels, height, width)
        features = filters * ((height + 3) // 4) * ((width + 3) // 4)  # two strides of 2, each rounding up
        with torch.random.fork_rng(devices=[]):  # torch's own initialisation draws from the global generator
            self.body = nn.Sequential()
            for i, stride in zip(inputs, strides, strict=True):
                self.body.extend([nn.Conv2d(i, filters, 5, stride=stride, padding=2), nn.Sigmoid()])
            self.fc = nn.Linear(features, num_classes)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.parameters():
                p.uniform_(-init_range, init_range, generator=generator)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits (B, num_classes)."""
        return self.fc(self.body(pixels).flatten(1))


def multilayer_perceptron(image_shape: ImageShape, num_classes: int, *, hidden: tuple[int, ...]) -> nn.Module:
    """Return linear layers on the flattened image with ReLU between; no hidden layer is the linear model."""
    channels, height, width = image_shape
    model, inputs = nn.Sequential(nn.Flatten()), channels * height * width
    for outputs in hidden:
        model.extend([nn.Linear(inputs, outputs), nn.ReLU()])
        inputs = outputs
    return model.append(nn.Linear(inputs, num_classes))


def conv8(image_shape: ImageShape, num_classes: int, *, width: int = 64) -> nn.Module:
    """Return eight 3x3 convolutions, each with BatchNorm and ReLU, 3x3 max-pooling after the sixth and the eighth.

    Channels are width times 1, 2, 2, 4, 4, 4, 4, 4. The ConvNet of Geiping et al. 2020, arXiv:2003.14053.

    Args:
        image_shape: (C, H, W).
        num_classes: Classes.
        width: Channels of the first convolution.

    Returns:
        The network.

    Raises:
        ConfigError: If nothing of the image would be left after both poolings.
    """
    inputs, height, side = image_shape
    if height < 9 or side < 9:
        raise ConfigError(f"conv8 pools 3x3 twice and reads images of at least 9x9 pixels, got {height}x{side}")
    model = nn.Sequential()
    for number, factor in enumerate((1, 2, 2, 4, 4, 4, 4, 4), 1):
        outputs = factor * width
        model.extend([nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()])
        if number in (6, 8):
            model.append(nn.MaxPool2d(3))
        inputs = outputs
    return model.extend([nn.Flatten(), nn.Linear(inputs * (height // 9) * (side // 9), num_classes)])


def _lenet(image_shape: ImageShape, num_classes: int) -> nn.Module:
    channels, *size = image_shape
    return LeNet(channels, tuple(size), num_classes)


def _resnet(image_shape: ImageShape, num_classes: int, **sizes) -> nn.Module:
    return CifarResNet(image_shape[0], num_classes, **sizes)


@dataclass(frozen=True)
class Architecture:
    """A network that can be made for any image shape."""

    build: Callable[[ImageShape, int], nn.Module]
    """(image_shape, num_classes) -> network."""
    image_shape: ImageShape
    """By default: that of MNIST or CIFAR."""
    initialization: str = "default"
    """By default. "uniform" where the papers say so and the network is trained or attacked from there; "default" in
    deep networks, whose activations a draw from U(-1/2, 1/2) would blow up."""


MNIST, CIFAR = (1, 28, 28), (3, 32, 32)
_option_b = partial(partial, _resnet, width=64, shortcut=projection_shortcut)
# "resnet32" is the CIFAR network of width 16; what Zhang et al. audit is ten times as wide, "resnet32-10".
ARCHITECTURES: dict[str, Architecture] = {
    "linear": Architecture(partial(multilayer_perceptron, hidden=()), MNIST, "uniform"),
    "lenet": Architecture(_lenet, MNIST, "uniform"),
    "mlp-512": Architecture(partial(multilayer_perceptron, hidden=(512,)), MNIST),
    "mlp-1024x2": Architecture(partial(multilayer_perceptron, hidden=(1024,) * 2), MNIST),
    "mlp-1024x4": Architecture(partial(multilayer_perceptron, hidden=(1024,) * 4), MNIST),
    "conv8": Architecture(conv8, CIFAR),
    "resnet20": Architecture(partial(_resnet, depths=(3, 3, 3), width=16), CIFAR),
    "resnet32": Architecture(partial(_resnet, depths=(5, 5, 5), width=16), CIFAR),
    "resnet56": Architecture(partial(_resnet, depths=(9, 9, 9), width=16), CIFAR),
    "resnet32-10": Architecture(partial(_resnet, depths=(5, 5, 5), width=160), CIFAR),
    "resnet18": Architecture(_option_b(depths=(2, 2, 2, 2)), CIFAR),
    "resnet101": Architecture(_option_b(depths=(3, 4, 23, 3), block=Bottleneck), CIFAR),
    "resnet152": Architecture(_option_b(depths=(3, 8, 36, 3), block=Bottleneck), CIFAR),
    "vit-small": Architecture(SmallViT, CIFAR),
}


def image_model(
    name: str,
    image_shape: ImageShape | None = None,
    num_classes: int = 10,
    *,
    initialization: str | None = None,
    seed: int = 0,
) -> nn.Module:
    """Make an untrained image classifier.

    A network with BatchNorm that has never been trained normalises nothing in evaluation mode, which adapters use: its
    running mean is 0 and its running variance 1.

    Args:
        name: One of ``ARCHITECTURES``.
        image_shape: (C, H, W); None: 1x28x28 for linear, lenet and the MLPs, 3x32x32 for the others.
        num_classes: Classes.
        initialization: One of ``INITIALIZATIONS``; None: what ``ARCHITECTURES`` says.
        seed: Seed of the weights; the global generator is not touched.

    Returns:
        The network in float32 on the CPU, which carries ``image_shape``.

    Raises:
        ConfigError: If a name is unknown, or the architecture cannot read such images.
    """
    architecture = lookup("architecture", name, ARCHITECTURES)
    shape = architecture.image_shape if image_shape is None else tuple(image_shape)
    if len(shape) != 3 or not all(_is_count(n) and n > 0 for n in shape):
        raise ConfigError(f"image_shape must be three positive integers (C, H, W), got {image_shape!r}")
    if not _is_count(num_classes) or num_classes < 2:
        raise ConfigError(f"num_classes must be an integer of at least 2, got {num_classes!r}")
    if not _is_count(seed):
        raise ConfigError(f"seed must be an integer, got {seed!r}")
    with torch.random.fork_rng(devices=[]):  # torch's own initialisation draws from the global generator
        torch.default_generator.manual_seed(seed)
        model = architecture.build(shape, num_classes)
    initialize(model, initialization or architecture.initialization, seed)
    model.image_shape = shape
    return model


def _is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
