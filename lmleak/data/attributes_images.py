"""Images with attributes to infer: what follows from the class, and a mark put into the pixels independently of it.

An attribute that follows from the class (odd or even) is told by the gradient of the class already, whatever the
image. ``inject`` therefore puts a second one into the pixels, drawn independently of the class: the gradient can tell
it through the image alone.
"""

import math
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from lmleak.data.attributes import COIN, AttributeData, choice, coin
from lmleak.data.images import ImageData, load_images
from lmleak.errors import ConfigError
from lmleak.lookup import lookup

INJECTIONS: dict[str, str] = {
    "tint": "a tenth of the way to white on grey images, to red on coloured ones",
    "rotate": "turned by 15 degrees, clockwise or the other way",
    "stroke": "strokes thicker by a pixel, half mixed in",
}
IMAGE_SOURCES = {"digits": "digits", "mnist": "mnist", "cifar": "cifar10-jpg/cifar10_jpg_200perclass.zip"}
ANIMALS = {"bird", "cat", "deer", "dog", "frog", "horse"}


def inject(pixels: Tensor, values: NDArray, kind: str, *, strength: float = 1.0) -> Tensor:
    """Put a binary attribute into images.

    Args:
        pixels: (n, C, H, W) in [0, 1].
        values: (n,) booleans: who carries the mark.
        kind: One of ``INJECTIONS``.
        strength: Multiple of the mark that ``INJECTIONS`` describes.

    Returns:
        Images in [0, 1], the unmarked ones unchanged ("rotate": turned the other way).

    Raises:
        ConfigError: If the kind is unknown or the strength is not positive.
    """
    lookup("injection", kind, INJECTIONS)
    if not 0 < strength < math.inf:
        raise ConfigError(f"strength must be positive, got {strength!r}")
    marked = torch.as_tensor(np.asarray(values, dtype=bool), device=pixels.device)
    if kind == "tint":
        colour = pixels.new_ones(pixels.shape[1], 1, 1)
        colour[1:] = 0 if len(colour) == 3 else 1
        share = min(1.0, 0.1 * strength)
        changed = (1 - share) * pixels + share * colour
    elif kind == "rotate":
        angle = torch.where(marked, 1.0, -1.0).to(pixels) * math.radians(15) * strength
        zero = torch.zeros_like(angle)
        turn = torch.stack([
            torch.stack([angle.cos(), -angle.sin(), zero], 1), torch.stack([angle.sin(), angle.cos(), zero], 1)
        ], 1)  # fmt: skip
        where = F.affine_grid(turn, list(pixels.shape), align_corners=False)
        return F.grid_sample(pixels, where, padding_mode="border", align_corners=False).clamp(0, 1)
    else:
        share = min(1.0, 0.5 * strength)
        changed = (1 - share) * pixels + share * F.max_pool2d(pixels, 3, stride=1, padding=1)
    return torch.where(marked[:, None, None, None], changed, pixels)


def load_marked_images(
    source: str,
    *,
    folder: str | Path = "../shared/data",
    count: int = 1000,
    mark: str = "tint",
    strength: float = 1.0,
    size: int | None = None,
    seed: int = 0,
) -> AttributeData:
    """Read images, and put a mark into a random half of them.

    Args:
        source: "digits" (scikit-learn's, no file), "mnist" or "cifar".
        folder: Where the folders mnist and cifar10-jpg lie.
        count: Images, chosen at random without looking at them; at most as many as there are.
        mark: Kind of the injected attribute "mark"; see :func:`inject`.
        strength: Of the mark.
        size: Resize to size x size pixels.
        seed: Seed of the choice, of who is marked, and of the coin.

    Returns:
        The images. Attributes: "mark" (independent of the class), "group" (odd digits, animals: a function of the
        class) and "coin".
    """
    place = lookup("image source", source, IMAGE_SOURCES)
    path = place if source == "digits" else str(Path(folder) / place)
    data: ImageData = load_images(path, size=size, split="test" if source == "cifar" else None)
    rows = torch.as_tensor(choice(len(data), count, seed))
    pixels, labels = data.pixels[rows], data.labels[rows].numpy()
    marked = coin(len(labels), seed + 1)
    names = data.class_names
    special = {i for i, n in enumerate(names) if n in ANIMALS} or set(range(1, len(names), 2))
    return AttributeData(
        name=source, labels=labels, class_names=names,
        attributes={"mark": marked, "group": np.isin(labels, sorted(special)), COIN: coin(len(labels), seed)},
        pixels=inject(pixels, marked, mark, strength=strength),
        notes=(f"mark: {INJECTIONS[mark]}, strength {strength:g}",),
    )  # fmt: skip
