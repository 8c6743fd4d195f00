"""Linear layers whose graphs of second derivatives hold nothing but their weights, and map rows quickly.

    y = x W^T + b       g -> g W       h -> h W^T        in x, for constant W and b

torch's graph of the same layer keeps x for the gradient of W, which the factors (:mod:`lmleak.influence.factors`) make
without it. Here W and b stay in the graph, where recognition finds them, and have no gradient: whoever asks for it
must have the layer run plainly.
"""

from collections.abc import Collection, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd import Function

from lmleak.adapters.structure import is_linear
from lmleak.influence.recognition import Call, linear_weight, owners
from lmleak.influence.row_maps import row_map


class Linear(Function):
    """y of a linear layer, that of the layer itself; its derivatives in x."""

    @staticmethod
    def forward(ctx, y, x, weight, *own):
        """Return y.

        Args:
            ctx: The node.
            y: (..., d_out) what the layer made of x, without its graph.
            x: (..., d_in).
            weight: W, (d_out, d_in), without a graph.
            own: The parameters that the node is to show in the graph.
        """
        ctx.save_for_backward(weight)
        ctx.own = len(own)
        return y.clone()

    @staticmethod
    def backward(ctx, g):
        """Return g W, and nothing for the parameters."""
        (weight,) = ctx.saved_tensors
        return None, row_map(g, weight.mT), None, *([None] * ctx.own)


@contextmanager
def compact_linears(model: nn.Module, theta: Mapping[str, Tensor], plain: Collection[nn.Module]):
    """Run the linear layers of a model by ``Linear``; values stay as they are.

    Args:
        model: Whose linear layers are hooked for the time being.
        theta: Shared parameters by name.
        plain: Layers that are left as they are.

    Yields:
        (what ran, output) per id of an output; empty until the model runs.
    """
    found: dict[int, tuple[Call, Tensor]] = {}

    def compact(own):
        def hook(module, arguments, keywords, output):
            if len(arguments) != 1 or keywords or not torch.is_grad_enabled():
                return None
            (x,) = arguments
            if not isinstance(x, Tensor) or not isinstance(output, Tensor) or not x.requires_grad:
                return None
            call = Call(module, own, x, output, (x._version, output._version))
            weight = linear_weight(call)
            parameters = [p for p in module._parameters.values() if p is not None and p.requires_grad]
            alone = call.intact and all(p.is_leaf for p in parameters) and call.inside(theta) is not None
            if weight is None or not alone:
                return None
            y = Linear.apply(output.detach(), x, weight.detach(), *parameters)
            found[id(y)] = call, y
            return y

        return hook

    handles = [
        module.register_forward_hook(compact(own), with_kwargs=True, prepend=True)
        for module, own in owners(model, theta)
        if is_linear(module) and module not in plain
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
