"""FILM: a bag of tokens read off the gradient, put in order by a language model, corrected by the gradient."""

import time
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lmleak.adapters.base import ModelAdapter
from lmleak.adapters.load import load_adapter
from lmleak.adapters.text import TextAdapter
from lmleak.attacks.base import Assumptions, Attack, reconstruction
from lmleak.attacks.film_beam import BagBeams, Text, edits, exchanges
from lmleak.attacks.film_score import Bag, TextScore
from lmleak.attacks.lamp_moves import random_orders
from lmleak.attacks.span_filter import FirstLayerFilter, by_position
from lmleak.attacks.span_layers import first_site
from lmleak.attacks.span_subspace import row_space, stacked_gradient
from lmleak.errors import ConfigError, UnsupportedCombinationError
from lmleak.gradients.readout_bag import token_bag
from lmleak.gradients.readout_positions import sequence_lengths
from lmleak.gradients.readout_rank import machine_epsilon
from lmleak.gradients.readout_targets import next_tokens
from lmleak.gradients.shared import SharedGradient
from lmleak.types import AttackCost, Observation, Reconstruction

ROOM = 2  # tokens that may be repeated, per text, where lengths are unknown
LENGTH = 32  # tokens of the longest text where neither positions nor a small bag tell
SOLVED = 1e-6  # distance of gradients below which nothing is left to improve
PATIENCE = 5  # rounds without improvement


