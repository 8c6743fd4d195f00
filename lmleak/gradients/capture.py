"""Capture of what a client shares: the gradient of one batch (FedSGD), or the update of local training (FedAvg)."""

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from math import hypot, inf

import torch
from torch import Tensor

from lmleak.adapters.base import ModelAdapter
from lmleak.adapters.dropout import dropout_on
from lmleak.adapters.structure import Selection
from lmleak.errors import ConfigError, DataError, UnsupportedCombinationError
from lmleak.gradients.shared import SharedGradient, inseparable_table
from lmleak.types import SINGLE_STEP, Aggregation, Batch


def capture_gradient(
    adapter: ModelAdapter,
    batch: Batch,
    *,
    shared: str = "no-word-embeddings",
    reveal_lengths: bool = True,
    reveal_labels: bool = True,
    aggregation: Aggregation = SINGLE_STEP,
    dropout: bool = False,
    seed: int = 0,
    max_example_norm: float | None = None,
) -> SharedGradient:
    """Compute what the server receives: one gradient, or the update of several local steps and clients.

    One step of one client: g(x) = grad_theta L(x, y; theta), the mean over the batch, as ``loss.backward()`` gives it.
    In general, each of C clients starts at theta_0, takes K plain SGD steps theta_{k+1} = theta_k - lr grad L_k
    on consecutive parts of its share of the batch, L_k being the mean loss over that part as the model's own loss
    takes it (over examples, or over target tokens), and the mean of (theta_0 - theta_K) / (lr K) is released
    (McMahan et al. 2017, arXiv:1602.05629, algorithm 1, with clients of equal weight). Every trained parameter
    moves in the local steps, the word table included; only the selected ones are released. The difference is
    taken of weights in the model's precision, as a real server takes it: an update in float32 carries rounding of
    about 6e-8 |theta| / (lr K) per coordinate, which at lr = 1e-5 is 0.4 % of the update of the embedded models.
    Local steps need one more set of trained parameters than a gradient does.

    Args:
        adapter: The model.
        batch: The private batch, over all clients: client after client, step after step.
        shared: Which parameters theta are shared (``ModelAdapter.select``).
        reveal_lengths: Whether the server learns lengths and padding. Matching attacks need them; the papers
            assume them known.
        reveal_labels: Whether the server learns the class labels, likewise. Token targets are never revealed.
        aggregation: Clients, epochs, steps per epoch and learning rate.
        dropout: Whether the model's dropout is active, as in ``model.train()``; recorded as the defense "dropout(on)".
        seed: Seed of the dropout masks; private, like the seed of any random defense.
        max_example_norm: Largest l2 norm C of one example's gradient, the released parameters together. If given, the
            gradient is that of DP-SGD before its noise (Abadi et al. 2016, arXiv:1607.00133, algorithm 1):
            (1/B) sum_i g_i min(1, C / (||g_i|| + 1e-6)) with g_i the gradient of example i's own mean loss and the
            stabiliser of Opacus; recorded as the defense "clip-examples(max_norm=C)". One backward pass per example.

    Returns:
        The clean gradient. It carries lengths and labels only if revealed.

    Raises:
        DataError: If the batch cannot be divided as asked, or the gradient is not finite or all zero.
        ConfigError: If the largest norm is not positive.
        UnsupportedCombinationError: If a tied table's update would have to be split into its two uses, or examples
            clipped within an update of several clients or steps.
    """
    clips = max_example_norm is not None
    if clips and (not isinstance(max_example_norm, int | float) or not 0 < max_example_norm < inf):
        raise ConfigError(f"max_example_norm must be a number > 0, got {max_example_norm!r}")
    if clips and not aggregation.clients == aggregation.steps == 1:
        raise UnsupportedCombinationError(
            f"max_example_norm={max_example_norm:g} bounds what one example adds to one client's gradient, and this "
            f"is the update of {aggregation.clients} client(s) with {aggregation.steps} local step(s), in which "
            "examples interact; capture each client's single step by itself"
        )
    selection = adapter.select(shared)
    if inseparable_table(adapter, shared, aggregation):
        raise UnsupportedCombinationError(
            f"after {aggregation.steps} local steps the update of {adapter.lookup_table()!r} sums what came through "
            f"the looked-up rows and through the head, and shared={shared!r} asks for the head's part alone; pass "
            "shared='all' (both parts), or a selection without the table ('block:0-1', a regular expression)"
        )
    with dropout_on(adapter.model, seed=seed) if dropout else nullcontext():
        if clips:
            gradient = _mean_of_clipped(adapter, batch, selection, max_example_norm)
        elif aggregation.steps == 1:
            gradient = _mean_gradient(adapter, batch, selection, aggregation)
        else:
            gradient = _local_training(adapter, batch, selection, aggregation)
    if not any(value.any() for value in gradient.values()):
        raise DataError(
            f"every shared gradient (shared={shared!r}) is zero: the loss does not depend on it"
            + (", or the learning rate is too small to move the weights" if aggregation.steps > 1 else "")
        )
    defenses = ("dropout(on)",) if dropout else ()
    if clips:
        defenses += (f"clip-examples(max_norm={float(max_example_norm)!r})",)
    class_labels = batch.targets if batch.targets.dim() == 1 else None
    return SharedGradient(
        gradient=gradient,
        task=adapter.task,
        batch_size=batch.size,
        model=adapter.name,
        weights=adapter.weights_digest(),
        shared=shared,
        defenses=defenses,
        layout=dict(batch.layout) if reveal_lengths else {},
        labels=class_labels if reveal_labels else None,
        aggregation=aggregation,
    )


