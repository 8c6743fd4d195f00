"""Coloured text: tokens laid on the original, states of words, heat shades, escaping."""

import re

import pytest

from lmleak.errors import DataError
from lmleak.report.heatmap import STEPS, HeatScale, heat_passage
from lmleak.report.passages import original_passage, recovered_passage
from lmleak.report.tokens import content_tokens, laid_out, words


def row_with(text, tokens, *, correct=None, in_bag=None, recovered="", influence=None):
    flags = [] if correct is None else [{"text": recovered, "token_correct": correct, "token_in_bag": in_bag}]
    return {
        "key": "0|none", "example": 0, "texts": [text], "tokens": [tokens], "token_influence": [influence],
        "attacks": {"span": {"texts": [recovered], "per_example": flags}},
    }  # fmt: skip


def states(html):
    return [(state, word) for state, word in re.findall(r'<span class="(\w+)">([^<]*)</span>', html)]


def plain(html):
    return re.sub(r"<[^>]+>", "", html)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Marta's flat-mate unpacks.", ["marta", "'", "s", "flat", "-", "mate", "un", "##pack", "##s", "."]),
        ("Hello  World, twice", ["Hello", "ĠĠ", "World", ",", "Ġtwice"]),
        ("Once upon a time", ["▁Once", "▁upon", "▁a", "▁time"]),
        ("plain display strings", ["plain", " display", " strings"]),
    ],
)
def test_tokens_are_laid_on_the_original(text, tokens):
    # two spaces as one token have no text of their own: the tokens are then shown as they are
    pieces = laid_out(text, tokens)
    assert len(pieces) == len(tokens)
    shown = "".join(gap + piece for gap, piece in pieces)
    assert shown.replace(" ", "").replace("␣", "").replace("Ġ", "") == text.replace(" ", "")


def test_spelling_falls_back_to_tokens_that_are_not_in_the_text():
    assert laid_out("Café noir", ["cafe", "noir"]) == [("", "cafe"), (" ", "noir")]
    assert [piece for _, piece in laid_out("a ☃ b", ["a", "[UNK]", "b"])] == ["a", "[UNK]", "b"]


def test_a_token_without_text_is_a_dot_and_not_a_special_token():
    assert laid_out("My secret is 4", ["my", "se", "cret", "<410>", "is", "<410>", "4"]) == [
        ("", "My"), (" ", "se"), ("", "cret"), ("", "·"), (" ", "is"), ("", "·"), (" ", "4"),
    ]  # fmt: skip
    assert content_tokens(["<s>", "a", "<410>"], 2) == ["a", "<410>"]


def test_special_tokens_stand_beside_the_text():
    pieces = laid_out("Hi Ann", ["[CLS]", "hi", "ann", "[SEP]"])
    assert "".join(gap + piece for gap, piece in pieces) == "[CLS] Hi Ann [SEP]"


@pytest.mark.parametrize(
    ("tokens", "count", "kept"),
    [
        (["[CLS]", "a", "b", "[SEP]"], 2, ["a", "b"]),
        (["<s>", "a", "<unk>", "</s>"], 2, ["a", "<unk>"]),
        (["a", "[MASK]"], 2, ["a", "[MASK]"]),
        (["<|endoftext|>", "a"], 1, ["a"]),
        (["a", "b"], 3, None),
    ],
)
def test_content_tokens(tokens, count, kept):
    assert content_tokens(tokens, count) == kept


def test_words_in_any_script():
    assert words("Don't go") == ["Don", "'", "t", "go"]
    assert words("我去北京") == ["我", "去", "北", "京"]


def test_original_is_coloured_by_token_and_recovery_by_word():
    row = row_with(
        "Ann moved to Graz.", ["[CLS]", "ann", "moved", "to", "gra", "##z", ".", "[SEP]"],
        correct=[True, False, False, True, False, True], in_bag=[True, True, False, True, False, True],
        recovered="ann graa was moved .",
    )  # fmt: skip
    assert states(original_passage(row, 0, "span")) == [
        ("right", "Ann"), ("moved", "moved"), ("missing", "to"), ("right", "Gra"), ("missing", "z"), ("right", "."),
    ]  # fmt: skip
    assert states(recovered_passage(row, 0, "span")) == [
        ("right", "ann"), ("invented", "graa"), ("invented", "was"), ("moved", "moved"), ("right", "."),
    ]  # fmt: skip
    assert plain(recovered_passage(row, 0, "span")) == "ann graa was moved ."


def test_words_decide_where_flags_do_not_line_up():
    row = row_with("one two three", ["one", "two"], correct=[True] * 5, in_bag=[True] * 5, recovered="one three x")
    assert states(original_passage(row, 0, "span")) == [("right", "one"), ("missing", "two"), ("moved", "three")]
    assert states(recovered_passage(row, 0, "span")) == [("right", "one"), ("moved", "three"), ("invented", "x")]


def test_nothing_recovered_is_said():
    row = row_with("secret", ["secret"], correct=[False], in_bag=[False], recovered="")
    assert "nothing recovered" in recovered_passage(row, 0, "span")
    assert states(original_passage(row, 0, "span")) == [("missing", "secret")]


def test_text_is_escaped():
    text = "<script>alert('x')</script>"
    tokens = ["<", "script", ">", "alert", "('", "x", "')", "</", "script", ">"]
    row = row_with(text, tokens, correct=[True] * 10, in_bag=[True] * 10, recovered=text, influence=[0.1] * 10)
    for html in (
        original_passage(row, 0, "span"),
        recovered_passage(row, 0, "span"),
        heat_passage(row, 0, HeatScale([row])),
    ):
        assert "<script" not in html
        assert "&lt;" in html


def test_little_error_is_dark_and_an_unreached_position_is_hatched():
    row = row_with("a b c d", ["a", "b", "c", "d"], influence=[1.0, 0.1, 0.01, 0.0])
    scale = HeatScale([row])
    html = heat_passage(row, 0, scale)
    assert re.findall(r'class="(\w+)"', html) == ["heat0", f"heat{STEPS // 2}", f"heat{STEPS - 1}", "unreached"]
    assert "does not depend" in scale.legend()
    assert "does not depend" not in HeatScale([row_with("a", ["a"], influence=[1.0])]).legend()


def test_equal_errors_have_one_shade():
    row = row_with("a b", ["a", "b"], influence=[0.3, 0.3])
    assert len(set(re.findall(r'class="(\w+)"', heat_passage(row, 0, HeatScale([row]))))) == 1


def test_one_error_per_token_is_required():
    row = row_with("a b", ["a", "b"], influence=[0.3])
    with pytest.raises(DataError, match="2 tokens but 1"):
        heat_passage(row, 0, HeatScale([row]))
