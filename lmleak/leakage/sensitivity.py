"""How strongly each layer's gradient answers to the private input: norms of J_l = d g_l / d x, without an attack.

Our reading of "sensitivity" in the abstract of Mo et al. (arXiv:2105.13929), whose normalisation is not public: we
report the raw norm and three normalised ones. J is stored dx x P, so J_l is dx x p_l; norms do not see the transpose.
Sum over layers of ||J_l||_F^2 is tr(J J^T), the total Fisher information about x under isotropic noise; it is
dominated by what leaks most, the recovery of all of x by what leaks least, so the order of layers can differ.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lmleak.errors import ConfigError, DataError


class JacobianProducts(Protocol):
    """What is asked of J: lmleak.GradientJacobian for a gradient, UpdateJacobian for a FedAvg update."""

    x: Tensor
    """The point at which J is taken, (B, ...)."""
    free: Tensor
    """Boolean, like x: False on padding."""
    parameter_shapes: Mapping[str, torch.Size]
    """Shape per shared parameter."""

    def matvec(self, delta: Mapping[str, Tensor]) -> Tensor:
        """Return J delta, shaped like x; missing names count as zero."""

    def rmatvec(self, v: Tensor) -> dict[str, Tensor]:
        """Return J^T v, one tensor per shared parameter."""


@dataclass(frozen=True)
class LayerSensitivity:
    """Norms of one layer's J_l (dx x p_l); unit gradient per input unless said otherwise."""

    frobenius: float
    """||J_l||_F."""
    frobenius_std_error: float
    """Over probes, to first order; 0 where exact."""
    per_element: float
    """||J_l||_F / sqrt(p_l dx): root mean square entry, which does not grow with the layer."""
    relative: float | None
    """||J_l||_F ||x|| / ||g_l||, no unit: fair between layers of any scale. None without g_l or where it is zero."""
    share: float | None
    """||J_l||_F^2 / tr(J J^T), in [0, 1]; the shares of all shared parameters sum to one. None where J is zero."""
    share_std_error: float | None
    """Over probes, of a ratio, to first order; 0 where exact."""
    cumulative: float | None
    """Sum of the shares of this layer and those before it."""
    mean_entry: float | None
    """Mean of |J_l|, the entrywise 1-norm over p_l dx; None where probes were used."""
    largest_entry: float | None
    """Entrywise maximum of |J_l|; None where probes were used (``extremes.largest_entries`` searches for it then)."""
    parameters: int
    """p_l."""


@dataclass(frozen=True)
class Sensitivity:
    """Sensitivity of all layers at one input."""

    layers: dict[str, LayerSensitivity]
    trace: float
    """tr(J J^T) over all shared parameters, layers that were not asked for included."""
    trace_std_error: float
    """Over probes; 0 where exact."""
    dx: int
    """Coordinates of x that J was taken in."""
    products: int
    """Products J^T v spent; each served all layers."""
    exact: bool
    """Every direction of x was used, instead of random probes."""


def input_sensitivity(
    jacobian: JacobianProducts,
    layers: Mapping[str, Sequence[str]],
    *,
    gradient: Mapping[str, Tensor] | None = None,
    rows: Sequence[int] | None = None,
    exact_below: int = 256,
    num_probes: int = 16,
    seed: int = 0,
) -> Sensitivity:
    """Return the norms of every layer's J_l, all layers from the same products.

    Exact: ||J_l||_F^2 = sum_i ||J_l^T e_i||^2 over the dx coordinates of x. Otherwise by Hutchinson's estimator,
    E ||J_l^T v||^2 = ||J_l||_F^2 for v of independent signs, whose variance is never above that of Gaussian v.

    Args:
        jacobian: J of a gradient, or of an update; of a batch, J of the aggregate.
        layers: Parameter names per layer in forward order (``adapter.roles()``); names outside J are ignored, and
            layers without any left out.
        gradient: g at x, for ``relative``.
        rows: Examples of the batch whose coordinates of x are varied, the others held; None for all.
        exact_below: Use every direction if dx is at most this.
        num_probes: Random directions otherwise, at least 2.
        seed: Seed of the directions.

    Returns:
        Norms per layer, and the trace.

    Raises:
        ConfigError: If ``num_probes`` is less than 2, a parameter is in two layers or no layer is shared.
        DataError: If ``rows`` are not examples of the batch, or a product is not finite.
    """
    if num_probes < 2:
        raise ConfigError(f"a standard error needs num_probes >= 2, got {num_probes}")
    parts = shared_layers(jacobian, layers)
    coordinates = input_coordinates(jacobian, rows)
    dx = int(coordinates.sum())
    exact = dx <= exact_below
    names = list(jacobian.parameter_shapes)
    energies, absolute, largest = [], torch.zeros(len(names)).double(), torch.zeros(len(names)).double()
    for v in _unit_directions(coordinates, jacobian.x) if exact else _signs(coordinates, jacobian.x, num_probes, seed):
        product = jacobian.rmatvec(v)
        energies.append(torch.stack([_squared_norm(product[n]) for n in names]))
        if exact:
            absolute += torch.stack([product[n].abs().sum(dtype=torch.float64) for n in names]).cpu()
            largest = torch.maximum(largest, torch.stack([product[n].abs().max().double() for n in names]).cpu())
    energy = torch.stack(energies).cpu()  # (products, parameters)
    if not torch.isfinite(energy).all():
        raise DataError("a product J^T v holds NaN or Inf. Check the model and the loss at this input.")
    scale = 1.0 if exact else 1 / num_probes
    totals = energy.sum(1)
    trace = scale * totals.sum().item()
    x_norm = torch.linalg.vector_norm(jacobian.x[coordinates], dtype=torch.float64).item()
    error = lambda per_probe: 0.0 if exact else (per_probe.std() / math.sqrt(num_probes)).item()
    found, cumulative = {}, 0.0
    for layer, members in parts.items():
        index = [names.index(n) for n in members]
        count = sum(math.prod(jacobian.parameter_shapes[n]) for n in members)
        of_layer = energy[:, index].sum(1)
        squared = scale * of_layer.sum().item()
        frobenius = math.sqrt(squared)
        share = squared / trace if trace > 0 else None
        cumulative += share or 0.0
        found[layer] = LayerSensitivity(
            frobenius=frobenius,
            frobenius_std_error=error(of_layer) / (2 * frobenius) if frobenius > 0 else 0.0,
            per_element=math.sqrt(squared / (count * dx)),
            relative=_relative(frobenius, x_norm, members, gradient),
            share=share,
            share_std_error=None if share is None else error((of_layer - share * totals) / trace),
            cumulative=None if share is None else cumulative,
            mean_entry=absolute[index].sum().item() / (count * dx) if exact else None,
            largest_entry=largest[index].max().item() if exact else None,
            parameters=count,
        )
    return Sensitivity(found, trace, error(totals), dx, len(energies), exact)


