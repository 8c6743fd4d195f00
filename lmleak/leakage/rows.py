"""Gradients of one layer as rows of a matrix, with the attribute value of each: what the comparisons start from."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from lmleak.errors import DataError

COLUMNS = 2**16  # parameters read at once when gradients are replaced by coordinates


def checked_values(values: ArrayLike) -> NDArray:
    """Return targets or labels as an array; what is one value per row is all of one kind.

    Args:
        values: (n,) numbers, booleans or strings, or (n, ...) numbers: a sequence, an array or a tensor.

    Returns:
        The array.

    Raises:
        DataError: If values are missing (None, NaN), of several kinds (numpy would turn 1 into "1"), or rows of
            different lengths.
    """
    try:
        found = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    except ValueError as error:
        raise DataError(f"expected rows of equal length, got {str(error)[:200]}") from error
    if found.ndim != 1:
        return found
    if isinstance(values, (list, tuple)) or found.dtype == object:
        kinds = {_kind(value) for value in values}
        if not (len(kinds) == 1 or kinds <= {"number", "bool"}) or not kinds <= {"number", "bool", "str", "bytes"}:
            raise DataError(
                f"values are of the kinds {', '.join(sorted(kinds))}; expected one: pass all integers, all booleans "
                "or all strings, and leave out samples without a value"
            )
        if found.dtype == object:
            found = np.array(found.tolist())
    if found.dtype.kind == "f" and not np.isfinite(found).all():
        raise DataError("values hold NaN or Inf; expected finite numbers: leave out samples without a value")
    return found


def _kind(value: object) -> str:
    for kind, types in (
        ("bool", (bool, np.bool_)),
        ("number", (int, float, np.number)),
        ("str", str),
        ("bytes", bytes),
    ):
        if isinstance(value, types):
            return kind
    return "number" if isinstance(value, Tensor) and value.ndim == 0 else type(value).__name__


def attribute_codes(labels: Sequence | np.ndarray | Tensor, size: int) -> tuple[list, Tensor]:
    """Return the distinct values of an attribute, sorted, and each row's index among them.

    Args:
        labels: One value per row: numbers, strings or a tensor.
        size: Number of gradients.

    Returns:
        The values, and (n,) int64 indices on the CPU.

    Raises:
        DataError: If the number of labels is not that of the gradients, or there are fewer than two values, or a
            value has one example only.
    """
    labels = checked_values(labels)
    if labels.shape != (size,):
        raise DataError(f"expected one attribute value per gradient, ({size},), got labels of shape {labels.shape}")
    values, codes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    if len(values) < 2 or counts.min() < 2:
        raise DataError(
            f"comparing attribute values needs two of them with two gradients each, got "
            f"{dict(zip(values.tolist()[:5], counts.tolist()[:5], strict=True))}"
        )
    return values.tolist(), torch.from_numpy(codes.reshape(-1).astype(np.int64))


def gradient_tensor(gradients: ArrayLike) -> Tensor:
    """Return gradients as a tensor without history.

    Args:
        gradients: Tensor or array of numbers.

    Returns:
        The tensor, of the same memory where possible.

    Raises:
        DataError: If they are no numbers, or rows of different lengths.
    """
    if isinstance(gradients, Tensor):
        return gradients.detach()
    try:
        return torch.as_tensor(np.asarray(gradients))
    except (TypeError, ValueError) as error:
        raise DataError(f"expected gradients (n, p) or (n, out, in), a tensor or an array; got {error}") from error


def coordinates(gradients: ArrayLike) -> Tensor:
    """Return rows with the inner products of the gradients and at most n columns.

    G^T = Q R with orthonormal Q (p, n) gives G G^T = R^T R: R^T (n, n) serves in place of G, with angles as accurate
    as from G itself (forming the Gram matrix would square the condition number). R is updated block by block of
    parameters, so that G may be a memory-mapped or half-precision tensor.

    Args:
        gradients: (n, p) or (n, ...), a tensor or an array.

    Returns:
        (n, min(n, p)) float64 on the CPU; the flattened gradients themselves if p <= n.

    Raises:
        DataError: If there is no gradient to read.
    """
    gradients = gradient_tensor(gradients)
    if gradients.ndim < 2 or gradients.numel() == 0:
        raise DataError(f"expected gradients (n, p) or (n, out, in), got shape {tuple(gradients.shape)}")
    flat = gradients.flatten(1)
    if flat.shape[1] <= len(flat):
        return finite(flat.double()).cpu()
    triangle = flat.new_zeros(0, len(flat), dtype=torch.float64)
    for block in flat.split(max(COLUMNS, len(flat)), dim=1):
        triangle = torch.linalg.qr(torch.cat([triangle, finite(block.double()).T]), mode="r").R
    return triangle.T.contiguous().cpu()


def less_mean(rows: Tensor) -> Tensor:
    """Return rows less their mean; what rounding leaves of rows equal to it becomes zero, lest it look like a span."""
    centred = rows - rows.mean(0)
    norms = torch.linalg.vector_norm(centred, dim=1, keepdim=True)
    rounding = 100 * torch.finfo(rows.dtype).eps * torch.linalg.vector_norm(rows, dim=1).max()
    return torch.where(norms > rounding, centred, torch.zeros_like(centred))


def finite(rows: Tensor) -> Tensor:
    """Return the rows.

    Args:
        rows: Gradients.

    Returns:
        The same tensor.

    Raises:
        DataError: If one holds NaN or Inf.
    """
    if not torch.isfinite(rows).all():
        raise DataError("the gradients hold NaN or Inf; leave those examples out")
    return rows


def unit_rows(rows: Tensor) -> Tensor:
    """Return rows scaled to norm 1; a zero gradient stays zero."""
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / torch.where(norms > 0, norms, torch.ones_like(norms))


def direction_and_norm(gradients: np.ndarray) -> np.ndarray:
    """Return gradients as direction and logarithm of the norm, (n, p) -> (n, p + 1): g -> (g / ||g||, log ||g||).

    An invertible change of features, so it loses nothing to an attacker with any model; it helps those with few
    parameters. The norms of a trained model's gradients spread over decades (a surprising example has a large one),
    and after standardisation of each coordinate a few examples would be all that a linear model sees.

    Args:
        gradients: One row per gradient.

    Returns:
        float64; a zero gradient has direction zero and the logarithm of the smallest positive number.
    """
    rows = np.asarray(gradients, dtype=np.float64)
    norms = np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    return np.concatenate([rows / norms, np.log(norms)], axis=1)
