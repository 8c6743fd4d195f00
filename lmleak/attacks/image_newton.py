"""Second-order gradient matching for images: Gauss-Newton (Levenberg-Marquardt) and L-BFGS.

Where a small perturbation of the gradient moves the image in proportion (the linear regime), these attackers reach
the minimum itself, and their error is the one that the influence function predicts (Zhang et al. 2023,
arXiv:2309.13016, eq. 4). Descent by Adam still moves along the directions of small eigenvalues of J J^T when its steps
run out. Both take the pixels as they come, without box or total variation.

Measured in float32 on one core: LeNet 1x28x28 with seeds 0-4 on the first five MNIST test digits, clean gradients, one
random start each. Gauss-Newton 5 of 5, PSNR 118-127 dB, 9-18 steps, 5-8 s (J J^T formed: 105-129 dB in 8-15 steps on
four of them, 14 s); L-BFGS 5 of 5, 71-81 dB, 383-627 steps, 2-4 s; DLG's 1,000 steps of Adam 65, 10 and 69 dB on the
first three, 4-6 s. Under noise of 1e-4 in float64 (seed 0) the errors of both are 1.001 of the I2F; in float32 L-BFGS
stops at 1.06.
"""

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from scipy.optimize import OptimizeResult, minimize
from torch import Tensor

from lmleak.adapters.vision import VisionAdapter
from lmleak.attacks.base import Assumptions
from lmleak.attacks.image_base import ImageAttack, ImageProblem
from lmleak.attacks.image_newton_steps import SOLVERS, Linearize, compared, levenberg_marquardt
from lmleak.attacks.objectives import Cosine, Objective, SquaredL2
from lmleak.errors import ConfigError
from lmleak.lookup import lookup
from lmleak.types import ImageReconstruction, Observation

STARTS = ("random", "mean")
PAIRS = 50  # steps that L-BFGS remembers
EVALUATIONS = 20  # objectives per iteration of L-BFGS at most; a line search takes one or two


@dataclass(frozen=True)
class Attempt:
    """Where one restart ended."""

    images: Tensor
    """(B, C, H, W), the best iterate."""
    objective: float
    """1 at the gradient zero."""
    iterations: int
    stopped: str


@dataclass(frozen=True, kw_only=True)
class SecondOrder(ImageAttack):
    """What both share: restarts one after another until one matches the gradient."""

    iterations: int = 100
    """Largest number of steps per restart."""
    restarts: int = 1
    """Most attempts; the one of lowest objective is returned."""
    start: str = "random"
    """Where the first restart begins: "random", or "mean", the mean of normalised pixels. Later ones are random."""
    init_scale: float = 1.0
    """Standard deviation of a random start, in normalised pixels."""
    loss_tolerance: float = 1e-10
    """No restart follows one that ended below this objective, which is 1 for the gradient zero."""

    assumes: ClassVar[Assumptions] = replace(ImageAttack.assumes, prior="mean of normalised pixels")
    COUNTS: ClassVar[tuple[str, ...]] = ("iterations", "restarts")
    AMOUNTS: ClassVar[tuple[str, ...]] = ("init_scale", "loss_tolerance")

    def __post_init__(self):
        super().__post_init__()
        lookup("start", self.start, dict.fromkeys(STARTS))

    @abstractmethod
    def descend(self, problem: ImageProblem, start: Tensor) -> Attempt:
        """Return where the descent from one start ends."""

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
        generator = torch.Generator().manual_seed(seed)
        attempts: list[Attempt] = []
        while len(attempts) < self.restarts:
            start = problem.start(generator, self.init_scale)
            if self.start == "mean" and not attempts:
                start = adapter.prior().mean.expand_as(start).to(start)
            attempts.append(self.descend(problem, start))
            if attempts[-1].objective <= self.loss_tolerance:
                break
        return problem.best_of(self.name, attempts)


