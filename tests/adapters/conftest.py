"""What the adapter tests share: the caller's model run plainly, text by text, without any padding."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from lmleak.adapters.precision import KeepDouble
from lmleak.types import IGNORE


def rows(batch):
    """One batch per example, its padding cut off."""
    for i in range(batch.size):
        real = batch.layout["attention_mask"][i].bool()
        targets = batch.targets[i : i + 1]
        yield replace(
            batch,
            inputs={name: t[i : i + 1, real] for name, t in batch.inputs.items()},
            targets=targets[:, real] if targets.dim() == 2 else targets,
            layout={name: t[i : i + 1, real] for name, t in batch.layout.items()},
        )


def plain_logits(model, ids, *, embeds=False):
    """The model's own forward on one unpadded text, with no mask and no positions given."""
    arguments = {"inputs_embeds": model.get_input_embeddings()(ids).detach()} if embeds else {"input_ids": ids}
    with KeepDouble():  # transformers casts to float32 inside, which is no part of what is compared
        return model(**arguments).logits


def plain_gradient(model, task, batch, *, embeds=False):
    """``loss.backward()`` of the mean loss, in the model's dtype, from one unpadded forward per text."""
    total, count = 0.0, 0
    for row in rows(batch):
        logits, targets = plain_logits(model, row.inputs["input_ids"], embeds=embeds), row.targets
        if task == "causal-lm":
            logits, targets = logits[:, :-1], targets[:, 1:]
        logits, targets = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
        total = total + F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
        count += int((targets != IGNORE).sum())
    model.zero_grad()
    (total / count).backward()
    gradient = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    model.zero_grad()
    return gradient


def largest_difference(got, expected):
    """Largest absolute difference over all tensors, relative to the largest number among the expected."""
    scale = max(t.abs().max().item() for t in expected.values())
    return max((got[n] - t).abs().max().item() for n, t in expected.items() if n in got) / scale


@pytest.fixture(autouse=True)
def global_random_state_untouched():
    """Every test of this folder also checks that the library draws from explicit generators only."""
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture(name="plain_gradient")
def _plain_gradient():
    return plain_gradient


@pytest.fixture(name="plain_logits")
def _plain_logits():
    return plain_logits


@pytest.fixture(name="rows")
def _rows():
    return rows


@pytest.fixture(name="largest_difference")
def _largest_difference():
    return largest_difference
