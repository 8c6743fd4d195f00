"""A convolution's weight gradient as a factor: grouped or not, in one to three dimensions, whatever it is padded with.

The gradient is bilinear in the padded input X and the gradient G by the output, and each of the three ways to hold one
of (X, W, G) against the other two is a convolution itself. With products of the kernel's size (first layers, depthwise
layers: kernels are small and positions many) that is all there is to do. Where the kernel is larger than its positions
are many (last layers) X is unfolded into patches, and each group is a linear map of its own, whose products are formed
by position. Unfolding everywhere took 1.2 to 1.6 times as long on ResNet-18, ResNet-20 and MobileNet's blocks, and up
to 1.4 times the memory. Double backward takes 0.8 to 0.9 of the time where all kernels are small (LeNet, ResNet-20),
and 1.3 to 1.4 times as long on ResNet-18.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmleak.influence.factors import Factor, LinearFactor, positions_are_cheaper

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def convolution_factor(module: nn.Module, x: Tensor, g: Tensor) -> Factor:
    """Return the factor of a convolution's weight, by positions or by kernels, whatever is cheaper.

    Args:
        module: One of ``CONVOLUTIONS``.
        x: (N, C_in, ...) its input.
        g: (N, C_out, ...) gradients by its output.
    """
    if isinstance(module.padding, str) or module.padding_mode != "zeros":
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x, padding = F.pad(x, module._reversed_padding_repeated_twice, mode=mode), (0,) * (x.dim() - 2)
    else:
        padding = module.padding
    positions, d_in = g.numel() // g.shape[1], math.prod(module.weight.shape[1:])
    if x.dim() < 5 and positions_are_cheaper(positions, d_in, g.shape[1] // module.groups):
        return PatchFactor(x, g, module, padding)
    return KernelFactor(x, g, module, padding)


class KernelFactor(Factor):
    """dL/dW of a convolution, by convolutions.

    Args:
        x: (N, C_in, ...) inputs.
        g: (N, C_out, ...) gradients by the output.
        module: The convolution.
        padding: What is left to pad with zeros, per axis.
    """

    def __init__(self, x: Tensor, g: Tensor, module: nn.Module, padding: tuple[int, ...]):
        super().__init__(x, g)
        self.weight = module.weight.detach()  # only its shape matters
        axes = x.dim() - 2
        self.settings = (module.stride, padding, module.dilation, False, (0,) * axes, module.groups)

    def tangent(self, primes):
        """Return X * G' + X' * G, correlated over examples and positions."""
        (x, g), (x_prime, g_prime) = self.values, primes
        inputs, slopes = torch.cat([x, x_prime]), torch.cat([g_prime, g])  # two examples, whose gradients add up
        only_weight = (False, True, False)
        return torch.ops.aten.convolution_backward(slopes, inputs, self.weight, None, *self.settings, only_weight)[1]

    def cotangent(self, theta):
        """Return G spread by the kernel W', and the convolution of X with W'."""
        x, g = self.values
        on_x, _, _ = torch.ops.aten.convolution_backward(g, x, theta, None, *self.settings, (True, False, False))
        return on_x, torch.ops.aten.convolution(x, theta, None, *self.settings)


class PatchFactor(LinearFactor):
    """dL/dW of a convolution in one or two dimensions, as linear maps of unfolded patches, one map per group.

    Args:
        x: (N, C_in, ...) inputs.
        g: (N, C_out, ...) gradients by the output.
        module: The convolution.
        padding: What is left to pad with zeros, per axis.
    """

    def __init__(self, x: Tensor, g: Tensor, module: nn.Module, padding: tuple[int, ...]):
        settings = [module.kernel_size, module.dilation, padding, module.stride]
        if x.dim() == 3:  # one row of pixels
            x, settings = x.unsqueeze(2), [(first, *rest) for first, rest in zip((1, 1, 0, 1), settings, strict=True)]
        patches = F.unfold(x, *settings)  # (N, C_in k, L)
        super().__init__(
            _by_group(patches, module.groups), _by_group(g.flatten(2), module.groups),
            shape=module.weight.shape, grouped=True,
        )  # fmt: skip


def _by_group(tensor: Tensor, groups: int) -> Tensor:
    """Return (N, groups * d, L) as (groups, N, L, d)."""
    return tensor.unflatten(1, (groups, -1)).permute(1, 0, 3, 2)
