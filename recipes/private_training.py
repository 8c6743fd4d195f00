"""Training by noisy gradients of single examples: what the studies of defenses on images share.

Every step some clients each release the gradient of their examples, defended; the server steps by the mean.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import t as student
from torch import Tensor
from torch.func import grad, jacfwd, vmap

from lmleak.adapters import VisionAdapter
from lmleak.data.images import ImageData
from lmleak.defenses import derived_seed
from lmleak.errors import DataError

EVALUATED_TOGETHER = 256


class FlatGradients:
    """Gradients of single examples as vectors, all parameters in the model's order.

    Args:
        adapter: The model; steps of an optimiser on its parameters are seen.
    """

    def __init__(self, adapter: VisionAdapter):
        self.adapter = adapter
        self.parameters = {n: p for n, p in adapter.model.named_parameters() if p.requires_grad}
        self.size = sum(p.numel() for p in self.parameters.values())

    def _gradient(self, image: Tensor, label: Tensor) -> Tensor:
        parameters = {n: p.detach() for n, p in self.parameters.items()}
        loss = lambda theta: self.adapter.loss(image[None], label[None], {}, theta)
        return torch.cat([g.reshape(-1) for g in grad(loss)(parameters).values()])

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the gradients (n, P) of n examples (n, C, H, W)."""
        return vmap(self._gradient)(images, labels)

    def jacobians(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return J of each example, (n, dx, P)."""
        return vmap(jacfwd(self._gradient))(images, labels).flatten(2).transpose(1, 2)

    def set_gradient(self, flat: Tensor) -> None:
        """Give every parameter its part of a vector (P,) as its gradient."""
        parts = flat.split([p.numel() for p in self.parameters.values()])
        for parameter, part in zip(self.parameters.values(), parts, strict=True):
            parameter.grad = part.reshape(parameter.shape).to(parameter)


@dataclass(frozen=True)
class Split:
    """Images of one part of the data, normalised, with their labels."""

    images: Tensor
    labels: Tensor


def splits(adapter: VisionAdapter, data: ImageData, skip: int, sizes: Sequence[int], seed: int) -> list[Split]:
    """Return disjoint parts of the data, without its first ``skip`` images, in an order drawn from the seed."""
    if skip + sum(sizes) > len(data):
        raise DataError(f"{data.name} holds {len(data)} image(s), and {skip + sum(sizes)} are asked for")
    order = skip + torch.randperm(len(data) - skip, generator=torch.Generator().manual_seed(seed))
    parts = order[: sum(sizes)].split(list(sizes))
    device, dtype = adapter.device, adapter.dtype
    pixels = [adapter.normalization.normalize(data.pixels[part].to(device, dtype)) for part in parts]
    return [Split(x, data.labels[part].to(device)) for x, part in zip(pixels, parts, strict=True)]


def train(
    adapter: VisionAdapter,
    update: Callable[[FlatGradients, int], Tensor],
    *,
    steps: int,
    learning_rate: float,
) -> None:
    """Train the adapter's own model by Adam on what ``update`` returns at each step, a vector (P,).

    A run whose update is not finite ends there.
    """
    flat = FlatGradients(adapter)
    optimizer = torch.optim.Adam(flat.parameters.values(), lr=learning_rate)
    for step in range(steps):
        direction = update(flat, step)
        if not direction.isfinite().all():
            return
        flat.set_gradient(direction)
        optimizer.step()


def accuracy(adapter: VisionAdapter, test: Split) -> float:
    """Return the share of images whose class the model finds likeliest."""
    with torch.no_grad():
        parts = zip(test.images.split(EVALUATED_TOGETHER), test.labels.split(EVALUATED_TOGETHER), strict=True)
        right = sum((adapter.logits(x).argmax(-1) == y).sum().item() for x, y in parts)
    return right / len(test.labels)


def generator_of(seed: int, stream: int) -> torch.Generator:
    """Return the generator of one random stream."""
    return torch.Generator().manual_seed(derived_seed(seed, stream))


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return mean and Student's 95 % interval over independent values; no interval (nan) of a single one."""
    values = np.asarray(values, dtype=float)
    mean = values.mean().item()
    if len(values) < 2:
        return mean, math.nan, math.nan
    half = student.ppf(0.975, len(values) - 1) * values.std(ddof=1).item() / math.sqrt(len(values))
    return mean, mean - half, mean + half
