"""Image classifiers of our own from a name, a shape file or weights, and what a checkpoint says of its images."""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils import cached_file

from lmleak.adapters.image_models import ARCHITECTURES, CIFAR, MNIST, ImageShape, image_model
from lmleak.adapters.targets import IMAGE_TASK
from lmleak.data.images import NORMALIZATIONS
from lmleak.errors import ConfigError
from lmleak.lookup import lookup, suggest
from lmleak.types import Normalization

WEIGHT_SUFFIXES = (".th", ".pt", ".pth", ".safetensors")
SHAPE_KEYS = {
    "architecture", "task", "image_shape", "num_classes", "initialization", "seed", "normalization", "weights",
}  # fmt: skip
UNREADABLE = (
    OSError, RuntimeError, ValueError, KeyError, IndexError, TypeError, EOFError, pickle.UnpicklingError,
    SafetensorError,
)  # fmt: skip
COUNTER = "num_batches_tracked"  # BatchNorm's count of batches, absent from old files; evaluation does not use it


def is_image_source(name: str) -> bool:
    """Return whether a name is that of an architecture of ours or of a file of weights."""
    return name in ARCHITECTURES or Path(name).suffix in WEIGHT_SUFFIXES


def load_image_model(name: str, seed: int) -> nn.Module:
    """Return the classifier that a name (untrained) or a file of weights stands for.

    The architecture of weights is recognised by the names and shapes of their tensors. Where the file does not tell
    how its network reads pixels (:func:`read_weights`), it reads [0, 1].

    Args:
        name: One of ``ARCHITECTURES``, or a path.
        seed: Seed of untrained weights.

    Returns:
        The classifier with its ``image_shape`` and ``normalization``. A file that cannot be read, or that fits no
        architecture, is refused as ``ConfigError``.
    """
    if name in ARCHITECTURES:
        return image_model(name, seed=seed)
    state, normalization = read_weights(Path(name))
    architecture, image_shape, num_classes = recognize(state, name)
    model = image_model(architecture, image_shape, num_classes)
    _load_state(model, state, name)
    model.normalization = normalization or Normalization()
    return model


def from_image_shape(path: str, shape: Mapping, seed: int) -> nn.Module:
    """Return the classifier that a shape file describes; weights bring their normalisation unless it gives one.

    Args:
        path: The file; ``weights:`` in it is relative to its folder.
        shape: Its content, with ``architecture``.
        seed: Seed of the weights where the file gives none.

    Returns:
        The classifier.

    Raises:
        ConfigError: On unknown keys or wrong values.
    """
    if unknown := set(shape) - SHAPE_KEYS:
        raise ConfigError(f"{path}: unknown key {min(unknown)!r}. {suggest(min(unknown), sorted(SHAPE_KEYS))}")
    if shape.get("task", IMAGE_TASK) != IMAGE_TASK:
        raise ConfigError(f"{path}: an architecture of ours has task image-classification, not {shape['task']!r}")
    weights = shape.get("weights")
    if weights is not None and shape.keys() & {"initialization", "seed"}:
        raise ConfigError(f"{path}: weights are given, so initialization and seed have no effect; drop them")
    image_shape, normalization = image_shape_of(path, shape), normalization_of(path, shape)
    try:
        model = image_model(
            str(shape["architecture"]), image_shape, shape.get("num_classes", 10),
            initialization=shape.get("initialization"), seed=shape.get("seed", seed),
        )  # fmt: skip
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    if weights is not None:
        file = Path(path).parent / str(weights)
        state, own = read_weights(file)
        _load_state(model, state, str(file))
        if own is not None and "normalization" not in shape:
            normalization = own
    model.normalization = normalization
    return model


def image_shape_of(path: str, shape: Mapping) -> ImageShape | None:
    """Return ``image_shape`` of a shape file.

    Args:
        path: The file, for messages.
        shape: Its content.

    Returns:
        (C, H, W), or None if it does not say.

    Raises:
        ConfigError: If it is no list of three positive integers.
    """
    value = shape.get("image_shape")
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 3 or not all(type(n) is int and n > 0 for n in value):
        raise ConfigError(f"{path}: image_shape must be a list of three positive integers [C, H, W], got {value!r}")
    return tuple(value)


def normalization_of(path: str, shape: Mapping) -> Normalization:
    """Return ``normalization`` of a shape file: a data set's name, or mean and std per channel.

    Args:
        path: The file, for messages.
        shape: Its content.

    Returns:
        The normalisation; none at all if the file does not say.

    Raises:
        ConfigError: If it is neither.
    """
    value = shape.get("normalization")
    if value is None:
        return Normalization()
    if isinstance(value, str):
        return lookup(f"normalization in {path}", value, NORMALIZATIONS)
    try:
        return Normalization(tuple(map(float, value["mean"])), tuple(map(float, value["std"])))
    except (TypeError, KeyError, ValueError) as error:
        raise ConfigError(
            f"{path}: normalization must be one of {', '.join(NORMALIZATIONS)}, or {{mean: [...], std: [...]}} with "
            f"one positive std per channel; got {value!r}"
        ) from error


