"""LayerNorm and RMSNorm whose graphs of second derivatives hold a few tensors of the size of their input.

torch writes the second derivative of a LayerNorm as some thirty elementwise operations, and the weight's factor asks
for the normalised input u, a second LayerNorm. Here both read one node. Per token of D numbers, <a, b> their mean
product, P = I - 1 1^T / D for LayerNorm and I for RMSNorm, r = (<P x, P x> + epsilon)^(-1/2), Q = P - u u^T / D:

    u = r P x       g -> r Q g       h -> r Q h on g,  -r^2 (<u, g> Q h + q <u, h> + u <q, h>) on x,  q = Q g

Every one of these maps is symmetric. As in :mod:`lmleak.influence.compact`, the last is differentiated in h alone.
"""

from contextlib import contextmanager
from copy import copy

import torch
from torch import Tensor, nn
from torch.autograd import Function

from lmleak.adapters.structure import replaced_forward
from lmleak.influence.compact import Recording, chosen

PROBED = 16  # positions at which a module's derivatives are compared; its values are at all of them


class Normalised(Function):
    """u = r P x."""

    @staticmethod
    def forward(ctx, x, epsilon, centred):
        """Return u of x (..., D), centred for LayerNorm."""
        if centred:
            u, _, r = torch.native_layer_norm(x, x.shape[-1:], None, None, epsilon)
        else:
            r = (x.square().mean(-1, keepdim=True) + epsilon).rsqrt()
            u = x * r
        ctx.centred = centred
        ctx.save_for_backward(x, u, r)
        return u

    @staticmethod
    def backward(ctx, g):
        """Return r Q g."""
        Recording.note()
        return chosen(_Slope, _slope)(g, *ctx.saved_tensors, ctx.centred), None, None


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).mean(-1, keepdim=True)


def _projected(g: Tensor, u: Tensor, along: Tensor, centred: bool) -> Tensor:
    """Return Q g = P g - u <u, g>."""
    return torch.addcmul(g - g.mean(-1, keepdim=True) if centred else g, u, along, value=-1)


def _slope(g: Tensor, x: Tensor, u: Tensor, r: Tensor, centred: bool) -> Tensor:
    return _projected(g, u, _inner(u, g), centred) * r


class _Slope(Function):
    @staticmethod
    def forward(ctx, g, x, u, r, centred):
        along = _inner(u, g)
        q = _projected(g, u, along, centred)
        ctx.centred = centred
        ctx.save_for_backward(u, r, q, along)
        return q * r

    @staticmethod
    def backward(ctx, h):
        on_g, on_x = chosen(_Curvature, _curvature)(h, *ctx.saved_tensors, ctx.centred)
        return on_g, on_x, None, None, None


def _curvature(h: Tensor, u: Tensor, r: Tensor, q: Tensor, along: Tensor, centred: bool) -> tuple[Tensor, Tensor]:
    on_g = _projected(h, u, _inner(u, h), centred) * r
    return on_g, _bent(on_g * -along, h, u, r, q)


def _bent(start: Tensor, h: Tensor, u: Tensor, r: Tensor, q: Tensor) -> Tensor:
    """Return r start - r^2 (q <u, h> + u <q, h>)."""
    bent = torch.addcmul(start, q, _inner(u, h) * r, value=-1)
    return torch.addcmul(bent, u, _inner(q, h) * r, value=-1) * r


class _Curvature(Function):
    @staticmethod
    def forward(ctx, h, u, r, q, along, centred):
        ctx.centred = centred
        ctx.save_for_backward(u, r, q, along)
        return _curvature(h, u, r, q, along, centred)

    @staticmethod
    def backward(ctx, on_g, on_x):
        u, r, q, along = ctx.saved_tensors
        both = torch.addcmul(on_g, on_x, along * r, value=-1)  # what Q and r are common to
        start = _projected(both, u, _inner(u, both), ctx.centred)
        return _bent(start, on_x, u, r, q), None, None, None, None, None


