"""What leaks from a real trained network with BatchNorm: attacks and risk numbers at pretrained weights.

    accelerate launch --config_file configs/accelerate/cpu1.yaml recipes/real_weights.py
        --config configs/real_weights/resnet20.yaml --model path/to/resnet20.th --data path/to/cifar.npz

(on one line). Per image: loss, class label read from the gradient; at noise of 1 % of the gradient's root mean square,
lower bounds of I2F and the first-order error of the attacker of maximal posterior probability (MAP), who saturates at
a guess; and what attacks recover from the clean gradient. All in root mean square per normalised pixel, whose
deviation is about 1. A killed run continues where it stopped. One process or several give the same rows.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from image_tables import Entry, in_few_colours, mean, publish, root_mean_square

from lmleak.attacks.image_labels import class_labels
from lmleak.config import parse_config
from lmleak.defenses import Release
from lmleak.evaluation import exit_status, finish, process_state, run_items
from lmleak.evaluation.image_attack import images_of
from lmleak.evaluation.image_study import (
    ImageStudy,
    ImageStudyConfig,
    attack_rows,
    image_study,
    study_folder,
    study_images,
)
from lmleak.files import write_atomically
from lmleak.influence import GradientJacobian, InfluenceSolver
from lmleak.report.drawing import encode
from lmleak.report.image_grid import image_grid
from lmleak.types import Batch

CLEAN = ["none"]


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
    output: str = "runs/real_weights"
    """Folder for rows, table and figure."""


def risk(config: WeightsConfig, study: ImageStudy, batch: Batch, release: Release) -> dict:
    """Return the loss, what the labels' readout says, and the risk numbers."""
    adapter, shared = study.adapter, release.shared
    with torch.no_grad():
        loss = adapter.loss(adapter.input(batch), batch.targets, {}).item()
    found = class_labels(adapter, shared.observation(lengths=False, labels=False), seed=study.seed)
    assigned = found.assignment(shared.observation(lengths=False, labels=False))
    noise_std = config.noise * shared.rms
    solver = InfluenceSolver(
        GradientJacobian(adapter, batch, shared=study.shared), adapter.prior(),
        max_products=config.products, seed=study.seed,
    )  # fmt: skip
    damping = solver.map_damping(noise_std)
    response = solver.respond({n: noise_std * d for n, d in solver.noise().items()}, [damping])
    influence, predicted = response.influence(damping), response.predicted_error(noise_std)
    return {
        "loss": loss,
        "label_inferred": assigned is not None and sorted(assigned.tolist()) == sorted(batch.targets.tolist()),
        "lower_bound_rms": influence.lower_bound.rms, "cg_bound_rms": influence.cg_bound.rms,
        "predicted_rms": predicted.error.rms, "predicted_converged": predicted.converged,
        "residual": influence.residual, "lambda_max": influence.lambda_max, "damping": damping,
        "undetermined_share": solver.undetermined_share(damping), "products": solver.operator.products,
    }  # fmt: skip


def summary(rows: Sequence[dict]) -> list[Entry]:
    """Return one line per image and attack, and one of means per attack."""
    lines = [
        {
            "attack": r["attack"], "image": str(r["indices"][0]), "loss": r["loss"],
            "label_read": str(r["label_inferred"]), "I_lb_rms": r["lower_bound_rms"],
            "CG_bound_rms": r["cg_bound_rms"], "MAP_rms": r["predicted_rms"],
            "MAP_converged": str(r["predicted_converged"]), "rmse": r.get("rmse"), "psnr_db": r.get("psnr"),
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
            | {"attack": attack, "image": "mean", "rmse": root_mean_square(line["rmse"] for line in own)}
            | {key: mean(line[key] for line in own) for key in numbers}
        )
    return lines


@exit_status
def main(argv: list[str]) -> None:
    """Run the study; exit status 2 if the input is refused."""
    config = parse_config(WeightsConfig, argv, prog="real_weights.py")
    state = process_state(config.processes)
    torch.set_num_threads(config.threads)
    study = image_study(config, config.model, study_images(config), state)
    study.check(CLEAN, config.attacks)
    folder = study_folder(config, {"study": study})

    def rows_of(_, sample: int) -> list[dict]:
        return attack_rows(
            study, sample, defenses=CLEAN, attacks=config.attacks, keep_images=True,
            measure=lambda batch, release: risk(config, study, batch, release),
        )  # fmt: skip

    rows = run_items(range(config.samples), rows_of, folder, state, label="attacking")
    if state.is_main_process:
        publish(Path(config.output), "real_weights", summary(rows))
        true = study.data.pixels[: config.samples * config.batch_size]
        recovered = {
            spec.replace("(", "\n("): torch.cat([
                images_of(row, true[row["indices"]])
                for row in sorted(rows, key=lambda row: row["sample"])
                if row["attack"] == spec and "images" in row
            ])
            for spec in config.attacks
        }  # fmt: skip
        picture = in_few_colours(encode(image_grid(true, recovered), "png"))
        write_atomically(Path(config.output) / "real_weights.png", lambda path: path.write_bytes(picture))
    finish(state)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
