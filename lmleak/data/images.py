"""Private images with their classes: scikit-learn's digits, files, folders, or a data set on the hub."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lmleak.data.images_files import (
    decode_image,
    read_folder,
    read_idx,
    read_npz,
    read_zip,
    stack_images,
)
from lmleak.data.load import LABEL_COLUMNS
from lmleak.errors import ConfigError, DataError
from lmleak.lookup import lookup, suggest
from lmleak.types import Normalization

# Mean and standard deviation of the pixels of the training split, per channel; ImageNet's are torchvision's.
NORMALIZATIONS: dict[str, Normalization] = {
    "none": Normalization(),
    "mnist": Normalization((0.1307,), (0.3081,)),
    "cifar10": Normalization((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": Normalization((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet": Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


@dataclass(frozen=True)
class ImageData:
    """Images to protect, in the order of their source."""

    pixels: Tensor
    """(N, C, H, W) float32 in [0, 1]; a model reads ``adapter.normalization.normalize(pixels)``."""
    labels: Tensor
    """(N,) int64, positions in ``class_names``."""
    class_names: tuple[str, ...]
    """The name of each class."""
    name: str
    """Where they come from, for reports."""

    def __post_init__(self):
        if not self.pixels.numel():
            raise DataError(f"{self.name} holds no images, or images without pixels: {tuple(self.pixels.shape)}")
        if len(self.labels) != len(self.pixels):
            raise DataError(
                f"{self.name} holds {len(self.pixels)} images and {len(self.labels)} labels; expected one each"
            )
        if self.labels.min() < 0 or self.labels.max() >= len(self.class_names):
            raise DataError(
                f"{self.name}: labels range from {self.labels.min()} to {self.labels.max()}, and there are "
                f"{len(self.class_names)} classes; expected 0 to {len(self.class_names) - 1}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return tuple(self.pixels.shape[1:])

    def normalization(self, name: str | None = None) -> Normalization:
        """Return a normalisation for these images.

        Args:
            name: One of ``NORMALIZATIONS``; None computes mean and standard deviation per channel over all images.

        Returns:
            The normalisation.

        Raises:
            DataError: If a channel is constant, or the name is of another number of channels.
        """
        channels = self.pixels.shape[1]
        if name is not None:
            known = lookup("normalization", name, NORMALIZATIONS)
            if len(known.mean) not in (1, channels):
                raise DataError(f"{self.name} has {channels} channel(s), and {name!r} normalises {len(known.mean)}")
            return known
        values = [self.pixels[:, channel].double() for channel in range(channels)]  # sums of millions: in float64
        mean, std = [v.mean().item() for v in values], [v.std(correction=0).item() for v in values]
        if min(std) == 0:
            raise DataError(f"{self.name}: all pixels of a channel are equal, so there is no deviation to divide by")
        return Normalization(tuple(mean), tuple(std))

    def batches(self, size: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Return consecutive batches from image ``start`` on; images that do not fill a last batch are left out.

        Args:
            size: Images per batch B.
            start: The first image.

        Returns:
            An iterator over (pixels (B, C, H, W) in [0, 1], labels (B,)).

        Raises:
            ConfigError: If there is no such batch.
        """
        if size < 1 or start < 0 or start + size > len(self):
            raise ConfigError(f"{self.name} holds {len(self)} images, so no batch of {size} begins at image {start}")
        starts = range(start, len(self) - size + 1, size)
        return ((self.pixels[i : i + size], self.labels[i : i + size]) for i in starts)

    def resize(self, size: int) -> "ImageData":
        """Return the images in size x size pixels, by antialiased bilinear interpolation."""
        pixels = F.interpolate(self.pixels, (size, size), mode="bilinear", antialias=True, align_corners=False)
        return replace(self, pixels=pixels.clamp(0, 1))


