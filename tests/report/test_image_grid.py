"""The grid of images: what is drawn, in which unit, and what is refused."""

import matplotlib as mpl
import numpy as np
import pytest
import torch

from lmleak.errors import DataError
from lmleak.report.drawing import encode
from lmleak.report.image_grid import image_grid


def pictures(count=3, channels=1, height=8, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, channels, height, width, generator=generator, dtype=torch.float64)


def panels(figure, columns):
    """The axes of the images, row by row; the colour bar is the last axis."""
    axes = [ax for ax in figure.axes if ax.get_label() != "<colorbar>"]
    return [axes[i : i + columns] for i in range(0, len(axes), columns)]


def data(ax):
    return np.asarray(ax.images[0].get_array())


def test_rows_hold_originals_recovered_and_differences():
    true = pictures()
    guess = true + 0.25
    figure = image_grid(true, {"gs": guess}, column_titles=["a", "b", "c"])
    rows = panels(figure, 3)
    assert [row[0].get_ylabel() for row in rows] == ["original", "gs", "difference"]
    assert [ax.get_title() for ax in rows[0]] == ["a", "b", "c"]
    for column in range(3):
        np.testing.assert_array_equal(data(rows[0][column]), true[column, 0].numpy())
        np.testing.assert_array_equal(data(rows[1][column]), guess[column, 0].clamp(0, 1).numpy())
        np.testing.assert_allclose(data(rows[2][column]), 0.25)
        assert rows[1][column].get_title().endswith("RMSE 0.25")  # not clipped
    clipped = (guess[0].clamp(0, 1) - true[0]).square().mean()
    assert rows[1][0].get_title().startswith(f"{-10 * torch.log10(clipped).item():.1f} dB")


def test_differences_share_one_symmetric_scale_with_its_unit():
    true = pictures()
    figure = image_grid(true, {"near": true - 0.1, "far": true + 0.5})
    rows = panels(figure, 3)
    assert len(rows) == 5
    (scale,) = {ax.images[0].get_clim() for row in (rows[2], rows[4]) for ax in row}
    assert scale == pytest.approx((-0.5, 0.5))
    (bar,) = [ax for ax in figure.axes if ax.get_label() == "<colorbar>"]
    assert bar.get_ylim() == pytest.approx((-0.5, 0.5))
    assert "pixel values, white - black = 1" in bar.get_ylabel()
    rows = panels(image_grid(true, {"near": true - 0.1}, limit=0.2), 3)
    assert rows[2][0].images[0].get_clim() == (-0.2, 0.2)


def test_of_three_colours_the_one_that_differs_most_is_shown_with_its_sign():
    true = torch.full((1, 3, 4, 4), 0.5)
    guess = true + torch.tensor([0.1, -0.3, 0.2])[:, None, None]  # the mean over colours would be zero
    figure = image_grid(true, {"gs": guess})
    rows = panels(figure, 1)
    np.testing.assert_allclose(data(rows[2][0]), -0.3, atol=1e-6)
    assert data(rows[1][0]).shape == (4, 4, 3)
    assert "colour" in figure.axes[-1].get_ylabel()


def test_without_differences_there_is_no_scale():
    figure = image_grid(pictures(), {"λ = 1": pictures(seed=1), "λ = 2": pictures(seed=2)}, differences=False)
    assert [row[0].get_ylabel() for row in panels(figure, 3)] == ["original", "λ = 1", "λ = 2"]
    assert len(figure.axes) == 9


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_diverged_image_is_named_and_does_not_spoil_the_scale(bad):
    true = pictures()
    guess = true + 0.125
    guess[1, 0, 0, 0] = bad
    figure = image_grid(true, {"gs": guess})
    rows = panels(figure, 3)
    assert rows[1][1].get_title() == "diverged"
    assert rows[2][0].images[0].get_clim() == pytest.approx((-0.125, 0.125))
    assert encode(figure, "png").startswith(b"\x89PNG")
    assert encode(image_grid(true, {"gs": true * bad}), "png").startswith(b"\x89PNG")


def test_same_images_same_bytes_and_settings_are_restored():
    before = dict(mpl.rcParams)
    true = pictures(2, 3, 5, 9)
    first, second = (encode(image_grid(true, {"same": true}), "png") for _ in range(2))
    assert first == second
    assert dict(mpl.rcParams) == before


def test_what_cannot_be_drawn_is_refused():
    true = pictures()
    with pytest.raises(DataError, match="one channel or three"):
        image_grid(pictures(channels=2), {"gs": pictures(channels=2)})
    with pytest.raises(DataError, match="at least one row"):
        image_grid(true, {})
    with pytest.raises(DataError, match="expected the same"):
        image_grid(true, {"gs": true[:2]})
    with pytest.raises(DataError, match="2 column titles for 3"):
        image_grid(true, {"gs": true}, column_titles=["a", "b"])
    with pytest.raises(DataError, match="NaN or Inf"):
        image_grid(true * float("nan"), {"gs": true})
