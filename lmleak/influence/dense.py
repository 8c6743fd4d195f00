"""J and A as matrices, many products at a time: the exact way where dx is at most a few thousand.

One batched backward pass through the graphs that J already holds gives J^T u for many u at once. On one core, LeNet
at 1x28x28 (J is 784 x 17,038) takes 0.2 s for J and 0.3 s for A = J J^T in float64.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lmleak.influence.jacobian import InputJacobian
from lmleak.influence.products import DENSE_LIMIT

CHUNK = 64  # products in one pass; more gain nothing on a CPU and cost memory
COLUMNS = 4096  # columns of J widened to float64 at once
BLOCK = 256  # rows of A summed at once


def dense_rows(jacobian: InputJacobian, *, chunk_size: int = CHUNK) -> Tensor:
    """Return J on the free coordinates as a matrix (dx, P), by dx products J^T u.

    Args:
        jacobian: J.
        chunk_size: Products computed at once.

    Returns:
        The matrix in J's precision, parameters in the order of ``jacobian.parameter_names``.
    """

    def row(direction: Tensor) -> Tensor:
        product = jacobian.rmatvec(direction)
        return torch.cat([product[name].reshape(-1) for name in jacobian.parameter_names])

    rows = torch.empty(jacobian.shape, dtype=jacobian.dtype, device=jacobian.device)
    return _fill(rows, row, jacobian, chunk_size)


def dense_gram(jacobian: InputJacobian, *, chunk_size: int = CHUNK, largest: int | None = None) -> Tensor:
    """Return A = J J^T on the free coordinates as a matrix (dx, dx) in float64.

    J is formed in the model's precision and its products are summed in float64: an error of e in J moves singular
    values by e, so that float32 resolves eigenvalues of A down to about 1e-12 of the largest. A J too large to hold
    is applied instead, and float32 then resolves 1e-6 of the largest; for networks of small convolutions that takes
    three times as long, too.

    Args:
        jacobian: J.
        chunk_size: Products computed at once.
        largest: Most numbers that J may hold as a matrix, ``DENSE_LIMIT`` by default; more where memory allows.

    Returns:
        The matrix, symmetric, in the order of ``jacobian.flatten``.
    """
    dx = jacobian.dx
    gram = torch.zeros(dx, dx, dtype=torch.float64, device=jacobian.device)
    if rows_fit(jacobian, largest):
        for columns in dense_rows(jacobian, chunk_size=chunk_size).split(COLUMNS, dim=1):
            wide = columns.double()
            for start in range(0, dx, BLOCK):  # the lower triangle, block row by block row
                stop = min(start + BLOCK, dx)
                gram[start:stop, :stop].addmm_(wide[start:stop], wide[:stop].T)
        return gram.tril() + gram.tril(-1).T
    free = jacobian.free.reshape(-1)
    columns = torch.empty(dx, jacobian.x.numel(), dtype=jacobian.dtype, device=jacobian.device)
    gram.copy_(_fill(columns, lambda u: jacobian.gram(u).reshape(-1), jacobian, chunk_size)[:, free])
    return (gram + gram.T) / 2


def rows_fit(jacobian: InputJacobian, largest: int | None = None) -> bool:
    """Return whether J as a matrix stays within ``largest`` numbers, by default ``DENSE_LIMIT``."""
    dx, parameters = jacobian.shape
    return dx * parameters <= (DENSE_LIMIT if largest is None else largest)


def resolution(jacobian: InputJacobian, largest: int | None = None) -> float:
    """Return the smallest eigenvalue of :func:`dense_gram` that is not rounding, over the largest."""
    unit = torch.finfo(jacobian.dtype).eps
    of_sums = jacobian.dx * torch.finfo(torch.float64).eps
    return max(of_sums, (16 * unit) ** 2 if rows_fit(jacobian, largest) else 16 * unit)


def _fill(rows: Tensor, product: Callable[[Tensor], Tensor], jacobian: InputJacobian, chunk_size: int) -> Tensor:
    """Fill row k with the product of the k-th free coordinate's unit vector."""
    start = 0
    for directions in _unit_vectors(jacobian, chunk_size):
        rows[start : start + len(directions)] = torch.func.vmap(product)(directions)
        start += len(directions)
    return rows


def _unit_vectors(jacobian: InputJacobian, chunk_size: int) -> Iterator[Tensor]:
    """Yield the unit vectors of the free coordinates, (k, *x.shape) at a time."""
    for coordinates in jacobian.free.reshape(-1).nonzero().squeeze(1).split(chunk_size):
        directions = jacobian.x.new_zeros(len(coordinates), jacobian.x.numel())
        directions.scatter_(1, coordinates[:, None], 1.0)
        yield directions.reshape(-1, *jacobian.x.shape)
