"""Files of images: MNIST idx, CIFAR npz, folders and archives with one sub-folder per class.

Every reader returns images (uint8, or float in [0, 1]; (C, H, W) each), integer labels, and the names of the classes.
"""

import gzip
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from io import BytesIO
from itertools import zip_longest
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lmleak.errors import ConfigError, DataError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
IDX_MAGIC = {1: 2049, 3: 2051}  # unsigned bytes in 1 dimension (labels) and 3 (images)
GREY_MODES, COLOUR_MODES = {"1", "L"}, {"P", "PA", "LA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"}

Images = tuple[Sequence[np.ndarray], Sequence[int], Sequence[str]]


def read_idx(path: Path, split: str | None) -> Images:
    """Read a pair of MNIST files.

    Args:
        path: The file of images, or the folder of the pair.
        split: What the file names begin with, if the folder holds several pairs ("train", "t10k").

    Returns:
        Images 1xHxW, labels, and "0" to the largest label, at least "9".

    Raises:
        DataError: If a file is missing, damaged or truncated.
    """
    if path.is_dir():
        pairs = sorted(path.glob(f"{split or ''}*idx3-ubyte*"))
        if len(pairs) != 1:
            raise DataError(
                f"{path} holds {len(pairs)} files {split or ''}*idx3-ubyte*: {[p.name for p in pairs]}; pass "
                "split= (\"train\" or \"t10k\"), or name the file"
            )  # fmt: skip
        path = pairs[0]
    labels_path = path.with_name(path.name.replace("images", "labels").replace("idx3", "idx1"))
    images, labels = _idx(path, 3), _idx(labels_path, 1)
    return images[:, None], labels, [str(i) for i in range(max(10, int(labels.max(initial=0)) + 1))]


def _idx(path: Path, dimensions: int) -> np.ndarray:
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    header = struct.Struct(f">{1 + dimensions}I")
    if len(content) < header.size or header.unpack_from(content)[0] != IDX_MAGIC[dimensions]:
        raise DataError(f"{path} is no idx file of {'images' if dimensions == 3 else 'labels'} (it begins otherwise)")
    _, *shape = header.unpack_from(content)
    values = np.frombuffer(content, np.uint8, offset=header.size)
    if len(values) != np.prod(shape, dtype=np.int64):
        raise DataError(f"{path} is truncated: it announces {tuple(shape)} bytes and holds {len(values)}")
    return values.reshape(shape)


def read_npz(path: Path) -> Images:
    """Read x (uint8, N x H x W or N x H x W x C), y and, if there, classes from a .npz file.

    Args:
        path: The file.

    Returns:
        Images CxHxW, labels, class names.

    Raises:
        DataError: If it is missing or damaged, lacks an array, or an array has a wrong shape or type.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} cannot be read as .npz without pickled objects: {error}") from error
    if missing := {"x", "y"} - arrays.keys():
        raise DataError(f"{path} has no array {min(missing)!r}; expected x and y, found {sorted(arrays)}")
    x, y = arrays["x"], arrays["y"]
    x = x[..., None] if x.ndim == 3 else x
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[-1] not in (1, 3):
        raise DataError(f"{path}: x must be uint8, (N, H, W) or (N, H, W, 1 or 3); got {x.dtype} {x.shape}")
    if not np.issubdtype(y.dtype, np.integer) or y.shape != x.shape[:1]:
        raise DataError(f"{path}: y must be {len(x)} integers, one per image; got {y.dtype} {y.shape}")
    names = arrays["classes"].tolist() if "classes" in arrays else range(int(y.max(initial=0)) + 1)
    return x.transpose(0, 3, 1, 2), y, [str(name) for name in names]


def read_folder(path: Path, split: str | None, limit: int | None) -> Images:
    """Read a folder with one sub-folder of images per class."""
    files = [p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()]
    return _read_tree(files, lambda name: (path / name).read_bytes(), split, limit, str(path))


def read_zip(path: Path, split: str | None, limit: int | None) -> Images:
    """Read an archive of such a folder.

    Args:
        path: The archive.
        split: The folder above those of the classes, if there are several.
        limit: Images to read.

    Returns:
        Images, labels, class names.

    Raises:
        DataError: If it is missing or damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _read_tree(archive.namelist(), archive.read, split, limit, str(path))
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise DataError(f"{path} cannot be read as .zip: {error}") from error


