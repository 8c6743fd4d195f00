"""Does the same noise protect every image and every class alike?

The study of unfairness of Zhang et al. 2023 (arXiv:2309.13016): noise of variance 1e-3 on the gradient of one image.
Every image's error is predicted without an attack, per normalised pixel, from the spectrum of A = J J^T:
  unbiased  sqrt(sigma^2 tr(A^-1) / dx)                       attackers without a prior; without bound where A is small
  bayes     sqrt(tr((A / sigma^2 + I / tau^2)^-1) / dx)       the best attacker who knows mean and deviation of x
Some images are attacked as well; "local" is the data owner's check, which starts at the true image and knows the
prior.
The networks are untrained, so the study is repeated over draws of their weights, which the published one is not: is it
digits that are protected well or badly, or the classes that a draw of the weights favours?

    accelerate launch --config_file configs/accelerate/cpu1.yaml recipes/unfairness.py
        --config configs/unfairness/digits.yaml

(one line). A killed run continues where it stopped. One process or several give the same rows.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from image_study_parts import LOCAL, LocalAttacker, classes_in_turn
from image_tables import as_markdown
from unfairness_report import class_entries, grid_figure, number_entries, unfairness_figure

from lmleak.adapters.targets import IMAGE_TASK
from lmleak.attacks import parse_attack
from lmleak.config import check_positive, parse_config
from lmleak.errors import ConfigError
from lmleak.evaluation import exit_status, finish, process_state, run_items
from lmleak.evaluation.image_attack import scored_image_attack
from lmleak.evaluation.image_study import (
    ImageStudy,
    ImageStudyConfig,
    image_study,
    study_folder,
    study_images,
)
from lmleak.files import write_bytes_atomically, write_csv_atomically, write_text_atomically
from lmleak.influence import GradientJacobian, eigen_directions
from lmleak.report.drawing import encode


@dataclass(frozen=True, kw_only=True)
class UnfairnessConfig(ImageStudyConfig):
    """Compare predicted and measured errors of images and classes under the same noise."""

    model: str = "lenet"
    """Architecture whose weights are drawn anew for every model seed."""
    initialization: str = "uniform"
    """How its weights are drawn."""
    model_seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3])
    """One network per seed."""
    samples: int = 50
    """Images whose error is predicted, the classes in turn."""
    attacked: int = 10
    """How many of them are attacked."""
    attacked_models: int = 2
    """On how many of the networks, from the first."""
    noise_variance: float = 1e-3
    """sigma^2 per coordinate of the gradient."""
    attacks: list[str] = field(default_factory=lambda: ["gauss-newton(prior_weight=0.001, iterations=30)"])
    """Attacks; for the most probable image, prior_weight is sigma^2 / tau^2 with tau = 1 normalised pixel."""
    output: str = "runs/unfairness"

    def __post_init__(self):
        super().__post_init__()
        if not self.model_seeds or len(set(self.model_seeds)) < len(self.model_seeds):
            raise ConfigError(f"model_seeds must be different and not empty, got {self.model_seeds}")
        check_positive(self, "noise_variance")
        if not 0 <= self.attacked <= self.samples:
            raise ConfigError(f"attacked must be from 0 to samples = {self.samples}, got {self.attacked}")
        if self.batch_size != 1:
            raise ConfigError(f"errors are those of one image; batch_size must be 1, got {self.batch_size}")
        for spec in self.attacks:
            parse_attack(spec, task=IMAGE_TASK)

    @property
    def noise_std(self) -> float:
        """Noise level sigma."""
        return self.noise_variance**0.5


def image_rows(config: UnfairnessConfig, study: ImageStudy, model_seed: int, sample: int, attack: bool) -> list[dict]:
    """Return the prediction of one image under one network, and one row per attacker if it is attacked."""
    adapter, batch = study.adapter, study.batch(sample)
    directions = eigen_directions(GradientJacobian(adapter, batch, shared=study.shared))
    prior = adapter.prior()
    release = study.release(sample, f"gaussian(std={config.noise_std!r})", batch=batch)
    with torch.no_grad():
        chances = adapter.logits(adapter.input(batch)).double().softmax(-1)
    unbiased = directions.expected_error(config.noise_std).rms
    facts = {
        "model_seed": model_seed,
        "sample": sample,
        "label": batch.targets.item(),
        "true_chance": chances[0, batch.targets].item(),
        "unbiased_rms": unbiased if directions.nullity == 0 else None,
        "bayes_rms": directions.bayes_error(config.noise_std, prior.std).rms,
        "effective_rank": directions.effective_rank(config.noise_std, prior.std),
        "nullity": directions.nullity,
    }
    rows = [{"key": f"{model_seed}|{sample}"} | facts | {"attack": None}]
    if not attack:
        return rows
    weight = (config.noise_std / prior.std) ** 2
    attackers = {LOCAL: LocalAttacker(truth=adapter.input(batch), prior_weight=weight)}
    attackers |= {spec: parse_attack(spec, task=IMAGE_TASK) for spec in config.attacks}
    for name, attacker in attackers.items():
        seed = study.sample_seed(sample)
        scored = scored_image_attack(attacker, adapter, release.shared, batch, seed=seed, keep_images=True)
        rows.append({"key": f"{model_seed}|{sample}|{name}"} | facts | {"attack": name} | scored)
    return rows


def write_results(config: UnfairnessConfig, studies: Mapping[int, ImageStudy], rows: list[dict], folder) -> None:
    """Write tables and figures, and print the tables."""
    study = next(iter(studies.values()))
    names = study.data.class_names
    mnist = config.model == "lenet" and study.data.image_shape == (1, 28, 28)
    classes, numbers = class_entries(rows, names, mnist, config.seed), number_entries(rows, names, mnist, config.seed)
    pictures = {"unfairness": unfairness_figure(rows, classes)}
    if config.attacked:
        pictures["grid"] = grid_figure(study, rows)
    plain = ("model_seed", "sample", "label", "true_chance", "unbiased_rms", "bayes_rms", "effective_rank", "attack")
    table = [{name: row.get(name) for name in (*plain, "rmse", "psnr", "ssim", "stopped")} for row in rows]
    text = as_markdown(classes) + "\n" + as_markdown(numbers)
    write_csv_atomically(folder / "rows.csv", table)
    write_text_atomically(folder / "tables.md", text)
    for name, picture in pictures.items():
        image = encode(picture, "png")
        write_bytes_atomically(folder / f"{name}.png", image)
    print(f"{text}\ntables and figures: {folder}")


@exit_status
def main(argv: list[str]) -> None:
    """Run the study; exit status 2 if the input is refused."""
    config = parse_config(UnfairnessConfig, argv, prog="unfairness.py")
    state = process_state(config.processes)
    torch.set_num_threads(config.threads)
    data = classes_in_turn(study_images(config))
    studies = {
        seed: image_study(replace(config, seed=seed), config.model, data, state, initialization=config.initialization)
        for seed in config.model_seeds
    }
    first = next(iter(studies.values()))
    first.check([f"gaussian(std={config.noise_std!r})"], config.attacks)
    items = [
        (seed, sample, number < config.attacked_models and sample < config.attacked)
        for number, seed in enumerate(config.model_seeds)
        for sample in range(config.samples)
    ]
    folder = study_folder(config, {f"{config.model}-{seed}": study for seed, study in studies.items()})
    rows = run_items(items, lambda _, item: image_rows(config, studies[item[0]], *item), folder, state, label="images")
    if state.is_main_process:
        write_results(config, studies, rows, folder.path)
    finish(state)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
