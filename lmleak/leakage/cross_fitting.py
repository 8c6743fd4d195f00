"""Cross-fitting: every sample is predicted by models that never saw it, nor were chosen or calibrated on it.

Each of K folds is the test part once; of the rest, three quarters fit the members and one quarter calibrates them and
chooses among them. The chosen member is then fitted anew on all of the rest, with the calibration kept.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.model_selection import KFold, StratifiedGroupKFold, StratifiedKFold

from lmleak.errors import ConfigError, DataError
from lmleak.leakage.families import (
    CLASSIFIERS,
    DECODER,
    FAMILIES,
    REGRESSORS,
    Member,
    calibrate_probabilities,
    calibrate_values,
    image_regressors,
)
from lmleak.leakage.rows import checked_values
from lmleak.lookup import lookup

VALIDATION_PARTS = 4  # one part in four of what is not tested chooses and calibrates
FEWEST_PER_CLASS = 8
FEWEST_INPUTS = 16


class LatentTarget:
    """An attribute with K values, predicted as probabilities and judged by the log-loss in nats.

    Args:
        labels: (n,) integers, booleans or strings.

    Raises:
        DataError: If there is one value only, or a value is too rare to be fitted and tested.
    """

    members, kind = CLASSIFIERS, "latent"

    def __init__(self, labels: NDArray):
        names, self.values, counts = np.unique(labels, return_inverse=True, return_counts=True)
        self.names = names.tolist()  # plain values: messages print them
        if len(self.names) < 2:
            raise DataError(f"every sample has the attribute value {self.names[0]!r}; there is nothing to infer")
        if counts.min() < FEWEST_PER_CLASS:
            raise DataError(
                f"attribute value {self.names[counts.argmin()]!r} has {counts.min()} sample(s), fewer than the "
                f"{FEWEST_PER_CLASS} that fitting, choosing and testing need; merge rare values or leave them out"
            )

    def constant(self, rows: NDArray) -> NDArray:
        """Return the class frequencies (K,) among some samples."""
        counts = np.bincount(self.values[rows], minlength=len(self.names))
        if not counts.all():
            raise DataError(
                f"attribute value {self.names[counts.argmin()]!r} occurs in too few groups to be fitted in every "
                "fold; merge rare values, take fewer folds or drop groups="
            )
        return counts / counts.sum()

    def constant_prediction(self, constant: NDArray, count: int) -> NDArray:
        """Return log-probabilities (count, K)."""
        return np.tile(np.log(constant), (count, 1))

    def loss(self, prediction: NDArray, rows: NDArray) -> NDArray:
        """Return -log q(y_i) (m,) in nats."""
        return -prediction[np.arange(len(rows)), self.values[rows]]

    def calibrated(self, raw: NDArray, rows: NDArray, constant: NDArray) -> Callable[[NDArray], NDArray]:
        """Return the calibration fitted on some samples."""
        return calibrate_probabilities(raw, self.values[rows], constant)


class OriginalTarget:
    """The input itself, predicted as values and judged by the squared error per coordinate.

    Args:
        values: (n, dx), (n,) for one coordinate, or images (n, C, H, W), which a decoder of images may then draw.

    Raises:
        DataError: If all rows are equal, not finite, or too few.
    """

    kind = "original"

    def __init__(self, values: NDArray):
        self.members = image_regressors(values.shape[1:]) if values.ndim == 4 else REGRESSORS
        self.values = values.reshape(len(values), -1).astype(np.float64)
        if not np.isfinite(self.values).all():
            raise DataError("the inputs hold NaN or Inf; expected finite numbers")
        if len(self.values) < FEWEST_INPUTS:
            raise DataError(f"got {len(self.values)} inputs; fitting, choosing and testing need {FEWEST_INPUTS}")
        if (self.values == self.values[0]).all():
            raise DataError("all inputs are equal; there is nothing to reconstruct")

    def constant(self, rows: NDArray) -> NDArray:
        """Return the mean (dx,) of some samples."""
        return self.values[rows].mean(0)

    def constant_prediction(self, constant: NDArray, count: int) -> NDArray:
        """Return the mean, for each of ``count`` samples."""
        return np.broadcast_to(constant, (count, len(constant)))

    def loss(self, prediction: NDArray, rows: NDArray) -> NDArray:
        """Return the mean squared error over coordinates (m,), in squared units of the input."""
        return np.square(self.values[rows] - prediction).mean(1)

    def calibrated(self, raw: NDArray, rows: NDArray, constant: NDArray) -> Callable[[NDArray], NDArray]:
        """Return the calibration fitted on some samples."""
        return calibrate_values(raw, self.values[rows], constant)


Target = LatentTarget | OriginalTarget


def make_target(targets: ArrayLike) -> Target:
    """Return the target: an attribute for (n,) integers, booleans or strings, values for anything else.

    Args:
        targets: The values.

    Returns:
        The target.

    Raises:
        DataError: If they are (n,) whole numbers as floats, which may be meant as either; or cannot be used.
    """
    values = checked_values(targets)
    if not values.size:
        raise DataError(f"expected one target per sample, got none (shape {values.shape})")
    if values.ndim == 1 and values.dtype.kind in "biuUS":
        return LatentTarget(values)
    if values.dtype.kind not in "biuf" or not values.ndim:
        raise DataError(
            f"expected targets (n,) of an attribute or (n, dx) numbers, got dtype {values.dtype}, shape {values.shape}"
        )
    if values.ndim == 1 and (values == np.round(values)).all():
        raise DataError(
            "got one whole number per sample, as floats: an attribute or a quantity? pass integers for an attribute "
            "(.astype(int)), or shape (n, 1) for a quantity"
        )
    return OriginalTarget(values)


@dataclass
class Candidate:
    """A predictor in one fold, by how well it does on the validation part."""

    member: str
    validation_loss: float
    """Mean loss on the validation part, each half predicted with the calibration of the other."""
    predict: Callable[[], NDArray]
    """Fits it anew on all but the test part, and predicts that."""

    @cached_property
    def prediction(self) -> NDArray:
        """Log-probabilities (m, K) or values (m, dx) on the test part; computed when it is chosen first."""
        return self.predict()


Candidates = list[list[Candidate]]
"""Per fold, the predictors to choose from."""


@dataclass(frozen=True)
class Chosen:
    """The predictor that the validation part chose in every fold."""

    loss: NDArray
    """(n,) of every sample, in its fold's test part."""
    log_probabilities: NDArray | None
    """(n, K); None for values."""
    members: tuple[str, ...]
    """Name of the chosen member per fold."""
    validation_loss: float
    """Mean over folds of the chosen member's validation loss; what decisions may look at."""


