"""How far a guessed gradient is from the observed one: what the matching attacks minimise.

Layers differ in gradient norm by orders of magnitude (in a random BERT the classifier's gradient is 10^4 times the
query's), and the plain sum of squares sees the head only. Gradients are therefore rescaled layer by layer before
they are compared,

    g'_l = s_l g_l,   s_l proportional to ||g*_l||^-balance,   ||g*'||_2 = 1 over all layers,

with g* the observed gradient. ``balance=0`` is the objective as published, up to one global factor; ``balance=1``
compares relative errors and weighs all layers alike. The L1 norm is divided by that of g*', too. So numbers have a
meaning across models: at the guess "zero gradient" the L2 part is 1 and the L1 part is alpha. Published alphas weigh
raw norms, whose ratio grows with the square root of the number of parameters and with the gradient's size.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

# Some gradients are zero in exact arithmetic (a key bias shifts all attention scores alike) and rounding noise in
# floating point. Below this part of the largest layer norm, a layer is not blown up any further.
NORM_FLOOR = 1e-6


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


class SquaredL2:
    """``sum_l ||s_l (g_l - g*_l)||_2^2``, the objective of DLG (Zhu et al. 2019, arXiv:1906.08935, eq. 4).

    The paper has s_l = 1 (``balance=0``, up to one factor).

    Args:
        observed: The observed gradient g*.
        balance: How far layers are rescaled (:func:`layer_scales`).
    """

    def __init__(self, observed: Mapping[str, Tensor], *, balance: float):
        self.scales = layer_scales(observed, balance)
        self.scaled_observed = {name: self.scales[name] * g for name, g in observed.items()}

    def differences(self, guess: Mapping[str, Tensor]) -> list[Tensor]:
        """Return s_l (g_l - g*_l) of every layer."""
        return [self.scales[name] * guess[name] - target for name, target in self.scaled_observed.items()]

    def __call__(self, guess: Mapping[str, Tensor]) -> Tensor:
        """Return the distance of a guess g, which may hold a graph, from g*: a scalar, 1 at g = 0."""
        return torch.stack([d.square().sum() for d in self.differences(guess)]).sum()


class SquaredL2PlusL1(SquaredL2):
    """``sum_l ||s_l (g_l - g*_l)||_2^2 + alpha sum_l ||s_l (g_l - g*_l)||_1 / sum_l ||s_l g*_l||_1``, of TAG.

    Deng et al. 2021, arXiv:2103.06819, have ``||g - g*||_2 + alpha ||g - g*||_1`` with alpha falling with depth.
    The comparison code of LAMP (Balunovic et al. 2022, arXiv:2202.08827) squares the L2 norm and keeps one
    alpha = 0.01; so do we, except that both norms are relative.

    Args:
        observed: The observed gradient g*.
        balance: How far layers are rescaled (:func:`layer_scales`).
        alpha: Weight of the relative L1 distance.
    """

    def __init__(self, observed: Mapping[str, Tensor], *, balance: float, alpha: float):
        super().__init__(observed, balance=balance)
        l1_norm = sum(target.abs().sum().item() for target in self.scaled_observed.values())
        self.l1_weight = alpha / l1_norm if l1_norm else alpha

    def __call__(self, guess: Mapping[str, Tensor]) -> Tensor:
        """Return the distance of a guess g, which may hold a graph, from g*: a scalar, 1 + alpha at g = 0."""
        parts = [d.square().sum() + self.l1_weight * d.abs().sum() for d in self.differences(guess)]
        return torch.stack(parts).sum()
