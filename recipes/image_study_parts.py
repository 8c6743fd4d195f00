"""What studies on images share besides ``lmleak.evaluation.image_study``: the owner's attacker, balanced classes."""

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lmleak.adapters import VisionAdapter
from lmleak.attacks.image_newton import GaussNewton
from lmleak.data.images import ImageData
from lmleak.types import ImageReconstruction, Observation

LOCAL = "local"


@dataclass(frozen=True, kw_only=True)
class LocalAttacker(GaussNewton):
    """Levenberg-Marquardt from the true image: the data owner's check, no attack, since it needs the truth.

    It ends in the minimum that belongs to the truth, whose place the influence function predicts, and so tells a wrong
    prediction from a search that failed.
    """

    truth: Tensor
    """(B, C, H, W)."""
    iterations: int = 25
    solver: str = "dense"
    step_tolerance: float = 1e-5

    name: ClassVar[str] = LOCAL

    def recover(self, adapter: VisionAdapter, observation: Observation, *, seed: int) -> ImageReconstruction:
        """Return the minimum next to the truth."""
        problem = self.problem(adapter, observation, seed=seed)
        found = self.descend(problem, self.truth)
        return problem.reconstruction(
            self.name, found.images, iterations=found.iterations, stopped=found.stopped, objective=found.objective
        )


def classes_in_turn(data: ImageData) -> ImageData:
    """Return the images so ordered that classes take turns, each in its own order: samples are balanced."""
    places = defaultdict(list)
    for place, label in enumerate(data.labels.tolist()):
        places[label].append(place)
    rounds = ((turn, label, place) for label, own in places.items() for turn, place in enumerate(own))
    order = torch.tensor([place for _, _, place in sorted(rounds)])
    return replace(data, pixels=data.pixels[order], labels=data.labels[order])
