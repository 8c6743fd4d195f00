"""What does a perturbation along one direction of J do to the recovered image?

The figure on perturbation directions of Zhang et al. 2023 (arXiv:2309.13016, figure 5). The gradient of one image is
released as g + c v_i, with v_i the right singular vector of J whose eigenvalue of A = J J^T is lambda_i. Attackers who
match it err by c / s_i to first order:

    ||x' - x||^2 / dx = c^2 / (dx lambda_i)        no scale is fitted, in squared units of normalised pixels

The sign of v_i is arbitrary; both are tried. The published norm c = 5 lies outside of this linear regime; a
small c shows the law itself. "local" is the data owner's check: Levenberg-Marquardt that starts at the true image.

    accelerate launch --config_file configs/accelerate/cpu1.yaml recipes/perturbation_directions.py
        --config configs/perturbation_directions/digits.yaml

(one line). A killed run continues where it stopped. One process or several give the same rows.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import log
from statistics import fmean

import torch
from image_study_parts import LOCAL, LocalAttacker
from image_tables import as_markdown
from matplotlib.figure import Figure

from lmleak.adapters.targets import IMAGE_TASK
from lmleak.attacks import parse_attack
from lmleak.config import check_positive, parse_config
from lmleak.errors import ConfigError
from lmleak.evaluation import exit_status, finish, process_state, run_items
from lmleak.evaluation.image_attack import images_of, scored_image_attack
from lmleak.evaluation.image_study import (
    ImageStudy,
    ImageStudyConfig,
    image_study,
    study_folder,
    study_images,
)
from lmleak.files import write_bytes_atomically, write_csv_atomically, write_text_atomically
from lmleak.gradients import capture_gradient
from lmleak.influence import EigenDirections, GradientJacobian, eigen_directions
from lmleak.report.drawing import BLUE, GREY, INK, ORANGE, PURPLE, VERMILION, encode, house_style, light_grid
from lmleak.report.image_grid import image_grid
from lmleak.report.rows import compact
from lmleak.types import Batch

PUBLISHED_NORM = 5.0
PUBLISHED = ((0.0098, 0.014, 2.7, 3.9), (0.09, 0.09, 0.15, 0.3), (0.2, 0.2, 0.05, 0.05))
"""Smallest and largest lambda and MSE of MNIST and LeNet, read by eye; at lambda = 2 the figure shows about 0."""
PUBLISHED_SHAPE = (1, 28, 28)
COLOURS = (BLUE, VERMILION, ORANGE, PURPLE)
Direction = tuple[int, float, float, int]


@dataclass(frozen=True, kw_only=True)
class DirectionsConfig(ImageStudyConfig):
    """Compare the error along single directions with the law c^2 / (dx lambda)."""

    model: str = "lenet"
    """Architecture, shape file, local directory or hub id of an image classifier."""
    initialization: str | None = "uniform"
    """How an architecture's weights are drawn; none for a model that has some."""
    samples: int = 2
    """Images; each is one gradient."""
    eigenvalues: list[float] = field(default_factory=lambda: [0.016, 4e-3, 1e-3, 2e-4])
    """Wanted eigenvalues of A, in gradient^2 / x^2: the nearest ones of every image are taken."""
    norms: list[float] = field(default_factory=lambda: [5e-3, PUBLISHED_NORM])
    """Norms c of the perturbation, in the gradient's unit."""
    signs: list[int] = field(default_factory=lambda: [1, -1])
    """Of v_i, 1 where u_i sums to a positive number."""
    attacks: list[str] = field(default_factory=lambda: ["gauss-newton(iterations=30)", "dlg"])
    """Attacks that start from nothing."""
    local_iterations: int = 25
    """Most steps of "local"."""
    output: str = "runs/perturbation_directions"

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "eigenvalues", "norms")
        if not self.signs or not set(self.signs) <= {1, -1}:
            raise ConfigError(f"signs must be 1, -1 or both, got {self.signs}")
        if self.batch_size != 1:
            raise ConfigError(f"directions are those of one image; batch_size must be 1, got {self.batch_size}")
        for spec in self.attacks:
            parse_attack(spec, task=IMAGE_TASK)


# One direction --------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def spectrum(study: ImageStudy, sample: int) -> tuple[Batch, EigenDirections]:
    """Return an image and the spectrum of its A; the last one is kept for its other directions."""
    batch = study.batch(sample)
    return batch, eigen_directions(GradientJacobian(study.adapter, batch, shared=study.shared))


