"""How a text is cut into words before ROUGE and GLEU count them."""

import re
import unicodedata
from collections.abc import Callable

from rouge_score.tokenizers import DefaultTokenizer

from lmleak.lookup import lookup

# Scripts written without spaces; each character counts as a word, as is usual for ROUGE in these languages.
UNSPACED = re.compile(
    "[\u0e00-\u0eff"  # Thai, Lao
    "\u1000-\u109f"  # Myanmar
    "\u1780-\u17ff"  # Khmer
    "\u3040-\u30ff"  # Hiragana, Katakana
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"  # Han
)

latin_words = DefaultTokenizer(use_stemmer=False).tokenize
"""The tokenizer of ``rouge_score``: lower-cased runs of [a-z0-9], no stemmer."""


def unicode_words(text: str) -> list[str]:
    """Return the case-folded words of a text in any script, without punctuation.

    A word is a run of letters, digits and combining marks after NFKC; in scripts written without spaces
    (Chinese, Japanese, Thai, ...) every character is one.
    """
    return _isolate(unicodedata.normalize("NFKC", text).casefold(), keep_punctuation=False).split()


def words_and_punctuation(text: str) -> list[str]:
    """Return the words of a text in any script, case kept; every punctuation mark is a word of its own."""
    return _isolate(text, keep_punctuation=True).split()


def _isolate(text: str, *, keep_punctuation: bool) -> str:
    """Put spaces around unspaced characters and around punctuation, or replace the latter by a space."""

    def piece(character: str) -> str:
        if UNSPACED.match(character):
            return f" {character} "
        if unicodedata.category(character)[0] in "LNM":  # letter, number, combining mark
            return character
        return f" {character} " if keep_punctuation else " "

    return "".join(map(piece, text))


WORDS: dict[str, Callable[[str], list[str]]] = {"latin": latin_words, "unicode": unicode_words}
"""Ways to cut a text for ROUGE: "latin" gives published numbers, sees only [a-z0-9]; "unicode" any script."""


def word_splitter(reference: str, words: str = "latin") -> Callable[[str], list[str]]:
    """Return the splitter that both a reference and its prediction are cut with.

    The reference decides: the chosen splitter if it finds a word there, else :func:`unicode_words`, else
    white space. So a reference without a single [a-z0-9] is still scored by what it says, and a reference
    with one is scored exactly as ``rouge_score`` does.

    Args:
        reference: The true text.
        words: A name in ``WORDS``.

    Returns:
        A function from a text to its words.
    """
    chosen = lookup("word splitter", words, WORDS)
    return next((split for split in (chosen, unicode_words) if split(reference)), str.split)
