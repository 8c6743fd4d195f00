"""How does the initialisation of the weights change what a noisy gradient gives away?

The study of initialisations of Zhang et al. 2023 (arXiv:2309.13016): the error of attacks on the gradient of an
untrained network against two numbers that need no attack, each from the spectrum of A = J J^T at the image:
  mean 1 / s_i            what the published code plots as E[I^2]; s_i are the singular values of J
  sigma^2 tr(A^-1) / dx   E[I2F^2] / dx, in the unit of the mean squared error
  bayes                   tr((A / sigma^2 + I / tau^2)^-1) / dx, which saturates as attackers who know the prior do
over several draws of the weights, images, and draws of the noise. "local" is the data owner's check: it starts at the
true image and knows the prior.

    accelerate launch --config_file configs/accelerate/cpu1.yaml recipes/initialization.py
        --config configs/initialization/digits.yaml

(one line). A killed run continues where it stopped. One process or several give the same rows.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from image_study_parts import LOCAL, LocalAttacker, classes_in_turn
from image_tables import as_markdown
from initialization_report import initialization_entries, initialization_figure, order_entries

from lmleak.adapters.image_initialization import INITIALIZATIONS
from lmleak.adapters.targets import IMAGE_TASK
from lmleak.attacks import parse_attack
from lmleak.config import check_positive, parse_config
from lmleak.defenses import GaussianNoise, derived_seed
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
from lmleak.gradients import capture_gradient
from lmleak.influence import GradientJacobian, eigen_directions
from lmleak.lookup import lookup
from lmleak.report.drawing import encode


@dataclass(frozen=True, kw_only=True)
class InitializationConfig(ImageStudyConfig):
    """Compare initialisations by the error of attacks and by what predicts it."""

    model: str = "lenet"
    """Architecture whose weights are drawn."""
    initializations: list[str] = field(
        default_factory=lambda: ["uniform", "normal", "kaiming", "xavier", "orthogonal"]
    )
    """Ways to draw them (:mod:`lmleak.adapters.image_initialization`)."""
    model_seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Draws of the weights under each."""
    samples: int = 4
    """Images, the classes in turn."""
    noise_draws: int = 2
    """Draws of the noise per image."""
    noise_variance: float = 1e-3
    """sigma^2 per coordinate of the gradient."""
    attacks: list[str] = field(
        default_factory=lambda: ["dlg(iterations=300)", "gauss-newton(prior_weight=0.001, iterations=30)"]
    )
    """Attacks; for the most probable image, prior_weight is sigma^2 / tau^2 with tau = 1 normalised pixel."""
    output: str = "runs/initialization"

    def __post_init__(self):
        super().__post_init__()
        for name in ("model_seeds", "initializations"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ConfigError(f"{name} must be different and not empty, got {values}")
        for name in self.initializations:
            lookup("initialization", name, INITIALIZATIONS)
        check_positive(self, "noise_variance")
        if self.noise_draws < 1 or self.batch_size != 1:
            raise ConfigError(
                f"noise_draws must be at least 1 and batch_size 1, got {self.noise_draws} and {self.batch_size}"
            )
        for spec in self.attacks:
            parse_attack(spec, task=IMAGE_TASK)


def image_rows(config: InitializationConfig, study: ImageStudy, item: tuple[str, int, int]) -> list[dict]:
    """Return one row per draw of the noise and attacker, on one image under one network."""
    initialization, model_seed, sample = item
    adapter, batch = study.adapter, study.batch(sample)
    directions = eigen_directions(GradientJacobian(adapter, batch, shared=study.shared))
    prior, std = adapter.prior(), config.noise_variance**0.5
    singular = directions.nullity > 0
    facts = {
        "initialization": initialization,
        "model_seed": model_seed,
        "sample": sample,
        "label": batch.targets.item(),
        "mean_inverse_singular": None if singular else directions.mean_inverse_singular_value(),
        "unbiased_mse": None if singular else directions.expected_error(std).rms ** 2,
        "bayes_mse": directions.bayes_error(std, prior.std).rms ** 2,
        "lambda_max": directions.values[0].item(),
        "nullity": directions.nullity,
    }
    true = capture_gradient(adapter, batch, shared=study.shared)
    # The prior bounds the condition of its steps, so that conjugate gradients end where an exact solve does.
    weight = config.noise_variance / prior.std**2
    attackers = {LOCAL: LocalAttacker(truth=adapter.input(batch), prior_weight=weight, solver="auto")}
    attackers |= {spec: parse_attack(spec, task=IMAGE_TASK) for spec in config.attacks}
    rows = []
    for draw in range(config.noise_draws):
        seed = derived_seed(study.sample_seed(sample), draw)
        shared = GaussianNoise(std=std, seed=seed)(true)
        for name, attacker in attackers.items():
            scored = scored_image_attack(attacker, adapter, shared, batch, seed=seed)
            key = "|".join(map(str, (*item, draw, name)))
            rows.append({"key": key} | facts | {"noise_draw": draw, "attack": name} | scored)
    return rows


def write_results(config: InitializationConfig, rows: list[dict], folder, mnist: bool) -> None:
    """Write tables and figure, and print the tables."""
    entries = initialization_entries(rows, mnist, config.seed)
    text = as_markdown(entries) + "\n" + as_markdown(order_entries(rows, config.seed))
    left_out = ("key", "per_example", "notes")
    write_csv_atomically(folder / "rows.csv", [{k: v for k, v in r.items() if k not in left_out} for r in rows])
    write_text_atomically(folder / "tables.md", text)
    image = encode(initialization_figure(rows), "png")
    write_bytes_atomically(folder / "initialization.png", image)
    print(f"{text}\ntables and figure: {folder}")


def studies_of(config: InitializationConfig, state) -> Mapping[tuple[str, int], ImageStudy]:
    """Return one study per initialisation and draw of the weights."""
    data = classes_in_turn(study_images(config))
    return {
        (name, seed): image_study(replace(config, seed=seed), config.model, data, state, initialization=name)
        for name in config.initializations
        for seed in config.model_seeds
    }


@exit_status
def main(argv: list[str]) -> None:
    """Run the study; exit status 2 if the input is refused."""
    config = parse_config(InitializationConfig, argv, prog="initialization.py")
    state = process_state(config.processes)
    torch.set_num_threads(config.threads)
    studies = studies_of(config, state)
    first = next(iter(studies.values()))
    first.check(["none"], config.attacks)
    items = [(*named, sample) for named in studies for sample in range(config.samples)]
    folder = study_folder(config, {f"{name}-{seed}": study for (name, seed), study in studies.items()})
    rows = run_items(items, lambda _, item: image_rows(config, studies[item[:2]], item), folder, state, label="images")
    if state.is_main_process:
        mnist = config.model == "lenet" and first.data.image_shape == (1, 28, 28)
        write_results(config, rows, folder.path, mnist)
    finish(state)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
