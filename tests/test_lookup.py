"""Choosing by name, with a helpful refusal."""

import pytest

from lmleak.errors import ConfigError, LmleakError
from lmleak.lookup import lookup, suggest

TABLE = {"gaussian": 1, "laplace": 2, "top-k": None}


def test_a_name_in_the_table_gives_its_entry_even_if_false():
    assert lookup("defense", "gaussian", TABLE) == 1
    assert lookup("defense", "top-k", TABLE) is None


def test_an_unknown_name_is_refused_with_the_nearest_one_and_all_others():
    with pytest.raises(ConfigError) as raised:
        lookup("defense", "gausian", TABLE)
    assert str(raised.value) == (
        "unknown defense 'gausian'. Did you mean 'gaussian'? Available: gaussian, laplace, top-k"
    )
    assert isinstance(raised.value, LmleakError)
    assert isinstance(raised.value, ValueError)


def test_nothing_near_gives_no_guess():
    with pytest.raises(ConfigError) as raised:
        lookup("attack", "zzz", TABLE)
    assert "Did you mean" not in str(raised.value)
    assert "Available: gaussian, laplace, top-k" in str(raised.value)


@pytest.mark.parametrize("valid", [["b", "a"], {"b": 1, "a": 2}])
def test_suggestions_are_sorted(valid):
    assert suggest("q", valid) == "Available: a, b"


@pytest.mark.parametrize("name", ["", 3, None])
def test_a_name_that_is_no_word_is_refused_like_any_other(name):
    with pytest.raises(ConfigError, match="Available"):
        lookup("attack", name, TABLE)


def test_an_empty_table_is_refused_in_words():
    with pytest.raises(ConfigError, match="unknown attack 'x'"):
        lookup("attack", "x", {})
