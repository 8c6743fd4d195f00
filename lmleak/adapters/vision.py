"""Image classifiers: x is the normalised pixel tensor (B, C, H, W)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmleak.adapters.base import ModelAdapter, Prior
from lmleak.errors import DataError, UnsupportedModelError
from lmleak.types import Batch, Normalization


class VisionAdapter(ModelAdapter):
    """An image classifier that maps (B, C, H, W) to logits (B, classes), or to an output with ``.logits``.

    Args:
        model: The classifier.
        task: "image-classification".
        name: Name for people.
        image_shape: (C, H, W) of what it reads; None takes the model's own ``image_shape``, or what the configuration
            of a transformers model says. Everyone who knows the model knows it.
        normalization: How pixel values become what it reads; None takes the model's own ``normalization``, else none.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        task: str = "image-classification",
        name: str = "",
        image_shape: tuple[int, int, int] | None = None,
        normalization: Normalization | None = None,
    ):
        super().__init__(model, task=task, name=name)
        self._image_shape = image_shape or getattr(model, "image_shape", None) or _shape_of_config(model)
        self.normalization = normalization or getattr(model, "normalization", None) or Normalization()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images that the model reads.

        Raises:
            UnsupportedModelError: If nobody said it and the model does not.
        """
        if self._image_shape is None:
            raise UnsupportedModelError(
                f"{self.name} does not say which images it reads; write adapt(model, image_shape=(C, H, W))"
            )
        return tuple(self._image_shape)

    def valid_range(self) -> tuple[Tensor, Tensor]:
        """Return what black and white pixels become, two tensors that broadcast to x: no image lies outside."""
        zeros = torch.zeros(*self.image_shape, dtype=self.dtype, device=self.device)
        return self.normalization.normalize(zeros), self.normalization.normalize(zeros + 1)

    def input(self, batch: Batch) -> Tensor:
        """Return the pixels."""
        return batch.inputs["pixel_values"]

    def free(self, batch: Batch) -> Tensor:
        """Return True everywhere: every pixel is private."""
        return torch.ones_like(batch.inputs["pixel_values"], dtype=torch.bool)

    def prior(self) -> Prior:
        """Return mean 0 and deviation 1, what normalisation aims at."""
        return Prior(torch.zeros((), dtype=self.dtype, device=self.device), 1.0)

    def logits(self, x: Tensor, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the logits (B, classes)."""
        output = torch.func.functional_call(self.model, dict(parameters or {}), (x,))
        return getattr(output, "logits", output)

    def loss(
        self,
        x: Tensor,
        targets: Tensor,
        layout: Mapping[str, Tensor],
        parameters: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Return the mean cross-entropy over the batch, in nats; targets are classes or probabilities."""
        return F.cross_entropy(self.logits(x, parameters), targets)

    def batch(self, examples: Tensor, labels=None) -> Batch:
        """Return the batch.

        Args:
            examples: Normalised pixels (B, C, H, W).
            labels: One class per image.

        Returns:
            The batch in the model's dtype and on its device.

        Raises:
            DataError: On wrong shapes, non-finite pixels or labels out of range.
        """
        if not isinstance(examples, Tensor) or examples.dim() != 4 or not len(examples):
            got = tuple(examples.shape) if isinstance(examples, Tensor) else type(examples).__name__
            raise DataError(f"expected pixel_values (B, C, H, W), got {got}")
        if not examples.is_floating_point():
            raise DataError(f"expected normalised pixels in floating point, got {examples.dtype}")
        if not torch.isfinite(examples).all():
            raise DataError("the pixels hold NaN or Inf")
        pixels = examples.to(self.device, self.dtype)
        try:
            with torch.no_grad():
                num_classes = self.logits(pixels[:1]).shape[-1]
        except RuntimeError as error:
            raise DataError(f"{self.name} cannot read pixels of shape {tuple(examples.shape)}: {error}") from error
        return Batch({"pixel_values": pixels}, self.check_labels(labels, len(examples), num_classes))

    def roles(self) -> dict[str, tuple[str, ...]]:
        """Return parameter names by the module that owns them, in the model's order."""
        modules: dict[str, list[str]] = {}
        for name in self.parameters():
            modules.setdefault(name.rpartition(".")[0] or name, []).append(name)
        return {module: tuple(names) for module, names in modules.items()}


def _shape_of_config(model: nn.Module) -> tuple[int, int, int] | None:
    """Return (C, H, W) by the configuration of a transformers image classifier."""
    config = getattr(model, "config", None)
    channels, size = getattr(config, "num_channels", None), getattr(config, "image_size", None)
    if channels is None or size is None:
        return None
    return (channels, *size) if isinstance(size, list | tuple) else (channels, size, size)


class LeNet(nn.Module):
    """The sigmoid network of the gradient-inversion papers.

    Four 5x5 convolutions of 12 channels (strides 2, 2, 1, 1, padding 2) and one linear layer: 17,038 parameters
    for 1x28x28. Source: Zhu et al. 2019, arXiv:1906.08935; used by Zhang et al. 2023, arXiv:2309.13016.

    Args:
        channels: Channels of the image.
        size: Height and width.
        num_classes: Classes.
        init_range: Weights and biases are drawn from U(-init_range, init_range), as in those papers.
        seed: Seed of that draw.
    """

    def __init__(self, channels: int = 1, size: int = 28, num_classes: int = 10, *, init_range=0.5, seed: int = 0):
        super().__init__()
        width, strides = 12, (2, 2, 1, 1)
        inputs = (channels, width, width, width)
        self.image_shape = (channels, size, size)
        side = (size + 3) // 4  # two convolutions of stride 2, each rounding up
        with torch.random.fork_rng(devices=[]):  # torch's own initialisation draws from the global generator
            self.body = nn.Sequential()
            for i, stride in zip(inputs, strides, strict=True):
                self.body.extend([nn.Conv2d(i, width, 5, stride=stride, padding=2), nn.Sigmoid()])
            self.fc = nn.Linear(width * side * side, num_classes)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.parameters():
                p.uniform_(-init_range, init_range, generator=generator)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits (B, num_classes)."""
        return self.fc(self.body(pixels).flatten(1))
