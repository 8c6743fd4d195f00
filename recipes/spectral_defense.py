"""Is noise shaped to the directions where the attacker is weakest better than isotropic noise?

Three defenses of single-example gradients, all of expected norm ``level`` times the gradient's:
  isotropic       Gaussian noise of equal variance on every coordinate
  spectral        along the right singular vectors of J, at the levels that maximise the error of an attacker who
                  linearises g and knows the levels (``lmleak.influence.spectral_noise``)
  spectral-floor  half of the squared norm each way
judged twice, on the same releases:
- leakage of the untrained model, whose J is better conditioned than a trained one's. Attackers that assume
  isotropic noise (dlg, gs, gauss-newton with the prior weight of isotropic noise); gauss-newton-row, with the weight
  of noise inside the row space; whitened, the best estimate by the exact linearisation at the truth and the true
  levels, which no real attacker has; and row-space (spectral_attackers.py), which knows only *where* the noise lies.
- accuracy after a short training by such gradients, over several seeds.
Releases are rounded to float32, as they are sent; attackers compute in the settings' precision.

    accelerate launch --config_file configs/accelerate/cpu1.yaml recipes/spectral_defense.py
        --config configs/spectral_defense/digits.yaml

(one line). A killed run continues where it stopped. One process or several give the same rows.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from private_training import FlatGradients, Split, accuracy, generator_of, splits, train
from spectral_attackers import RowSpaceAttack
from spectral_report import write_report
from torch import Tensor

from lmleak.adapters import VisionAdapter
from lmleak.adapters.targets import IMAGE_TASK
from lmleak.attacks import Attack, make_attack
from lmleak.config import check_counts, check_positive, parse_config
from lmleak.defenses import GaussianNoise, Release
from lmleak.errors import ConfigError
from lmleak.evaluation import exit_status, finish, process_state, run_items
from lmleak.evaluation.image_attack import kept_images, scored_image_attack
from lmleak.evaluation.image_study import ImageStudy, ImageStudyConfig, image_study, study_folder, study_images
from lmleak.gradients import SharedGradient, capture_gradient
from lmleak.influence import EigenDirections, GradientJacobian, SpectralNoise, eigen_directions, spectral_noise
from lmleak.influence.directions import posterior_variances
from lmleak.metrics import score_images
from lmleak.types import AttackCost, Batch, ImageReconstruction

DEFENSES = {"isotropic": 0.0, "spectral": 1.0, "spectral-floor": 0.5}
"""Name to the share of the squared norm that is shaped."""
PRIOR_STD = 1.0  # of normalised pixels
SPLIT, DRAWS, NOISE = range(3)  # independent random streams


@dataclass(frozen=True)
class SpectralDefenseConfig(ImageStudyConfig):
    """Compare shaped with isotropic noise by what attackers recover and by the accuracy that is lost."""

    model: str = "lenet"
    """One of the architectures; untrained."""
    levels: list[float] = field(default_factory=lambda: [0.01, 0.1, 1.0])
    """Expected norms of the noise, in multiples of the gradient's norm."""
    attack_iterations: int = 100
    """Steps of dlg and gs."""
    newton_iterations: int = 20
    """Steps of gauss-newton."""
    row_space_iterations: int = 25
    """Steps per start of row-space."""
    row_space_restarts: int = 2
    """Starts of row-space."""
    training_images: int = 1000
    """Images that training draws from."""
    test_images: int = 600
    """Images on which accuracy is measured."""
    clients: int = 8
    """Releases per step, one image each."""
    steps: int = 60
    """Steps of training."""
    learning_rate: float = 0.02
    """Of Adam."""
    training_seeds: int = 3
    """Trainings per defense and level, of other weights, draws and noise."""
    output: str = "runs/spectral_defense/digits"
    """Folder for rows, tables and figures."""

    def __post_init__(self):
        super().__post_init__()
        counts = ("attack_iterations", "newton_iterations", "row_space_iterations", "row_space_restarts")
        counts += ("training_images", "test_images", "clients", "steps", "training_seeds")
        check_counts(self, *counts)
        check_positive(self, "levels", "learning_rate")
        if self.batch_size != 1 or self.shared != "all":
            raise ConfigError("noise is shaped per example, on all parameters: batch_size=1 and shared=all")


def noise_levels(values: Tensor, defense: str, norm: float, size: int) -> tuple[Tensor, float]:
    """Return (c (dx,), std): deviations along the v_i, and of the isotropic part, of expected norm ``norm`` together.

    Args:
        values: Eigenvalues of A, largest first.
        defense: One of ``DEFENSES``.
        norm: sqrt(E ||delta||^2).
        size: P, number of coordinates.

    Returns:
        Both.
    """
    share = DEFENSES[defense]
    shaped = torch.zeros_like(values)
    if share:  # levels depend on the eigenvalues alone
        shaped = spectral_noise(EigenDirections(None, values, None), norm=norm * share**0.5, prior_std=PRIOR_STD).stds
    return shaped, norm * ((1 - share) / size) ** 0.5


