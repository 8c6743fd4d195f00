"""The look of the report's figures, and how a figure becomes a file."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

# Okabe and Ito's colour-blind-safe set, with a purple of equal weight
BLUE, SKY, ORANGE, VERMILION, PURPLE, INK, GREY = (
    "#0072B2", "#56B4E9", "#E69F00", "#D55E00", "#AA4488", "#1F2933", "#7B8794",
)  # fmt: skip
ATTACK_COLOURS = (VERMILION, PURPLE, ORANGE, GREY) * 8
LINE_COLOURS = (BLUE, VERMILION, ORANGE, PURPLE, SKY, INK, GREY)
GRID = "#E4E7EB"
STYLE = {
    "font.size": 10.5,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "svg.hashsalt": "lmleak",  # the same rows give the same bytes
}


@contextmanager
def house_style() -> Iterator[None]:
    """Apply the style while a figure is built or saved; matplotlib's settings are restored afterwards.

    Yields:
        Nothing.
    """
    with mpl.rc_context(STYLE):
        yield


def light_grid(axes: Axes, axis: Literal["both", "x", "y"] = "both") -> None:
    """Draw a light grid behind everything else."""
    axes.grid(axis=axis, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def whiskers(values: ArrayLike, low: ArrayLike, high: ArrayLike) -> NDArray:
    """Return the lengths of error bars from values (n,) to the ends of their intervals, (2, n), at least 0."""
    return np.clip([np.subtract(values, low), np.subtract(high, values)], 0, None)


def encode(figure: Figure, kind: str) -> bytes:
    """Return a figure as a file's bytes, the same for the same figure.

    Args:
        figure: The figure.
        kind: "png", "svg" or "pdf".

    Returns:
        The file's content.
    """
    dates = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
    buffer = io.BytesIO()
    with house_style():
        figure.savefig(buffer, format=kind, dpi=200, metadata=dates[kind])
    return buffer.getvalue()
