"""Image classifiers: x is the normalised pixel tensor (B, C, H, W)."""

from collections.abc import Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmleak.adapters.base import ModelAdapter, Prior
from lmleak.adapters.checks import refuse_other_losses
from lmleak.adapters.precision import KeepDouble
from lmleak.adapters.targets import IMAGE_TASK
from lmleak.errors import DataError, UnsupportedModelError
from lmleak.types import Batch, Normalization


class VisionAdapter(ModelAdapter):
    """An image classifier that maps (B, C, H, W) to logits (B, classes), or to an output with ``.logits``.

    BatchNorm runs in evaluation mode, by its running mean m and variance v: y = scale (x - m) / sqrt(v + eps) + shift,
    the same for every batch, so examples do not mix and a gradient is the mean of those of its examples. This is what
    the published attacks assume. A client in training mode normalises by the statistics of its own batch instead: the
    output for an example then depends on all others, and so does J. What is computed here is neither the gradient
    that such a client shares nor its risk. Such clients often send their running averages too, which tell the means
    and variances of every layer's activations: a leak of its own that nothing here counts. A network that has
    never been trained (m = 0, v = 1) normalises nothing in evaluation mode.

    Pooling by the mean is linear and loses no second derivative. Pooling by the maximum, like ReLU, passes derivatives
    through the winner alone: J is exact inside the region where the winners (and the signs) stay, and a
    perturbation that crosses its boundary sees another J, so the first-order error holds for small perturbations only.

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
        task: str = IMAGE_TASK,
        name: str = "",
        image_shape: tuple[int, int, int] | None = None,
        normalization: Normalization | None = None,
    ):
        super().__init__(model, task=task, name=name or getattr(model, "name_or_path", ""))
        if hasattr(getattr(model, "config", None), "num_labels"):
            refuse_other_losses(self.model)
        if hasattr(self.model, "set_attn_implementation"):
            # Fused attention kernels have neither a double backward nor forward derivatives.
            self.model.set_attn_implementation("eager")
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
        keep_precision = KeepDouble() if self.dtype == torch.float64 else nullcontext()
        with keep_precision:
            output = torch.func.functional_call(self.model, dict(parameters or {}), (x.clone(),))  # some write into it
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
        if self._image_shape is not None and pixels.shape[1:] != self.image_shape:
            raise DataError(
                f"{self.name} is known to read images of shape {self.image_shape}, so an attacker would seek those; "
                f"got {tuple(pixels.shape[1:])}; resize them, or write adapt(model, image_shape=...)"
            )
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