# Leakage ----------------------------------------------------------------------------------------------------


def defended(directions: EigenDirections, true: SharedGradient, defense: str, norm: float, seed: int) -> Release:
    """Return the release of one gradient under one defense, rounded to float32."""
    shaped, std = noise_levels(directions.values, defense, norm, true.num_coordinates)
    noisy = GaussianNoise(std=std, seed=seed)(true) if std else true
    if shaped.any():
        noisy = SpectralNoise(directions, shaped, PRIOR_STD).release(noisy, seed=seed).shared
    rounded = {name: value.float().to(value) for name, value in noisy.gradient.items()}
    released = replace(noisy, gradient=rounded)
    return Release(released, released.perturbation_from(true))


def attackers(config: SpectralDefenseConfig, defense: str, norm: float, dx: int, size: int) -> dict[str, Attack]:
    """Return the attackers of a defense by name; all know the expected norm."""
    make = partial(make_attack, task=IMAGE_TASK)
    newton = partial(make, "gauss-newton", iterations=config.newton_iterations)
    chosen = {name: make(name, iterations=config.attack_iterations) for name in ("dlg", "gs")}
    chosen["gauss-newton"] = newton(prior_weight=norm**2 / size / PRIOR_STD**2)
    share = DEFENSES[defense]
    if share:
        chosen["gauss-newton-row"] = newton(prior_weight=share * norm**2 / dx / PRIOR_STD**2)
        chosen["row-space"] = RowSpaceAttack(
            iterations=config.row_space_iterations, restarts=config.row_space_restarts,
            prior_weight=(1 - share) * norm**2 / size / PRIOR_STD**2,
        )  # fmt: skip
    return chosen


def whitened(study: ImageStudy, directions: EigenDirections, batch: Batch, release: Release, noise: Tensor) -> dict:
    """Score the best estimate by the linearisation at the truth: each direction shrunk by its own noise.

    Args:
        study: Model and data.
        directions: Spectrum of J at the truth.
        batch: The truth.
        release: The release.
        noise: (dx,) variance q_i of the noise along v_i.

    Returns:
        A row's scores.
    """
    truth = study.adapter.input(batch)
    shrink = 1 - posterior_variances(directions.values, noise, PRIOR_STD) / PRIOR_STD**2
    seen = (truth + directions.influence(release.perturbation)).reshape(-1).double()
    image = (directions.vectors @ (shrink * (directions.vectors.T @ seen))).reshape(truth.shape)
    found = ImageReconstruction(
        attack="whitened", images=image.to(truth).cpu(), labels=batch.targets.cpu(), cost=AttackCost(0.0, 0, 0),
        stopped="closed form", objective=None, notes=(),
    )  # fmt: skip
    score = score_images(found, batch, study.adapter, release.shared).to_dict()
    return score | {"images": kept_images(study.adapter.normalization.pixels(found.images))}


def leakage_rows(config: SpectralDefenseConfig, study: ImageStudy, sample: int) -> list[dict]:
    """Return one row per defense, level and attacker on one image."""
    batch, seed = study.batch(sample), study.sample_seed(sample)
    true = capture_gradient(study.adapter, batch, shared=study.shared)
    directions = eigen_directions(GradientJacobian(study.adapter, batch, shared=study.shared))
    size = true.num_coordinates
    rows = []
    for defense in DEFENSES:
        for level in config.levels:
            norm = level * true.rms * size**0.5
            shaped, std = noise_levels(directions.values, defense, norm, size)
            noise = shaped.square() + std**2
            release = defended(directions, true, defense, norm, seed)
            errors = posterior_variances(directions.values, noise, PRIOR_STD)
            common = {
                "kind": "leakage", "defense": defense, "level": level, "sample": sample, "norm": norm,
                "predicted": errors.mean().sqrt().item(), "rank": directions.rank, "dx": directions.dx,
                "blind_rmse": study.adapter.input(batch).square().mean().sqrt().item(),
            }  # fmt: skip
            scores = {"whitened": whitened(study, directions, batch, release, noise)}
            for name, attack in attackers(config, defense, norm, directions.dx, size).items():
                scores[name] = scored_image_attack(
                    attack, study.adapter, release.shared, batch, seed=seed, keep_images=True
                )
            rows += [
                {"key": f"leakage|{defense}|{level:g}|{sample}|{name}"} | common | {"attack": name} | score
                for name, score in scores.items()
            ]
    return rows


