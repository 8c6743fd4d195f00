"""The released gradients of a whole private data set, in one store that every metric of the layers reads."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version

import numpy as np
import torch
from torch import Tensor

from lmleak.adapters import ModelAdapter
from lmleak.defenses import NoDefense, derived_seed
from lmleak.errors import ConfigError, DataError
from lmleak.evaluation.attacks import Sharing
from lmleak.evaluation.layers_examples import LabelledExamples
from lmleak.gradients import GradientStore, GradientStoreWriter, per_example_gradients, shared_layers
from lmleak.types import Batch

HELD = 2**26  # gradient coordinates held at once: a quarter of a gigabyte in float32
MOST_AT_ONCE = 64  # examples vectorised over at once, however small the model


@dataclass(frozen=True)
class CaptureSettings:
    """How the gradient of each example is released, and as which features it is kept."""

    sharing: Sharing = field(default_factory=lambda: Sharing("undefended"))
    """Which parameters, under which defense, dropout and local training."""
    batch_size: int = 1
    """B: release i is the gradient of example i, the victim, with B - 1 others drawn at random from the data."""
    granularity: str = "role"
    """A layer is a "role" (embeddings, block i, head; of images, a module) or a "module" that owns parameters."""
    features: int = 256
    """Features kept per layer."""
    projection: str = "random"
    """"random" or "pca" (of the first shard: fitted without attributes, but on gradients that are tested on later)."""
    seed: int = 0
    """Seed of projection, companions, noise and dropout masks."""

    def __post_init__(self):
        if self.batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.granularity not in ("role", "module"):
            raise ConfigError(f"granularity must be 'role' or 'module', got {self.granularity!r}")


def audited_layers(adapter: ModelAdapter, settings: CaptureSettings) -> dict[str, tuple[str, ...]]:
    """Return the shared parameters of every layer, in forward order.

    Args:
        adapter: The model.
        settings: What is shared, and what a layer is.

    Returns:
        Layer -> parameter names.
    """
    roles = shared_layers(adapter, settings.sharing.shared)
    if settings.granularity == "role":
        return roles
    modules: dict[str, list[str]] = {}
    for names in roles.values():
        for name in names:
            modules.setdefault(name.rpartition(".")[0] or name, []).append(name)
    return {module: tuple(names) for module, names in modules.items()}


def release_rows(examples: LabelledExamples, victim: int, settings: CaptureSettings) -> list[int]:
    """Return the examples whose joint gradient is release number ``victim``, the victim first.

    Args:
        examples: The data.
        victim: Number of the example.
        settings: The batch size and the seed.

    Returns:
        Numbers of examples.

    Raises:
        DataError: If there are fewer examples than a batch takes.
    """
    others = settings.batch_size - 1
    if others >= examples.size:
        raise DataError(f"{examples.name} holds {examples.size} examples, fewer than batch_size={settings.batch_size}")
    drawn = np.random.default_rng([settings.seed, victim]).choice(examples.size - 1, others, replace=False)
    return [victim, *(int(i) + (i >= victim) for i in drawn)]


def capture_store(
    adapter: ModelAdapter,
    examples: LabelledExamples,
    path: str | os.PathLike,
    settings: CaptureSettings,
    *,
    advance: Callable[[int], None] = lambda count: None,
) -> GradientStore:
    """Write the released gradient of every example into a store, or go on where an earlier call was killed.

    The store also keeps what of the victim's input is to be reconstructed (``original/<name>``). Memory is that of a
    few gradients and one shard of features, whatever the number of examples.

    Args:
        adapter: The model.
        examples: The data.
        path: Folder of the store.
        settings: How gradients are released and kept.
        advance: Told how many examples have been added.

    Returns:
        The store, of ``examples.size`` gradients.
    """
    layers = audited_layers(adapter, settings)
    parameters = adapter.parameters()
    coordinates = sum(parameters[name].numel() for names in layers.values() for name in names)
    step = max(1, min(MOST_AT_ONCE, HELD // coordinates))
    with GradientStoreWriter(
        path, layers=layers, features=settings.features, projection=settings.projection, seed=settings.seed,
        identity=_identity(adapter, examples, settings),
    ) as writer:  # fmt: skip
        advance(min(writer.num_examples, examples.size))
        for start in range(writer.num_examples, examples.size, step):
            victims = range(start, min(start + step, examples.size))
            gradient, batch = _released(adapter, examples, victims, settings)
            kept = {f"original/{name}": of(batch).detach().cpu() for name, of in examples.originals.items()}
            writer.append(gradient, kept)
            advance(len(victims))
    return GradientStore(path)


def _released(
    adapter: ModelAdapter, examples: LabelledExamples, victims: Sequence[int], settings: CaptureSettings
) -> tuple[dict[str, Tensor], Batch]:
    """Return the released gradient of every victim, (n, *shape) per parameter, and the batch of the victims."""
    batch, sharing = examples.batch(list(victims)), settings.sharing
    plain = isinstance(sharing.defense, NoDefense) and not sharing.dropout
    if settings.batch_size == 1 and plain and sharing.aggregation.steps == 1:
        return per_example_gradients(adapter, batch, shared=sharing.shared).gradient, batch
    found = []
    for victim in victims:
        joint = examples.batch(release_rows(examples, victim, settings))
        found.append(sharing.release(adapter, joint, seed=derived_seed(settings.seed, victim)).gradient)
    return {name: torch.stack([gradient[name].float() for gradient in found]) for name in found[0]}, batch


def _identity(adapter: ModelAdapter, examples: LabelledExamples, settings: CaptureSettings) -> dict[str, str]:
    """Return digests of what decides the gradients besides the store's own settings."""
    sharing = asdict(settings.sharing) | {"defense": settings.sharing.defense.describe()}
    release = json.dumps(sharing | {"batch_size": settings.batch_size}, sort_keys=True)
    return {
        "weights": adapter.weights_digest(), "examples": examples.digest, "release": release,
        "lmleak": version("lmleak"),
    }  # fmt: skip
