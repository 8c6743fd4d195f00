"""Which modules ran in a loss, and what the gradients of their parameters are made of.

A factor is only given for what a module alone made of its own weights: checked by the function that ran, by the graph
from its input to its output, by values and by derivatives, never by names. Everything else is left to double backward.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lmleak.adapters.precision import KeepDouble
from lmleak.adapters.structure import is_linear, replaced_forward
from lmleak.influence.convolutions import CONVOLUTIONS, convolution_factor
from lmleak.influence.factors import Factor, LinearFactor, RowFactor, ScaleFactor, SumFactor

Parents = dict[Node, list[tuple[Node, int]]]
"""Per node of a graph, who uses which of its outputs."""
LINEAR = (nn.Linear.forward, Conv1D.forward)
_MATRIX = ("Addmm", "Mm", "Mv", "Addmv", "Dot", "Bmm", "Baddbmm", "Add", "Linear")
_SHAPE = ("T", "Transpose", "Permute", "View", "UnsafeView", "ReshapeAlias", "Expand", "Squeeze", "Unsqueeze", "Clone")
LINEAR_NODES = {f"{kind}Backward{number}" for kind in _MATRIX + _SHAPE for number in (0, 1)}
"""What F.linear makes a graph of, whatever the axes; a hook that bends the gradient adds other nodes."""
PLAIN_CONVOLUTIONS = [(kind.forward, kind._conv_forward) for kind in CONVOLUTIONS]


def close(a: Tensor, b: Tensor, roundings: float) -> bool:
    """Return whether two tensors agree to so many roundings of their norm."""
    return bool((a - b).norm() <= roundings * torch.finfo(b.dtype).eps * b.norm())


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
        hooked = self.y._backward_hooks or self.module._is_full_backward_hook is False  # the latter: deprecated hooks
        return (self.x._version, self.y._version) == self.versions and not hooked

    @property
    def has_one_precision(self) -> bool:
        """Whether input, output and parameters are of one dtype; indices aside."""
        tensors = (self.x, self.y, *self.module._parameters.values())
        return len({t.dtype for t in tensors if t is not None and (t.is_floating_point() or t.is_complex())}) <= 1

    def gives(self, known: Callable[[], Tensor]) -> bool:
        """Whether the output is that of the function that a factor assumes, without hooks and replaced methods."""
        with torch.no_grad():
            return close(self.y, known(), 1e3)

    def is_linear_in(self, weight: Tensor, bias: Tensor | None) -> bool:
        """Whether y = x W^T + b, by a random r: y r = x (W^T r) + b r, without the cost of the product (Freivalds)."""
        r = torch.randn(len(weight), generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(weight)
        with torch.no_grad():
            along = F.linear(self.x, (r @ weight)[None], None if bias is None else (bias @ r)[None])
            return close((self.y @ r)[..., None], along, 1e3)

    def inside(self, theta: Mapping[str, Tensor]) -> set | None:
        """Return the nodes that lead to the output, if they begin at the input and at own parameters, each used once.

        None if they begin anywhere else as well.
        """
        uses = dict.fromkeys((id(theta[name]) for name in self.names.values()), 0)
        unshared = {id(p) for p in self.module._parameters.values()}
        seen, stack, entered = {self.y.grad_fn}, [self.y.grad_fn], False
        while stack:
            node = stack.pop()
            for following, _ in node.next_functions:
                variable = getattr(following, "variable", None)
                if variable is not None and id(variable) in uses:
                    uses[id(variable)] += 1
                elif following is not None and (following is self.x.grad_fn or variable is self.x):
                    entered = True
                elif variable is not None:
                    if id(variable) not in unshared:
                        return None
                elif following is not None and following not in seen:
                    seen.add(following)
                    stack.append(following)
        return seen if entered == self.x.requires_grad and all(count == 1 for count in uses.values()) else None

    def made_alone(self, theta: Mapping[str, Tensor], parents: Parents) -> bool:
        """Whether the output is made of the input and own parameters alone, and nothing but it goes to others."""
        inside = self.inside(theta)
        if inside is None:
            return False
        leaving = {(node, number) for node in inside for user, number in parents[node] if user not in inside}
        return leaving <= {(self.y.grad_fn, self.y.output_nr)}


def owners(model: nn.Module, theta: Mapping[str, Tensor]) -> Iterator[tuple[nn.Module, dict[str, str]]]:
    """Yield every module with the names in the model of those of its own parameters that are in theta."""
    names = {id(p): n for n, p in model.named_parameters() if n in theta}
    for module in model.modules():
        yield module, {key: names[id(p)] for key, p in module._parameters.items() if p is not None and id(p) in names}


@contextmanager
def recorded(model: nn.Module, theta: Mapping[str, Tensor], calls: list[Call]):
    """Record every run of a module that owns some of theta."""

    def record(own):
        def hook(module, arguments, keywords, output):
            inputs = [value for value in (*arguments, *keywords.values()) if value is not None]
            if len(inputs) != 1 or not isinstance(inputs[0], Tensor) or not isinstance(output, Tensor):
                return
            # Not where the module was lent other weights for this call, or a property stands before them.
            used = {key: name for key, name in own.items() if getattr(module, key) is theta[name]}
            calls.append(Call(module, used, inputs[0], output, (inputs[0]._version, output._version)))

        return hook

    handles = [  # before other hooks, which may replace what the module returned
        module.register_forward_hook(record(own), with_kwargs=True, prepend=True)
        for module, own in owners(model, theta)
        if own
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


Maker = Callable[[Call, Tensor], Factor]


def makers_of(
    calls: list[Call],
    theta: Mapping[str, Tensor],
    parents: Parents,
    normalised: Mapping[tuple[int, int], tuple[Tensor, Tensor]],
    linear: Collection[tuple[int, int]],
) -> dict[str, list[tuple[Call, Maker]]]:
    """Return per parameter its uses of a known kind, and how each becomes a factor.

    Args:
        calls: What ran.
        theta: Shared parameters by name.
        parents: Of the loss's graph.
        normalised: (output, u) per ids of a compact norm and its output.
        linear: Ids of compact linear layers and their outputs.
    """
    found: dict[str, list[tuple[Call, Maker]]] = {}
    for call in calls:
        if call.y.grad_fn not in parents or not call.intact or not call.made_alone(theta, parents):
            continue
        ran = id(call.module), id(call.y)
        written = normalised.get(ran)
        if ran in linear:
            kinds = _mapped(call.module)
        else:
            kinds = _kinds(call, theta) if written is None else _scaled(written[1], axis=-1)
        for key, name in call.names.items():
            if key in kinds:
                found.setdefault(name, []).append((call, kinds[key]))
    return found


def linear_weight(call: Call, theta: Mapping[str, Tensor]) -> Tensor | None:
    """Return W (d_out, d_in) if the call gave y = x W^T + b of its module's own W and b, None if it did not."""
    module, own = call.module, call.module._parameters
    if not is_linear(module) or type(module).forward not in LINEAR or not own.keys() >= {"weight", "bias"}:
        return None  # the last where one of them is computed of other parameters
    if replaced_forward(module) or not call.has_one_precision or own["weight"].is_complex():
        return None
    nodes = call.inside(theta)
    if nodes is None or any(node.name() not in LINEAR_NODES for node in nodes):
        return None
    weight = own["weight"] if isinstance(module, nn.Linear) else own["weight"].T
    return weight if call.is_linear_in(weight, own["bias"]) else None


