"""How far a guessed gradient is from the observed one: what the matching attacks minimise.

Layers differ in gradient norm by orders of magnitude (in a random BERT the classifier's gradient is 10^4 times the
query's), and the plain sum of squares sees the head only. Gradients are therefore rescaled layer by layer before
they are compared,

    g'_l = s_l g_l,   s_l proportional to ||g*_l||^-balance,   ||g*'||_2 = 1 over all layers,

with g* the observed gradient. ``balance=0`` is the objective as published, up to one global factor; ``balance=1``
compares relative errors and weighs all layers alike. The L1 norm is divided by that of g*', too. So numbers have a
meaning across models: at the guess "zero gradient" the L2 part is 1 and the L1 part is alpha. Published alphas weigh
raw norms, whose ratio grows with the square root of the number of parameters and with the gradient's size.

A released gradient that was sparsified says nothing where it is zero but that the true value was small. Objectives
given ``kept`` compare the kept coordinates only (as GRAB does for pruning, CCS 2024).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

# Some gradients are zero in exact arithmetic (a key bias shifts all attention scores alike) and rounding noise in
# floating point. Below this part of the largest layer norm, a layer is not blown up any further.
NORM_FLOOR = 1e-6
PIECE = 2**16  # numbers that fit the cache


def layer_scales(observed: Mapping[str, Tensor], balance: float) -> dict[str, float]:
    """Return the factor s_l by which each layer's gradient is multiplied before gradients are compared.

    ``s_l = c ||g*_l||^-balance`` with c such that ``sum_l s_l^2 ||g*_l||^2 = 1``.

    Args:
        observed: The observed gradient g*.
        balance: 0 for equal factors, 1 for equal norms of all layers.

    Returns:
        One positive number per name. If g* is zero (everything pruned), all are 1.
    """
    norms = {name: tensor.double().norm().item() for name, tensor in observed.items()}
    largest = max(norms.values())
    if largest == 0:
        return dict.fromkeys(norms, 1.0)
    scales = {name: max(norm, NORM_FLOOR * largest) ** -balance for name, norm in norms.items()}
    total = sum((scales[name] * norms[name]) ** 2 for name in norms) ** 0.5
    return {name: scale / total for name, scale in scales.items()}


class SquaresPlusAbsolutes(torch.autograd.Function):
    """``sum d^2 + ratio sum |d|`` with d = guess - target, a scalar.

    Next to a short text's gradient, elementwise passes over the parameters cost as much as the model, and new memory
    for them as much as the sums. So d is formed piece by piece, of a size that fits the cache, and what is made of
    the parameters' size is the derivative alone. (Overwriting the guess would spare that too, but gradients of two
    parameters may share memory.)
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(guess: Tensor, target: Tensor, ratio: float) -> Tensor:
        """Return the sum."""
        total = guess.new_zeros(())
        for g, t in zip(_pieces(guess.reshape(-1)), _pieces(target.reshape(-1)), strict=True):
            d = g - t
            total = total + torch.dot(d, d)
            if ratio:
                total = total + ratio * d.abs_().sum()
        return total

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        """Keep the guess and the target."""
        guess, target, ctx.ratio = inputs
        ctx.save_for_backward(guess, target)

    @staticmethod
    def backward(ctx, slope: Tensor) -> tuple[Tensor, None, None]:
        """Return ``2 d + ratio sign(d)``, times the incoming slope."""
        guess, target = ctx.saved_tensors
        pieces = []
        for g, t in zip(_pieces(guess.reshape(-1)), _pieces(target.reshape(-1)), strict=True):
            d = g - t
            pieces.append((d.add_(d.sign(), alpha=ctx.ratio / 2) if ctx.ratio else d).mul_(2 * slope))
        return torch.cat(pieces).view(guess.shape), None, None


def _pieces(flat: Tensor) -> list[Tensor]:
    return [flat[start : start + PIECE] for start in range(0, len(flat), PIECE)]


class SquaredNorm(torch.autograd.Function):
    """``<g, g>``, a scalar, with one pass for its derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(g: Tensor) -> Tensor:
        """Return the square."""
        return torch.dot(g.flatten(), g.flatten())

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        """Keep the tensor."""
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, slope: Tensor) -> Tensor:
        """Return 2 g, times the incoming slope."""
        return ctx.saved_tensors[0] * (2 * slope)


class Objective(ABC):
    """A distance of gradients on the coordinates that count, layer by layer.

    Args:
        observed: The observed gradient g*.
        balance: How far layers are rescaled (:func:`layer_scales`).
        kept: Per name, True where a coordinate is compared; names that are absent are compared everywhere.
    """

    def __init__(self, observed: Mapping[str, Tensor], *, balance: float, kept: Mapping[str, Tensor] | None = None):
        self.observed, self.kept = observed, kept or {}
        self.scales = layer_scales(observed, balance)
        self.scale = next(iter(observed.values())).new_tensor([self.scales[name] for name in observed])
        """(layers,) the factors s_l."""

    def pairs(self, guess: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield g_l on the compared coordinates, and g*_l, of every layer."""
        for name, target in self.observed.items():
            mask = self.kept.get(name)
            yield guess[name] if mask is None else guess[name] * mask, target

    @abstractmethod
    def __call__(self, guess: Mapping[str, Tensor]) -> Tensor:
        """Return the distance of a guess g, which may hold a graph, from g*: a scalar."""


