"""An attack as a predictive family: what its reconstructions are worth in the units of V-information.

A gradient-matching attack is a fixed procedure for one sample at a time; nothing in it is fitted to other samples. Its
output xhat_i enters the family's Gaussian as the mean m + a (xhat_i - m), m the mean input and a >= 0 a trust fitted
on held-out samples (``families.calibrate_values``), with one fitted variance. So an attack that fails has a = 0 and
tells nothing, instead of less than nothing; one that is right for some samples and lost for others, as attacks from a
random start are, is judged by its error over all. Gradient matching is named among the families of Mo et al.
(arXiv:2105.13929); the likelihood is our reading.
"""

from collections.abc import Callable, Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lmleak.errors import ConfigError, DataError
from lmleak.leakage.cross_fitting import Candidates, Folds, feature_matrix, make_target
from lmleak.leakage.vinformation import VInformation, information_between

ATTACK = "attack"


def attack_information(
    reconstructions: ArrayLike,
    inputs: ArrayLike,
    *,
    features: ArrayLike | None = None,
    family: str = "constant",
    groups: Sequence[Hashable] | None = None,
    folds: int = 5,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> VInformation:
    """Estimate the information about the input that an attack can use, alone or beside a trained family.

    I_V = (dx/2) log(MSE0 / MSE1) with V = the constant mean, the attack, and the members of ``family`` on
    ``features``: the best of them by validation loss in every fold, so adding an attack never harms but by chance.

    Args:
        reconstructions: xhat (n, dx), or shaped like the inputs: the attack's output for every sample, from that
            sample's gradient alone.
        inputs: x (n, ...), in the unit of the reconstructions.
        features: X (n, p) of the gradients, for the family.
        family: A trained family to be joined with the attack; "constant" judges the attack by itself.
        groups: As in :func:`lmleak.leakage.v_information`.
        folds: K of the cross-fitting.
        confidence: Nominal coverage of the interval.
        resamples: Bootstrap resamples.
        seed: Seed of folds, members and bootstrap.

    Returns:
        The information; ``members`` says in which folds the attack was the best.

    Raises:
        DataError: If the inputs are labels, or the reconstructions are not of their size.
        ConfigError: If a family is to be fitted without features.
    """
    target = make_target(inputs)
    if target.kind != "original":
        raise DataError("an attack reconstructs inputs, and these targets are labels; pass the inputs (n, dx)")
    recovered = feature_matrix(reconstructions, len(target.values)).astype(np.float64)
    if recovered.shape != target.values.shape:
        raise DataError(f"expected one reconstruction per input, {target.values.shape}; got {recovered.shape}")
    if features is None and family != "constant":
        raise ConfigError(f"family={family!r} needs features=, the gradients that it reads")
    division = Folds(target, folds, seed, groups)
    constant = division.constant_candidates()
    pools: list[Candidates] = [constant, division.fitted(recovered, {ATTACK: (_hand_on,)})]
    if features is not None:
        matrix = feature_matrix(features, len(target.values))
        pools.append(division.candidates(matrix, family))
    return information_between(
        target, division.choose(constant), division.choose(*pools), family=f"{family}+{ATTACK}",
        num_features=recovered.shape[1] + (0 if features is None else matrix.shape[1]),
        groups=groups, confidence=confidence, resamples=resamples, seed=seed,
    )  # fmt: skip


def _hand_on(recovered: NDArray, values: NDArray, seed: int) -> Callable[[NDArray], NDArray]:
    """Return the predictor that hands on what the attack recovered; nothing is fitted here."""
    return lambda new: new
