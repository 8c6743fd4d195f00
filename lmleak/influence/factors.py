"""A gradient as token-sized factors: what a layer's weight gradient is made of, and products with them.

A linear map Y = X W^T over n tokens has dL/dW = G^T X with G = dL/dY: X is (n, d_in), G is (n, d_out), and neither has
the size of W. So for a tangent (X', G') of the factors

    (dL/dW)' = G'^T X + G^T X'                                          (tangent)

and for a theta-shaped W' the pullback onto the factors is

    on X: G W'            on G: X W'^T                                  (cotangent)

The second after the first, with the products of tokens formed first, never holds anything of the size of W:

    on X: (G G'^T) X + (G G^T) X'        on G: (X X^T) G' + (X X'^T) G  (gram)

Biases, norms' weights, embeddings and convolutions (:mod:`lmleak.influence.convolutions`) have factors of the same
kind. A parameter that is used more than once (tied weights) has the sum of its uses as its gradient.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from lmleak.influence.row_maps import rows_times

Tensors = tuple[Tensor, ...]


class Factor(ABC):
    """The gradient of one parameter as a function of some tensors of the graph, its factors.

    Args:
        tensors: The factors, at the point where the gradient is taken.
    """

    def __init__(self, *tensors: Tensor):
        self.tensors = tensors
        self.values = tuple(t.detach() for t in tensors)

    @property
    def parts(self) -> "Sequence[Factor]":
        """The factors that add up to it."""
        return (self,)

    @abstractmethod
    def tangent(self, primes: Tensors) -> Tensor:
        """Return the derivative of the gradient, theta-shaped, along derivatives of the factors."""

    @abstractmethod
    def cotangent(self, theta: Tensor) -> Tensors:
        """Return the pullback of a theta-shaped tensor onto the factors."""

    def gram(self, primes: Tensors) -> Tensors:
        """Return the cotangent of the tangent."""
        return self.cotangent(self.tangent(primes))


class LinearFactor(Factor):
    """dL/dW = G^T X of a linear map, (d_out, d_in), or its transpose for maps that store theirs so.

    Args:
        x: (..., d_in) inputs.
        g: (..., d_out) gradients by the outputs.
        transposed: Whether the parameter is stored as (d_in, d_out), as in GPT-2.
        shape: Shape of the parameter, if it is not a matrix (convolutions).
        grouped: Whether the first axis of both counts linear maps, each with inputs of its own.
    """

    def __init__(
        self, x: Tensor, g: Tensor, *, transposed: bool = False, shape: torch.Size | None = None, grouped: bool = False
    ):
        super().__init__(x, g)
        self.transposed, self.shape, self.grouped = transposed, shape, grouped
        self.x, self.g = (self._rows(t) for t in self.values)

    @property
    def by_tokens(self) -> bool:
        """Whether products of tokens are cheaper than products of the weight's size."""
        return positions_are_cheaper(self.x.shape[-2], self.x.shape[-1], self.g.shape[-1])

    @cached_property
    def xx(self) -> Tensor:
        """X X^T."""
        return self.x @ self.x.mT

    @cached_property
    def gg(self) -> Tensor:
        """G G^T."""
        return self.g @ self.g.mT

    def tangent(self, primes):
        """Return G'^T X + G^T X'."""
        x_prime, g_prime = (self._rows(t) for t in primes)
        theta = _plus(g_prime.mT @ self.x, self.g.mT, x_prime)
        theta = theta.mT if self.transposed else theta
        return theta if self.shape is None else theta.reshape(self.shape)

    def cotangent(self, theta):
        """Return G W' and X W'^T."""
        if self.shape is not None:
            theta = theta.reshape(*self.g.shape[:-2], self.g.shape[-1], self.x.shape[-1])
        theta = theta.mT if self.transposed else theta
        return self._shaped(rows_times(self.g, theta.mT), rows_times(self.x, theta))

    def gram(self, primes):
        """Return (G G'^T) X + (G G^T) X' and (X X^T) G' + (X X'^T) G."""
        if not self.by_tokens:
            return super().gram(primes)
        x_prime, g_prime = (self._rows(t) for t in primes)
        on_x = _plus((self.g @ g_prime.mT) @ self.x, self.gg, x_prime)
        on_g = _plus((self.x @ x_prime.mT) @ self.g, self.xx, g_prime)
        return self._shaped(on_x, on_g)

    def sides(self, tensors: Tensors) -> Tensors:
        """Return (L, R) of x and g, or of their derivatives: the parameter's gradient is L^T R."""
        x, g = (self._rows(t) for t in tensors)
        return (x, g) if self.transposed else (g, x)

    def from_sides(self, on_left: Tensor, on_right: Tensor) -> Tensors:
        """Return cotangents of L and R as those of x and g."""
        return self._shaped(*((on_left, on_right) if self.transposed else (on_right, on_left)))

    def _rows(self, tensor: Tensor) -> Tensor:
        """Return (..., d) as (n, d), or as (groups, n, d)."""
        return tensor.flatten(1, -2) if self.grouped else rows(tensor)

    def _shaped(self, on_x: Tensor, on_g: Tensor) -> Tensors:
        return on_x.reshape(self.tensors[0].shape), on_g.reshape(self.tensors[1].shape)


