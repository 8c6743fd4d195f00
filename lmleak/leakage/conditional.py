"""Conditional V-information: what a layer tells beyond other layers, and which layers to protect first.

    I_V(G_l -> Y | G_S) = H_V(Y|G_S) - H_V(Y|G_S, G_l)

Source: Hewitt et al. 2021, arXiv:2109.09234 (conditional probing). The decoder of (G_S, G_l) may also be any decoder
of G_S, so that adding a layer never harms it but by chance.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lmleak.errors import ConfigError
from lmleak.leakage.cross_fitting import Candidates, Chosen, Folds, feature_matrix, make_target
from lmleak.leakage.vinformation import VInformation, information_between
from lmleak.lookup import lookup


class _Subsets:
    """Decoders of subsets of the layers, each subset fitted once, all on the same folds."""

    def __init__(
        self,
        features: Mapping[str, ArrayLike],
        targets: ArrayLike,
        family: str,
        folds: int,
        groups: Sequence[Hashable] | None,
        seed: int,
    ):
        if not features:
            raise ConfigError("expected the features of at least one layer, got none")
        self.target, self.family = make_target(targets), family
        self.features: dict[str, NDArray] = {
            layer: feature_matrix(matrix, len(self.target.values)) for layer, matrix in features.items()
        }
        self.folds = Folds(self.target, folds, seed, groups)
        self._fitted: dict[frozenset[str], Candidates] = {frozenset(): self.folds.constant_candidates()}

    def decoder(self, layers: frozenset[str]) -> Chosen:
        """Return the best decoder of some layers, among those fitted on them or on a subset of them."""
        if layers not in self._fitted:
            joined = np.concatenate([self.features[layer] for layer in self.features if layer in layers], axis=1)
            self._fitted[layers] = self.folds.candidates(joined, self.family)
        return self.folds.choose(*(found for subset, found in self._fitted.items() if subset <= layers))

    def width(self, layers: frozenset[str]) -> int:
        """Return the number of features of some layers."""
        return sum(self.features[layer].shape[1] for layer in layers)

    def between(self, without: frozenset[str], given: frozenset[str], groups, seed: int) -> VInformation:
        """Return what ``given`` tells beyond its subset ``without``."""
        first = self.decoder(without)  # fitted before the larger one, which may then be the same
        return information_between(
            self.target, first, self.decoder(given), family=self.family, num_features=self.width(given),
            groups=groups, seed=seed,
        )  # fmt: skip


def conditional_information(
    features: Mapping[str, ArrayLike],
    targets: ArrayLike,
    layer: str,
    given: Sequence[str],
    *,
    family: str = "linear",
    groups: Sequence[Hashable] | None = None,
    folds: int = 5,
    seed: int = 0,
) -> VInformation:
    """Estimate I_V(G_l -> Y | G_S): what layer l tells an attacker who has the layers S already.

    0 for a layer whose use the others make up for, however much it tells alone; and more than it tells alone where
    layers have to be combined. Its ``baseline_nats`` is H_V(Y|G_S).

    Args:
        features: Layer -> (n, p_l).
        targets: Y, as in ``v_information``.
        layer: l.
        given: S.
        family: One of ``families.FAMILIES``; it reads the features of its layers side by side.
        groups: As in ``v_information``.
        folds: K of the cross-fitting.
        seed: Seed of folds, members and bootstrap.

    Returns:
        The information.

    Raises:
        ConfigError: If a layer has no features, or l is in S.
    """
    for name in (layer, *given):
        lookup("layer", name, dict.fromkeys(features))
    if layer in given:
        raise ConfigError(f"layer {layer!r} tells nothing beyond itself; leave it out of given={list(given)}")
    subsets = _Subsets(features, targets, family, folds, groups, seed)
    before = frozenset(given)
    return subsets.between(before, before | {layer}, groups, seed)


def information_chain(
    features: Mapping[str, ArrayLike],
    targets: ArrayLike,
    *,
    family: str = "linear",
    groups: Sequence[Hashable] | None = None,
    folds: int = 5,
    seed: int = 0,
) -> dict[str, VInformation]:
    """Estimate I_V(G_l -> Y | G_<l) for every layer, in the order given; the terms sum to I_V of all layers together.

    Args:
        features: Layer -> (n, p_l), in the order of conditioning (forward order of the network, say).
        targets: Y.
        family: One of ``families.FAMILIES``.
        groups: As in ``v_information``.
        folds: K of the cross-fitting.
        seed: Seed of folds, members and bootstrap.

    Returns:
        Layer -> information beyond the layers before it.
    """
    subsets = _Subsets(features, targets, family, folds, groups, seed)
    chain, before = {}, frozenset()
    for layer in features:
        chain[layer] = subsets.between(before, before | {layer}, groups, seed)
        before |= {layer}
    return chain


@dataclass(frozen=True)
class ProtectionStep:
    """One more layer hidden."""

    layer: str
    residual: VInformation
    """What all layers not hidden so far tell together."""


def protection_order(
    features: Mapping[str, ArrayLike],
    targets: ArrayLike,
    *,
    family: str = "linear",
    groups: Sequence[Hashable] | None = None,
    folds: int = 5,
    seed: int = 0,
) -> tuple[ProtectionStep, ...]:
    """Order layers so that hiding each next one leaves the least information in the layers still shared.

    Greedy: S_{t+1} = S_t + argmin_l I_V(G_{not S_t, not l} -> Y), equivalently the layer with the largest
    I_V(G_l -> Y | G of the other shared layers). Decisions look at the validation loss, residuals are held-out.
    Where two layers tell the same, hiding one alone gains nothing and the first steps are ties, broken by what a layer
    tells by itself: read the residuals, which stay high until the last copy is hidden, and not the order alone. (An
    order by I_V(G_l | G_hidden) would put the second copy last and call it harmless.)
    Cost: L (L + 1) / 2 cross-fits of the family for L layers.

    Args:
        features: Layer -> (n, p_l).
        targets: Y.
        family: One of ``families.FAMILIES``.
        groups: As in ``v_information``.
        folds: K of the cross-fitting.
        seed: Seed of folds, members and bootstrap.

    Returns:
        The layers in order, with the residual information after each; the last residual is 0.
    """
    subsets = _Subsets(features, targets, family, folds, groups, seed)
    alone = {layer: subsets.decoder(frozenset({layer})).validation_loss for layer in features}
    shared, order = frozenset(features), []
    while shared:
        # A larger loss of what remains is better protection; ties (equal decoders) go to the most telling layer.
        candidates = [layer for layer in features if layer in shared]
        layer = max(candidates, key=lambda name: (subsets.decoder(shared - {name}).validation_loss, -alone[name]))
        shared -= {layer}
        order.append((layer, shared))
    nothing = frozenset()
    return tuple(ProtectionStep(layer, subsets.between(nothing, left, groups, seed)) for layer, left in order)
