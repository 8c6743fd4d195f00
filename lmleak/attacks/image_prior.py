"""A generative prior: the images are looked for in the range of a decoder that was trained on public images."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lmleak.adapters.targets import IMAGE_TASK
from lmleak.adapters.vision import VisionAdapter
from lmleak.attacks.base import Assumptions
from lmleak.attacks.image_base import Distance, ImageAttack, ImageProblem
from lmleak.attacks.image_decoder import ImageDecoder, load_decoder
from lmleak.attacks.objectives import Cosine, Objective, SquaredL2
from lmleak.errors import ConfigError, UnsupportedCombinationError
from lmleak.gradients.shared import SharedGradient
from lmleak.lookup import lookup
from lmleak.types import ImageReconstruction, Observation

OBJECTIVES: dict[str, type[Objective]] = {"cosine": Cosine, "l2": SquaredL2}


@dataclass(frozen=True, kw_only=True)
class GIAS(ImageAttack):
    """Gradient inversion in alternative spaces: first the latent of a decoder, then the decoder's weights.

        z* = argmin_z  distance(g(G_w(z)), g*) + latent_prior mean(z^2),   z (B, latent_size)
        w* = argmin_w  distance(g(G_w(z*)), g*),                            one copy of the weights per image

    with x = G(z) normalised as the model reads it. The latents start at random, ``restarts`` side by side; the one of
    lowest objective goes on to the weights.

    Under Gaussian noise of k times the gradient's RMS, ``latent_prior = B latent_size k^2 / P`` makes the first stage
    with "l2" a maximum a posteriori estimate (P released numbers; half of it for "cosine", nearly); and the weights
    then fit the noise: write ``weight_iterations=0`` under strong noise.

    Measured: the sigmoid LeNet U(-0.5, 0.5), private digits 0 to 4 (8x8), the decoder of
    ``configs/train_image_decoder/digits.yaml``, mean PSNR in dB of gs (300 steps) / latents (100 steps, 4 restarts) /
    latents and weights (100 more): noise of 0.1 RMS 20.6 / 19.9 / 23.8; of 1 RMS 6.7 (500 steps) / 12.6 / 9.1, and
    13.5 for latents with ``latent_prior=1e-3``; pruning 0.9 15.5 (also after 1,000 steps) / 17.0 / 27.0; ``fc.bias``
    and ``body.0.bias`` alone (22 numbers) 9.8 / 12.9 / 15.2; no defense 26.9 (1,000 steps) / 25.9 (2 digits,
    ``latent_prior=1e-5``) / 39.2 (200 and 200 steps). The latents alone do not beat gs where the gradient is clean, or
    nearly. Images unlike the public ones, noise and pruning: ``recipes/results/image_prior.md``.
    """

    decoder: str | None = None
    """Path of a decoder file that ``recipes/train_image_decoder.py`` wrote. Needed."""
    objective: str = "cosine"
    """"cosine" or "l2": the distance of gradients."""
    latent_iterations: int = 200
    """Steps of Adam on the latents."""
    weight_iterations: int = 200
    """Steps of Adam on the weights; 0 stays in the range of the decoder as it was trained."""
    latent_learning_rate: float = 0.1
    """First step on the latents, whose prior deviation is 1; it falls to zero as a cosine."""
    weight_learning_rate: float = 1e-3
    """First step on the weights; likewise."""
    latent_prior: float = 1e-4
    """Weight of the mean square of the latents, 1 under the prior."""
    restarts: int = 8
    """Random starts of the latents, side by side where the model is small."""

    name: ClassVar[str] = "gias"
    paper: ClassVar[str] = "Jeon et al. 2021, Gradient Inversion with Generative Image Prior, arXiv:2110.14962 (GIAS)"
    assumes: ClassVar[Assumptions] = Assumptions(
        tasks=(IMAGE_TASK,), lengths=False, labels=True, local_steps=True,
        parameters="any that depend on the pixels", prior="public images like the private ones, in a trained decoder",
    )  # fmt: skip
    COUNTS: ClassVar[tuple[str, ...]] = ("latent_iterations", "restarts")
    AMOUNTS: ClassVar[tuple[str, ...]] = ("latent_learning_rate", "weight_learning_rate", "latent_prior")

    def __post_init__(self):
        super().__post_init__()
        lookup("objective", self.objective, OBJECTIVES)
        if self.decoder is not None and not isinstance(self.decoder, str | os.PathLike):
            raise ConfigError(f"attack 'gias': decoder must be the path of a decoder file, got {self.decoder!r}")
        for option in ("latent_learning_rate", "weight_learning_rate"):
            if getattr(self, option) == 0:
                raise ConfigError(f"attack 'gias': {option} must be above 0, got 0")
        steps = self.weight_iterations
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise ConfigError(f"attack 'gias': weight_iterations must be an integer of at least 0, got {steps!r}")

    def check(self, adapter: VisionAdapter, shared: SharedGradient) -> None:
        """Refuse a decoder that is missing, damaged, or makes images of another shape.

        Args:
            adapter: The model.
            shared: The released gradient.

        Raises:
            UnsupportedCombinationError: With the reason.
        """
        super().check(adapter, shared)
        if self.decoder is None:
            raise UnsupportedCombinationError(
                "attack 'gias' needs a decoder of public images; train one with recipes/train_image_decoder.py and "
                "write decoder='its file'"
            )
        made, read = load_decoder(self.decoder).image_shape, tuple(adapter.image_shape)
        if made != read:
            raise UnsupportedCombinationError(
                f"attack 'gias': the decoder {str(self.decoder)!r} makes images of shape {made}, and {adapter.name} "
                f"reads {read}; train one with recipes/train_image_decoder.py on images of that shape"
            )

    def recover(self, adapter: VisionAdapter, observation: Observation, *, seed: int) -> ImageReconstruction:
        """Return the images that the decoder, or one near it, makes and whose gradient is nearest to the observed one.

        Args:
            adapter: The model.
            observation: What the server sees; labels unless inferred.
            seed: Seed of the random latents.

        Returns:
            The images.
        """
        problem = self.problem(adapter, observation, seed=seed)
        objective = OBJECTIVES[self.objective](problem.observed, balance=0.0, kept=problem.kept)
        decoder = load_decoder(self.decoder).to(problem.device, problem.dtype)

        def distance(gradient: Mapping[str, Tensor], x: Tensor) -> Tensor:
            return objective(gradient)

        search = _Search(problem, distance)
        latents = self._latents(search, decoder, seed)
        if self.weight_iterations:
            self._weights(search, decoder, latents)
        return problem.reconstruction(
            self.name, search.images, iterations=search.iterations, stopped=search.stopped,
            objective=search.distance if math.isfinite(search.distance) else None, notes=self._notes(decoder),
        )  # fmt: skip

    def _latents(self, search: "_Search", decoder: ImageDecoder, seed: int) -> Tensor:
        """Search the latents; return those (B, latent_size) of the best images seen."""
        size = (search.problem.shape[0], decoder.latent_size)
        generator = torch.Generator().manual_seed(seed)
        starts = [torch.randn(size, generator=generator, dtype=search.problem.dtype) for _ in range(self.restarts)]
        latents = torch.stack(starts).to(search.problem.device).requires_grad_()

        def images() -> Tensor:
            return decoder(latents.flatten(0, 1)).unflatten(0, latents.shape[:2])

        def penalty() -> Tensor:
            return self.latent_prior * latents.square().mean((1, 2))

        return search.descend([latents], images, penalty, self.latent_iterations, self.latent_learning_rate)[0]

    def _weights(self, search: "_Search", decoder: ImageDecoder, latents: Tensor) -> None:
        """Search the decoder's weights around the best latents, one copy per image."""
        names, trained = zip(*decoder.named_parameters(), strict=True)
        copies = [w.expand(1, len(latents), *w.shape).clone().requires_grad_() for w in trained]

        def image(latent: Tensor, *weights: Tensor) -> Tensor:
            return torch.func.functional_call(decoder, dict(zip(names, weights, strict=True)), (latent[None],))[0]

        def images() -> Tensor:
            return torch.func.vmap(image)(latents, *(copy[0] for copy in copies))[None]

        no_penalty = torch.zeros(1, device=latents.device, dtype=latents.dtype)
        search.descend(copies, images, lambda: no_penalty, self.weight_iterations, self.weight_learning_rate)

    def _notes(self, decoder: ImageDecoder) -> tuple[str, ...]:
        """Say which public images the prior knows, which no gradient told."""
        source = f"{decoder.card.get('data', 'unknown data')}, {decoder.card.get('split', 'unknown split')}"
        return (
            f"images are drawn to those that the decoder was trained on ({source}): not all that they show leaked",
        )


