"""What attacks on image classifiers share: options, labels, and the gradient that a guess would have produced.

The unknown x, (B, C, H, W), is the batch as the model reads it (normalised), all images jointly; its gradient is a
mean over the batch, so the order of the recovered images is arbitrary.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from lmleak.adapters.targets import IMAGE_TASK
from lmleak.adapters.vision import VisionAdapter
from lmleak.attacks.base import Assumptions, Attack
from lmleak.attacks.descent import GRADIENT_NUMBERS, GRADIENTS_PER_STEP, kept_coordinates
from lmleak.attacks.image_labels import class_labels
from lmleak.errors import ConfigError, UnsupportedCombinationError
from lmleak.gradients.aggregate import update_of
from lmleak.gradients.shared import SharedGradient
from lmleak.lookup import lookup
from lmleak.types import AttackCost, ImageReconstruction, Observation

LARGEST_OPTION = 1e30  # beyond it, float32 overflows inside the optimiser
RANDOM_GUESSES = 4  # images that know nothing, beside the mean image and a grey one
UNSEEN = 0.05  # a larger part of a guess's error left in what the gradient sees deserves a note
LABELS = {"given": True, "inferred": False}  # whether the server must be told

Distance = Callable[[Mapping[str, Tensor], Tensor], Tensor]
"""What is minimised: of the gradient g(x) by name, and of x (B, C, H, W); a scalar."""


class Attempted(Protocol):
    """Where one restart of an attack ended."""

    images: Tensor
    """(B, C, H, W), the best iterate."""
    objective: float
    iterations: int
    stopped: str


@dataclass(frozen=True, kw_only=True)
class ImageAttack(Attack):
    """Options and assumptions of every attack that moves images until their gradient is the observed one."""

    labels: str = "given"
    """Class labels: "given" by the server, or "inferred" from the last layer's gradient
    (:mod:`lmleak.attacks.image_labels`)."""
    mask_zeros: bool | str = "auto"
    """Compare only where the observed gradient is not exactly zero: True, False, or "auto", if the gradient is known
    to be sparsified (prune, topk)."""

    assumes: ClassVar[Assumptions] = Assumptions(
        tasks=(IMAGE_TASK,), lengths=False, labels=True, local_steps=True,
        parameters="any that depend on the pixels", prior="the range of pixel values",
    )  # fmt: skip
    COUNTS: ClassVar[tuple[str, ...]] = ()
    """Options that count something, from 1."""
    AMOUNTS: ClassVar[tuple[str, ...]] = ()
    """Options that are numbers of at least 0."""

    def __post_init__(self):
        if not lookup("labels", self.labels, LABELS):
            object.__setattr__(self, "assumes", replace(type(self).assumes, labels=False))
        if not isinstance(self.mask_zeros, bool) and self.mask_zeros != "auto":
            raise ConfigError(
                f"attack {self.name!r}: mask_zeros must be True, False or 'auto', got {self.mask_zeros!r}"
            )
        for option in self.COUNTS:
            value = getattr(self, option)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"attack {self.name!r}: {option} must be an integer of at least 1, got {value!r}")
        for option in self.AMOUNTS:
            value = getattr(self, option)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= LARGEST_OPTION:
                raise ConfigError(
                    f"attack {self.name!r}: {option} must be a number from 0 to {LARGEST_OPTION:g}, got {value!r}"
                )

    def check(self, adapter: VisionAdapter, shared: SharedGradient) -> None:
        """Refuse what cannot be matched.

        Args:
            adapter: The model.
            shared: The released gradient.

        Raises:
            UnsupportedCombinationError: If labels are neither given nor to be inferred, among others.
        """
        if self.labels == "given" and shared.labels is None and adapter.task in self.assumes.tasks:
            raise UnsupportedCombinationError(
                f"attack {self.name!r} assumes that labels are known, and this gradient does not reveal them; capture "
                "with reveal_labels=True, or write labels='inferred'"
            )
        super().check(adapter, shared)
        adapter.image_shape  # noqa: B018 (refuses a model that does not say which images it reads)

    def problem(self, adapter: VisionAdapter, observation: Observation, *, seed: int) -> "ImageProblem":
        """Return what is to be matched, with the labels as the option says.

        Args:
            adapter: The model.
            observation: What the server sees.
            seed: Seed of label inference.

        Returns:
            The problem.

        Raises:
            UnsupportedCombinationError: If labels are to be inferred and the gradient does not decide them.
        """
        facts = ()
        labels = observation.labels
        if self.labels == "inferred":
            found = class_labels(adapter, observation, seed=seed)
            labels = found.assignment(observation)
            if labels is None:
                order = "which image of which local step or client has which label does not show"
                raise UnsupportedCombinationError(
                    f"attack {self.name!r} cannot infer the class labels: "
                    f"{found.reason if found.counts is None else order}; capture with "
                    "reveal_labels=True and write labels='given'"
                )
            certainty = "" if found.exact else ", an estimate"
            facts = (f"class labels {labels.tolist()} were inferred ({found.reason}{certainty})",)
        return ImageProblem(adapter, observation, labels, mask_zeros=self.mask_zeros, facts=facts)


class ImageProblem:
    """One observation to be matched by images: the constants of an attack, and a count of gradients.

    Args:
        adapter: The model.
        observation: What the server sees.
        labels: (B,) class labels, given or inferred.
        mask_zeros: The option of :class:`ImageAttack`.
        facts: What the user should know so far.
    """

    def __init__(
        self,
        adapter: VisionAdapter,
        observation: Observation,
        labels: Tensor,
        *,
        mask_zeros: bool | str = "auto",
        facts: tuple[str, ...] = (),
    ):
        self.adapter, self.aggregation = adapter, observation.aggregation
        self.device, self.dtype = adapter.device, adapter.dtype
        self.labels = labels.to(self.device)
        self.names = tuple(observation.gradient)
        self.observed = {n: g.to(self.device, self.dtype) for n, g in observation.gradient.items()}
        """The observed gradient g*, in the model's dtype on its device."""
        self.kept = kept_coordinates(self.observed, observation.defenses, mask_zeros)
        """Per name, True where g* says something; names that are absent are compared everywhere."""
        self.shape = (observation.batch_size, *adapter.image_shape)
        """(B, C, H, W)."""
        self.low, self.high = adapter.valid_range()
        """Black and white pixels, (C, H, W) each."""
        self.single_step = self.aggregation.clients == self.aggregation.steps == 1
        numbers = sum(g.numel() for g in self.observed.values())
        self.together = max(1, GRADIENT_NUMBERS // numbers) if self.single_step else 1
        """How many guesses :meth:`slopes` takes at once; updates of several clients or steps, one by one."""
        self.evaluations = 0
        """Gradients computed so far: one per guess and epoch, three where it is differentiated further."""
        self.facts = list(facts)
        if "dropout(on)" in observation.defenses:
            self.facts.append("dropout was on, and is matched as if it were off")

    def start(self, generator: torch.Generator, scale: float = 1.0) -> Tensor:
        """Return random images (B, C, H, W), independent N(0, scale^2), the same on every device."""
        return scale * torch.randn(self.shape, generator=generator, dtype=self.dtype).to(self.device)

    def boxed(self, x: Tensor) -> Tensor:
        """Return the nearest images of valid pixels."""
        return torch.minimum(torch.maximum(x, self.low), self.high)

    def gradient(self, x: Tensor, *, create_graph: bool = False) -> dict[str, Tensor]:
        """Return the gradient g(x), or the update, that images would have produced.

        Args:
            x: (B, C, H, W) normalised pixels.
            create_graph: Whether it is differentiated further; it is counted as three gradients then.

        Returns:
            One tensor per released parameter.
        """
        self.evaluations += self.aggregation.epochs * (GRADIENTS_PER_STEP if create_graph else 1)
        update, _ = update_of(
            self.adapter, x, self.labels, {}, self.names, self.aggregation, create_graph=create_graph
        )
        return update

    def slopes(self, guesses: Tensor, distance: Distance) -> tuple[Tensor, Tensor]:
        """Return the distances of R stacked guesses, and their derivatives by them.

        Several guesses are taken together by ``torch.func.vmap``, no more than ``together`` at once.

        Args:
            guesses: (R, B, C, H, W), detached.
            distance: A function of ``(gradient, x)``.

        Returns:
            Distances (R,) and derivatives (R, B, C, H, W).
        """
        parts = [self._slopes(part, distance) for part in guesses.split(self.together)]
        values, slopes = zip(*parts, strict=True)
        return torch.cat(values), torch.cat(slopes)

    def _slopes(self, guesses: Tensor, distance: Distance) -> tuple[Tensor, Tensor]:
        if len(guesses) == 1:
            x = guesses[0].clone().requires_grad_()
            value = distance(self.gradient(x, create_graph=True), x)
            (slope,) = torch.autograd.grad(value, x)
            return value.detach()[None], slope[None]
        self.evaluations += GRADIENTS_PER_STEP * len(guesses)
        parameters = {n: p for n, p in self.adapter.parameters().items() if n in self.observed}

        def of(x: Tensor) -> Tensor:
            gradient = torch.func.grad(lambda theta: self.adapter.loss(x, self.labels, {}, theta))(parameters)
            return distance(gradient, x)

        slopes, values = torch.func.vmap(torch.func.grad_and_value(of))(guesses)
        return values, slopes

    def best_of(self, attack: str, attempts: Sequence[Attempted]) -> ImageReconstruction:
        """Return the result of an attack: its attempt of least objective.

        Args:
            attack: Its name.
            attempts: Where every restart ended.

        Returns:
            The reconstruction, on the CPU.
        """
        best = min(attempts, key=lambda attempt: attempt.objective)
        return self.reconstruction(
            attack, best.images, iterations=sum(attempt.iterations for attempt in attempts), stopped=best.stopped,
            objective=best.objective if math.isfinite(best.objective) else None,
        )  # fmt: skip

    @torch.no_grad()
    def guesses(self) -> list[Tensor]:
        """Return images (B, C, H, W) of somebody who saw no gradient: the mean, a grey one, random valid pixels."""
        generator = torch.Generator().manual_seed(0)
        levels = [torch.rand(self.shape, generator=generator, dtype=self.dtype) for _ in range(RANDOM_GUESSES)]
        levels.append(torch.full(self.shape, 0.5, dtype=self.dtype))
        mean = self.boxed(self.adapter.prior().mean.expand(self.shape))
        return [mean, *(self.low + (self.high - self.low) * level.to(self.device) for level in levels)]

    def distance(self, x: Tensor) -> float:
        """Return one minus the cosine of g(x) and g* on the compared coordinates; no part of the attack's cost.

        Args:
            x: (B, C, H, W).

        Returns:
            The distance; 1 where one of both is zero, infinity where g(x) is not finite.
        """
        update, _ = update_of(self.adapter, x, self.labels, {}, self.names, self.aggregation)
        inner = own_square = square = 0.0
        for name, observed in self.observed.items():  # one by one: no copy of all parameters in double precision
            own, seen = update[name].double() * self.kept.get(name, 1), observed.double()
            inner += (own * seen).sum().item()
            own_square += own.square().sum().item()
            square += seen.square().sum().item()
        norms = math.sqrt(own_square * square)
        distance = 1 - inner / norms if norms else 1.0
        return max(0.0, distance) if math.isfinite(distance) else math.inf

    def match_notes(self, images: Tensor) -> tuple[str, ...]:
        """Return what the server can say of a result without the truth: whether the gradient was matched, and how far.

        To first order one minus the cosine is a square of the error e, weighed by the curvature along each direction,
        so ``sqrt(distance(images) / least distance of a guess)`` is the part of a guess's error that is left in what
        the gradient sees. An objective alone says little: the best guess is at 0.004 on the sigmoid LeNet (weights of
        seed 0), at 0.4 on the untrained small ViT (CIFAR image). Parts measured, with PSNR: LeNet, gs: below 1 %, 47
        dB; 1.7 %, 32 dB; 17 %, 14 dB; 25 %, 12 dB; ViT: gs 18 %, 8.6 dB; lbfgs 7.6 %, 6.1 dB. One threshold parts
        these, but not success from failure in general: where the condition number is large, as in the ViT, the part
        falls long before the image is right. So a small part is said to be no proof.

        Args:
            images: (B, C, H, W), the result.

        Returns:
            One note.
        """
        left, least = self.distance(images), min(map(self.distance, self.guesses()))
        part = math.sqrt(left / least) if least else math.inf
        if part <= UNSEEN:
            return (
                f"the gradient was matched: {part:.2g} of a guess's error is left in what it sees; this does not "
                "prove the images right, since directions that the gradient hardly sees may be wrong",
            )
        return (
            f"the gradient was not matched: {part:.2g} of a guess's error is left in what it sees (one minus the "
            f"cosine is {left:.2g}, and {least:.2g} for the best of {RANDOM_GUESSES + 2} images that know nothing): "
            "either it is noisy, or the descent is stuck and more iterations or restarts may recover more",
        )

    def reconstruction(
        self,
        attack: str,
        images: Tensor,
        *,
        iterations: int,
        stopped: str,
        objective: float | None = None,
        notes: tuple[str, ...] = (),
    ) -> ImageReconstruction:
        """Return the result of an attack.

        Args:
            attack: Its name.
            images: (B, C, H, W) normalised pixels.
            iterations: Iterations over all restarts.
            stopped: Why it ended.
            objective: Final objective.
            notes: What the user should know besides ``facts``.

        Returns:
            The reconstruction, on the CPU.
        """
        return ImageReconstruction(
            attack=attack, images=images.detach().cpu(), labels=self.labels.cpu(),
            cost=AttackCost(0.0, self.evaluations, iterations), stopped=stopped, objective=objective,
            notes=(*self.facts, *self.match_notes(images), *notes),
        )  # fmt: skip
