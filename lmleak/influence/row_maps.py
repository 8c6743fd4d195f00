"""x W^T for few rows and a large W: what products with J spend their time on.

torch's own matrix product (MKL on x86) is made for many rows. On two cores of an AMD EPYC, 32 rows by 768 x 3072
numbers take it 1.9 ms and oneDNN 1.1, 128 rows 5.1 and 3.3; of 128 x 128 numbers it is the quicker one. oneDNN is
asked by the operator that torch's compiler writes for linear layers; where torch lacks it, its own product serves.
"""

import torch
from torch import Tensor
from torch.autograd import Function

LARGE = 2**18  # numbers in W from which oneDNN pays; below, its call costs more than it saves


def rows_times(x: Tensor, weight: Tensor) -> Tensor:
    """Return x W^T.

    Args:
        x: (..., d_in).
        weight: W, (d_out, d_in), in any layout; or a stack of them beside one of x, as matrix products take it.

    Returns:
        (..., d_out).
    """
    here = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and weight.numel() >= LARGE
    plain = _is_batched(x) or _is_batched(weight) or torch.is_autocast_enabled("cpu")
    # oneDNN takes a thousand times as long for other layouts, and crashes on a stack.
    dense = weight.dim() == 2 and (weight.is_contiguous() or weight.mT.is_contiguous())
    if _HAS_ONEDNN and here and dense and not plain:
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return x @ weight.mT


_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
_is_batched = torch._C._functorch.is_batchedtensor  # by vmap: its rule for oneDNN's operator would cost what it saves


def row_map(x: Tensor, weight: Tensor) -> Tensor:
    """Return x W^T for a constant W, with a graph where one is built."""
    return RowMap.apply(x, weight) if torch.is_grad_enabled() else rows_times(x, weight)


class RowMap(Function):
    """x W^T as a function of x, (..., d_in): its derivative is the same map of W^T, and so on."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight):
        """Return x W^T."""
        return rows_times(x, weight)

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Keep W."""
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, g):
        """Return g W."""
        (weight,) = ctx.saved_tensors
        return row_map(g, weight.mT), None
