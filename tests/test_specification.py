"""A word where a number belongs is refused by name, whoever asks."""

from dataclasses import dataclass
from typing import ClassVar

import pytest

import lmleak
from lmleak.attacks import make_attack, parse_attack
from lmleak.errors import ConfigError
from lmleak.specification import build_parts


@dataclass(frozen=True)
class Part:
    """Something with one option of every kind."""

    name: ClassVar[str] = "part"
    count: int = 1
    rate: float = 1.0
    flag: bool = False
    word: str = "a"
    limit: int | None = None
    either: int | float = 1


def build(arguments):
    return build_parts(f"part({arguments})", "part", {"part": Part}, "part(count=2)")[0]


def test_what_fits_is_taken_as_it_is():
    assert build("count=2, rate=3, flag=true, word=b, limit=4, either=0.5") == Part(2, 3, True, "b", 4, 0.5)
    assert build("rate=1e-3, word=7").rate == 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("count=a", "part: count must be an integer, got 'a'; write for instance part"),
        ("count=1.5", "count must be an integer, got 1.5"),
        ("count=true", "count must be an integer, got True"),
        ("rate=a", "rate must be a number, got 'a'"),
        ("rate='1'", "rate must be a number, got '1'"),
        ("rate=nan", "rate must be a number, got 'nan'"),
        ("rate=false", "rate must be a number, got False"),
        ("flag=1", "flag must be true or false, got 1"),
        ("limit=a", "limit must be an integer, got 'a'"),
        ("either=a", "either must be a number, got 'a'"),
    ],
)
def test_the_wrong_kind_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        build(arguments)


def test_attacks_and_defenses_refuse_words_for_numbers():
    with pytest.raises(ConfigError, match="tag: learning_rate must be a number, got 'a'"):
        parse_attack("tag(learning_rate=a)")
    with pytest.raises(ConfigError, match="attack 'span': beam must be an integer, got 'a'"):
        make_attack("span", beam="a")
    with pytest.raises(ConfigError, match="gaussian: std must be a number, got 'a'"):
        lmleak.parse_defense("gaussian(std=a)")


def test_a_word_for_the_noise_of_an_influence_is_refused():
    adapter = lmleak.load_adapter("reference-gpt2")
    with pytest.raises(ConfigError, match=r"noise_std must be a finite number >= 0, got \['a'\]"):
        lmleak.inversion_influence(adapter, adapter.batch(["call me"]), noise_std="a")
