"""Many captured gradients on disk, a few features per layer: written in bounded memory, killed and resumed at will.

Folder (version 2): ``store.json`` (what decides the features: layers, projection, seed, identity),
``basis.safetensors`` (principal axes, if those are used) and ``shard-<i>.safetensors`` with examples i S to
(i+1) S - 1: tensors ``features/<layer>`` (n, k), ``attributes/<name>`` (n, ...), the same in every shard. A shard
appears whole or not at all, and each tensor's digest is verified whenever it is read.
The folder holds private attributes: it is the data owner's, and no attack reads it.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lmleak.adapters.base import ModelAdapter
from lmleak.errors import ConfigError, DataError
from lmleak.files import write_text_atomically
from lmleak.gradients.per_example import per_example_gradients
from lmleak.gradients.projection import NONZEROS, principal_components, project_on, random_projection
from lmleak.gradients.shards import (
    FORMAT,
    VERSION,
    check_shards,
    is_whole,
    read_settings,
    read_tensor,
    read_tensors,
    shard_paths,
    write_tensors,
)
from lmleak.lookup import lookup
from lmleak.types import Batch

PROJECTIONS = {"random": random_projection, "pca": principal_components}


class GradientStoreWriter:
    """Write gradients, example after example, as features per layer.

    Memory: one shard of features and attributes, the gradients given to one :meth:`append` and, with "pca", the
    gradients of the first shard and the axes (k p numbers). ``num_examples`` says how many examples are safe on disk:
    a writer that is killed loses at most the shard it was filling, and a new one on the same folder goes on there.

    Args:
        path: The folder; created if absent.
        layers: Parameter names per layer, as ``adapter.roles()`` gives them.
        features: k, the features per layer, a multiple of 4; a layer of fewer numbers keeps them all.
        projection: "random" (:func:`random_projection`, unbiased and independent of the data) or "pca" (principal
            axes of the first shard). The axes are an unsupervised fit: no attribute or input enters, but the gradients
            of the first shard do, and a later cross-fit tests on these too. Take "random" where that matters.
        seed: Seed of the random projection.
        shard_size: S, examples per shard.
        identity: What else decides the gradients (data, defenses, "weights": ``adapter.weights_digest()``), as
            strings. A folder written with another identity, or other settings, is refused.

    Raises:
        ConfigError: If a setting cannot be right or differs from the folder's.
        DataError: If a shard that others follow is missing or damaged.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        layers: Mapping[str, tuple[str, ...]],
        features: int = 512,
        projection: str = "random",
        seed: int = 0,
        shard_size: int = 256,
        identity: Mapping[str, str] | None = None,
    ):
        lookup("projection", projection, PROJECTIONS)
        if features < NONZEROS or features % NONZEROS or shard_size < 2 or not layers:
            raise ConfigError(
                f"a store needs layers, features that are a multiple of {NONZEROS} and shards of at least 2 examples; "
                f"got {len(layers)} layer(s), features={features}, shard_size={shard_size}"
            )
        self.path = Path(path)
        self.settings = {
            "format": FORMAT, "version": VERSION, "layers": {name: list(p) for name, p in layers.items()},
            "features": features, "projection": projection, "seed": seed, "shard_size": shard_size,
            "identity": dict(identity or {}),
        }  # fmt: skip
        self.layers = {name: tuple(parameters) for name, parameters in layers.items()}
        self._basis: dict[str, Tensor] | None = None
        self._rows: list[dict[str, Tensor]] = []  # features, or raw gradients until the axes are known
        self._open()

    def _open(self) -> None:
        header = self.path / "store.json"
        if header.exists():
            saved = read_settings(self.path)
            for key, value in self.settings.items():
                if saved.get(key) != value:
                    raise ConfigError(
                        f"{self.path} holds gradients stored with another {key} ({saved.get(key)!r:.80} there, "
                        f"{value!r:.80} now); choose another folder or delete that one"
                    )
        elif self.path.is_dir() and any(self.path.iterdir()):
            raise ConfigError(f"{self.path} is not empty and holds no gradient store; choose another folder")
        else:
            write_text_atomically(header, json.dumps(self.settings, indent=1))
        shards = shard_paths(self.path)
        if shards and not is_whole(shards[-1]):
            shards.pop().unlink()  # cut short by the file system: its examples are captured again
        counts, layout = check_shards(self.path, shards, self.settings["shard_size"])
        self._attributes = _named(layout, "attributes/") if shards else None
        basis = self.path / "basis.safetensors"
        if self.settings["projection"] == "pca" and basis.exists():
            self._basis = read_tensors(basis)
        elif self.settings["projection"] == "pca" and shards:
            raise DataError(f"{self.path} lacks {basis.name}, the axes of its shards; delete the folder")
        self._written = len(shards)
        self.num_examples = sum(counts)
        if counts and counts[-1] < self.settings["shard_size"]:  # closed before it was full: go on filling it
            self._rows, self._written = [read_tensors(shards[-1])], len(shards) - 1

    def append(self, gradient: Mapping[str, Tensor], attributes: Mapping[str, Tensor] | None = None) -> None:
        """Add n examples.

        Args:
            gradient: Per parameter name (n, *shape), as ``per_example_gradients`` gives it; a released gradient of a
                whole batch is one example: ``{name: value[None]}``.
            attributes: Per name (n, ...): labels, private attributes, the inputs themselves.

        Raises:
            DataError: If a layer's parameter is missing, numbers of examples differ, the attributes are not those
                of earlier examples, or something is not finite.
        """
        attributes = {name: torch.as_tensor(value).cpu() for name, value in (attributes or {}).items()}
        missing = [n for names in self.layers.values() for n in names if n not in gradient]
        if missing:
            raise DataError(f"the gradient has no {missing[0]!r}, which the store's layers name; pass layers= without")
        wanted = {n: gradient[n].detach() for names in self.layers.values() for n in names}
        sizes = {name: len(value) for name, value in {**wanted, **attributes}.items()}
        if len(set(sizes.values())) != 1:
            raise DataError(f"expected one row per example in every tensor, got numbers of rows {sizes!r:.200}")
        for name, value in {**wanted, **attributes}.items():
            if value.numel() and not all(torch.isfinite(extreme) for extreme in torch.aminmax(value)):
                raise DataError(f"{name!r} holds NaN or Inf; only finite numbers are stored")
        kinds = {name: (value.dtype, tuple(value.shape[1:])) for name, value in attributes.items()}
        if self._attributes is None:
            self._attributes = kinds
        elif kinds != self._attributes:
            raise DataError(
                f"attributes (dtype, shape of one) are {kinds!r:.300}, earlier examples have "
                f"{self._attributes!r:.300}; give every example the same"
            )
        size, count = self.settings["shard_size"], next(iter(sizes.values()))
        start = 0
        while start < count:
            stop = min(count, start + size - self._pending())
            rows = {f"attributes/{name}": value[start:stop].clone() for name, value in attributes.items()}
            rows |= self._features({name: value[start:stop] for name, value in wanted.items()})
            self._rows.append(rows)
            start = stop
            if self._pending() == size:
                self._flush()

    def _pending(self) -> int:
        return sum(len(next(iter(rows.values()))) for rows in self._rows)

    def _features(self, gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.settings["projection"] == "pca" and self._basis is None:
            return {f"raw/{name}": value.float().cpu().clone() for name, value in gradient.items()}
        found = {}
        for layer, names in self.layers.items():
            values = [gradient[name] for name in names]
            if self.settings["projection"] == "pca":
                features = project_on(values, self._basis[f"mean/{layer}"], self._basis[f"axes/{layer}"])
            else:
                features = random_projection(
                    values, self.settings["features"], layer=layer, seed=self.settings["seed"]
                )
            found[f"features/{layer}"] = features
        return found

    def _flush(self) -> None:
        """Write what is pending as one shard."""
        rows = {name: torch.cat([part[name] for part in self._rows]).contiguous() for name in self._rows[0]}
        raw = _named(rows, "raw/")
        if raw:
            self._fit(raw)
            rows = {name: value for name, value in rows.items() if not name.startswith("raw/")} | self._features(raw)
        count = len(next(iter(rows.values())))
        write_tensors(self.path / f"shard-{self._written:06d}.safetensors", rows)
        self._written += 1
        self.num_examples = (self._written - 1) * self.settings["shard_size"] + count
        self._rows = []

    def _fit(self, raw: Mapping[str, Tensor]) -> None:
        basis = {}
        for layer, names in self.layers.items():
            values = [raw[name] for name in names]
            basis[f"mean/{layer}"], basis[f"axes/{layer}"] = principal_components(values, self.settings["features"])
        write_tensors(self.path / "basis.safetensors", basis)
        self._basis = basis

    def close(self) -> None:
        """Write the last shard, full or not; the folder may be continued later."""
        if self._rows:
            self._flush()

    def __enter__(self) -> "GradientStoreWriter":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self.close()


class GradientStore:
    """Read a gradient store; shards are memory-mapped, and only the layer asked for is read.

    Args:
        path: The folder.

    Raises:
        DataError: If it is no store, is empty, or a shard is missing or damaged.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.settings = read_settings(self.path)
        self.layers: tuple[str, ...] = tuple(self.settings["layers"])
        self._shards = shard_paths(self.path)
        if not self._shards:
            raise DataError(f"{self.path} holds no shard yet; the writer must fill one, or be closed")
        self._counts, layout = check_shards(self.path, self._shards, self.settings["shard_size"])
        self._attribute_names = sorted(_named(layout, "attributes/"))
        self.num_examples = sum(self._counts)

    def __len__(self) -> int:
        return self.num_examples

    def features(self, layer: str, rows: Sequence[int] | None = None) -> Tensor:
        """Return the features (n, k) of one layer, float32, in the order in which examples were added.

        Args:
            layer: The layer.
            rows: Numbers of examples, from 0; None for all. Shard by shard, so that no more than these are held.

        Returns:
            The features, in the order of ``rows``; ``DataError`` if there is no such row, or a tensor is not what
            was written.
        """
        lookup("layer", layer, dict.fromkeys(self.layers))
        return self._read(f"features/{layer}", rows)

    def attribute(self, name: str, rows: Sequence[int] | None = None) -> Tensor:
        """Return one attribute (n, ...) of the examples asked for, likewise."""
        lookup("attribute", name, dict.fromkeys(self._attribute_names))
        return self._read(f"attributes/{name}", rows)

    def _read(self, name: str, rows: Sequence[int] | None = None) -> Tensor:
        wanted, order = (None, None) if rows is None else self._checked(rows).sort(stable=True)
        parts, start = [], 0
        for path, count in zip(self._shards, self._counts, strict=True):
            inside = slice(None) if wanted is None else wanted[(wanted >= start) & (wanted < start + count)] - start
            start += count
            if wanted is not None and not len(inside):
                continue
            parts.append(read_tensor(path, name)[inside])
        found = torch.cat(parts)
        return found if wanted is None or not (order.diff() < 0).any() else found[order.argsort()]

    def _checked(self, rows: Sequence[int]) -> Tensor:
        found = np.asarray(rows)
        if found.ndim != 1 or found.dtype.kind not in "iu" or not len(found):
            raise DataError(
                f"rows must be one or more whole numbers of examples, got {rows!r:.80}; write a list, or None for all"
            )
        if (outside := found[(found < 0) | (found >= self.num_examples)]).size:
            raise DataError(
                f"{self.path} holds examples 0 to {self.num_examples - 1}, got row {outside[0]}; "
                "count rows from the start"
            )
        return torch.from_numpy(found.astype(np.int64))


def store_gradients(
    writer: GradientStoreWriter,
    adapter: ModelAdapter,
    batches: Iterable[tuple[Batch, Mapping[str, Tensor]]],
    *,
    shared: str = "no-word-embeddings",
) -> None:
    """Capture the gradient of every example of some batches, leaving out what the store holds already.

    Memory is that of one batch: B times the shared parameters, whatever the number of batches.

    Args:
        writer: The store. It is closed at the end.
        adapter: The model.
        batches: Batches with the attributes of their examples, in the same order at every call. What is stored
            already is skipped by number, so an iterator that prepares batches lazily pays for it alone.
        shared: Which parameters theta; the store's layers must be among them.

    Raises:
        ConfigError: If the store's identity names "weights" and they are not the adapter's.
    """
    weights = writer.settings["identity"].get("weights", adapter.weights_digest())
    if weights != adapter.weights_digest():
        raise ConfigError(
            f"{writer.path} holds gradients at weights {weights}, the adapter's are {adapter.weights_digest()}; "
            "choose another folder, or load those weights"
        )
    skip = writer.num_examples
    for batch, attributes in batches:
        if skip >= batch.size:
            skip -= batch.size
            continue
        if skip:
            batch = Batch(
                inputs={name: tensor[skip:] for name, tensor in batch.inputs.items()},
                targets=batch.targets[skip:],
                layout={name: tensor[skip:] for name, tensor in batch.layout.items()},
            )
        gradient = per_example_gradients(adapter, batch, shared=shared).gradient
        writer.append(gradient, {name: torch.as_tensor(value)[skip:] for name, value in attributes.items()})
        skip = 0
    writer.close()


def _named(rows: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in rows.items() if name.startswith(prefix)}
