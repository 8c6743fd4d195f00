"""Does a larger batch protect the images in it?

For every batch size B and image: the predicted error with the whole batch unknown (joint) and with every other image
known to the attacker (others known), and what attacks recover, with class labels given and inferred. Attacked images
are matched to private ones in the order of least error (``lmleak.metrics.score_images``).

J of a batch has B dx rows, and its rank cannot exceed the coordinates of the gradient; for softmax regression with C
classes on d pixels it cannot exceed (C - 1)(d + 1). Once B dx is larger, some images are not determined at all: that
is the rank transition.

    accelerate launch --config_file configs/accelerate/cpu1.yaml recipes/batch_size.py
        --config configs/batch_size/linear.yaml
    accelerate launch --config_file configs/accelerate/cpu1.yaml recipes/batch_size.py
        --config configs/batch_size/lenet.yaml

(each on one line). Predictions are those of the best attacker who knows noise and prior (Bayes), root mean squares
over noise; ``unbiased`` is the same without a prior, infinite where J is singular. Gauss-Newton weighs the prior by
sigma^2 / tau^2, as the prediction assumes; gs keeps pixels valid, of which the prediction knows nothing, and may do
better. Whoever knows the others subtracts their gradients: B times the rest is one image's gradient under noise of
deviation B sigma, and that is how this attacker is run. Errors are root mean squares per pixel in units of the model's
input (normalised pixels). A killed run continues where it stopped; one process or several give the same rows.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from image_tables import Entry, drawable, mean, publish, root_mean_square
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lmleak.adapters import VisionAdapter
from lmleak.adapters.targets import IMAGE_TASK
from lmleak.attacks import Attack, parse_attack
from lmleak.attacks.image_newton import GaussNewton
from lmleak.config import parse_config
from lmleak.defenses import GaussianNoise, derived_seed
from lmleak.errors import ConfigError
from lmleak.evaluation import exit_status, finish, process_state, run_items
from lmleak.evaluation.image_attack import scored_image_attack
from lmleak.evaluation.image_study import ImageStudy, ImageStudyConfig, image_study, study_folder, study_images
from lmleak.gradients import capture_gradient
from lmleak.influence import GradientJacobian, eigen_directions, expected_by_example
from lmleak.report.drawing import BLUE, GREY, INK, ORANGE, PURPLE, SKY, VERMILION, house_style, light_grid
from lmleak.types import Batch

OTHERS_KNOWN = "others known"
LABELS = ("given", "inferred")
COLOURS = (VERMILION, PURPLE, ORANGE, SKY)


@dataclass(frozen=True, kw_only=True)
class BatchSizeConfig(ImageStudyConfig):
    """Predict and attack batches of growing size at one noise level."""

    model: str = "linear"
    """Architecture, weights or hub id."""
    initialization: str | None = None
    """How an architecture's weights are drawn."""
    batch_sizes: list[int] = field(default_factory=lambda: [1, 2, 4, 6, 8])
    """Images per gradient; ``batch_size`` itself is not used."""
    noise_std: float = 1e-4
    """Standard deviation of Gaussian noise on the mean gradient, the same for all sizes, in its unit."""
    attacks: list[str] = field(
        default_factory=lambda: ["gauss-newton(start=mean, iterations=40)", "gs(tv=0, iterations=300)"]
    )
    """Attacks; each runs with labels given and inferred, the first also with all other images known."""
    precision: str = "float64"
    """float32, or float64 for eigenvalues far below the largest."""
    output: str = "runs/batch_size"
    """Folder for rows, table and figure."""

    def __post_init__(self):
        super().__post_init__()
        if self.batch_size != 1:
            raise ConfigError(f"give batch_sizes, not batch_size={self.batch_size}")
        if not self.batch_sizes or min(self.batch_sizes) < 1 or len(set(self.batch_sizes)) < len(self.batch_sizes):
            raise ConfigError(f"batch_sizes must be different integers of at least 1, got {self.batch_sizes}")
        if not 0 < self.noise_std < float("inf"):
            raise ConfigError(f"noise_std must be positive and finite, got {self.noise_std}")
        names = [parse_attack(spec, task=IMAGE_TASK).name for spec in self.attacks]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"attacks must hold each of at least one attack once, got {self.attacks}")
        for spec in self.attacks:
            if parse_attack(spec, task=IMAGE_TASK).labels != "given":
                raise ConfigError(f"{spec}: leave labels out, both of its values are studied")


def rank_limit(adapter: VisionAdapter, coordinates: int) -> int:
    """Return what the rank of J cannot exceed: P, or (C - 1)(d + 1) for softmax regression."""
    weights = [p for p in adapter.parameters().values() if p.dim() > 1]
    if len(adapter.parameters()) == 2 and len(weights) == 1:  # one linear layer with a bias
        classes, pixels = weights[0].shape
        return min(coordinates, (classes - 1) * (pixels + 1))
    return coordinates