def _read_tree(
    names: list[str], read: Callable[[str], bytes], split: str | None, limit: int | None, origin: str
) -> Images:
    paths = [p for p in map(PurePosixPath, sorted(names)) if p.suffix.lower() in IMAGE_SUFFIXES and p.name[0] != "."]
    if not paths:
        raise DataError(f"{origin} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    if alone := [p for p in paths if len(p.parts) < 2]:
        raise DataError(f"{origin}: {alone[0]} lies in no class folder; expected one sub-folder of images per class")
    roots = sorted({str(p.parent.parent) for p in paths})
    if split is not None:
        paths = [p for p in paths if p.parent.parent.name == split]
        if not paths:
            raise ConfigError(f"{origin} has no split {split!r}; its class folders lie under {roots}")
    elif len(roots) > 1:
        raise DataError(f"{origin} holds class folders under {roots}; pass split= to choose one")
    classes: dict[str, list[PurePosixPath]] = {}
    for p in paths:
        classes.setdefault(p.parent.name, []).append(p)
    class_names = sorted(classes)
    turns = zip_longest(*(classes[name] for name in class_names))
    chosen = [p for turn in turns for p in turn if p is not None][:limit]
    images = [decode_image(read(str(p)), f"{origin}, {p}") for p in chosen]
    return images, [class_names.index(p.parent.name) for p in chosen], class_names


def decode_image(image, origin: str) -> np.ndarray:
    """Return an image as an array, grey or RGB; transparency is dropped.

    Args:
        image: The bytes of an image file, or an image of Pillow.
        origin: Where it is from, for messages.

    Returns:
        uint8, (1 or 3, H, W).

    Raises:
        ConfigError: If Pillow is absent.
        DataError: If it cannot be decoded, or has more than 8 bits per channel.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ConfigError(f"to read {origin}, install Pillow: pip install 'lmleak[vision]'") from error
    try:
        image = Image.open(BytesIO(image)) if isinstance(image, bytes) else image
        array = np.array(image.convert("L" if image.mode in GREY_MODES else "RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{origin} is no image, or a damaged one: {error}") from error
    if image.mode not in GREY_MODES | COLOUR_MODES:
        raise DataError(f"{origin}: images of mode {image.mode!r} are not read; convert to 8-bit grey or RGB")
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def stack_images(images: Sequence[np.ndarray], size: int | None, origin: str) -> Tensor:
    """Return images as one tensor (N, C, H, W) float32 in [0, 1]; grey ones among coloured ones become RGB.

    Args:
        images: (C, H, W) each, uint8 or float in [0, 1].
        size: What images of different sizes are resized to.
        origin: Where they are from, for messages.

    Returns:
        The tensor.

    Raises:
        DataError: If there is none, or sizes differ and ``size`` is None.
    """
    if not images:
        raise DataError(f"{origin} holds no images")
    shapes = {image.shape[1:] for image in images}
    if len(shapes) > 1 and size is None:
        raise DataError(
            f"{origin} holds images of {len(shapes)} sizes, {sorted(shapes)[:3]}...; pass size= to resize them"
        )
    channels = max(image.shape[0] for image in images)
    tensors = []
    for image in images:
        pixels = torch.from_numpy(np.array(image, copy=True))
        pixels = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels
        if len(shapes) > 1:
            pixels = F.interpolate(pixels[None], (size, size), mode="bilinear", antialias=True).clamp(0, 1)[0]
        tensors.append(pixels.expand(channels, -1, -1))
    return torch.stack(tensors)
