"""Attacks side by side: one way of sharing a gradient, one attack on what was shared, its scores and its cost."""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from functools import lru_cache

from lmleak.adapters.text import TextAdapter
from lmleak.attacks import ATTACKS, Attack, parse_attack
from lmleak.attacks.meter import Meter
from lmleak.defenses import Defense, NoDefense, derived_seed
from lmleak.errors import ConfigError
from lmleak.evaluation.model import load_text_model
from lmleak.evaluation.scored import DROPOUT_STREAM, scored_attack
from lmleak.gradients import SharedGradient, capture_gradient
from lmleak.metrics import TextScore, lamp_scores
from lmleak.types import SINGLE_STEP, Aggregation, Reconstruction, TextBatch

REPEATS = 3  # gradients timed, of which the fastest counts

model_of = lru_cache(maxsize=1)(load_text_model)
"""The model that a configuration names; the last one is kept, so work sorted by model loads each once."""


@dataclass(frozen=True)
class Sharing:
    """One way of sharing the gradient of a batch."""

    name: str
    """What it is called in results."""
    defense: Defense = field(default_factory=NoDefense)
    """What is done to the gradient; its seed is replaced per batch."""
    shared: str = "no-word-embeddings"
    """Parameters whose gradient is shared (``ModelAdapter.select``)."""
    dropout: bool = False
    """Whether the model's dropout is on."""
    aggregation: Aggregation = SINGLE_STEP
    """Local steps and clients."""
    reveal_lengths: bool = True
    """Whether the server learns lengths and padding."""
    reveal_labels: bool = True
    """Whether the server learns the class labels."""

    def release(self, adapter: TextAdapter, batch: TextBatch, *, seed: int) -> SharedGradient:
        """Return what the server receives.

        Args:
            adapter: The model.
            batch: The private batch.
            seed: The batch's seed, by which noise and dropout masks are drawn.

        Returns:
            The released gradient.
        """
        shared = capture_gradient(
            adapter, batch, shared=self.shared, reveal_lengths=self.reveal_lengths, reveal_labels=self.reveal_labels,
            aggregation=self.aggregation, dropout=self.dropout, seed=derived_seed(seed, DROPOUT_STREAM),
        )  # fmt: skip
        return shared if isinstance(self.defense, NoDefense) else self.defense.with_seed(seed)(shared)


def gradient_seconds(adapter: TextAdapter, batch: TextBatch, shared: str) -> float:
    """Return the time of one gradient of a batch, the unit of cost; the fastest of ``REPEATS``.

    Args:
        adapter: The model.
        batch: The private batch.
        shared: Parameters whose gradient is shared.

    Returns:
        Seconds.
    """
    times = []
    for _ in range(REPEATS):
        with Meter(adapter.device) as meter:
            capture_gradient(adapter, batch, shared=shared)
        times.append(meter.seconds)
    return min(times)


def attack_result(
    attack: Attack, adapter: TextAdapter, shared: SharedGradient, batch: TextBatch, *, seed: int
) -> dict:
    """Run one attack on what was shared and score it against the truth.

    Args:
        attack: The attack.
        adapter: The model.
        shared: What the server received.
        batch: The truth.
        seed: The batch's seed, from which the attack's is derived (:func:`scored_attack`).

    Returns:
        ``{"refused": reason}`` if the combination is impossible. Else the scores of ``score_text`` (special tokens
        off), ``lamp_rouge1``, ``lamp_rouge2``, ``lamp_rougeL`` (special tokens counted), what was recovered per
        private text, and the attack's cost. Embedding errors are left out: most of the attacks recover none.
    """

    def more(recovered: Reconstruction, score: TextScore) -> dict:
        lamp = lamp_scores(recovered, batch, adapter)
        return {
            "lamp_rouge1": lamp.rouge1,
            "lamp_rouge2": lamp.rouge2,
            "lamp_rougeL": lamp.rougeL,
            "recovered": [example.text for example in score.per_example],
        }

    return scored_attack(attack, adapter, shared, batch, seed=seed, more=more)


def attack_specs(specs: Iterable[str], iterations: int | None = None) -> list[str]:
    """Return specifications of attacks, every registered one if none is given.

    Args:
        specs: Specifications ("span", "tag(iterations=500)"), or nothing.
        iterations: Most iterations of those given without options that have such an option; None leaves their own.

    Returns:
        The specifications, each checked.

    Raises:
        ConfigError: If one is named twice.
    """
    chosen = [_limited(spec, iterations) for spec in (list(specs) or ATTACKS)]
    for spec in chosen:
        parse_attack(spec)
    if twice := [spec for spec in chosen if chosen.count(spec) > 1]:
        raise ConfigError(f"the attack {twice[0]!r} is listed twice; write it once")
    return chosen


def _limited(spec: str, iterations: int | None) -> str:
    """Return a bare name with a limit on its iterations, if it has that option and more of them by default."""
    own = {f.name: f.default for f in fields(ATTACKS[spec])} if spec in ATTACKS else {}
    if iterations is None or own.get("iterations", 0) <= iterations:
        return spec
    return f"{spec}(iterations={iterations})"
