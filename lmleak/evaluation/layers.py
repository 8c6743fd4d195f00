"""Which layer's gradient leaks what: every metric of every layer, from one store of released gradients.

The questions are those of Mo, Borovykh, Malekzadeh, Haddadi and Demetriou, Quantifying and Localizing Usable
Information Leakage from Gradients, arXiv:2105.13929; the definitions are our reading of its abstract, since neither
its normalisations nor its predictors are public in detail. "Original" information is about the input itself, "latent"
information about a private attribute of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lmleak.adapters import ModelAdapter, TextAdapter
from lmleak.errors import ConfigError
from lmleak.evaluation.layers_capture import audited_layers
from lmleak.evaluation.layers_examples import LabelledExamples
from lmleak.evaluation.layers_measures import (
    Numbers,
    comparison,
    influence_by_release,
    information,
    sensitivity_of_layers,
)
from lmleak.evaluation.layers_settings import ALL, GROUPS, LayerSettings, Row
from lmleak.gradients import GradientStore
from lmleak.leakage import direction_and_norm
from lmleak.leakage.families import DECODER

EXTENDED = "deep-mlp"  # what the decoder of images adds to

__all__ = ["ALL", "GROUPS", "LayerAnalysis", "LayerSettings", "Measure", "Row"]


@dataclass(frozen=True)
class Measure:
    """One piece of work: a group of metrics, of one layer unless one product serves all layers."""

    group: str
    layer: str | None = None
    target: str | None = None
    """The attribute to infer, or the original to reconstruct."""
    family: str | None = None


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
        self.chosen = self.choice(settings.gradients)

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
                    Measure(group, layer, t, f) for t in targets for f in self.families(group) for layer in whole
                ]
            else:
                found += [Measure(group, layer, t) for t in self.examples.attributes for layer in layers]
        return found

    def families(self, group: str) -> list[str]:
        """Return the families that predict a group's targets: a decoder of images stands for what it extends."""
        images = group == "original" and not isinstance(self.adapter, TextAdapter)
        usual = lambda family: EXTENDED if family == DECODER and not images else family
        return list(dict.fromkeys(map(usual, self.settings.families)))

    def rows(self, measure: Measure) -> list[Row]:
        """Return the rows of one piece of work, one per layer (and target, and family).

        They begin with ``key``, ``layer``, ``place`` (in the network, from 0), ``parameters``, ``group``, ``target``
        and ``family``; what follows depends on the group and is documented where it is computed.
        """
        s, layer = self.settings, measure.layer
        if layer is None:
            of_layers = sensitivity_of_layers if measure.group == "sensitivity" else influence_by_release
            count = s.sensitivity_examples if measure.group == "sensitivity" else s.influence_examples
            by_layer = of_layers(self.adapter, self.examples, self.layers, self.victims(count), s)
            return [self._row(measure, name, numbers) for name, numbers in by_layer.items()]
        if measure.group not in ("latent", "original"):
            rows = self._one_of_each_source(s.pairs)
            gradients, labels = self.store.features(layer, rows), self.target(measure, rows)
            return [self._row(measure, layer, comparison(measure.group, gradients, labels, s))]
        features = self.features(self.members(layer), self.chosen)
        numbers = information(
            features, self.target(measure, self.chosen), s, family=measure.family, groups=self.groups_of(self.chosen),
            tested=measure.family == self.families(measure.group)[0],
        )  # fmt: skip
        return [self._row(measure, layer, numbers)]

    def members(self, layer: str) -> list[str]:
        """Return the layers that a row's layer stands for: all of them, or itself."""
        return list(self.layers) if layer == ALL else [layer]

    def features(self, layers: Sequence[str], rows: NDArray) -> NDArray:
        """Return what predictors read of some layers of some gradients, (n, p): directions and norms, side by side."""
        return np.concatenate([direction_and_norm(self.store.features(layer, rows)) for layer in layers], axis=1)

    def target(self, measure: Measure, rows: NDArray) -> NDArray:
        """Return what a piece of work predicts, of some gradients."""
        if measure.group == "original":
            return self.store.attribute(f"original/{measure.target}", rows).numpy()
        return self.examples.attributes[measure.target][rows]

    def groups_of(self, rows: NDArray) -> NDArray | None:
        """Return the source of some gradients, if the data says."""
        return None if self.examples.groups is None else np.asarray(self.examples.groups)[rows]

    def choice(self, count: int) -> NDArray:
        """Return the numbers of at most ``count`` examples, drawn without looking at them."""
        size = self.examples.size
        if size <= count:
            return np.arange(size)
        return np.sort(np.random.default_rng(self.settings.seed).choice(size, count, replace=False))

    def _one_of_each_source(self, count: int) -> NDArray:
        """Return the numbers of at most ``count`` examples, one per source: those of one are not exchangeable."""
        if self.examples.groups is None:
            return self.choice(count)
        order = np.random.default_rng(self.settings.seed).permutation(self.examples.size)
        _, first = np.unique(np.asarray(self.examples.groups)[order], return_index=True)
        return np.sort(order[np.sort(first)[:count]])

    def victims(self, count: int) -> list[int]:
        """Return the numbers of at most ``count`` examples for what looks at single ones."""
        return self.choice(count).tolist()

    def _row(self, measure: Measure, layer: str, numbers: Numbers) -> Row:
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