class ScaleFactor(Factor):
    """dL/dw = sum G * U of an elementwise scale w: norms. U is what the scale multiplies.

    Args:
        u: Like g.
        g: Gradients by the output.
        axis: The axis that w runs along; the sum is over all others.
    """

    def __init__(self, u: Tensor, g: Tensor, *, axis: int):
        super().__init__(u, g)
        self.others = tuple(i for i in range(g.dim()) if i != axis % g.dim())
        self.along = [-1 if i == axis % g.dim() else 1 for i in range(g.dim())]

    def tangent(self, primes):
        """Return sum (G' U + G U')."""
        u, g = self.values
        return _summed(primes[1] * u + g * primes[0], self.others)

    def cotangent(self, theta):
        """Return G w' and U w'."""
        u, g = self.values
        theta = theta.view(self.along)
        return g * theta, u * theta


class SumFactor(Factor):
    """dL/db = sum G of a bias b along one axis of the output.

    Args:
        g: Gradients by the output.
        axis: The axis that b runs along.
    """

    def __init__(self, g: Tensor, *, axis: int):
        super().__init__(g)
        self.others = tuple(i for i in range(g.dim()) if i != axis % g.dim())
        self.along = [-1 if i == axis % g.dim() else 1 for i in range(g.dim())]

    def tangent(self, primes):
        """Return sum G'."""
        return _summed(primes[0], self.others)

    def cotangent(self, theta):
        """Return b' at every token."""
        return (theta.view(self.along).expand(self.values[0].shape),)


class RowFactor(Factor):
    """dL/dE of a table E whose rows are looked up by public indices: positions, token types.

    Args:
        index: (...) rows that were looked up; broadcasts over the leading axes of g.
        g: (..., D) gradients by the output.
        padding: A row that gets no gradient, or None.
        count: Rows of E.
    """

    def __init__(self, index: Tensor, g: Tensor, *, padding: int | None, count: int):
        super().__init__(g)
        self.index, self.count = index.expand(g.shape[:-1]).reshape(-1), count
        self.kept = torch.ones_like(self.index, dtype=g.dtype) if padding is None else (self.index != padding).to(g)

    def kept_rows(self, g: Tensor) -> Tensor:
        """Return g or its like as rows, those of the padding zero."""
        return rows(g) * self.kept[:, None]

    def tangent(self, primes):
        """Return the rows of G' added up by index."""
        g = self.kept_rows(primes[0])
        return g.new_zeros(self.count, g.shape[1]).index_add_(0, self.index, g)

    def cotangent(self, theta):
        """Return the rows of E' that were looked up."""
        return ((theta[self.index] * self.kept[:, None]).reshape(self.values[0].shape),)

    def gram(self, primes):
        """Return the sums over equal indices, without the table."""
        used, place = self.index.unique(return_inverse=True)
        g = self.kept_rows(primes[0])
        sums = g.new_zeros(len(used), g.shape[1]).index_add_(0, place, g)
        return ((sums[place] * self.kept[:, None]).reshape(self.values[0].shape),)


