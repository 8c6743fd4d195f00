"""One attack on the gradient of images: run it and score what it recovered, or say why it cannot run."""

import math
from dataclasses import asdict

import torch
from torch import Tensor

from lmleak.adapters.vision import VisionAdapter
from lmleak.attacks import Attack
from lmleak.defenses import derived_seed
from lmleak.errors import UnsupportedCombinationError
from lmleak.evaluation.scored import ATTACK_STREAM
from lmleak.gradients import SharedGradient
from lmleak.metrics import score_images
from lmleak.types import Batch

KEPT_DIGITS = 8  # behind the point of a pixel value: errors in figures drawn from rows are right up to 160 dB


def scored_image_attack(
    attack: Attack,
    adapter: VisionAdapter,
    shared: SharedGradient,
    batch: Batch,
    *,
    seed: int,
    keep_images: bool = False,
) -> dict:
    """Run one attack on what was shared and score it against the truth.

    Args:
        attack: The attack.
        adapter: The model.
        shared: What the server received.
        batch: The truth.
        seed: The batch's seed; the attack gets one hashed from it, from which that of the noise cannot be computed.
        keep_images: Whether the row holds the recovered images (:func:`kept_images`).

    Returns:
        ``{"refused": reason}`` if the combination is impossible. Else the scores of
        :func:`lmleak.metrics.score_images` with ``per_example``, the attack's cost, objective, why it stopped and its
        notes; ``images`` (B, C, H, W) in the order of the batch, if kept. What is not finite is None, as JSON has it.
    """
    try:
        recovered = attack.run(adapter, shared, seed=derived_seed(seed, ATTACK_STREAM))
    except UnsupportedCombinationError as error:
        return {"refused": str(error)}
    score = score_images(recovered, batch, adapter, shared)
    objective = recovered.objective
    row = (
        score.to_dict()
        | asdict(recovered.cost)
        | {
            "objective": objective if objective is not None and math.isfinite(objective) else None,
            "stopped": recovered.stopped,
            "notes": list(recovered.notes),
        }
    )
    if keep_images:
        row["images"] = kept_images(adapter.normalization.pixels(recovered.images[list(score.order)]))
    return row


def kept_images(pixels: Tensor) -> list:
    """Return pixel values as a row of results holds them.

    Args:
        pixels: (B, C, H, W), not clipped.

    Returns:
        Nested lists, rounded to 8 digits behind the point; None for an image that is not finite.
    """
    finite = torch.isfinite(pixels).flatten(1).all(1).tolist()
    rounded = pixels.detach().cpu().double().round(decimals=KEPT_DIGITS).tolist()
    return [image if good else None for image, good in zip(rounded, finite, strict=True)]


def images_of(row: dict, like: Tensor) -> Tensor:
    """Return the images that a row of results holds, for :func:`lmleak.report.image_grid.image_grid`.

    Args:
        row: A row with ``images``.
        like: The true pixel values (B, C, H, W).

    Returns:
        Pixel values (B, C, H, W), NaN throughout for an image that was not finite.
    """
    missing = torch.full(like.shape[1:], math.nan, dtype=torch.float64)
    images = [missing if image is None else torch.tensor(image, dtype=torch.float64) for image in row["images"]]
    return torch.stack(images)
