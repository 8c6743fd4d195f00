"""Sparse explanation of a noisy gradient: what correlated inputs hide from a row space, and calibration by chance."""

import math

import torch

from lmleak.attacks.span_score import FirstLayerScore, soft_row_space
from lmleak.attacks.span_sparse import SparseFirstLayer, sparse_powers
from lmleak.attacks.span_subspace import stacked_gradient
from lmleak.attacks.span_targets import MOST, HeadScore, tail_surprise, within
from lmleak.defenses import parse_defense
from lmleak.gradients.capture import capture_gradient
from tests.families import SEQUENCES, make


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_powers_of_independent_atoms_are_found():
    """float64: rows drawn from the model itself, correlated atoms, maximum likelihood near the truth."""
    atoms = torch.nn.functional.normalize(noise(80, 40) + 0.7 * noise(40, seed=1), dim=-1)
    power = torch.zeros(80, dtype=torch.float64)
    power[[3, 17, 42]] = torch.tensor([30.0, 10.0, 5.0], dtype=torch.float64)
    rows = noise(2000, 40, seed=2) + (noise(2000, 80, seed=3) * power.sqrt()) @ atoms
    found = sparse_powers(atoms, rows.T @ rows, 2000)
    torch.testing.assert_close(found[[3, 17, 42]], power[[3, 17, 42]], rtol=0.15, atol=0)
    assert found[power == 0].max() < 0.3


def test_tokens_are_found_that_a_row_space_loses():
    """Share of the true tokens among the 6 best of their position, by a sparse explanation and by the row space."""
    adapter, batch = make("gpt2")
    shared = parse_defense("gaussian(std=0.3, unit=rms)")(capture_gradient(adapter, batch))
    (path,) = adapter.attention_inputs(0)
    space = soft_row_space(stacked_gradient(adapter, shared.gradient, [path]))
    shares = []
    for kind in (FirstLayerScore, SparseFirstLayer):
        surprise = kind(adapter, path, space, seed=0).surprise(0, 6)
        best = surprise.topk(6, dim=0).indices
        pairs = [(p, t) for ids in SEQUENCES for p, t in enumerate(ids[:-1])]
        shares.append(sum(bool((best[:, p] == t).any()) for p, t in pairs) / len(pairs))
    assert shares[1] >= shares[0]


def test_tail_surprise_and_its_bound_keep_order():
    values = noise(50_000, 2)
    surprise = tail_surprise(values)
    assert abs((surprise > -math.log(0.05)).double().mean().item() - 0.05) < 0.01
    u = torch.tensor([-3.0, 2.0, MOST, 40.0, 4000.0])
    assert torch.equal(within(u)[:3], u[:3])
    assert within(u).diff().min() > 0
    assert within(u).max() <= 2 * MOST


def test_head_tells_next_tokens_of_true_prefixes_and_last_tokens():
    adapter, batch = make("gpt2-untied")
    shared = parse_defense("gaussian(std=0.01, unit=rms)")(capture_gradient(adapter, batch))
    head = HeadScore.read(adapter, shared.observation(lengths=False, labels=False), seed=0)
    ranks = []
    for ids in SEQUENCES:
        for t in range(1, len(ids)):
            surprise = head.following(torch.tensor([ids[:t]]))[0]
            ranks.append(int((surprise > surprise[ids[t]]).sum()))
    assert torch.tensor(ranks).double().median() <= 2
    classifier, texts = make("gpt2-classifier")
    released = capture_gradient(classifier, texts).observation(lengths=False, labels=False)
    assert HeadScore.read(classifier, released, seed=0) is None