@contextmanager
def compact_norms(model: nn.Module):
    """Run the norms of a model by ``Normalised``; their outputs are those of the modules up to rounding.

    A module that is no plain norm of its last axis, or that computes in another precision, runs as it is.

    Args:
        model: Whose norms are hooked for the time being.

    Yields:
        (output, u) per ids of module and output; empty until the model runs.
    """
    found: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def compact(module, arguments, keywords, output):
        if len(arguments) != 1 or keywords or not (arguments[0].requires_grad and torch.is_grad_enabled()):
            return None
        written = _written(module, arguments[0])
        if written is None or not _close(written[0], output, 64 * torch.finfo(output.dtype).eps):
            return None
        found[id(module), id(written[0])] = written
        return written[0]

    handles = [
        module.register_forward_hook(compact, with_kwargs=True, prepend=True)
        for module in model.modules()
        if _is_norm(module)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _is_norm(module: nn.Module) -> bool:
    """Return whether a module is a LayerNorm of the last axis, or is called as RMSNorms are."""
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 1 or weight.dtype not in (torch.float32, torch.float64):
        return False
    if replaced_forward(module) or module._modules or module._buffers:
        return False
    if type(module).forward is nn.LayerNorm.forward:
        return True
    named = type(module).__name__.endswith(("RMSNorm", "LayerNorm"))
    return named and module._parameters.keys() == {"weight"} and _epsilon(module) is not None


def _epsilon(module: nn.Module) -> float | None:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def _written(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the output as u w + b, and u; None where that is not what the module computes."""
    weight, bias = module.weight, module._parameters.get("bias")
    if x.dtype != weight.dtype or x.shape[-1] != len(weight):
        return None
    for shift in (0, 1):  # Gemma's norms store their weight less one
        if _is_affine(module, x, shift):
            u = _normalised(module, x)
            return _affine(u, weight + shift if shift else weight, bias), u
    return None


def _normalised(module: nn.Module, x: Tensor) -> Tensor:
    return Normalised.apply(x, _epsilon(module), isinstance(module, nn.LayerNorm))


def _affine(u: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    return u * gain if bias is None else torch.addcmul(bias, u, gain)


def _is_affine(module: nn.Module, x: Tensor, shift: int) -> bool:
    """Return whether value and derivatives are those of u (w + shift) + b, at random x, w and b."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda like: torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)
    probe = copy(module)
    drawn = {n: (1 + draw(p) / 4).requires_grad_() for n, p in module._parameters.items() if p is not None}
    probe.__dict__["_parameters"] = dict.fromkeys(module._parameters) | drawn
    if probe.weight is not drawn["weight"] or module.weight is not module._parameters["weight"]:
        return False  # a property stands before it
    x = x[..., :PROBED, :] if x.dim() > 1 else x
    scales = 10 ** (2 * torch.rand(x.shape[:-1], generator=generator, dtype=torch.float64) - 1)
    point, along = (draw(x) * scales[..., None].to(x)).requires_grad_(), draw(x)
    expected = _affine(_normalised(probe, point), probe.weight + shift, probe._parameters.get("bias"))
    eps = torch.finfo(x.dtype).eps
    returned = type(module).forward(probe, point)  # without the module's hooks
    if returned.shape != expected.shape or not _close(returned, expected, 64 * eps):
        return False
    leaves = [point, *drawn.values()]
    with Recording.interrupted():
        slopes = [torch.autograd.grad(y, leaves, along, allow_unused=True) for y in (returned, expected)]
    return all(a is not None and _close(a, b, 1e3 * eps) for a, b in zip(*slopes, strict=True))


def _close(a: Tensor, b: Tensor, tol: float) -> bool:
    """Return whether all tokens agree, relative to their norms."""
    return bool(((a - b).detach().norm(dim=-1) <= tol * b.detach().norm(dim=-1)).all())
