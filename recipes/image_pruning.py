"""Does pruning a gradient protect images? Against whom?

The pruning study of Zhang et al. 2023 (arXiv:2309.13016, figure 13), with the attacker it leaves out. Gradients are
pruned to the coordinates of largest magnitude; then every attack runs twice:
  naive       matches the pruned gradient as it is, zeros included; predicted by I2F of delta = released - true
  mask-aware  compares the coordinates that were kept only; predicted by the best attacker who knows mask, noise and
              prior (Bayes), which is sqrt(nullity / dx) of the prior's deviation where there is no noise
Predictions are those of the attack's own objective: J for squared distances, J of the direction for the cosine (gs).
The mask-aware Gauss-Newton attacker weighs the prior by sigma^2 / tau^2, as the prediction assumes; gs takes pixels
from the valid range, of which the prediction knows nothing, and may do better.

    accelerate launch --config_file configs/accelerate/cpu1.yaml recipes/image_pruning.py
        --config configs/image_pruning/digits.yaml

(one line). Errors are root mean squares per pixel in units of the model's input (normalised pixels), predicted and
measured. A killed run continues where it stopped; one process or several give the same rows.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from image_tables import Entry, drawable, mean, publish, root_mean_square
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lmleak.adapters.targets import IMAGE_TASK
from lmleak.attacks import Attack, parse_attack
from lmleak.attacks.image_newton import GaussNewton
from lmleak.config import parse_config
from lmleak.defenses import GaussianNoise, Prune, derived_seed
from lmleak.errors import ConfigError
from lmleak.evaluation import exit_status, finish, process_state, run_items
from lmleak.evaluation.image_attack import scored_image_attack
from lmleak.evaluation.image_study import ImageStudy, ImageStudyConfig, image_study, study_folder, study_images
from lmleak.gradients import capture_gradient
from lmleak.influence import (
    CosineJacobian,
    GradientJacobian,
    MaskedJacobian,
    eigen_directions,
    mask_aware_influence,
)
from lmleak.report.drawing import BLUE, GREY, INK, VERMILION, house_style, light_grid

ATTACKERS = {"naive": (VERMILION, "s", "none"), "mask-aware": (BLUE, "o", "full")}  # colour, marker, filling
COSINE = ("gs",)  # attacks that match directions


@dataclass(frozen=True, kw_only=True)
class PruningConfig(ImageStudyConfig):
    """Prune gradients of images, and attack them with and without regard to the mask."""

    model: str = "lenet"
    """Architecture, weights or hub id."""
    initialization: str | None = None
    """How an architecture's weights are drawn."""
    ratios: list[float] = field(default_factory=lambda: [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
    """Shares of the coordinates that are dropped."""
    noise: float = 1e-3
    """Gaussian noise before pruning, in multiples of the gradient's root mean square; 0 for none."""
    attacks: list[str] = field(
        default_factory=lambda: ["gauss-newton(start=mean, iterations=30)", "gs(tv=0, iterations=300)"]
    )
    """Attacks; each runs as the naive and as the mask-aware attacker."""
    precision: str = "float64"
    """float32, or float64 for eigenvalues far below the largest."""
    output: str = "runs/image_pruning"
    """Folder for rows, table and figure."""

    def __post_init__(self):
        super().__post_init__()
        if not self.ratios or not all(0 <= ratio < 1 for ratio in self.ratios):
            raise ConfigError(f"ratios must lie in [0, 1) and not be empty, got {self.ratios}")
        if not 0 <= self.noise < float("inf"):
            raise ConfigError(f"noise must be a finite number of at least 0, got {self.noise}")
        names = [parse_attack(spec, task=IMAGE_TASK).name for spec in self.attacks]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"attacks must hold each of at least one attack once, got {self.attacks}")
        for spec in self.attacks:
            if parse_attack(spec, task=IMAGE_TASK).mask_zeros != "auto":
                raise ConfigError(f"{spec}: leave mask_zeros out, both of its values are studied")


def attacker(spec: str, kind: str, noise_std: float, prior_std: float) -> Attack:
    """Return an attack as the naive or the mask-aware attacker."""
    attack = replace(parse_attack(spec, task=IMAGE_TASK), mask_zeros=kind == "mask-aware")
    if kind == "mask-aware" and isinstance(attack, GaussNewton):
        return replace(attack, prior_weight=(noise_std / prior_std) ** 2)
    return attack


def sample_rows(config: PruningConfig, study: ImageStudy, sample: int) -> list[dict]:
    """Return one row per ratio, attack and attacker on one sample."""
    adapter, batch, seed = study.adapter, study.batch(sample), study.sample_seed(sample)
    prior_std = adapter.prior().std
    true = capture_gradient(adapter, batch, shared=study.shared)
    jacobian = GradientJacobian(adapter, batch, shared=study.shared)
    directions = eigen_directions(jacobian)
    along = eigen_directions(CosineJacobian(jacobian, true.gradient))
    noise_std = config.noise * true.rms
    noisy = GaussianNoise(std=noise_std, seed=derived_seed(seed, 0))(true) if config.noise else true
    rows = []
    for ratio in config.ratios:
        released = Prune(ratio=ratio)(noisy)
        gradient = released.gradient
        risk = mask_aware_influence(directions, true.gradient, gradient, noise_std=noise_std, prior_std=prior_std)
        kept = CosineJacobian(
            MaskedJacobian(jacobian, {n: g != 0 for n, g in gradient.items()}),
            {n: g * (gradient[n] != 0) for n, g in true.gradient.items()},
        )
        delta = {n: gradient[n] - g for n, g in true.gradient.items()}
        aware = eigen_directions(kept).bayes_error(noise_std * kept.perturbation_scale, prior_std)
        naive = along.influence(delta).norm().item() / directions.dx**0.5
        measured = {
            "sample": sample, "indices": study.indices(sample), "labels": batch.targets.tolist(), "ratio": ratio,
            "noise_std": noise_std, "kept_share": risk.kept_share, "rank": risk.rank, "dx": directions.dx,
            "effective_rank": risk.effective_rank,
        }  # fmt: skip
        for spec in config.attacks:
            cosine = parse_attack(spec, task=IMAGE_TASK).name in COSINE
            predicted = {
                "naive": naive if cosine else risk.naive.rms,
                "mask-aware": aware.rms if cosine else risk.aware.rms,
            }
            for kind in ATTACKERS:
                attack = attacker(spec, kind, noise_std, prior_std)
                rows.append(
                    {"key": f"{sample}|{ratio:g}|{spec}|{kind}"}
                    | measured
                    | {"attack": spec, "attacker": kind, "predicted_rms": predicted[kind]}
                    | scored_image_attack(attack, adapter, released, batch, seed=seed)
                )
    return rows


def summary(rows: Sequence[dict]) -> list[Entry]:
    """Return one line per attack, attacker and ratio: means over samples, errors as root mean squares."""
    found = []
    for spec, kind, ratio in dict.fromkeys((r["attack"], r["attacker"], r["ratio"]) for r in rows):
        own = [r for r in rows if (r["attack"], r["attacker"], r["ratio"]) == (spec, kind, ratio)]
        found.append({
            "attack": spec.partition("(")[0], "attacker": kind, "ratio": ratio, "samples": len(own),
            "kept_share": mean(r["kept_share"] for r in own), "dx": own[0]["dx"],
            "rank": mean(float(r["rank"]) for r in own),
            "effective_rank": mean(r["effective_rank"] for r in own),
            "predicted_rms": root_mean_square(r["predicted_rms"] for r in own),
            "measured_rmse": root_mean_square(r.get("rmse") for r in own),
            "psnr_db": mean(r.get("psnr") for r in own), "ssim": mean(r.get("ssim") for r in own),
        })  # fmt: skip
    return sorted(found, key=lambda e: (e["attack"], e["attacker"] != "naive", e["ratio"]))


def figure(entries: Sequence[Entry]) -> Figure:
    """Draw predicted and measured errors over the ratio per attack, one against the other, and the rank of J_kept."""
    attacks = list(dict.fromkeys(e["attack"] for e in entries))
    with house_style():
        drawing = Figure(figsize=(4.3 * max(2, len(attacks)), 7.4), layout="constrained")
        columns = max(2, len(attacks))
        shared: Axes | None = None
        for place, attack in enumerate(attacks):
            axes = drawing.add_subplot(2, columns, place + 1, yscale="log", sharey=shared)
            shared = shared or axes
            for kind, (colour, marker, filling) in ATTACKERS.items():
                own = [e for e in entries if (e["attack"], e["attacker"]) == (attack, kind)]
                ratios = [e["ratio"] for e in own]
                axes.plot(ratios, drawable(e["predicted_rms"] for e in own), color=colour, label=f"{kind}, predicted")
                axes.plot(
                    ratios, drawable(e["measured_rmse"] for e in own), marker, color=colour,
                    fillstyle=filling, markersize=6, label=f"{kind}, measured",
                )  # fmt: skip
            axes.axhline(1, color=GREY, linewidth=1, linestyle=":", label="deviation of the prior (a guess)")
            axes.set_title(attack)
            axes.set_xlabel("share of the gradient's coordinates pruned")
            axes.set_ylabel("error, rms per normalised pixel")
            light_grid(axes)
        _agreement(drawing.add_subplot(2, columns, columns + 1, xscale="log", yscale="log"), entries)
        _rank(drawing.add_subplot(2, columns, columns + 2), entries)
        handles, labels = drawing.axes[0].get_legend_handles_labels()
        drawing.legend(handles, labels, loc="outside lower center", ncols=3)
    return drawing


def _agreement(axes: Axes, entries: Sequence[Entry]) -> None:
    markers = dict(zip(dict.fromkeys(e["attack"] for e in entries), "osD^v" * 4, strict=False))
    for attack, marker in markers.items():
        for kind, (colour, _, _) in ATTACKERS.items():
            own = [e for e in entries if (e["attack"], e["attacker"]) == (attack, kind)]
            axes.plot(
                drawable(e["predicted_rms"] for e in own), drawable(e["measured_rmse"] for e in own), marker,
                color=colour, markersize=5, alpha=0.75, markeredgewidth=0,
            )  # fmt: skip
        axes.plot([], [], marker, color=INK, markersize=5, label=attack)
    seen = [v for line in axes.lines for v in (*line.get_xdata(), *line.get_ydata()) if v == v]
    if seen:
        axes.plot([min(seen), max(seen)], [min(seen), max(seen)], color=GREY, linewidth=1, zorder=0)
    axes.set_title("prediction against measurement")
    axes.set_xlabel("predicted error, rms per normalised pixel")
    axes.set_ylabel("measured RMSE, normalised pixels")
    axes.legend(loc="upper left")
    light_grid(axes)


def _rank(axes: Axes, entries: Sequence[Entry]) -> None:
    own = [e for e in entries if (e["attack"], e["attacker"]) == (entries[0]["attack"], "mask-aware")]
    ratios = [e["ratio"] for e in own]
    axes.axhline(own[0]["dx"], color=GREY, linewidth=1, linestyle=":", label="pixels, dx")
    axes.plot(ratios, [e["rank"] for e in own], "o-", color=BLUE, markersize=4, label="rank")
    axes.plot(ratios, [e["effective_rank"] for e in own], "--", color=INK, label="effective rank under the noise")
    axes.set_ylim(0, 1.08 * own[0]["dx"])
    axes.set_title("what the kept coordinates determine")
    axes.set_xlabel("share of the gradient's coordinates pruned")
    axes.set_ylabel("directions of the image")
    axes.legend(loc="lower left")
    light_grid(axes)


@exit_status
def main(argv: list[str]) -> None:
    """Run the study; exit status 2 if the input is refused."""
    config = parse_config(PruningConfig, argv, prog="image_pruning.py")
    state = process_state(config.processes)
    torch.set_num_threads(config.threads)
    study = image_study(config, config.model, study_images(config), state, initialization=config.initialization)
    study.check([f"prune(ratio={ratio})" for ratio in config.ratios], config.attacks)
    folder = study_folder(config, {"study": study})
    rows = run_items(
        range(config.samples), lambda _, sample: sample_rows(config, study, sample), folder, state, label="pruning"
    )
    if state.is_main_process:
        publish(Path(config.output), "image_pruning", summary(rows), figure)
    finish(state)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
