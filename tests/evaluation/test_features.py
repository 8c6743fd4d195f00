"""The feature error against logits that the model computes from token ids."""

from dataclasses import replace

import pytest
import torch

from lmleak.evaluation.features import feature_mse
from lmleak.metrics import score_text
from lmleak.types import AttackCost, Reconstruction
from tests.families import make


def answer(sequences, embeddings=None):
    confidence = tuple((1.0,) * len(s) for s in sequences)
    texts = ("",) * len(sequences)
    ids = tuple(map(tuple, sequences))
    return Reconstruction("span", ids, texts, confidence, AttackCost(0.0), "", embeddings=embeddings)


def errors(adapter, batch, recovered):
    return feature_mse(adapter, batch, recovered, score_text(recovered, batch))


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "roberta"])
def test_against_logits_from_ids(name):
    adapter, batch = make(name, size=2)
    truth = [list(ids) for ids in batch.token_ids]
    wrong = [[*truth[0][:-1], 23], truth[1]]
    (first, second) = errors(adapter, batch, answer(wrong))
    labels = [0] if adapter.task == "sequence-classification" else None
    with torch.no_grad():
        a, b = (adapter.logits_from_ids(adapter.batch([ids], labels)) for ids in (wrong[0], truth[0]))
    assert first == pytest.approx((a - b).square().mean().item(), rel=1e-9)
    assert first > 0
    assert second == 0


def test_recovered_embeddings_come_first():
    adapter, batch = make("bert", size=1)
    x = adapter.input(batch)[0]
    near = answer([[1] * len(batch.token_ids[0])], (x + 1e-6,))  # tokens all wrong, embeddings nearly right
    (error,) = errors(adapter, batch, near)
    assert 0 < error < 1e-9


def test_other_lengths_have_none():
    adapter, batch = make("gpt2", size=2)
    assert errors(adapter, batch, answer([batch.token_ids[0][:-1]])) == [None, None]
    x = adapter.input(batch)
    short = replace(answer([batch.token_ids[0]], (x[0, :-1],)))
    assert errors(adapter, batch, short)[0] is None
