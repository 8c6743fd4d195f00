"""The numbers of one group of metrics as rows hold them, from Jacobians or from stored features."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmleak.adapters import ModelAdapter
from lmleak.evaluation.layers_capture import release_rows
from lmleak.evaluation.layers_examples import LabelledExamples
from lmleak.evaluation.layers_settings import LayerSettings
from lmleak.gradients import capture_gradient
from lmleak.influence import GradientJacobian, UpdateJacobian
from lmleak.influence.layers import influence_of_layers
from lmleak.leakage import (
    input_sensitivity,
    kernel_discrepancy,
    mean_difference,
    pointwise_by_class,
    sample_subspace_distance,
    v_information,
)
from lmleak.leakage.independence import independence_test
from lmleak.leakage.permutation import PermutationTest
from lmleak.leakage.rows import unit_rows
from lmleak.metrics.agreement import bootstrap_mean

Numbers = dict[str, Any]
Layers = Mapping[str, Sequence[str]]


def sensitivity_of_layers(
    adapter: ModelAdapter, examples: LabelledExamples, layers: Layers, victims: Sequence[int], settings: LayerSettings
) -> dict[str, Numbers]:
    """Return norms of J_l = d g_l / d x_victim, means over victims with 95 % bootstrap intervals over them.

    Of the gradient before any defense, with dropout off. Columns: ``frobenius`` and ``per_element`` (gradient per
    input), ``relative``, ``share`` and ``cumulative`` (no unit) as in :class:`lmleak.leakage.LayerSensitivity`, each
    with ``_low`` and ``_high``; ``frobenius_probe_error``, the standard error that random probes add; ``exact``.
    """
    sharing, found = settings.capture.sharing, []
    for victim in victims:
        batch = examples.batch(release_rows(examples, victim, settings.capture))
        if sharing.aggregation.steps > 1:
            jacobian = UpdateJacobian(adapter, batch, sharing.aggregation, shared=sharing.shared)
        else:
            jacobian = GradientJacobian(adapter, batch, shared=sharing.shared)
            if not found:
                jacobian.verify(seed=settings.seed)
        gradient = capture_gradient(adapter, batch, shared=sharing.shared, aggregation=sharing.aggregation).gradient
        found.append(input_sensitivity(
            jacobian, layers, gradient=gradient, rows=[0], num_probes=settings.probes, seed=settings.seed
        ))  # fmt: skip
    exact, rows = all(each.exact for each in found), {}
    for layer in layers:
        of_layer = [each.layers[layer] for each in found]
        rows[layer] = {"examples": len(found), "exact": exact, "probes": 0 if exact else settings.probes}
        for name in ("frobenius", "per_element", "relative", "share", "cumulative"):
            rows[layer] |= with_interval(name, [getattr(each, name) for each in of_layer])
        # of the mean over examples, whose probes are as good as independent: errors add in quadrature
        errors = np.array([each.frobenius_std_error for each in of_layer])
        rows[layer]["frobenius_probe_error"] = float(np.sqrt(np.square(errors).sum()) / len(errors))
    return rows


def influence_by_release(
    adapter: ModelAdapter, examples: LabelledExamples, layers: Layers, victims: Sequence[int], settings: LayerSettings
) -> dict[str, Numbers]:
    """Return the MAP error of each layer released alone, and of all layers but it; means over single examples.

    ``only_error_rms`` (units of x): of the attacker with the Gaussian prior who has this layer's noisy gradient and
    nothing else; small means that the layer leaks by itself. ``without_error_rms``: who has all layers but this; large
    means that hiding it protects. ``*_undetermined``: the share of x that the release leaves open. sigma is
    ``noise`` times the root mean square of the whole shared gradient.
    """
    shared, found = settings.capture.sharing.shared, []
    for victim in victims:
        batch = examples.batch([victim])
        std = settings.noise * capture_gradient(adapter, batch, shared=shared).rms
        if not found:
            GradientJacobian(adapter, batch, shared=shared).verify(seed=settings.seed)
        found.append(influence_of_layers(
            adapter, batch, noise_std=std, shared=shared, layers=layers, seed=settings.seed, tol=settings.tolerance,
            max_products=settings.max_products,
        ))  # fmt: skip
    rows = {}
    for layer in layers:
        of_layer = [each[layer] for each in found]
        converged = all(each.converged for each in of_layer)
        rows[layer] = {"examples": len(found), "noise": settings.noise, "converged": converged}
        for side in ("only", "without"):
            releases = [getattr(each, side) for each in of_layer]
            rows[layer] |= with_interval(f"{side}_error_rms", [release.map_error.rms for release in releases])
            rows[layer] |= with_interval(f"{side}_undetermined", [release.undetermined for release in releases])
    return rows


def comparison(group: str, gradients: Tensor, labels: NDArray, settings: LayerSettings) -> Numbers:
    """Return how far the gradients of different attribute values lie apart, with permutation test.

    Gradients (n, p) are scaled to norm 1, so the numbers have no unit: of a trained model, a few of a large norm would
    decide. Subspaces are compared within the leading principal components of all gradients together.
    """
    gradients = unit_rows(gradients.double())
    options = {"permutations": settings.permutations, "seed": settings.seed}
    if group == "subspace":
        reduced = principal_coordinates(gradients, settings.components)
        found = sample_subspace_distance(reduced, labels, k=settings.subspace, unit_norm=True, **options)
        names = ("normalized_geodesic", "geodesic", "chordal", "max_angle", "k")
    elif group == "mean-difference":
        found, names = mean_difference(gradients, labels, **options), ("ratio", "norm")
    else:
        found, names = kernel_discrepancy(gradients, labels, **options), ("squared", "bandwidth")
    return {name: getattr(found, name) for name in names} | {"gradients": len(gradients)} | _test(found.test)


def principal_coordinates(gradients: Tensor, components: int) -> Tensor:
    """Return gradients (n, p) less their mean in their leading principal axes, (n, min(components, n, p))."""
    u, d, _ = torch.linalg.svd(gradients - gradients.mean(0), full_matrices=False)
    return (u * d)[:, :components]


def information(
    features: NDArray,
    target: NDArray,
    settings: LayerSettings,
    *,
    family: str,
    groups: Sequence[Hashable] | None,
    tested: bool,
) -> Numbers:
    """Return V-information in nats with its bootstrap interval and the usual scores, as rows hold them.

    Args:
        features: (n, p).
        target: An attribute (n,), or what is to be reconstructed (n, ...).
        settings: Folds, shuffles and seed.
        family: The predictive family.
        groups: Source of each gradient.
        tested: Whether to add the permutation test of independence. Where targets differ within a source, shuffling
            them is no null and there is no test.

    Returns:
        The columns of :class:`lmleak.leakage.VInformation` but for its pointwise values, of which ``by_value`` holds
        the mean per attribute value.
    """
    options = {"groups": groups, "seed": settings.seed}
    found = v_information(features, target, family=family, folds=settings.folds, **options)
    numbers = asdict(replace(found, pointwise=np.empty(0)))
    for name in ("pointwise", "target", "family"):  # the first is one number per gradient, the others the row's
        del numbers[name]
    for name in ("bits", "fraction", "r_squared", "nats_per_coordinate"):
        numbers[name] = getattr(found, name)
    if found.target == "latent":
        by_value = pointwise_by_class(found, target, seed=settings.seed)
        numbers["by_value"] = {str(value): {"count": part.count, "nats": part.mean, "low": part.low, "high": part.high}
                               for value, part in by_value.items()}  # fmt: skip
    if tested and _shuffles(target, groups):
        numbers |= _test(independence_test(features, target, permutations=settings.permutations, **options))
    return numbers


def _shuffles(target: NDArray, groups: Sequence[Hashable] | None) -> bool:
    if groups is None:
        return True
    _, first, of_sample = np.unique(np.asarray(groups), return_index=True, return_inverse=True)
    return np.array_equal(target[first][of_sample], target)


def _test(test: PermutationTest) -> Numbers:
    return {"z": test.z, "p_value": test.p_value, "null_mean": test.null_mean, "null_std": test.null_std,
            "permutations": test.permutations}  # fmt: skip


def with_interval(name: str, values: Sequence[float | None]) -> Numbers:
    """Return a column's mean and 95 % bootstrap interval over examples, without those where it does not exist.

    Args:
        name: The column.
        values: One number per example.

    Returns:
        ``name``, ``name_low`` and ``name_high``; the bounds are None for one example, all are None for none.
    """
    known = [value for value in values if value is not None]
    if not known:
        return {name: None, f"{name}_low": None, f"{name}_high": None}
    interval = bootstrap_mean(known)
    return {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
