"""A transpose's graph for the price of its structure: while it is built, its values are zero and share one memory."""

from typing import NoReturn

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from lmleak.errors import UnsupportedModelError

_OWN_MEMORY = ("empty", "zeros", "full", "clone", "to_copy")  # made to be written into


class SharedZeros(TorchDispatchMode):
    """While active, what an operation makes of shared zeros shares their memory, if it is zero.

    A linear map that automatic differentiation traces at zero so costs neither its arithmetic nor the memory of its
    values; what its graph saves of other tensors remains. All values that depend on the map's argument are zero, so
    that also an operation in place writes nothing but zeros. ``check`` says whether that was so.

    Args:
        like: Gives dtype and device of the zeros.
        numbers: How many are made at once; where more are needed, more are made.
    """

    def __init__(self, like: Tensor, numbers: int = 1):
        super().__init__()
        self.like = like
        self.buffers = [torch.zeros(numbers, dtype=like.dtype, device=like.device)]

    def zeros(self, shape: tuple[int, ...]) -> Tensor:
        """Return zeros of a shape, in the memory of all others."""
        numbers = torch.Size(shape).numel()
        if len(self.buffers[-1]) < numbers:
            self.buffers.append(torch.zeros(numbers, dtype=self.like.dtype, device=self.like.device))
        return self.buffers[-1][:numbers].view(shape)

    def check(self) -> None:
        """Raise UnsupportedModelError if something else than zeros was written."""
        if any(buffer.any() for buffer in self.buffers):
            self._refuse()

    @staticmethod
    def _refuse() -> NoReturn:
        raise UnsupportedModelError(
            "a derivative of this model is not linear in what it multiplies, so that its layers' factors cannot "
            "be traced; write implementation='autodiff'"
        )

    def _shares(self, value: object) -> bool:
        if not isinstance(value, Tensor) or value.layout != torch.strided or value._is_zerotensor():
            return False  # without memory to be shared
        pointers = [buffer.untyped_storage().data_ptr() for buffer in self.buffers]
        return value.untyped_storage().data_ptr() in pointers

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [self._shares(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        name = function.overloadpacket.__name__
        if name in ("add_", "sub_") and all(given):
            return args[0]  # adding zeros to zeros
        if name.endswith("_") and self._shares(args[0]) and torch.Tag.inplace_view not in function.tags:
            written = args[0].clone()  # zeros may lie on top of one another, which torch refuses to write into
            function(written, *args[1:], **kwargs)
            return self._refuse() if written.any() else args[0]
        if not any(given) or not _makes_new_tensors(function):
            return function(*args, **kwargs)
        if name in ("mm", "bmm"):
            left, right = args
            return self.zeros((*left.shape[:-1], right.shape[-1]))
        if name == "_linear_pointwise":  # of lmleak.influence.row_maps
            return self.zeros((*args[0].shape[:-1], len(args[1])))
        if name == "mul" and all(isinstance(t, Tensor) and t.dtype == self.like.dtype for t in args):
            return self.zeros(torch.broadcast_shapes(*(t.shape for t in args)))
        return tree_map(self._shared, function(*args, **kwargs))

    def _shared(self, value: object) -> object:
        """Return zeros in the common memory, and everything else as it is."""
        fits = isinstance(value, Tensor) and value.dtype == self.like.dtype and value.device == self.like.device
        return self.zeros(value.shape) if fits and value.dim() and not value.any() else value


def _makes_new_tensors(function) -> bool:
    """Whether an operation returns tensors of its own that nobody fills afterwards."""
    schema = function._schema
    aliased = schema.is_mutable or any(value.alias_info is not None for value in schema.returns)
    return not aliased and not any(part in schema.name for part in _OWN_MEMORY)
