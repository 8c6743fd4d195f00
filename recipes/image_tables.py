"""Tables and files that the studies on images write."""

import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from rich.table import Table

from lmleak.files import write_bytes_atomically, write_csv_atomically, write_text_atomically
from lmleak.report.drawing import encode

Entry = Mapping[str, object]
"""One line of a table by column; None where there is no number."""


def root_mean_square(values: Iterable[float | None]) -> float | None:
    """Return the root of the mean of squares; None if there is nothing or a number is missing."""
    values = list(values)
    return None if not values or None in values else math.sqrt(math.fsum(v * v for v in values) / len(values))


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean; None if there is nothing or a number is missing."""
    values = list(values)
    return None if not values or None in values else math.fsum(values) / len(values)


def cell(value: object) -> str:
    """Return a value as tables show it: numbers to four digits."""
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def as_markdown(entries: Sequence[Entry]) -> str:
    """Return a table in markdown."""
    lines = [[column.replace("_", " ") for column in entries[0]], ["---"] * len(entries[0])]
    lines += [[cell(value) for value in entry.values()] for entry in entries]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def publish(
    folder: Path, name: str, entries: Sequence[Entry], draw: Callable[[Sequence[Entry]], Figure] | None = None
) -> None:
    """Write a table (.csv, .md) and its figure (.png), if it has one, and print the table.

    Args:
        folder: Where to.
        name: The files' name.
        entries: Lines of the table.
        draw: Makes the figure from them.
    """
    image = None if draw is None else in_few_colours(encode(draw(entries), "png"))
    write_csv_atomically(folder / f"{name}.csv", entries)
    write_text_atomically(folder / f"{name}.md", as_markdown(entries))
    if image is not None:
        write_bytes_atomically(folder / f"{name}.png", image)
    table = Table(*(column.replace("_", " ") for column in entries[0]))
    for entry in entries:
        table.add_row(*map(cell, entry.values()))
    Console(width=200).print(table)
    print(f"table: {folder / name}.csv, .md" + ("" if image is None else f"; figure: {folder / name}.png"))


def in_few_colours(png: bytes) -> bytes:
    """Return a picture with a palette of 128 colours: line drawings lose nothing, and take a third of the space."""
    few = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").quantize(128).save(few, format="png", optimize=True)
    return few.getvalue()


def drawable(values: Iterable[float | None]) -> list[float]:
    """Return what a logarithmic axis can show: NaN for what is missing, infinite or not positive."""
    return [v if v is not None and 0 < v < math.inf else math.nan for v in values]
