"""How far a guessed gradient is from the observed one: what the matching attacks minimise.

Layers differ in gradient norm by orders of magnitude (in a random BERT the classifier's gradient is 10^4 times the
query's), and the plain sum of squares sees the head only. Gradients are therefore rescaled layer by layer before
they are compared,

    g'_l = s_l g_l,   s_l proportional to ||g*_l||^-balance,   ||g*'||_2 = 1 over all layers,

with g* the observed gradient. ``balance=0`` is the objective as published, up to one global factor; ``balance=1``
compares relative errors and weighs all layers alike. The global factor is what gives numbers a meaning across
models: the objective of the guess "zero gradient" is 1 (plus the L1 term), and TAG's alpha is weighed against a
gradient of unit norm. Published alphas refer to the raw norm, which shrinks as a model trains.
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


def squared_l2(guess: Mapping[str, Tensor], observed: Mapping[str, Tensor], scales: Mapping[str, float]) -> Tensor:
    """Return ``sum_l ||s_l (g_l - g*_l)||_2^2``, the objective of DLG (Zhu et al. 2019, arXiv:1906.08935, eq. 4).

    Args:
        guess: Gradient g of the guessed input, by name; may hold a graph.
        observed: Observed gradient g*, the same names.
        scales: From :func:`layer_scales`; the paper has s_l = 1.

    Returns:
        A scalar; 1 for the guess zero.
    """
    return torch.stack([(scales[name] * (guess[name] - g)).square().sum() for name, g in observed.items()]).sum()


def squared_l2_plus_l1(
    guess: Mapping[str, Tensor], observed: Mapping[str, Tensor], scales: Mapping[str, float], alpha: float
) -> Tensor:
    """Return ``sum_l ||s_l (g_l - g*_l)||_2^2 + alpha ||s_l (g_l - g*_l)||_1``, the objective of TAG.

    Deng et al. 2021, arXiv:2103.06819, eq. 3. As in the comparison code of LAMP (Balunovic et al. 2022,
    arXiv:2202.08827) the L2 norm is squared and alpha is one number; the paper lets alpha fall with depth.

    Args:
        guess: Gradient g of the guessed input, by name; may hold a graph.
        observed: Observed gradient g*, the same names.
        scales: From :func:`layer_scales`; the papers have s_l = 1.
        alpha: Weight of the L1 norm against a gradient of unit L2 norm.

    Returns:
        A scalar.
    """
    differences = [scales[name] * (guess[name] - g) for name, g in observed.items()]
    return torch.stack([d.square().sum() + alpha * d.abs().sum() for d in differences]).sum()
