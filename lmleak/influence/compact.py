"""Activations and cross-entropy whose graphs of second derivatives hold little.

torch writes the second derivative of a GELU as a dozen elementwise products and keeps a tensor for each; that of
cross-entropy keeps five tensors of the size of the logits. With f', f'' and the softmax p known, little is needed:

    y = f(x)        g -> g f'               h -> (h f', h g f'')         in x and g, for h on g f'
    -log p_t        g -> g w (p - e_t)      h -> g w (p h - p (p . h))   in the logits, for h on the gradient

The last maps are linear in h, and their graph is differentiated in h alone (:mod:`lmleak.influence.factored`): how
they move with x, a third derivative of the loss, is not kept. So these serve the products with J and nothing else.
Norms are in :mod:`lmleak.influence.compact_norms`.
"""

from collections.abc import Callable
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lmleak.adapters.structure import replaced_forward


class Recording:
    """The time in which a model runs for its graph.

    A model that takes derivatives on its own meanwhile (energies, penalties, inner steps) needs all of its graphs:
    compact ones know the products with J alone.
    """

    current: ClassVar["Recording | None"] = None

    def __init__(self):
        self.derived = False
        """Whether a compact node was differentiated meanwhile."""

    @classmethod
    @contextmanager
    def begun(cls):
        """Yield a recording that lasts as long as the context."""
        with cls._being(cls()) as run:
            yield run

    @classmethod
    def interrupted(cls):
        """Return a context whose derivatives are not the model's own."""
        return cls._being(None)

    @classmethod
    @contextmanager
    def _being(cls, run):
        before, cls.current = cls.current, run
        try:
            yield run
        finally:
            cls.current = before

    @classmethod
    def note(cls) -> None:
        """Say that a compact node is differentiated."""
        if cls.current is not None:
            cls.current.derived = True


ELEMENTWISE = ("torch.nn.modules.activation", "transformers.activations")  # where smooth activations are defined


class Elementwise(Function):
    """y = f(x), with f' and f'' given as tensors like x."""

    @staticmethod
    def forward(ctx, x, y, first, second):
        """Return y."""
        ctx.save_for_backward(x, first, second)
        return y.clone()

    @staticmethod
    def backward(ctx, g):
        """Return g f'."""
        Recording.note()
        return chosen(_Slope, _slope)(g, *ctx.saved_tensors), None, None, None


def chosen(function: type[Function], plain: Callable) -> Callable:
    """Return the function where a graph is built, else the plain operations, which vmap knows as well."""
    return function.apply if torch.is_grad_enabled() else plain


