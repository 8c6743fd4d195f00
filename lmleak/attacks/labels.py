"""Class labels for a matching attack that is not given them: read off the head's gradient, or where to start.

The readout (iDLG's rule for one text, counts for several) is :func:`lmleak.gradients.readout.class_labels`. Which
label belongs to which text is not visible there; it matters if lengths differ, or over local steps.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lmleak.attacks.relaxed_text import RelaxedText
from lmleak.gradients.readout import class_labels

SMOOTHING = 0.5  # added to the counts, so that no class is excluded


@dataclass(frozen=True)
class LabelGuess:
    """What the head's gradient says about the labels."""

    labels: Tensor | None
    """(B,) the labels, in an order that fits if texts are alike in length; None if undecided."""
    counts: Tensor | None
    """(C,) how many texts have each label; None if undecided."""
    source: str
    """Where it was read, for people."""


def infer_labels(text: RelaxedText, seed: int) -> LabelGuess:
    """Return what the gradient of the classifier head tells about the class labels.

    Args:
        text: The relaxed text of the observation.
        seed: Draws the texts over which the model's own probabilities are averaged.

    Returns:
        Labels, or counts, or neither.
    """
    observation = text.observation
    found = class_labels(text.adapter, observation, seed=seed)
    if found.counts is None:
        return LabelGuess(None, None, found.reason)
    counts = found.counts.to(text.adapter.device)
    lengths, aggregation = text.real.sum(-1), observation.aggregation
    alike = bool((lengths == lengths[0]).all()) and aggregation.clients == aggregation.steps == 1
    order_is_free = alike or int(counts.max()) == observation.batch_size
    labels = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    return LabelGuess(labels if order_is_free else None, counts, found.reason)


def start_of_labels(guess: LabelGuess, text: RelaxedText) -> Tensor:
    """Return the (B, C) logits at which unknown labels start: the log-proportions of the classes.

    Args:
        guess: What the head told.
        text: The relaxed text of the observation.

    Returns:
        Equal rows; zeros where nothing is known.
    """
    size, classes = text.observation.batch_size, text.adapter.config.num_labels
    counts = torch.zeros(classes) if guess.counts is None else guess.counts
    return (counts.to(text.table) + SMOOTHING).log().expand(size, classes)
