"""Products with J through token-sized factors: A v costs about one gradient, and holds no parameter-sized tensor.

Let F: x -> (X_l, G_l)_l be the factors of all layers' gradients (:mod:`lmleak.influence.factors`). Then

    J delta = DF^T c(delta)        J^T v = tangent(DF v)        A v = DF^T M DF v

with M acting layer by layer on token-sized tensors. DF^T c is one backward pass through the graph of F. DF v is one
backward pass through the graph of DF^T c as a linear function of c: the derivative of a transpose is the operator.
Both graphs are built once.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from lmleak.errors import DataError
from lmleak.influence.compact import Recording, compact_functions
from lmleak.influence.compact_linear import compact_linears
from lmleak.influence.compact_norms import compact_norms
from lmleak.influence.convolutions import KernelFactor, PatchFactor
from lmleak.influence.factors import Factor, TotalFactor
from lmleak.influence.products import BLOCK_SIZE, Loss, Products
from lmleak.influence.recognition import Call, Maker, edges_of, makers_of, recorded
from lmleak.influence.zeros import SharedZeros

# Where a block of products pays, as measured on one core (benchmarks/results/block_products.md): 5 of BERT-base at 32
# tokens and one at 128; 4 of ResNet-20 and one of ResNet-18, whose convolutions fill a core sooner.
BLOCK_NUMBERS, CONVOLUTION_WEIGHT = 2**25, 16


@contextmanager
def compact_graphs(model: nn.Module, theta: Mapping[str, Tensor], plain: Collection[nn.Module]):
    """Run a model with compact graphs.

    Args:
        model: The model.
        theta: Shared parameters by name.
        plain: Linear layers that are left as they are.

    Yields:
        The recording, and what ``compact_norms`` and ``compact_linears`` found.
    """
    norms, linears = compact_norms(model), compact_linears(model, theta, plain)
    with Recording.begun() as run, compact_functions(model), norms as normalised, linears as linear:
        yield run, normalised, linear


class FactoredProducts(Products):
    """Products by factors where a layer's kind is known, by double backward for the other parameters.

    Known: ``nn.Linear``, the GPT-2 ``Conv1D``, ``nn.Conv1d`` to ``nn.Conv3d`` (grouped, dilated, any padding), norms
    (LayerNorm, RMSNorm, BatchNorm in evaluation mode), embeddings of public indices. A parameter of anything else
    (transposed convolutions, GroupNorm), that is used outside its module, or whose module's output is changed in place
    afterwards (as in the residual sums of a ResNet), is listed in ``by_autodiff``.
    """

    def __init__(self, loss: Loss, theta: Mapping[str, Tensor], x: Tensor, model: nn.Module):
        self.x = x.detach().requires_grad_()
        self.theta = {n: p.detach().requires_grad_() for n, p in theta.items()}
        try:
            self._build(loss, model, compact=True)
            return
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            pass  # of what compact graphs cannot do, checkpoints for one; otherwise it comes again
        self._build(loss, model, compact=False)

    def _build(self, loss: Loss, model: nn.Module, *, compact: bool) -> None:
        """Run the model and make factors, gradients and the graph of DF^T c."""
        value, uses, makers = self._run(loss, model, compact)
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

    def _run(
        self, loss: Loss, model: nn.Module, compact: bool
    ) -> tuple[Tensor, dict[str, int], dict[str, list[tuple[Call, Maker]]]]:
        """Return the loss, how often each parameter enters its graph, and the uses of a known kind.

        Compact linear layers have no gradients of their parameters in the graph. Where one is needed, since another
        use of it is of no known kind, the model runs once more with those layers as they are; and with all as they
        are where it takes derivatives on its own.
        """
        plain: list[nn.Module] = []
        while True:
            calls: list[Call] = []
            graphs = compact_graphs(model, self.theta, plain) if compact else nullcontext((Recording(), {}, {}))
            with recorded(model, self.theta, calls), graphs as (run, normalised, linear):
                value = loss(self.theta, self.x)
            if run.derived:
                return self._run(loss, model, compact=False)
            uses, parents = edges_of(value, self.theta)
            makers = makers_of(calls, self.theta, parents, normalised, linear)
            unknown = {n for n in self.theta if uses.get(n, 0) != len(makers.get(n, ()))}
            missed = [call.module for call, _ in linear.values() if unknown & set(call.names.values())]
            if not missed:
                return value, uses, makers
            plain += missed

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
