"""Original, recovered and difference images side by side, as the papers on gradient inversion show them."""

from collections.abc import Mapping, Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

from lmleak.errors import DataError
from lmleak.metrics.image import mse, psnr
from lmleak.report.drawing import GREY, house_style
from lmleak.report.rows import compact

CELL = 1.45  # inches, width of one image
PER_ROW = 8  # images that have no original beside them
BAR = 3.6  # inches, length of the scale
SMALLEST_LIMIT = 1e-12  # so that equal images have a scale, too
DIFFERENCE = "recovered - original\n(pixel values, white - black = 1)"
STRONGEST_COLOUR = "\nof the colour that differs most"


def image_grid(
    original: Tensor,
    recovered: Mapping[str, Tensor],
    *,
    column_titles: Sequence[str] = (),
    captions: Mapping[str, Sequence[str]] | None = None,
    differences: bool = True,
    limit: float | None = None,
) -> Figure:
    """Draw private images above what was recovered of them, one column per image.

    The first row holds the originals; then every entry of ``recovered`` has a row of images, clipped to [0, 1], each
    titled with its PSNR (clipped, as :func:`lmleak.metrics.score_images` takes it) and its RMSE in pixel values (not
    clipped), and a row of signed differences, not clipped: red where the recovered image is brighter, blue where it is
    darker. All differences share one symmetric scale. A diverged image is a grey field.

    Args:
        original: True pixel values in [0, 1], (N, C, H, W) with one channel or three.
        recovered: Name of a row (an attack, a noise level, a direction) to its pixel values (N, C, H, W), matched to
            the originals.
        column_titles: What each image is, N short strings; none are written if empty.
        captions: What is written above the images of a row instead of their PSNR and RMSE, N short strings per entry
            of ``recovered``.
        differences: Whether to draw the rows of differences.
        limit: Half the range of the differences' scale, in pixel values; None takes the largest one, at most 1.
            What lies beyond has the last colour.

    Returns:
        The figure, for :func:`lmleak.report.drawing.encode`.
    """
    _check(original, recovered, column_titles)
    true = original.detach().cpu().double()
    rows = {name: images.detach().cpu().double() for name, images in recovered.items()}
    largest = max(_largest(images - true) for images in rows.values())
    limit = min(1.0, max(largest, SMALLEST_LIMIT)) if limit is None else limit
    step = 2 if differences else 1
    grid = 1 + step * len(rows), len(true)
    size = _size(grid, true.shape, [*rows, "difference"], len(rows))
    with house_style():
        figure = Figure(figsize=size, layout="compressed")
        axes = figure.subplots(*grid, squeeze=False)
        _draw_row(axes[0], "original", true, column_titles or [""] * len(true))
        for place, (name, images) in enumerate(rows.items()):
            titles = captions[name] if captions else map(_quality, images, true)
            _draw_row(axes[1 + step * place], name, images, titles)
            if differences:
                _draw_differences(axes[2 + step * place], images - true, limit)
        if differences:
            bar = figure.colorbar(
                ScalarMappable(Normalize(-limit, limit), "RdBu_r"), ax=axes.ravel().tolist(),
                shrink=min(1.0, BAR / size[1]), aspect=BAR / 0.15,
                label=DIFFERENCE + (STRONGEST_COLOUR if true.shape[1] == 3 else ""),
                extend="both" if largest > limit else "neither",
            )  # fmt: skip
            bar.outline.set_visible(False)
    return figure


