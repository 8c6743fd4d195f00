"""Empirical V-information: how much of the private thing an attacker with a given set of models can use.

    H_V(Y|X) = inf_{f in V} E[-log f[X](Y)],   I_V(X -> Y) = H_V(Y|0) - H_V(Y|X)

Source: Xu et al. 2020, arXiv:2002.10689, definitions 1-3; applied to the gradient X of one layer by Mo et al. 2021,
arXiv:2105.13929. Their architectures and likelihoods are not public in detail; the estimator here is our reading.
It is a statement about the attackers in V: features of no use to them (I_V = 0) may still be of use to others.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from math import log

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import roc_auc_score

from lmleak.errors import ConfigError, DataError
from lmleak.leakage.cross_fitting import Chosen, Folds, Target, feature_matrix, make_target
from lmleak.leakage.rows import checked_values


@dataclass(frozen=True)
class VInformation:
    """Usable information of some features about a target, from held-out predictions of every sample."""

    target: str
    """"latent" (an attribute) or "original" (the input)."""
    family: str
    nats: float
    """I_V = mean of ``pointwise``. For the input, of all its coordinates together."""
    low: float
    high: float
    """Percentile bootstrap interval of ``nats`` over samples (or groups), the fitted predictors held fixed: it does
    not hold what another draw of the training samples would change."""
    confidence: float
    baseline_nats: float
    """H_V(Y|0): log-loss of the constant predictor. For the input a differential entropy, which has no zero."""
    members: tuple[str, ...]
    """The member chosen in each fold, "constant" where none was of use."""
    num_samples: int
    num_features: int
    pointwise: NDArray
    """(n,) PVI_i = log f[x_i](y_i) - log f[0](y_i) in nats (Ethayarajh et al. 2022, arXiv:2110.08420)."""
    accuracy: float | None = None
    """Latent: share of samples whose likeliest value is theirs."""
    majority_accuracy: float | None = None
    """Latent: the same of the constant predictor."""
    auc: float | None = None
    """Latent: area under the ROC curve; the mean of one against the rest for more than two values."""
    fraction_low: float | None = None
    fraction_high: float | None = None
    """Latent: the interval of ``fraction``, at most 1. Both log-losses of 1 - H_V(Y|X) / H_V(Y|0) are resampled
    together; ``low`` and ``high`` over a fixed ``baseline_nats`` could exceed 1."""
    mse: float | None = None
    """Original: mean squared error per coordinate, squared units of the input."""
    constant_mse: float | None = None
    """Original: the same of the mean input."""
    num_coordinates: int | None = None
    """Original: dx."""

    @property
    def bits(self) -> float:
        """I_V in bits."""
        return self.nats / log(2)

    @property
    def fraction(self) -> float | None:
        """Latent: I_V / H_V(Y|0), 1 where the attribute is told with certainty; None for the input."""
        return self.nats / self.baseline_nats if self.target == "latent" else None

    @property
    def r_squared(self) -> float | None:
        """Original: 1 - MSE1 / MSE0; None for an attribute."""
        return None if self.mse is None else 1 - self.mse / self.constant_mse

    @property
    def nats_per_coordinate(self) -> float | None:
        """Original: I_V / dx = log(MSE0 / MSE1) / 2; None for an attribute."""
        return None if self.num_coordinates is None else self.nats / self.num_coordinates


def v_information(
    features: ArrayLike,
    targets: ArrayLike,
    *,
    family: str = "linear",
    groups: Sequence[Hashable] | None = None,
    folds: int = 5,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> VInformation:
    """Estimate the information about a target that a family of models can use in some features.

    Latent (K values): the loss is -log q(y) of calibrated probabilities; the constant predictor is the class
    frequencies. Original (dx values): Gaussian with mean f[x] and one variance for all coordinates, fitted:
    I_V = (dx/2) log(MSE0 / MSE1), MSE over all held-out samples and coordinates; the two variances are the only
    numbers fitted on held-out samples. For linear-Gaussian X and Y with equal variances per coordinate, the linear
    family gives Shannon's information.

    Members are fitted, calibrated, chosen and tested on separate samples (``cross_fitting``); the constant predictor
    is among those chosen from (optional ignorance), so I_V is negative by chance only. A projection of the features
    is part of V. The estimate is low rather than high, and no bound for attackers: members fitted on few samples do
    worse than the best of V (``learning_curve``), and an attacker of a larger family may use more.

    True V-information is at least 0: read a negative estimate as 0. Members chosen on few samples lose to the constant
    on the test part, and the interval holds the fitted predictors fixed: it is of the attackers actually fitted, not
    of the best of V. Measured with X independent of an attribute of K = 4 values, the linear family, in two settings
    (the second p = 8): a mean of -0.054 and -0.037 nats at n = 40, the interval wholly below 0 in 15 and 17 % of
    draws; -0.005 and -0.004 nats at n = 300; and wholly above 0 in none of 120 and 160 draws.

    Args:
        features: X (n, p), one row per released gradient.
        targets: Y: (n,) integers, booleans or strings for an attribute, (n, dx) values or (n, C, H, W) images for the
            input; (n,) real numbers are one coordinate, and refused where all are whole.
        family: "constant", "linear", "forest", "mlp", "deep-mlp" or, for images, "conv-decoder"
            (``families.FAMILIES``).
        groups: (n,) the group of each sample (author, image of origin), if samples of one group resemble each other:
            groups are not divided between fitting and testing, and the bootstrap resamples groups.
        folds: K of the cross-fitting.
        confidence: Nominal coverage of the interval.
        resamples: Bootstrap resamples.
        seed: Seed of folds, members and bootstrap.

    Returns:
        The information with its interval and the usual scores. ``ConfigError`` or ``DataError`` on settings, features
        or targets that cannot be used.
    """
    target = make_target(targets)
    matrix = feature_matrix(features, len(target.values))
    division = Folds(target, folds, seed, groups)
    constant = division.constant_candidates()
    chosen = division.choose(constant, division.candidates(matrix, family))
    return information_between(
        target, division.choose(constant), chosen, family=family, num_features=matrix.shape[1],
        groups=groups, confidence=confidence, resamples=resamples, seed=seed,
    )  # fmt: skip


def information_between(
    target: Target,
    without: Chosen,
    given: Chosen,
    *,
    family: str,
    num_features: int,
    groups: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> VInformation:
    """Return what one predictor knows beyond another, both cross-fitted on the same folds.

    Args:
        target: What is predicted.
        without: The predictor that lacks the features in question; of the constant one, this is plain I_V.
        given: The predictor that has them.
        family: Its family, for the record.
        num_features: p, for the record.
        groups: As in :func:`v_information`.
        confidence: Nominal coverage of the interval.
        resamples: Bootstrap resamples.
        seed: Seed of the bootstrap.

    Returns:
        The information.

    Raises:
        ConfigError: If the confidence or the number of resamples cannot be right.
    """
    if not 0 < confidence < 1 or not isinstance(resamples, (int, np.integer)) or resamples < 1:
        raise ConfigError(
            f"expected 0 < confidence < 1 and a whole number resamples >= 1, got {confidence!r} and {resamples!r}"
        )
    weights = _bootstrap_weights(len(without.loss), groups, resamples, seed)
    ends = ((1 - confidence) / 2, (1 + confidence) / 2)
    if target.kind == "latent":
        pointwise = without.loss - given.loss
        baseline, scores = without.loss.mean(), _latent_scores(target, without, given)
        draws = weights @ pointwise
        ratios = 1 - weights @ given.loss / np.maximum(weights @ without.loss, 1e-300)
        scores |= dict(zip(("fraction_low", "fraction_high"), np.quantile(ratios, ends).tolist(), strict=True))
    else:
        dx, mse0, mse1 = target.values.shape[1], without.loss.mean(), max(given.loss.mean(), 1e-300)
        pointwise = dx / 2 * (np.log(mse0 / mse1) + without.loss / mse0 - given.loss / mse1)
        baseline = dx / 2 * (np.log(2 * np.pi * mse0) + 1)
        scores = {"mse": float(mse1), "constant_mse": float(mse0), "num_coordinates": dx}
        draws = dx / 2 * np.log(weights @ without.loss / np.maximum(weights @ given.loss, 1e-300))
    low, high = np.quantile(draws, ends)
    return VInformation(
        target=target.kind, family=family, nats=float(pointwise.mean()), low=float(low), high=float(high),
        confidence=confidence, baseline_nats=float(baseline), members=given.members, num_samples=len(pointwise),
        num_features=num_features, pointwise=pointwise, **scores,
    )  # fmt: skip


def _latent_scores(target: Target, without: Chosen, given: Chosen) -> dict[str, float]:
    guesses, baseline = (chosen.log_probabilities.argmax(1) for chosen in (given, without))
    probabilities = np.exp(given.log_probabilities)
    if probabilities.shape[1] == 2:
        auc = roc_auc_score(target.values, probabilities[:, 1])
    else:
        truth = np.eye(probabilities.shape[1])[target.values]
        auc = np.mean([roc_auc_score(t, p) for t, p in zip(truth.T, probabilities.T, strict=True)])
    return {
        "accuracy": float((guesses == target.values).mean()),
        "majority_accuracy": float((baseline == target.values).mean()),
        "auc": float(auc),
    }


def _bootstrap_weights(count: int, groups: Sequence[Hashable] | None, resamples: int, seed: int) -> NDArray:
    """Return (resamples, n) weights that sum to one, by drawing samples, or whole groups, with replacement."""
    units = np.arange(count) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    number = units.max() + 1
    drawn = np.random.default_rng(seed).multinomial(number, np.full(number, 1 / number), size=resamples)
    weights = drawn[:, units].astype(np.float64)
    return weights / weights.sum(1, keepdims=True)


def learning_curve(
    features: ArrayLike, targets: ArrayLike, sizes: Sequence[int], *, seed: int = 0, **options
) -> dict[int, VInformation]:
    """Estimate the information from fewer samples: a curve that still rises says that I_V is underestimated.

    Args:
        features: X (n, p).
        targets: Y, as in :func:`v_information`.
        sizes: Numbers of samples, each at most n; a smaller set is part of every larger one.
        seed: Seed of the choice of samples, and of everything else.
        options: Of :func:`v_information`, without groups.

    Returns:
        Size -> information.

    Raises:
        ConfigError: If there are no sizes, or one is no whole number of samples.
        DataError: If a size is larger than the number of samples.
    """
    if not len(sizes) or not all(isinstance(size, (int, np.integer)) and size >= 1 for size in sizes):
        raise ConfigError(f"sizes must be one or more numbers of samples, got {sizes!r:.80}; write [100, 200]")
    values = checked_values(targets)
    matrix = feature_matrix(features, len(values))
    order = np.random.default_rng(seed).permutation(len(values))
    if max(sizes) > len(values):
        raise DataError(f"there are {len(values)} samples, so the curve has no point at {max(sizes)}")
    return {
        int(size): v_information(matrix[order[:size]], values[order[:size]], seed=seed, **options) for size in sizes
    }


def v_information_by_layer(
    features: Mapping[str, ArrayLike], targets: ArrayLike, **options
) -> dict[str, VInformation]:
    """Return the information of every layer's features by itself, on the same folds.

    Args:
        features: Layer -> X_l (n, p_l).
        targets: Y.
        options: Of :func:`v_information`.

    Returns:
        Layer -> information.
    """
    return {layer: v_information(matrix, targets, **options) for layer, matrix in features.items()}
