"""Names and numbers of a text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmleak.metrics import entities, entity_recall


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("My doctor Ana Cruz called", ["Ana", "Cruz"]),
        ("Please call. The nurse said Bob is late! Ana too", ["Bob"]),
        ("my pin is 4426, room b12", ["4426", "b12"]),
        ("He said: \u201cBring Maria\u201d", ["Bring", "Maria"]),  # a quotation after a colon opens no sentence
        ("Yes? \u201cBring Maria\u201d", ["Maria"]),
        ("born 12/03/1987", ["12", "03", "1987"]),
        ("7 days in Rome", ["7", "Rome"]),
        ("yesterday I met I", []),
        ("ask Dr. Smith or Dr. Anna Lee", ["Dr", "Dr", "Lee"]),  # as documented: the full stop hides a name
        ("Мой врач Анна", ["Анна"]),
        ("我住在北京 12 号", ["12"]),
        ("no names here", []),
        ("", []),
        ("...", []),
    ],
)
def test_entities_by_hand(text, expected):
    assert entities(text) == expected


def test_recall_counts_repetitions_and_ignores_case():
    reference = "my pin is 44 or 44, ask Ana"
    assert entity_recall("44 ana", reference) == pytest.approx(2 / 3)
    assert entity_recall("Ana: 44, 44, 44", reference) == 1.0
    assert entity_recall("ask my pin", reference) == 0.0
    assert entity_recall("", reference) == 0.0
    assert entity_recall("444", reference) == 0.0  # a word counts as a whole


def test_a_reference_without_entities_has_no_recall():
    assert entity_recall("Ana 44", "nothing to see") is None
    assert entity_recall("", "") is None


@settings(deadline=None)
@given(st.text(max_size=30))
def test_a_perfect_recovery_has_recall_one_or_none(text):
    assert entity_recall(text, text) == (1.0 if entities(text) else None)
