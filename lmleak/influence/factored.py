"""Products with J through token-sized factors: A v costs about one gradient, and holds no parameter-sized tensor.

Let F: x -> (X_l, G_l)_l be the factors of all layers' gradients (:mod:`lmleak.influence.factors`). Then

    J delta = DF^T c(delta)        J^T v = tangent(DF v)        A v = DF^T M DF v

with M acting layer by layer on token-sized tensors. DF^T c is one backward pass through the graph of F. DF v is one
backward pass through the graph of DF^T c as a linear function of c: the derivative of a transpose is the operator.
Both graphs are built once.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lmleak.adapters.precision import KeepDouble
from lmleak.adapters.structure import is_linear, replaced_forward
from lmleak.errors import DataError
from lmleak.influence.compact import compact_functions
from lmleak.influence.compact_norms import compact_norms
from lmleak.influence.convolutions import CONVOLUTIONS, KernelFactor, PatchFactor, convolution_factor
from lmleak.influence.factors import (
    Factor,
    LinearFactor,
    RowFactor,
    ScaleFactor,
    SumFactor,
    TotalFactor,
)
from lmleak.influence.products import BLOCK_SIZE, Loss, Products
from lmleak.influence.zeros import SharedZeros

# Where a block of products pays, as measured on one core (benchmarks/results/block_products.md): 5 of BERT-base at 32
# tokens and one at 128; 4 of ResNet-20 and one of ResNet-18, whose convolutions fill a core sooner.
BLOCK_NUMBERS, CONVOLUTION_WEIGHT = 2**25, 16


@dataclass
class Call:
    """One run of a module that owns shared parameters."""

    module: nn.Module
    names: dict[str, str]
    """Name in the model of each of the module's own parameters."""
    x: Tensor
    y: Tensor
    versions: tuple[int, int]
    """Of x and y when they were seen; what is changed in place later is no factor."""

    @property
    def intact(self) -> bool:
        """Whether neither tensor was changed in place since, nor the output's gradient by a hook."""
        return (self.x._version, self.y._version) == self.versions and not self.y._backward_hooks


