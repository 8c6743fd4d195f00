"""What the studies of I2F on images measure of one image's release: predictions, and attackers who start at the truth.

Every length is a root mean square per coordinate of x (normalised pixels), the unit of an attack's RMSE: I2F and its
bounds divided by sqrt(dx) (Zhang et al. 2023, arXiv:2309.13016, plot the undivided I_lb beside RMSE).
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from image_study_parts import UNDAMPED, TruthCurvature
from torch import Tensor

from lmleak.attacks.image_base import ImageProblem
from lmleak.attacks.image_newton_steps import levenberg_marquardt
from lmleak.defenses import Release
from lmleak.evaluation.image_study import ImageStudy
from lmleak.influence import EigenDirections, GradientJacobian, eigen_directions
from lmleak.types import Batch

CURVATURES = {"own": False, "truth": True}
"""Where attackers who start at the truth take J J^T from: each iterate, or the truth."""


def linearized(study: ImageStudy, batch: Batch, *, largest: int | None = None) -> EigenDirections:
    """Return the exact spectrum of A at a batch; dx up to a few thousand, J as a matrix up to ``largest`` numbers."""
    return eigen_directions(GradientJacobian(study.adapter, batch, shared=study.shared), largest=largest)


def predictions(
    directions: EigenDirections,
    study: ImageStudy,
    batch: Batch,
    perturbation: Mapping[str, Tensor],
    noise_std: float,
    dampings: Sequence[float] = (),
) -> dict:
    """Return what theory says of the error under one draw of Gaussian noise delta of deviation sigma.

    With d = sigma^2 / tau^2 the attacker of maximal posterior probability errs, to first order, by
    (A + d I)^-1 (J delta - d (x - mu)): a response to the noise, which falls again where noise drowns the gradient,
    and what shrinking to the prior's mean loses, which is all of x - mu then.

    Args:
        directions: Spectrum of A at the batch.
        study: The model and its prior N(mu, tau^2 I).
        batch: The private batch.
        perturbation: delta.
        noise_std: sigma.
        dampings: Values of eps for I_eps = ||(A + eps I)^-1 J delta||.

    Returns:
        ``lower_bound_rms`` I_lb, ``influence_rms`` I2F (pseudo-inverse), ``damped_rms`` I_eps per eps,
        ``map_response_rms`` I_eps at eps = ``map_damping`` = d, ``map_rms`` with the shrinking, ``bayes_rms`` its
        average over noise and images of the prior, and the spectrum's ends and rank.
    """
    jacobian, prior = directions.jacobian, study.adapter.prior()
    root = math.sqrt(directions.dx)
    damping = (noise_std * jacobian.perturbation_scale / prior.std) ** 2

    def influence(eps: float) -> Tensor:
        return jacobian.flatten(directions.influence(perturbation, damping=eps)).double()

    x = study.adapter.input(batch)
    deviation = directions.vectors.T @ jacobian.flatten(x - prior.mean.to(x)).double()
    shrinkage = directions.vectors @ (deviation * damping / (directions.values + damping))
    response = influence(damping)
    along = jacobian.flatten(jacobian.matvec(perturbation)).double() * jacobian.perturbation_scale
    return {
        "noise_std": noise_std,
        "lower_bound_rms": (along.norm() / directions.values[0]).item() / root,
        "influence_rms": influence(0.0).norm().item() / root,
        "damped_rms": {f"{eps:g}": influence(eps).norm().item() / root for eps in dampings},
        "map_damping": damping,
        "map_response_rms": response.norm().item() / root,
        "map_rms": (response - shrinkage).norm().item() / root,
        "bayes_rms": directions.bayes_error(noise_std, prior.std).rms,
        "lambda_max": directions.values[0].item(),
        "lambda_min": directions.values[-1].item(),
        "rank": directions.rank,
        "dx": directions.dx,
    }


def local_rmse(
    study: ImageStudy,
    batch: Batch,
    release: Release,
    *,
    prior_weight: float,
    iterations: int,
    directions: EigenDirections | None = None,
) -> float:
    """Return the RMSE of a Levenberg-Marquardt attacker who starts at the truth: what is left if no search fails.

    Args:
        study: The model.
        batch: The truth.
        release: What the server received.
        prior_weight: sigma^2 / tau^2 for the attacker of maximal posterior probability, 0 for the nearest gradient.
        iterations: Most steps.
        directions: Steps by this spectrum (:class:`TruthCurvature`), for thousands of unknowns; each by its own if
            None.

    Returns:
        The root mean square error per pixel, in normalised pixels.
    """
    observation = release.shared.observation(lengths=False, labels=True)
    problem = ImageProblem(study.adapter, observation, observation.labels)
    truth = study.adapter.input(batch)
    steps = {} if directions is None else {
        "solver": partial(TruthCurvature, directions=directions), "damping": UNDAMPED
    }  # fmt: skip
    found = levenberg_marquardt(problem, truth, prior_weight=prior_weight, iterations=iterations, **steps)
    return torch.linalg.vector_norm((found.images - truth).double()).item() / math.sqrt(truth.numel())