def _slope(g: Tensor, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return g * first


class _Slope(Function):
    @staticmethod
    def forward(ctx, g, x, first, second):
        ctx.save_for_backward(g, first, second)
        return _slope(g, x, first, second)

    @staticmethod
    def backward(ctx, h):
        g, first, second = ctx.saved_tensors
        return *chosen(_Curvature, _curvature)(h, g.detach(), first, second), None, None


def _curvature(h: Tensor, g: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    return h * first, h * g * second


class _Curvature(Function):
    @staticmethod
    def forward(ctx, h, g, first, second):
        ctx.save_for_backward(g, first, second)
        return _curvature(h, g, first, second)

    @staticmethod
    def backward(ctx, on_g, on_x):
        g, first, second = ctx.saved_tensors
        return torch.addcmul(on_g * first, on_x * g, second), None, None, None


class CrossEntropy(Function):
    """sum_i w_i (-log softmax(logits_i)[t_i])."""

    @staticmethod
    def forward(ctx, logits, targets, weight):
        """Return the loss of logits (n, C), targets (n,) within C and weights (n,)."""
        logs = logits.log_softmax(-1)
        picked = logs.gather(1, targets[:, None]).squeeze(1)
        ctx.save_for_backward(logits, logs.exp_(), targets, weight)
        return -(picked * weight).sum()

    @staticmethod
    def backward(ctx, g):
        """Return g w (p - e_t)."""
        Recording.note()
        logits, p, targets, weight = ctx.saved_tensors
        return chosen(_Residual, _residual)(g, logits, p, targets, weight), None, None


def _residual(g: Tensor, logits: Tensor, p: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    scale = (g * weight)[:, None]
    return (p * scale).scatter_add(1, targets[:, None], -scale)


class _Residual(Function):
    @staticmethod
    def forward(ctx, g, logits, p, targets, weight):
        ctx.save_for_backward(g, p, targets, weight)
        return _residual(g, logits, p, targets, weight)

    @staticmethod
    def backward(ctx, h):
        g, p, targets, weight = ctx.saved_tensors
        on_g = None
        if ctx.needs_input_grad[0]:
            on_g = (weight * ((p * h).sum(1) - h.gather(1, targets[:, None]).squeeze(1))).sum()
        on_logits = chosen(_Fisher, _fisher)(h, p, (g * weight).detach()[:, None])
        return on_g, on_logits, None, None, None


def _fisher(h: Tensor, p: Tensor, scale: Tensor) -> Tensor:
    """Return w (diag(p) - p p^T) h, row by row: a symmetric map."""
    product = p * h
    return torch.addcmul(product, p, product.sum(1, keepdim=True), value=-1) * scale


class _Fisher(Function):
    @staticmethod
    def forward(ctx, h, p, scale):
        ctx.save_for_backward(p, scale)
        return _fisher(h, p, scale)

    @staticmethod
    def backward(ctx, k):
        return _fisher(k, *ctx.saved_tensors), None, None


class _Losses(TorchFunctionMode):
    """Puts ``CrossEntropy`` in the place of plain cross-entropy calls with class indices."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        older = kwargs.get("size_average") is not None or kwargs.get("reduce") is not None
        plain = kwargs.get("weight") is None and not kwargs.get("label_smoothing") and not older
        if function is F.cross_entropy and len(args) == 2 and plain:
            logits, targets = args
            reduction, ignored = kwargs.get("reduction", "mean"), kwargs.get("ignore_index", -100)
            indices = targets.dim() == 1 and not targets.is_floating_point()
            if logits.dim() == 2 and indices and reduction in ("mean", "sum") and logits.requires_grad:
                targets = targets.long()  # torch takes bytes as well
                valid = targets != ignored
                weight = valid.to(logits.dtype) / (valid.sum() if reduction == "mean" else 1)
                return CrossEntropy.apply(logits, targets.where(valid, 0), weight)
        return function(*args, **kwargs)


@contextmanager
def compact_functions(model: nn.Module):
    """Run the smooth activations of a model, and cross-entropy, by the functions above; values stay as they are.

    Args:
        model: Whose activation modules are hooked for the time being.

    Yields:
        Nothing.
    """

    def compact(module, arguments, output):
        if len(arguments) != 1 or not (arguments[0].requires_grad and torch.is_grad_enabled()):
            return None
        y, first, second = _derivatives(module, arguments[0].detach())
        return Elementwise.apply(arguments[0], y, first, second) if torch.equal(y, output) else None

    handles = [module.register_forward_hook(compact, prepend=True) for module in model.modules() if _smooth(module)]
    try:
        with _Losses():
            yield
    finally:
        for handle in handles:
            handle.remove()


def _smooth(module: nn.Module) -> bool:
    """Return whether a module is a GELU or SiLU of torch or transformers, and leaves its input as it was."""
    kind = type(module)
    if getattr(module, "inplace", False) or replaced_forward(module):
        return False
    return kind.__module__ in ELEMENTWISE and any(name in kind.__name__.upper() for name in ("GELU", "SILU"))


def _derivatives(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return f, f' and f'' at x."""
    with torch.enable_grad():
        x = x.requires_grad_()
        y = type(module).forward(module, x)
        (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
    return y.detach(), first.detach(), second