class SquaredL2(Objective):
    """``sum_l ||s_l (g_l - g*_l)||_2^2``, the objective of DLG (Zhu et al. 2019, arXiv:1906.08935, eq. 4); 1 at g = 0.

    The paper has s_l = 1 (``balance=0``, up to one factor).
    """

    @property
    def ratios(self) -> list[float]:
        """Weight of ``sum |d|`` beside ``sum d^2`` in each layer."""
        return [0.0] * len(self.observed)

    def __call__(self, guess: Mapping[str, Tensor]) -> Tensor:
        """Return the distance of a guess g, which may hold a graph, from g*: a scalar."""
        return self.scale.square() @ torch.stack(
            [
                SquaresPlusAbsolutes.apply(g, target, ratio)
                for (g, target), ratio in zip(self.pairs(guess), self.ratios, strict=True)
            ]
        )


class SquaredL2PlusL1(SquaredL2):
    """``sum_l ||s_l (g_l - g*_l)||_2^2 + alpha sum_l ||s_l (g_l - g*_l)||_1 / sum_l ||s_l g*_l||_1``, of TAG.

    Deng et al. 2021, arXiv:2103.06819, have ``||g - g*||_2 + alpha ||g - g*||_1`` with alpha falling with depth.
    The comparison code of LAMP (Balunovic et al. 2022, arXiv:2202.08827) squares the L2 norm and keeps one
    alpha = 0.01; so do we, except that both norms are relative. 1 + alpha at g = 0.

    Args:
        observed: The observed gradient g*.
        balance: How far layers are rescaled (:func:`layer_scales`).
        alpha: Weight of the relative L1 distance.
        kept: Per name, True where a coordinate is compared.
    """

    def __init__(
        self,
        observed: Mapping[str, Tensor],
        *,
        balance: float,
        alpha: float,
        kept: Mapping[str, Tensor] | None = None,
    ):
        super().__init__(observed, balance=balance, kept=kept)
        l1_norm = sum(self.scales[name] * target.abs().sum().item() for name, target in observed.items())
        self.l1_weight = alpha / l1_norm if l1_norm else alpha

    @property
    def ratios(self) -> list[float]:
        """Weight of ``sum |d|`` beside ``sum d^2`` in each layer."""
        return [self.l1_weight / self.scales[name] for name in self.observed]


class Cosine(Objective):
    """``1 - <g', g*'> / (||g'||_2 ||g*'||_2)`` over all layers together, rescaled: in [0, 2], blind to the size of g.

    Geiping et al. 2020, arXiv:2003.14053, eq. 4, without the total variation, which is a prior of images; they have
    s_l = 1 (``balance=0``).
    """

    def __init__(self, observed: Mapping[str, Tensor], *, balance: float, kept: Mapping[str, Tensor] | None = None):
        super().__init__(observed, balance=balance, kept=kept)
        # 1 by the choice of scales, here rounded as in the guess's own products, so that 1 - 1 stays near zero.
        _, square = inner_products((g, g) for g in observed.values())
        self.length = (self.scale.square() @ square).sqrt()

    def __call__(self, guess: Mapping[str, Tensor]) -> Tensor:
        """Return the distance of a guess g, which may hold a graph, from g*: a scalar."""
        inner, square = inner_products(self.pairs(guess))
        weight, smallest = self.scale.square(), torch.finfo(square.dtype).tiny
        return 1 - (weight @ inner) / (self.length * (weight @ square).clamp(min=smallest).sqrt())


class LayerCosine(Objective):
    """``mean_l (1 - cos(g_l, g*_l))``, the cosine objective of LAMP (Balunovic et al. 2022, arXiv:2202.08827).

    Layers whose observed norm is below 1e-6 of the largest are rounding noise, of random direction, and left out.
    ``balance`` plays no part: every cosine is relative.
    """

    def __init__(self, observed: Mapping[str, Tensor], *, kept: Mapping[str, Tensor] | None = None):
        norms = {name: target.double().norm().item() for name, target in observed.items()}
        least = NORM_FLOOR * max(norms.values())
        super().__init__({n: t for n, t in observed.items() if norms[n] >= least}, balance=1.0, kept=kept)
        _, square = inner_products((g, g) for g in self.observed.values())
        self.lengths = square.sqrt()

    def __call__(self, guess: Mapping[str, Tensor]) -> Tensor:
        """Return the distance of a guess g, which may hold a graph, from g*: a scalar."""
        inner, square = inner_products(self.pairs(guess))
        smallest = torch.finfo(square.dtype).tiny
        return 1 - (inner / (self.lengths * square.clamp(min=smallest).sqrt()).clamp(min=smallest)).mean()


def inner_products(pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return <g_l, g*_l> and ||g_l||^2 of every layer, two vectors."""
    pairs = list(pairs)
    inner = torch.stack([torch.dot(g.flatten(), target.flatten()) for g, target in pairs])
    return inner, torch.stack([SquaredNorm.apply(g) for g, _ in pairs])