class FactoredProducts(Products):
    """Products by factors where a layer's kind is known, by double backward for the other parameters.

    Known: ``nn.Linear``, the GPT-2 ``Conv1D``, ``nn.Conv1d`` to ``nn.Conv3d`` (grouped, dilated, any padding), norms
    (LayerNorm, RMSNorm, BatchNorm in evaluation mode), embeddings of public indices. A parameter of anything else
    (transposed convolutions, GroupNorm), or that is used outside its module, is listed in ``by_autodiff``.
    """

    def __init__(self, loss: Loss, theta: Mapping[str, Tensor], x: Tensor, model: nn.Module):
        self.x = x.detach().requires_grad_()
        self.theta = {n: p.detach().requires_grad_() for n, p in theta.items()}
        calls: list[Call] = []
        with recorded(model, self.theta, calls), compact_functions(model), compact_norms(model) as normalised:
            value = loss(self.theta, self.x)
        uses, reached = _edges(value, self.theta)
        makers = _makers([call for call in calls if call.y.grad_fn in reached], normalised)
        known = [n for n, found in makers.items() if len(found) == uses[n]]
        outputs = {id(call.y): call.y for n in known for call, _ in makers[n]}
        self.by_autodiff = tuple(n for n in self.theta if n not in known and uses.get(n, 0))
        leaves = [*outputs.values(), *(self.theta[n] for n in self.by_autodiff), self.x]
        *gradients, self.input_gradient = torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True)
        if self.input_gradient is None:
            raise DataError("the loss does not depend on x, so J is zero")
        by_output = dict(zip(outputs, gradients, strict=False))
        self.factors: dict[str, Factor] = {}
        for name in known:
            parts = [make(call, by_output[id(call.y)]) for call, make in makers[name]]
            self.factors[name] = parts[0] if len(parts) == 1 else TotalFactor(parts)
        rest = dict(zip(self.by_autodiff, gradients[len(outputs) :], strict=True))
        self.gradient = {n: g for n, g in rest.items() if g is not None and g.requires_grad}
        if not self.gradient and not self.factors:
            raise DataError("the loss does not depend on x and on the shared parameters together, so J is zero")
        self._linearise()
        self.block_size = min(BLOCK_SIZE, max(1, BLOCK_NUMBERS // max(1, self._held())))

    def _linearise(self) -> None:
        """Build the graph of DF^T c as a function of c, at c = 0.

        It is linear in c, and only its derivative in c is ever taken: its values are not needed.
        """
        found = {id(t): t for factor in self.factors.values() for t in factor.tensors if t.requires_grad}
        self.nodes = found  # tensors of the graph that move with x
        shared = SharedZeros(self.x.detach(), max((t.numel() for t in found.values()), default=1))
        self.probes = {key: shared.zeros(t.shape).requires_grad_() for key, t in found.items()}
        self.transpose = None
        if found:
            with shared:
                (self.transpose,) = torch.autograd.grad(
                    list(found.values()), self.x, list(self.probes.values()), create_graph=True, allow_unused=True
                )
            shared.check()

    def _held(self) -> int:
        """Return how many numbers a product holds at a time, weighted as ``block_size`` needs."""
        parts = [part for factor in self.factors.values() for part in factor.parts]
        convolutions = [part for part in parts if isinstance(part, (KernelFactor, PatchFactor))]
        more = {id(t) for factor in convolutions for t in factor.tensors}
        tangents = sum(t.numel() * (CONVOLUTION_WEIGHT if key in more else 1) for key, t in self.nodes.items())
        return tangents + sum(self.theta[n].numel() for n in self.by_autodiff)

    # DF and its transpose --------------------------------------------------------------------------------

    def _tangents(self, v: Tensor) -> dict[int, Tensor]:
        """Return DF v, one tensor per node."""
        if self.transpose is None:
            return {}
        values = torch.autograd.grad(
            self.transpose, list(self.probes.values()), v, retain_graph=True, allow_unused=True
        )
        return {
            key: torch.zeros_like(node) if value is None else value
            for (key, node), value in zip(self.nodes.items(), values, strict=True)
        }

    def _pull_back(self, cotangents: Mapping[int, Tensor], direct: Mapping[str, Tensor]) -> Tensor:
        """Return DF^T c plus, for the other parameters, d/dx <g, delta>."""
        heads = [self.nodes[key] for key in cotangents] + [self.gradient[n] for n in direct]
        if not heads:
            return torch.zeros_like(self.x)
        (product,) = torch.autograd.grad(
            heads, self.x, [*cotangents.values(), *direct.values()], retain_graph=True, allow_unused=True
        )
        return torch.zeros_like(self.x) if product is None else product

    def _primes(self, factor: Factor, tangents: Mapping[int, Tensor]) -> tuple[Tensor, ...]:
        return tuple(tangents[id(t)] if id(t) in tangents else torch.zeros_like(t) for t in factor.tensors)

    def _add(self, cotangents: dict[int, Tensor], factor: Factor, values: tuple[Tensor, ...]) -> None:
        for tensor, value in zip(factor.tensors, values, strict=True):
            key = id(tensor)
            if key in self.nodes:
                cotangents[key] = cotangents[key] + value if key in cotangents else value

    # Products --------------------------------------------------------------------------------------------

    def matvec(self, delta):
        """Return J delta: every layer's delta pulled back onto its factors, and one backward pass."""
        cotangents: dict[int, Tensor] = {}
        direct: dict[str, Tensor] = {}
        for name, value in delta.items():
            if name in self.factors:
                self._add(cotangents, self.factors[name], self.factors[name].cotangent(value))
            elif name in self.gradient:
                direct[name] = value
        return self._pull_back(cotangents, direct)

    def rmatvec(self, v, names):
        """Return J^T v: one pass for the tangents of all factors, and a product per layer."""
        tangents = self._tangents(v)
        direct = self._direct(v, [n for n in names if n in self.gradient])
        found = {}
        for name in names:
            if name in self.factors:
                factor = self.factors[name]
                found[name] = factor.tangent(self._primes(factor, tangents)).reshape(self.theta[name].shape)
            else:
                found[name] = direct.get(name, torch.zeros_like(self.theta[name]))
        return found

    def gram(self, v, names):
        """Return A v over the named parameters."""
        cotangents = self._pushed(self._tangents(v), names)
        return self._pull_back(cotangents, self._direct(v, [n for n in names if n in self.gradient]))

    def _pushed(self, tangents: dict[int, Tensor], names: tuple[str, ...]) -> dict[int, Tensor]:
        """Return M DF v; every tangent leaves the dictionary after its last use."""
        cotangents: dict[int, Tensor] = {}
        factors = [self.factors[name] for name in names if name in self.factors]
        uses = Counter(id(t) for factor in factors for t in factor.tensors)
        for factor in factors:
            self._add(cotangents, factor, factor.gram(self._primes(factor, tangents)))
            for key in map(id, factor.tensors):
                uses[key] -= 1
                if not uses[key]:
                    tangents.pop(key, None)
        return cotangents

    def _direct(self, v: Tensor, names: list[str]) -> dict[str, Tensor]:
        """Return J^T v for parameters without factors."""
        if not names:
            return {}
        leaves = [self.theta[n] for n in names]
        values = torch.autograd.grad(self.input_gradient, leaves, v, retain_graph=True, allow_unused=True)
        return {n: torch.zeros_like(self.theta[n]) if p is None else p for n, p in zip(names, values, strict=True)}


# Which modules ran, and what their parameters' factors are -----------------------------------------------------


@contextmanager
def recorded(model: nn.Module, theta: Mapping[str, Tensor], calls: list[Call]):
    """Record every run of a module that owns some of theta."""
    names = {id(p): n for n, p in model.named_parameters() if n in theta}

    def record(module, own):
        def hook(module, arguments, keywords, output):
            inputs = [value for value in (*arguments, *keywords.values()) if value is not None]
            if len(inputs) != 1 or not isinstance(inputs[0], Tensor) or not isinstance(output, Tensor):
                return
            # Not where the module was lent other weights for this call, or a property stands before them.
            used = {key: name for key, name in own.items() if getattr(module, key) is theta[name]}
            calls.append(Call(module, used, inputs[0], output, (inputs[0]._version, output._version)))

        return hook

    handles = []
    for module in model.modules():
        own = {key: names[id(p)] for key, p in module._parameters.items() if p is not None and id(p) in names}
        if own:
            # Before other hooks, which may replace what the module returned.
            handles.append(module.register_forward_hook(record(module, own), with_kwargs=True, prepend=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


Maker = Callable[[Call, Tensor], Factor]


def _makers(calls: list[Call], normalised: Mapping[int, tuple[Tensor, Tensor]]) -> dict[str, list[tuple[Call, Maker]]]:
    """Return per parameter its uses of a known kind, and how each becomes a factor."""
    found: dict[str, list[tuple[Call, Maker]]] = {}
    for call in calls:
        if id(call.y) in normalised and call.intact:
            kinds = _scaled(normalised[id(call.y)][1], axis=-1)
        else:
            kinds = _kinds(call) if call.intact else {}
        for key, name in call.names.items():
            if key in kinds:
                found.setdefault(name, []).append((call, kinds[key]))
    return found


def _kinds(call: Call) -> dict[str, Maker]:
    """Return how the parameters of a module become factors, by their names in the module."""
    module = call.module
    forward = type(module).forward
    if replaced_forward(module):
        return {}
    if is_linear(module) and forward in (nn.Linear.forward, Conv1D.forward):
        transposed = not isinstance(module, nn.Linear)
        return {
            "weight": lambda call, g: LinearFactor(call.x, g, transposed=transposed),
            "bias": lambda call, g: SumFactor(g, axis=-1),
        }
    plain = [(kind.forward, kind._conv_forward) for kind in CONVOLUTIONS]
    if (forward, getattr(type(module), "_conv_forward", None)) in plain and call.x.dim() == module.weight.dim():
        return {
            "weight": lambda call, g: convolution_factor(module, call.x, g),
            "bias": lambda call, g: SumFactor(g, axis=1),
        }
    plain_lookup = forward is nn.Embedding.forward and module.max_norm is None and not module.scale_grad_by_freq
    if plain_lookup and (module.padding_idx is None or module.padding_idx >= 0):
        return {
            "weight": lambda call, g: RowFactor(call.x, g, padding=module.padding_idx, count=module.num_embeddings)
        }
    return _norm_kinds(call)


def _norm_kinds(call: Call) -> dict[str, Maker]:
    """Return the factors of a norm y = u(x) w + b, found by replacing w and b; nothing if the module is none.

    At random w and b the module must give what u, taken at ones, says: w may enter in another way, or along another
    axis as long as all its entries are equal.
    """
    module, weight = call.module, call.module._parameters.get("weight")
    if weight is None or weight.dim() != 1 or set(call.names) - {"weight", "bias"}:
        return {}
    axis = 1 if isinstance(module, nn.modules.batchnorm._BatchNorm) else -1
    if call.y.shape != call.x.shape or call.y.shape[axis] != len(weight) or isinstance(module, nn.Embedding):
        return {}
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
        return {}
    bias = module._parameters.get("bias")
    zeros = {"weight": torch.zeros_like(weight)} | ({} if bias is None else {"bias": torch.zeros_like(bias)})
    ones = zeros | {"weight": torch.ones_like(weight)}

    def run(parameters):
        with KeepDouble() if weight.dtype == torch.float64 else nullcontext():
            return torch.func.functional_call(module, parameters, (call.x,))

    at_zero = run(zeros)
    if not at_zero.any():  # the usual y = u w + b, not u (1 + w) + b: nothing to differentiate
        at_zero = at_zero.detach()
    u = run(ones) - at_zero
    along = [-1 if i == axis % u.dim() else 1 for i in range(u.dim())]
    others = [i for i in range(u.dim()) if i != axis % u.dim()]
    close = lambda a, b, tol: bool((a - b).norm() <= tol * torch.finfo(u.dtype).eps * b.norm())
    with torch.no_grad():  # the output was that of this module alone, without hooks or settings of the call
        written = at_zero + u * weight.view(along) + (0 if bias is None else bias.view(along))
        if not close(written, call.y, 1e3):
            return {}
    generator = torch.Generator().manual_seed(0)
    draw = lambda like: torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)
    drawn = {n: draw(z).requires_grad_() for n, z in zeros.items()}
    returned, cotangent = run(drawn), draw(u)
    written = at_zero + u * drawn["weight"].view(along) + (drawn["bias"].view(along) if "bias" in drawn else 0)
    slope = torch.autograd.grad(returned, drawn["weight"], cotangent, retain_graph=True, allow_unused=True)[0]
    expected = (u * cotangent).sum(others) if others else u * cotangent
    if (
        slope is None
        or not close(returned.detach(), written.detach(), 1e2)
        or not close(slope, expected.detach(), 1e3)
    ):
        return {}  # a module that only looks like a norm; double backward serves
    return _scaled(u, axis)


def _scaled(u: Tensor, axis: int) -> dict[str, Maker]:
    """Return the factors of y = u w + b."""
    return {
        "weight": lambda call, g: ScaleFactor(u, g, axis=axis),
        "bias": lambda call, g: SumFactor(g, axis=axis),
    }


def _edges(value: Tensor, theta: Mapping[str, Tensor]) -> tuple[dict[str, int], set]:
    """Return how often each parameter enters the graph of a value, and the graph's nodes."""
    names = {id(p): n for n, p in theta.items()}
    counts: dict[str, int] = {}
    seen, stack = set(), [value.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for following, _ in node.next_functions:
            variable = getattr(following, "variable", None)
            if variable is not None and id(variable) in names:
                counts[names[id(variable)]] = counts.get(names[id(variable)], 0) + 1
            stack.append(following)
    return counts, seen