@dataclass(frozen=True)
class FILM(Attack):
    """Bag of tokens, language model, gradient.

    1. Which tokens were inputs (``lmleak.gradients.readout_bag``): rows of the word table's gradient; where they are
       withheld, the tokens whose first-layer attention input lies in the gradient's row space (the span attack's
       filter). Targets that the head's gradient tells are added; the position table tells the longest text.
    2. Beam search with a causal language model restricted to the bag, one text after the other.
    3. The texts are changed where that brings their own gradient closer to the released one,

           LayerCosine(g(texts), g*) + prior_weight * mean nats per token + share of the bag that no text uses,

       by new orders of one text's tokens, by one token substituted, inserted or left out, and by tokens or tails that
       two texts exchange. (The last term only where the bag is exact.)

    Differs from the paper (its code has no step 1, and step 3 minimises the gradient's norm of one layer plus
    perplexity, on the grounds that texts trained on have small gradients): step 3 compares gradients, which uses
    what was released, and may change tokens, because the bag tells no multiplicities and only the longest length.

    Confidence per token: 1 minus the final distance of gradients (0 when the texts explain the gradient), the same for
    all tokens. ``objective`` is that distance. ``cost.gradient_evaluations`` counts the texts' gradients.
    """

    name: ClassVar[str] = "film"
    paper: ClassVar[str] = "Gupta et al. 2022, Recovering Private Text in Federated Learning, arXiv:2205.08514 (FILM)"
    assumes: ClassVar[Assumptions] = Assumptions(
        tasks=("causal-lm",), lengths=False, labels=False,
        parameters="the looked-up rows of the word-embedding table, or the attention input of block 0",
        encoders=False, prior="a causal language model, by default the audited one",
    )  # fmt: skip

    iterations: int = 30
    """Rounds of phase 3, in each of which every text may change once; 0 leaves the beam search's texts."""
    candidates: int = 50
    """Changed texts that are compared per text and round; each costs one gradient."""
    beams: int = 32
    """Sequences kept by the beam search."""
    repetition: float = 2.0
    """Nats that using a token again costs in the beam search."""
    prior_weight: float = 0.01
    """Weight of nats per token in phase 3."""
    prior: str | None = None
    """A causal language model over the same token ids, by a name for ``load_adapter``; None: the audited one."""

    def __post_init__(self):
        for option, least in (("iterations", 0), ("candidates", 2), ("beams", 1)):
            if getattr(self, option) < least:
                raise ConfigError(f"attack 'film': {option} must be at least {least}, got {getattr(self, option)}")
        for option in ("repetition", "prior_weight"):
            if not 0 <= getattr(self, option) < float("inf"):
                raise ConfigError(f"attack 'film': {option} must be zero or positive, got {getattr(self, option)}")

    def check(self, adapter: ModelAdapter, shared: SharedGradient) -> None:
        """Refuse gradients that tell no bag, and a prior over other tokens.

        Args:
            adapter: The model.
            shared: The released gradient.

        Raises:
            UnsupportedCombinationError: With the reason.
        """
        super().check(adapter, shared)
        looked_up = adapter.lookup_table() in shared.gradient and adapter.select(shared.shared).through_lookup
        if not looked_up and not first_site(adapter).is_released(shared.gradient):
            raise UnsupportedCombinationError(
                "attack 'film' needs the looked-up rows of the word-embedding table (shared='all'), or the gradient "
                f"of {' or '.join(first_site(adapter).paths)}, to tell which tokens were used; none of them is "
                "released"
            )
        _load_prior(self.prior, adapter)

    def recover(self, adapter: ModelAdapter, observation: Observation, *, seed: int) -> Reconstruction:
        """Return B texts over the bag that explain the gradient best.

        Args:
            adapter: The model.
            observation: The released gradient and the batch size.
            seed: Draws the changes of phase 3.

        Returns:
            The reconstruction.
        """
        begin = time.perf_counter()
        bag, longest, notes = _bag_and_length(adapter, observation, seed)
        prior = _load_prior(self.prior, adapter)
        start = _start(prior)
        first = [start] if start is not None and start in bag.ids else []  # texts that begin so, as Llama's do
        search = BagBeams(prior, bag.ids, self.beams, self.repetition, start)
        problem = TextScore(adapter, observation, prior, start, bag, self.prior_weight)
        texts: list[Text] = []
        used = torch.zeros(len(bag.ids), dtype=torch.long, device=bag.ids.device)
        for _ in range(observation.batch_size):
            found, _ = search.search(longest.tokens - len(first), used)
            used += (found[0][:, None] == bag.ids).sum(0)
            texts.append((*first, *found[0].tolist()))
        fixed = observation.batch_size == 1 and longest.exact
        lengths = range(len(texts[0]) if fixed else 2, longest.tokens + 1)
        best = problem.score([texts])
        generator = torch.Generator().manual_seed(seed)
        stopped, quiet, rounds = "iteration limit", 0, 0
        while rounds < self.iterations and stopped == "iteration limit":
            before, rounds = best.objective, rounds + 1
            for i in range(observation.batch_size):
                changed = self._changed(best.texts, i, bag.ids.tolist(), lengths, generator)
                best = min(best, problem.score(changed), key=lambda scored: scored.objective) if changed else best
            quiet = quiet + 1 if best.objective == before else 0
            if best.distance < SOLVED:
                stopped = "the texts explain the gradient"
            elif quiet == PATIENCE:
                stopped = f"no change improved the texts in {PATIENCE} rounds"
        confidence = min(1.0, max(0.0, 1 - best.distance))
        return reconstruction(
            self.name, adapter, best.texts, [[confidence] * len(text) for text in best.texts],
            cost=AttackCost(
                time.perf_counter() - begin, gradient_evaluations=problem.evaluations, iterations=rounds
            ),
            stopped=stopped, objective=best.distance, notes=tuple(notes),
        )  # fmt: skip

    def _changed(
        self, texts: list[Text], i: int, bag: list[int], lengths: range, generator: torch.Generator
    ) -> list[list[Text]]:
        """Return batches with text i changed: in other orders, with another token, by exchange with another text."""
        text = texts[i]
        partner = (i + 1 + int(torch.randint(max(1, len(texts) - 1), (1,), generator=generator))) % len(texts)
        part = self.candidates // (2 if len(texts) == 1 else 3)
        orders = random_orders(len(text), part + 1, generator)[1:] if len(text) > 1 else []
        alone = [tuple(text[j] for j in order.tolist()) for order in orders]
        alone += edits(text, bag, part, lengths, generator)
        changed = [[*texts[:i], other, *texts[i + 1 :]] for other in alone]
        if partner == i:
            return changed
        for mine, theirs in exchanges(text, texts[partner], part, lengths, generator):
            both = list(texts)
            both[i], both[partner] = mine, theirs
            changed.append(both)
        return changed


