r"""Does a penalty on the influence function's denominator protect more than noise, at equal accuracy?

The future work named by Zhang et al. 2023 (arXiv:2309.13016): main-task loss and privacy optimised together. Every
step the server goes along
    mean of the clients' released gradients of L   +   beta grad_theta max(R(theta) - r, 0)
    R(theta) = log( (1/n) sum_i ||J_i(theta) v||^2 ),  v ~ N(0, I_P) drawn anew at each step, one for all images
on n *public* images i. J_i v = d<grad_theta L_i, v> / dx is one double backward pass, grad R a third. E ||J_i v||^2 =
tr(A_i), so e^R is the mean trace of A. Why the trace: an unbiased attacker errs by sigma^2 tr(A^-1) / dx >=
sigma^2 dx / tr(A) at least (arithmetic against harmonic mean), so lowering R by 1 raises that certified squared error
e-fold. The mean over images stands inside the logarithm, so that images that leak most count most; one draw estimates
e^R without bias, its logarithm with a small one. Without the budget r, R falls without bound where all gradients
vanish: any beta that was felt at all drove the model there (digits: 0.01 did nothing, 0.03 left accuracy at chance).
The clients release gradients of L alone, noised; the penalty sees no private image, so that all attackers match what
they receive exactly, and R costs no privacy.

What is compared, with the same number of steps, releases and images:
  noise        sigma in ``noise_stds`` per coordinate of every release
  regularizer  sigma = ``regularized_std`` and r in ``budgets``, beta = ``penalty``
  dp           clip to ``max_norm``, sigma = z max_norm with z in ``noise_multipliers``
Each client draws from its own share by Poisson sampling, one image expected. After training, releases of one image
each, as in training, are attacked at the trained weights. ``predicted`` is the best attacker's error by the exact
linearisation at the truth (for dp, at the noise over the clipping factor). ``relative`` is the same at noise of
``relative_noise`` times *each gradient's own* rms: whether weights are safer, or their gradients just smaller.

    accelerate launch --config_file configs/accelerate/cpu1.yaml recipes/influence_regularizer.py
        --config configs/influence_regularizer/digits.yaml

(one line). A killed run continues where it stopped. One process or several give the same rows.
"""

import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.util import find_spec

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from private_training import FlatGradients, Split, accuracy, generator_of, splits, train
from regularizer_report import write_report
from torch import Tensor

from lmleak.adapters import VisionAdapter
from lmleak.adapters.targets import IMAGE_TASK
from lmleak.attacks import Attack, make_attack
from lmleak.config import check_counts, check_positive, parse_config
from lmleak.defenses import Defense, GaussianNoise, derived_seed
from lmleak.defenses.clip import Clip
from lmleak.defenses.privacy import epsilon
from lmleak.errors import ConfigError, DataError
from lmleak.evaluation import exit_status, finish, process_state, run_items
from lmleak.evaluation.image_attack import scored_image_attack
from lmleak.evaluation.image_study import ImageStudyConfig, image_study, study_folder, study_images
from lmleak.gradients import capture_gradient
from lmleak.influence import GradientJacobian, eigen_directions

PRIOR_STD = 1.0  # of normalised pixels
DRAWS, NOISE, PUBLIC, PROBES = range(4)  # independent random streams


