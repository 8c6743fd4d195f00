"""How far a recovered image is from the true one, as plain functions of one pair (C, H, W) each.

A number that is not defined is None: of a recovered image that holds NaN or Inf, or whose error overflows.
"""

from math import isfinite, log10

import torch
from torch import Tensor
from torch.nn import functional as F

from lmleak.errors import DataError

LARGEST_PSNR = 160.0  # dB: an RMSE of 1e-8, below what float32 pixels resolve
WINDOW, SIGMA = 11, 1.5  # pixels
SMALLEST_WINDOW = 3  # pixels; one pixel has no variance to compare


def mse(prediction: Tensor, reference: Tensor) -> float | None:
    """Return the mean squared error, ``||x' - x||^2 / dx``, in squared units of x.

    Args:
        prediction: The recovered image.
        reference: The true one, of the same shape.

    Returns:
        The error, or None where it is not finite. Images of different shapes are refused as ``DataError``.
    """
    prediction, reference = _pair(prediction, reference)
    error = (prediction - reference).square().mean().item()
    return error if isfinite(error) else None


def psnr(prediction: Tensor, reference: Tensor, data_range: float = 1.0) -> float | None:
    """Return the peak signal-to-noise ratio, ``10 log10(data_range^2 / mse)``, in dB.

    Args:
        prediction: The recovered image, in pixel values.
        reference: The true one, of the same shape.
        data_range: White minus black.

    Returns:
        The ratio, at most ``LARGEST_PSNR`` (so that equal images have a number, too), or None where the error is not
        finite.
    """
    error = mse(prediction, reference)
    if error is None:
        return None
    return min(LARGEST_PSNR, 10 * log10(data_range**2 / error)) if error else LARGEST_PSNR


def ssim(prediction: Tensor, reference: Tensor, data_range: float = 1.0) -> float | None:
    """Return the mean structural similarity of two images, 1 if they are equal.

        SSIM = mean_p (2 m_x m_y + C1)(2 s_xy + C2) / ((m_x^2 + m_y^2 + C1)(s_x^2 + s_y^2 + C2))

    over channels and all positions p at which the window lies inside the image; m, s^2 and s_xy are means, variances
    and covariance under a Gaussian window of 11 x 11 pixels and standard deviation 1.5, C1 = (0.01 data_range)^2 and
    C2 = (0.03 data_range)^2.

    Source: Wang, Bovik, Sheikh and Simoncelli 2004, "Image quality assessment: from error visibility to structural
    similarity", IEEE Transactions on Image Processing 13(4), equation 13. Images narrower than 11 pixels get the
    largest odd window that fits, its standard deviation shrunk alike. The same numbers come from scikit-image's
    ``structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)``.

    Args:
        prediction: The recovered image (C, H, W), in pixel values.
        reference: The true one, of the same shape.
        data_range: White minus black.

    Returns:
        The similarity in [-1, 1]; None where the recovered image is not finite, or a side is shorter than 3 pixels.

    Raises:
        DataError: If an image is not (C, H, W).
    """
    prediction, reference = _pair(prediction, reference)
    if prediction.dim() != 3:
        raise DataError(f"ssim compares images (C, H, W), got shape {tuple(prediction.shape)}")
    size = min(WINDOW, *prediction.shape[1:])
    size -= 1 - size % 2
    if size < SMALLEST_WINDOW or not torch.isfinite(prediction).all():
        return None
    window = _gaussian_window(size)
    x, y = prediction[:, None], reference[:, None]  # channels are treated as a batch
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = (F.conv2d(z, window) for z in (x, y, x * x, y * y, x * y))
    variances = mean_xx - mean_x**2 + mean_yy - mean_y**2
    covariance = mean_xy - mean_x * mean_y
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variances + c2)
    similarity = (luminance * structure).mean().item()
    return similarity if isfinite(similarity) else None


def _gaussian_window(size: int) -> Tensor:
    """Return the window (1, 1, size, size), which sums to one."""
    places = torch.arange(size, dtype=torch.float64) - size // 2
    weights = torch.exp(-0.5 * (places / (SIGMA * size / WINDOW)) ** 2)
    weights /= weights.sum()
    return torch.outer(weights, weights)[None, None]


def _pair(prediction: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Return both images on the CPU in double precision."""
    if prediction.shape != reference.shape or not reference.numel():
        raise DataError(
            f"expected two images of one shape, got {tuple(prediction.shape)} and {tuple(reference.shape)}"
        )
    return tuple(image.detach().to("cpu", torch.float64) for image in (prediction, reference))
