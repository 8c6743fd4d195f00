"""One private batch and one attack on its shared gradient: run it, and score it or say why it cannot run."""

from collections.abc import Callable, Sequence
from dataclasses import asdict

from torch import Tensor

from lmleak.adapters.text import TextAdapter
from lmleak.attacks import Attack
from lmleak.defenses import derived_seed
from lmleak.errors import UnsupportedCombinationError
from lmleak.gradients import SharedGradient
from lmleak.metrics import TextScore, score_text
from lmleak.types import Reconstruction, TextBatch

ATTACK_STREAM, MASK_STREAM, DROPOUT_STREAM = 1, 2, 3
"""Random streams of one example that must not be computable from one another."""


def seeded_batch(
    adapter: TextAdapter,
    texts: Sequence[str],
    labels: Sequence[int] | None,
    *,
    max_length: int | None,
    seed: int,
    padding_side: str = "right",
) -> TextBatch:
    """Return the private batch of some texts; for masked models the seed chooses the masked positions."""
    masks = derived_seed(seed, MASK_STREAM) % 2**31
    return adapter.batch(texts, labels, max_length=max_length, padding_side=padding_side, seed=masks)


def scored_attack(
    attack: Attack,
    adapter: TextAdapter,
    shared: SharedGradient,
    batch: TextBatch,
    *,
    seed: int,
    more: Callable[[Reconstruction, TextScore], dict] = lambda *_: {},
    true_inputs: Sequence[Tensor] | None = None,
) -> dict:
    """Run one attack on what was shared and score it against the truth.

    Args:
        attack: The attack.
        adapter: The model.
        shared: What the server received.
        batch: The truth.
        seed: The batch's seed; the attack gets one hashed from it, from which that of the noise cannot be computed.
        more: Returns what else is wanted of the reconstruction and its score.
        true_inputs: Per text (T_i, D), for errors of recovered embeddings; None leaves them out.

    Returns:
        ``{"refused": reason}`` if the combination is impossible. Else the mean scores of ``score_text``, what ``more``
        adds, the attack's cost, why it stopped and its notes.
    """
    try:
        recovered = attack.run(adapter, shared, seed=derived_seed(seed, ATTACK_STREAM))
    except UnsupportedCombinationError as error:
        return {"refused": str(error)}
    score = score_text(recovered, batch, true_inputs)
    means = score.to_dict()
    del means["per_example"]
    return (
        means
        | more(recovered, score)
        | asdict(recovered.cost)
        | {"stopped": recovered.stopped, "notes": list(recovered.notes)}
    )
