"""The scores of recovered images against the private batch, in total and per private image."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from math import isfinite
from statistics import fmean

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from lmleak.adapters.vision import VisionAdapter
from lmleak.errors import DataError
from lmleak.gradients import SharedGradient
from lmleak.gradients.aggregate import update_of
from lmleak.metrics.image import mse, psnr, ssim
from lmleak.types import Batch, ImageReconstruction, Normalization


@dataclass(frozen=True)
class ImageScores:
    """The numbers; None where an attack diverged to NaN, Inf or an error that overflows."""

    mse: float | None
    """``||x' - x||^2 / dx`` in squared model-input units (normalised pixels), as recovered, not clipped."""
    rmse: float | None
    """Error per coordinate in model-input units, comparable with ``rms`` of an influence, never with ``l2``."""
    rmse_pixel: float | None
    """The same in pixel values (white - black = 1), not clipped."""
    psnr: float | None
    """Peak signal-to-noise ratio in dB: pixel values, recovered ones clipped to [0, 1] (:func:`psnr`)."""
    ssim: float | None
    """Structural similarity, likewise clipped (:func:`ssim`); 1 is a perfect recovery. None under 3 pixels."""
    feature_mse: float | None
    """Mean squared difference of the model's logits at the recovered and the true image, in squared logits: the
    FMSE of Zhang et al. 2023 (arXiv:2309.13016). None, too, where no model was at hand."""


@dataclass(frozen=True)
class ImageExampleScore(ImageScores):
    """The scores of one private image and of the recovered one that was matched to it."""

    prediction: int
    """Index into the reconstruction."""
    label: int | None
    """The class that the attack states for the matched image; None if it states none."""


@dataclass(frozen=True)
class ImageScore(ImageScores):
    """The mean over the private images; None unless every one has a number.

    An average over those images alone on which an attack did not diverge would flatter it. ``rmse`` and
    ``rmse_pixel`` are roots of mean squares, so they pool all coordinates; the others are plain means.
    """

    matching_loss: float | None
    """``||g(x') - g||^2 / ||g||^2`` over the released coordinates; None if no gradient was given or g(x') is none."""
    label_accuracy: float | None
    """Share of the private images whose matched image has the right class; None if the attack states none."""
    num_references: int
    num_diverged: int
    """Recovered images without a finite error."""
    per_example: tuple[ImageExampleScore, ...]
    """One per private image, in the order of the batch."""

    @property
    def order(self) -> tuple[int, ...]:
        """Per private image, the index of the recovered image that was matched to it."""
        return tuple(example.prediction for example in self.per_example)

    def to_dict(self) -> dict:
        """Return the scores as JSON holds them: numbers, strings, lists, None where something is missing."""
        return json.loads(json.dumps(asdict(self), allow_nan=False))


POOLED = ("rmse", "rmse_pixel")
"""Roots of mean squares."""


def score_images(
    recovered: ImageReconstruction, batch: Batch, adapter: VisionAdapter, shared: SharedGradient | None = None
) -> ImageScore:
    """Score the images that an attack recovered against the private batch.

    Recovered images are assigned to private ones without replacement so that the sum of squared errors is least
    (:func:`match_images`). Errors are taken on what was recovered; PSNR and SSIM alone clip it to [0, 1] in pixel
    values, because that is what one sees, as published evaluations do.

    Args:
        recovered: The attack's answer, normalised as the model reads it.
        batch: The truth.
        adapter: The model, for its normalisation and its logits.
        shared: What the server received, for the matching loss. The gradient of the recovered images is taken with
            the attack's own labels (the true ones where it states none), as the update was formed, without the
            defenses and without dropout: under noise its distance to the release does not go to zero.

    Returns:
        The scores.

    Raises:
        DataError: If there are no images in what was recovered or in the batch, or of another shape.
    """
    if not isinstance(recovered, ImageReconstruction) or "pixel_values" not in batch.inputs:
        raise DataError(
            f"score_images compares an ImageReconstruction with a batch of images, got a "
            f"{type(recovered).__name__} and a batch of {', '.join(batch.inputs)}; texts are scored by score_text"
        )
    if not isinstance(adapter, VisionAdapter):
        raise DataError(f"score_images needs the image classifier's adapter, got a {type(adapter).__name__}")
    images, truth = (x.detach().to("cpu", torch.float64) for x in (recovered.images, adapter.input(batch)))
    if images.shape != truth.shape:
        raise DataError(
            f"attack {recovered.attack!r} returned images of shape {tuple(images.shape)} and the batch holds "
            f"{tuple(truth.shape)}; expected one recovered image of the same size per private one"
        )
    if recovered.labels is not None and recovered.labels.shape != (batch.size,):
        raise DataError(f"expected one label per image, ({batch.size},), got {tuple(recovered.labels.shape)}")
    score = score_image_tensors(
        images, truth, adapter.normalization, labels=recovered.labels, true_labels=batch.targets,
        logits=lambda x: _logits(adapter, x),
    )  # fmt: skip
    if shared is None:
        return score
    order = list(score.order)
    labels = None if recovered.labels is None else recovered.labels.cpu()[order]
    return replace(score, matching_loss=matching_loss(adapter, images[order], labels, batch, shared))


