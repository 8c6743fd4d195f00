"""What leaks from a real trained network with BatchNorm: attacks and risk numbers at pretrained weights.

    accelerate launch --config_file configs/accelerate/cpu1.yaml recipes/real_weights.py
        --config configs/real_weights/resnet20.yaml --model path/to/resnet20.th --data path/to/cifar.npz

(on one line). Per image: loss, class label read from the gradient; at noise of 1 % of the gradient's root mean square,
lower bounds of I2F and the first-order error of the attacker of maximal posterior probability (MAP), who saturates at
a guess; and what attacks recover from the clean gradient. All in root mean square per normalised pixel, whose
deviation is about 1; also how far from the image its gradient is linear, beyond which first order says nothing.

Trained weights make A = J J^T so ill-conditioned that Krylov solves do not converge. Of the first images A is
therefore computed as a matrix: I2F, MAP and bayes errors exact to first order, effective rank, and the share of pixels
that the noisy gradient determines. On these the data owner searches as well, with steps by that spectrum:
  local      from the truth, on the noisy gradient
  near(0.1)  from the truth plus noise of a tenth of a pixel's deviation, on the clean gradient
No attacker can do so. They say what an attacker with a perfect search, or with a good guess, would see.

A killed run continues where it stopped. One process or several give the same rows.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from image_influence_measures import linearized, predictions
from image_study_parts import LOCAL, UNDAMPED, LocalAttacker, TruthCurvature
from image_tables import Entry, in_few_colours, mean, publish, root_mean_square

from lmleak.attacks.image_labels import class_labels
from lmleak.config import check_positive, parse_config
from lmleak.defenses import Release
from lmleak.defenses.base import global_norm
from lmleak.errors import ConfigError
from lmleak.evaluation import exit_status, finish, process_state, run_items
from lmleak.evaluation.image_attack import images_of, scored_image_attack
from lmleak.evaluation.image_study import (
    ImageStudy,
    ImageStudyConfig,
    attack_rows,
    image_study,
    study_folder,
    study_images,
)
from lmleak.files import write_bytes_atomically
from lmleak.gradients import capture_gradient
from lmleak.influence import EigenDirections, GradientJacobian, InfluenceSolver
from lmleak.influence.directions import posterior_variances
from lmleak.report.drawing import encode
from lmleak.report.image_grid import image_grid
from lmleak.types import Batch

CLEAN = ["none"]
LINEAR = 0.1  # of the change that J^T predicts
EXACT = {
    "influence_rms": "I2F_rms", "map_rms": "MAP_rms", "bayes_rms": "bayes_rms", "lambda_max": "lambda_max",
    "lambda_min": "lambda_min", "rank": "rank",
}  # fmt: skip
"""What the exact spectrum says, and its columns."""


@dataclass(frozen=True, kw_only=True)
class WeightsConfig(ImageStudyConfig):
    """Attack the gradients of a pretrained image classifier."""

    model: str = "resnet20"
    """Weights (.th, .pt, .safetensors), a directory, a shape file, or an architecture at random weights."""
    attacks: list[str] = field(default_factory=lambda: ["gs(iterations=500)", "lbfgs(iterations=500)"])
    """Attacks on the clean gradient."""
    noise: float = 0.01
    """Noise that risk numbers are given at, in multiples of the gradient's root mean square."""
    products: int = 300
    """Most products with J J^T per risk number."""
    exact: int = 2
    """Of how many images, from the first, J J^T is computed as a matrix; images of a few thousand pixels."""
    largest_matrix: int = 2**30
    """Most numbers that J may hold as a matrix (8 GiB in float64); beyond, J J^T is formed by products: slower."""
    pixel_std: float = 0.1
    """A pixel is determined if its posterior deviation is below this part of the prior's."""
    near: list[float] = field(default_factory=lambda: [0.001, 0.1])
    """Distances from the truth at which "near" starts, root mean square in normalised pixels."""
    local_iterations: int = 25
    """Most steps of the attackers that start at the truth or near it."""
    output: str = "runs/real_weights"
    """Folder for rows, table and figure."""

    def __post_init__(self):
        super().__post_init__()
        if self.exact < 0 or not all(0 < distance < float("inf") for distance in self.near):
            raise ConfigError(f"exact must be at least 0 and near positive, got {self.exact} and {self.near}")
        check_positive(self, "noise", "pixel_std", "local_iterations", "largest_matrix", "products")


