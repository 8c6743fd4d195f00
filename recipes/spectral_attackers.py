r"""The attacker who knows that noise lies in the row space of J, and removes it.

Noise sum_i c_i z_i v_i along right singular vectors of J(x0) is J(x0)^T w for some w, so that the release is
    g* = g(x0) + J(x0)^T w
exactly, however large the noise: P equations in 2 dx unknowns, without noise. Levenberg-Marquardt on
    ||g(x) + J(x)^T w - g*||^2  +  weight ||x - m||^2
over x and w together needs neither the levels c_i nor the directions. To first order x and w are one unknown, x + w,
which is why an analysis by A = J J^T alone does not see this attacker: curvature of g tells them apart. Where the
release holds other noise besides, the equations hold up to that.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.func import grad, jacfwd, jvp

from lmleak.adapters import VisionAdapter
from lmleak.attacks.image_base import ImageAttack, ImageProblem
from lmleak.types import ImageReconstruction, Observation

MATCHED, ROUNDED = 1e-9, 1e-15  # objective over ||g*||^2 that needs no other start, and that float32 leaves
SHRINK, GROW, LARGEST = 1 / 5, 2.0, 1e8  # of the damping
STALLED = 1e-4  # a step that lowers the objective by less than this part ends the descent: the rest is noise


@dataclass(frozen=True, kw_only=True)
class RowSpaceAttack(ImageAttack):
    """Levenberg-Marquardt for image and noise together; one image, all of J formed."""

    iterations: int = 60
    """Largest number of steps per restart."""
    restarts: int = 3
    """Most random starts; the one of lowest objective is returned."""
    prior_weight: float = 0.0
    """Weight of ||x - m||^2: variance of what noise lies outside the row space, over that of pixels."""

    name: ClassVar[str] = "row-space"
    paper: ClassVar[str] = "this study"
    COUNTS: ClassVar[tuple[str, ...]] = ("iterations", "restarts")
    AMOUNTS: ClassVar[tuple[str, ...]] = ("prior_weight",)

    def recover(self, adapter: VisionAdapter, observation: Observation, *, seed: int) -> ImageReconstruction:
        """Return the image that, with some w, explains the release best."""
        problem = self.problem(adapter, observation, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        best, lowest, tried = None, math.inf, 0
        for _ in range(self.restarts):
            image, objective, steps = self._descend(problem, problem.start(generator))
            tried += steps
            if best is None or objective < lowest:
                best, lowest = image, objective
            if lowest <= MATCHED:
                break
        stopped = "objective below tolerance" if lowest <= MATCHED else "iteration limit or no lower objective"
        return problem.reconstruction(self.name, best, iterations=tried, stopped=stopped, objective=lowest)

    def _descend(self, problem: ImageProblem, x: Tensor) -> tuple[Tensor, float, int]:
        """Return image, objective over ||g*||^2, and the number of steps tried, from one start."""
        observed = torch.cat([problem.observed[n].reshape(-1) for n in problem.names])
        parameters = {n: p for n, p in problem.adapter.parameters().items() if n in problem.observed}
        mean, size = problem.adapter.prior().mean.to(x), x.numel()
        pull = math.sqrt(self.prior_weight)

        def gradient(image: Tensor) -> Tensor:
            found = grad(lambda theta: problem.adapter.loss(image, problem.labels, {}, theta))(parameters)
            return torch.cat([found[n].reshape(-1) for n in problem.names])

        def residual(both: Tensor) -> Tensor:
            image, w = both.reshape(2, *x.shape)
            value, along = jvp(gradient, (image,), (w,))
            return torch.cat([value + along - observed, pull * (image - mean).reshape(-1)])

        both = torch.cat([x.reshape(-1), torch.zeros_like(x).reshape(-1)])
        here = residual(both)
        value, scale = here.square().sum().item(), observed.square().sum().item()
        damping, growth, steps = None, GROW, 0
        normal = slope = None  # linearised anew after every step taken
        while steps < self.iterations and growth < LARGEST and value > ROUNDED * scale:
            if normal is None:
                jacobian = jacfwd(residual)(both)
                normal, slope = jacobian.T @ jacobian, jacobian.T @ here
                damping = 1e-3 * normal.diagonal().max().item() if damping is None else damping
            steps += 1
            shifted = normal + damping * torch.eye(2 * size, dtype=x.dtype, device=x.device)
            trial = both - torch.linalg.solve(shifted, slope)
            there = residual(trial)
            reached = there.square().sum().item()
            if reached < value:
                stalled = value - reached < STALLED * value
                both, here, value, normal = trial, there, reached, None
                damping, growth = damping * SHRINK, LARGEST if stalled else GROW
            else:
                damping, growth = damping * growth, growth * GROW
        return both[:size].reshape(x.shape), value / scale, steps
