"""How do risk and recovery change while a classifier is trained?

The checkpoint study of Zhang et al. 2023 (arXiv:2309.13016). A short training on the second half of the images by
index; at each checkpoint the gradients of the same images of the first half, never trained on, under the same noise:
I_lb, I2F, the error of the attacker of maximal posterior probability (MAP), the RMSE of attacks, and the accuracy on
the first half. Errors are root mean squares per normalised pixel.

    accelerate launch --config_file configs/accelerate/cpu1.yaml recipes/training_stages.py
        --config configs/training_stages/digits.yaml
    accelerate launch --config_file configs/accelerate/one_gpu.yaml recipes/training_stages.py
        --config configs/training_stages/gpu.yaml --data path/to/cifar10.npz

(each command on one line). A killed run continues where it stopped; checkpoints lie beside the output folder. No
augmentation and no schedule: the accuracy is that of a short training.
"""

import copy
import hashlib
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from image_influence_measures import CURVATURES, linearized, local_rmse, predictions
from image_influence_report import bootstrap
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from lmleak.adapters import ARCHITECTURES, image_model
from lmleak.adapters.targets import IMAGE_TASK
from lmleak.attacks import parse_attack
from lmleak.config import check_positive, parse_config
from lmleak.data.images import ImageData
from lmleak.defenses import GaussianNoise, Release, parse_defense
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
from lmleak.files import write_bytes_atomically, write_csv_atomically, write_tensors_atomically
from lmleak.gradients import capture_gradient
from lmleak.lookup import lookup
from lmleak.report.drawing import BLUE, INK, ORANGE, PURPLE, SKY, VERMILION, encode, house_style, light_grid
from lmleak.types import Batch

TRAINING = ("model", "initialization", "epochs", "learning_rate", "train_batch_size", "seed", "normalization")
PREDICTED = ("lower_bound_rms", "influence_rms", "map_rms")
AT_ONCE = 500  # images whose logits are computed together


@dataclass(frozen=True, kw_only=True)
class StagesConfig(ImageStudyConfig):
    """Compare risk numbers and attacks along a training."""

    model: str = "lenet"
    """One of the architectures."""
    initialization: str | None = None
    """How its weights are drawn; by default as the architecture says."""
    epochs: list[int] = field(default_factory=lambda: [0, 1, 2, 5, 20])
    """Checkpoints, in passes over the public half."""
    learning_rate: float = 3e-3
    """Of Adam."""
    train_batch_size: int = 32
    """Images per step."""
    defenses: list[str] = field(default_factory=lambda: ["gaussian(std=1e-4)", "gaussian(std=0.01, unit=rms)"])
    """Gaussian noise, absolute or in multiples of the gradient's root mean square."""
    attacks: list[str] = field(default_factory=lambda: ["gauss-newton(iterations=30)", "gs(iterations=300, tv=0)"])
    """Attacks from a random start."""
    local_iterations: int = 40
    """Most steps of the MAP attacker that starts at the truth, "local-map"."""
    local_curvature: str = "own"
    """Its steps: by J J^T at each iterate ("own"), or at the truth, for thousands of pixels ("truth")."""
    precision: str = "float64"
    """Of gradients and attacks; training is in float32."""
    output: str = "runs/training_stages"
    """Folder for rows, table and figure."""

    def __post_init__(self):
        super().__post_init__()
        lookup("architecture", self.model, ARCHITECTURES)
        lookup("local_curvature", self.local_curvature, CURVATURES)
        if not self.epochs or self.epochs != sorted(set(self.epochs)) or self.epochs[0] < 0:
            raise ConfigError(f"epochs must be growing numbers from 0, got {self.epochs}")
        check_positive(self, "train_batch_size", "local_iterations", "learning_rate")
        if not self.defenses or not self.attacks:
            raise ConfigError("a comparison needs at least one defense and one attack")
        for spec in self.defenses:
            if not isinstance(parse_defense(spec), GaussianNoise):
                raise ConfigError(f"defenses must be Gaussian noise, as gaussian(std=0.01, unit=rms); got {spec!r}")
        for spec in self.attacks:
            parse_attack(spec, task=IMAGE_TASK)


# Training --------------------------------------------------------------------------------------------------