# Utility ----------------------------------------------------------------------------------------------------


def noisy_update(
    config: SpectralDefenseConfig, training: Split, defense: str, level: float, seed: int
) -> Callable[[FlatGradients, int], Tensor]:
    """Return the server's step: the mean of the releases of ``clients`` random images."""
    draws, noise = generator_of(seed, DRAWS), generator_of(seed, NOISE)

    def update(flat: FlatGradients, _: int) -> Tensor:
        places = torch.randint(len(training.labels), (config.clients,), generator=draws).to(training.labels.device)
        images, labels = training.images[places], training.labels[places]
        gradients = flat(images, labels)
        if level == 0:
            return gradients.mean(0)
        norms = level * gradients.norm(dim=1)
        shares = DEFENSES[defense]
        releases = gradients
        if shares < 1:
            white = torch.randn(gradients.shape, generator=noise).to(gradients)
            releases = releases + ((1 - shares) / flat.size) ** 0.5 * norms[:, None] * white
        if shares:
            releases = releases + shaped_noise(flat.jacobians(images, labels), norms, defense, flat.size, noise)
        return releases.mean(0)

    return update


def shaped_noise(jacobians: Tensor, norms: Tensor, defense: str, size: int, generator: torch.Generator) -> Tensor:
    """Return one draw of the shaped part of a defense's noise per example.

    Args:
        jacobians: (n, dx, P).
        norms: (n,) expected norm of all of the noise.
        defense: One of ``DEFENSES``.
        size: P.
        generator: Of the draw.

    Returns:
        The noise, (n, P).
    """
    values, vectors = torch.linalg.eigh((jacobians @ jacobians.transpose(1, 2)).double())
    values, vectors = values.flip(1), vectors.flip(2)
    least = 16 * torch.finfo(jacobians.dtype).eps  # below it, sums in this precision cannot tell from zero
    values = values.where(values > least * values[:, :1], 0.0)
    z = torch.randn(values.shape, generator=generator, dtype=torch.float64).to(values)
    pairs = zip(values, norms.tolist(), strict=True)
    stds = torch.stack([
        noise_levels(v, defense, norm, size)[0] if norm > 0 and v.any() else torch.zeros_like(v) for v, norm in pairs
    ])  # fmt: skip
    along = (stds * z / values.sqrt()).where(values > 0, 0.0)
    w = (vectors @ along[:, :, None])[:, :, 0]
    return torch.einsum("ni,nip->np", w.to(jacobians), jacobians)


def utility_rows(config: SpectralDefenseConfig, make: Callable[[int], VisionAdapter], data, item) -> list[dict]:
    """Return one row: accuracy after one training."""
    defense, level, number = item
    seed = config.seed + number
    adapter = make(seed)
    training, test = splits(
        adapter, data, config.samples, (config.training_images, config.test_images), generator_seed(seed)
    )
    update = noisy_update(config, training, defense, level, seed)
    train(adapter, update, steps=config.steps, learning_rate=config.learning_rate)
    return [{
        "key": f"utility|{defense}|{level:g}|{number}", "kind": "utility", "defense": defense, "level": level,
        "number": number, "accuracy": accuracy(adapter, test),
    }]  # fmt: skip


def generator_seed(seed: int) -> int:
    """Return the seed of the split of one training."""
    return generator_of(seed, SPLIT).initial_seed()


# The study --------------------------------------------------------------------------------------------------


@exit_status
def main(argv: list[str]) -> None:
    """Run the study; exit status 2 if the input is refused."""
    config = parse_config(SpectralDefenseConfig, argv, prog="spectral_defense.py")
    state = process_state(config.processes)
    torch.set_num_threads(config.threads)
    data = study_images(config)
    study = image_study(config, config.model, data, state)

    def make(seed: int) -> VisionAdapter:
        """Return an untrained model in float32: training needs no more."""
        return image_study(replace(config, precision="float32", seed=seed), config.model, data, state).adapter

    splits(study.adapter, data, config.samples, (config.training_images, config.test_images), config.seed)
    items = [("leakage", sample) for sample in range(config.samples)]
    settings = [("isotropic", 0.0), *((defense, level) for defense in DEFENSES for level in config.levels)]
    items += [("utility", (*setting, number)) for setting in settings for number in range(config.training_seeds)]

    def work(_: int, item: tuple) -> list[dict]:
        kind, what = item
        return leakage_rows(config, study, what) if kind == "leakage" else utility_rows(config, make, data, what)

    folder = study_folder(config, {config.model: study})
    rows = run_items(items, work, folder, state, label="spectral defense")
    if state.is_main_process:
        truth = torch.cat([data.pixels[study.indices(sample)] for sample in range(config.samples)])
        write_report(rows, truth, folder.path)
    finish(state)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