@dataclass(frozen=True, kw_only=True)
class GaussNewton(SecondOrder):
    """Levenberg-Marquardt on ``||g(x) - g*||^2 + w ||x - m||^2`` (:mod:`lmleak.attacks.image_newton_steps`).

    Cost in gradients: one per step tried, five per step taken, and two per product with J or J^T, of which J J^T
    as a matrix takes dx, and each conjugate gradient two.
    """

    prior_weight: float = 0.0
    """w, in gradient^2 / pixel^2: the noise's variance over that of normalised pixels for the most probable image
    under Gaussian noise; 0 for the nearest gradient."""
    damping: float = 1e-3
    """At the start, in units of the curvature along the slope there."""
    step_tolerance: float = 1e-8
    """Stop at steps below this part of ||x||."""
    solver: str | Linearize = "auto"
    """How steps are solved: "dense" (J J^T as a matrix, exact), "cg", or "auto", by size; in Python, also a function
    that linearises."""

    name: ClassVar[str] = "gauss-newton"
    paper: ClassVar[str] = (
        "Marquardt 1963, An Algorithm for Least-Squares Estimation of Nonlinear Parameters, on the objective of Zhu, "
        "Liu, Han 2019, Deep Leakage from Gradients, arXiv:1906.08935"
    )
    AMOUNTS: ClassVar[tuple[str, ...]] = (*SecondOrder.AMOUNTS, "prior_weight", "damping", "step_tolerance")

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.solver, str):
            lookup("solver", self.solver, {"auto": ..., **SOLVERS})
        if self.damping == 0:
            raise ConfigError(f"attack {self.name!r}: damping must be above 0, got {self.damping!r}")

    def descend(self, problem: ImageProblem, start: Tensor) -> Attempt:
        """Return where Levenberg-Marquardt ends."""
        found = levenberg_marquardt(
            problem, start, prior_weight=self.prior_weight, iterations=self.iterations, damping=self.damping,
            step_tolerance=self.step_tolerance, solver=self.solver,
        )  # fmt: skip
        observed = compared(problem, problem.observed).double().square().sum().item()
        return Attempt(found.images, found.objective / (observed or 1.0), found.iterations, found.stopped)


@dataclass(frozen=True, kw_only=True)
class LBFGS(SecondOrder):
    """L-BFGS with a Wolfe line search (scipy), the optimiser of DLG's authors, on the squared or the cosine distance.

    The iterates are float64, their gradients in the model's dtype. Three gradients per objective.
    """

    iterations: int = 1000
    """Largest number of steps per restart."""
    objective: str = "l2"
    """``"l2"``: ||g - g*||^2 / ||g*||^2; ``"cosine"``: one minus the cosine, blind to the size of the gradient."""

    name: ClassVar[str] = "lbfgs"
    paper: ClassVar[str] = "Zhu, Liu, Han 2019, Deep Leakage from Gradients, arXiv:1906.08935"
    OBJECTIVES: ClassVar[Mapping[str, type[Objective]]] = {"l2": SquaredL2, "cosine": Cosine}

    def __post_init__(self):
        super().__post_init__()
        lookup("objective", self.objective, self.OBJECTIVES)

    def descend(self, problem: ImageProblem, start: Tensor) -> Attempt:
        """Return where L-BFGS ends."""
        objective = self.OBJECTIVES[self.objective](problem.observed, balance=0.0, kept=problem.kept)
        best, lowest = start, math.inf

        def evaluate(flat: np.ndarray) -> tuple[float, np.ndarray]:
            nonlocal best, lowest
            x = torch.tensor(flat, dtype=problem.dtype, device=problem.device).reshape(problem.shape)
            values, slopes = problem.slopes(x[None], lambda gradient, _: objective(gradient))
            value = values.item()
            if value < lowest:
                best, lowest = x, value
            return value, slopes.reshape(-1).double().cpu().numpy()

        def stop_when_matched(intermediate_result: OptimizeResult) -> None:
            if intermediate_result.fun <= self.loss_tolerance:
                raise StopIteration

        found = minimize(
            evaluate, start.reshape(-1).double().cpu().numpy(), jac=True, method="L-BFGS-B",
            callback=stop_when_matched,
            options={
                "maxiter": self.iterations, "maxfun": EVALUATIONS * self.iterations, "maxcor": PAIRS, "ftol": 0.0,
                "gtol": 0.0,
            },
        )  # fmt: skip
        stopped = {1: "iteration limit"}.get(found.status, "converged: no lower objective along the line")
        if lowest <= self.loss_tolerance:
            stopped = "objective below tolerance"
        elif not math.isfinite(lowest):
            stopped = "the objective at the start is not finite"
        return Attempt(best, lowest, found.nit, stopped)
