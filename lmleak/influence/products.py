"""Ways to compute products with J = d g / d x for one batch; one meaning, tested against one another."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lmleak.errors import ConfigError, DataError

DENSE_LIMIT = 2**28  # numbers in a dense J: 1 GiB in float32
BLOCK_SIZE = 64  # most products in one pass; more gain nothing on a CPU and cost memory

Loss = Callable[[Mapping[str, Tensor], Tensor], Tensor]


class Products(ABC):
    """Products with J at one x. Vectors are shaped like x and theta; padding is the caller's business.

    Args:
        loss: The scalar loss as a function of (theta, x).
        theta: Shared parameters by name.
        x: The input.
        model: The module that the loss runs.
    """

    by_autodiff: tuple[str, ...] = ()
    """Parameters whose products go by double backward, parameter-sized tensors and all."""
    block_size: int = 1
    """Products A v that cost less in one batched pass than one by one; double backward gains next to nothing."""

    @abstractmethod
    def __init__(self, loss: Loss, theta: Mapping[str, Tensor], x: Tensor, model: nn.Module): ...

    @abstractmethod
    def matvec(self, delta: Mapping[str, Tensor]) -> Tensor:
        """Return J delta, shaped like x; names that ``delta`` lacks count as zero."""

    @abstractmethod
    def rmatvec(self, v: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Return J^T v for the named parameters."""

    def gram(self, v: Tensor, names: tuple[str, ...]) -> Tensor:
        """Return J J^T v over the named parameters."""
        return self.matvec(self.rmatvec(v, names))


class AutodiffProducts(Products):
    """Products by double backward on graphs that are built once. Works for any module; the reference.

    J delta = d/dx <g(x), delta> and J^T v = d/dtheta <dL/dx, v>; one first-order pass with a graph gives both
    g and dL/dx. The graphs stay in memory as long as this object: a few times one gradient's activations.
    """

    def __init__(self, loss, theta, x, model):
        self.x = x.detach().requires_grad_()
        self.theta = {n: p.detach().requires_grad_() for n, p in theta.items()}
        self.by_autodiff = tuple(theta)
        leaves = [*self.theta.values(), self.x]
        values = torch.autograd.grad(loss(self.theta, self.x), leaves, create_graph=True, allow_unused=True)
        *gradients, self.input_gradient = values
        # A parameter that the loss does not use has no gradient: its column of J is zero.
        self.gradient = {n: g for n, g in zip(self.theta, gradients, strict=True) if g is not None and g.requires_grad}
        if self.input_gradient is None or not self.gradient:
            raise DataError("the loss does not depend on x and on the shared parameters together, so J is zero")

    def matvec(self, delta):
        """Return J delta by differentiating <g, delta> in x."""
        # Of a model that a device_map spreads over several devices, each layer's part is where the layer is.
        pairs = [(self.gradient[n], d.to(self.gradient[n].device)) for n, d in delta.items() if n in self.gradient]
        if not pairs:
            return torch.zeros_like(self.x)
        gradients, directions = zip(*pairs, strict=True)
        (product,) = torch.autograd.grad(gradients, self.x, directions, retain_graph=True, allow_unused=True)
        return torch.zeros_like(self.x) if product is None else product

    def rmatvec(self, v, names):
        """Return J^T v by differentiating <dL/dx, v> in theta."""
        leaves = [self.theta[n] for n in names]
        values = torch.autograd.grad(self.input_gradient, leaves, v, retain_graph=True, allow_unused=True)
        return {n: torch.zeros_like(self.theta[n]) if p is None else p for n, p in zip(names, values, strict=True)}


class DenseProducts(Products):
    """Products with J as a matrix, its rows by forward over reverse differentiation. Small problems; the oracle."""

    CHUNK = 64  # rows differentiated at once

    def __init__(self, loss, theta, x, model):
        theta = {n: p.detach() for n, p in theta.items()}
        columns = sum(p.numel() for p in theta.values())
        if x.numel() * columns > DENSE_LIMIT:
            raise ConfigError(
                f"a dense J would hold {x.numel()} x {columns} numbers, more than {DENSE_LIMIT}; "
                "take products instead: implementation='factored', the default"
            )
        self.shape, self.block_size = x.shape, BLOCK_SIZE
        self.columns: dict[str, tuple[slice, torch.Size]] = {}
        start = 0
        for name, p in theta.items():
            self.columns[name] = (slice(start, start + p.numel()), p.shape)
            start += p.numel()
        gradient = torch.func.grad(loss)

        def row(direction):
            _, tangent = torch.func.jvp(lambda inputs: gradient(theta, inputs), (x.detach(),), (direction,))
            return torch.cat([tangent[n].reshape(-1) for n in theta])

        directions = torch.eye(x.numel(), dtype=x.dtype, device=x.device).reshape(-1, *x.shape)
        self.matrix = torch.func.vmap(row, chunk_size=self.CHUNK)(directions)  # (all coordinates of x, P)

    def matvec(self, delta):
        """Return J delta."""
        product = sum(self.matrix[:, self.columns[n][0]] @ d.reshape(-1) for n, d in delta.items())
        return product.reshape(self.shape) if delta else self.matrix.new_zeros(self.shape)

    def rmatvec(self, v, names):
        """Return J^T v."""
        flat = v.reshape(-1)
        return {n: (flat @ self.matrix[:, self.columns[n][0]]).reshape(self.columns[n][1]) for n in names}