@dataclass(frozen=True)
class _Length:
    tokens: int
    """Of the longest text."""
    exact: bool


def _bag_and_length(adapter, observation: Observation, seed: int) -> tuple[Bag, _Length, list[str]]:
    """Return the bag, the length of the longest text, and in words how both were read."""
    read, lengths = token_bag(adapter, observation), sequence_lengths(adapter, observation)
    ids, exact, positions = read.ids, read.exact, None
    notes = [f"bag: {read.reason}"]
    if ids is None:
        ids, positions = _survivors(adapter, observation, seed)
        exact = True  # a token that was not there lies in the span with probability 0
        notes = ["bag: tokens whose first-layer attention input lies in the row space of its gradient"]
    if not len(ids):
        raise UnsupportedCombinationError(f"attack 'film' found no token of the batch: {read.reason}")
    targets = next_tokens(adapter, observation, seed=seed)
    if targets.ids is not None and len(targets.ids):
        ids, exact = torch.cat([ids, targets.ids.to(ids.device)]), exact and targets.exact
        notes.append(f"targets: {targets.reason}")
    ids = ids.unique().to(adapter.device)
    longest = _Length(lengths.tokens, lengths.exact) if lengths.tokens else None
    if longest is None and positions is not None:
        longest = _Length(positions + 1, True)
    if longest is None:  # rotary positions: every token of the bag once, shared out among the texts, and some room
        longest = _Length(min(-(-len(ids) // observation.batch_size) + ROOM, LENGTH), False)
        notes.append(f"length: {lengths.reason}; started from {longest.tokens} tokens per text")
    limit = adapter.max_positions() or longest.tokens
    return Bag(ids, exact), _Length(max(2, min(longest.tokens, limit)), longest.exact), notes


def _survivors(adapter, observation: Observation, seed: int) -> tuple[Tensor, int | None]:
    """Return the tokens that the gradient of block 0 allows anywhere, and at how many positions any is allowed."""
    site = first_site(adapter)
    rows = stacked_gradient(adapter, observation.gradient, site.paths)
    if rows is None:
        return torch.zeros(0, dtype=torch.long), None
    tokens = FirstLayerFilter(adapter, site.paths[0], row_space(rows, machine_epsilon(adapter, rows)), seed=seed)
    if tokens.position_free:
        return tokens.survivors(0, 1)[0].ids, None
    found = [survivors.ids for survivors in by_position(tokens)]
    return (torch.cat(found), len(found)) if found else (torch.zeros(0, dtype=torch.long), None)


def _load_prior(name: str | None, adapter) -> TextAdapter:
    """Return the language model, which must number tokens as the audited model does."""
    if name is None:
        return adapter
    prior = load_adapter(name, task="causal-lm", device=str(adapter.device))
    own, other = (getattr(a.tokenizer, "get_vocab", lambda: None)() for a in (adapter, prior))
    if prior.vocabulary_size != adapter.vocabulary_size or own != other:
        raise UnsupportedCombinationError(
            f"attack 'film': the prior {name!r} numbers {prior.vocabulary_size} tokens otherwise than {adapter.name} "
            f"({adapter.vocabulary_size}), so it cannot order a bag of token ids; use a model with the same tokenizer"
        )
    return prior


def _start(prior: TextAdapter) -> int | None:
    """Return the token before a text: one that the prior's tokenizer names and its table holds."""
    for attribute in ("bos_token_id", "eos_token_id"):
        token = getattr(prior.tokenizer, attribute, None)
        if token is not None and 0 <= token < prior.vocabulary_size:
            return int(token)
    return None