def attacker(spec: str, labels: str, noise_std: float, prior_std: float) -> Attack:
    """Return an attack with its labels; Gauss-Newton weighs the prior as the noise demands."""
    attack = replace(parse_attack(spec, task=IMAGE_TASK), labels=labels)
    if isinstance(attack, GaussNewton):
        return replace(attack, prior_weight=(noise_std / prior_std) ** 2)
    return attack


def rms(magnitudes) -> float | None:
    """Return the root mean square over images of their ``rms``."""
    return root_mean_square(magnitude.rms for magnitude in magnitudes)


def batch_rows(config: BatchSizeConfig, study: ImageStudy, sample: int) -> list[dict]:
    """Return one row per attack and labels on one batch, and one for the attacker who knows the others."""
    adapter, batch, seed = study.adapter, study.batch(sample), study.sample_seed(sample)
    sigma, tau, size = config.noise_std, adapter.prior().std, study.batch_size
    directions = eigen_directions(GradientJacobian(adapter, batch, shared=study.shared))
    bayes, unbiased = (expected_by_example(directions, sigma, prior) for prior in (tau, None))
    coordinates = directions.jacobian.shape[1]
    common = {
        "batch_size": size, "sample": sample, "indices": study.indices(sample), "labels": batch.targets.tolist(),
        "noise_std": sigma, "unknowns": directions.dx, "coordinates": coordinates, "rank": directions.rank,
        "rank_limit": rank_limit(adapter, coordinates), "effective_rank": directions.effective_rank(sigma, tau),
        "predicted_joint_rms": rms(e.joint for e in bayes),
        "predicted_others_known_rms": rms(e.others_known for e in bayes),
        "unbiased_joint_rms": _finite(rms(e.joint for e in unbiased)),
        "predicted_each": [{"joint": e.joint.rms, "others_known": e.others_known.rms} for e in bayes],
    }  # fmt: skip
    shared = study.release(sample, f"gaussian(std={sigma})", batch=batch).shared
    rows = []
    for spec in config.attacks:
        for labels in LABELS:
            scored = scored_image_attack(attacker(spec, labels, sigma, tau), adapter, shared, batch, seed=seed)
            if size > 1 and (own := scored.get("per_example")):
                scored["moved"] = sum(e["prediction"] != i for i, e in enumerate(own)) / size
            rows.append(
                {"key": f"{size}|{sample}|{spec}|{labels}"} | common | {"attack": spec, "knows": labels} | scored
            )
    spec = config.attacks[0]
    rows.append(
        {"key": f"{size}|{sample}|{spec}|{OTHERS_KNOWN}"}
        | common
        | {"attack": spec, "knows": OTHERS_KNOWN}
        | with_others_known(config, study, sample, spec, batch)
    )
    return rows


def _finite(value: float | None) -> float | None:
    """Return a number as JSON holds it: None for infinity."""
    return value if value is not None and value < float("inf") else None


def with_others_known(config: BatchSizeConfig, study: ImageStudy, sample: int, spec: str, batch: Batch) -> dict:
    """Return the mean scores over the images of a batch, each attacked with all the others known."""
    adapter, size = study.adapter, study.batch_size
    std = size * config.noise_std
    scores = []
    for place in range(size):
        one = adapter.batch(adapter.input(batch)[place : place + 1], batch.targets[place : place + 1])
        seed = derived_seed(study.sample_seed(sample), place)
        shared = GaussianNoise(std=std, seed=seed)(capture_gradient(adapter, one, shared=study.shared))
        attack = attacker(spec, "given", std, adapter.prior().std)
        scores.append(scored_image_attack(attack, adapter, shared, one, seed=seed))
    return {
        "rmse": root_mean_square(s["rmse"] for s in scores), "psnr": mean(s["psnr"] for s in scores),
        "ssim": mean(s["ssim"] for s in scores), "seconds": sum(s["seconds"] for s in scores),
        "rmse_each": [s["rmse"] for s in scores],
    }  # fmt: skip


def summary(rows: Sequence[dict]) -> list[Entry]:
    """Return one line per attack, what it knows and batch size: means over batches, errors as root mean squares."""
    found = []
    for spec, knows, size in dict.fromkeys((r["attack"], r["knows"], r["batch_size"]) for r in rows):
        own = [r for r in rows if (r["attack"], r["knows"], r["batch_size"]) == (spec, knows, size)]
        predicted = "predicted_others_known_rms" if knows == OTHERS_KNOWN else "predicted_joint_rms"
        found.append({
            "attack": spec.partition("(")[0], "knows": knows if knows == OTHERS_KNOWN else f"labels {knows}",
            "batch_size": size, "batches": len(own), "unknowns": own[0]["unknowns"],
            "rank": mean(float(r["rank"]) for r in own), "rank_limit": own[0]["rank_limit"],
            "predicted_rms": root_mean_square(r[predicted] for r in own),
            "measured_rmse": root_mean_square(r.get("rmse") for r in own),
            "unbiased_rms": None if knows == OTHERS_KNOWN else _unbiased(own),
            "psnr_db": mean(r.get("psnr") for r in own),
            "label_accuracy": mean(r.get("label_accuracy") for r in own), "moved": mean(r.get("moved") for r in own),
            "refused": sum("refused" in r for r in own),
        })  # fmt: skip
    return sorted(found, key=lambda e: (e["attack"], e["knows"], e["batch_size"]))


