"""Gradient matching: move a guess until its gradient is the observed one. DLG and TAG differ in the distance only.

    x* = argmin_x  distance(grad_theta L(x, y; theta), g*)

by Adam on x, and on y where targets are private. Where the attack departs from the published code, and why. Numbers
are tokens in place without -> with the departure, DLG, defaults otherwise, means of 6 texts or seeds (R: random BERT
2 x 64, V = 500, T = 16; T: the trained reference BERT); differences below 0.1 are within the spread.

* The unknown is ``u = (x - mean) / std`` in units of the prior, so one learning rate serves every model.
* Layers are rescaled (:mod:`lmleak.attacks.objectives`): R 0.08 -> 0.75, T 0.48 -> 0.61.
* ``prior_pull`` is weight decay on u. The gradient leaves many directions of x nearly free (LayerNorm alone removes
  two per token); they keep their random start and drown the token: R 0.51 -> 0.75, T 0.58 -> 0.61.
* ``candidates`` random guesses are compared first, as LAMP does (arXiv:2202.08827): many random texts have gradients
  far larger than a trained model's on real text, and descent from there stays on a plateau: T 0.51 -> 0.61.
* Every step uses the gradient divided by its norm. Near a solution it shrinks by orders of magnitude, faster than
  Adam's running mean square forgets; divided, the step is that of any increasing function of the distance:
  T 0.47 -> 0.61.
"""

import math
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lmleak.adapters.base import ModelAdapter
from lmleak.attacks.base import Assumptions, Attack, reconstruction
from lmleak.attacks.objectives import SquaredL2, SquaredL2PlusL1
from lmleak.attacks.relaxed_text import RelaxedText, Unknowns
from lmleak.errors import ConfigError, UnsupportedCombinationError
from lmleak.gradients.capture import gradient_of
from lmleak.gradients.shared import SharedGradient
from lmleak.lookup import lookup
from lmleak.types import AttackCost, Observation, Reconstruction

DECAYS = {
    "none": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}
GRADIENTS_PER_ITERATION = 3  # one gradient, and a backward through it
IMPROVEMENT = 1e-3  # relative decrease of the objective that counts as one
LARGEST_OPTION = 1e30  # beyond it, float32 overflows inside the optimiser
UNMATCHED = 0.1  # an objective above this deserves a note
BETAS = (0.9, 0.95)  # a short memory of squares: the landscape changes while the guess moves


