"""The heat map of risk on the text: each token shaded by how little error the noise causes there."""

import math
from collections.abc import Sequence
from html import escape

from lmleak.errors import DataError
from lmleak.report.rows import Row, compact, number
from lmleak.report.tokens import laid_out

STEPS = 6
"""Shades of the heat map; 0 is the best protected, STEPS - 1 the most exposed."""


class HeatScale:
    """Shades for the error that noise causes at a token, in equal steps of its logarithm.

    Args:
        rows: The rows that will be shown, at least one token of theirs reached by the gradient; the scale spans
            the 5th to the 95th percentile of their errors.
    """

    def __init__(self, rows: Sequence[Row]):
        errors = sorted(error for row in rows for error in reached_errors(row))
        self.low = errors[int(0.05 * (len(errors) - 1))]
        self.high = errors[math.ceil(0.95 * (len(errors) - 1))]
        self.unreached = len(errors) < sum(len(tokens) for row in rows for tokens in row["token_influence"])

    def shade(self, error: float) -> int:
        """Return the shade of an error, from 0 (well protected) to ``STEPS - 1`` (exposed)."""
        if self.high <= self.low:
            return STEPS // 2
        fraction = math.log(self.high / max(error, 1e-300)) / math.log(self.high / self.low)
        return min(STEPS - 1, max(0, int(STEPS * fraction)))

    def legend(self) -> str:
        """Return the scale as HTML, with the error at each boundary."""
        edges = [self.high * (self.low / self.high) ** (step / STEPS) for step in range(STEPS + 1)]
        swatches = "".join(
            f'<span class="heat{step}">{compact(edges[step + 1])}–{compact(edges[step])}</span>'
            for step in range(STEPS)
        )
        hatched = ' <span class="unreached">the gradient does not depend on it</span>' if self.unreached else ""
        return f'<p class="legend heat"><b>well protected</b> {swatches} <b>exposed</b>{hatched}</p>'


def reached_errors(row: Row) -> list[float]:
    """Return the errors of the tokens that the gradient depends on (see ``_reached``)."""
    return [
        number(error)
        for errors in row.get("token_influence") or []
        for error in errors
        if _reached(number(error), errors)
    ]


def _reached(error: float | None, errors: Sequence[float | None]) -> bool:
    # A position outside the loss's reach (the last one of a causal model) lies in the null space of J Jᵀ, where
    # the solve returns exactly zero: an error of zero means "unknown to the attacker", not "known exactly".
    largest = max((value for error in errors if (value := number(error)) is not None), default=0.0)
    return error is not None and error > 1e-9 * largest


def heat_passage(row: Row, place: int, scale: HeatScale) -> str:
    """Return one text as HTML, each token shaded by how little error the noise causes there.

    Args:
        row: A row with ``token_influence``.
        place: Which of the row's texts.
        scale: The page's scale.

    Returns:
        HTML; the error stands in each token's title.

    Raises:
        DataError: If the row does not hold one error per token.
    """
    tokens, errors = row["tokens"][place], row["token_influence"][place]
    if len(tokens) != len(errors):
        raise DataError(
            f"row {row.get('key')!r}, text {place}: {len(tokens)} tokens but {len(errors)} token influences. "
            "Write one number per real position, special tokens included"
        )
    html = []
    for (gap, text), error in zip(laid_out(row["texts"][place], tokens), map(number, errors), strict=True):
        if _reached(error, errors):
            style, title = f"heat{scale.shade(error)}", f"error {compact(error)}"
        else:
            style, title = "unreached", "the gradient does not depend on this position"
        html.append(f'{escape(gap)}<span class="{style}" title="{title}">{escape(text)}</span>')
    return "".join(html)
