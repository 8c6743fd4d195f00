"""The layer that language and vision share: a model as the pure function (theta, x) -> loss.

Nothing here knows text or images. A concrete adapter says what x is for a batch and how the loss follows.
"""

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lmleak.adapters.structure import Selection, select_parameters
from lmleak.errors import DataError, UnsupportedModelError
from lmleak.specification import is_whole_number
from lmleak.types import Batch

DIGEST_ENTRIES = 64  # per parameter, evenly spaced: any training step changes nearly all
TRAINING_WRAPPERS = {
    "DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "FSDPModule", "GradSampleModule",
}  # fmt: skip


@dataclass(frozen=True)
class Prior:
    """What anyone may assume about x before seeing a gradient: independent coordinates, Gaussian."""

    mean: Tensor
    """Mean of x, broadcastable to x."""
    std: float
    """Standard deviation tau per coordinate, in units of x."""


class ModelAdapter(ABC):
    """A model prepared for derivatives, without touching the caller's model.

    The adapter works on a private copy of the module tree that *shares the parameter tensors*: evaluation
    mode, attention implementation and hooks belong to the copy, so the caller's model keeps its own, also
    after an exception, and weight updates made in place are seen here.

    Args:
        model: Any float32 or float64 module that is not wrapped for training.
        task: What the loss is.
        name: Name for people, in reports and files.

    Raises:
        UnsupportedModelError: If derivatives of this model would be wrong or missing.
    """

    def __init__(self, model: nn.Module, *, task: str, name: str = ""):
        refuse_unfit(model)
        shared_tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
        self.model = copy.deepcopy(model, shared_tensors)
        # Dropout would make the gradient random, BatchNorm in training mode couples examples in place.
        self.model.eval()
        self.task = task
        self.name = name or type(model).__name__

    # What the concrete adapter answers -------------------------------------------------------------------

    @abstractmethod
    def input(self, batch: Batch) -> Tensor:
        """Return x0, the private input as the model consumes it."""

    @abstractmethod
    def free(self, batch: Batch) -> Tensor:
        """Return a boolean mask shaped like x: True where a coordinate is private (padding is not)."""

    @abstractmethod
    def loss(
        self,
        x: Tensor,
        targets: Tensor,
        layout: Mapping[str, Tensor],
        parameters: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Return the mean training loss L(x, targets; theta), a scalar.

        Args:
            x: The input, shaped as :meth:`input` returns it.
            targets: Hard targets as in ``Batch.targets``, or probabilities with one more axis of classes.
            layout: Public shape facts, ``Batch.layout``.
            parameters: Tensors that replace the model's own under the same names; None keeps all.
        """

    @abstractmethod
    def batch(self, examples, labels=None) -> Batch:
        """Return the batch of private examples."""

    @abstractmethod
    def prior(self) -> Prior:
        """Return the prior of x."""

    @abstractmethod
    def roles(self) -> dict[str, tuple[str, ...]]:
        """Return parameter names by role, in forward order: "embeddings", "block 0", ..., "head"."""

    def lookup_table(self) -> str | None:
        """Return the name of the table whose rows x are read from, if x is read from a table."""
        return None

    def lookup_table_is_tied(self) -> bool:
        """Return whether that table is also used after x, for instance as the output head."""
        return False

    def loss_through_lookup(self, batch: Batch, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return the loss with x read from its table, so that the table's rows get their gradient too."""
        return self.loss(x, batch.targets, batch.layout, parameters)

    # What every adapter has ------------------------------------------------------------------------------

    def parameters(self) -> dict[str, Tensor]:
        """Return every trained parameter by name, detached (same storage), in the model's order."""
        return {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}

    def select(self, shared: str) -> Selection:
        """Return which parameters theta ``shared=`` stands for."""
        return select_parameters(shared, self)

    def shared_loss(self, batch: Batch, x: Tensor, parameters: Mapping[str, Tensor], selection: Selection) -> Tensor:
        """Return the loss whose gradient in ``parameters`` is what the selection shares."""
        if selection.through_lookup:
            return self.loss_through_lookup(batch, x, parameters)
        return self.loss(x, batch.targets, batch.layout, parameters)

    def weights_digest(self) -> str:
        """Return a short digest of the weights: names, shapes and some entries of every parameter, in float32."""
        digest = hashlib.sha256()
        for name, p in self.model.named_parameters():
            flat = p.detach().flatten()
            some = flat[:: max(1, len(flat) // DIGEST_ENTRIES)].float().cpu()
            digest.update(f"{name}{tuple(p.shape)}".encode() + some.numpy().tobytes())
        return digest.hexdigest()[:16]

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """float32 or float64."""
        return next(self.model.parameters()).dtype

    def check_labels(self, labels, size: int, num_classes: int) -> Tensor:
        """Return class labels as a (B,) tensor.

        Args:
            labels: One integer per example.
            size: The number of examples B.
            num_classes: Labels lie in [0, num_classes).

        Returns:
            The labels on the model's device.

        Raises:
            DataError: If they are missing, of another number, not integers, or out of range.
        """
        if labels is None:
            raise DataError(f"task {self.task!r} needs labels=: one integer in [0, {num_classes}) per example")
        values = labels.tolist() if isinstance(labels, Tensor) else list(labels)
        if len(values) != size:
            raise DataError(f"got {len(values)} labels for {size} examples; expected one each")
        for value in values:
            if not is_whole_number(value):
                raise DataError(f"labels must be integers in [0, {num_classes}), got {value!r}")
            if not 0 <= value < num_classes:
                raise DataError(f"label {value} is out of range: this model has classes 0 to {num_classes - 1}")
        return torch.tensor([int(value) for value in values], device=self.device)


def refuse_unfit(model: nn.Module) -> None:
    """Refuse a model whose second derivatives would be missing or silently wrong.

    Args:
        model: The candidate.

    Raises:
        UnsupportedModelError: With the reason and what to pass instead.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"expected a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        kinds = {base.__name__ for base in type(module).__mro__}
        if kinds & TRAINING_WRAPPERS:
            raise UnsupportedModelError(
                f"{type(module).__name__} averages, shards or hooks gradients, and second derivatives through it are "
                "wrong; pass the plain module (model.module, or accelerator.unwrap_model(model))"
            )
        compiled = (getattr(module, "_compiled_call_impl", None), vars(module).get("forward"))
        if "OptimizedModule" in kinds or compiled[0] or hasattr(compiled[1], "_torchdynamo_orig_callable"):
            raise UnsupportedModelError(
                "a compiled module drops second derivatives; pass the module from before torch.compile"
            )
    parameters = dict(model.named_parameters())
    if not any(p.requires_grad for p in parameters.values()):
        raise UnsupportedModelError("no parameter has requires_grad=True, so nothing would be shared")
    for name, p in parameters.items():
        if type(p.data).__name__ == "DTensor":
            raise UnsupportedModelError(f"parameter {name!r} is sharded over devices; gather the model first")
        if p.is_meta:
            raise UnsupportedModelError(
                f"parameter {name!r} has no data here (meta device): it is not loaded, or accelerate offloaded it to "
                "the CPU or the disk, and second derivatives need every weight in place while their graphs live. "
                "Load it, or pass a device_map of GPUs alone (or of the CPU alone)"
            )
        if p.dtype not in (torch.float32, torch.float64):
            raise UnsupportedModelError(
                f"parameter {name!r} is {p.dtype}; second derivatives need float32 or float64: pass model.float()"
            )
        if not torch.isfinite(p).all():
            raise UnsupportedModelError(f"parameter {name!r} holds NaN or Inf; the training has diverged")
    if len({p.dtype for p in parameters.values()}) > 1:
        raise UnsupportedModelError("the parameters mix float32 and float64; convert with model.float()")
