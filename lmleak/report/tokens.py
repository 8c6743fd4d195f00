"""Tokens as a reader should see them: words, special tokens, and a tokenizer's pieces laid on the original text."""

import re
from collections.abc import Iterator, Sequence

from lmleak.metrics.words import UNSPACED

WORD = re.compile(rf"{UNSPACED.pattern}|(?:(?!{UNSPACED.pattern})\w)+|[^\w\s]")
"""A word, one character of a script written without spaces, or a punctuation mark."""
SPECIAL = re.compile(r"\[[A-Z]+\d*\]|</?[A-Za-z_]+\d*>|<\|[^|]+\|>")
WITHOUT_TEXT = re.compile(r"<\d+>")
"""How a token is displayed that has an id but no text of its own (a lone space, part of a character)."""
STAND_INS = frozenset({"[MASK]", "[UNK]", "<mask>", "<unk>"})
"""Special tokens that stand for a word of the text, unlike those that frame it."""
NO_TEXT = "·"
SPACE_MARKS = frozenset({"Ġ", "▁", " "})
NO_SPACE_BEFORE = frozenset(".,!?;:%)]}'’")


def words(text: str) -> list[str]:
    """Split text into words and punctuation marks."""
    return WORD.findall(text)


def content_tokens(tokens: Sequence[str], count: int) -> list[str] | None:
    """Drop special tokens from a row's display strings so that ``count`` are left.

    Args:
        tokens: Display strings of every position, special tokens included.
        count: Number of tokens the attack was scored on.

    Returns:
        The tokens, or None if no reading of "special" leaves that many.
    """
    ordinary = [token for token in tokens if not SPECIAL.fullmatch(token)]
    framed = [token for token in tokens if token in STAND_INS or not SPECIAL.fullmatch(token)]
    return next((kept for kept in (ordinary, framed, list(tokens)) if len(kept) == count), None)


def laid_out(text: str, tokens: Sequence[str]) -> list[tuple[str, str]]:
    """Return (text before the token, token) for each token, in the writer's own spelling where possible.

    Args:
        text: The original text.
        tokens: Display strings of its tokens; special tokens are set beside the text.

    Returns:
        Pieces of ``text`` if every token is found there in order, else the tokens without the tokenizer's marks.
    """
    pieces, end, folded = [], 0, text.casefold()
    for gap, token in without_marks(tokens):
        if SPECIAL.fullmatch(token) and token.casefold() not in folded:
            pieces.append((" " if pieces else "", token))
            continue
        if token == NO_TEXT:
            pieces.append(("", token))
            continue
        start = folded.find(token.casefold(), end)
        if start < 0 or text[end:start].strip() or len(folded) != len(text):
            return list(without_marks(tokens))
        before = text[end:start] or (gap if pieces and SPECIAL.fullmatch(pieces[-1][1]) else "")
        end = start + len(token)
        pieces.append((before, text[start:end]))
    return pieces


def without_marks(tokens: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Undo the tokenizer's marks: yield (space before the token, token as a reader should see it).

    Understands word pieces (##), byte-level and sentence-piece marks of a leading space, and plain strings.

    Args:
        tokens: Display strings.

    Yields:
        The space before each token, and its text.
    """
    marked = any(token[:1] in SPACE_MARKS for token in tokens)
    for position, token in enumerate(tokens):
        if WITHOUT_TEXT.fullmatch(token):
            yield "", NO_TEXT
        elif SPECIAL.fullmatch(token):
            yield " " if position else "", token
        elif token.startswith("##") and len(token) > 2:
            yield "", token[2:]
        elif marked:
            opens = token[:1] in SPACE_MARKS
            visible = token[opens:].replace("Ċ", "⏎").replace("\n", "⏎")
            yield " " if opens and position else "", visible or "␣"
        else:
            glued = position == 0 or token in NO_SPACE_BEFORE
            yield "" if glued else " ", token
