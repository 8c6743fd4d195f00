"""Which tokens will an attacker recover from a noisy gradient? Predicted per token, without an attack.

Released: g + sigma n. A method is an attacker whose success under random noise can be computed (``METHODS``): linear
ones from A = J J^T (``recovery_posterior``), substitutions from the gradients of neighbouring texts
(``recovery_substitution``). All know model, lengths, class labels, special tokens and sigma. Special tokens are
public and not counted. Beyond Zhang et al. 2023.

Measured by the recipe predicted_recovery (stories260k Llama with pretrained weights, reference-bert, reference-gpt2; 4
texts of 6 to 8 private tokens each, noise .001 to 300 times the gradient's rms; numbers in recipes/results).
Calibration error per token, at all levels / where recall lies within .05 and .95 (a perfect prediction of as few
tokens would show .01 / .04):
  substitution          against a discrete attacker from the truth        .02 / .06
  posterior-known       against the same                                  .15 / .23
  posterior-mean-field  against the same                                  .16 / .26
  gaussian              against a continuous MAP attacker from the truth  .06 / .09
  substitution          against TAG, which starts from nothing            .48
Against attacks that start from nothing the error is the search's failure, not missing information: without noise the
span attack recovers every token, as predicted, but it refuses any noise; TAG recovers half where the truth is the
likeliest text by far, and token-by-token descent from a random text (one tried) stops 1.4 times the clean gradient's
squared norm above the truth. These predictions say what the gradient determines, for a search that does not fail. They
are no proven bound: tokens are equally likely beforehand, and an attacker with a language model knows more.
``gaussian`` is too low where noise begins to shrink the estimate, 10 to 30 times the rms (Llama at 30: predicted .01,
measured .57). Two causes, not separated: RMSNorm and LayerNorm keep an input's direction however far it shrinks, which
a linearisation at the truth cannot know; and there the attacker's descent had not converged (3 to 6 posterior
deviations left), so it keeps some of its start.
What did not help: linear posteriors for candidates far away (the linearised squared distance to another token is off
by .3 to 50 times, median 2); ranking candidates by it (at 256 of 512 it misses 44 percent of the 16 nearest texts, the
embedding distance none); drawing the posterior around the truth (it predicts .98 where nothing is recovered).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lmleak.adapters.text import TextAdapter
from lmleak.errors import ConfigError, UnsupportedCombinationError, UnsupportedModelError
from lmleak.influence.batch import PartialInputJacobian
from lmleak.influence.jacobian import GradientJacobian
from lmleak.influence.recovery_posterior import LinearGaussian, gaussian_hits, posterior_hits
from lmleak.influence.recovery_substitution import SubstitutionTable, substitution_hits, substitution_table
from lmleak.lookup import lookup
from lmleak.types import TextBatch

COORDINATE_LIMIT = 4096  # most coordinates for a dense A: 128 MiB in float64, and as many products
TABLE_LIMIT = 2**29  # most numbers in a table of substitutions: 2 GiB
SKETCH_SIZE = 4096  # squared distances err by 2 %, noise levels by 1 %


@dataclass(frozen=True)
class RecoveryPrediction:
    """Probability, over the noise, that each private token is decoded correctly."""

    method: str
    assumes: str
    """Who the attacker is and what the prediction rests on, in words."""
    noise_std: float
    """sigma, in the gradient's unit."""
    draws: int
    token_probability: tuple[tuple[float, ...], ...]
    """Per text, one probability per private token, in the order of ``TextBatch.token_ids``."""
    token_std_error: tuple[tuple[float, ...], ...]
    """Standard error of each by the finite number of draws: sqrt(p (1 - p) / draws)."""
    recall: float
    """Expected share of private tokens recovered."""
    recall_std_error: float
    """By the draws; tokens of one draw share their noise."""
    products: int
    """Products with A behind it, shared by all levels and linear methods of a predictor."""
    gradients: int
    """Gradients of neighbouring texts behind it, shared by all levels and substitution methods."""


@dataclass(frozen=True)
class Method:
    """An attacker whose success is predicted."""

    assumes: str
    hits: Callable[["RecoveryPredictor", float, int, torch.Generator], Tensor]
    """Boolean (draws, N)."""
    linear: bool
    """Whether it needs A, or else the table of substitutions."""


def _linear(assumes: str, others: str) -> Method:
    return Method(
        f"token of highest posterior over the vocabulary, {assumes}; {LINEARISED}",
        lambda p, std, draws, generator: posterior_hits(p.problem, std, draws, generator, others),
        linear=True,
    )


