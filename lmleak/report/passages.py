"""The original text beside what an attacker got back, coloured by correctness.

Every state is shown twice, by colour and by a mark (solid or dotted underline, strike, italics), so that the page
reads without colour. All text is escaped here, where it becomes HTML.
"""

from collections import Counter
from collections.abc import Sequence
from html import escape
from typing import Any

from lmleak.report.rows import Row
from lmleak.report.tokens import WORD, content_tokens, laid_out, words

RIGHT, MOVED, MISSING, INVENTED = "right", "moved", "missing", "invented"
LEGEND = {
    RIGHT: "right word in the right place",
    MOVED: "right word in the wrong place",
    MISSING: "not recovered",
    INVENTED: "made up by the attack",
}


def original_passage(row: Row, place: int, attack: str) -> str:
    """Return the original text as HTML, each token coloured by whether the attack got it.

    Args:
        row: One result row.
        place: Which of the row's texts.
        attack: Whose result colours the text.

    Returns:
        HTML; coloured by word where the row's tokens and flags do not line up.
    """
    return "".join(f"{escape(gap)}{_mark(state, text)}" for gap, text, state in _original_states(row, place, attack))


def recovered_passage(row: Row, place: int, attack: str) -> str:
    """Return the text an attack recovered as HTML, each word coloured by whether it is in the original.

    Args:
        row: One result row.
        place: Which of the row's texts; the recovered text matched to it is shown.
        attack: The attack.

    Returns:
        HTML.
    """
    recovered = (_item(row["attacks"][attack].get("texts"), place) or "").strip()
    if not recovered:
        return '<span class="nothing">nothing recovered</span>'
    available = _states_of_words(row, place, attack)
    html, end = [], 0
    for match in WORD.finditer(recovered):
        state = INVENTED
        for better in (RIGHT, MOVED, MISSING):
            if available[match.group().casefold(), better] > 0:
                available[match.group().casefold(), better] -= 1
                # a word that the token flags call missing, yet here it stands: right word, wrong place
                state = MOVED if better == MISSING else better
                break
        html.append(escape(recovered[end : match.start()]) + _mark(state, match.group()))
        end = match.end()
    return "".join(html) + escape(recovered[end:])


def _mark(state: str, text: str) -> str:
    return f'<span class="{state}">{escape(text)}</span>'


def _original_states(row: Row, place: int, attack: str) -> list[tuple[str, str, str]]:
    """Return (space before, text, state) for each token of an original text, or for each word as a fallback."""
    flags = _item(row["attacks"][attack].get("per_example"), place) or {}
    correct = flags.get("token_correct") or []
    tokens = content_tokens(_item(row.get("tokens"), place) or [], len(correct))
    if not correct or tokens is None:
        return _word_states(row["texts"][place], _item(row["attacks"][attack].get("texts"), place) or "")
    in_bag = flags.get("token_in_bag") or [False] * len(tokens)
    pieces = laid_out(row["texts"][place], tokens)
    return [
        (gap, text, RIGHT if right else MOVED if bag else MISSING)
        for (gap, text), right, bag in zip(pieces, correct, in_bag, strict=True)
    ]


def _item(sequence: Sequence[Any] | None, place: int) -> Any:
    return sequence[place] if sequence and place < len(sequence) else None


def _word_states(original: str, recovered: str) -> list[tuple[str, str, str]]:
    guess = [word.casefold() for word in words(recovered)]
    bag, states, end = Counter(guess), [], 0
    for position, match in enumerate(WORD.finditer(original)):
        word = match.group().casefold()
        state = RIGHT if guess[position : position + 1] == [word] else MOVED if bag[word] > 0 else MISSING
        bag[word] -= state != MISSING
        states.append((original[end : match.start()], match.group(), state))
        end = match.end()
    return states


def _states_of_words(row: Row, place: int, attack: str) -> Counter[tuple[str, str]]:
    """Count the original's words by state; a word is as good as the worst of its tokens."""
    grouped: list[tuple[str, list[str]]] = []
    for gap, text, state in _original_states(row, place, attack):
        for piece in words(text) or [text]:
            glued = grouped and not gap and len(words(grouped[-1][0] + piece)) == 1  # one word in two tokens
            if glued:
                grouped[-1] = (grouped[-1][0] + piece, [*grouped[-1][1], state])
            else:
                grouped.append((piece, [state]))
            gap = ""
    order = (RIGHT, MOVED, MISSING)
    return Counter((word.casefold(), max(states, key=order.index)) for word, states in grouped)


def comparison(row: Row, attack: str, headline: str, limit: int = 8) -> str:
    """Return one example as HTML: every text of the gradient beside what the attack got back.

    Args:
        row: A row the attack was scored on.
        attack: The attack.
        headline: HTML above the pair, already escaped.
        limit: Texts shown at once; the rest of a large batch is folded away.

    Returns:
        HTML.
    """
    pairs = [
        '<div class="pair"><div class="side"><h5>original</h5><p class="passage">'
        f"{original_passage(row, place, attack)}</p></div>"
        f'<div class="side"><h5>recovered by the {escape(attack)} attack</h5><p class="passage">'
        f"{recovered_passage(row, place, attack)}</p></div></div>"
        for place in range(len(row["texts"]))
    ]
    folded = fold(pairs[limit:], f"{len(pairs) - limit} more texts of this batch")
    return f'<article class="example"><h4>{headline}</h4>{"".join(pairs[:limit])}{folded}</article>'


def fold(items: Sequence[str], summary: str) -> str:
    """Return items inside a closed <details>, or nothing if there are none."""
    return f"<details><summary>{escape(summary)}</summary>{''.join(items)}</details>" if items else ""


def legend() -> str:
    """Return the legend of the coloured comparison as HTML."""
    return '<p class="legend">' + " ".join(_mark(state, words) for state, words in LEGEND.items()) + "</p>"
