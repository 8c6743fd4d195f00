"""The shared gradient: what a client sends, in memory and as a file.

File format (version 1): one safetensors file. Tensors: ``gradient/<parameter name>`` for every released
parameter, and optionally ``layout/<name>`` and ``labels`` (public facts the owner chose to reveal). Header
metadata, all strings: ``format`` = "lmleak-gradient", ``version`` = "1", ``model``, ``task``, ``shared``
(which parameters), ``batch_size``, ``reduction`` = "mean", ``defenses`` (a JSON list, in order of application), and
where they apply ``aggregation`` (several clients or local steps: a JSON object with the fields of
``types.Aggregation``) and ``weights`` (a digest by which a model at other weights is refused).
Seeds of random defenses are never written: they would let the server subtract the noise.

Who exports from a training loop of their own writes, per parameter: for one step (FedSGD), the gradient of the mean
loss over the batch, as ``loss.backward()`` leaves it in ``.grad``; for several clients, the mean of theirs; for K
local SGD steps (FedAvg), (weights before - weights after) / (learning_rate K), averaged over clients, with
``aggregation`` = {"clients": C, "epochs": E, "steps_per_epoch": K / E, "learning_rate": lr} and ``batch_size`` over
all clients and steps of one epoch. If a word table is tied to the output head, its gradient or update holds the
looked-up rows and the head's part together: write ``shared`` = "all", which says so ("no-word-embeddings" promises
the head's part alone, which only a pass over ``inputs_embeds`` gives). Gradients taken with dropout on have
"dropout(on)" first among their ``defenses``.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lmleak.errors import DataError
from lmleak.files import write_tensors_atomically
from lmleak.types import SINGLE_STEP, Aggregation, Observation

FORMAT, VERSION = "lmleak-gradient", "1"
NUMBERS = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.int16, torch.int32)
LAYOUT = ("attention_mask", "token_type_ids")
LARGEST_BATCH = 2**20


@dataclass(frozen=True)
class SharedGradient:
    """A client's gradient with the public facts that travel with it.

    ``gradient[name] = d L / d theta[name]`` for the mean loss L over one batch, or the update that ``aggregation``
    describes in the same units, after the named defenses.
    """

    gradient: Mapping[str, Tensor]
    """Released gradient per parameter name, shapes as in the model."""
    task: str
    batch_size: int
    model: str = ""
    """Name of the model, for people."""
    weights: str = ""
    """Digest of the weights at which the gradient was taken (``ModelAdapter.weights_digest``); empty if unknown."""
    shared: str = "all"
    """The ``shared=`` specification that chose the parameters."""
    defenses: tuple[str, ...] = ()
    layout: Mapping[str, Tensor] = field(default_factory=dict)
    """Revealed lengths: attention_mask (B, T) and such; empty if the server does not learn them."""
    labels: Tensor | None = None
    """Revealed class labels (B,); None if the server does not learn them."""
    aggregation: Aggregation = SINGLE_STEP
    """How the update was formed: one step of one client unless said."""

    def __post_init__(self):
        if not self.gradient:
            raise DataError("a shared gradient needs at least one tensor, got none")
        for name, tensor in self.gradient.items():
            if tensor.dtype not in NUMBERS:
                raise DataError(
                    f"the gradient of {name!r} holds {tensor.dtype}; expected one of "
                    f"{', '.join(str(kind).removeprefix('torch.') for kind in NUMBERS)}"
                )
            if not torch.isfinite(tensor).all():
                raise DataError(
                    f"the gradient of {name!r} holds NaN or Inf; expected finite numbers. "
                    "Check the loss and the learning step that produced it."
                )
        _check_public_facts(self.batch_size, self.layout, self.labels)
        self.aggregation.schedule(self.batch_size)  # refuses a batch that cannot be divided so

    @property
    def rms(self) -> float:
        """Root mean square over all released coordinates, the natural unit of noise."""
        squares = sum(tensor.double().square().sum().item() for tensor in self.gradient.values())
        return (squares / self.num_coordinates) ** 0.5

    @property
    def num_coordinates(self) -> int:
        """P, the number of released numbers."""
        return sum(tensor.numel() for tensor in self.gradient.values())

    def released(self, gradient: Mapping[str, Tensor], defense: str) -> "SharedGradient":
        """Return a copy that carries ``gradient`` instead and records the defense that made it."""
        return replace(self, gradient=dict(gradient), defenses=(*self.defenses, defense))

    def perturbation_from(self, true: "SharedGradient") -> dict[str, Tensor]:
        """Return delta = released - true on the released parameters, what the influence function needs.

        Parameters that a defense withheld are absent: they are no part of theta any more.
        """
        return {name: value - true.gradient[name] for name, value in self.gradient.items()}

    def observation(self, *, lengths: bool, labels: bool) -> Observation:
        """Return what an attacker sees, with lengths and labels only if the attack assumes them known."""
        return Observation(
            gradient={n: g if g.is_floating_point() else g.float() for n, g in self.gradient.items()},
            task=self.task,
            batch_size=self.batch_size,
            shared=self.shared,
            aggregation=self.aggregation,
            defenses=self.defenses,
            layout=dict(self.layout) if lengths and self.layout else None,
            labels=self.labels if labels else None,
        )

    def save(self, path: str | os.PathLike) -> Path:
        """Write the gradient as a safetensors file (format in the module's docstring), atomically.

        Args:
            path: Where the file goes. A place that cannot be written is refused as ``ConfigError``.

        Returns:
            The path.
        """
        tensors = {f"gradient/{name}": value for name, value in self.gradient.items()}
        tensors |= {f"layout/{name}": value for name, value in self.layout.items()}
        if self.labels is not None:
            tensors["labels"] = self.labels
        metadata = {
            "format": FORMAT, "version": VERSION, "model": self.model, "task": self.task, "shared": self.shared,
            "batch_size": str(self.batch_size), "reduction": "mean", "defenses": json.dumps(list(self.defenses)),
        }  # fmt: skip
        if self.aggregation != SINGLE_STEP:
            metadata["aggregation"] = json.dumps(asdict(self.aggregation))
        if self.weights:
            metadata["weights"] = self.weights
        return write_tensors_atomically(path, tensors, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike, adapter=None) -> "SharedGradient":
        """Read a gradient file.

        Args:
            path: A file that :meth:`save` wrote, or one of the same format.
            adapter: If given, the file must fit this adapter's model (:meth:`check`).

        Returns:
            The gradient on the CPU.

        Raises:
            DataError: If the file is missing, truncated, of another format, holds NaN, or does not fit.
        """
        path = Path(path)
        if not path.is_file():
            raise DataError(f"no gradient file at {path}")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError) as error:
            raise DataError(f"{path} is not a readable safetensors file (truncated?): {error}") from error
        if (metadata.get("format"), metadata.get("version")) != (FORMAT, VERSION):
            raise DataError(
                f"{path} is not a gradient file of version {VERSION}: its header says format="
                f"{metadata.get('format')!r}, version={metadata.get('version')!r}, expected {FORMAT!r}, {VERSION!r}"
            )
        missing = {"task", "batch_size", "shared", "defenses"} - set(metadata)
        if missing:
            raise DataError(f"the header of {path} lacks {', '.join(sorted(missing))}")

        def part(prefix):
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        try:
            batch_size, defenses = int(metadata["batch_size"]), json.loads(metadata["defenses"])
            aggregation = Aggregation(**json.loads(metadata.get("aggregation", "{}")))
        except (ValueError, TypeError) as error:
            raise DataError(f"the header of {path} is damaged: {error}") from error
        if batch_size < 1 or not isinstance(defenses, list) or not all(isinstance(d, str) for d in defenses):
            raise DataError(f"the header of {path} is damaged: batch_size={batch_size}, defenses={defenses!r}")
        loaded = cls(
            gradient=part("gradient/"), task=metadata["task"], batch_size=batch_size,
            model=metadata.get("model", ""), weights=metadata.get("weights", ""),
            shared=metadata["shared"], defenses=tuple(defenses),
            layout=part("layout/"), labels=tensors.get("labels"), aggregation=aggregation,
        )  # fmt: skip
        if adapter is not None:
            loaded.check(adapter)
        return loaded

    def check(self, adapter) -> None:
        """Refuse a gradient that this model cannot have produced.

        Args:
            adapter: The model's adapter.

        Raises:
            DataError: If the task, a name or a shape does not fit.
        """
        if self.task != adapter.task:
            raise DataError(f"the gradient is of task {self.task!r}, the model of {adapter.task!r}")
        shapes = {name: tuple(p.shape) for name, p in adapter.parameters().items()}
        unknown = [name for name in self.gradient if name not in shapes]
        if unknown:
            raise DataError(
                f"the gradient names {len(unknown)} parameter(s) that the model lacks, first {unknown[0]!r}; "
                f"was it captured from another model ({self.model!r})?"
            )
        expected = set(adapter.select(self.shared).names)
        withheld = any(defense.startswith("hide-layers") for defense in self.defenses)
        if extra := set(self.gradient) - expected:
            raise DataError(
                f"the gradient names {min(extra)!r}, which shared={self.shared!r} leaves out of this model; "
                f"was it captured from another model ({self.model!r})?"
            )
        if (missing := expected - set(self.gradient)) and not withheld:
            raise DataError(
                f"the gradient lacks {len(missing)} parameter(s) of shared={self.shared!r}, first {min(missing)!r}; "
                f"was it captured from another model ({self.model!r}), or should its header name hide-layers?"
            )
        if adapter.lookup_table() in self.gradient and inseparable_table(adapter, self.shared, self.aggregation):
            raise DataError(
                f"the update of {adapter.lookup_table()!r}, a table tied to the head, after {self.aggregation.steps} "
                f"local steps is said to be the head's part alone (shared={self.shared!r}), which no training gives; "
                "write shared='all', or leave the table out of the file and of the selection"
            )
        for name, tensor in self.gradient.items():
            if tuple(tensor.shape) != shapes[name]:
                raise DataError(
                    f"the gradient of {name!r} has shape {tuple(tensor.shape)}, the model's parameter {shapes[name]}"
                )
        limit = adapter.max_positions() if hasattr(adapter, "max_positions") else None
        for name, tensor in self.layout.items():
            if limit is not None and tensor.shape[1] > limit:
                raise DataError(f"layout {name!r} has {tensor.shape[1]} positions, the model {limit}")
        classes = getattr(getattr(adapter, "config", None), "num_labels", None)
        given = self.labels if classes is not None else None
        if given is not None and not ((given >= 0) & (given < classes)).all():
            raise DataError(f"labels {given.tolist()} are out of range: the model has classes 0 to {classes - 1}")
        if self.weights and self.weights != (own := adapter.weights_digest()):
            raise DataError(
                f"the gradient was taken at weights with digest {self.weights!r}, the model's is {own!r}: another "
                "training step, or other random weights (a network by name, shape files and new heads need the same "
                "weights seed)"
            )


def _check_public_facts(batch_size: int, layout: Mapping[str, Tensor], labels: Tensor | None) -> None:
    """Refuse revealed lengths and labels that no batch of this size has."""
    if not 1 <= batch_size <= LARGEST_BATCH:
        raise DataError(f"batch_size is {batch_size}; expected 1 to {LARGEST_BATCH}")
    if unknown := set(layout) - set(LAYOUT):
        raise DataError(f"unknown layout {min(unknown)!r}; expected {' and '.join(LAYOUT)}")
    mask = layout.get("attention_mask")
    for name, tensor in layout.items():
        whole = not (tensor.is_floating_point() or tensor.is_complex())
        if not whole or tensor.dim() != 2 or len(tensor) != batch_size or mask is None or tensor.shape != mask.shape:
            raise DataError(
                f"layout {name!r} is {tensor.dtype} of shape {tuple(tensor.shape)}; expected integers (batch_size, "
                f"positions), batch_size {batch_size}, as the attention_mask"
            )
    if mask is not None and not (((mask == 0) | (mask == 1)).all() and mask.any(1).all()):
        raise DataError("the attention_mask must hold 1 at tokens and 0 at padding, with a token in every row")
    if labels is not None and (
        labels.is_floating_point() or labels.is_complex() or labels.dim() != 1 or len(labels) != batch_size
    ):
        raise DataError(
            f"labels are {labels.dtype} of shape {tuple(labels.shape)}; expected {batch_size} integers, one each"
        )


def inseparable_table(adapter, shared: str, aggregation: Aggregation) -> bool:
    """Return whether a selection asks for the head's part of a tied table's update after several local steps.

    For one step that part is the gradient at fixed x. Local steps move the one table by both parts together.

    Args:
        adapter: The model's adapter.
        shared: The ``shared=`` specification.
        aggregation: How the update is formed.

    Returns:
        True if what is asked for does not exist.
    """
    selection = adapter.select(shared)
    return (
        aggregation.steps > 1
        and adapter.lookup_table_is_tied()
        and adapter.lookup_table() in selection.names
        and not selection.through_lookup
    )