def nearest(directions: EigenDirections, wanted: float) -> int:
    """Return the index of the eigenvalue nearest to a wanted one, in its logarithm."""
    return int((directions.values[: directions.rank].log() - log(wanted)).abs().argmin())


def upright(directions: EigenDirections, index: int) -> dict[str, torch.Tensor]:
    """Return v_i with the sign at which u_i sums to a positive number, on every machine."""
    sign = 1.0 if directions.input_direction(index).sum() >= 0 else -1.0
    return {name: sign * value for name, value in directions.gradient_direction(index).items()}


def direction_rows(
    study: ImageStudy, attacks: Sequence[str], direction: Direction, local_iterations: int = 25
) -> list[dict]:
    """Return one row per attacker on one image whose gradient was moved along one direction."""
    sample, wanted, norm, sign = direction
    batch, directions = spectrum(study, sample)
    index = nearest(directions, wanted)
    true = capture_gradient(study.adapter, batch, shared=study.shared)
    unit = upright(directions, index)
    moved = {name: g + sign * norm * unit[name].to(g) for name, g in true.gradient.items()}
    released = true.released(moved, f"direction(norm={norm:g})")
    law = directions.direction_mse(index, norm)
    facts = {
        "sample": sample,
        "label": batch.targets.tolist()[0],
        "wanted": wanted,
        "index": index,
        "eigenvalue": directions.values[index].item(),
        "norm": norm,
        "sign": sign,
        "relative_norm": norm / (true.rms * true.num_coordinates**0.5),
        "law_mse": law,
    }
    truth = study.adapter.input(batch)
    attackers = {LOCAL: LocalAttacker(truth=truth, iterations=local_iterations)} | {
        spec: parse_attack(spec, task=IMAGE_TASK) for spec in attacks
    }
    rows = []
    for name, attacker in attackers.items():
        seed = study.sample_seed(sample)
        scored = scored_image_attack(attacker, study.adapter, released, batch, seed=seed, keep_images=True)
        mse = scored["mse"]
        key = "|".join(map(str, (sample, wanted, norm, sign, name)))
        ratio = None if mse is None else mse / law
        rows.append({"key": key} | facts | {"attack": name, "ratio": ratio} | scored)
    return rows


# All directions -------------------------------------------------------------------------------------------


def summary(rows: Sequence[dict]) -> list[dict]:
    """Return law and measured MSE per direction, norm and attacker, over images and signs; norms from the smallest."""
    entries = []
    for norm in sorted({row["norm"] for row in rows}):
        for wanted in dict.fromkeys(row["wanted"] for row in rows):
            for attack in dict.fromkeys(row["attack"] for row in rows):
                own = [r for r in rows if (r["norm"], r["wanted"], r["attack"]) == (norm, wanted, attack)]
                errors = [r["mse"] for r in own if r["mse"] is not None]
                ratios = [r["ratio"] for r in own if r["ratio"] is not None]
                entries.append({
                    "norm": norm,
                    "eigenvalue": fmean(r["eigenvalue"] for r in own),
                    "attack": attack,
                    "gradients": len(own),
                    "diverged": len(own) - len(errors),
                    "law_mse": fmean(r["law_mse"] for r in own),
                    "mse": fmean(errors) if errors else None,
                    "ratio": fmean(ratios) if ratios else None,
                    "smallest_ratio": min(ratios, default=None),
                    "largest_ratio": max(ratios, default=None),
                })  # fmt: skip
    return entries