class _Search:
    """A descent over anything that images are made of, and the best images seen in its present stage.

    Args:
        problem: What is matched.
        distance: What is minimised.
    """

    def __init__(self, problem: ImageProblem, distance: Distance):
        self.problem, self.gradient_distance = problem, distance
        self.images = problem.boxed(torch.zeros(problem.shape, dtype=problem.dtype, device=problem.device))
        self.distance, self.iterations, self.stopped = math.inf, 0, "iteration limit"

    def descend(
        self,
        unknowns: Sequence[Tensor],
        pixels: Callable[[], Tensor],
        penalty: Callable[[], Tensor],
        iterations: int,
        learning_rate: float,
    ) -> list[Tensor]:
        """Run Adam on R sets of unknowns side by side, with a learning rate that falls to zero as a cosine.

        Args:
            unknowns: Tensors (R, ...), changed in place.
            pixels: Returns the images that they make, (R, B, C, H, W) in [0, 1].
            penalty: Returns what is added to the distances, (R,).
            iterations: Steps.
            learning_rate: The first.

        Returns:
            The unknowns of the best images, of the one set among R.
        """
        optimizer = torch.optim.Adam(unknowns, lr=learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
        best, least = [u.detach()[0].clone() for u in unknowns], math.inf
        for _ in range(iterations):
            x, extra = self.problem.adapter.normalization.normalize(pixels()), penalty()
            distances, slopes = self.problem.slopes(x.detach(), self.gradient_distance)
            self.iterations += len(x)
            totals = (distances + extra.detach()).nan_to_num(nan=math.inf, posinf=math.inf)
            index = int(totals.argmin())
            if totals[index].item() < least:
                best, least = [u.detach()[index].clone() for u in unknowns], totals[index].item()
                self.images, self.distance = x[index].detach(), distances[index].item()
            if not totals.isfinite().any():
                self.stopped = "no objective was finite"
                break
            for unknown, slope in zip(
                unknowns, torch.autograd.grad((slopes * x).sum() + extra.sum(), unknowns), strict=True
            ):
                unknown.grad = slope
            optimizer.step()
            schedule.step()
        return best
