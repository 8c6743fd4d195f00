"""A small convolutional decoder of images, G: latent -> pixels, with the file it is stored in.

File format (version 1): one safetensors file with the decoder's weights by parameter name. Header metadata, one
entry, since safetensors writes several in random order: ``lmleak-decoder-1``, a JSON object with what the decoder is
(``image_shape``, ``latent_size``, ``width``) and where it comes from (``data``, ``split``, ``seed`` and the like,
written by ``recipes/train_image_decoder.py``). Pixel values are in [0, 1]: the audited model's own normalisation is
applied to them, so one decoder serves models that normalise differently.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from lmleak.errors import DataError
from lmleak.files import write_tensors_atomically

FORMAT = "lmleak-decoder-1"
SHAPE = ("image_shape", "latent_size", "width")
LARGEST = 4096  # of a side, a latent or a width: a damaged header must not ask for all memory


class ImageDecoder(nn.Module):
    """``G(z)``: (B, latent_size) -> pixels (B, C, H, W) in [0, 1].

    One linear layer to ``(2 width, H/4, W/4)``, rounded up, and two blocks of doubling by nearest neighbours, 3x3
    convolution and SiLU; a last 3x3 convolution and a sigmoid. Smooth, so that matching can be differentiated through
    it, and without layers that treat the images of a batch together.

    Args:
        image_shape: (C, H, W).
        latent_size: Numbers per image, standard normal in training.
        width: Channels before the last convolution.
        seed: Seed of the initial weights.
    """

    def __init__(self, image_shape: tuple[int, int, int], latent_size: int = 16, width: int = 16, *, seed: int = 0):
        super().__init__()
        self.image_shape, self.latent_size, self.width = tuple(image_shape), latent_size, width
        self.card: dict[str, Any] = {}
        """Where the weights come from, as the file says; empty for a decoder that was not loaded."""
        channels, *self.size = self.image_shape
        self.start = tuple((side + 3) // 4 for side in self.size)
        with torch.random.fork_rng(devices=[]):  # torch's own initialisation draws from the global generator
            torch.manual_seed(seed)
            self.fc = nn.Linear(latent_size, 2 * width * self.start[0] * self.start[1])
            self.conv1 = nn.Conv2d(2 * width, width, 3, padding=1)
            self.conv2 = nn.Conv2d(width, width, 3, padding=1)
            self.conv3 = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, latent: Tensor) -> Tensor:
        """Return pixels in [0, 1]."""
        height, width = self.size
        hidden = F.silu(self.fc(latent)).unflatten(1, (2 * self.width, *self.start))
        hidden = F.silu(self.conv1(F.interpolate(hidden, size=((height + 1) // 2, (width + 1) // 2))))
        hidden = F.silu(self.conv2(F.interpolate(hidden, size=(height, width))))
        return self.conv3(hidden).sigmoid()


def save_decoder(path: str | os.PathLike, decoder: ImageDecoder, card: Mapping[str, Any]) -> Path:
    """Write a decoder to a safetensors file (format in the module's docstring), atomically.

    Args:
        path: Where the file goes.
        decoder: The trained decoder.
        card: Where it comes from, as JSON can say it.

    Returns:
        The path. A place that cannot be written is refused as ``ConfigError``.
    """
    card = {name: getattr(decoder, name) for name in SHAPE} | dict(card)
    return write_tensors_atomically(path, decoder.state_dict(), {FORMAT: json.dumps(card)})


def load_decoder(path: str | os.PathLike) -> ImageDecoder:
    """Read a decoder file.

    Args:
        path: A file that :func:`save_decoder` wrote.

    Returns:
        The decoder on the CPU, in float32, frozen, with its ``card``.

    Raises:
        DataError: If the file is missing, damaged, or no decoder.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"no decoder file at {path}; train one with recipes/train_image_decoder.py --output {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is not a readable safetensors file (truncated?): {error}") from error
    if FORMAT not in metadata:
        raise DataError(
            f"{path} is not a decoder file of version 1: its header has {sorted(metadata)}, expected {FORMAT!r}; "
            "train one with recipes/train_image_decoder.py"
        )
    decoder = _decoder_of(path, metadata[FORMAT])
    shapes = {name: tensor.shape for name, tensor in decoder.state_dict().items()}
    if {name: tensor.shape for name, tensor in weights.items()} != shapes:
        raise DataError(f"{path} is damaged: its weights are not those of the decoder that its header describes")
    if not all(torch.isfinite(tensor).all() for tensor in weights.values()):
        raise DataError(f"{path} is damaged: its weights hold NaN or Inf")
    decoder.load_state_dict(weights)
    return decoder.requires_grad_(False).eval()


def _decoder_of(path: Path, text: str) -> ImageDecoder:
    """Return an untrained decoder of the shape that a header describes."""
    try:
        card = json.loads(text)
        shape, latent_size, width = (card[name] for name in SHAPE)
        sizes = [*shape, latent_size, width]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"the header of {path} is damaged: {error!r}") from error
    if len(sizes) != 5 or not all(type(size) is int and 1 <= size <= LARGEST for size in sizes):
        raise DataError(
            f"the header of {path} is damaged: image_shape={shape}, latent_size={latent_size}, width={width}; "
            f"expected (C, H, W) and two numbers, all integers from 1 to {LARGEST}"
        )
    decoder = ImageDecoder(tuple(shape), latent_size, width)
    decoder.card = card
    return decoder
