"""Parts of the span attack on encoders: the search over sentences, and the contexts and relaxation it scores by."""

import pytest
import torch

from lmleak.attacks.span_assignment import Assignments, Budget, rearrangements
from lmleak.attacks.span_context import Contexts
from lmleak.attacks.span_filter import Survivors
from lmleak.attacks.span_layers import forward
from lmleak.attacks.span_relaxation import Relaxation
from lmleak.attacks.span_sentence_test import sentence_sites
from lmleak.attacks.span_sentences import PLAUSIBLE, closest, plausibility
from tests.families import make


def hamming(truth):
    return lambda ids: (ids != torch.tensor(truth)).double().mean(dim=1)


def test_descent_keeps_what_is_pinned_and_finds_the_rest():
    candidates = [torch.arange(10) for _ in range(6)]
    search = Assignments(candidates, hamming([3, 1, 4, 1, 5, 9]), torch.Generator().manual_seed(0))
    assert not search.enumerable
    starts = search.draw(5, [], set())
    pins = starts.ids.gather(1, starts.pinned[:, None])[:, 0]
    minima, scores = search.descend(starts)
    assert torch.equal(scores, hamming([3, 1, 4, 1, 5, 9])(minima))
    assert (scores <= 1 / 6 + 1e-12).all()  # at most the pinned token is wrong
    reached = {(p, ids[p]) for ids in minima.tolist() for p in range(6)}
    assert set(zip(starts.pinned.tolist(), pins.tolist(), strict=True)) <= reached


def test_starts_prefer_what_is_unexplained():
    search = Assignments([torch.arange(50)] * 3, hamming([0, 0, 0]), torch.Generator().manual_seed(0))
    known = [[1, 2, 3]]
    starts = search.draw(40, known, {(p, t) for p in range(3) for t in range(49)})
    pins = starts.ids.gather(1, starts.pinned[:, None])[:, 0]
    assert (pins == 49).sum() > 2  # by chance 40 / 50
    from_known = starts.ids[::2] == torch.tensor(known)
    assert (from_known.sum(dim=1) >= 2).all()


def test_descent_ends_with_its_budget():
    candidates = [torch.arange(10) for _ in range(6)]
    search = Assignments(
        candidates, hamming([3, 1, 4, 1, 5, 9]), torch.Generator().manual_seed(0), budget=Budget(limit=30)
    )
    minima, scores = search.descend(search.draw(2, [], set()))
    assert len(minima) <= 2
    assert torch.equal(scores, hamming([3, 1, 4, 1, 5, 9])(minima))
    assert 30 <= search.budget.spent < 30 + 2 * 10  # the last position that was begun is finished


def test_starts_prefer_what_is_plausible():
    plausible = {(p, 7): 1000.0 for p in range(3)}
    search = Assignments([torch.arange(50)] * 3, hamming([0, 0, 0]), torch.Generator().manual_seed(0),
                         plausibility=plausible)  # fmt: skip
    assert (search.draw(40, [], set()).ids == 7).double().mean() > 0.8  # by chance 0.02


def test_closest_candidates_end_at_the_first_empty_position():
    survivors = [Survivors(torch.tensor(ids), torch.tensor(residual, dtype=torch.float64)) for ids, residual in [
        ([5, 6], [1e-9, 4e-7]), ([7], [2e-8]), ([8, 9], [5e-7, 6e-7]), ([4], [3e-8])]]  # fmt: skip
    assert [ids.tolist() for ids in closest(survivors, 3)] == [[5], [7]]
    assert [ids.tolist() for ids in closest(survivors, 6)] == [[5, 6], [7], [8, 9], [4]]
    assert plausibility(survivors)[0, 5] == PLAUSIBLE
    assert plausibility(survivors)[1, 7] == pytest.approx(3e-8 / 2e-8)


@pytest.mark.parametrize("name", ["bert", "distilbert", "roberta"])
def test_relaxation_of_a_sentence_is_its_contexts(name):
    """At one-hot probabilities the queries of the sentence see exactly what the model computes."""
    adapter, _ = make(name)
    path = sentence_sites(adapter, dict(adapter.parameters()))[0].paths[0]
    contexts = Contexts(adapter, path, torch.tensor([7, 9, 12, 33, 41]), 4)
    candidates = [torch.tensor(c) for c in ([7], [9, 12, 33], [7, 41], [12, 9])]
    search = Assignments(candidates, hamming([7, 12, 41, 9]), torch.Generator().manual_seed(0))
    relaxation = Relaxation(contexts, search, lambda x: x.square().mean(dim=-1))
    chosen = torch.tensor([1, 0, 1, 0, 0, 1, 0, 1], dtype=torch.bool)  # 7, 12, 41, 9
    x = relaxation.contexts(chosen[None].double())[0, chosen]
    assert torch.allclose(x, forward(adapter, torch.tensor([[7, 12, 41, 9]]), stop_at=path)[0], atol=1e-13, rtol=0)
    starts = search.draw(6, [], set())
    pins = starts.ids.gather(1, starts.pinned[:, None])
    sharp = relaxation.sharpen(starts, set())
    assert torch.equal(sharp.ids.gather(1, starts.pinned[:, None]), pins)
    assert all(torch.isin(sharp.ids[:, p], c).all() for p, c in enumerate(candidates))
    assert search.budget.spent == 6 + 6 * relaxation.cost + 6


def test_few_sentences_are_all_scored():
    search = Assignments([torch.tensor([1, 2]), torch.tensor([3]), torch.tensor([5, 6])], hamming([2, 3, 5]),
                         torch.Generator())  # fmt: skip
    assert search.enumerable
    ids, scores = search.every()
    assert ids[0].tolist() == [2, 3, 5]
    assert scores.tolist() == sorted(scores.tolist())
    assert search.budget.spent == 4


def test_rearrangements_are_swaps_and_moves():
    orders = rearrangements(4).tolist()
    assert [1, 0, 2, 3] in orders  # swap of neighbours, which is also the shortest move
    assert [3, 1, 2, 0] in orders
    assert [1, 2, 3, 0] in orders  # first moved to the end
    assert all(sorted(order) == [0, 1, 2, 3] for order in orders)
    assert len(orders) == 6 + 6
    assert rearrangements(1).shape == (0, 1)


@pytest.mark.parametrize("name", ["bert", "distilbert", "roberta", "unlisted-electra"])
def test_cached_contexts_are_the_models(name):
    adapter, _ = make(name)
    path = sentence_sites(adapter, dict(adapter.parameters()))[0].paths[0]
    tokens = torch.tensor([7, 9, 12, 33, 41])
    contexts = Contexts(adapter, path, tokens, 6)
    assert contexts.agrees(torch.Generator().manual_seed(0))
    ids = torch.tensor([[7, 12, 9, 7], [41, 41, 33, 9]])
    assert torch.allclose(contexts(ids), forward(adapter, ids, stop_at=path), atol=1e-13, rtol=0)
    contexts.heads = 1
    assert not contexts.agrees(torch.Generator().manual_seed(0))
