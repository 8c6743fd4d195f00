"""The descent of a gradient-matching attack: candidates, restarts side by side, early stops with their reasons.

Guesses are stacked along a new first axis and their gradients taken together by ``torch.func.vmap``; every restart
has its own start, optimiser state and best iterate, so together or one by one gives the same result. Small models
gain from it, large ones do not and need more memory, hence ``GRADIENT_NUMBERS``. In gradients, DLG, one core,
``benchmarks/matching.py``: reference BERT at 15 and 32 tokens, a candidate among 16 costs 0.4 and 0.8 (1.2 and 1.2
alone), a step among 8 restarts 1.7 and 2.0 (2.8 and 2.4 alone); BERT-base with 4 blocks at 32 tokens, a candidate
among 2 costs 2.6 (1.5 alone), a step 4.4 (3.4 alone).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from lmleak.attacks.dropout_masks import ReplaceDropout, find_dropouts
from lmleak.attacks.labels import infer_labels, start_of_labels
from lmleak.attacks.relaxed_text import RelaxedText, Unknowns
from lmleak.gradients.aggregate import update_of
from lmleak.gradients.shared import SharedGradient
from lmleak.types import Observation

if TYPE_CHECKING:
    from lmleak.adapters.base import ModelAdapter
    from lmleak.attacks.matching import GradientMatching

DECAYS: dict[str, Callable[[float], float]] = {
    "none": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}
GRADIENTS_PER_STEP = 3  # one gradient, and a backward through it
GRADIENT_NUMBERS = 2**23  # of so many numbers (in float32, 32 MiB) may the gradients be that are taken together
IMPROVEMENT = 1e-3  # relative decrease of the objective that counts as one
UNMATCHED = 0.1  # an objective above this deserves a note
SPARSIFIERS = ("prune", "topk")  # defenses after which a zero says only that a number was small
BETAS = (0.9, 0.95)  # a short memory of squares: the landscape changes while the guess moves


class StopRule(Protocol):
    """The options of an attack that say when a descent stops."""

    iterations: int
    patience: int
    loss_tolerance: float


@dataclass(kw_only=True)
class Progress:
    """How far one restart is, and why it stopped."""

    iterations: int = 0
    stopped: str = ""
    reference: float = math.inf
    """Objective at the last relative improvement."""
    last_improved: int = 0

    def advance(self, value: float, options: StopRule) -> bool:
        """Count an iterate of the given objective, decide whether to stop, and return whether it is finite."""
        iteration, self.iterations = self.iterations, self.iterations + 1
        if not math.isfinite(value):
            self.stopped = f"objective became {value} at iteration {iteration}"
            return False
        if value <= options.loss_tolerance:
            self.stopped = "objective below tolerance"
        elif value < self.reference * (1 - IMPROVEMENT):
            self.reference, self.last_improved = value, iteration
        elif iteration - self.last_improved >= options.patience:
            self.stopped = f"no improvement for {options.patience} iterations"
        if not self.stopped and self.iterations == options.iterations:
            self.stopped = "iteration limit"
        return True


@dataclass
class Descent(Progress):
    """One restart and its best iterate."""

    guess: Unknowns
    objective: float = math.inf

    def see(self, value: float, iterate: Unknowns, options: StopRule) -> None:
        """Take in the objective of the next iterate, and decide whether to stop."""
        if self.advance(value, options) and value < self.objective:
            self.guess, self.objective = iterate.detached(), value


class Matching:
    """One observation to be matched: the constants of the descent, and a count of gradients.

    Args:
        options: The attack.
        text: The relaxation of the private text.
        observation: What the server sees.
        seed: Seed of label inference.
    """

    def __init__(self, options: "GradientMatching", text: RelaxedText, observation: Observation, seed: int = 0):
        self.options, self.text, self.adapter = options, text, text.adapter
        self.names = matched_names(self.adapter, observation)
        reference = text.table
        self.observed = {n: observation.gradient[n].to(reference.device, reference.dtype) for n in self.names}
        self.objective = options.make_objective(
            self.observed, kept_coordinates(self.observed, observation.defenses, options.mask_zeros)
        )
        self.aggregation = observation.aggregation
        self.parameters = {n: p for n, p in self.adapter.parameters().items() if n in self.observed}
        numbers = sum(p.numel() for p in self.parameters.values())
        one_step = self.aggregation.clients == self.aggregation.steps == 1
        self.together = max(1, GRADIENT_NUMBERS // numbers) if one_step else 1
        """How many gradients are taken at once; updates of several clients or steps, one by one."""
        self.evaluations = 0
        """Gradients computed so far, a step counting as three."""
        self.facts = [
            f"{n} was not matched: its rows are read by token ids, not by x"
            for n in observation.gradient
            if n not in self.names
        ]
        if "dropout(on)" in observation.defenses and not options.dropout_masks:
            self.facts.append("dropout was on, and dropout_masks=False matches as if it were off")
        self.largest_masks: list[float] = []
        if options.labels == "inferred" and self.adapter.task == "sequence-classification":
            self._infer_labels(seed)
        if options.dropout_masks:
            start = text.draw(torch.Generator().manual_seed(seed), 1.0)
            dropouts = find_dropouts(self.adapter, lambda: self.gradient(start, create_graph=False))
            text.mask_shapes = tuple(shape for shape, _ in dropouts)
            self.largest_masks = [1 / (1 - probability) for _, probability in dropouts]

    def _infer_labels(self, seed: int) -> None:
        found = infer_labels(self.text, seed)
        self.text.labels = found.labels
        if found.labels is None:
            self.text.label_start = start_of_labels(found, self.text)
            self.facts.append(f"class labels were matched together with the text ({found.source})")
        else:
            self.facts.append(f"class labels {found.labels.tolist()} were inferred ({found.source})")

    def notes(self, objective: float) -> tuple[str, ...]:
        """Return what the user should know about a result."""
        return (*self.facts, *unmatched_note(objective))

    # The objective, of one guess or of many --------------------------------------------------------------

    def gradient(self, guess: Unknowns, *, create_graph: bool) -> dict[str, Tensor]:
        """Return the gradient, or the update, that a guess would have produced."""
        x, targets = self.text.x(guess), self.text.targets(guess)
        update, _ = update_of(
            self.adapter, x, targets, self.text.layout, self.names, self.aggregation, create_graph=create_graph
        )
        return update

    def distance(self, guess: Unknowns, *, create_graph: bool) -> Tensor:
        """Return the objective of a guess."""
        with ReplaceDropout(guess.masks) if guess.masks else nullcontext():
            gradient = self.gradient(guess, create_graph=create_graph)
        return self.objective(gradient) + self.options.penalty(self.text, guess)

    def _functional_distance(self, template: Unknowns) -> Callable[..., Tensor]:
        """Return :meth:`distance` as a function of the guess's tensors that ``torch.func`` can transform."""

        def distance(*tensors: Tensor) -> Tensor:
            guess = template.with_tensors(tensors)
            x, targets = self.text.x(guess), self.text.targets(guess)

            def loss(parameters):
                with ReplaceDropout(guess.masks) if guess.masks else nullcontext():
                    return self.adapter.loss(x, targets, self.text.layout, parameters)

            return self.objective(torch.func.grad(loss)(self.parameters)) + self.options.penalty(self.text, guess)

        return distance

    def distances(self, guesses: Iterable[Unknowns]) -> Tensor:
        """Return the objectives of several guesses, (K,), without graph; no more are held than are taken together."""
        return torch.cat([self._distances(group) for group in in_groups(guesses, self.together)])

    def best_of(self, guesses: Iterable[Unknowns]) -> Unknowns:
        """Return the guess of lowest objective, the first one if none is finite."""
        best, least = None, math.inf
        for group in in_groups(guesses, self.together):
            values = self._distances(group).nan_to_num(nan=math.inf)
            index = int(values.argmin())
            if best is None or values[index].item() < least:
                best, least = group[index], values[index].item()
        return best

    def _distances(self, group: list[Unknowns]) -> Tensor:
        self.evaluations += self.aggregation.epochs * len(group)
        if len(group) == 1:
            return self.distance(group[0], create_graph=False).detach()[None]
        with torch.no_grad():
            return torch.func.vmap(self._functional_distance(group[0]))(*stacked(group))

    def slopes(self, guess: Unknowns) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the objectives (R,) of R stacked guesses, and their derivatives by ``guess.tensors()``."""
        tensors = guess.tensors()
        self.evaluations += GRADIENTS_PER_STEP * self.aggregation.epochs * len(tensors[0])
        if len(tensors[0]) == 1:
            value = self.distance(guess.with_tensors(t[0] for t in tensors), create_graph=True)
            return value.detach()[None], torch.autograd.grad(value, tensors)
        function = torch.func.grad_and_value(self._functional_distance(guess), argnums=tuple(range(len(tensors))))
        slopes, values = torch.func.vmap(function)(*(t.detach() for t in tensors))
        return values, slopes

    # The descent -----------------------------------------------------------------------------------------

    def start(self, generator: torch.Generator) -> Unknowns:
        """Return the candidate of lowest objective."""
        candidates = (self.text.draw(generator, self.options.init_scale) for _ in range(self.options.candidates))
        return next(candidates) if self.options.candidates == 1 else self.best_of(candidates)

    def attempts(self, seed: int) -> list[Descent]:
        """Run the restarts, as many together as fit; those that follow a perfect match are not needed."""
        generators = [torch.Generator().manual_seed(s) for s in restart_seeds(seed, self.options.restarts)]
        finished: list[Descent] = []
        for first in range(0, len(generators), self.together):
            finished += self.descend(generators[first : first + self.together])
            if any(attempt.objective <= self.options.loss_tolerance for attempt in finished):
                break
        return finished

    def descend(self, generators: list[torch.Generator]) -> list[Descent]:
        """Run Adam from one start per generator, all together, and keep the best iterate of each."""
        options, starts = self.options, [self.options.start(self, generator) for generator in generators]
        attempts = [Descent(start.detached()) for start in starts]
        guess = starts[0].with_tensors(t.requires_grad_() for t in stacked(starts))
        unknowns = guess.tensors()
        groups = [
            {"params": unknowns[:1], "weight_decay": options.prior_pull},
            {"params": unknowns[1:], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, betas=BETAS)
        for iteration in range(options.iterations):
            values, slopes = self.slopes(guess)
            for i, (value, attempt) in enumerate(zip(values.tolist(), attempts, strict=True)):
                if not attempt.stopped:
                    attempt.see(value, guess.with_tensors(t[i] for t in unknowns), options)
            if all(a.stopped for a in attempts) or any(a.objective <= options.loss_tolerance for a in attempts):
                break
            for unknown, slope in zip(unknowns, slopes, strict=True):
                norms = slope.flatten(1).norm(dim=1).clamp(min=torch.finfo(slope.dtype).tiny)
                unknown.grad = slope / norms.view(-1, *[1] * (slope.dim() - 1))
            rate = options.learning_rate * DECAYS[options.decay](iteration / options.iterations)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            self._rearrange(guess, attempts, generators)
        for attempt in attempts:
            attempt.stopped = attempt.stopped or "another restart matched"
        return attempts

    def _rearrange(self, guess: Unknowns, attempts: list[Descent], generators: list[torch.Generator]) -> None:
        """Bound the dropout masks, and let the attack make its discrete moves."""
        for mask, largest in zip(guess.masks, self.largest_masks, strict=True):
            mask.data.clamp_(0, largest)
        for i, (attempt, generator) in enumerate(zip(attempts, generators, strict=True)):
            if attempt.stopped or not self.options.moves_after(attempt.iterations):
                continue
            tensors = [t.detach()[i] for t in guess.tensors()]
            moved = self.options.move(self, guess.with_tensors(tensors), generator)
            for tensor, new in zip(tensors, moved.tensors(), strict=True):
                tensor.copy_(new)
            attempt.last_improved = attempt.iterations  # a move may cost some objective first


def restart_seeds(seed: int, restarts: int) -> list[int]:
    """Return the seed of every restart; restart k alone is the attack with ``restarts=1`` and its seed."""
    later = torch.randint(2**31, (restarts,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [seed, *later[1:]]


def in_groups(items: Iterable[Unknowns], size: int) -> Iterator[list[Unknowns]]:
    """Yield the items in lists of ``size``, the last one shorter."""
    rest = iter(items)
    while group := list(islice(rest, size)):
        yield group


def stacked(guesses: list[Unknowns]) -> list[Tensor]:
    """Return the tensors of guesses of one kind, stacked along a new first axis, detached."""
    rows = zip(*(guess.tensors() for guess in guesses), strict=True)
    return [torch.stack([t.detach() for t in row]) for row in rows]


def matched_names(adapter: "ModelAdapter", released: SharedGradient | Observation) -> tuple[str, ...]:
    """Return the released parameters whose gradient is a function of x: all but a word table read by token ids."""
    by_ids = adapter.lookup_table() if adapter.select(released.shared).through_lookup else None
    return tuple(name for name in released.gradient if name != by_ids)


def kept_coordinates(
    observed: Mapping[str, Tensor], defenses: tuple[str, ...], mask_zeros: bool | str
) -> dict[str, Tensor]:
    """Return where a gradient says something, if it was sparsified.

    Zeros are no sign of it: a dead ReLU unit has a gradient of zeros, and those tell something about x.

    Args:
        observed: The released gradient.
        defenses: What was applied to it.
        mask_zeros: The option of :class:`ImageAttack`.

    Returns:
        Per name, True where the gradient is not zero; names without zeros are absent, and all where nothing is masked.
    """
    sparsified = any(defense.startswith(SPARSIFIERS) for defense in defenses)
    if not (sparsified if mask_zeros == "auto" else mask_zeros):
        return {}
    kept = {name: g != 0 for name, g in observed.items()}
    return {name: k for name, k in kept.items() if not k.all()}


def unmatched_note(objective: float) -> tuple[str, ...]:
    """Return what to say of a final objective: nothing where the gradient was matched."""
    if objective < UNMATCHED:
        return ()
    return (
        f"the gradient was not matched (objective {objective:.2g}, zero gradient 1): either it is noisy, or the "
        "descent is stuck and more iterations or restarts may recover more",
    )
