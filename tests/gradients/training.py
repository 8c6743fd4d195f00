"""Training as a client does it: the caller's model, its own loss on labels, torch's SGD. The oracle of captures."""

import copy

import torch

from lmleak.adapters.precision import KeepDouble


def own_loss(model, batch, rows):
    """The loss that transformers computes from labels, on some rows of a batch."""
    arguments = {name: tensor[rows] for name, tensor in {**batch.inputs, **batch.layout}.items()}
    with KeepDouble():  # transformers casts to float32 inside, which is no part of what is compared
        return model(**arguments, labels=batch.targets[rows]).loss


def eager_copy(model):
    """The caller's model with parameters of its own and the attention that adapters use."""
    model = copy.deepcopy(model)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner.set_attn_implementation("eager")
    return model


def backward(model, batch, rows=slice(None)):
    """``loss.backward()`` of the model's own loss, per trained parameter."""
    model = eager_copy(model)
    own_loss(model, batch, rows).backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def fedavg(model, batch, clients, *, learning_rate):
    """The mean over clients of (theta_0 - theta_K) / (lr K); ``clients`` lists the rows of every local step."""
    total = {}
    for steps in clients:
        local = eager_copy(model)
        optimizer = torch.optim.SGD([p for p in local.parameters() if p.requires_grad], lr=learning_rate)
        for rows in steps:
            optimizer.zero_grad()
            own_loss(local, batch, rows).backward()
            optimizer.step()
        before, after = dict(model.named_parameters()), dict(local.named_parameters())
        for name, p in after.items():
            if p.requires_grad:
                change = (before[name] - p).detach() / (learning_rate * len(steps) * len(clients))
                total[name] = total.get(name, 0) + change
    return total


def largest_difference(got, expected):
    """Largest absolute difference over all tensors of ``got``, relative to the largest number expected."""
    scale = max(t.abs().max().item() for t in expected.values())
    return max((tensor - expected[name]).abs().max().item() for name, tensor in got.items()) / scale