class Folds:
    """One division of the samples, shared by everything that is compared.

    Args:
        target: What is predicted.
        count: K.
        seed: Seed of the division and of the members.
        groups: (n,) samples of one group (author, image of origin) are never divided; None if all are independent.

    Raises:
        ConfigError: If K is below 2.
        DataError: If there are too few groups, or not one per sample.
    """

    def __init__(self, target: Target, count: int, seed: int, groups: Sequence[Hashable] | None = None):
        if not isinstance(count, (int, np.integer)) or not 2 <= count <= len(target.values):
            raise ConfigError(
                f"folds must be a whole number from 2 to the {len(target.values)} samples, got {count!r}"
            )
        self.target, self.seed = target, seed
        self.groups = None if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
        if groups is not None and len(groups) != len(target.values):
            raise DataError(f"expected one group per sample, {len(target.values)} of them, got {len(groups)}")
        everything = np.arange(len(target.values))
        self.parts: list[tuple[NDArray, NDArray, NDArray]] = []
        for rest, test in self._split(everything, count):
            train, validation = next(iter(self._split(rest, VALIDATION_PARTS)))
            target.constant(rest[train])  # refuses a part in which a value is missing
            self.parts.append((rest[train], rest[validation], everything[test]))
        self.constants = [target.constant(np.concatenate([train, held])) for train, held, _ in self.parts]

    def _split(self, rows: NDArray, count: int) -> Iterator[tuple[NDArray, NDArray]]:
        """Return positions in ``rows`` of the larger and the smaller part; classes keep their shares in both."""
        options = {"n_splits": count, "shuffle": True, "random_state": self.seed}
        latent = self.target.kind == "latent"
        if self.groups is None:
            labels = self.target.values[rows] if latent else None
            return (StratifiedKFold(**options) if latent else KFold(**options)).split(rows, labels)
        groups = self.groups[rows]
        if len(np.unique(groups)) < count:
            raise DataError(
                f"{len(np.unique(groups))} group(s) cannot be divided into {count} parts; take fewer folds"
            )
        if latent:
            return StratifiedGroupKFold(**options).split(rows, self.target.values[rows], groups)
        kinds = np.unique(groups)
        parts = (np.isin(groups, kinds[smaller]) for _, smaller in KFold(**options).split(kinds))
        return ((np.flatnonzero(~part), np.flatnonzero(part)) for part in parts)

    def constant_candidates(self) -> Candidates:
        """Return the predictor that ignores everything, per fold."""
        found = []
        for (_, held, test), constant in zip(self.parts, self.constants, strict=True):
            predict = partial(self.target.constant_prediction, constant)
            loss = self.target.loss(predict(len(held)), held).mean()
            found.append([Candidate("constant", float(loss), partial(predict, len(test)))])
        return found

    def candidates(self, features: NDArray, family: str) -> Candidates:
        """Fit every member of a family on some features, in every fold.

        Args:
            features: (n, p).
            family: One of ``FAMILIES``.

        Returns:
            The predictors, without the constant one.

        Raises:
            ConfigError: If the family draws images and the target is none.
        """
        size = lookup("family", family, FAMILIES)
        if family == DECODER and DECODER not in self.target.members:
            raise ConfigError(
                f"family {DECODER!r} draws images, and these targets have no image shape; pass images as "
                "(n, C, H, W), or write family='deep-mlp'"
            )
        return self.fitted(features, dict(list(self.target.members.items())[:size]))

    def fitted(self, features: NDArray, members: Mapping[str, tuple[Member, ...]]) -> Candidates:
        """Fit given members on some features, in every fold; see :meth:`candidates`."""
        return [
            [self._fit(name, fit, features, fold) for name, fits in members.items() for fit in fits]
            for fold in range(len(self.parts))
        ]

    def _fit(self, name: str, fit: Member, features: NDArray, fold: int) -> Candidate:
        target, (train, held, test), constant = self.target, self.parts[fold], self.constants[fold]
        raw = fit(features[train], target.values[train], self.seed)(features[held])
        order = np.random.default_rng(self.seed).permutation(len(held))
        halves = (order[::2], order[1::2])
        losses = [
            target.loss(target.calibrated(raw[one], held[one], constant)(raw[other]), held[other])
            for one, other in (halves, halves[::-1])
        ]
        loss, calibration = np.concatenate(losses).mean(), target.calibrated(raw, held, constant)

        def predict() -> NDArray:
            rest = np.concatenate([train, held])
            return calibration(fit(features[rest], target.values[rest], self.seed)(features[test]))

        return Candidate(name, float(loss), predict)

    def choose(self, *candidates: Candidates) -> Chosen:
        """Take the candidate of smallest validation loss in every fold; of equal ones the first."""
        pools = [[c for pool in fold for c in pool] for fold in zip(*candidates, strict=True)]
        best = [min(pool, key=lambda c: c.validation_loss) for pool in pools]
        tests = [test for _, _, test in self.parts]
        order = np.argsort(np.concatenate(tests))
        losses = [self.target.loss(c.prediction, test) for c, test in zip(best, tests, strict=True)]
        latent = self.target.kind == "latent"
        return Chosen(
            loss=np.concatenate(losses)[order],
            log_probabilities=np.concatenate([c.prediction for c in best])[order] if latent else None,
            members=tuple(c.member for c in best),
            validation_loss=float(np.mean([c.validation_loss for c in best])),
        )


def feature_matrix(features: ArrayLike, count: int) -> NDArray:
    """Return features as (n, p) numbers.

    Args:
        features: (n, ...) array or tensor on the CPU.
        count: n.

    Returns:
        The matrix.

    Raises:
        DataError: If they are not n rows of finite numbers.
    """
    matrix = np.asarray(features)
    if matrix.ndim < 2 or len(matrix) != count or not matrix.size:
        raise DataError(f"expected features (n, p) with n = {count} rows as there are targets, got {matrix.shape}")
    if matrix.dtype.kind not in "biuf":
        raise DataError(f"expected features of real numbers, got dtype {matrix.dtype}")
    if not np.isfinite(matrix).all():
        raise DataError("the features hold NaN or Inf; expected finite numbers")
    return matrix.reshape(count, -1)
