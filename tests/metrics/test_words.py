"""Cutting texts into words."""

import pytest
from rouge_score.tokenize import tokenize

from lmleak.errors import ConfigError
from lmleak.metrics.words import latin_words, unicode_words, word_splitter, words_and_punctuation


def test_latin_words_are_those_of_rouge_score():
    text = "Über $30's, caf\u00e9-No. 7!"
    assert latin_words(text) == tokenize(text, None) == ["ber", "30", "s", "caf", "no", "7"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Straße, CAFÉ!", ["strasse", "café"]),
        ("Привет, мир", ["привет", "мир"]),
        ("नमस्ते दुनिया", ["नमस्ते", "दुनिया"]),  # vowel signs and virama stay inside the word
        ("我住在北京3区", ["我", "住", "在", "北", "京", "3", "区"]),
        ("ｆｕｌｌ　ｗｉｄｔｈ", ["full", "width"]),
        ("?!… —", []),
        ("", []),
    ],
)
def test_unicode_words(text, expected):
    assert unicode_words(text) == expected


def test_punctuation_is_a_word_of_its_own_and_case_is_kept():
    assert words_and_punctuation("It's 5 pm. Ok?") == ["It", "'", "s", "5", "pm", ".", "Ok", "?"]
    assert words_and_punctuation("北京。") == ["北", "京", "。"]


def test_the_reference_decides_how_both_are_cut():
    assert word_splitter("a word") is latin_words
    assert word_splitter("東京 tower") is latin_words  # as rouge_score: only what it can see
    assert word_splitter("東京 tower", "unicode") is unicode_words
    assert word_splitter("東京") is unicode_words
    assert word_splitter("?! ...")("?! ...") == ["?!", "..."]
    assert word_splitter("")("") == []


def test_unknown_splitter_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match="Did you mean 'unicode'"):
        word_splitter("a", "unicde")
