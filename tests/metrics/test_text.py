"""The plain functions against numbers worked out by hand and against the libraries that define them."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.metrics.distance import edit_distance as nltk_edit_distance
from nltk.translate.gleu_score import sentence_gleu
from rouge_score.rouge_scorer import RougeScorer

from lmleak.metrics import (
    edit_distance,
    embedding_rmse,
    exact_match,
    google_bleu,
    position_accuracy,
    rouge,
    token_f1,
    token_overlap,
    token_precision,
    token_recall,
)

TOKEN_METRICS = [token_precision, token_recall, token_f1, position_accuracy, exact_match, google_bleu]
tokens = st.lists(st.integers(0, 4), max_size=8)
sentences = st.lists(st.sampled_from(["the", "cat", "sat", "A", "7", "!"]), max_size=7).map(" ".join)


def test_token_metrics_by_hand():
    prediction, reference = [1, 1, 2, 9], [1, 2, 2, 3, 4]  # shared: one 1 and one 2
    assert token_overlap(prediction, reference) == 2
    assert token_precision(prediction, reference) == 2 / 4
    assert token_recall(prediction, reference) == 2 / 5
    assert token_f1(prediction, reference) == pytest.approx(4 / 9)
    assert position_accuracy(prediction, reference) == 2 / 5  # positions 0 and 2
    assert exact_match(prediction, reference) == 0.0


def test_a_repeated_guess_is_not_counted_twice():
    assert token_recall([5, 5, 5], [5, 6, 7]) == 1 / 3
    assert token_precision([5, 5, 5], [5, 6, 7]) == 1 / 3


def test_positions_beyond_the_shorter_sequence():
    assert position_accuracy([1, 2], [1, 2, 3, 4]) == 1 / 2  # positions not reached are wrong
    assert position_accuracy([1, 2, 3], [1, 2]) == 1.0  # surplus is no position of the reference,
    assert token_precision([1, 2, 3], [1, 2]) == 2 / 3  # it costs precision
    assert exact_match([1, 2, 3], [1, 2]) == 0.0
    assert position_accuracy([9, 1, 2, 3], [1, 2, 3]) == 0.0  # shifted by one


def test_google_bleu_by_hand():
    # n-grams of each: 3 + 2 + 1 = 6; shared: a, b, "a b"
    assert google_bleu(list("abc"), list("abd")) == 3 / 6
    # prediction a b: 3 n-grams, all of them right; reference a b c d: 4 + 3 + 2 + 1 = 10
    assert google_bleu(list("ab"), list("abcd")) == google_bleu(list("abcd"), list("ab")) == 3 / 10
    # "the" seven times against "the cat is on the mat": 2 matches of max(22, 18)
    assert google_bleu(["the"] * 7, ["the", "cat", "is", "on", "the", "mat"]) == 2 / 22
    assert google_bleu(list("ab"), list("ba"), max_order=1) == 1.0


@settings(deadline=None)
@given(tokens, tokens)
def test_google_bleu_is_that_of_nltk(prediction, reference):
    if prediction or reference:
        assert google_bleu(prediction, reference) == pytest.approx(sentence_gleu([reference], prediction))


def test_edit_distance_by_hand():
    assert edit_distance("kitten", "sitting") == 3 / 7
    assert edit_distance([9, 1, 2, 3], [1, 2, 3]) == 1 / 4  # shifted by one: a single deletion
    assert edit_distance([], []) == 0.0
    assert edit_distance([], [1]) == edit_distance([1], []) == 1.0


@settings(deadline=None)
@given(tokens, tokens, tokens)
def test_edit_distance_is_a_distance_and_that_of_nltk(prediction, reference, third):
    longer = max(len(prediction), len(reference))
    distance = edit_distance(prediction, reference)
    assert distance * longer == pytest.approx(nltk_edit_distance(prediction, reference))
    assert 0.0 <= distance <= 1.0
    assert (distance == 0.0) == (prediction == reference)
    assert distance == edit_distance(reference, prediction)
    # Replacing position by position is one way to edit, and tokens that the other side lacks must all go.
    assert distance * longer <= longer - sum(p == r for p, r in zip(prediction, reference, strict=False)) + 1e-12
    if longer:
        assert distance >= 1 - token_overlap(prediction, reference) / longer - 1e-12
    unnormalised = [
        edit_distance(a, b) * max(len(a), len(b))
        for a, b in ((prediction, third), (prediction, reference), (reference, third))
    ]
    assert unnormalised[0] <= unnormalised[1] + unnormalised[2] + 1e-12


def test_rouge_by_hand():
    scores = rouge("the cat sat", "the cat was there")
    assert scores.rouge1 == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    assert scores.rouge2 == pytest.approx(2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3))
    assert scores.rougeL == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    swapped = rouge("b a", "a b")
    assert tuple(swapped) == (1.0, 0.0, 0.5)


@settings(deadline=None)
@given(sentences, sentences)
def test_rouge_is_that_of_rouge_score_except_for_identical_words(prediction, reference):
    oracle = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False).score(reference, prediction)
    lowered = [Counter(), Counter()]
    for counter, text in zip(lowered, (prediction, reference), strict=True):
        counter.update(enumerate(text.lower().replace("!", " ").split()))
    if lowered[0] == lowered[1] or not lowered[1]:
        return  # the two documented differences, tested below
    for name, value in rouge(prediction, reference)._asdict().items():
        assert value == pytest.approx(oracle[name].fmeasure)


def test_rouge_differs_from_rouge_score_only_as_documented():
    single = RougeScorer(["rouge2"], use_stemmer=False).score("Hi!", "Hi!")
    assert single["rouge2"].fmeasure == 0.0  # what rouge_score says of a perfectly recovered word
    assert tuple(rouge("Hi!", "Hi!")) == (1.0, 1.0, 1.0)
    assert rouge("Hi there", "Hi!").rouge2 == 0.0


@pytest.mark.parametrize("text", ["", "?!", "東京に住む", "Привет, мир", "one", "two words", "  padded  text "])
def test_perfect_recovery_is_one_in_any_script(text):
    assert tuple(rouge(text, text)) == (1.0, 1.0, 1.0)
    assert all(metric(text.split(), text.split()) == 1.0 for metric in TOKEN_METRICS)


@pytest.mark.parametrize(
    ("prediction", "reference"), [("", "a b"), ("a b", ""), ("", "東京"), ("x", "?!"), ("?", "!")]
)
def test_nothing_recovered_is_zero(prediction, reference):
    assert tuple(rouge(prediction, reference)) == (0.0, 0.0, 0.0)
    assert all(metric(prediction.split(), reference.split()) == 0.0 for metric in TOKEN_METRICS)


def test_rouge_of_a_script_that_rouge_score_does_not_see():
    scores = rouge("東京に行く", "東京に住む")  # 東 京 に are shared, of five each
    assert scores.rouge1 == scores.rougeL == pytest.approx(3 / 5)
    assert scores.rouge2 == pytest.approx(2 / 4)
    assert rouge("東京 tower", "大阪 tower").rouge1 == 1.0  # "latin" sees only the second word
    assert rouge("東京 tower", "大阪 tower", "unicode").rouge1 == pytest.approx(1 / 3)


def test_special_tokens_left_in_raise_the_floor_that_the_module_warns_of():
    first, second = "my card ends in four two six", "please call doctor Ana about her knees"
    assert rouge(first, second).rouge1 == 0.0
    assert rouge(f"[CLS] {first} [SEP]", f"[CLS] {second} [SEP]").rouge1 == pytest.approx(2 / 9)


@given(tokens, tokens)
@settings(deadline=None)
def test_token_metrics_are_in_the_unit_interval_and_consistent(prediction, reference):
    scores = {metric.__name__: metric(prediction, reference) for metric in TOKEN_METRICS}
    assert all(0.0 <= score <= 1.0 for score in scores.values())
    assert scores["position_accuracy"] <= scores["token_recall"]  # a right position is also in the bag
    assert (scores["exact_match"] == 1.0) == (prediction == reference)
    assert (scores["google_bleu"] == 1.0) == (prediction == reference)
    assert token_recall(prediction, reference) == token_precision(reference, prediction)
    if scores["token_precision"] + scores["token_recall"]:
        product = scores["token_precision"] * scores["token_recall"]
        total = scores["token_precision"] + scores["token_recall"]
        assert scores["token_f1"] == pytest.approx(2 * product / total)


@given(st.text(max_size=12), st.text(max_size=12))
@settings(deadline=None)
def test_rouge_of_any_text_is_in_the_unit_interval(prediction, reference):
    for words in ("latin", "unicode"):
        assert all(0.0 <= score <= 1.0 for score in rouge(prediction, reference, words))
        assert tuple(rouge(reference, reference, words)) == (1.0, 1.0, 1.0)


def test_embedding_rmse_by_hand():
    true = torch.zeros(2, 2)
    assert embedding_rmse(torch.tensor([[3.0, 0.0], [0.0, 4.0]]), true) == 2.5  # sqrt(25 / 4)
    assert embedding_rmse(true, true) == 0.0
    assert embedding_rmse(np.ones((2, 2)), [[0, 0], [0, 0]]) == 1.0
    assert isinstance(embedding_rmse(true.clone().requires_grad_(), true), float)


def test_embedding_rmse_is_in_the_units_of_rms():
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    error = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    l2 = torch.linalg.vector_norm(error).item()
    assert embedding_rmse(true + error, true) == pytest.approx(l2 / math.sqrt(35), rel=1e-12)


@pytest.mark.parametrize(
    "recovered",
    [None, torch.zeros(3, 2), torch.zeros(2, 3), torch.full((2, 2), math.nan), torch.full((2, 2), math.inf)],
)
def test_embedding_rmse_is_none_where_it_is_not_defined(recovered):
    assert embedding_rmse(recovered, torch.zeros(2, 2)) is None
    assert embedding_rmse(torch.zeros(0, 2), torch.zeros(0, 2)) is None