def _substitution(assumes: str, *, others_known: bool) -> Method:
    return Method(
        f"{assumes}; exact gradients of single substitutions, targets follow the text",
        lambda p, std, draws, generator: substitution_hits(p.table, std, draws, generator, others_known=others_known),
        linear=False,
    )


LINEARISED = "gradients linearised in x, targets known"
METHODS: dict[str, Method] = {
    "gaussian": Method(
        f"maximum a posteriori under a Gaussian prior, decoded by cosine similarity; {LINEARISED}",
        lambda p, std, draws, generator: gaussian_hits(p.problem, std, draws, generator),
        linear=True,
    ),
    "posterior-known": _linear("the other tokens known (an upper bound)", "known"),
    "posterior-gaussian": _linear("the other tokens integrated out under their Gaussian prior", "gaussian"),
    "posterior-mean-field": _linear("beliefs about the others from their own discrete posteriors", "mean-field"),
    "substitution-known": _substitution(
        "likeliest candidate, the other tokens known (an upper bound)", others_known=True
    ),
    "substitution": _substitution(
        "likeliest text near the truth, by coordinate ascent over candidates whose effects are taken to add up",
        others_known=False,
    ),
}


class RecoveryPredictor:
    """Predictions for one batch at any noise level; what the levels share is computed once, at first use.

    Linear methods take one product with A per coordinate; substitutions one gradient per token and candidate.

    Args:
        adapter: A language model.
        batch: The private batch.
        shared: Which parameters are released.
        candidates: Tokens an attacker of the substitution methods considers per position, the truth included: those
            nearest to it in the embedding table. Fewer than the vocabulary make the prediction pessimistic for the
            owner (too high): by up to .03 at 512 of 2000 where recall is above one half, .07 below.
        seed: Seed of noise, lots and sketches.

    Raises:
        UnsupportedModelError: If the model is no language model.
        UnsupportedCombinationError: If tokens show elsewhere than through x: masked targets, the table's own rows.
        ConfigError: If fewer than two candidates are asked for.
    """

    def __init__(
        self,
        adapter: TextAdapter,
        batch: TextBatch,
        *,
        shared: str = "no-word-embeddings",
        candidates: int = 512,
        seed: int = 0,
    ):
        if not isinstance(adapter, TextAdapter):
            raise UnsupportedModelError(f"tokens are predicted for language models; this is of task {adapter.task!r}")
        if adapter.task == "masked-lm":
            raise UnsupportedCombinationError(
                "a masked token enters the gradient as a target only, never through x, so its recovery cannot be "
                "predicted from J; use a classifier or a causal language model"
            )
        self.selection = adapter.select(shared)
        if self.selection.through_lookup:
            raise UnsupportedCombinationError(
                f"shared={shared!r} releases the word table's own gradient, whose non-zero rows name the tokens "
                "outright; a prediction through x would be far too low. Use shared='no-word-embeddings'"
            )
        if candidates < 2:
            raise ConfigError(f"expected at least 2 candidates (the true token and another), got {candidates}")
        self.adapter, self.batch, self.shared, self.seed = adapter, batch, shared, seed
        special = torch.tensor(sorted(adapter.special_ids()), dtype=torch.long)
        ids = batch.inputs["input_ids"]
        self.private = batch.layout["attention_mask"].bool() & ~torch.isin(ids, special.to(ids))
        usable = adapter.table().norm(dim=-1).cpu() > 0  # as ``nearest_tokens``: a zero row has no direction
        usable[special] = False
        self.vocabulary = usable.nonzero().flatten()
        self.tokens = ids[self.private].cpu()
        if unusable := set(self.tokens.tolist()) - set(self.vocabulary.tolist()):
            raise UnsupportedCombinationError(
                f"token {min(unusable)} has an all-zero embedding, which no attacker can tell from padding"
            )
        self.candidates = min(candidates, len(self.vocabulary))

    @cached_property
    def problem(self) -> LinearGaussian:
        """The linearised problem: a dense A on the private tokens' coordinates.

        Raises:
            UnsupportedCombinationError: Beyond ``COORDINATE_LIMIT`` coordinates.
        """
        dx = len(self.tokens) * self.adapter.width
        if dx > COORDINATE_LIMIT:
            raise UnsupportedCombinationError(
                f"linear methods need a dense A, and dx = {dx} exceeds {COORDINATE_LIMIT}; "
                "use method='substitution', or shorter texts"
            )
        jacobian = GradientJacobian(self.adapter, self.batch, shared=self.shared)
        mask = self.private.unsqueeze(-1).expand_as(jacobian.x)
        gram = PartialInputJacobian(jacobian, mask).gram_operator().to_dense(COORDINATE_LIMIT)
        prior = self.adapter.prior()
        return LinearGaussian.from_gram(
            gram, self.adapter.input(self.batch)[self.private],
            self.adapter.embed(self.vocabulary), torch.searchsorted(self.vocabulary, self.tokens),
            prior.mean, prior.std,
        )  # fmt: skip

    def nearest(self) -> Tensor:
        """Return the candidates (N, C): the tokens nearest to each private token, itself first."""
        table = self.adapter.embed(self.vocabulary)
        distance = torch.cdist(self.adapter.embed(self.tokens), table).cpu()
        distance[self.tokens.unsqueeze(1) == self.vocabulary] = -1
        return self.vocabulary[distance.argsort(1)[:, : self.candidates]]

    @cached_property
    def table(self) -> SubstitutionTable:
        """The effect of every substitution.

        Raises:
            UnsupportedCombinationError: If it would not fit in memory.
        """
        if (numbers := len(self.tokens) * self.candidates * SKETCH_SIZE) > TABLE_LIMIT:
            raise UnsupportedCombinationError(
                f"{len(self.tokens)} tokens with {self.candidates} candidates each need a table of {numbers} numbers, "
                f"more than {TABLE_LIMIT}; pass fewer candidates="
            )
        generator = torch.Generator().manual_seed(self.seed)
        where = self.private.nonzero().tolist()
        names = self.selection.names
        return substitution_table(
            self.adapter, self.batch, where, self.nearest(), names, size=SKETCH_SIZE, generator=generator
        )

    def predict(self, noise_std: float, *, method: str = "substitution", draws: int = 64) -> RecoveryPrediction:
        """Return the prediction at one noise level.

        Args:
            noise_std: sigma, positive, in the gradient's unit.
            method: A key of ``METHODS``.
            draws: Draws of the noise, at least 2.

        Returns:
            The prediction.

        Raises:
            ConfigError: If ``noise_std`` or ``draws`` cannot be right.
        """
        if not (math.isfinite(noise_std) and noise_std > 0):
            raise ConfigError(f"noise_std must be finite and positive, got {noise_std}; without noise use an attack")
        if draws < 2:
            raise ConfigError(f"a standard error needs draws >= 2, got {draws}")
        chosen = lookup("method", method, METHODS)
        hits = chosen.hits(self, noise_std, draws, torch.Generator().manual_seed(self.seed + 1)).double()
        probability = hits.mean(0)
        recalls = hits.mean(1)
        return RecoveryPrediction(
            method=method,
            assumes=chosen.assumes,
            noise_std=noise_std,
            draws=draws,
            token_probability=self._by_text(probability),
            token_std_error=self._by_text((probability * (1 - probability) / draws).sqrt()),
            recall=recalls.mean().item(),
            recall_std_error=(recalls.std() / math.sqrt(draws)).item(),
            products=self.problem.values.numel() if chosen.linear else 0,
            gradients=0 if chosen.linear else self.table.gradients,
        )

    def _by_text(self, values: Tensor) -> tuple[tuple[float, ...], ...]:
        """Return one tuple of private tokens per text."""
        return tuple(tuple(part.tolist()) for part in values.split(self.private.sum(1).tolist()))


def predict_recovery(
    adapter: TextAdapter,
    batch: TextBatch,
    noise_std: float,
    *,
    shared: str = "no-word-embeddings",
    method: str = "substitution",
    candidates: int = 512,
    draws: int = 64,
    seed: int = 0,
) -> RecoveryPrediction:
    """Return the probability that each private token is recovered from g + N(0, sigma^2), without an attack.

    For several noise levels or methods use one :class:`RecoveryPredictor`, which shares what is costly.

    Args:
        adapter: A language model.
        batch: The private batch.
        noise_std: sigma, positive, in the gradient's unit.
        shared: Which parameters are released. A table tied to the head stays in, with the gradient through the head.
        method: A key of ``METHODS``: who the attacker is.
        candidates: Tokens that substitution attackers consider per position.
        draws: Draws of the noise.
        seed: Seed of noise, lots and sketches.

    Returns:
        The prediction.
    """
    predictor = RecoveryPredictor(adapter, batch, shared=shared, candidates=candidates, seed=seed)
    return predictor.predict(noise_std, method=method, draws=draws)