class TotalFactor(Factor):
    """The sum of several factors of one parameter that is used more than once.

    Linear maps add up to one map of all their rows, L^T R (layers that share weights), and products by tokens serve as
    they do for one. Beside them the same matrix may be a table that is looked up (tied to a head): rows of G summed by
    index i are O^T G with O marking the indices, and what the two have to do with one another needs no O either:
    L O^T = L[:, i].
    """

    def __init__(self, parts: Sequence[Factor]):
        super().__init__(*(t for part in parts for t in part.tensors))
        self.added = tuple(parts)
        self.maps = [i for i, part in enumerate(parts) if type(part) is LinearFactor]
        self.lookups = [i for i, part in enumerate(parts) if isinstance(part, RowFactor)]

    @property
    def parts(self):
        """The uses."""
        return self.added

    @property
    def by_tokens(self) -> bool:
        """Whether products of all rows serve, and are cheaper than those of the weight's size."""
        if len(self.maps) + len(self.lookups) < len(self.parts):
            return False
        maps = [self.parts[i] for i in self.maps]
        return not maps or positions_are_cheaper(sum(len(m.x) for m in maps), maps[0].x.shape[1], maps[0].g.shape[1])

    @cached_property
    def joined(self) -> LinearFactor:
        """The linear maps as one."""
        left, right = self._joined_sides([part.values for part in self.parts])
        return LinearFactor(right, left)

    def _joined_sides(self, tensors: Sequence[Tensors]) -> Tensors:
        left, right = zip(*(self.parts[i].sides(tensors[i]) for i in self.maps), strict=True)
        return torch.cat(left), torch.cat(right)

    def gram(self, primes):
        """Return the cotangent of the tangent, by products of rows where those are cheaper."""
        if not self.by_tokens:
            return super().gram(primes)
        split = self._split(primes)
        row_primes = {i: self.parts[i].kept_rows(split[i][0]) for i in self.lookups}
        on_rows = {i: self._among_lookups(i, row_primes) for i in self.lookups}
        found = {}
        if self.maps:
            left, right = self.joined.g, self.joined.x
            left_prime, right_prime = self._joined_sides(split)
            on_right, on_left = self.joined.gram((right_prime, left_prime))
            for i in self.lookups:
                index = self.parts[i].index
                marked = left[:, index]  # L O^T
                on_right = _plus(on_right, marked, row_primes[i])
                on_left = on_left.index_add(1, index, right @ row_primes[i].mT)
                on_rows[i] = _plus(on_rows[i] + left_prime[:, index].mT @ right, marked.mT, right_prime)
            sizes = [len(self.parts[i].x) for i in self.maps]
            for i, on_l, on_r in zip(self.maps, on_left.split(sizes), on_right.split(sizes), strict=True):
                found[i] = self.parts[i].from_sides(on_l, on_r)
        for i, rows_of in on_rows.items():
            found[i] = (self.parts[i].kept_rows(rows_of).reshape(self.parts[i].values[0].shape),)
        return tuple(c for i in range(len(self.parts)) for c in found[i])

    def _among_lookups(self, i: int, row_primes: dict[int, Tensor]) -> Tensor:
        """Return what the derivatives of all lookups add up to at the rows of one."""
        index = self.parts[i].index
        equal = lambda j: (index[:, None] == self.parts[j].index).to(row_primes[i])
        return sum(equal(j) @ row_primes[j] for j in self.lookups)

    def _split(self, primes: Tensors) -> list[Tensors]:
        sizes = [len(part.tensors) for part in self.parts]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return [primes[start : start + size] for start, size in zip(starts, sizes, strict=True)]

    def tangent(self, primes):
        """Return the sum of the tangents."""
        return sum(part.tangent(p) for part, p in zip(self.parts, self._split(primes), strict=True))

    def cotangent(self, theta):
        """Return all cotangents."""
        return tuple(c for part in self.parts for c in part.cotangent(theta))


def rows(tensor: Tensor) -> Tensor:
    """Return (..., d) as (n, d)."""
    return tensor.reshape(-1, tensor.shape[-1])


def _summed(tensor: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Return the sum over some axes, none included; torch takes none for all."""
    return tensor.sum(axes) if axes else tensor


def positions_are_cheaper(n: int, d_in: int, d_out: int) -> bool:
    """Return whether six products of n x n with n x d cost less than four of the size of a d_out x d_in weight."""
    return 3 * n * (d_in + d_out) < 4 * d_in * d_out


def _plus(base: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return base + left right, of matrices or of stacks of them."""
    return (torch.addmm if base.dim() == 2 else torch.baddbmm)(base, left, right)