def _mean_gradient(
    adapter: ModelAdapter, batch: Batch, selection: Selection, aggregation: Aggregation
) -> dict[str, Tensor]:
    """Return the mean over clients of the gradient of each one's mean loss."""
    parameters = trainable(adapter, selection.names)
    total: dict[str, Tensor] = {}
    for (rows,) in aggregation.schedule(batch.size):
        part = _part(batch, rows)
        loss = adapter.shared_loss(part, adapter.input(part), parameters, selection)
        for name, value in gradient_in(loss, parameters).items():
            total[name] = total[name] + value if name in total else value  # out of place: gradients may share storage
    if aggregation.clients == 1:
        return total
    return {name: value / aggregation.clients for name, value in total.items()}


def _mean_of_clipped(adapter: ModelAdapter, batch: Batch, selection: Selection, max_norm: float) -> dict[str, Tensor]:
    """Return (1/B) sum_i g_i min(1, max_norm / (||g_i|| + 1e-6)), norms in float64."""
    parameters = trainable(adapter, selection.names)
    mean = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for i in range(batch.size):
        example = _part(batch, slice(i, i + 1))
        loss = adapter.shared_loss(example, adapter.input(example), parameters, selection)
        gradient = gradient_in(loss, parameters)
        norm = hypot(*(torch.linalg.vector_norm(g, dtype=torch.float64).item() for g in gradient.values()))
        factor = min(1.0, max_norm / (norm + 1e-6))
        for name, value in gradient.items():
            mean[name].add_(value.detach(), alpha=factor / batch.size)
    return mean


def _local_training(
    adapter: ModelAdapter, batch: Batch, selection: Selection, aggregation: Aggregation
) -> dict[str, Tensor]:
    """Return the mean over clients of (theta_0 - theta_K) / (learning_rate K)."""
    start = adapter.parameters()
    # The client's model: a copy with trained parameters of its own, and all else shared.
    kept = [*adapter.model.buffers(), *(p for p in adapter.model.parameters() if not p.requires_grad)]
    kept.append(getattr(adapter, "tokenizer", None))
    client = copy.deepcopy(adapter, {id(item): item for item in kept})
    moving = {name: p for name, p in client.model.named_parameters() if p.requires_grad}
    scale = aggregation.learning_rate * aggregation.steps * aggregation.clients
    update: dict[str, Tensor] = {}
    for steps in aggregation.schedule(batch.size):
        with torch.no_grad():
            for name, parameter in moving.items():
                parameter.copy_(start[name])
        for rows in steps:
            part = _part(batch, rows)
            loss = client.loss_through_lookup(part, client.input(part), {})  # x is read from the moving table
            values = torch.autograd.grad(loss, list(moving.values()), allow_unused=True)
            with torch.no_grad():
                for parameter, value in zip(moving.values(), values, strict=True):
                    if value is not None:
                        parameter.sub_(value, alpha=aggregation.learning_rate)
            del loss, values  # before the next step, which needs the memory
        for name in selection.names:
            change = (start[name] - moving[name].detach()).div_(scale)
            update[name] = update[name].add_(change) if name in update else change
    return update


def _part(batch: Batch, rows: slice) -> Batch:
    """Return some rows of a batch, padding as it is."""
    return Batch(
        inputs={name: tensor[rows] for name, tensor in batch.inputs.items()},
        targets=batch.targets[rows],
        layout={name: tensor[rows] for name, tensor in batch.layout.items()},
    )


def trainable(adapter: ModelAdapter, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Return the named parameters as fresh leaves that require gradients (same storage, model untouched)."""
    parameters = adapter.parameters()
    return {name: parameters[name].requires_grad_() for name in names}


def gradient_in(loss: Tensor, parameters: Mapping[str, Tensor], *, create_graph: bool = False) -> dict[str, Tensor]:
    """Return d loss / d parameter by name; a parameter the loss does not use shares zeros, as clients do."""
    values = torch.autograd.grad(loss, list(parameters.values()), create_graph=create_graph, allow_unused=True)
    found = {
        name: torch.zeros_like(parameter) if value is None else value
        for (name, parameter), value in zip(parameters.items(), values, strict=True)
    }
    return found if create_graph else _with_memory_of_their_own(found)


def _with_memory_of_their_own(gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the same tensors, those copied that share memory with an earlier one, as a class token's may do."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in gradient.items():
        memory = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return apart


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
    return gradient_in(loss, parameters, create_graph=create_graph), loss
