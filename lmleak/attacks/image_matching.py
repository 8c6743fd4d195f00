"""Gradient matching for images: move random pixels until their gradient is the observed one. DLG (iDLG) and GS.

    x* = argmin_x  distance(grad_theta L(x, y; theta), g*)  +  tv TV(x)

A step costs three gradients per restart (one, and a backward through it), times the epochs of local training. Measured
on the sigmoid LeNet with U(-0.5, 0.5) weights, clean gradient, labels given, 1,000 steps, one restart, float32, no
normalisation, PSNR in dB of pixels in [0, 1] (``benchmarks/image_gs.py``, ``benchmarks/results/image_gs.md``):

| GS, ``signs``             | "always", as published | "late", the default | "never"  |
|---------------------------|------------------------|---------------------|----------|
| MNIST, lowest             | 18.3                   | 29.9                | 28.4     |
| MNIST, median             | 51.1                   | 53.6                | 52.8     |
| MNIST, at least 23.4 dB   | 22 of 24               | 24 of 24            | 24 of 24 |
| digits, lowest            | 20.1                   | 34.0                | 31.9     |
| digits, median            | 41.9                   | 42.6                | 42.7     |
| digits, at least 23.4 dB  | 7 of 8                 | 8 of 8              | 8 of 8   |

(Images 0-3 of each, six and two draws of weights, three attack seeds; on a further draw, MNIST, weights 2, image 0,
seed 0: 13.9, 32.2, 30.5.) Steps by sign do not shrink near a solution but with the schedule. At the end, at a rate of
1e-3, they help: of the eight MNIST draws on which plain steps stay below 50 dB, six gain 1.5 to 10 dB and two nothing;
of the eight of digits one gains 2.1 dB and seven stay within 0.2 dB. Tried and dropped: signs first, then plain steps
(13 to 37 dB on two draws, with the change at 3/8 or 5/8). Other networks were not measured: the method was published
for deep ReLU networks, where ``signs="always"`` may be the better choice.

DLG by L-BFGS, (weights, image), seed 0: (1, 0) 54.6, (1, 1) 51.8, (2, 0) 37.2, (2, 1) 53.6, (3, 0) 60.6.

In float32 the cosine distance is rounded to about 1e-7: with ``tv=0`` the best iterate is one among near equals.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lmleak.adapters.vision import VisionAdapter
from lmleak.attacks.descent import Progress, restart_seeds
from lmleak.attacks.image_base import ImageAttack, ImageProblem
from lmleak.attacks.objectives import Cosine, Objective, SquaredL2
from lmleak.errors import ConfigError
from lmleak.lookup import lookup
from lmleak.types import ImageReconstruction, Observation

MILESTONES = (3 / 8, 5 / 8, 7 / 8)  # parts of the iterations after which GS takes steps ten times smaller
SIGNS = {"always": 0.0, "late": 5 / 8, "never": 1.0}  # parts of the iterations after which GS follows signs


@dataclass
class Attempt(Progress):
    """One restart and its best iterate."""

    images: Tensor
    """(B, C, H, W)."""
    objective: float = math.inf

    def see(self, value: float, images: Tensor, options: "ImageMatching") -> None:
        """Take in the objective of the next iterate, and decide whether to stop."""
        if self.advance(value, options) and value <= self.objective:
            self.images, self.objective = images.detach().clone(), value


@dataclass(frozen=True, kw_only=True)
class ImageMatching(ImageAttack):
    """The engine of DLG and GS on images."""

    iterations: int = 1000
    """Largest number of steps per restart."""
    learning_rate: float = 0.1
    """Step of Adam at the start, in normalised pixels."""
    restarts: int = 1
    """Independent attempts, side by side where the model is small; the one of lowest objective is returned."""
    init_scale: float = 1.0
    """Standard deviation of the random start, in normalised pixels."""
    patience: int = 1000
    """Stop after so many iterations without a relative improvement of 1e-3, counted from the last fall of the learning
    rate."""
    loss_tolerance: float = 1e-12
    """Stop below this objective."""
    tv: float = 0.0
    """Weight of the total variation."""

    COUNTS: ClassVar[tuple[str, ...]] = ("iterations", "restarts", "patience")
    AMOUNTS: ClassVar[tuple[str, ...]] = ("learning_rate", "init_scale", "loss_tolerance", "tv")

    def __post_init__(self):
        super().__post_init__()
        if self.learning_rate == 0:
            raise ConfigError(f"attack {self.name!r}: learning_rate must be above 0, got {self.learning_rate!r}")

    @abstractmethod
    def make_objective(self, problem: ImageProblem) -> Objective:
        """Return the distance of a gradient from the observed one."""

    @abstractmethod
    def descend(self, problem: ImageProblem, distance: Callable, attempts: list[Attempt]) -> None:
        """Improve attempts, all together, until each has stopped."""

    def recover(self, adapter: VisionAdapter, observation: Observation, *, seed: int) -> ImageReconstruction:
        """Return the images whose gradient is nearest to the observed one.

        Args:
            adapter: The model.
            observation: What the server sees; labels unless inferred.
            seed: Seed of the random starts.

        Returns:
            The images.
        """
        problem = self.problem(adapter, observation, seed=seed)
        objective = self.make_objective(problem)

        def distance(gradient: Mapping[str, Tensor], x: Tensor) -> Tensor:
            return objective(gradient) + (self.tv * total_variation(x) if self.tv else 0.0)

        attempts = self._starts(problem, seed)
        for first in range(0, len(attempts), problem.together):
            self.descend(problem, distance, attempts[first : first + problem.together])
        return problem.best_of(self.name, attempts)

    def _starts(self, problem: ImageProblem, seed: int) -> list[Attempt]:
        """Return one attempt per restart; the first is the same however many follow."""
        generators = [torch.Generator().manual_seed(s) for s in restart_seeds(seed, self.restarts)]
        return [Attempt(problem.start(generator, self.init_scale)) for generator in generators]

    def _adam(
        self,
        problem: ImageProblem,
        distance: Callable,
        attempts: list[Attempt],
        *,
        project: Callable[[Tensor], Tensor] = lambda x: x,
        milestones: tuple[float, ...] = (),
        signs_from: float = 1.0,
    ) -> None:
        """Run Adam on all attempts together.

        Args:
            problem: What is matched.
            distance: What is minimised.
            attempts: Where they start.
            project: Where the start, and an iterate after every step, is moved.
            milestones: Parts of the iterations after which steps are ten times smaller.
            signs_from: Part of the iterations after which Adam is given the signs of the derivative only.
        """
        guesses = project(torch.stack([attempt.images for attempt in attempts]))
        optimizer = torch.optim.Adam([guesses], lr=self.learning_rate)
        at = [int(part * self.iterations) for part in milestones] or [0]
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, at[: len(milestones)], gamma=0.1)
        switch = int(signs_from * self.iterations)
        for iteration in range(self.iterations):
            values, slopes = problem.slopes(guesses, distance)
            for value, x, attempt in zip(values.tolist(), guesses, attempts, strict=True):
                if not attempt.stopped:
                    attempt.see(value, x, self)
                if iteration < at[-1]:
                    attempt.last_improved = iteration  # large steps stall, and smaller ones get further
            if all(attempt.stopped for attempt in attempts):
                return
            if iteration == switch:
                optimizer.state.clear()  # Adam's averages: signs are of another size than derivatives
            guesses.grad = slopes.sign() if iteration >= switch else slopes
            optimizer.step()
            schedule.step()
            guesses.copy_(project(guesses))


@dataclass(frozen=True, kw_only=True)
class ImageDLG(ImageMatching):
    """Deep leakage from gradients: least squares between gradients. With ``labels="inferred"``, iDLG.

    ``sum_l ||g_l(x) - g*_l||^2 / ||g*||^2``, by Adam without sign, box or decay, as the influence-function paper runs
    it (Zhang et al. 2023, arXiv:2309.13016, 24,000 steps). Zhu et al. run L-BFGS on the same objective: attack
    ``lbfgs``, which gets much further in as many gradients on the sigmoid LeNet.
    """

    name: ClassVar[str] = "dlg"
    paper: ClassVar[str] = "Zhu, Liu, Han 2019, Deep Leakage from Gradients, arXiv:1906.08935"

    def make_objective(self, problem: ImageProblem) -> SquaredL2:
        """Return the squared L2 distance, 1 for the gradient zero."""
        return SquaredL2(problem.observed, balance=0.0, kept=problem.kept)

    def descend(self, problem: ImageProblem, distance: Callable, attempts: list[Attempt]) -> None:
        """Improve attempts, all together, until each has stopped."""
        self._adam(problem, distance, attempts)


@dataclass(frozen=True, kw_only=True)
class ImageGS(ImageMatching):
    """Inverting gradients: cosine distance and total variation, by Adam, at the end on the signs of the derivative.

    ``1 - <g(x), g*> / (||g(x)|| ||g*||) + tv TV(x)`` over valid pixels; the learning rate falls tenfold after 3/8, 5/8
    and 7/8 of the iterations. Published with signs throughout (``signs="always"``).
    """

    tv: float = 1e-4
    """Weight of the total variation."""
    signs: str = "late"
    """When Adam is given the signs of the derivative only: "always", as published; "late", after 5/8 of the
    iterations; or "never". The module's docstring has the measurements."""

    name: ClassVar[str] = "gs"
    paper: ClassVar[str] = (
        "Geiping et al. 2020, Inverting Gradients: How Easy Is It to Break Privacy in Federated Learning?, "
        "arXiv:2003.14053"
    )

    def __post_init__(self):
        super().__post_init__()
        lookup("signs", self.signs, SIGNS)

    def make_objective(self, problem: ImageProblem) -> Cosine:
        """Return one minus the cosine."""
        return Cosine(problem.observed, balance=0.0, kept=problem.kept)

    def descend(self, problem: ImageProblem, distance: Callable, attempts: list[Attempt]) -> None:
        """Improve attempts, all together, until each has stopped."""
        signs_from = SIGNS[self.signs]
        self._adam(problem, distance, attempts, project=problem.boxed, milestones=MILESTONES, signs_from=signs_from)


def total_variation(x: Tensor) -> Tensor:
    """Return the mean absolute difference of neighbours along rows plus that along columns.

    Args:
        x: (B, C, H, W) images.

    Returns:
        A scalar, in normalised pixels.
    """
    return x.diff(dim=-1).abs().mean() + x.diff(dim=-2).abs().mean()