@dataclass(frozen=True, kw_only=True)
class GradientMatching(Attack):
    """The engine of DLG and TAG."""

    iterations: int = 300
    """Largest number of Adam steps per restart."""
    learning_rate: float = 0.1
    """Adam step at the start, in standard deviations of the prior."""
    restarts: int = 1
    """Independent attempts, one after the other; the one of lowest objective is returned."""
    candidates: int = 64
    """Random guesses per restart, of which the best starts the descent; each costs one gradient."""
    init_scale: float = 1.0
    """Standard deviation of the random guess, in those of the prior."""
    prior_pull: float = 0.1
    """Weight decay of u (as in AdamW): how strongly x is drawn to the prior's mean."""
    decay: str = "cosine"
    """Learning-rate schedule: "none", "linear" or "cosine" to zero."""
    balance: float = 0.5
    """How far layers are rescaled to equal norms, from 0 (as published) to 1 (``objectives.layer_scales``)."""
    patience: int = 100
    """Stop after so many iterations without a relative improvement of 1e-3."""
    loss_tolerance: float = 1e-10
    """Stop below this objective, which is 1 for the guess "zero gradient"."""

    assumes: ClassVar[Assumptions] = Assumptions(
        tasks=("sequence-classification", "causal-lm", "masked-lm"), lengths=True, labels=True,
        parameters="any that depend on the embeddings", prior="mean and spread of the embedding table",
    )  # fmt: skip

    def __post_init__(self):
        lookup("decay", self.decay, DECAYS)
        for option, least in (("iterations", 1), ("restarts", 1), ("candidates", 1), ("patience", 1)):
            value = getattr(self, option)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(
                    f"attack {self.name!r}: {option} must be an integer of at least {least}, got {value!r}"
                )
        largest = {"balance": 1.0}
        for option in ("learning_rate", "init_scale", "prior_pull", "balance", "loss_tolerance", "alpha"):
            value, most = getattr(self, option, 0.0), largest.get(option, LARGEST_OPTION)  # alpha is TAG's alone
            if not 0 <= value <= most or (option == "learning_rate" and value == 0):
                least = "above" if option == "learning_rate" else "of at least"
                raise ConfigError(
                    f"attack {self.name!r}: {option} must be a number {least} 0 and at most {most:g}, got {value!r}"
                )

    @abstractmethod
    def objective(self, observed: Mapping[str, Tensor]) -> Callable[[Mapping[str, Tensor]], Tensor]:
        """Return the distance of a gradient from the observed one, as a function of the former."""

    def check(self, adapter: ModelAdapter, shared: SharedGradient) -> None:
        """Refuse what cannot be matched.

        Args:
            adapter: The model.
            shared: The released gradient.

        Raises:
            UnsupportedCombinationError: If nothing but looked-up rows of the word table is shared.
        """
        super().check(adapter, shared)
        if not matched_names(adapter, shared):
            raise UnsupportedCombinationError(
                f"attack {self.name!r} matches gradients as functions of the embeddings x, and the only gradient "
                "shared is the word table's, a function of token ids; share more, or read the tokens off its rows"
            )

    def recover(self, adapter: ModelAdapter, observation: Observation, *, seed: int) -> Reconstruction:
        """Return the text whose gradient is nearest to the observed one.

        Args:
            adapter: The model.
            observation: What the server sees; lengths always, labels for classification.
            seed: Seed of the random starts.

        Returns:
            One sequence per example, its tokens with their probability under softmax(score) as confidence
            (``RelaxedText.decode``), and the recovered embeddings.
        """
        started = time.perf_counter()
        text = RelaxedText(adapter, observation)
        problem = Matching(self, text, observation)
        generator = torch.Generator().manual_seed(seed)
        attempts: list[Descent] = []
        while len(attempts) < self.restarts and not any(a.objective <= self.loss_tolerance for a in attempts):
            attempts.append(problem.descend(generator))
        best = min(attempts, key=lambda attempt: attempt.objective)
        sequences, confidence = text.decode(best.guess)
        iterations = sum(attempt.iterations for attempt in attempts)
        evaluations = GRADIENTS_PER_ITERATION * iterations + len(attempts) * (
            self.candidates if self.candidates > 1 else 0
        )
        return reconstruction(
            self.name, adapter, sequences, confidence,
            cost=AttackCost(time.perf_counter() - started, evaluations, iterations),
            stopped=best.stopped, objective=best.objective if math.isfinite(best.objective) else None,
            embeddings=text.embeddings(best.guess), notes=problem.notes(best.objective),
        )  # fmt: skip


@dataclass(frozen=True)
class Descent:
    """The best iterate of one restart."""

    guess: Unknowns
    objective: float
    iterations: int
    stopped: str


