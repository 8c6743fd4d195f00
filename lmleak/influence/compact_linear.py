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
from torch.nn.modules.module import _global_forward_hooks

from lmleak.adapters.structure import is_linear
from lmleak.influence.compact import Recording
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
        Recording.note()
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
        (what ran, output) per ids of module and output; empty until the model runs.
    """
    found: dict[tuple[int, int], tuple[Call, Tensor]] = {}
    shared = {id(p) for p in theta.values()}

    def compact(own):
        def hook(module, arguments, keywords, output):
            if len(arguments) != 1 or keywords or _global_forward_hooks or not torch.is_grad_enabled():
                return None  # hooks of all modules ran before, and may have bent the gradient alone
            (x,) = arguments
            if not isinstance(x, Tensor) or not isinstance(output, Tensor) or not x.requires_grad:
                return None
            call = Call(module, own, x, output, (x._version, output._version))
            parameters = {key: p for key, p in module._parameters.items() if p is not None and p.requires_grad}
            lent = any(id(p) in shared and p is not theta.get(own.get(key)) for key, p in parameters.items())
            weight = linear_weight(call, theta)
            if weight is None or lent or not call.intact or not all(p.is_leaf for p in parameters.values()):
                return None
            y = Linear.apply(output.detach(), x, weight.detach(), *parameters.values())
            found[id(module), id(y)] = call, y
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
