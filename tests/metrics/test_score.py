"""Scores of a whole reconstruction."""

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmleak.errors import DataError
from lmleak.metrics import score_strings, score_text, token_correctness
from lmleak.metrics.score import MEANS
from lmleak.types import AttackCost, Reconstruction, TextBatch

VOCABULARY = ["my", "pin", "is", "four", "two", "call", "Ana", "now", "."]
FIRST, SECOND = (0, 1, 2, 3, 4), (5, 6, 7, 8)


def decode(ids):
    return " ".join(VOCABULARY[i] for i in ids)


def reconstruction(*sequences, embeddings=None):
    return Reconstruction(
        attack="test",
        token_ids=tuple(sequences),
        texts=tuple(map(decode, sequences)),
        confidence=tuple(tuple(1.0 for _ in ids) for ids in sequences),
        cost=AttackCost(seconds=0.0),
        stopped="converged",
        embeddings=embeddings,
    )


def batch(*sequences):
    return TextBatch(
        inputs={},
        targets=torch.zeros(len(sequences), dtype=torch.long),
        texts=tuple(map(decode, sequences)),
        token_ids=tuple(sequences),
    )


def numbers(score):
    return {name: getattr(score, name) for name in MEANS}


sequence = st.lists(st.integers(0, len(VOCABULARY) - 1), max_size=6).map(tuple)


def test_perfect_recovery_is_one_everywhere_in_any_order():
    score = score_text(reconstruction(SECOND, FIRST), batch(FIRST, SECOND))
    assert set(numbers(score).values()) == {1.0}
    assert (score.edit_distance, score.entity_recall) == (0.0, 1.0)  # "call Ana now": one name
    assert [example.entity_recall for example in score.per_example] == [None, 1.0]
    assert [example.prediction for example in score.per_example] == [1, 0]
    assert score.num_references == score.num_predictions == 2
    assert all(all(example.correct) and all(example.in_bag) for example in score.per_example)


def test_disjoint_recovery_is_zero_everywhere():
    score = score_text(reconstruction((5, 6), (7, 7)), batch((0, 1, 2), (3, 4)))
    assert set(numbers(score).values()) == {0.0}
    assert score.edit_distance == 1.0
    assert score.entity_recall is None  # there was none to find


def test_by_hand():
    # matched: (0 1 2 4) with (0 1 2 3 4), F1 = 8/9; nothing with (5 6 7 8)
    score = score_text(reconstruction((0, 1, 2, 4)), batch(FIRST, SECOND))
    assert score.token_precision == 1 / 2
    assert score.token_recall == pytest.approx((4 / 5) / 2)
    assert score.token_f1 == pytest.approx((8 / 9) / 2)
    assert score.position_accuracy == pytest.approx((3 / 5) / 2)
    assert score.exact_match == 0.0
    assert score.rouge1 == pytest.approx((8 / 9) / 2)
    assert score.rouge2 == pytest.approx((2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4)) / 2)
    # n-grams: 4 words and 3 + 2 + 1 = 10, against 5 + 4 + 3 + 2 = 14; shared: 4 words, 2 pairs, 1 triple
    assert score.google_bleu == pytest.approx((7 / 14) / 2)
    assert score.edit_distance == pytest.approx((1 / 5 + 1) / 2)  # one token to insert; all four missing
    assert score.entity_recall == 0.0  # "Ana" is in the second text
    first, second = score.per_example
    assert (first.prediction, first.text, first.token_ids) == (0, "my pin is two", (0, 1, 2, 4))
    assert first.correct == (True, True, True, False, False)
    assert first.in_bag == (True, True, True, False, True)
    assert (second.prediction, second.text, second.token_ids) == (None, "", ())
    assert second.correct == second.in_bag == (False, False, False, False)


def test_one_sentence_recovered_many_times_serves_one_reference():
    score = score_text(reconstruction(FIRST, FIRST), batch(FIRST, (*FIRST[:4], 8)))
    assert score.exact_match == 0.5
    score = score_text(reconstruction(FIRST, FIRST), batch(FIRST, SECOND))
    assert score.token_recall == score.rouge1 == 0.5


def test_an_attack_that_found_nothing():
    for nothing in (reconstruction(), reconstruction((), ())):
        score = score_text(nothing, batch(FIRST, SECOND))
        assert set(numbers(score).values()) == {0.0}
        assert score.embedding_rmse is None
        assert (score.edit_distance, score.entity_recall) == (1.0, 0.0)


def test_special_tokens_give_no_floor():
    unrelated = score_text(reconstruction((5, 6, 7, 7, 7, 6, 5)), batch((0, 1, 2, 3, 4, 0, 1)))
    assert unrelated.rouge1 == unrelated.rougeL == 0.0


@settings(deadline=None)
@given(st.lists(sequence, max_size=4), st.lists(sequence, min_size=1, max_size=4), st.randoms())
def test_order_never_matters_and_scores_stay_in_the_unit_interval(predictions, references, random):
    score = score_text(reconstruction(*predictions), batch(*references))
    assert all(0.0 <= value <= 1.0 for value in [*numbers(score).values(), score.edit_distance])
    assert set(numbers(score_text(reconstruction(*references), batch(*references))).values()) == {1.0}
    shuffled = list(predictions)
    random.shuffle(shuffled)
    assert numbers(score_text(reconstruction(*shuffled), batch(*references))) == numbers(score)
    order = list(range(len(references)))
    random.shuffle(order)
    permuted = score_text(reconstruction(*predictions), batch(*(references[i] for i in order)))
    assert numbers(permuted) == numbers(score)
    for example, truth in zip(score.per_example, references, strict=True):
        assert len(example.correct) == len(example.in_bag) == len(truth)
        if truth:
            assert sum(example.correct) / len(truth) == example.position_accuracy
            assert sum(example.in_bag) / len(truth) == example.token_recall


