"""What ``lmleak attack`` and ``score`` print and draw of images."""

from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor

from lmleak.evaluation import AttackResult, ImageScoreResult
from lmleak.files import write_bytes_atomically
from lmleak.metrics.image_score import ImageScores
from lmleak.report.drawing import encode
from lmleak.report.image_grid import image_grid, image_rows

MOST_DRAWN = 16
"""Images of a batch that pictures show: the first."""
LEGEND = (
    "MSE, RMSE: per coordinate of the model's input{units}, not clipped; compare RMSE with an influence's rms. px: in "
    "pixel values (white - black = 1). PSNR (dB) and SSIM: recovered pixels clipped to [0, 1]. from: the recovered "
    "image (counted from 1) that was matched, so that the total squared error is least. Mean: RMSE pools all pixels."
)
Numbers = dict[str, Callable[[ImageScores], float | None]]
COLUMNS: Numbers = {
    "MSE": lambda s: s.mse,
    "RMSE": lambda s: s.rmse,
    "MSE px": lambda s: None if s.rmse_pixel is None else s.rmse_pixel**2,
    "RMSE px": lambda s: s.rmse_pixel,
    "PSNR": lambda s: s.psnr,
    "SSIM": lambda s: s.ssim,
}
DECIMALS = {"PSNR": "{:.1f}", "SSIM": "{:.3f}"}


def recovered_images_table(result: AttackResult) -> Table:
    """Return what can be said of recovered images without the truth: stated classes and ranges of pixel values."""
    table = Table(
        caption="pixel values: black 0, white 1; outside: share of the pixels beyond", caption_justify="left"
    )
    for name in ("image", "class", "least", "mean", "largest", "outside"):
        table.add_column(name, justify="right")
    pixels, labels = _pixels(result), result.reconstruction.labels
    for number, image in enumerate(pixels, 1):
        outside = ((image < 0) | (image > 1)).double().mean().item()
        numbers = [f"{value:.3f}" for value in (image.min().item(), image.mean().item(), image.max().item())]
        stated = "\u2013" if labels is None else str(labels[number - 1].item())
        table.add_row(str(number), stated, *numbers, f"{outside:.0%}")
    return table


def write_recovered_picture(result: AttackResult) -> Path:
    """Draw the recovered images beside their file, as .png.

    Args:
        result: What was recovered.

    Returns:
        The picture's path.
    """
    labels = result.reconstruction.labels
    titles = [
        f"{number}" + ("" if labels is None else f", class {labels[number - 1].item()}")
        for number in range(1, 1 + min(MOST_DRAWN, len(result.reconstruction.images)))
    ]
    return _write(image_rows(_pixels(result)[:MOST_DRAWN], titles), result.recovered.with_suffix(".png"))


def image_score_table(result: ImageScoreResult) -> Table:
    """Return the scores per private image and their mean."""
    own = result.normalization
    units = "" if own.mean == (0.0,) and own.std == (1.0,) else f" (pixels normalised by deviation {own.std})"
    table = Table(caption=LEGEND.format(units=units), caption_justify="left", box=SIMPLE_HEAD, show_edge=False)
    for name in ("image", "class", *COLUMNS, "from"):
        table.add_column(name, justify="right", no_wrap=True)
    for number, example in enumerate(result.score.per_example, 1):
        label = "\u2013" if result.labels is None else str(result.labels[number - 1].item())
        table.add_row(str(number), label, *_cells(example), str(example.prediction + 1))
    table.add_section()
    table.add_row("mean", "", *_cells(result.score), "")
    return table


def image_score_notes(result: ImageScoreResult) -> list[str]:
    """Return what the reader of the table should know."""
    score, notes = result.score, []
    if score.num_diverged:
        notes.append(f"note: {score.num_diverged} recovered image(s) diverged; there is no mean over the others")
    if score.label_accuracy is not None and score.label_accuracy < 1:
        notes.append(f"note: {score.label_accuracy:.0%} of the matched images are stated to be of the right class")
    return notes


def write_comparison_picture(result: ImageScoreResult, path: Path) -> Path:
    """Draw originals, recovered images and differences.

    Args:
        result: The scores with their images.
        path: Where to.

    Returns:
        The picture's path.
    """
    labels = result.labels
    titles = [] if labels is None else [f"class {label}" for label in labels[:MOST_DRAWN].tolist()]
    original = result.original[:MOST_DRAWN].clamp(0, 1)  # normalising and back left rounding beyond the range
    return _write(image_grid(original, {"recovered": result.recovered[:MOST_DRAWN]}, column_titles=titles), path)


def _pixels(result: AttackResult) -> Tensor:
    return result.normalization.pixels(result.reconstruction.images.to(torch.float64))


def _cells(scores: ImageScores) -> list[str]:
    values = {name: value(scores) for name, value in COLUMNS.items()}
    return ["\u2013" if v is None else DECIMALS.get(name, "{:.2g}").format(v) for name, v in values.items()]


def _write(figure: Figure, path: Path) -> Path:
    picture = encode(figure, "png")
    return write_bytes_atomically(path, picture)
