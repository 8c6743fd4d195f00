"""Assignment without replacement."""

from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmleak.metrics import match, position_accuracy, token_f1

sequences = st.lists(st.lists(st.integers(0, 3), max_size=4).map(tuple), max_size=4)


def total(assigned, predictions, references):
    return sum(
        token_f1(predictions[j], reference) + position_accuracy(predictions[j], reference)
        for j, reference in zip(assigned, references, strict=True)
        if j is not None
    )


@settings(deadline=None)
@given(sequences, sequences)
def test_match_is_the_best_of_all_assignments(predictions, references):
    assigned = match(predictions, references)
    used = [j for j in assigned if j is not None]
    assert len(used) == len(set(used)) == min(len(predictions), len(references))
    slots = [*range(len(predictions)), *[None] * len(references)]
    best = max(total(choice, predictions, references) for choice in permutations(slots, len(references)))
    assert total(assigned, predictions, references) == pytest.approx(best)


def test_one_prediction_cannot_serve_two_references():
    assert sorted(match([(1, 2, 3), (9, 9)], [(1, 2, 3), (1, 2, 4)])) == [0, 1]
    assert match([(1, 2, 3)], [(1, 2, 4), (1, 2, 3)]) == (None, 0)


def test_order_decides_between_equal_bags():
    assert match([(3, 2, 1), (1, 2, 3)], [(1, 2, 3), (3, 2, 1)]) == (1, 0)


def test_nothing_on_either_side():
    assert match([], [(1,), (2,)]) == (None, None)
    assert match([(1,)], []) == ()


def test_embeddings_decide_only_between_equal_tokens():
    near, far = torch.zeros(2, 3), torch.ones(2, 3)
    wrong = [(8, 8), (8, 8)]  # no token is right, so tokens cannot tell which is which
    truth = {"true_embeddings": [far, near]}
    assert match(wrong, [(1, 2), (3, 4)], predicted_embeddings=[near, far], **truth) == (1, 0)
    assert match(wrong, [(1, 2), (3, 4)], predicted_embeddings=[far, near], **truth) == (0, 1)
    right = [(1, 8), (3, 8)]  # here they can, and a nearer embedding does not overrule them
    assert match(right, [(1, 2), (3, 4)], predicted_embeddings=[near, far], **truth) == (0, 1)