def test_in_bag_prefers_the_occurrence_at_its_position():
    assert token_correctness("xyA", "AbA") == ((False, False, True), (False, False, True))
    assert token_correctness("Axx", "bAA") == ((False, False, False), (False, True, False))


def test_embedding_rmse_pools_the_coordinates_of_matched_sequences():
    true = (torch.zeros(2, 3), torch.zeros(4, 3))
    recovered = (torch.full((4, 3), 2.0), torch.ones(2, 3))  # second text first
    score = score_text(reconstruction(SECOND, FIRST, embeddings=recovered), batch(FIRST, SECOND), true)
    assert [example.embedding_rmse for example in score.per_example] == [1.0, 2.0]
    assert score.embedding_rmse == pytest.approx(math.sqrt((6 * 1 + 12 * 4) / 18))


def test_embedding_rmse_is_none_rather_than_flattering():
    true = (torch.zeros(2, 3), torch.zeros(4, 3))
    short = (torch.ones(2, 3), torch.zeros(3, 3))
    score = score_text(reconstruction(FIRST, SECOND, embeddings=short), batch(FIRST, SECOND), true)
    assert [example.embedding_rmse for example in score.per_example] == [1.0, None]
    assert score.embedding_rmse is None
    assert score_text(reconstruction(FIRST, SECOND), batch(FIRST, SECOND), true).embedding_rmse is None
    given_only = reconstruction(FIRST, SECOND, embeddings=short)
    assert score_text(given_only, batch(FIRST, SECOND)).embedding_rmse is None


def test_to_dict_is_json_without_tensors():
    true = (torch.zeros(2, 3), torch.zeros(4, 3))
    attack = reconstruction(FIRST, embeddings=(torch.ones(2, 3),))
    flat = score_text(attack, batch(FIRST, SECOND), true).to_dict()
    assert json.loads(json.dumps(flat, allow_nan=False)) == flat
    assert {"rouge1", "rouge2", "rougeL", "token_precision", "token_recall", "token_f1", "position_accuracy",
            "exact_match", "google_bleu", "embedding_rmse", "edit_distance", "entity_recall", "num_references",
            "per_example"} <= set(flat)  # fmt: skip
    assert flat["embedding_rmse"] is None
    assert flat["per_example"][0]["embedding_rmse"] == 1.0
    assert flat["per_example"][0]["token_ids"] == list(FIRST)
    assert flat["per_example"][1]["prediction"] is None


def test_token_ids_may_be_numbers_of_any_kind():
    tensors = replace(reconstruction(FIRST), token_ids=(torch.tensor(FIRST),))
    score = score_text(tensors, batch(FIRST))
    assert score.exact_match == score.token_f1 == 1.0
    assert json.dumps(score.to_dict())


def test_strings():
    score = score_strings(["call Ana", "my pin is  four two"], ["my pin is four two", "call Ana now"])
    assert [example.prediction for example in score.per_example] == [1, 0]
    assert score.exact_match == 0.5  # white space does not count
    assert score.token_recall == pytest.approx((1 + 2 / 3) / 2)
    assert score.per_example[0].token_ids is None
    assert score.embedding_rmse is None
    assert score_strings(["CALL"], ["call"]).exact_match == 0.0  # tokens keep their case, ROUGE words do not
    assert score_strings(["CALL"], ["call"]).rouge1 == 1.0


def test_strings_with_token_ids_score_as_a_reconstruction_does():
    predictions, references = [SECOND, (0, 1, 4)], [FIRST, SECOND]
    expected = score_text(reconstruction(*predictions), batch(*references))
    texts = [list(map(decode, side)) for side in (predictions, references)]
    assert score_strings(*texts, predicted_ids=predictions, true_ids=references) == expected
    with pytest.raises(DataError, match="one side only"):
        score_strings(*texts, true_ids=references)
    with pytest.raises(DataError, match=r"2 text\(s\) but 1 token sequence\(s\) as predictions"):
        score_strings(*texts, predicted_ids=[FIRST], true_ids=references)


def test_strings_of_other_scripts():
    same = score_strings(["Мой адрес: Київ", "我住在北京"], ["我住在北京", "Мой адрес: Київ"])
    assert set(numbers(same).values()) == {1.0}
    assert score_strings(["東京 tower"], ["大阪 tower"], words="unicode").rouge1 == pytest.approx(1 / 3)


def test_refusals_say_what_was_got():
    with pytest.raises(DataError, match="at least one reference"):
        score_strings(["a"], [])
    with pytest.raises(DataError, match=r"write \[reference\]"):
        score_strings(["a"], "a")
    with pytest.raises(DataError, match=r"2 example\(s\) but 0 reference"):
        score_text(reconstruction(FIRST), replace(batch(FIRST, SECOND), texts=()))
    with pytest.raises(DataError, match=r"1 text\(s\) but 2 token sequence\(s\) as predictions"):
        score_text(replace(reconstruction(FIRST, SECOND), texts=("a",)), batch(FIRST))
    with pytest.raises(DataError, match="embeddings of 1 as references"):
        score_text(reconstruction(FIRST), batch(FIRST, SECOND), (torch.zeros(1, 1),))
