"""Predictive families: the nested sets of attack models that define how much information is usable.

constant < linear < forest < mlp < deep-mlp < conv-decoder. Every family holds all members of the smaller ones, so
that usable information grows with the family as far as the selection among its members is right. Members read features
standardised on the part they are fitted on.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
from numpy.typing import NDArray
from sklearn import config_context
from sklearn.decomposition import PCA
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lmleak.leakage.families_decoder import fit_decoder

Predictor = Callable[[NDArray], NDArray]
"""Features (m, p) -> probabilities (m, K), or values (m, dx)."""
Member = Callable[[NDArray, NDArray, int], Predictor]
"""(features (n, p), targets, seed) -> fitted predictor."""

TREES = 100
FOREST_TARGETS = 32  # principal components of the inputs that a forest predicts: its cost grows with each
LOGISTIC_STRENGTHS = (1e-3, 1e-1, 10.0)  # C: inverse weight of the squared norm, on standardised features
RIDGE_STRENGTHS = np.logspace(-2, 6, 9)


@contextmanager
def _quick() -> Iterator[None]:
    """Fit without checks that were made before, and without complaints of members that stop early.

    A member that stops before it has converged is a weaker one; the selection sees how weak.
    """
    with warnings.catch_warnings(), config_context(assume_finite=True, skip_parameter_validation=True):
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


def _classifier(make: Callable[[int], object]) -> Member:
    def fit(features: NDArray, labels: NDArray, seed: int) -> Predictor:
        model = make_pipeline(StandardScaler(), make(seed))
        with _quick():
            model.fit(features, labels)
        return model.predict_proba

    return fit


def _regressor(make: Callable[[int], object], components: int | None = None) -> Member:
    def fit(features: NDArray, values: NDArray, seed: int) -> Predictor:
        mean, scale = values.mean(0), values.std() or 1.0
        scaled, expand = (values - mean) / scale, lambda predicted: predicted
        if components is not None and components < min(values.shape):
            reduce = PCA(components, svd_solver="randomized", random_state=seed).fit(scaled)
            scaled, expand = reduce.transform(scaled), reduce.inverse_transform
        model = make_pipeline(StandardScaler(), make(seed))
        with _quick():
            model.fit(features, scaled if scaled.shape[1] > 1 else scaled[:, 0])
        return lambda new: mean + scale * expand(model.predict(new).reshape(len(new), scaled.shape[1]))

    return fit


def _network(model_class: type, widths: tuple[int, ...]) -> Callable[[int], object]:
    options = {"early_stopping": True, "n_iter_no_change": 20, "max_iter": 300}
    return lambda seed: model_class(hidden_layer_sizes=widths, random_state=seed, **options)


# member -> its variants; all are fitted, and the selection takes one
CLASSIFIERS: dict[str, tuple[Member, ...]] = {
    "logistic": tuple(
        _classifier(lambda seed, c=c: LogisticRegression(C=c, max_iter=500, random_state=seed))
        for c in LOGISTIC_STRENGTHS
    ),
    "forest": (_classifier(lambda seed: RandomForestClassifier(TREES, random_state=seed)),),
    "mlp-1x256": (_classifier(_network(MLPClassifier, (256,))),),
    "mlp-3x512": (_classifier(_network(MLPClassifier, (512, 512, 512))),),
}
REGRESSORS: dict[str, tuple[Member, ...]] = {
    "ridge": (_regressor(lambda seed: RidgeCV(RIDGE_STRENGTHS)),),  # chooses its strength by leaving one out
    "forest": (
        _regressor(lambda seed: RandomForestRegressor(TREES, max_features="sqrt", random_state=seed), FOREST_TARGETS),
    ),
    "mlp-1x256": (_regressor(_network(MLPRegressor, (256,))),),
    "mlp-3x512": (_regressor(_network(MLPRegressor, (512, 512, 512))),),
}
DECODER = "conv-decoder"
FAMILIES: dict[str, int] = {"constant": 0, "linear": 1, "forest": 2, "mlp": 3, "deep-mlp": 4, DECODER: 5}
"""Family -> how many of the members above it holds, in order; the constant predictor is in each. The last one holds a
convolutional decoder too, and is for images only (:func:`image_regressors`)."""


def image_regressors(image_shape: tuple[int, int, int]) -> dict[str, tuple[Member, ...]]:
    """Return the members that reconstruct images: ``REGRESSORS`` and the convolutional decoder.

    Args:
        image_shape: (C, H, W) of the images, which are handed over flattened.

    Returns:
        The members in order of size.
    """
    return REGRESSORS | {DECODER: (partial(fit_decoder, image_shape=image_shape),)}


def calibrate_probabilities(probabilities: NDArray, labels: NDArray, prior: NDArray) -> Callable[[NDArray], NDArray]:
    """Fit the two numbers that make predicted probabilities honest, and return the log-probabilities they give.

    q = (1 - w) softmax(a log p) + w prior, with sharpness a (an inverse temperature; Guo et al. 2017,
    arXiv:1706.04599) and weight w of the constant predictor, by the smallest mean log-loss over a grid. w >= 1/(m + 2)
    bounds the loss of a sure mistake by what m samples can tell (Laplace's rule); w = 1 ignores the features, so the
    calibrated member satisfies optional ignorance.

    Args:
        probabilities: (m, K) of held-out samples.
        labels: (m,) their classes.
        prior: (K,) class frequencies.

    Returns:
        Probabilities (m', K) -> log q (m', K) in nats.
    """
    sharpness = np.logspace(-1, 1, 17)
    weights = np.geomspace(1 / (len(labels) + 2), 1, 25)

    def softened(p: NDArray, a: float) -> NDArray:
        scaled = a * np.log(np.clip(p, 1e-12, None))
        scaled = np.exp(scaled - scaled.max(1, keepdims=True))
        return scaled / scaled.sum(1, keepdims=True)

    rows = np.arange(len(labels))
    of_truth = np.stack([softened(probabilities, a)[rows, labels] for a in sharpness])  # (A, m)
    mixed = (1 - weights[:, None, None]) * of_truth + weights[:, None, None] * prior[labels]  # (W, A, m)
    best_w, best_a = np.unravel_index(np.log(mixed).mean(-1).argmax(), mixed.shape[:2])
    w, a = weights[best_w], sharpness[best_a]
    return lambda new: np.log((1 - w) * softened(new, a) + w * prior)


def calibrate_values(values: NDArray, truth: NDArray, mean: NDArray) -> Callable[[NDArray], NDArray]:
    """Fit how far predicted values are to be trusted: y = mean + a (f - mean), a >= 0 by least squares.

    a = 0 ignores the features, so the calibrated member satisfies optional ignorance.

    Args:
        values: (m, dx) predicted for held-out samples.
        truth: (m, dx).
        mean: (dx,) the best constant.

    Returns:
        Values -> values.
    """
    away = values - mean
    a = max(0.0, float((away * (truth - mean)).sum() / max(np.square(away).sum(), 1e-300)))
    return lambda new: mean + a * (new - mean)
