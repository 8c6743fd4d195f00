"""What studies on images share besides ``lmleak.evaluation.image_study``: the owner's attacker, balanced classes."""

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lmleak.adapters import VisionAdapter
from lmleak.attacks.image_base import ImageProblem
from lmleak.attacks.image_newton import GaussNewton
from lmleak.attacks.image_newton_steps import CG_TOLERANCE, MatrixFreeLinearization
from lmleak.data.images import ImageData
from lmleak.influence import EigenDirections
from lmleak.types import ImageReconstruction, Observation

LOCAL = "local"
PRECONDITIONED = 10  # iterations per step
UNDAMPED = 1e-16  # of the curvature along the slope: at the truth its spectrum gives the whole step


@dataclass(frozen=True, kw_only=True)
class LocalAttacker(GaussNewton):
    """Levenberg-Marquardt from the true image: the data owner's check, no attack, since it needs the truth.

    It ends in the minimum that belongs to the truth, whose place the influence function predicts, and so tells a wrong
    prediction from a search that failed. Started at a distance, it tells how near a search must begin to end there.
    """

    truth: Tensor
    """(B, C, H, W)."""
    distance: float = 0.0
    """Root mean square of the start from the truth, by Gaussian noise, in normalised pixels."""
    iterations: int = 25
    solver: str = "dense"
    step_tolerance: float = 1e-5

    name: ClassVar[str] = LOCAL

    def recover(self, adapter: VisionAdapter, observation: Observation, *, seed: int) -> ImageReconstruction:
        """Return the minimum next to the truth."""
        problem = self.problem(adapter, observation, seed=seed)
        offset = problem.start(torch.Generator().manual_seed(seed), self.distance)
        found = self.descend(problem, self.truth + offset)
        return problem.reconstruction(
            self.name, found.images, iterations=found.iterations, stopped=found.stopped, objective=found.objective
        )


class TruthCurvature(MatrixFreeLinearization):
    """Levenberg-Marquardt's steps by conjugate gradients, preconditioned by the spectrum of A at the truth.

    For thousands of unknowns at condition numbers beyond what plain conjugate gradients resolve. At the truth one
    iteration is exact. Where A differs, ``PRECONDITIONED`` of them may leave a worse step, but what is descended on,
    and so the minimum, is the same.

    Args:
        problem: What is matched.
        x: (B, C, H, W).
        directions: The spectrum at the truth, all of whose coordinates are free.
    """

    def __init__(self, problem: ImageProblem, x: Tensor, directions: EigenDirections):
        super().__init__(problem, x)
        self._directions = directions

    def solve(self, b: Tensor, damping: float) -> Tensor:
        """Return d of (A + damping I) d = b, like x, as far as the iterations take it."""
        values, vectors = self._directions.values + damping, self._directions.vectors

        def preconditioned(r: Tensor) -> Tensor:
            return (vectors @ (vectors.T @ r.reshape(-1).double() / values)).reshape(b.shape).to(b)

        d, residual, direction = torch.zeros_like(b), b, preconditioned(b)
        size = first = torch.sum(residual * direction).item()
        for _ in range(PRECONDITIONED):
            self._count(1)
            product = self._times(self.transposed(direction)) + damping * direction
            length = size / torch.sum(direction * product).item()
            d, residual = d + length * direction, residual - length * product
            smoothed = preconditioned(residual)
            size, before = torch.sum(residual * smoothed).item(), size
            if size <= CG_TOLERANCE**2 * first:
                break
            direction = smoothed + size / before * direction
        return d


def classes_in_turn(data: ImageData) -> ImageData:
    """Return the images so ordered that classes take turns, each in its own order: samples are balanced."""
    places = defaultdict(list)
    for place, label in enumerate(data.labels.tolist()):
        places[label].append(place)
    rounds = ((turn, label, place) for label, own in places.items() for turn, place in enumerate(own))
    order = torch.tensor([place for _, _, place in sorted(rounds)])
    return replace(data, pixels=data.pixels[order], labels=data.labels[order])
