"""Capture of the gradient that a client shares: one batch, one step (FedSGD)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lmleak.adapters.base import ModelAdapter
from lmleak.errors import DataError
from lmleak.gradients.shared import SharedGradient
from lmleak.types import Batch


def capture_gradient(
    adapter: ModelAdapter,
    batch: Batch,
    *,
    shared: str = "no-word-embeddings",
    reveal_lengths: bool = True,
    reveal_labels: bool = True,
) -> SharedGradient:
    """Compute g(x) = grad_theta L(x, y; theta), the mean over one batch, as ``loss.backward()`` would.

    Args:
        adapter: The model.
        batch: The private batch.
        shared: Which parameters theta are shared (``ModelAdapter.select``).
        reveal_lengths: Whether the server learns lengths and padding. Matching attacks need them; the papers
            assume them known.
        reveal_labels: Whether the server learns the class labels, likewise. Token targets are never revealed.

    Returns:
        The clean gradient. It carries lengths and labels only if revealed.

    Raises:
        DataError: If the gradient is not finite or all zero.
    """
    selection = adapter.select(shared)
    parameters = trainable(adapter, selection.names)
    loss = adapter.shared_loss(batch, adapter.input(batch), parameters, selection)
    values = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    gradient = {
        # A parameter the loss does not use has no gradient; a client shares zeros for it.
        name: torch.zeros_like(p) if value is None else value.detach()
        for (name, p), value in zip(parameters.items(), values, strict=True)
    }
    if not any(value.any() for value in gradient.values()):
        raise DataError(f"every shared gradient (shared={shared!r}) is zero: the loss does not depend on it")
    class_labels = batch.targets if batch.targets.dim() == 1 else None
    return SharedGradient(
        gradient=gradient,
        task=adapter.task,
        batch_size=batch.size,
        model=adapter.name,
        shared=shared,
        layout=dict(batch.layout) if reveal_lengths else {},
        labels=class_labels if reveal_labels else None,
    )


def trainable(adapter: ModelAdapter, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Return the named parameters as fresh leaves that require gradients (same storage, model untouched)."""
    parameters = adapter.parameters()
    return {name: parameters[name].requires_grad_() for name in names}


def gradient_of(
    adapter: ModelAdapter, x: Tensor, targets: Tensor, layout: Mapping[str, Tensor], names: tuple[str, ...],
    *, create_graph: bool = False,
) -> tuple[dict[str, Tensor], Tensor]:  # fmt: skip
    """Return the gradient and the loss at any x: what an attacker computes for a guess.

    Args:
        adapter: The model.
        x: A guess of the input.
        targets: A guess of the targets, hard or as probabilities.
        layout: Assumed lengths.
        names: Parameters whose gradient is wanted.
        create_graph: Whether the gradient itself is differentiated further.

    Returns:
        Gradient per name (zeros where the loss does not use a parameter) and the loss.
    """
    parameters = trainable(adapter, names)
    loss = adapter.loss(x, targets, layout, parameters)
    values = torch.autograd.grad(loss, list(parameters.values()), create_graph=create_graph, allow_unused=True)
    gradient = {n: torch.zeros_like(parameters[n]) if v is None else v for n, v in zip(names, values, strict=True)}
    return gradient, loss