class Matching:
    """One observation to be matched: the constants of the descent."""

    def __init__(self, options: GradientMatching, text: RelaxedText, observation: Observation):
        self.options, self.text, self.adapter = options, text, text.adapter
        self.names = matched_names(self.adapter, observation)
        reference = text.table
        self.observed = {n: observation.gradient[n].to(reference.device, reference.dtype) for n in self.names}
        self.objective = options.objective(self.observed)
        self.left_out = [n for n in observation.gradient if n not in self.names]

    def notes(self, objective: float) -> tuple[str, ...]:
        """Return what the user should know about a result."""
        notes = [f"{n} was not matched: its rows are read by token ids, not by x" for n in self.left_out]
        if not objective < UNMATCHED:
            notes.append(
                f"the gradient was not matched (objective {objective:.2g}, zero gradient 1): either it is noisy, or "
                "the descent is stuck and more iterations or restarts may recover more"
            )
        return tuple(notes)

    def distance(self, guess: Unknowns, *, create_graph: bool) -> Tensor:
        """Return the objective of a guess."""
        x = self.text.x(guess)
        gradient, _ = gradient_of(
            self.adapter, x, self.text.targets(guess), self.text.layout, self.names, create_graph=create_graph
        )
        return self.objective(gradient)

    def start(self, generator: torch.Generator) -> Unknowns:
        """Return the candidate of lowest objective."""
        best, least = self.text.draw(generator, self.options.init_scale), math.inf
        if self.options.candidates == 1:
            return best
        candidate = best
        for remaining in reversed(range(self.options.candidates)):
            value = self.distance(candidate, create_graph=False).item()
            if value < least:
                best, least = candidate, value
            if remaining:
                candidate = self.text.draw(generator, self.options.init_scale)
        return best

    def descend(self, generator: torch.Generator) -> Descent:
        """Run Adam from one start and keep the best iterate."""
        options, guess = self.options, self.start(generator)
        unknowns = guess.tensors()
        best, best_objective, reference, last_improved = guess.detached(), math.inf, math.inf, 0
        groups = [
            {"params": [guess.u], "weight_decay": options.prior_pull},
            {"params": unknowns[1:], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, betas=BETAS)
        for iteration in range(options.iterations):
            objective = self.distance(guess, create_graph=True)
            value = objective.item()
            if not math.isfinite(value):
                return Descent(
                    best, best_objective, iteration + 1, f"objective became {value} at iteration {iteration}"
                )
            if value < best_objective:
                best, best_objective = guess.detached(), value
            if value <= options.loss_tolerance:
                return Descent(best, best_objective, iteration + 1, "objective below tolerance")
            if value < reference * (1 - IMPROVEMENT):
                reference, last_improved = value, iteration
            elif iteration - last_improved >= options.patience:
                return Descent(
                    best, best_objective, iteration + 1, f"no improvement for {options.patience} iterations"
                )
            gradients = torch.autograd.grad(objective, unknowns)
            for unknown, gradient in zip(unknowns, gradients, strict=True):
                unknown.grad = gradient / gradient.norm().clamp(min=torch.finfo(gradient.dtype).tiny)
            rate = options.learning_rate * DECAYS[options.decay](iteration / options.iterations)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        return Descent(best, best_objective, options.iterations, "iteration limit")


def matched_names(adapter: ModelAdapter, released: SharedGradient | Observation) -> tuple[str, ...]:
    """Return the released parameters whose gradient is a function of x: all but a word table read by token ids."""
    by_ids = adapter.lookup_table() if adapter.select(released.shared).through_lookup else None
    return tuple(name for name in released.gradient if name != by_ids)


@dataclass(frozen=True, kw_only=True)
class DLG(GradientMatching):
    """Deep leakage from gradients: least squares between gradients."""

    name: ClassVar[str] = "dlg"
    paper: ClassVar[str] = "Zhu, Liu, Han 2019, Deep Leakage from Gradients, arXiv:1906.08935"

    def objective(self, observed: Mapping[str, Tensor]) -> SquaredL2:
        """Return the squared L2 distance."""
        return SquaredL2(observed, balance=self.balance)


@dataclass(frozen=True, kw_only=True)
class TAG(GradientMatching):
    """Transformer attack on gradients: squared L2 plus alpha times L1."""

    alpha: float = 0.1
    """Weight of the relative L1 distance (``objectives.SquaredL2PlusL1``)."""

    name: ClassVar[str] = "tag"
    paper: ClassVar[str] = (
        "Deng et al. 2021, TAG: Gradient Attack on Transformer-based Language Models, arXiv:2103.06819"
    )

    def objective(self, observed: Mapping[str, Tensor]) -> SquaredL2PlusL1:
        """Return the squared L2 distance plus alpha times the L1 distance."""
        return SquaredL2PlusL1(observed, balance=self.balance, alpha=self.alpha)
