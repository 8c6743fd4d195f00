"""Pointwise V-information by class: whom the gradient gives away, and whom it hides."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from lmleak.errors import DataError
from lmleak.leakage.rows import checked_values
from lmleak.leakage.vinformation import VInformation


@dataclass(frozen=True)
class PointwiseSummary:
    """PVI of the samples of one class, in nats."""

    count: int
    mean: float
    low: float
    high: float
    """95 % percentile bootstrap interval of the mean over the samples of the class."""
    quartiles: tuple[float, float, float]
    misleading: float
    """Share of samples with PVI below 0: the attacker would do better without their gradient."""
    largest: int
    """The sample (its row) that is given away most."""


def pointwise_by_class(
    information: VInformation, classes: Sequence[Hashable], *, resamples: int = 1000, seed: int = 0
) -> dict[Hashable, PointwiseSummary]:
    """Summarise PVI_i = log f[x_i](y_i) - log f[0](y_i) per class.

    The mean over all samples is I_V, so the classes' means, weighted by their shares, sum to it. A rare class has a
    larger -log f[0](y), hence more to lose. Source: Ethayarajh et al. 2022, arXiv:2110.08420, definition 3.1; there
    the predictors are fitted on a separate set, here every sample is held out once.

    Args:
        information: Of :func:`lmleak.leakage.vinformation.v_information`.
        classes: (n,) the class of each sample, in the order of the features: the attribute itself or any other.
        resamples: Bootstrap resamples.
        seed: Seed of the bootstrap.

    Returns:
        Class -> summary, classes in sorted order.

    Raises:
        DataError: If there is not one class per sample.
    """
    labels = checked_values(classes)
    if labels.shape != information.pointwise.shape:
        raise DataError(f"expected one class per sample, {information.num_samples} of them, got {labels.shape}")
    generator = np.random.default_rng(seed)
    found = {}
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        values = information.pointwise[rows]
        means = values[generator.integers(len(values), size=(resamples, len(values)))].mean(1)
        low, high = np.quantile(means, [0.025, 0.975])
        found[label.item()] = PointwiseSummary(
            count=len(values), mean=float(values.mean()), low=float(low), high=float(high),
            quartiles=tuple(np.quantile(values, [0.25, 0.5, 0.75]).tolist()),
            misleading=float((values < 0).mean()), largest=int(rows[values.argmax()]),
        )  # fmt: skip
    return found