def score_image_tensors(
    images: Tensor,
    truth: Tensor,
    normalization: Normalization,
    *,
    labels: Tensor | None = None,
    true_labels: Tensor | None = None,
    logits: Callable[[Tensor], Tensor] | None = None,
) -> ImageScore:
    """Score recovered images against private ones without a model, as :func:`score_images` does with one.

    Args:
        images: Recovered (B, C, H, W) on the CPU, normalised as the model reads them.
        truth: Private ones, of the same shape and so normalised.
        normalization: How pixel values became what the model reads.
        labels: (B,) classes that the attack states.
        true_labels: (B,) classes of the private images.
        logits: Of images (B, C, H, W), for the feature error; None leaves it out.

    Returns:
        The scores; the matching loss, which needs the gradient, is None.
    """
    order = match_images(images, truth)
    images = images[list(order)]
    labels = None if labels is None else labels.cpu()[list(order)]
    features = None if logits is None else (logits(images), logits(truth))
    examples = tuple(
        ImageExampleScore(
            **_pair_scores(images[i], truth[i], normalization),
            feature_mse=None if features is None else mse(features[0][i], features[1][i]),
            prediction=order[i],
            label=None if labels is None else int(labels[i]),
        )
        for i in range(len(truth))
    )
    known = labels is not None and true_labels is not None
    return ImageScore(
        **{field.name: _average(field.name, examples) for field in fields(ImageScores)},
        matching_loss=None,
        label_accuracy=(labels == true_labels.cpu()).double().mean().item() if known else None,
        num_references=len(truth),
        num_diverged=sum(example.mse is None for example in examples),
        per_example=examples,
    )


def match_images(predictions: Tensor, references: Tensor) -> tuple[int, ...]:
    """Assign one recovered image to each private one, so that the sum of squared errors is least.

    The Hungarian method over all orders. Labels have no say: an attack that got an image right under the wrong class
    has got the image, and among images of one class labels could not decide. This is the order most favourable to the
    attacker, of B! many: where nothing was recovered, it makes the error of a large batch slightly smaller than
    that of a guess whose order is fixed. A diverged image is matched to what is left over.

    Args:
        predictions: Recovered images (B, C, H, W).
        references: Private images, likewise.

    Returns:
        Per private image, the index of its recovered one.
    """
    size = len(references)
    cost = np.array([[mse(predictions[j], references[i]) for j in range(size)] for i in range(size)], dtype=float)
    diverged = np.isnan(cost)
    cost[diverged] = 1 + size * cost[~diverged].max(initial=0.0)  # more than all others together
    return tuple(int(j) for j in linear_sum_assignment(cost)[1])


def matching_loss(
    adapter: VisionAdapter, images: Tensor, labels: Tensor | None, batch: Batch, shared: SharedGradient
) -> float | None:
    """Return ``||g(x') - g||^2 / ||g||^2`` over the released coordinates, g the release and x' the recovered images.

    Args:
        adapter: The model.
        images: x' (B, C, H, W), normalised.
        labels: Their classes (B,); None takes the batch's.
        batch: The truth.
        shared: The release g.

    Returns:
        The relative distance, without unit; None where x' or its gradient is not finite, or g is zero.
    """
    shared.check(adapter)
    x = images.to(adapter.device, adapter.dtype)
    targets = batch.targets if labels is None else labels.to(batch.targets.device)
    own, _ = update_of(adapter, x, targets, {}, tuple(shared.gradient), shared.aggregation)
    distance = sum((own[k].double() - g.double()).square().sum().item() for k, g in shared.gradient.items())
    norm = sum(g.double().square().sum().item() for g in shared.gradient.values())
    return distance / norm if norm and isfinite(distance) else None


def _pair_scores(image: Tensor, truth: Tensor, normalization: Normalization) -> dict:
    """Return what depends on the two images alone."""
    pixels, true_pixels = normalization.pixels(image), normalization.pixels(truth)
    error, pixel_error = mse(image, truth), mse(pixels, true_pixels)
    if error is None or pixel_error is None:
        return dict.fromkeys(("mse", "rmse", "rmse_pixel", "psnr", "ssim"))
    seen = pixels.clamp(0, 1)
    return {
        "mse": error,
        "rmse": error**0.5,
        "rmse_pixel": pixel_error**0.5,
        "psnr": psnr(seen, true_pixels),
        "ssim": ssim(seen, true_pixels),
    }


def _logits(adapter: VisionAdapter, images: Tensor) -> Tensor:
    with torch.no_grad():
        return adapter.logits(images.to(adapter.device, adapter.dtype)).double().cpu()


def _average(name: str, examples: tuple[ImageExampleScore, ...]) -> float | None:
    values = [getattr(example, name) for example in examples]
    if None in values:
        return None
    return fmean(value**2 for value in values) ** 0.5 if name in POOLED else fmean(values)
