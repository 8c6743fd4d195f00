"""Scores with special tokens counted as words, as LAMP and DAGER print them."""

from itertools import permutations

import pytest
from rouge_score.rouge_scorer import RougeScorer

import lmleak
from lmleak.errors import DataError
from lmleak.metrics import lamp_score_strings, lamp_scores, score_text, with_special_tokens
from lmleak.types import AttackCost, Reconstruction
from tests.families import make

FIRST, SECOND = "my rent is due on monday morning", "please call doctor about her blood test"


@pytest.fixture(scope="module")
def bert():
    return lmleak.load_adapter("reference-bert")


def guess(batch):
    return Reconstruction(
        attack="test", token_ids=batch.token_ids, texts=batch.texts, confidence=((),) * batch.size,
        cost=AttackCost(0.0), stopped="guessed",
    )  # fmt: skip


def test_two_unrelated_sentences_of_seven_words_score_two_ninths(bert):
    truth, other = bert.batch([FIRST], [0]), bert.batch([SECOND], [0])
    scores = lamp_scores(guess(other), truth, bert)
    assert scores.rouge1 == scores.rougeL == pytest.approx(2 / 9)
    assert scores.rouge2 == 0.0
    assert scores.rouge1_plus_rouge2 == pytest.approx(2 / 9)
    assert score_text(guess(other), truth).rouge1 == 0.0


def test_special_tokens_go_back_where_the_model_had_them(bert):
    batch = bert.batch([FIRST], [0])
    assert with_special_tokens(batch.token_ids[0], bert) == bert.tokenizer.decode(batch.inputs["input_ids"][0])
    assert with_special_tokens(batch.token_ids[0], bert).startswith("[CLS] my rent")


def test_a_decoder_without_special_tokens_scores_as_usual():
    gpt2 = lmleak.load_adapter("reference-gpt2")
    truth = gpt2.batch([FIRST, SECOND])
    assert with_special_tokens(truth.token_ids[0], gpt2).strip() == FIRST
    attack = guess(gpt2.batch([SECOND, "my rent is late on monday"]))
    ours, lamp = score_text(attack, truth), lamp_scores(attack, truth, gpt2)
    assert (lamp.rouge1, lamp.rouge2, lamp.rougeL) == pytest.approx((ours.rouge1, ours.rouge2, ours.rougeL))


def test_matching_maximises_the_mean_of_rouge1():
    references = ["[CLS] a b c [SEP]", "[CLS] d e [SEP]", "[CLS] a d f g [SEP]"]
    predictions = ["[CLS] d a [SEP]", "[CLS] g f c [SEP]", "[CLS] e b a [SEP]"]
    scorer = RougeScorer(["rouge1"])
    best = max(
        sum(scorer.score(r, p)["rouge1"].fmeasure for r, p in zip(references, order, strict=True)) / 3
        for order in permutations(predictions)
    )
    assert lamp_score_strings(predictions, references).rouge1 == pytest.approx(best)
    assert lamp_score_strings(references[::-1], references).rouge1 == 1.0


def test_a_missing_prediction_scores_nothing():
    scores = lamp_score_strings(["[CLS] a [SEP]"], ["[CLS] a [SEP]", "[CLS] b [SEP]"])
    assert [example.rouge1 for example in scores.per_example] == [1.0, 0.0]
    assert scores.rouge1 == 0.5
    assert lamp_score_strings([], ["[CLS] a [SEP]"]).rouge1 == 0.0


def test_refusals():
    with pytest.raises(DataError, match="at least one reference"):
        lamp_score_strings(["a"], [])
    adapter, _ = make("gpt2")
    with pytest.raises(DataError, match="no tokenizer"):
        with_special_tokens((1, 2), adapter)