def law_figure(rows: Sequence[dict], *, published: bool) -> Figure:
    """Draw the measured MSE over the eigenvalue with the law, one panel per norm."""
    norms = sorted({row["norm"] for row in rows})
    attacks = list(dict.fromkeys(row["attack"] for row in rows))
    values = [row["eigenvalue"] for row in rows]
    ends = [min(values) / 1.6, max(values) * 1.6]
    dx = rows[0]["norm"] ** 2 / (rows[0]["law_mse"] * rows[0]["eigenvalue"])
    with house_style():
        figure = Figure(figsize=(1.2 + 4.3 * len(norms), 4.6), layout="constrained")
        for place, norm in enumerate(norms):
            axes = figure.add_subplot(1, len(norms), place + 1, xscale="log", yscale="log")
            axes.plot(ends, [norm**2 / (dx * end) for end in ends], color=GREY, linewidth=1.2, zorder=1,
                      label=r"law $c^2 / (d_x \lambda)$, nothing fitted")  # fmt: skip
            if published and norm == PUBLISHED_NORM:
                for number, (left, right, low, high) in enumerate(PUBLISHED):
                    axes.fill_between([left / 1.12, right * 1.12], low / 1.08, high * 1.08, color="#D5DAE0", zorder=0,
                                      label="" if number else "published, read by eye")  # fmt: skip
            for number, attack in enumerate(attacks):
                own = [r for r in rows if (r["norm"], r["attack"]) == (norm, attack) and r["mse"] is not None]
                # Side by side, since they coincide where the law holds.
                shift = 1.07 ** (number - (len(attacks) - 1) / 2)
                colour = COLOURS[number % len(COLOURS)]
                style = {"facecolors": "none", "edgecolors": INK} if attack == LOCAL else {"color": colour}
                axes.scatter([r["eigenvalue"] * shift for r in own], [r["mse"] for r in own], s=34, alpha=0.85,
                             label="local (starts at the truth)" if attack == LOCAL else attack, zorder=3,
                             **style)  # fmt: skip
            relative = fmean(row["relative_norm"] for row in rows if row["norm"] == norm)
            axes.set_title(f"c = {norm:g}, {compact(relative)} of the gradient's norm")
            axes.set_xlabel(r"eigenvalue $\lambda_i$ of $A = J J^T$  (gradient² / x²)")
            axes.set_ylabel("MSE (squared units of normalised pixels)" if not place else "")
            axes.set_xlim(ends)
            light_grid(axes)
        handles, labels = figure.axes[-1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2 if len(norms) == 1 else 4)
    return figure


def direction_grid(study: ImageStudy, rows: Sequence[dict], sample: int = 0) -> Figure:
    """Draw what was recovered of one image, one column per direction."""
    own = [row for row in rows if (row["sample"], row["sign"]) == (sample, rows[0]["sign"])]
    wanted = list(dict.fromkeys(row["wanted"] for row in own))
    places = study.indices(sample) * len(wanted)
    original = study.data.pixels[places]
    recovered = {}
    for norm in sorted({row["norm"] for row in own}):
        for attack in dict.fromkeys(row["attack"] for row in own if row["attack"] != LOCAL):
            same = [row for row in own if (row["norm"], row["attack"]) == (norm, attack)]
            name = f"{attack.partition('(')[0]}\nc = {norm:g}"
            recovered[name] = torch.cat([images_of(row, original[:1]) for row in same])
    first = [next(row for row in own if row["wanted"] == value) for value in wanted]
    titles = [f"λ = {compact(row['eigenvalue'])}" for row in first]
    return image_grid(original, recovered, column_titles=titles, differences=len(recovered) <= 2)


@exit_status
def main(argv: list[str]) -> None:
    """Run the study; exit status 2 if the input is refused."""
    config = parse_config(DirectionsConfig, argv, prog="perturbation_directions.py")
    state = process_state(config.processes)
    torch.set_num_threads(config.threads)
    study = image_study(config, config.model, study_images(config), state, initialization=config.initialization)
    study.check(["none"], config.attacks)
    items = [
        (sample, wanted, norm, sign)
        for sample in range(config.samples)
        for norm in config.norms
        for wanted in config.eigenvalues
        for sign in config.signs
    ]
    folder = study_folder(config, {config.model: study})
    rows = run_items(
        items,
        lambda _, item: direction_rows(study, config.attacks, item, config.local_iterations),
        folder,
        state,
        label="directions",
    )
    if state.is_main_process:
        entries = summary(rows)
        published = config.model == "lenet" and study.data.image_shape == PUBLISHED_SHAPE
        pictures = {"law": law_figure(rows, published=published), "grid": direction_grid(study, rows)}
        left_out = ("key", "images", "per_example", "notes")
        table = [{name: value for name, value in row.items() if name not in left_out} for row in rows]
        write_csv_atomically(folder.path / "rows.csv", table)
        write_text_atomically(folder.path / "table.md", as_markdown(entries))
        for name, picture in pictures.items():
            image = encode(picture, "png")
            write_bytes_atomically(folder.path / f"{name}.png", image)
        print(as_markdown(entries) + f"table and figures: {folder.path}")
    finish(state)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
