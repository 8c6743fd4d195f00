"""Images as files that ``lmleak score`` compares: what an attack recovered, and the private reference.

One safetensors file: ``pixels`` (B, C, H, W), pixel values with black 0 and white 1, not clipped, and, if known,
``labels`` (B,). Header metadata, one entry, since safetensors writes several in random order: ``lmleak-images-1``, a
JSON object with ``normalization`` ({"mean": [...], "std": [...]}: what the model reads is (pixel - mean) / std) and
``gradient``, a digest of the gradient file that the images belong to. A file without that entry, as another tool may
write it, holds pixels alone; they are taken as normalised like those that they are compared with.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lmleak.errors import ConfigError, DataError
from lmleak.files import write_tensors_atomically
from lmleak.types import Normalization

FORMAT = "lmleak-images-1"


@dataclass(frozen=True)
class ImageRecords:
    """The images of one file, in its order."""

    pixels: Tensor
    """(B, C, H, W) in float64 on the CPU, white - black = 1; what an attack recovered may be NaN."""
    labels: Tensor | None
    """(B,) classes; None where the file does not say."""
    normalization: Normalization | None
    """How the model reads pixels; None where the file does not say."""
    gradient: str | None
    """Digest of the gradient file that they belong to; None where the file does not say."""

    def save(self, path: str | os.PathLike) -> Path:
        """Write the file (format in the module's docstring), atomically, readable by its owner alone.

        Args:
            path: Where it goes. A place that cannot be written is refused as ``ConfigError``.

        Returns:
            The path.
        """
        tensors = {"pixels": self.pixels.double()}
        if self.labels is not None:
            tensors["labels"] = self.labels
        known = None if self.normalization is None else asdict(self.normalization)
        metadata = {FORMAT: json.dumps({"normalization": known, "gradient": self.gradient})}
        return write_tensors_atomically(path, tensors, metadata)


def read_images(path: str | os.PathLike) -> ImageRecords:
    """Read a file of images.

    Args:
        path: The file.

    Returns:
        The images.

    Raises:
        DataError: If it is missing, damaged, or holds no images.
    """  # noqa: DOC501 (ConfigError is caught)
    path = Path(path)
    if not path.is_file():
        raise DataError(f"no file of images at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            card = json.loads((file.metadata() or {}).get(FORMAT, "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys() if key in ("pixels", "labels")}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{path} is not a readable safetensors file (truncated?): {error}") from error
    pixels, labels = tensors.get("pixels"), tensors.get("labels")
    if pixels is None or pixels.dim() != 4 or pixels.shape[1] not in (1, 3) or not pixels.is_floating_point():
        raise DataError(
            f"{path} holds no images: expected a tensor 'pixels' (B, C, H, W) in floating point, with one channel or "
            f"three, got {'none' if pixels is None else f'{pixels.dtype} of shape {tuple(pixels.shape)}'}"
        )
    if labels is not None and (labels.is_floating_point() or labels.shape != pixels.shape[:1]):
        raise DataError(
            f"{path}: labels must be {len(pixels)} integers, got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    try:
        known, gradient = card.get("normalization"), card.get("gradient")
        normalization = None if known is None else Normalization(tuple(known["mean"]), tuple(known["std"]))
        if gradient is not None and not isinstance(gradient, str):
            raise ConfigError(f"gradient is {gradient!r}, not a digest")
    except (ConfigError, AttributeError, KeyError, TypeError) as error:
        raise DataError(f"the header of {path} is damaged: {error}") from error
    if normalization is not None and len(normalization.mean) not in (1, pixels.shape[1]):
        raise DataError(f"the header of {path} normalises {len(normalization.mean)} channels of {pixels.shape[1]}")
    return ImageRecords(pixels.double(), labels, normalization, gradient)