def risk(config: WeightsConfig, study: ImageStudy, batch: Batch, clean: Release, noisy: Release) -> dict:
    """Return the loss, what the labels' readout says of the clean gradient, and risk numbers by Krylov solves."""
    adapter, shared = study.adapter, clean.shared
    with torch.no_grad():
        loss = adapter.loss(adapter.input(batch), batch.targets, {}).item()
    found = class_labels(adapter, shared.observation(lengths=False, labels=False), seed=study.seed)
    assigned = found.assignment(shared.observation(lengths=False, labels=False))
    noise_std = config.noise * shared.rms
    jacobian = GradientJacobian(adapter, batch, shared=study.shared)
    solver = InfluenceSolver(jacobian, adapter.prior(), max_products=config.products, seed=study.seed)
    damping = solver.map_damping(noise_std)
    response = solver.respond(noisy.perturbation, [damping])
    influence, predicted = response.influence(damping), response.predicted_error(noise_std)
    return {
        "loss": loss, "linear_range": linear_range(study, jacobian, batch),
        "label_inferred": assigned is not None and sorted(assigned.tolist()) == sorted(batch.targets.tolist()),
        "noise_std": noise_std, "lower_bound_rms": influence.lower_bound.rms, "cg_bound_rms": influence.cg_bound.rms,
        "predicted_rms": predicted.error.rms, "predicted_converged": predicted.converged,
        "residual": influence.residual, "damping": damping, "products": solver.operator.products,
    }  # fmt: skip


def linear_range(study: ImageStudy, jacobian: GradientJacobian, batch: Batch) -> float:
    """Return how far from the image its gradient is linear, along one random direction z ~ N(0, I), by decade.

    The largest e, a root mean square in normalised pixels, up to which
    ||g(x + e z) - g(x) - e J^T z|| <= ``LINEAR`` e ||J^T z||; 0 if not even the least that rounding resolves. ReLU
    makes g jump where a unit changes sides.
    """
    adapter, x = study.adapter, study.adapter.input(batch)
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(study.seed), dtype=x.dtype).to(x)
    slope = jacobian.rmatvec(z)
    here = capture_gradient(adapter, batch, shared=study.shared).gradient
    reached = 0.0
    for power in range(math.ceil(math.log10(torch.finfo(x.dtype).eps) / 2), 1):
        step = 10.0**power
        moved = capture_gradient(adapter, adapter.batch(x + step * z, batch.targets), shared=study.shared).gradient
        error = {name: moved[name] - here[name] - step * slope[name] for name in slope}
        if global_norm(error) > LINEAR * step * global_norm(slope):
            break
        reached = step
    return reached


def exact_risk(
    config: WeightsConfig, study: ImageStudy, batch: Batch, noisy: Release, directions: EigenDirections, std: float
) -> dict:
    """Return what the exact spectrum says of noise of deviation ``std``, per normalised pixel."""
    prior = study.adapter.prior().std
    found = predictions(directions, study, batch, noisy.perturbation, std)
    posterior = directions.vectors.square() @ posterior_variances(directions.values, std**2, prior)  # per pixel
    determined = posterior.sqrt() < config.pixel_std * prior
    return {f"exact_{name}": found[name] for name in EXACT} | {
        "exact_effective_rank": directions.effective_rank(std, prior),
        "determined_share": determined.double().mean().item(),
    }


