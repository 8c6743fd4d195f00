"""How many of a text's names and numbers came back: what a reader would call the private part of it."""

from collections import Counter

from lmleak.metrics.words import words_and_punctuation

SENTENCE_ENDS = frozenset(".!?\u2026\u3002\uff01\uff1f")  # with the full-width marks of Chinese and Japanese


def entity_recall(prediction: str, reference: str) -> float | None:
    """Return the share of the reference's names and numbers that occur in the prediction, as multisets.

    ``sum_w min(count of w in the prediction, count of w among the entities) / number of entities``, over the words
    of :func:`entities`. Case is ignored, because a name recovered in lower case is recovered. A rule of thumb
    without a model in the place of FILM's named-entity F1 (Gupta et al. 2022, arXiv:2205.08514): it needs no
    language, and finds no name in lower-case text.

    Args:
        prediction: Recovered text.
        reference: True text, case kept if it has one.

    Returns:
        The share in [0, 1], or None if the reference holds no entity.
    """
    wanted = Counter(word.casefold() for word in entities(reference))
    if not wanted:
        return None
    found = Counter(word.casefold() for word in words_and_punctuation(prediction))
    return (wanted & found).total() / wanted.total()


def entities(text: str) -> list[str]:
    """Return the words of a text that hold a digit, or a capital at their start without opening a sentence.

    A word follows the cut of :func:`lmleak.metrics.words.words_and_punctuation`, so a date or a telephone number
    is several. The first word after ``. ! ?`` opens a sentence, also behind a quotation mark; an abbreviation's full
    stop ("Dr. Smith") therefore hides the name behind it. The pronoun "I" is no name.

    Args:
        text: Any text, case kept.

    Returns:
        The words in order, repeated as often as they occur.
    """
    found, opens_sentence = [], True
    for word in words_and_punctuation(text):
        if word in SENTENCE_ENDS:
            opens_sentence = True
        elif word[0].isalnum():
            is_name = word[0].isupper() and word != "I" and not opens_sentence
            if is_name or any(character.isdigit() for character in word):
                found.append(word)
            opens_sentence = False
    return found
