"""Does I2F predict the error of attacks on images, and which damping belongs in it?

The noise panels and the epsilon study of Zhang et al. 2023 (arXiv:2309.13016). Per model, image and level of Gaussian
noise, by decade of variance: I_lb, I2F, I_eps and the error of the attacker of maximal posterior probability (MAP) on
one side; on the other the RMSE of attacks, and of two attackers who start at the truth, so that no search fails:
"local" (nearest gradient) and "local-map" (with the prior). All in root mean square per normalised pixel.

    accelerate launch --config_file configs/accelerate/cpu1.yaml recipes/image_influence.py
        --config configs/image_influence/digits.yaml
    accelerate launch --config_file configs/accelerate/cpu1.yaml recipes/image_influence.py
        --config configs/image_influence/mnist.yaml --data path/to/mnist

(each command on one line). A killed run continues where it stopped. One process or several give the same rows.
"""

import math
import sys
from dataclasses import dataclass, field

import torch
from image_influence_measures import CURVATURES, linearized, local_rmse, predictions
from image_influence_report import write_results
from rich.console import Console

from lmleak.adapters.targets import IMAGE_TASK
from lmleak.attacks import parse_attack
from lmleak.config import check_counts, check_positive, parse_config
from lmleak.defenses import Release
from lmleak.errors import ConfigError
from lmleak.evaluation import exit_status, finish, process_state, run_items
from lmleak.evaluation.image_study import (
    ImageStudy,
    ImageStudyConfig,
    attack_rows,
    image_study,
    study_folder,
    study_images,
)
from lmleak.influence import EigenDirections
from lmleak.lookup import lookup
from lmleak.types import Batch

VARIANCE = "{variance}"  # in the specification of an attack


@dataclass(frozen=True, kw_only=True)
class InfluenceConfig(ImageStudyConfig):
    """Compare I_lb, I2F and its dampings with the RMSE of attacks under Gaussian noise."""

    models: list[str] = field(default_factory=lambda: ["linear", "lenet"])
    """Architectures, made for the data, or what load_adapter knows."""
    noise_variances: list[float] = field(default_factory=lambda: [10.0**k for k in range(-9, 0)])
    """Variances of the noise on every shared number, in gradient^2."""
    attacks: list[str] = field(default_factory=lambda: ["gauss-newton(iterations=40)", "gs(iterations=300, tv=0)"])
    """Attacks from a random start; "{variance}" in one is the noise's variance over that of normalised pixels, which
    is the prior_weight of the MAP attacker."""
    dampings: list[float] = field(default_factory=lambda: [10.0**k for k in range(-6, 2)])
    """eps of I_eps, in the unit of A = J J^T."""
    local_iterations: int = 40
    """Most steps of the attackers that start at the truth."""
    local_curvature: str = "own"
    """Their steps: by J J^T at each iterate ("own"), or at the truth, for thousands of pixels ("truth")."""
    largest_matrix: int = 2**28
    """Most numbers that J may hold as a matrix; beyond, J J^T is formed by products, which take longer."""
    linear_below: float = 0.1
    """The linear regime: I2F / sqrt(dx) below this, in normalised pixels, whose deviation is 1."""
    bound_tolerance: float = 0.05
    """An RMSE of less than I_lb / sqrt(dx) by more than this part counts as below the bound."""
    precision: str = "float64"
    """float64: rounding of float32 shows at the lowest levels."""
    output: str = "runs/image_influence"
    """Folder for rows, tables and figures."""

    def __post_init__(self):
        super().__post_init__()
        if not self.models or not self.attacks:
            raise ConfigError("a comparison needs at least one model and one attack")
        check_counts(self, "local_iterations", "largest_matrix")
        lookup("local_curvature", self.local_curvature, CURVATURES)
        check_positive(self, "noise_variances", "dampings")
        for spec in self.attacks:
            parse_attack(spec.replace(VARIANCE, "1"), task=IMAGE_TASK)


def level_rows(
    config: InfluenceConfig, study: ImageStudy, directions: EigenDirections, sample: int, variance: float
) -> list[dict]:
    """Return one row per attack on one image at one noise level; depends on the settings and the image alone."""
    std = math.sqrt(variance)
    weight = variance / study.adapter.prior().std ** 2

    def measure(batch: Batch, release: Release) -> dict:
        curvature = directions if CURVATURES[config.local_curvature] else None
        steps = {"iterations": config.local_iterations, "directions": curvature}
        return predictions(directions, study, batch, release.perturbation, std, config.dampings) | {
            "local_rmse": local_rmse(study, batch, release, prior_weight=0.0, **steps),
            "local_map_rmse": local_rmse(study, batch, release, prior_weight=weight, **steps),
        }

    rows = attack_rows(
        study, sample, defenses=[f"gaussian(std={std!r})"],
        attacks=[spec.replace(VARIANCE, repr(weight)) for spec in config.attacks],
        common={"model": study.adapter.name}, measure=measure,
    )  # fmt: skip
    return [row | {"attack": spec, "noise_variance": variance} for row, spec in zip(rows, config.attacks, strict=True)]


@exit_status
def main(argv: list[str]) -> None:
    """Run the study; exit status 2 if the input is refused."""
    config = parse_config(InfluenceConfig, argv, prog="image_influence.py")
    state = process_state(config.processes)
    torch.set_num_threads(config.threads)
    data = study_images(config)
    studies = {name: image_study(config, name, data, state) for name in config.models}
    folder = study_folder(config, studies)
    items = [  # by level, so that a killed run loses one level only
        (name, sample, variance)
        for name in config.models
        for sample in range(config.samples)
        for variance in config.noise_variances
    ]
    spectra: dict[tuple[str, int], EigenDirections] = {}  # of the image in work

    def work(_: int, item: tuple[str, int, float]) -> list[dict]:
        name, sample, variance = item
        study = studies[name]
        if (name, sample) not in spectra:
            spectra.clear()
            spectra[name, sample] = linearized(study, study.batch(sample), largest=config.largest_matrix)
        return level_rows(config, study, spectra[name, sample], sample, variance)

    rows = run_items(items, work, folder, state, label="attacking")
    if state.is_main_process:
        tables = write_results(
            rows, folder.path, linear_below=config.linear_below, tolerance=config.bound_tolerance, seed=config.seed
        )
        console = Console(width=None if sys.stdout.isatty() else 200)
        for table in tables:
            console.print(table)
        print(f"tables and figures: {folder.path}")
    finish(state)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