def image_rows(config: WeightsConfig, study: ImageStudy, sample: int) -> list[dict]:
    """Return one row per attack on the clean gradient of one image, and one per search of the data owner."""
    batch, seed = study.batch(sample), study.sample_seed(sample)
    clean = study.release(sample, batch=batch)
    noisy = study.release(sample, f"gaussian(std={config.noise!r}, unit=rms)", batch=batch)
    measured = risk(config, study, batch, clean, noisy)
    if sample < config.exact:
        directions = linearized(study, batch, largest=config.largest_matrix)
        measured |= exact_risk(config, study, batch, noisy, directions, measured["noise_std"])
    rows = attack_rows(
        study, sample, defenses=CLEAN, attacks=config.attacks, keep_images=True, measure=lambda *_: measured
    )  # fmt: skip
    if sample >= config.exact:
        return rows
    weight = (measured["noise_std"] / study.adapter.prior().std) ** 2
    searches = {LOCAL: (noisy, 0.0, weight)} | {f"near({d:g})": (clean, d, 0.0) for d in config.near}
    common = {name: rows[0][name] for name in ("sample", "indices", "labels")} | measured
    for name, (release, distance, prior_weight) in searches.items():
        search = LocalAttacker(
            truth=study.adapter.input(batch), distance=distance, prior_weight=prior_weight,
            iterations=config.local_iterations, solver=partial(TruthCurvature, directions=directions),
            damping=UNDAMPED, step_tolerance=1e-8,
        )  # fmt: skip
        scored = scored_image_attack(search, study.adapter, release.shared, batch, seed=seed, keep_images=True)
        rows.append({"key": f"{sample}|{name}"} | common | {"attack": name} | scored)
    return rows


def summary(rows: Sequence[dict]) -> list[Entry]:
    """Return one line per image and attack, and one of means per attack."""
    lines = [
        {
            "attack": r["attack"], "gradient": "noisy" if r["attack"] == LOCAL else "clean",
            "image": str(r["indices"][0]), "loss": r["loss"],
            "label_read": str(r["label_inferred"]), "I_lb_rms": r["lower_bound_rms"],
            "CG_bound_rms": r["cg_bound_rms"], "linear_range": r["linear_range"], "MAP_rms": r["predicted_rms"],
            "MAP_converged": str(r["predicted_converged"]),
            **{f"exact_{label}": r.get(f"exact_{name}") for name, label in EXACT.items()},
            "effective_rank": r.get("exact_effective_rank"), "determined_share": r.get("determined_share"),
            "rmse": r.get("rmse"), "psnr_db": r.get("psnr"),
            "ssim": r.get("ssim"), "matching_loss": r.get("matching_loss"), "gradients": r.get("gradient_evaluations"),
            "stopped": r.get("stopped", r.get("refused")),
        }
        for r in rows
    ]  # fmt: skip
    for attack in dict.fromkeys(line["attack"] for line in lines):
        own = [line for line in lines if line["attack"] == attack]
        numbers = ("loss", "psnr_db", "ssim", "matching_loss", "gradients")
        lines.append(
            dict.fromkeys(own[0], None)
            | {"attack": attack, "gradient": own[0]["gradient"], "image": "mean"}
            | {"rmse": root_mean_square(line["rmse"] for line in own)}
            | {key: mean(line[key] for line in own) for key in numbers}
        )
    return lines


def draw(study: ImageStudy, rows: Sequence[dict], attacks: Sequence[str], samples: int, path: Path) -> None:
    """Write the grid of what some attackers recovered of the first samples."""
    true = study.data.pixels[: samples * study.batch_size]
    recovered = {
        spec.replace("(", "\n("): torch.cat([
            images_of(row, true[row["indices"]])
            for row in sorted(rows, key=lambda row: row["sample"])
            if row["attack"] == spec and "images" in row
        ])
        for spec in attacks
    }  # fmt: skip
    picture = in_few_colours(encode(image_grid(true, recovered), "png"))
    write_bytes_atomically(path, picture)


@exit_status
def main(argv: list[str]) -> None:
    """Run the study; exit status 2 if the input is refused."""
    config = parse_config(WeightsConfig, argv, prog="real_weights.py")
    state = process_state(config.processes)
    torch.set_num_threads(config.threads)
    study = image_study(config, config.model, study_images(config), state)
    study.check(CLEAN, config.attacks)
    folder = study_folder(config, {"study": study})

    rows = run_items(
        range(config.samples), lambda _, sample: image_rows(config, study, sample), folder, state, label="attacking"
    )
    if state.is_main_process:
        output = Path(config.output)
        publish(output, "real_weights", summary(rows))
        draw(study, rows, config.attacks, config.samples, output / "real_weights.png")
        if config.exact:
            searches = [LOCAL, *(f"near({distance:g})" for distance in config.near)]
            draw(study, rows, searches, min(config.exact, config.samples), output / "real_weights_local.png")
    finish(state)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
