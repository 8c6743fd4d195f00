"""What studies on images share besides ``lmleak.evaluation.image_study``: the owner's attacker, balanced classes."""

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lmleak.adapters import VisionAdapter
from lmleak.attacks.image_base import ImageProblem
from lmleak.attacks.image_newton import GaussNewton
from lmleak.attacks.image_newton_steps import MatrixFreeLinearization
from lmleak.data.images import ImageData
from lmleak.influence import EigenDirections
from lmleak.types import ImageReconstruction, Observation

LOCAL = "local"


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
    """Levenberg-Marquardt's steps by the spectrum of A at the truth: exact there, and no solve anywhere.

    For thousands of unknowns at condition numbers beyond what conjugate gradients resolve. Where A differs from that
    at the truth steps are worse, but what they descend on, and so the minimum, is the same.

    Args:
        problem: What is matched.
        x: (B, C, H, W).
        directions: The spectrum at the truth, all of whose coordinates are free.
    """

    def __init__(self, problem: ImageProblem, x: Tensor, directions: EigenDirections):
        super().__init__(problem, x)
        self._directions = directions

    def solve(self, b: Tensor, damping: float) -> Tensor:
        """Return d of (A + damping I) d = b, like x, with A at the truth."""
        values, vectors = self._directions.values, self._directions.vectors
        return (vectors @ (vectors.T @ b.reshape(-1).double() / (values + damping))).reshape(b.shape).to(b)


def classes_in_turn(data: ImageData) -> ImageData:
    """Return the images so ordered that classes take turns, each in its own order: samples are balanced."""
    places = defaultdict(list)
    for place, label in enumerate(data.labels.tolist()):
        places[label].append(place)
    rounds = ((turn, label, place) for label, own in places.items() for turn, place in enumerate(own))
    order = torch.tensor([place for _, _, place in sorted(rounds)])
    return replace(data, pixels=data.pixels[order], labels=data.labels[order])