@dataclass(frozen=True)
class RegularizerConfig(ImageStudyConfig):
    """Compare training with a penalty on leakage, with noise, and with DP-SGD."""

    model: str = "lenet"
    """One of the architectures; untrained."""
    noise_stds: list[float] = field(default_factory=lambda: [0.003, 0.01, 0.03, 0.1])
    """sigma of the arm of noise, in the gradient's unit."""
    budgets: list[float] = field(default_factory=lambda: [1.0, 0.0, -1.0])
    """r of the arm of the regulariser."""
    penalty: float = 0.3
    """beta of the arm of the regulariser."""
    regularized_std: float = 0.01
    """sigma of the arm of the regulariser."""
    noise_multipliers: list[float] = field(default_factory=lambda: [0.003, 0.01, 0.03])
    """z of the arm of DP-SGD."""
    max_norm: float = 1.0
    """C of the arm of DP-SGD."""
    delta: float = 1e-5
    """Of (epsilon, delta)-differential privacy."""
    relative_noise: float = 0.1
    """Noise of the prediction at equal relative noise, in multiples of the gradient's rms."""
    attack_iterations: int = 60
    """Steps of gs, all of them by signs as published."""
    newton_iterations: int = 15
    """Steps of gauss-newton."""
    training_images: int = 1000
    """Private images of all clients together."""
    public_images: int = 100
    """Images on which the penalty is computed."""
    public_batch: int = 16
    """Of these, per step."""
    test_images: int = 600
    """Images on which accuracy is measured."""
    clients: int = 16
    """Releases per step."""
    steps: int = 150
    """Steps of training."""
    learning_rate: float = 0.01
    """Of Adam."""
    training_seeds: int = 3
    """Trainings per setting, of other weights, draws and noise."""
    output: str = "runs/influence_regularizer/digits"
    """Folder for rows, table and figure."""

    def __post_init__(self):
        super().__post_init__()
        counts = ("attack_iterations", "newton_iterations", "training_images", "public_images", "public_batch")
        counts += ("test_images", "clients", "steps", "training_seeds")
        check_counts(self, *counts)
        check_positive(self, "noise_stds", "noise_multipliers")
        if not self.budgets or not all(map(math.isfinite, self.budgets)):
            raise ConfigError(f"budgets must be finite and not empty, got {self.budgets}")
        check_positive(self, "penalty", "regularized_std", "max_norm", "relative_noise", "learning_rate")
        if self.batch_size != 1 or self.shared != "all":
            raise ConfigError("releases are gradients of one image on all parameters: batch_size=1 and shared=all")
        if self.public_batch > self.public_images or self.clients > self.training_images:
            raise ConfigError("public_batch must not exceed public_images, nor clients training_images")

    @property
    def settings(self) -> list[tuple[str, float]]:
        """Arm and strength of everything compared."""
        return [
            *(("noise", std) for std in self.noise_stds), *(("regularizer", budget) for budget in self.budgets),
            *(("dp", z) for z in self.noise_multipliers),
        ]  # fmt: skip

    def std(self, arm: str, strength: float) -> float:
        """Return the noise's standard deviation per coordinate of one release."""
        return {"noise": strength, "regularizer": self.regularized_std, "dp": strength * self.max_norm}[arm]

    def epsilon(self, arm: str, strength: float) -> float | None:
        """Return the epsilon of a training, of a server that does not see who was drawn; None without Opacus."""
        if arm != "dp":
            return math.inf
        if find_spec("opacus") is None:
            return None
        rate = 1 / (self.training_images // self.clients)
        return epsilon(strength, sample_rate=rate, steps=self.steps, delta=self.delta)


# Training ---------------------------------------------------------------------------------------------------


def penalty_gradient(flat: FlatGradients, public: Split, probe: Tensor) -> tuple[Tensor, float]:
    """Return grad_theta R as a vector (P,), and R.

    Args:
        flat: The model.
        public: n images.
        probe: v (P,).

    Returns:
        Both.

    Raises:
        DataError: If the gradient does not depend on these images.
    """
    parameters = flat.parameters
    images = public.images.detach().requires_grad_()
    loss = len(images) * flat.adapter.loss(images, public.labels, {}, parameters)  # of examples that do not mix
    gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
    along = torch.dot(torch.cat([g.reshape(-1) for g in gradients]), probe)
    (products,) = torch.autograd.grad(along, images, create_graph=True)  # row i: J_i v
    mean_square = products.flatten(1).square().sum(1).mean()
    if not mean_square > 0:
        raise DataError("the gradient does not depend on the public images, so there is nothing to penalise")
    value = mean_square.log()
    slopes = torch.autograd.grad(value, list(parameters.values()), materialize_grads=True)
    return torch.cat([s.reshape(-1) for s in slopes]), value.item()


def server_update(
    config: RegularizerConfig, arm: str, strength: float, private: Split, public: Split, seed: int
) -> Callable[[FlatGradients, int], Tensor]:
    """Return the server's step: the mean release, plus the penalty's gradient."""
    draws, noise, chosen, probes = (generator_of(seed, stream) for stream in (DRAWS, NOISE, PUBLIC, PROBES))
    count, device = config.clients, private.labels.device
    share = config.training_images // count
    std = config.std(arm, strength)

    def update(flat: FlatGradients, _: int) -> Tensor:
        drawn = (torch.rand(count * share, generator=draws) < 1 / share).nonzero()[:, 0].to(device)
        total = torch.zeros(flat.size, device=device)
        if len(drawn):  # clients' shares are consecutive; their draws are independent, so that the sum is all it takes
            gradients = flat(private.images[drawn], private.labels[drawn])
            if arm == "dp":
                gradients = gradients * (config.max_norm / gradients.norm(dim=1, keepdim=True)).clamp(max=1)
            total = gradients.sum(0)
        # Independent noise of every client adds up to a deviation of std sqrt(clients).
        total = total + std * count**0.5 * torch.randn(flat.size, generator=noise).to(total)
        direction = total / count
        if arm == "regularizer":
            places = torch.randperm(len(public.labels), generator=chosen)[: config.public_batch].to(device)
            probe = torch.randn(flat.size, generator=probes).to(total)
            slope, value = penalty_gradient(flat, Split(public.images[places], public.labels[places]), probe)
            if value > strength:
                direction = direction + config.penalty * slope
        return direction

    return update


# Leakage ----------------------------------------------------------------------------------------------------


def attackers(config: RegularizerConfig, std: float) -> dict[str, Attack]:
    """Return the attackers by name; both know the noise."""
    return {
        "gs": make_attack("gs", task=IMAGE_TASK, iterations=config.attack_iterations, signs="always"),
        "gauss-newton": make_attack(
            "gauss-newton", task=IMAGE_TASK, iterations=config.newton_iterations, prior_weight=std**2 / PRIOR_STD**2
        ),
    }


def release_defense(config: RegularizerConfig, arm: str, std: float, seed: int) -> list[Defense]:
    """Return what is done to the gradient of one image, in order."""
    clip = [Clip(max_norm=config.max_norm)] if arm == "dp" else []
    return [*clip, GaussianNoise(std=std, seed=seed)]


def measure_leakage(config: RegularizerConfig, adapter: VisionAdapter, attacked: Split, arm: str, strength: float,
                    seed: int) -> dict:  # fmt: skip
    """Return errors per attack over the attacked images, and predictions."""
    std = config.std(arm, strength)
    found = {name: [] for name in ("predicted", "relative", "gradient_rms")}
    scores = {name: [] for name in attackers(config, std)}
    for sample in range(len(attacked.labels)):
        batch = adapter.batch(attacked.images[sample : sample + 1], attacked.labels[sample : sample + 1])
        sample_seed = derived_seed(seed, sample)
        true = capture_gradient(adapter, batch, shared="all")
        shared = true
        for defense in release_defense(config, arm, std, sample_seed):
            shared = defense(shared)
        directions = eigen_directions(GradientJacobian(adapter, batch, shared="all"))
        norm = true.rms * true.num_coordinates**0.5
        scale = min(1.0, config.max_norm / norm) if arm == "dp" else 1.0
        found["predicted"].append(directions.bayes_error(std / scale, PRIOR_STD).rms)
        found["relative"].append(directions.bayes_error(config.relative_noise * true.rms, PRIOR_STD).rms)
        found["gradient_rms"].append(true.rms)
        for name, attack in attackers(config, std).items():
            scores[name].append(scored_image_attack(attack, adapter, shared, batch, seed=sample_seed).get("rmse"))
    return found | {"attacks": scores}


def study_rows(config: RegularizerConfig, make: Callable[[int, str], VisionAdapter], data, item) -> list[dict]:
    """Return one row: accuracy and leakage of one training."""
    arm, strength, number = item
    seed = config.seed + number
    adapter = make(seed, "float32")
    sizes = (config.samples, config.training_images, config.public_images, config.test_images)
    attacked, private, public, test = splits(adapter, data, 0, sizes, seed)
    update = server_update(config, arm, strength, private, public, seed)
    train(adapter, update, steps=config.steps, learning_rate=config.learning_rate)
    reached = accuracy(adapter, test)
    judge = make(seed, config.precision)
    judge.model.load_state_dict(adapter.model.state_dict())
    found = measure_leakage(config, judge, attacked, arm, strength, seed)
    return [{
        "key": f"{arm}|{strength:g}|{number}", "arm": arm, "strength": strength, "number": number,
        "std": config.std(arm, strength), "accuracy": reached, **found,
    }]  # fmt: skip


# The study --------------------------------------------------------------------------------------------------


@exit_status
def main(argv: list[str]) -> None:
    """Run the study; exit status 2 if the input is refused."""
    config = parse_config(RegularizerConfig, argv, prog="influence_regularizer.py")
    state = process_state(config.processes)
    torch.set_num_threads(config.threads)
    data = study_images(config)
    study = image_study(config, config.model, data, state)

    def make(seed: int, precision: str) -> VisionAdapter:
        """Return an untrained model."""
        return image_study(replace(config, precision=precision, seed=seed), config.model, data, state).adapter

    sizes = (config.samples, config.training_images, config.public_images, config.test_images)
    splits(study.adapter, data, 0, sizes, config.seed)
    items = [(*setting, number) for number in range(config.training_seeds) for setting in config.settings]
    folder = study_folder(config, {config.model: study})
    rows = run_items(items, lambda _, item: study_rows(config, make, data, item), folder, state, label="regularising")
    if state.is_main_process:
        epsilons = {setting: config.epsilon(*setting) for setting in config.settings}
        write_report(rows, epsilons, folder.path)
    finish(state)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
