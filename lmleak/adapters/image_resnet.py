"""Residual networks for small images: a 3x3 stem, no pooling before the last layer.

Source: He et al. 2016, arXiv:1512.03385. Its section 4.2 gives the networks of three stages for CIFAR (20, 32, 56
layers, shortcuts without parameters, "option A"); those of four stages (18, 101, 152) are its ImageNet networks with
the stem of the former and projections as shortcuts ("option B"). Zhang et al. 2023 (arXiv:2309.13016) audit both
kinds; the code they build on puts projections into the former too. Parameter names are those of the public CIFAR
checkpoints.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F


class PaddedShortcut(nn.Module):
    """Option A: every second pixel, and zeros for the channels that are new. It has no parameters.

    Args:
        inputs: Channels that come in.
        outputs: Channels that go out.
        stride: Every how many pixels one is kept.
    """

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.stride, self.before, self.after = stride, (outputs - inputs) // 2, (outputs - inputs + 1) // 2

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, outputs, H / stride, W / stride)."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


def projection_shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    """Return option B: a 1x1 convolution with BatchNorm."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut.

    Args:
        inputs: Channels that come in.
        width: Channels inside; ``expansion * width`` go out.
        stride: Of the first convolution.
        shortcut: Makes the shortcut where shapes change.
    """

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, shortcut):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        same = stride == 1 and inputs == width
        self.shortcut = nn.Identity() if same else shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, width, H / stride, W / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """Convolutions of 1x1, 3x3 and 1x1, the last four times as wide, beside a shortcut.

    Args:
        inputs: Channels that come in.
        width: Channels inside; ``expansion * width`` go out.
        stride: Of the 3x3 convolution.
        shortcut: Makes the shortcut where shapes change.
    """

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, shortcut):
        super().__init__()
        outputs = self.expansion * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, 4 width, H / stride, W / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """Stages of residual blocks, each stage twice as wide and half as high as the one before; then the mean.

    Args:
        channels: Channels of the image.
        num_classes: Classes.
        depths: Blocks per stage.
        width: Channels of the first stage.
        block: ``BasicBlock`` or ``Bottleneck``.
        shortcut: ``PaddedShortcut`` (option A) or ``projection_shortcut`` (option B).
    """

    def __init__(
        self, channels: int, num_classes: int, depths: Sequence[int], *, width: int, block=BasicBlock,
        shortcut=PaddedShortcut,
    ):  # fmt: skip
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.stages = [f"layer{i}" for i in range(1, len(depths) + 1)]
        inputs = width
        for i, (name, depth) in enumerate(zip(self.stages, depths, strict=True)):
            stage = nn.Sequential()
            for j in range(depth):
                stage.append(block(inputs, width * 2**i, 2 if i and not j else 1, shortcut))
                inputs = block.expansion * width * 2**i
            self.add_module(name, stage)
        self.linear = nn.Linear(inputs, num_classes)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits (B, num_classes)."""
        x = F.relu(self.bn1(self.conv1(pixels)))
        for name in self.stages:
            x = self.get_submodule(name)(x)
        return self.linear(x.mean((2, 3)))