def load_images(
    source: str = "digits",
    *,
    split: str | None = None,
    size: int | None = None,
    limit: int | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> ImageData:
    """Read images with their classes.

    Args:
        source: "digits" (scikit-learn's 1,797 handwritten digits of 8x8 pixels; nothing is downloaded); an MNIST idx
            file of images, or the folder of it, with its labels beside it (.gz or not); a .npz file with x (uint8,
            N x H x W (x C)), y and, if you like, classes; a folder or .zip of images in one sub-folder per class; or
            the id of a data set on the hub ("id" or "id:configuration").
        split: Which part, where the source has several: the folder above those of the classes, "train" or "t10k" of
            MNIST, a split of a hub data set (by default "train").
        size: Resize to size x size pixels; images of different sizes need it.
        limit: Read the first ``limit`` images only; sub-folders are read in turn, so classes stay balanced.
        image_column: Column of the images in a hub data set; by default the only one that holds images.
        label_column: Column of the classes; by default the first of ``LABEL_COLUMNS`` that exists.

    Returns:
        The images.

    Raises:
        DataError: If the source is missing, damaged or truncated, or images and labels do not fit one another.
        ConfigError: If an option is not one of this source.
    """
    for option, value in (("size", size), ("limit", limit)):
        if value is not None and (type(value) is not int or value < 1):
            raise ConfigError(f"{option} must be a positive integer, got {value!r}")
    path = Path(source)
    if source == "digits":
        images, labels, names = _digits()
    elif path.is_dir() and not any(path.glob("*idx3-ubyte*")):
        images, labels, names = read_folder(path, split, limit)
    elif path.is_dir() or "idx3-ubyte" in path.name:
        images, labels, names = read_idx(path, split)
    elif path.suffix == ".npz":
        images, labels, names = read_npz(path)
    elif path.suffix == ".zip":
        images, labels, names = read_zip(path, split, limit)
    elif path.is_file() or source.startswith((".", "/", "~")):
        raise DataError(
            f"no images at {source}: expected 'digits', MNIST idx files, .npz, .zip, a folder of class folders, or "
            "a hub id"
        )
    else:
        images, labels, names = _hub(source, split, limit, image_column, label_column)
    if split is not None and (source == "digits" or path.suffix == ".npz" or "idx3-ubyte" in path.name):
        raise ConfigError(f"{source} has no splits; drop split={split!r}")
    pixels = stack_images(list(images[:limit]), size, source)
    data = ImageData(pixels, torch.from_numpy(np.asarray(labels[:limit]).astype(np.int64)), tuple(names), path.name)
    return data if size is None or data.image_shape[1:] == (size, size) else data.resize(size)


def _digits() -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    from sklearn.datasets import load_digits  # imported here: it takes a second

    digits = load_digits()
    return digits.images[:, None].astype(np.float32) / 16, digits.target, tuple(map(str, range(10)))


def _hub(source: str, split: str | None, limit: int | None, image_column: str | None, label_column: str | None):
    import datasets  # imported here: it takes seconds

    name, _, configuration = source.partition(":")
    try:
        dataset = datasets.load_dataset(name, configuration or None, split=split or "train")
    except (OSError, ValueError) as error:  # ConnectionError and DatasetNotFoundError are OSErrors
        raise DataError(
            f"{source!r} is neither 'digits', a file or folder of images, nor a data set that can be reached: "
            f"{str(error).splitlines()[0]}"
        ) from error
    features = dataset.features
    holds_images = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
    if image_column is None and len(holds_images) != 1:
        raise DataError(f"{source} has {len(holds_images)} columns of images ({holds_images}); pass image_column=")
    image_column = image_column or holds_images[0]
    label_column = label_column or next((c for c in LABEL_COLUMNS if c in features), None)
    for column, option in ((image_column, "image_column"), (label_column, "label_column")):
        if column not in features:
            raise DataError(
                f"{source} has no column {column!r}; pass {option}=. {suggest(str(column), list(features))}"
            )
    if image_column not in holds_images:
        raise DataError(f"{source}: column {image_column!r} holds no images. Those that do: {holds_images}")
    rows = dataset.select(range(min(limit or len(dataset), len(dataset))))
    images = [decode_image(image, f"{source}, image {n}") for n, image in enumerate(rows[image_column], 1)]
    labels = list(rows[label_column])
    if isinstance(features[label_column], datasets.ClassLabel):
        return images, labels, features[label_column].names
    names = sorted(set(dataset[label_column]))  # of all rows: a class keeps its number, whatever the limit
    return images, [names.index(label) for label in labels], map(str, names)
