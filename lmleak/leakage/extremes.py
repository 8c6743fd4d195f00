"""Spectral norm and largest entry of each layer's J_l = d g_l / d x, which need products of their own per layer.

Our reading of "sensitivity" in the abstract of Mo et al. (arXiv:2105.13929), as in :mod:`lmleak.leakage.sensitivity`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmleak.errors import ConfigError
from lmleak.leakage.sensitivity import JacobianProducts, input_coordinates, shared_layers
from lmleak.linops import FunctionOperator, top_eigenvalue


@dataclass(frozen=True)
class SpectralNorm:
    """Largest singular value of J_l: the gradient's fastest change along any direction of x."""

    value: float
    """Never above the true norm."""
    upper: float
    """Not below the true norm, except with the failure probability of ``linops.top_eigenvalue`` (1e-3)."""
    converged: bool
    """value and upper agree to the tolerance."""
    products: int
    """Products with J_l J_l^T."""


def spectral_norms(
    jacobian: JacobianProducts,
    layers: Mapping[str, Sequence[str]],
    *,
    rows: Sequence[int] | None = None,
    tol: float = 1e-3,
    max_products: int = 200,
    seed: int = 0,
) -> dict[str, SpectralNorm]:
    """Return ||J_l||_2 = sqrt(lambda_max(J_l J_l^T)) per layer by Lanczos; every layer has products of its own.

    Args:
        jacobian: J.
        layers: As for ``input_sensitivity``.
        rows: Examples of the batch whose coordinates of x are varied; None for all.
        tol: Relative width between ``value`` and ``upper`` at which to stop.
        max_products: Most products per layer.
        seed: Seed of the starts.

    Returns:
        The norm per layer, bracketed.
    """
    coordinates = input_coordinates(jacobian, rows)

    def gram(flat: Tensor, members: list[str]) -> Tensor:
        v = torch.zeros_like(jacobian.x).masked_scatter(coordinates, flat)
        product = jacobian.rmatvec(v)
        return jacobian.matvec({n: product[n] for n in members})[coordinates]

    norms = {}
    for layer, members in shared_layers(jacobian, layers).items():
        operator = FunctionOperator(
            lambda flat, members=members: gram(flat, members), size=int(coordinates.sum()),
            dtype=jacobian.x.dtype, device=jacobian.x.device, positive_semidefinite=True,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        # A tolerance on sqrt(lambda) is twice as wide on lambda.
        top = top_eigenvalue(operator, generator=generator, tol=(1 + tol) ** 2 - 1, max_products=max_products)
        norms[layer] = SpectralNorm(math.sqrt(top.value), math.sqrt(top.upper), top.converged, top.iterations)
    return norms


def largest_entries(
    jacobian: JacobianProducts,
    layers: Mapping[str, Sequence[str]],
    *,
    rows: Sequence[int] | None = None,
    starts: int = 8,
    seed: int = 0,
) -> dict[str, float]:
    """Search for the entrywise maximum of |J_l| where dx is too large to visit every row: a lower bound.

    Alternates between the largest entry of a row and that of its column until neither grows (the mixed-norm power
    method; Higham and Relton, SIAM J. Sci. Comput. 38(5), 2016), from random rows, and keeps the best. On small
    networks eight rows came within a factor of about two of the maximum: an order of magnitude, no ranking of layers.

    Args:
        jacobian: J.
        layers: As for ``input_sensitivity``.
        rows: Examples of the batch whose coordinates of x are varied; None for all.
        starts: Random rows to start from.
        seed: Seed of the starts.

    Returns:
        An attained |entry| per layer.

    Raises:
        ConfigError: If ``starts`` is less than 1.
    """
    if starts < 1:
        raise ConfigError(f"expected starts >= 1, got {starts}")
    coordinates = input_coordinates(jacobian, rows)
    dx = int(coordinates.sum())
    chosen = torch.randperm(dx, generator=torch.Generator().manual_seed(seed))[:starts]
    return {
        layer: max(_climb(jacobian, coordinates, members, int(i)) for i in chosen)
        for layer, members in shared_layers(jacobian, layers).items()
    }


def _climb(jacobian: JacobianProducts, coordinates: Tensor, members: list[str], row: int) -> float:
    best = -1.0
    while True:
        direction = jacobian.x.new_zeros(int(coordinates.sum()))
        direction[row] = 1
        product = jacobian.rmatvec(torch.zeros_like(jacobian.x).masked_scatter(coordinates, direction))
        name = max(members, key=lambda n: product[n].abs().max().item())
        value = product[name].abs().max().item()
        if not value > best:
            return max(best, 0.0)
        best = value
        delta = torch.zeros_like(product[name]).reshape(-1)
        delta[product[name].abs().argmax()] = 1
        column = jacobian.matvec({name: delta.reshape(product[name].shape)})[coordinates].abs()
        row = int(column.argmax())