def shared_layers(jacobian: JacobianProducts, layers: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Return the parameters of each layer that J has, without layers that have none.

    Args:
        jacobian: J.
        layers: Parameter names per layer.

    Returns:
        Parameter names per layer.

    Raises:
        ConfigError: If no layer is shared or a parameter is in two.
    """
    parts = {layer: [n for n in names if n in jacobian.parameter_shapes] for layer, names in layers.items()}
    parts = {layer: names for layer, names in parts.items() if names}
    listed = [n for names in parts.values() for n in names]
    if not listed:
        raise ConfigError(
            f"none of the layers {list(layers)[:4]} has a parameter among the {len(jacobian.parameter_shapes)} shared "
            "ones; pass adapter.roles(), or share more parameters"
        )
    twice = sorted({n for n in listed if listed.count(n) > 1})
    if twice:
        raise ConfigError(f"{twice[0]!r} is in two layers, so their shares would not add up; name it once")
    return parts


def input_coordinates(jacobian: JacobianProducts, rows: Sequence[int] | None) -> Tensor:
    """Return the free coordinates of the chosen examples.

    Args:
        jacobian: J.
        rows: Examples of the batch; None for all.

    Returns:
        Boolean, shaped like x.

    Raises:
        DataError: If ``rows`` are not examples of the batch, or none of their coordinates is free.
    """
    size = len(jacobian.x)
    if rows is None:
        chosen = jacobian.free
    else:
        if not len(rows) or not all(0 <= r < size for r in rows):
            raise DataError(f"rows={list(rows)} must name examples of the batch, 0 to {size - 1}")
        mask = torch.zeros_like(jacobian.free)
        mask[list(rows)] = True
        chosen = jacobian.free & mask
    if not chosen.any():
        raise DataError("the chosen examples have no free coordinate: they are padding only")
    return chosen


def _squared_norm(tensor: Tensor) -> Tensor:
    # Short float32 sums added in float64: a tenth of the time of a sum in float64, and exact to about 1e-6.
    return torch.stack([torch.dot(part, part) for part in tensor.reshape(-1).split(2**18)]).sum(dtype=torch.float64)


def _unit_directions(coordinates: Tensor, x: Tensor):
    for i in coordinates.reshape(-1).nonzero()[:, 0].tolist():
        v = torch.zeros_like(x).reshape(-1)
        v[i] = 1
        yield v.reshape(x.shape)


def _signs(coordinates: Tensor, x: Tensor, count: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        signs = torch.randint(0, 2, x.shape, generator=generator) * 2 - 1
        yield signs.to(x) * coordinates


def _relative(frobenius: float, x_norm: float, members: list[str], gradient: Mapping | None) -> float | None:
    if gradient is None:
        return None
    missing = [n for n in members if n not in gradient]
    if missing:
        raise DataError(f"the gradient lacks {missing[0]!r}; pass the gradient at x of every parameter of J")
    norm = math.sqrt(sum(torch.linalg.vector_norm(gradient[n], dtype=torch.float64).item() ** 2 for n in members))
    return frobenius * x_norm / norm if norm > 0 else None
