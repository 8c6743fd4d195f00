"""The gradient of every example of a batch by itself, at about the cost of the batch where the model allows it."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lmleak.adapters.base import ModelAdapter
from lmleak.adapters.structure import Selection
from lmleak.errors import DataError
from lmleak.gradients.capture import gradient_in, trainable
from lmleak.types import Batch

PARITY = 1e-4  # a vectorised gradient further than this from the plain one, relative to its norm, is not trusted


@dataclass(frozen=True)
class PerExampleGradients:
    """Gradients of single examples."""

    gradient: dict[str, Tensor]
    """Per parameter name (B, *shape): row i is the gradient of example i's own mean loss."""
    method: str
    """"vmap" (all examples in one vectorised pass) or "loop" (one backward pass per example)."""
    reason: str = ""
    """Why it was a loop; empty otherwise."""


def per_example_gradients(
    adapter: ModelAdapter, batch: Batch, *, shared: str = "no-word-embeddings"
) -> PerExampleGradients:
    """Compute g_i = grad_theta L(x_i, y_i; theta) for every example i of a batch.

    Row i is what a client with the single example i shares (``capture_gradient`` on a batch of one). The loss is the
    example's own: over its target tokens, under its own mask, with the padding that the batch gave it. For a mean
    loss over examples (1/B) sum_i g_i is the gradient of the batch; for one over target tokens it is not, unless all
    have equally many. One vectorised pass (``torch.func.vmap`` of ``torch.func.grad``) serves all examples of one
    layout; models decide by the values of the mask, so the mask cannot be vectorised over and texts of unequal
    padding take one pass per layout. The first example is computed a second time by a plain backward pass; where
    that differs, or the model cannot be vectorised, all are computed by plain passes and ``reason`` says why.

    Memory: B times the shared parameters, and the activations of the batch.

    Args:
        adapter: The model.
        batch: The examples.
        shared: Which parameters theta (``ModelAdapter.select``).

    Returns:
        The gradients, detached.

    Raises:
        DataError: If a gradient is not finite.
    """
    selection = adapter.select(shared)
    first = _plain(adapter, _example(batch, 0), selection)
    if batch.size == 1:
        found = PerExampleGradients({n: g[None] for n, g in first.items()}, "loop", "the batch holds one example")
    else:
        found = _vectorised_or_loop(adapter, batch, selection, first)
    for name, value in found.gradient.items():
        if not all(extreme.isfinite() for extreme in torch.aminmax(value)):  # one pass; NaN prevails
            raise DataError(f"the gradient of {name!r} holds NaN or Inf; check the weights and the examples")
    return found


def _vectorised_or_loop(
    adapter: ModelAdapter, batch: Batch, selection: Selection, first: dict[str, Tensor]
) -> PerExampleGradients:
    try:
        gradient = _vectorised(adapter, batch, selection)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError) as error:  # what functorch and models under it raise
        reason = f"{adapter.name} cannot be vectorised over examples: {str(error).strip().splitlines()[0]}"
    else:
        distance = sum((gradient[n][0] - g).double().square().sum() for n, g in first.items()) ** 0.5
        norm = sum(g.double().square().sum() for g in first.values()) ** 0.5
        if distance <= PARITY * norm:
            return PerExampleGradients(gradient, "vmap")
        reason = f"{adapter.name} gives another gradient when vectorised (relative distance {distance / norm:.1e})"
    rows = [_plain(adapter, _example(batch, i), selection) for i in range(1, batch.size)]
    return PerExampleGradients({n: torch.stack([g, *(r[n] for r in rows)]) for n, g in first.items()}, "loop", reason)


def _vectorised(adapter: ModelAdapter, batch: Batch, selection: Selection) -> dict[str, Tensor]:
    parameters = adapter.parameters()
    theta = {name: parameters[name] for name in selection.names}
    parts, order = [], []
    for rows, layout in _layouts(batch):

        def loss(theta, inputs, targets, layout=layout):
            example = Batch({n: t[None] for n, t in inputs.items()}, targets[None], layout)
            return adapter.shared_loss(example, adapter.input(example), theta, selection)

        inputs = {name: tensor[rows] for name, tensor in batch.inputs.items()}
        parts.append(torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(theta, inputs, batch.targets[rows]))
        order.append(rows)
    if len(parts) == 1:
        return parts[0]  # as it is: copies of B times all parameters would cost as much as the pass
    back = torch.cat(order).argsort()
    return {name: torch.cat([part[name] for part in parts])[back] for name in theta}


def _layouts(batch: Batch) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Return the rows of every distinct layout, with that layout as a batch of one."""
    where = batch.targets.device
    if not batch.layout:
        yield torch.arange(batch.size, device=where), {}
        return
    joined = torch.cat([tensor.reshape(batch.size, -1) for tensor in batch.layout.values()], dim=1)
    _, number = torch.unique(joined, dim=0, return_inverse=True)
    for i in range(int(number.max()) + 1):
        rows = (number == i).nonzero()[:, 0]
        yield rows, {name: tensor[rows[:1]] for name, tensor in batch.layout.items()}


def _plain(adapter: ModelAdapter, example: Batch, selection: Selection) -> dict[str, Tensor]:
    parameters = trainable(adapter, selection.names)
    loss = adapter.shared_loss(example, adapter.input(example), parameters, selection)
    return {name: value.detach() for name, value in gradient_in(loss, parameters).items()}


def _example(batch: Batch, i: int) -> Batch:
    rows = slice(i, i + 1)
    return Batch(
        inputs={name: tensor[rows] for name, tensor in batch.inputs.items()},
        targets=batch.targets[rows],
        layout={name: tensor[rows] for name, tensor in batch.layout.items()},
    )


def shared_layers(adapter: ModelAdapter, shared: str = "no-word-embeddings") -> dict[str, tuple[str, ...]]:
    """Return the shared parameters by layer (``adapter.roles()``), in forward order, those that share any."""
    names = set(adapter.select(shared).names)
    layers = {layer: tuple(n for n in members if n in names) for layer, members in adapter.roles().items()}
    return {layer: members for layer, members in layers.items() if members}