def image_rows(images: Tensor, titles: Sequence[str]) -> Figure:
    """Draw images that have no original beside them, clipped to [0, 1]; one that is not finite is a grey field.

    Args:
        images: Pixel values (N, C, H, W) with one channel or three.
        titles: One short string each.

    Returns:
        The figure, for :func:`lmleak.report.drawing.encode`.

    Raises:
        DataError: If there is no image, or one of other channels, or a title is missing.
    """
    if images.dim() != 4 or images.shape[1] not in (1, 3) or not images.numel() or len(titles) != len(images):
        raise DataError(
            f"expected images (N, C, H, W) with one channel or three and a title each, got {tuple(images.shape)} and "
            f"{len(titles)} titles"
        )
    columns = min(PER_ROW, len(images))
    rows = -(-len(images) // columns)
    width, height = CELL, CELL * images.shape[2] / images.shape[3]
    with house_style():
        figure = Figure(figsize=((width + 0.1) * columns + 0.2, (height + 0.4) * rows + 0.1), layout="compressed")
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for place, image, title in zip(axes, images.detach().cpu().double(), titles, strict=False):
            _draw_image(place, image, title)
        for place in axes[len(images) :]:
            place.set_axis_off()
    return figure


def _check(original: Tensor, recovered: Mapping[str, Tensor], column_titles: Sequence[str]) -> None:
    """Refuse what cannot be drawn."""
    if original.dim() != 4 or original.shape[1] not in (1, 3) or not original.numel():
        raise DataError(f"expected images (N, C, H, W) with one channel or three, got {tuple(original.shape)}")
    if not torch.isfinite(original).all():
        raise DataError("the original images hold NaN or Inf")
    if not recovered:
        raise DataError("nothing to draw: give at least one row of recovered images")
    for name, images in recovered.items():
        if images.shape != original.shape:
            raise DataError(
                f"{name!r} has images of shape {tuple(images.shape)}, the originals {tuple(original.shape)}; "
                "expected the same"
            )
    if column_titles and len(column_titles) != len(original):
        raise DataError(f"got {len(column_titles)} column titles for {len(original)} images; give one each, or none")


def _size(grid: tuple[int, int], shape: Sequence[int], names: Sequence[str], titled: int) -> tuple[float, float]:
    """Return width and height of the figure in inches: images, names on the left, the scale on the right, titles."""
    height = CELL * shape[2] / shape[3]
    return 1.5 + 0.09 * max(map(len, names)) + (CELL + 0.08) * grid[1], (height + 0.08) * grid[0] + 0.35 * titled + 0.3


def _largest(difference: Tensor) -> float:
    """Return the largest finite absolute difference."""
    return difference[torch.isfinite(difference)].abs().max().item() if torch.isfinite(difference).any() else 0.0


def _quality(image: Tensor, true: Tensor) -> str:
    """Return the PSNR of the clipped image and the RMSE of the image as it is."""
    error = mse(image, true)
    return "diverged" if error is None else f"{psnr(image.clamp(0, 1), true):.1f} dB\nRMSE {compact(error**0.5)}"


def _draw_row(axes: Sequence[Axes], name: str, images: Tensor, titles: Sequence[str]) -> None:
    """Draw images with their titles, the row's name on the left."""
    _name_row(axes[0], name)
    for place, image, title in zip(axes, images, titles, strict=True):
        _draw_image(place, image, title)


def _draw_image(place: Axes, image: Tensor, title: str) -> None:
    """Draw one image with its title."""
    _clear(place)
    place.set_title(title, fontsize=9, fontweight="normal", loc="center", pad=3)
    if torch.isfinite(image).all():
        picture = image.clamp(0, 1).permute(1, 2, 0).numpy()
        place.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    else:
        _draw_nothing(place, image.shape)


def _draw_differences(axes: Sequence[Axes], differences: Tensor, limit: float) -> None:
    """Draw signed differences; of three colours, that of the colour that differs most at each pixel."""
    _name_row(axes[0], "difference")
    for place, difference in zip(axes, differences, strict=True):
        _clear(place)
        if torch.isfinite(difference).all():
            strongest = difference.gather(0, difference.abs().argmax(0, keepdim=True))[0]
            place.imshow(strongest.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
        else:
            _draw_nothing(place, difference.shape)


def _draw_nothing(place: Axes, shape: Sequence[int]) -> None:
    """Fill the place of a diverged image."""
    place.imshow(torch.zeros(shape[1:]).numpy(), cmap="gray", vmin=0, vmax=1, alpha=0)
    place.set_facecolor(GREY)


def _clear(place: Axes) -> None:
    """Leave nothing of an axis but a thin frame."""
    place.set_xticks([])
    place.set_yticks([])
    for spine in place.spines.values():
        spine.set(visible=True, color=GREY, linewidth=0.5)


def _name_row(first: Axes, name: str) -> None:
    first.set_ylabel(name, rotation=0, ha="right", va="center", labelpad=8)
