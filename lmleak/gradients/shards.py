"""Files of a gradient store: named tensors with a digest of each, so that a file cut short or altered is noticed.

The digest is against accidents (a failing disk, a torn copy), not against someone who rewrites digest and tensor.
"""

import json
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lmleak.errors import DataError
from lmleak.files import write_tensors_atomically

FORMAT, VERSION = "lmleak-gradient-store", 2
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Tensor name -> dtype and shape of one row."""


def digest(name: str, tensor: Tensor) -> str:
    """Return the BLAKE2b digest (128 bits, hexadecimal) of a tensor's name, dtype, shape and bytes."""
    found = blake2b(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode(), digest_size=16)
    found.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors with their digests; the file appears whole or not at all."""
    digests = {name: digest(name, tensor) for name, tensor in tensors.items()}
    metadata = {"format": FORMAT, "version": str(VERSION), "digests": json.dumps(digests)}
    write_tensors_atomically(path, tensors, metadata)


def read_tensor(path: Path, name: str) -> Tensor:
    """Return one tensor of a file, its digest verified; the others are not read.

    Args:
        path: The file.
        name: The tensor.

    Returns:
        The tensor.

    Raises:
        DataError: If the file cannot be read, or the tensor is not the one that was written.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensor, written = file.get_tensor(name), json.loads(file.metadata()["digests"])[name]
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(_again(path, f"is truncated or damaged ({error})")) from error
    if digest(name, tensor) != written:
        raise DataError(_again(path, f"is damaged: {name!r} is not what was written"))
    return tensor


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return every tensor of a file, verified."""
    return {name: read_tensor(path, name) for name in layout(path)[1]}


def is_whole(path: Path) -> bool:
    """Return whether a file has all its bytes, whatever they are."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (SafetensorError, OSError):
        return False


def layout(path: Path) -> tuple[int, Layout]:
    """Return the number of rows of a file, and name, dtype and row shape of its tensors, from its header alone."""
    if not is_whole(path):
        raise DataError(_again(path, "is truncated or damaged"))
    with safe_open(path, framework="pt") as file:
        parts = {name: file.get_slice(name) for name in sorted(file.keys())}
        found = {name: (part[:0].dtype, tuple(part.get_shape())) for name, part in parts.items()}
    return next((shape[0] for _, shape in found.values()), 0), {n: (t, shape[1:]) for n, (t, shape) in found.items()}


def read_settings(folder: Path) -> dict:
    """Return what ``store.json`` says.

    Args:
        folder: The store.

    Returns:
        The settings.

    Raises:
        DataError: If it is missing, damaged, or of another version.
    """
    path = folder / "store.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} is no gradient store: its store.json is missing or damaged ({error})") from error
    if not isinstance(settings, dict) or settings.get("format") != FORMAT or settings.get("version") != VERSION:
        raise DataError(
            f"{path} does not say format {FORMAT!r}, version {VERSION} (earlier versions have no digests); "
            "choose another folder, or delete that one to capture its gradients again"
        )
    return settings


def shard_paths(folder: Path) -> list[Path]:
    """Return the shards of a folder in order."""
    return sorted(folder.glob("shard-*.safetensors"))


def check_shards(folder: Path, shards: list[Path], shard_size: int) -> tuple[list[int], Layout]:
    """Return the examples per shard, and what each holds; all but the last must be full, and all alike.

    Args:
        folder: The store.
        shards: Its shards.
        shard_size: Examples of a full one.

    Returns:
        Examples per shard, and the layout; empty without shards.

    Raises:
        DataError: If a shard is missing, damaged, not full, or holds other tensors than the first.
    """
    counts, common = [], {}
    for i, shard in enumerate(shards):
        if shard.name != f"shard-{i:06d}.safetensors":
            raise DataError(f"{folder} lacks shard-{i:06d}.safetensors; delete the later ones to capture them again")
        count, found = layout(shard)
        counts.append(count)
        common = common or found
        if found != common:
            other = sorted(name for name in found.keys() | common.keys() if found.get(name) != common.get(name))
            raise DataError(_again(shard, f"holds other tensors than the shards before it ({', '.join(other):.200})"))
        if i < len(shards) - 1 and count != shard_size:
            raise DataError(_again(shard, f"holds {count} examples, expected {shard_size}"))
    return counts, common


def _again(path: Path, what: str) -> str:
    return f"{path} {what}; delete it and the later shards and resume the writer to capture them again"
