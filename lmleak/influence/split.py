"""Where the risk sits: per token, and per layer of the network."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lmleak.errors import ConfigError
from lmleak.influence.jacobian import InputJacobian
from lmleak.influence.solver import MAX_PRODUCTS, SOLVER_TOLERANCE, InfluenceResult
from lmleak.linops import multishift_cg


def influence_by_token(result: InfluenceResult, attention_mask: Tensor) -> tuple[tuple[float, ...], ...]:
    """Return the predicted error at every real token, rms over its D coordinates, in units of x.

    The squares, averaged over all real tokens, give ``influence.rms`` squared. A token with a small error is one that
    the perturbation hides badly.

    Args:
        result: I2F of a text batch.
        attention_mask: (B, T), 1 on real tokens.

    Returns:
        Per sequence, one number per real token.
    """
    rms = result.error.double().square().mean(-1).sqrt()  # (B, T)
    return tuple(tuple(row[mask.bool()].tolist()) for row, mask in zip(rms, attention_mask, strict=True))


@dataclass(frozen=True)
class LayerShare:
    """One layer's share of tr(A), the total Fisher information about x under isotropic noise."""

    share: float
    """||J_l||_F^2 / ||J||_F^2, in [0, 1]; the shares of all layers sum to one."""
    std_error: float


def information_by_layer(
    jacobian: InputJacobian, roles: Mapping[str, tuple[str, ...]], *, num_probes: int = 16, seed: int = 0
) -> dict[str, LayerShare]:
    """Return how tr(A) = sum_l ||J_l||_F^2 divides among layers, by random probes.

    E ||J_l^T v||^2 = ||J_l||_F^2 for v ~ N(0, I): one product J^T v per probe serves all layers. It is also the
    squared Frobenius sensitivity of each layer's gradient to the input.

    Args:
        jacobian: J.
        roles: Parameter names per layer; parameters outside J are ignored.
        num_probes: Number of probes, at least 2.
        seed: Seed of the probes.

    Returns:
        Share and standard error per layer that has shared parameters.

    Raises:
        ConfigError: If ``num_probes`` is less than 2.
    """
    if num_probes < 2:
        raise ConfigError(f"a standard error needs num_probes >= 2, got {num_probes}")
    generator = torch.Generator().manual_seed(seed)
    layers = {r: [n for n in names if n in jacobian.parameter_shapes] for r, names in roles.items()}
    layers = {r: names for r, names in layers.items() if names}
    rows = []
    for _ in range(num_probes):
        v = torch.randn(jacobian.x.shape, generator=generator, dtype=torch.float64).to(jacobian.x)
        product = jacobian.rmatvec(v)
        rows.append([sum(product[n].double().square().sum().item() for n in names) for names in layers.values()])
    energy = torch.tensor(rows, dtype=torch.float64)
    total = energy.sum(1, keepdim=True).mean().clamp(min=1e-300)
    share = energy.mean(0) / total
    # Ratio estimator: the deviation of each probe's layer energy from its share of that probe's total.
    deviation = (energy - share * energy.sum(1, keepdim=True)) / total
    error = deviation.std(0) / len(energy) ** 0.5
    return {layer: LayerShare(share[i].item(), error[i].item()) for i, layer in enumerate(layers)}


def influence_by_layer(
    jacobian: InputJacobian,
    perturbation: Mapping[str, Tensor],
    result: InfluenceResult,
    roles: Mapping[str, tuple[str, ...]],
    *,
    tol: float = SOLVER_TOLERANCE,
    max_products: int = MAX_PRODUCTS,
) -> dict[str, float]:
    """Return the share of I2F^2 that each layer's part of the perturbation causes; the shares sum to one.

    z = (A + d I)^-1 sum_l J_l delta_l is additive over layers, and <z, z_l> = <w, J_l delta_l> = <J_l^T w, delta_l>
    with w = (A + d I)^-1 z: one more solve and one product give all layers. A share is negative where a layer's noise
    happens to cancel that of the others.

    Args:
        jacobian: J.
        perturbation: The delta that ``result`` was computed from.
        result: Its I2F.
        roles: Parameter names per layer.
        tol: Relative residual of the solve.
        max_products: Most products with A.

    Returns:
        The share per layer that has shared parameters.

    Raises:
        ConfigError: If the influence is zero, so that there is nothing to divide.
    """
    z = jacobian.flatten(result.error)
    total = z.double().square().sum().item()
    if total == 0:
        raise ConfigError("the perturbation has no influence, so it has no shares")
    (solved,) = multishift_cg(jacobian.gram_operator(), z, [result.damping], tol=tol, max_products=max_products)
    transposed = jacobian.rmatvec(jacobian.unflatten(solved.require_converged().solution))
    shares = {}
    for layer, names in roles.items():
        shared = [n for n in names if n in jacobian.parameter_shapes]
        if shared:
            inner = sum((transposed[n] * perturbation[n]).sum().item() for n in shared if n in perturbation)
            shares[layer] = inner * jacobian.perturbation_scale / total
    return shares