def _mapped(module: nn.Module) -> dict[str, Maker]:
    """Return the factors of y = x W^T + b."""
    return {
        "weight": lambda call, g: LinearFactor(call.x, g, transposed=not isinstance(module, nn.Linear)),
        "bias": lambda call, g: SumFactor(g, axis=-1),
    }


def _kinds(call: Call, theta: Mapping[str, Tensor]) -> dict[str, Maker]:
    """Return how the parameters of a module become factors, by their names in the module."""
    module = call.module
    forward = type(module).forward
    own = module._parameters
    if replaced_forward(module) or not call.has_one_precision:
        return {}
    if is_linear(module) and forward in LINEAR:
        return {} if linear_weight(call, theta) is None else _mapped(module)
    convolve = getattr(type(module), "_conv_forward", None)
    if (forward, convolve) in PLAIN_CONVOLUTIONS and call.x.dim() == own["weight"].dim():
        if not call.gives(lambda: convolve(module, call.x, own["weight"], own["bias"])):
            return {}
        return {
            "weight": lambda call, g: convolution_factor(module, call.x, g),
            "bias": lambda call, g: SumFactor(g, axis=1),
        }
    plain_lookup = forward is nn.Embedding.forward and module.max_norm is None and not module.scale_grad_by_freq
    if plain_lookup and (module.padding_idx is None or module.padding_idx >= 0):
        if not call.gives(lambda: F.embedding(call.x, own["weight"])):
            return {}
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
            return torch.func.functional_call(module, parameters, (call.x.clone(),))  # some write into it

    at_zero = run(zeros)
    if not at_zero.any():  # the usual y = u w + b, not u (1 + w) + b: nothing to differentiate
        at_zero = at_zero.detach()
    u = run(ones) - at_zero
    along = [-1 if i == axis % u.dim() else 1 for i in range(u.dim())]
    write = lambda w, b: at_zero + u * w.view(along) + (0 if b is None else b.view(along))
    if not close(write(weight, bias), call.y, 1e3):
        return {}  # hooks or settings of the call had a part in the output
    generator = torch.Generator().manual_seed(0)
    draw = lambda like: torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)
    drawn = {n: draw(z).requires_grad_() for n, z in zeros.items()}
    returned, expected, cotangent = run(drawn), write(drawn["weight"], drawn.get("bias")), draw(u)
    leaves = list(drawn.values())
    slopes = [
        torch.autograd.grad(y, leaves, cotangent, retain_graph=True, allow_unused=True) for y in (returned, expected)
    ]
    same = all(a is not None and close(a, b, 1e3) for a, b in zip(*slopes, strict=True))
    if not same or not close(returned, expected, 1e2):
        return {}  # a module that only looks like a norm; double backward serves
    return _scaled(u, axis)


def _scaled(u: Tensor, axis: int) -> dict[str, Maker]:
    """Return the factors of y = u w + b."""
    return {
        "weight": lambda call, g: ScaleFactor(u, g, axis=axis),
        "bias": lambda call, g: SumFactor(g, axis=axis),
    }


def edges_of(value: Tensor, theta: Mapping[str, Tensor]) -> tuple[dict[str, int], Parents]:
    """Return how often each parameter enters the graph of a value, and who uses which output of each of its nodes."""
    names = {id(p): n for n, p in theta.items()}
    counts: dict[str, int] = {}
    if value.grad_fn is None:
        return counts, {}
    parents: Parents = {value.grad_fn: []}
    stack = [value.grad_fn]
    while stack:
        node = stack.pop()
        for following, number in node.next_functions:
            variable = getattr(following, "variable", None)
            if variable is not None and id(variable) in names:
                counts[names[id(variable)]] = counts.get(names[id(variable)], 0) + 1
            if following is None:
                continue
            if following not in parents:
                parents[following] = []
                stack.append(following)
            parents[following].append((node, number))
    return counts, parents
