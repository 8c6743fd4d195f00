"""Linear operators known by their products only; the matrix is never formed unless it is tiny.

Letters: m rows, n columns, k vectors. Operators act on flat 1-D vectors; a vector stays on the operator's device
and in its dtype from the first product to the last.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from lmleak.errors import ConfigError

DENSE_LIMIT = 4096
"""Largest side that ``to_dense`` forms unless told otherwise (128 MiB in float64, 4096 products)."""


class LinearOperator(ABC):
    """A real m x n matrix A that is known through v -> A v and u -> A^T u.

    Subclasses give ``_matvec`` and ``_rmatvec``, and ``_matmat`` and ``block_size`` where several vectors at once cost
    less than one by one; the public methods check shapes and dtypes and detach.

    Args:
        shape: (m, n).
        dtype: Of the vectors it takes and returns.
        device: Of the vectors it takes and returns.
        positive_semidefinite: Tag: A is symmetric with no negative eigenvalue. Nobody can verify it from products, so
            it is a promise of whoever builds the operator, and every solver asks for it.

    Raises:
        ConfigError: If the tag is set on a shape that is not square.
    """

    block_size: int = 1
    """Vectors that ``matmat`` multiplies in one pass: 1 where nothing is gained by more."""

    def __init__(
        self,
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device | str,
        positive_semidefinite: bool = False,
    ):
        if positive_semidefinite and shape[0] != shape[1]:
            raise ConfigError(
                f"positive_semidefinite=True needs a square operator, got shape {tuple(shape)}. "
                "Solve with the Gram operator A @ A.T instead."
            )
        self.shape = (int(shape[0]), int(shape[1]))
        self.dtype = dtype
        self.device = torch.device(device)
        self.positive_semidefinite = positive_semidefinite

    @abstractmethod
    def _matvec(self, vector: Tensor) -> Tensor:
        """Return A v, (n,) -> (m,)."""

    @abstractmethod
    def _rmatvec(self, vector: Tensor) -> Tensor:
        """Return A^T u, (m,) -> (n,)."""

    def _matmat(self, matrix: Tensor) -> Tensor:
        """Return A V, (n, k) -> (m, k), for at most ``block_size`` columns."""
        return torch.stack([self.matvec(column) for column in matrix.T.contiguous()], dim=1)

    def matvec(self, vector: Tensor) -> Tensor:
        """Return A v, (n,) -> (m,); raises ConfigError where the vector or the product does not fit."""
        self._check("matvec takes", vector, (self.shape[1],))
        product = self._matvec(vector.detach()).detach()
        self._check("the product A v is", product, (self.shape[0],))
        return product

    def matmat(self, matrix: Tensor) -> Tensor:
        """Return A V, the products of k independent vectors, ``block_size`` of them in one pass.

        Args:
            matrix: V, (n, k).

        Returns:
            (m, k); equal to k times ``matvec`` up to rounding. ConfigError where V or the product does not fit.
        """
        count = matrix.shape[-1] if isinstance(matrix, Tensor) and matrix.ndim else 0
        self._check("matmat takes", matrix, (self.shape[1], count))
        if count == 0:
            return matrix.new_zeros(self.shape[0], 0)
        blocks = matrix.detach().chunk(math.ceil(count / self.block_size), dim=1)
        product = torch.cat([self._matmat(block).detach() for block in blocks], dim=1)
        self._check("the product A V is", product, (self.shape[0], count))
        return product

    def rmatvec(self, vector: Tensor) -> Tensor:
        """Return A^T u, (m,) -> (n,); raises ConfigError where the vector or the product does not fit."""
        self._check("rmatvec takes", vector, (self.shape[0],))
        product = self._rmatvec(vector.detach()).detach()
        self._check("the product A^T u is", product, (self.shape[1],))
        return product

    def to_dense(self, max_size: int = DENSE_LIMIT) -> Tensor:
        """Form the matrix column by column; for small problems and for oracles in tests.

        Args:
            max_size: Refuse when either side is longer.

        Returns:
            (m, n) tensor; costs n products.

        Raises:
            ConfigError: If a side exceeds ``max_size``.
        """
        if max(self.shape) > max_size:
            raise ConfigError(
                f"to_dense() of a {self.shape[0]} x {self.shape[1]} operator: sides up to {max_size} are formed. "
                "Use products (matvec) and the solvers, or pass a larger max_size."
            )
        return self @ torch.eye(self.shape[1], dtype=self.dtype, device=self.device)

    @property
    def T(self) -> "LinearOperator":
        """The transpose A^T; a positive semidefinite operator is its own."""
        return self if self.positive_semidefinite else TransposedOperator(self)

    def shifted(self, damping: float) -> "ShiftedOperator":
        """Return A + damping * I."""
        return ShiftedOperator(self, damping)

    def __matmul__(self, other):
        if isinstance(other, LinearOperator):
            return ProductOperator(self, other)
        if isinstance(other, Tensor) and other.ndim == 1:
            return self.matvec(other)
        if isinstance(other, Tensor) and other.ndim == 2:
            return self.matmat(other)
        raise ConfigError(
            f"an operator multiplies a vector (n,), a matrix (n, k) or an operator, got {_describe(other)}. "
            "Flatten the input first."
        )

    def __repr__(self) -> str:
        tag = ", positive_semidefinite" if self.positive_semidefinite else ""
        return f"{type(self).__name__}({self.shape[0]} x {self.shape[1]}, {self.dtype}, {self.device}{tag})"

    def _check(self, what: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
        fits = (
            isinstance(tensor, Tensor)
            and tensor.shape == shape
            and tensor.dtype == self.dtype
            and tensor.device.type == self.device.type
        )
        if not fits:
            kind = "a flat vector" if len(shape) == 1 else "a matrix"
            raise ConfigError(
                f"{self!r}: {what} {kind} of shape {shape}, {self.dtype}, on {self.device.type}; "
                f"got {_describe(tensor)}."
            )


class MatrixOperator(LinearOperator):
    """A matrix in memory as an operator.

    Args:
        matrix: (m, n).
        positive_semidefinite: The tag; symmetry is verified here because it can be.

    Raises:
        ConfigError: If ``matrix`` is not 2-D, or is tagged and not symmetric.
    """

    def __init__(self, matrix: Tensor, positive_semidefinite: bool = False):
        if matrix.ndim != 2:
            raise ConfigError(f"MatrixOperator takes a 2-D tensor, got shape {tuple(matrix.shape)}.")
        super().__init__(matrix.shape, matrix.dtype, matrix.device, positive_semidefinite)
        self.matrix = matrix.detach()
        if positive_semidefinite:
            gap = (matrix - matrix.T).abs().max() if matrix.numel() else torch.zeros(())
            if gap > torch.finfo(matrix.dtype).eps ** 0.5 * matrix.abs().max():
                raise ConfigError(
                    f"positive_semidefinite=True on a matrix that differs from its transpose by {gap:.3e}. "
                    "Pass (matrix + matrix.T) / 2, or the Gram matrix."
                )

    def _matvec(self, vector: Tensor) -> Tensor:
        return self.matrix @ vector

    def _rmatvec(self, vector: Tensor) -> Tensor:
        return self.matrix.T @ vector


class FunctionOperator(LinearOperator):
    """A symmetric operator given by a function v -> A v; counts its products in ``products``.

    Args:
        matvec: Function of a flat (n,) tensor that returns a flat (n,) tensor. It must be symmetric: the transposed
            product is the same function.
        size: n.
        dtype: Of the vectors.
        device: Of the vectors.
        positive_semidefinite: The tag; see ``LinearOperator``.
        matmat: The same for several vectors, (n, k) -> (n, k); None: one by one.
        block_size: Most vectors that ``matmat`` is given.
    """

    def __init__(
        self,
        matvec: Callable[[Tensor], Tensor],
        size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        positive_semidefinite: bool = False,
        matmat: Callable[[Tensor], Tensor] | None = None,
        block_size: int = 1,
    ):
        super().__init__((size, size), dtype, device, positive_semidefinite)
        self._function, self._block_function = matvec, matmat
        self.block_size = block_size if matmat else 1
        self.products = 0

    def _matvec(self, vector: Tensor) -> Tensor:
        self.products += 1
        return self._function(vector)

    def _rmatvec(self, vector: Tensor) -> Tensor:
        return self._matvec(vector)

    def _matmat(self, matrix: Tensor) -> Tensor:
        count = matrix.shape[1]
        if count == 1:  # a pass for several costs more than one for one
            return super()._matmat(matrix)
        self.products += count
        return self._block_function(matrix)


class TransposedOperator(LinearOperator):
    """A^T of an operator A."""

    def __init__(self, operator: LinearOperator):
        super().__init__(operator.shape[::-1], operator.dtype, operator.device, operator.positive_semidefinite)
        self.operator = operator

    @property
    def T(self) -> LinearOperator:
        """The operator it was made from."""
        return self.operator

    def _matvec(self, vector: Tensor) -> Tensor:
        return self.operator.rmatvec(vector)

    def _rmatvec(self, vector: Tensor) -> Tensor:
        return self.operator.matvec(vector)


class ProductOperator(LinearOperator):
    """The chain ``left @ right``; tagged positive semidefinite when one factor is the transpose of the other."""

    def __init__(self, left: LinearOperator, right: LinearOperator):
        if left.shape[1] != right.shape[0] or left.dtype != right.dtype or left.device.type != right.device.type:
            raise ConfigError(f"cannot chain {left!r} @ {right!r}: inner sides, dtype and device must agree.")
        super().__init__((left.shape[0], right.shape[1]), left.dtype, left.device, right.T is left or left.T is right)
        self.left, self.right = left, right

    def _matvec(self, vector: Tensor) -> Tensor:
        return self.left.matvec(self.right.matvec(vector))

    def _rmatvec(self, vector: Tensor) -> Tensor:
        return self.right.rmatvec(self.left.rmatvec(vector))


class ShiftedOperator(LinearOperator):
    """A + damping * I.

    Args:
        operator: A, square.
        damping: In the units of A; keeps the tag when it is not negative.

    Raises:
        ConfigError: If A is not square.
    """

    def __init__(self, operator: LinearOperator, damping: float):
        if operator.shape[0] != operator.shape[1]:
            raise ConfigError(f"{operator!r} is not square: damping * I has no place. Shift A @ A.T or A.T @ A.")
        tag = operator.positive_semidefinite and damping >= 0
        super().__init__(operator.shape, operator.dtype, operator.device, tag)
        self.operator, self.damping = operator, float(damping)

    def _matvec(self, vector: Tensor) -> Tensor:
        return self.operator.matvec(vector) + self.damping * vector

    def _rmatvec(self, vector: Tensor) -> Tensor:
        return self.operator.rmatvec(vector) + self.damping * vector


def require_positive_semidefinite(operator: LinearOperator, caller: str) -> None:
    """Refuse what the symmetric solvers cannot solve.

    Args:
        operator: What the caller was given.
        caller: Name of the solver, for the message.

    Raises:
        ConfigError: If ``operator`` is no LinearOperator, lacks the tag, or is not in float32 or float64.
    """
    if not isinstance(operator, LinearOperator):
        raise ConfigError(
            f"{caller} takes a LinearOperator, got {_describe(operator)}. "
            "Wrap a matrix: MatrixOperator(matrix, positive_semidefinite=True)."
        )
    if not operator.positive_semidefinite:
        raise ConfigError(
            f"{caller} needs a symmetric positive semidefinite operator, and {operator!r} does not carry the tag. "
            "Write A @ A.T, or build it with positive_semidefinite=True if that is what it is."
        )
    if operator.dtype not in (torch.float32, torch.float64):
        raise ConfigError(f"{caller} works in float32 or float64, got {operator.dtype}. Cast the products to float32.")


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}, {value.dtype}, on {value.device.type}"
    return f"{type(value).__name__}"
