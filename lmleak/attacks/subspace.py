"""The subspace attack: all texts of a batch at once, by descent on token logits against the first blocks."""

import time
from dataclasses import dataclass
from typing import ClassVar

from lmleak.adapters.base import ModelAdapter
from lmleak.adapters.structure import weight_rows
from lmleak.attacks.base import Assumptions, Attack, reconstruction
from lmleak.attacks.span_layers import Site, first_site
from lmleak.attacks.span_score import FirstLayerScore, soft_row_space
from lmleak.attacks.span_subspace import stacked_gradient
from lmleak.attacks.subspace_objective import Candidates, GradientLikelihood, KnownText, sentence_maps
from lmleak.attacks.subspace_search import Search
from lmleak.errors import ConfigError, UnsupportedCombinationError
from lmleak.gradients.shared import SharedGradient
from lmleak.types import AttackCost, Observation, Reconstruction

POOL = 512
"""Tokens per position that may replace another."""
POLISHED = 2
"""The best guesses, that are polished."""


@dataclass(frozen=True)
class Subspace(Attack):
    """Recovery of whole batches from encoders and decoders by first-order descent, clean or noisy.

    A linear map's gradient is D^T H + noise, with H what the texts put into it. The texts sought are those that
    explain the gradients of the first blocks' maps best, whatever D (:mod:`lmleak.attacks.subspace_objective`).
    1. The attention input of block 0 scores the whole vocabulary at every position (:mod:`lmleak.attacks.span_score`).
    2. Every private token is a softmax over the best candidates, its embedding their mean. Adam ascends the
       likelihood of the batch while the temperature falls, from several random starts at once
       (:mod:`lmleak.attacks.subspace_search`).
    3. The two likeliest guesses are polished: each token in turn is substituted by those that explain most of what the
       other tokens leave of the first layer's gradient (orthogonal matching pursuit), or exchanged with another
       text's.

    Assumes the weights, the batch size and the lengths, as the paper does; special tokens around a text are the
    tokenizer's and public. No labels, and nothing about the noise, whose level is read off the gradient: noise,
    bfloat16, int8, clipping and local steps need no options. Batches need fewer tokens than the hidden size. The last
    token of a language model's text is no input that reaches the loss and is left out; masked tokens stay masked.
    Differs from the paper, of which we know the abstract: candidates instead of free embeddings
    (``free_embeddings=True`` frees them), the likelihood of the whole batch instead of a sum of distances of single
    inputs (on embedded models that sum preferred wrong texts to the true ones from noise of 0.1 RMS on), and a
    discrete end. What is returned is a local optimum: under noise the true batch was often likelier still.

    Confidence per token: its probability by likelihood among the substitutes tried, the rest of the guess given,
    times the probability that it is real by its gain at the first layer, calibrated on the candidates of the
    position. It does not know how sure the rest is. ``objective`` is minus the log-likelihood in
    nats, up to a constant of the gradient: it ranks guesses of one gradient, and does not compare gradients.
    ``cost.iterations`` counts steps of the descent, each one forward and backward pass of all restarts through
    ``blocks`` blocks; ``cost.gradient_evaluations`` is 0, for no gradient of the full model is evaluated.
    """

    name: ClassVar[str] = "subspace"
    paper: ClassVar[str] = "after TIGER 2026, arXiv:2606.18312 (abstract; the algorithm is ours)"
    assumes: ClassVar[Assumptions] = Assumptions(
        tasks=("causal-lm", "sequence-classification", "masked-lm"), lengths=True, labels=False, local_steps=True,
        parameters="the attention inputs of block 0, and a map behind its attention",
    )  # fmt: skip

    iterations: int = 120
    """Steps of the descent, over which the temperature falls."""
    candidates: int = 32
    """Tokens per position; at least 4 per text are used."""
    restarts: int = 6
    """Guesses of the whole batch that descend side by side."""
    blocks: int = 2
    """How many of the first blocks are read."""
    learning_rate: float = 0.3
    """Of Adam, in nats of a token's logit (or in prior standard deviations of an embedding)."""
    free_embeddings: bool = False
    """Whether embeddings are the unknowns, held by the Gaussian prior, instead of mixtures of candidates."""

    def __post_init__(self):
        self._check_counts("iterations", "candidates", "restarts", "blocks")
        if not self.learning_rate > 0:
            raise ConfigError(f"learning_rate must be positive, got {self.learning_rate}")

    def check(self, adapter: ModelAdapter, shared: SharedGradient) -> None:
        """Refuse gradients without the maps that are read, and batches of more tokens than they tell.

        Args:
            adapter: The model.
            shared: The released gradient.

        Raises:
            UnsupportedCombinationError: With the reason.
        """
        super().check(adapter, shared)
        self._check_blocks(adapter)
        first = first_site(adapter)
        if not first.is_released(shared.gradient):
            raise UnsupportedCombinationError(
                f"attack {self.name!r} needs the gradient of one of {', '.join(first.paths)} to tell which tokens "
                "were where, and none is released. Share them (shared='all' or 'block:0-1') or use tag"
            )
        sentence_maps(adapter, shared.gradient, self.blocks)
        tokens, width = int(shared.layout["attention_mask"].sum()), _input_width(adapter, first)
        if tokens >= width:
            raise UnsupportedCombinationError(
                f"attack {self.name!r} needs fewer tokens in the batch than the hidden size: {tokens} tokens explain "
                f"every gradient of width {width}, whatever they are. Use a smaller batch or a matching attack"
            )

    def recover(self, adapter: ModelAdapter, observation: Observation, *, seed: int) -> Reconstruction:
        """Return the likeliest texts, as many as the batch holds and as long as theirs.

        Args:
            adapter: The model.
            observation: The released gradient, the batch size and the lengths.
            seed: Seed of the starts, and of the tokens that the setup is checked on.

        Returns:
            The reconstruction.
        """
        start = time.perf_counter()
        first, *behind = first_site(adapter), *sentence_maps(adapter, observation.gradient, self.blocks)
        rows = {site: stacked_gradient(adapter, observation.gradient, site.paths) for site in (first, *behind)}
        rows = {site: gradient for site, gradient in rows.items() if site == first or gradient.any()}
        scores = FirstLayerScore(adapter, first.paths[0], soft_row_space(rows[first]), seed=seed)
        known = KnownText(adapter, observation)
        candidates = Candidates(known, scores, max(POOL, self.candidates))
        likelihood = GradientLikelihood(known, rows)
        search = Search(known, candidates, likelihood)
        guesses, steps, stopped = search.relax(
            max(self.candidates, 4 * observation.batch_size), self.restarts, self.iterations, self.learning_rate,
            free=self.free_embeddings, seed=seed,
        )  # fmt: skip
        polished = [search.polish(guess) for guess in guesses[:POLISHED]]
        best = max((guess for guess, _ in polished), key=lambda guess: guess.nats)
        confidence = search.confidence(best)
        return reconstruction(
            self.name, adapter,
            [row[read].tolist() for row, read in zip(best.ids, known.read, strict=True)],
            [row[read].tolist() for row, read in zip(confidence, known.read, strict=True)],
            cost=AttackCost(time.perf_counter() - start, iterations=steps),
            stopped=stopped,
            objective=-best.nats,
            notes=_notes(adapter, likelihood, len(guesses), sum(sweeps for _, sweeps in polished)),
        )  # fmt: skip


def _input_width(adapter, site: Site) -> int:
    module = adapter.model.get_submodule(site.paths[0])
    return weight_rows(module, module.weight).shape[1]


def _notes(adapter, likelihood: GradientLikelihood, guesses: int, sweeps: int) -> tuple[str, ...]:
    sites = zip(likelihood.paths, likelihood.spaces, strict=True)
    notes = [
        "noise per coordinate: " + ", ".join(f"{s.noise:.1e} at the input of {p} (rank {s.rank})" for p, s in sites),
        f"{guesses} distinct guesses; the best {min(guesses, POLISHED)} were polished in {sweeps} sweeps",
    ]
    if adapter.task == "causal-lm":
        notes.append("the last token of a text is no input that reaches the loss, and was left out")
    return tuple(notes)
