r"""Class labels of images, read off the gradient of the last layer.

With p the predicted probabilities, y the one-hot labels and h the last layer's inputs, over B images

    db = (1/B) sum_i (p_i - y_i),        dW = (1/B) sum_i (p_i - y_i) h_i^T.

One image (iDLG, Zhao et al. 2020, arXiv:2001.02610, eq. 4-5): only the label's entry of db is negative. Without a
bias, its row of dW has the largest norm, because |p_y - 1| = sum_{k != y} p_k. Several images:

    count_k = B (mean p_k - db_k),  0 <= mean p_k <= 1,  so  ceil(-B db_k) <= count_k <= floor(B (1 - db_k)),

and within these bounds counts are estimated with the mean prediction over random images, as LLG does (Wainakh et al.
2022, arXiv:2105.09369, which does it for heads without a bias). Without a bias, db is read as dW u, with u along the
mean of h over random images and u . mean(h) = 1. A label whose bound is at least 1 is certain; labels that are all
distinct are often certain together (as in GradInversion, Yin et al. 2021, arXiv:2104.07586).
"""

from dataclasses import dataclass
from math import ceil, floor

import torch
from torch import Tensor

from lmleak.adapters.structure import is_linear, weight_rows
from lmleak.adapters.vision import VisionAdapter
from lmleak.gradients.readout_targets import TOLERANCE, round_to_sum
from lmleak.types import Observation

GUESSES = 64
"""Random images over which predictions and the last layer's inputs are averaged."""


@dataclass(frozen=True)
class ImageLabels:
    """How many images have each label. Which image has which does not show."""

    counts: Tensor | None
    """(classes,) integers that sum to B; None if the gradient does not tell."""
    exact: bool
    """Whether the counts follow from a clean gradient; otherwise predictions on random images were used."""
    reason: str
    """Where they were read, or why they cannot be."""

    def assignment(self, observation: Observation) -> Tensor | None:
        """Return one label per image, (B,), in ascending order; None if undecided.

        The order is free in one step of one client. Clients and local steps take certain images each, and which
        labels go together there does not show, unless all are alike.

        Args:
            observation: What the counts were read off.

        Returns:
            The labels.
        """
        if self.counts is None:
            return None
        labels = torch.repeat_interleave(torch.arange(len(self.counts)), self.counts.cpu())
        single = observation.aggregation.clients == observation.aggregation.steps == 1
        return labels if single or int(self.counts.max()) == len(labels) else None


@dataclass(frozen=True)
class LastLayer:
    """The linear map that puts out the logits."""

    weight: str
    bias: str | None
    module: torch.nn.Module
    inputs: Tensor
    """(GUESSES, d) its inputs h on random images."""
    probabilities: Tensor
    """(GUESSES, classes) predictions there."""


def class_labels(adapter: VisionAdapter, observation: Observation, *, seed: int = 0) -> ImageLabels:
    """Return the label counts of a batch of images.

    Under noise, compression and local steps the counts are estimates and the bounds need not hold.

    Args:
        adapter: The model.
        observation: The released gradient.
        seed: Draws the random images.

    Returns:
        The counts.
    """
    layer = last_layer(adapter, seed=seed)
    if layer is None:
        return ImageLabels(None, False, f"{adapter.name} puts out its logits by no linear map that is known")
    bias, weight = observation.gradient.get(layer.bias), observation.gradient.get(layer.weight)
    if bias is None and weight is None:
        return ImageLabels(None, False, f"the gradient of the last layer, {layer.weight!r}, is not released")
    size, clean = observation.batch_size, observation.aggregation.steps == 1 and not observation.defenses
    mean = layer.inputs.mean(0)
    if bias is not None:
        slope, source = size * bias.double().cpu(), layer.bias
    elif not mean.any():
        return ImageLabels(
            None, False, f"the bias of the last layer is not released, and {layer.weight!r} tells nothing"
        )
    else:
        rows = weight_rows(layer.module, weight.double().cpu())
        slope, source = size * (rows @ (mean / mean.square().sum())), layer.weight
    classes = len(slope)
    if size == 1:
        by_norm = bias is None and classes > 2
        label = rows.norm(dim=1).argmax() if by_norm else slope.argmin()
        exact = clean and (bias is not None or by_norm)
        return ImageLabels(torch.bincount(label[None], minlength=classes), exact, f"read off {source!r}")
    least = torch.tensor([min(size, max(0, ceil(-s - TOLERANCE))) for s in slope.tolist()])
    most = torch.tensor([max(0, min(size, floor(size - s + TOLERANCE))) for s in slope.tolist()])
    values = size * layer.probabilities.mean(0) - slope
    if bias is not None:
        values = values.clamp(least, torch.maximum(least, most))
    exact = clean and bias is not None and bool((least.sum() == size) | (most.sum() == size))
    reason = f"read off {source!r}" + (
        "" if exact else ", with the model's mean prediction guessed from random images"
    )
    return ImageLabels(round_to_sum(values, size), exact, reason)


@torch.no_grad()
def last_layer(adapter: VisionAdapter, *, seed: int) -> LastLayer | None:
    """Return the linear map whose output is the logits, with its inputs on random valid images; None if there is none.

    Args:
        adapter: The model.
        seed: Draws the images, uniform between black and white.

    Returns:
        The layer.
    """
    generator = torch.Generator().manual_seed(seed)
    low, high = adapter.valid_range()
    uniform = torch.rand(GUESSES, *adapter.image_shape, generator=generator, dtype=adapter.dtype).to(adapter.device)
    calls: list[tuple[str, torch.nn.Module, Tensor, Tensor]] = []

    def record(path):
        return lambda module, arguments, output: calls.append((path, module, arguments[0], output))

    handles = [m.register_forward_hook(record(path)) for path, m in adapter.model.named_modules() if is_linear(m)]
    try:
        logits = adapter.logits(low + (high - low) * uniform)
    finally:
        for handle in handles:
            handle.remove()
    for path, module, inputs, output in reversed(calls):
        if output.shape == logits.shape and torch.equal(output, logits):
            return LastLayer(
                weight=f"{path}.weight".removeprefix("."),
                bias=f"{path}.bias".removeprefix(".") if module.bias is not None else None,
                module=module,
                inputs=inputs.double().cpu(),
                probabilities=logits.double().softmax(-1).cpu(),
            )
    return None
