"""Which layer's gradient leaks what: every metric of every layer, from one store of released gradients.

The questions are those of Mo, Borovykh, Malekzadeh, Haddadi and Demetriou, Quantifying and Localizing Usable
Information Leakage from Gradients, arXiv:2105.13929; the definitions are our reading of its abstract, since neither
its normalisations nor its predictors are public in detail. "Original" information is about the input itself, "latent"
information about a private attribute of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmleak.adapters import ModelAdapter, TextAdapter
from lmleak.errors import ConfigError
from lmleak.evaluation.layers_capture import CaptureSettings, audited_layers, release_rows
from lmleak.evaluation.layers_examples import LabelledExamples
from lmleak.gradients import GradientStore, capture_gradient
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
from lmleak.leakage.families import DECODER, FAMILIES
from lmleak.leakage.independence import independence_test
from lmleak.lookup import lookup
from lmleak.metrics.agreement import bootstrap_mean

GROUPS = ("sensitivity", "influence", "subspace", "mean-difference", "discrepancy", "latent", "original")
"""The groups of metrics, in the order in which they are measured."""
ALL = "all layers"
"""Stands for the whole shared gradient in the rows of latent and original information."""
Row = dict[str, Any]


@dataclass(frozen=True)
class LayerSettings:
    """What is measured of every layer."""

    capture: CaptureSettings = field(default_factory=CaptureSettings)
    """How gradients are released and kept."""
    groups: tuple[str, ...] = GROUPS
    """Which groups of metrics."""
    families: tuple[str, ...] = ("linear",)
    """Predictive families of the V-information, smaller ones first."""
    folds: int = 5
    """Parts of the cross-fitting."""
    permutations: int = 200
    """Shuffles of every permutation test."""
    subspace: int | float = 8
    """Dimensions of a value's gradient subspace, or the share of energy they keep."""
    gradients: int = 5000
    """Most gradients that V-information is estimated from; of more, a random choice."""
    components: int = 64
    """Principal components of all gradients in which subspaces are compared; the attribute does not enter them."""
    pairs: int = 600
    """Most gradients that are compared in pairs (subspace distance, mean difference, MMD)."""
    sensitivity_examples: int = 16
    """Examples whose Jacobians are measured."""
    probes: int = 16
    """Random directions per Jacobian with more than 256 coordinates."""
    influence_examples: int = 4
    """Examples whose layer-wise I2F is solved for."""
    noise: float = 0.1
    """sigma of the layer-wise I2F, in multiples of the gradient's root mean square."""
    tolerance: float = 1e-3
    """Relative residual of its solves."""
    max_products: int = 200
    """Most products per solve; an unconverged number is marked."""
    seed: int = 0
    """Seed of choices, folds, shuffles and probes."""

    def __post_init__(self):
        for group in self.groups:
            lookup("group of metrics", group, dict.fromkeys(GROUPS))
        for family in self.families:
            lookup("family", family, FAMILIES)
        for name in ("gradients", "pairs", "sensitivity_examples", "influence_examples", "max_products"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.noise > 0:
            raise ConfigError(f"noise must be positive, got {self.noise!r}: without noise the MAP error ranks nothing")


@dataclass(frozen=True)
class Measure:
    """One piece of work: a group of metrics, of one layer unless one product serves all layers."""

    group: str
    layer: str | None = None
    target: str | None = None
    """The attribute to infer, or the original to reconstruct."""
    family: str | None = None


def layer_table(
    adapter: ModelAdapter, examples: LabelledExamples, store: GradientStore, settings: LayerSettings
) -> list[Row]:
    """Return every metric of every layer, one row per layer and group of metrics (and target, and family).

    Args:
        adapter: The model.
        examples: The data, whose attributes are inferred.
        store: Its released gradients (:func:`lmleak.evaluation.layers_capture.capture_store`).
        settings: What is measured.

    Returns:
        Rows that begin with ``key``, ``layer``, ``place`` (in the network, from 0), ``parameters``, ``group``,
        ``target`` and ``family``; what follows depends on the group and is documented where it is computed.
    """
    analysis = LayerAnalysis(adapter, examples, store, settings)
    return [row for measure in analysis.measures() for row in analysis.rows(measure)]


class LayerAnalysis:
    """The metrics of one data set's gradients; each :class:`Measure` depends on itself and the settings alone.

    Args:
        adapter: The model.
        examples: The data.
        store: Its released gradients.
        settings: What is measured.
    """

    def __init__(
        self, adapter: ModelAdapter, examples: LabelledExamples, store: GradientStore, settings: LayerSettings
    ):
        if len(store) != examples.size:
            raise ConfigError(f"{store.path} holds {len(store)} gradients, {examples.name} {examples.size} examples")
        self.adapter, self.examples, self.store, self.settings = adapter, examples, store, settings
        self.layers = audited_layers(adapter, settings.capture)
        parameters = adapter.parameters()
        self.parameters = {n: sum(parameters[p].numel() for p in names) for n, names in self.layers.items()}
        self.chosen = self._choice(settings.gradients)

    def measures(self) -> list[Measure]:
        """Return all pieces of work."""
        found, layers = [], list(self.layers)
        for group in self.settings.groups:
            if group in ("sensitivity", "influence"):
                found.append(Measure(group))
            elif group in ("latent", "original"):
                targets = self.examples.attributes if group == "latent" else self.examples.originals
                whole = [*layers, ALL] if len(layers) > 1 else layers
                found += [
                    Measure(group, layer, t, f) for t in targets for f in self._families(group) for layer in whole
                ]
            else:
                found += [Measure(group, layer, t) for t in self.examples.attributes for layer in layers]
        return found

    def _families(self, group: str) -> list[str]:
        """Return the families that can predict a group's targets: a decoder of images only images."""
        images = group == "original" and not isinstance(self.adapter, TextAdapter)
        return [family for family in self.settings.families if images or family != DECODER]

    def rows(self, measure: Measure) -> list[Row]:
        """Return the rows of one piece of work."""
        if measure.layer is None:
            by_layer = self._sensitivity() if measure.group == "sensitivity" else self._influence()
            return [self._row(measure, layer, numbers) for layer, numbers in by_layer.items()]
        if measure.group in ("latent", "original"):
            return [self._row(measure, measure.layer, self._information(measure))]
        return [self._row(measure, measure.layer, self._comparison(measure))]

    def features(self, layers: Sequence[str], rows: NDArray) -> NDArray:
        """Return the stored features of some layers side by side, (n, p), of some gradients."""
        return np.concatenate([self.store.features(layer, rows).numpy() for layer in layers], axis=1)

    def target(self, measure: Measure, rows: NDArray) -> NDArray:
        """Return what a piece of work predicts, of some gradients."""
        if measure.group == "original":
            return self.store.attribute(f"original/{measure.target}", rows).numpy()
        return self.examples.attributes[measure.target][rows]

    def groups_of(self, rows: NDArray) -> NDArray | None:
        """Return the source of some gradients, if the data says."""
        return None if self.examples.groups is None else np.asarray(self.examples.groups)[rows]

    def victims(self, count: int) -> list[int]:
        """Return the numbers of at most ``count`` examples for what looks at single ones."""
        return self._choice(count).tolist()

    def _row(self, measure: Measure, layer: str, numbers: Row) -> Row:
        names = list(self.layers)
        return {
            "key": "|".join(filter(None, (layer, measure.group, measure.target, measure.family))),
            "layer": layer,
            "place": names.index(layer) if layer in names else len(names),
            "parameters": self.parameters.get(layer, sum(self.parameters.values())),
            "group": measure.group,
            "target": measure.target,
            "family": measure.family,
        } | numbers

    def _choice(self, count: int) -> NDArray:
        """Return the numbers of at most ``count`` examples, drawn without looking at them."""
        size = self.examples.size
        if size <= count:
            return np.arange(size)
        return np.sort(np.random.default_rng(self.settings.seed).choice(size, count, replace=False))

    def _jacobian(self, victim: int):
        """Return J of the gradient that holds a victim, and the batch; of the gradient before any defense."""
        sharing = self.settings.capture.sharing
        batch = self.examples.batch(release_rows(self.examples, victim, self.settings.capture))
        if sharing.aggregation.steps > 1:
            return UpdateJacobian(self.adapter, batch, sharing.aggregation, shared=sharing.shared), batch
        return GradientJacobian(self.adapter, batch, shared=sharing.shared), batch

    def _sensitivity(self) -> dict[str, Row]:
        """Return norms of J_l = d g_l / d x_victim, means over examples with 95 % bootstrap intervals over them.

        Units: ``frobenius`` and ``per_element`` gradient per input; ``relative``, ``share``, ``cumulative`` none. Of
        the gradient before any defense, with dropout off.
        """
        s, found = self.settings, []
        for victim in self.victims(s.sensitivity_examples):
            jacobian, batch = self._jacobian(victim)
            sharing = s.capture.sharing
            gradient = capture_gradient(
                self.adapter, batch, shared=sharing.shared, aggregation=sharing.aggregation
            ).gradient
            found.append(input_sensitivity(
                jacobian, self.layers, gradient=gradient, rows=[0], num_probes=s.probes, seed=s.seed
            ))  # fmt: skip
        rows = {}
        for layer in self.layers:
            of_layer = [each.layers[layer] for each in found]
            rows[layer] = {
                "examples": len(found), "exact": all(each.exact for each in found),
                "probes": 0 if all(each.exact for each in found) else s.probes,
            }  # fmt: skip
            for name in ("frobenius", "per_element", "relative", "share", "cumulative"):
                rows[layer] |= _mean(name, [getattr(each, name) for each in of_layer])
            # of the mean over examples: their probes are independent but for the seed, so errors add in quadrature
            errors = np.array([each.frobenius_std_error for each in of_layer])
            rows[layer]["frobenius_probe_error"] = float(np.sqrt(np.square(errors).sum()) / len(errors))
        return rows

    def _influence(self) -> dict[str, Row]:
        """Return I2F of each layer released alone, and of all layers but it; rms per coordinate, units of x.

        ``only_*``: the error of the attacker with the Gaussian prior who has this layer's noisy gradient and nothing
        else, so small means that the layer leaks by itself; ``without_*``: who has all but this layer's, so large
        means that hiding it protects. sigma is ``noise`` times the root mean square of the whole shared gradient.
        """
        s, found = self.settings, []
        for victim in self.victims(s.influence_examples):
            batch = self.examples.batch([victim])
            shared = s.capture.sharing.shared
            std = s.noise * capture_gradient(self.adapter, batch, shared=shared).rms
            found.append(influence_of_layers(
                self.adapter, batch, noise_std=std, shared=shared, layers=self.layers, seed=s.seed,
                tol=s.tolerance, max_products=s.max_products,
            ))  # fmt: skip
        rows = {}
        for layer in self.layers:
            of_layer = [each[layer] for each in found]
            rows[layer] = {"examples": len(found), "noise": s.noise, "converged": all(e.converged for e in of_layer)}
            for side in ("only", "without"):
                releases = [getattr(each, side) for each in of_layer]
                rows[layer] |= _mean(f"{side}_error_rms", [r.map_error.rms for r in releases])
                rows[layer] |= _mean(f"{side}_undetermined", [r.undetermined for r in releases])
        return rows

    def _comparison(self, measure: Measure) -> Row:
        """Return how far the gradients of different attribute values lie apart, with permutation test."""
        s, rows = self.settings, self._choice(self.settings.pairs)
        gradients, labels = self.store.features(measure.layer, rows), self.target(measure, rows)
        options = {"permutations": s.permutations, "seed": s.seed}
        if measure.group == "subspace":
            reduced = principal_coordinates(gradients, s.components)
            found = sample_subspace_distance(reduced, labels, k=s.subspace, unit_norm=True, **options)
            numbers = {"normalized_geodesic": found.normalized_geodesic, "geodesic": found.geodesic,
                       "chordal": found.chordal, "max_angle": found.max_angle, "k": found.k}  # fmt: skip
        elif measure.group == "mean-difference":
            found = mean_difference(gradients, labels, **options)
            numbers = {"ratio": found.ratio, "norm": found.norm}
        else:
            found = kernel_discrepancy(gradients, labels, **options)
            numbers = {"squared": found.squared, "bandwidth": found.bandwidth}
        return numbers | {"gradients": len(rows)} | _test(found.test)

    def _information(self, measure: Measure) -> Row:
        """Return V-information in nats with its bootstrap interval, the usual scores, and an independence test.

        The test is of the linear family, once per layer and target, in the rows of the first family.
        """
        s, rows = self.settings, self.chosen
        layers = list(self.layers) if measure.layer == ALL else [measure.layer]
        features, target = self.features(layers, rows), self.target(measure, rows)
        options = {"folds": s.folds, "groups": self.groups_of(rows), "seed": s.seed}
        found = v_information(features, target, family=measure.family, **options)
        numbers = asdict(replace(found, pointwise=np.empty(0)))
        for name in ("pointwise", "target", "family"):  # the first is one number per gradient, the others the row's
            del numbers[name]
        numbers |= {"bits": found.bits, "fraction": found.fraction, "r_squared": found.r_squared,
                    "nats_per_coordinate": found.nats_per_coordinate}  # fmt: skip
        if measure.group == "latent":
            by_value = pointwise_by_class(found, target, seed=s.seed)
            numbers["by_value"] = {str(v): {"count": b.count, "nats": b.mean, "low": b.low, "high": b.high}
                                   for v, b in by_value.items()}  # fmt: skip
        if measure.family == self._families(measure.group)[0] and _shuffles(target, options["groups"]):
            numbers |= _test(independence_test(
                features, target, groups=options["groups"], permutations=s.permutations, seed=s.seed
            ))  # fmt: skip
        return numbers


def principal_coordinates(gradients: Tensor, components: int) -> Tensor:
    """Return gradients (n, p) less their mean in their leading principal axes, (n, min(components, n, p)) float64."""
    centred = gradients.double() - gradients.double().mean(0)
    u, d, _ = torch.linalg.svd(centred, full_matrices=False)
    return (u * d)[:, :components]


def _shuffles(target: NDArray, groups: NDArray | None) -> bool:
    """Return whether shuffling targets is a null: where they differ within a source, there is none."""
    if groups is None:
        return True
    _, first, of_sample = np.unique(groups, return_index=True, return_inverse=True)
    return np.array_equal(target[first][of_sample], target)


def _test(test) -> Row:
    return {"z": test.z, "p_value": test.p_value, "null_mean": test.null_mean, "null_std": test.null_std,
            "permutations": test.permutations}  # fmt: skip


def _mean(name: str, values: Sequence[float | None]) -> Mapping[str, float | None]:
    """Return mean and interval over examples; without those where the number does not exist."""
    known = [value for value in values if value is not None]
    if not known:
        return {name: None, f"{name}_low": None, f"{name}_high": None}
    interval = bootstrap_mean(known)
    return {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