def read_weights(path: Path) -> tuple[dict[str, Tensor], Normalization | None]:
    """Read a file of weights, which can hold tensors and numbers only; nothing in it is executed.

    Files that hold "best_prec1" were written by the trainer of the PyTorch ImageNet example or its descendants, among
    them the public CIFAR ResNets of Yerlan Idelbayev, and their networks read pixels by the ImageNet mean and
    deviation; of any other file nothing is known.

    Args:
        path: A state dict, or a checkpoint that holds one under "state_dict" or "model"; .safetensors or torch's.

    Returns:
        Tensors by name, without the "module." of parallel training; how their network reads pixels, None if unknown.

    Raises:
        ConfigError: If it is absent, damaged, or something else.
    """
    if not path.is_file():
        raise ConfigError(
            f"no file of weights at {path}; for an untrained network write one of {', '.join(ARCHITECTURES)}"
        )
    try:
        safe = path.suffix == ".safetensors"
        content = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"{path} cannot be read as weights (tensors alone, by weights_only=True): {reason}"
        ) from error
    state = content
    if isinstance(content, Mapping):
        state = next(
            (content[key] for key in ("state_dict", "model") if isinstance(content.get(key), Mapping)), content
        )
    if not isinstance(state, Mapping) or not state or not all(isinstance(t, Tensor) for t in state.values()):
        raise ConfigError(f"{path} holds no weights: expected tensors by name, also under 'state_dict' or 'model'")
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    if broken := [name for name, t in state.items() if not torch.isfinite(t).all()]:
        raise ConfigError(f"{path}: {broken[0]!r} holds NaN or Inf; the training has diverged, or the file is damaged")
    return dict(state), NORMALIZATIONS["imagenet"] if "best_prec1" in content else None


def recognize(state: Mapping[str, Tensor], origin: str) -> tuple[str, ImageShape, int]:
    """Return the architecture whose tensors have these names and shapes.

    Args:
        state: Tensors by name.
        origin: Where they are from, for the message.

    Returns:
        Its name, image shape (where the weights leave it open: that of MNIST or CIFAR), and number of classes.

    Raises:
        ConfigError: If there is none.
    """
    got = _shapes(state)
    for name, architecture in ARCHITECTURES.items():
        for image_shape in dict.fromkeys((architecture.image_shape, CIFAR, MNIST)):
            head = list(_shapes_of(name, image_shape, 2))[-1]  # its bias has one number per class
            num_classes = state[head].numel() if head in state else 0
            if num_classes and _shapes_of(name, image_shape, num_classes) == got:
                return name, image_shape, num_classes
    raise ConfigError(
        f"{origin}: its tensors ({', '.join(list(state)[:3])}, ...) are those of no architecture known for 1x28x28 or "
        f"3x32x32 images: {', '.join(ARCHITECTURES)}. Write a shape file (.yaml) with architecture:, image_shape:, "
        "num_classes: and weights:, or load your own network and pass it to lmleak.adapt"
    )


def checkpoint_images(source: str, config) -> tuple[ImageShape | None, Normalization | None]:
    """Return which images a transformers checkpoint reads, by the preprocessor_config.json beside it.

    Where it gives the shortest edge alone, images are taken to be square.

    Args:
        source: Its folder or hub id.
        config: Its configuration.

    Returns:
        (C, H, W) if the preprocessor says the size, and the normalisation; None where it says nothing.

    Raises:
        ConfigError: If the file is damaged.
    """
    file = cached_file(
        source, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )  # fmt: skip
    if file is None:
        return None, None
    try:
        settings = json.loads(Path(file).read_text(encoding="utf-8"))
        size = settings.get("crop_size") or settings.get("size") or {}
        size = {"height": size, "width": size} if isinstance(size, int) else size
        if "shortest_edge" in size:
            size = {"height": size["shortest_edge"], "width": size["shortest_edge"]}
        shape = (config.num_channels, size["height"], size["width"]) if size.keys() >= {"height", "width"} else None
        # It multiplies bytes by a factor, usually 1 / 255; here pixels are in [0, 1].
        scale = 255 * settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 255
        normalized = settings.get("do_normalize", True)
        mean, std = (settings["image_mean"], settings["image_std"]) if normalized else ([0.0], [1.0])
        return shape, Normalization(tuple(m / scale for m in mean), tuple(s / scale for s in std))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{source}: its preprocessor_config.json cannot be read ({type(error).__name__}: {error}); expected size, "
            "and image_mean with image_std unless do_normalize is false"
        ) from error


def _shapes_of(name: str, image_shape: ImageShape, num_classes: int) -> dict[str, torch.Size]:
    with torch.device("meta"):  # shapes alone, no memory
        return _shapes(ARCHITECTURES[name].build(image_shape, num_classes).state_dict())


def _shapes(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items() if not name.endswith(COUNTER)}


def _load_state(model: nn.Module, state: Mapping[str, Tensor], origin: str) -> None:
    expected, got = _shapes(model.state_dict()), _shapes(state)
    if expected != got:
        wrong = min(name for name in expected.keys() | got.keys() if expected.get(name) != got.get(name))
        shapes = [f"shape {tuple(s[wrong])}" if wrong in s else "absent" for s in (got, expected)]
        raise ConfigError(
            f"the weights of {origin} do not fit: {wrong!r} is {shapes[0]} in the file and {shapes[1]} in the "
            "network; change architecture:, image_shape: or num_classes:"
        )
    model.load_state_dict(state, strict=False)  # strict but for the counters, checked above