def _unbiased(own: Sequence[dict]) -> float | str:
    return root_mean_square(r["unbiased_joint_rms"] for r in own) or "infinite"


def figure(entries: Sequence[Entry]) -> Figure:
    """Draw predicted and measured errors per image over the batch size, and the rank of J beside its limit."""
    with house_style():
        drawing = Figure(figsize=(9.4, 4.9), layout="constrained")
        errors, ranks = drawing.subplots(1, 2, width_ratios=(1.25, 1))
        series = dict.fromkeys((e["attack"], e["knows"]) for e in entries)
        (known,) = [key for key in series if key[1] == OTHERS_KNOWN]
        joint = _series(entries, next(key for key in series if key != known))
        errors.plot(*_points(joint, "predicted_rms"), color=INK, label="joint, predicted")
        errors.plot(*_points(_series(entries, known), "predicted_rms"), color=BLUE, label="others known, predicted")
        errors.plot(
            *_points(_series(entries, known), "measured_rmse"), "o", color=BLUE, markersize=5,
            label=f"others known, {known[0]}",
        )  # fmt: skip
        attacks = list(dict.fromkeys(attack for attack, knows in series if knows != OTHERS_KNOWN))
        for attack, knows in series:
            if knows != OTHERS_KNOWN:
                colour = COLOURS[attacks.index(attack) % len(COLOURS)]
                errors.plot(
                    *_points(_series(entries, (attack, knows)), "measured_rmse"), "o" if "given" in knows else "x",
                    color=colour, markersize=6, label=f"joint, {attack}, {knows}",
                    markerfacecolor="none" if "given" in knows else None, markeredgewidth=1.4,
                )  # fmt: skip
        errors.axhline(1, color=GREY, linewidth=1, linestyle=":", label="deviation of the prior (a guess)")
        for axes in (errors, ranks):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        errors.set_yscale("log")
        errors.set_title("error of an image in its batch")
        errors.set_xlabel("batch size B")
        errors.set_ylabel("error, rms per normalised pixel")
        light_grid(errors)
        _rank(ranks, joint)
        drawing.legend(*errors.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return drawing


def _series(entries: Sequence[Entry], key: tuple[str, str]) -> list[Entry]:
    return [e for e in entries if (e["attack"], e["knows"]) == key]


def _points(own: Sequence[Entry], column: str) -> tuple[list[int], list[float]]:
    return [e["batch_size"] for e in own], drawable(e[column] for e in own)


def _rank(axes: Axes, own: Sequence[Entry]) -> None:
    sizes = [e["batch_size"] for e in own]
    axes.plot(sizes, [e["unknowns"] for e in own], color=INK, label="unknowns, B dx")
    axes.plot(sizes, [e["rank"] for e in own], "o", color=BLUE, markersize=5, label="rank of J")
    limit = own[0]["rank_limit"]
    if limit < 3 * own[-1]["unknowns"]:
        axes.axhline(limit, color=VERMILION, linewidth=1, linestyle="--", label=f"limit of the rank, {limit:,}")
    else:
        axes.plot([], [], " ", label=f"limit of the rank: {limit:,}, far above")
    axes.set_ylim(bottom=0)
    axes.set_title("what the gradient determines")
    axes.set_xlabel("batch size B")
    axes.set_ylabel("directions of the batch")
    axes.legend(loc="upper left")
    light_grid(axes)


@exit_status
def main(argv: list[str]) -> None:
    """Run the study; exit status 2 if the input is refused."""
    config = parse_config(BatchSizeConfig, argv, prog="batch_size.py")
    state = process_state(config.processes)
    torch.set_num_threads(config.threads)
    whole = image_study(config, config.model, study_images(config), state, initialization=config.initialization)
    studies = {size: replace(whole, batch_size=size) for size in config.batch_sizes}
    for study in studies.values():
        study.check([f"gaussian(std={config.noise_std})"], config.attacks)
    folder = study_folder(config, {f"B={size}": study for size, study in studies.items()})
    items = [(size, sample) for size in config.batch_sizes for sample in range(config.samples)]
    rows = run_items(
        items, lambda _, item: batch_rows(config, studies[item[0]], item[1]), folder, state, label="batches"
    )
    if state.is_main_process:
        publish(Path(config.output), "batch_size", summary(rows), figure)
    finish(state)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