def halves(config: StagesConfig, data: ImageData) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return normalised images and labels of the first (held-out) and the second (public) half."""
    images, middle = data.normalization(config.normalization).normalize(data.pixels), len(data) // 2
    if config.samples * config.batch_size > middle:
        raise ConfigError(f"private images come from the first {middle} of {data.name}; use fewer samples")
    return (images[:middle], data.labels[:middle]), (images[middle:], data.labels[middle:])


def train(config: StagesConfig, data: ImageData, device: str) -> dict[int, nn.Module]:
    """Return the model at every checkpoint, on the CPU, in evaluation mode."""
    _, (images, labels) = halves(config, data)
    model = image_model(
        config.model, data.image_shape, len(data.class_names), initialization=config.initialization, seed=config.seed
    ).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    generator = torch.Generator().manual_seed(config.seed)
    found = {}
    for epoch in range(config.epochs[-1] + 1):
        if epoch:
            model.train()
            for places in torch.randperm(len(images), generator=generator).split(config.train_batch_size):
                loss = F.cross_entropy(model(images[places].to(device)), labels[places].to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        if epoch in config.epochs:
            found[epoch] = copy.deepcopy(model).cpu().eval()
    return found


def checkpoints(config: StagesConfig, data: ImageData, state: PartialState) -> dict[int, nn.Module]:
    """Return the trained models, from files if this training was done before; one process trains, all read."""
    settings = {name: getattr(config, name) for name in TRAINING} | {"images": list(data.pixels.shape)}
    digest = hashlib.sha256(json.dumps(settings).encode() + data.pixels.numpy().tobytes()).hexdigest()[:16]
    folder = Path(f"{config.output}-checkpoints") / digest
    files = {epoch: folder / f"epoch-{epoch}.safetensors" for epoch in config.epochs}
    device = str(state.device) if config.device == "auto" else config.device
    with state.main_process_first():
        if not all(file.exists() for file in files.values()):
            for epoch, model in train(config, data, device).items():
                write_tensors_atomically(files[epoch], model.state_dict())
    models = {}
    for epoch, file in files.items():
        models[epoch] = image_model(config.model, data.image_shape, len(data.class_names)).eval()
        models[epoch].load_state_dict(load_file(file))
    return models


@torch.no_grad()
def accuracy(config: StagesConfig, data: ImageData, model: nn.Module) -> float:
    """Return the share of the held-out half that a model classifies rightly."""
    (images, labels), _ = halves(config, data)
    right = [
        (model(x).argmax(1) == y).sum() for x, y in zip(images.split(AT_ONCE), labels.split(AT_ONCE), strict=True)
    ]
    return (sum(right) / len(labels)).item()


# Risk at a checkpoint --------------------------------------------------------------------------------------


def stage_rows(config: StagesConfig, study: ImageStudy, epoch: int, sample: int, accurate: float) -> list[dict]:
    """Return one row per defense and attack on one image at one checkpoint."""
    batch = study.batch(sample)
    directions = linearized(study, batch)
    true = capture_gradient(study.adapter, batch, shared=study.shared).gradient
    rows = []
    for spec in config.defenses:
        std = parse_defense(spec).absolute_std(true)

        def measure(batch: Batch, release: Release, std=std) -> dict:
            weight = (std / study.adapter.prior().std) ** 2
            curvature = directions if CURVATURES[config.local_curvature] else None
            found = local_rmse(
                study, batch, release, prior_weight=weight, iterations=config.local_iterations, directions=curvature
            )
            return predictions(directions, study, batch, release.perturbation, std) | {"local_map_rmse": found}

        common = {"model": config.model, "epoch": epoch, "accuracy": accurate}
        rows += attack_rows(
            study, sample, defenses=[spec], attacks=config.attacks, common=common, measure=measure
        )  # fmt: skip
    return rows


def summary(rows: list[dict], seed: int) -> list[dict]:
    """Return medians over images per checkpoint and defense, with 95 % bootstrap intervals over images."""
    found = []
    for epoch, defense in dict.fromkeys((r["epoch"], r["defense"]) for r in rows):
        same = [r for r in rows if (r["epoch"], r["defense"]) == (epoch, defense)]
        first = [r for r in same if r["attack"] == same[0]["attack"]]
        entry = {"model": same[0]["model"], "epoch": epoch, "defense": defense, "images": len(first)}
        entry |= {"accuracy": same[0]["accuracy"], "noise_std": np.median([r["noise_std"] for r in first])}
        numbers = {name: (first, name) for name in ("lambda_max", "lambda_min", *PREDICTED)}
        numbers["RMSE local-map"] = (first, "local_map_rmse")
        for attack in dict.fromkeys(r["attack"] for r in same):
            numbers[f"RMSE {attack}"] = ([r for r in same if r["attack"] == attack], "rmse")
        for name, (chosen, number) in numbers.items():
            value = bootstrap(chosen, lambda some, number=number: middle(some, number), seed)
            entry |= dict(zip((name, f"{name} low", f"{name} high"), value, strict=True))
        found.append(entry)
    return found


def middle(rows: list[dict], name: str) -> float:
    """Return the median of a number; where an attack diverged, its error is infinite."""
    values = [row.get(name) for row in rows]
    return float(np.median([math.inf if value is None else value for value in values]))


def figure(entries: list[dict]) -> Figure:
    """Draw accuracy, and per defense predicted and measured errors, against the epoch."""
    defenses = list(dict.fromkeys(e["defense"] for e in entries))
    measured = [name for name in entries[0] if name.startswith("RMSE") and not name.endswith((" low", " high"))]
    lines = (("lower_bound_rms", "I_lb / sqrt(dx)", SKY, "-"), ("influence_rms", "I2F / sqrt(dx)", BLUE, "-"),
             ("map_rms", "MAP, predicted", VERMILION, "--"))  # fmt: skip
    marks = zip("xD^sv<>" * len(measured), (INK, ORANGE, PURPLE) * len(measured), strict=False)
    looks = dict(zip(measured, marks, strict=False))
    with house_style():
        drawing = Figure(figsize=(3.4 * (1 + len(defenses)), 4.0), layout="constrained")
        panels = drawing.subplots(1, 1 + len(defenses), squeeze=False)[0]
        first = [e for e in entries if e["defense"] == defenses[0]]
        panels[0].plot(range(len(first)), [e["accuracy"] for e in first], "o-", color=INK)
        panels[0].set_ylim(0, 1.03)
        panels[0].set_title(first[0]["model"])
        panels[0].set_ylabel("held-out accuracy")
        for axes, defense in zip(panels[1:], defenses, strict=True):
            own = [e for e in entries if e["defense"] == defense]
            for name, label, colour, dash in lines:
                axes.plot(range(len(own)), [e[name] for e in own], dash, color=colour, label=label)
            for name in measured:
                marker, colour = looks[name]
                middles = np.array([e[name] for e in own])
                ends = np.array([[e[f"{name} low"], e[f"{name} high"]] for e in own]).T
                finite = np.isfinite(ends).all(0)
                spread = np.abs(ends - middles)[:, finite]
                axes.errorbar(np.arange(len(own))[finite], middles[finite], spread, fmt=marker, mfc="none", ms=6,
                              color=colour, elinewidth=0.8, label=name)  # fmt: skip
            axes.set_yscale("log")
            axes.set_title(defense)
            axes.set_ylabel("error, median over images\n(RMS per normalised pixel)")
        for axes in panels:
            axes.set_xticks(range(len(first)), [e["epoch"] for e in first])
            axes.set_xlabel("epochs trained")
            light_grid(axes)
        drawing.legend(*panels[1].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return drawing


def console_table(entries: list[dict]) -> Table:
    """Return the table for people."""
    measured = [name for name in entries[0] if name.startswith("RMSE") and not name.endswith((" low", " high"))]
    names = ("lambda_max", *PREDICTED, *measured)
    table = Table("epochs", "accuracy", "noise", *names, title="medians over images; RMS per normalised pixel")
    for e in entries:
        table.add_row(str(e["epoch"]), f"{e['accuracy']:.3f}", e["defense"], *(f"{e[name]:.3g}" for name in names))
    return table


@exit_status
def main(argv: list[str]) -> None:
    """Run the study; exit status 2 if the input is refused."""
    config = parse_config(StagesConfig, argv, prog="training_stages.py")
    state = process_state(config.processes)
    torch.set_num_threads(config.threads)
    data = study_images(config)
    models = checkpoints(config, data, state)
    accurate = {epoch: accuracy(config, data, model) for epoch, model in models.items()}
    studies = {epoch: image_study(config, model, data, state, name=f"{config.model} epoch {epoch}")
               for epoch, model in models.items()}  # fmt: skip
    folder = study_folder(config, {study.adapter.name: study for study in studies.values()})
    items = [(epoch, sample) for epoch in config.epochs for sample in range(config.samples)]

    def work(_: int, item: tuple[int, int]) -> list[dict]:
        epoch, sample = item
        return stage_rows(config, studies[epoch], epoch, sample, accurate[epoch])

    rows = run_items(items, work, folder, state, label="attacking")
    if state.is_main_process:
        entries = summary(rows, config.seed)
        write_csv_atomically(folder.path / "training_stages.csv", entries)
        image = encode(figure(entries), "png")
        write_bytes_atomically(folder.path / "training_stages.png", image)
        Console(width=None if sys.stdout.isatty() else 200).print(console_table(entries))
        print(f"table and figure: {folder.path}")
    finish(state)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
