r"""Targets read off the gradient of the output head: class labels, and the tokens a language model was asked for.

With p the predicted probabilities, y the one-hot targets, h the head's inputs and N targets in the batch,

    db = (1/N) sum_t (p_t - y_t),        dW = (1/N) sum_t (p_t - y_t) h_t^T.

Probabilities are positive, so db_v < 0 only if v is a target. A head without a bias tells the same through any u with
h_t . u = 1 for all t, since dW u = db then. Such a u exists behind a LayerNorm h = g x + s (elementwise; x of zero
mean): u = (1/g) / sum(s/g), unless s = 0. In general u is fitted to hidden states of the attacker's own texts, and the
spread of h . u over others of them says how far it can be trusted.
"""

from dataclasses import dataclass
from math import ceil, floor

import torch
from torch import Tensor

from lmleak.adapters.examples import draw_tokens, token_template
from lmleak.gradients.readout_bag import token_bag
from lmleak.gradients.readout_rank import Released

GUESSES = 64
"""Random texts over which predicted class probabilities are averaged, at least."""
LENGTH = 8
"""Tokens of a random text where lengths are unknown."""
TOLERANCE = 1e-4
"""Distance from an integer, or from 1, that rounding may leave."""
STATES_PER_DIMENSION = 6
"""Hidden states that u is fitted to, per unknown; a third as many test it."""
OUTLIER = 4.5
"""Robust standard deviations below the median from which an entry counts as negative, where its sign does not tell."""


@dataclass(frozen=True)
class ClassLabels:
    """How many texts have each label. Which text has which does not show."""

    counts: Tensor | None
    """(C,) integers that sum to B; None if the gradient does not tell."""
    least: Tensor | None
    """(C,) lower bounds that hold whatever the texts are (clean gradient); None where no bias is released."""
    most: Tensor | None
    """(C,) upper bounds, likewise."""
    exact: bool
    """Whether the counts follow from the gradient; otherwise the model's mean prediction was guessed."""
    reason: str
    """Where it was read, or why it cannot be."""


@dataclass(frozen=True)
class TargetTokens:
    """The tokens that a language model was asked to predict, without multiplicities."""

    ids: Tensor | None
    """(n,) token ids, surest first; None if the gradient does not tell."""
    scores: Tensor | None
    """(n,) minus the entry of the (reconstructed) bias gradient: n_v / N - mean p_v."""
    exact: bool
    """Whether every id is certainly a target. Targets that the model predicts more than they occur are missed."""
    reason: str
    """How it was read, or why it cannot be."""


def class_labels(adapter, observation: Released, *, seed: int = 0) -> ClassLabels:
    """Return the label counts of a classification batch.

    One text (iDLG, Zhao et al. 2020, arXiv:2001.02610, eq. 4-5): the label is the most negative entry of db; without a
    bias the row of dW of largest norm, because |p_y - 1| = sum_{k != y} p_k. (iDLG compares the signs of rows, which
    assumes h >= 0; a tanh pooler has no sign.) Several texts: count_k / B = mean p_k - db_k, 0 <= mean p_k <= 1:

        ceil(-B db_k) <= count_k <= floor(B (1 - db_k)),

    and within these bounds the counts are estimated with the mean prediction over random texts.
    Void without the head's gradient, for two classes without a bias, and for several texts without a bias; under noise
    the counts are estimates and the bounds do not hold.

    Args:
        adapter: The model.
        observation: The released gradient.
        seed: Draws the random texts.

    Returns:
        The counts.
    """
    if observation.task != "sequence-classification":
        return ClassLabels(None, None, None, False, f"task {observation.task!r} has no class labels")
    classes, size = adapter.config.num_labels, observation.batch_size
    head = {n: observation.gradient[n] for n in adapter.roles().get("head", ()) if n in observation.gradient}
    bias = next((n for n in reversed(head) if head[n].shape == (classes,)), None)
    weight = next((n for n in reversed(head) if head[n].dim() == 2 and head[n].shape[0] == classes), None)
    one_step = observation.aggregation.steps == 1
    if size == 1 and (bias or (weight and classes > 2)):
        label = head[bias].argmin() if bias else head[weight].norm(dim=1).argmax()
        counts = torch.bincount(label[None], minlength=classes)
        return ClassLabels(counts, counts, counts, one_step, f"read off {bias or weight!r}")
    if bias is None:
        return ClassLabels(None, None, None, False, "no gradient of the classifier head that decides is released")
    slope = size * head[bias].double().cpu()
    least = torch.tensor([max(0, ceil(-s - TOLERANCE)) for s in slope.tolist()])
    most = torch.tensor([min(size, floor(size - s + TOLERANCE)) for s in slope.tolist()])
    values = (size * _mean_probabilities(adapter, observation, seed) - slope).clamp(least, torch.maximum(least, most))
    counts = round_to_sum(values, size)
    exact = one_step and bool((least.sum() == size) | (most.sum() == size))
    reason = f"read off {bias!r}" + ("" if exact else ", with the model's mean prediction guessed from random texts")
    return ClassLabels(counts, least, most, exact, reason)


def round_to_sum(values: Tensor, total: int) -> Tensor:
    """Return non-negative integers nearest to the values that sum to ``total`` (largest remainders).

    Args:
        values: (C,) any numbers.
        total: Their sum.

    Returns:
        (C,) integers.
    """
    values = values.clamp(min=0)
    values = values * (total / values.sum()) if values.sum() > 0 else torch.full_like(values, total / len(values))
    floors = (values + 1e-9).floor()
    missing = total - int(floors.sum())
    floors[(values - floors).topk(missing).indices] += 1
    return floors.long()


def next_tokens(adapter, observation: Released, *, seed: int = 0) -> TargetTokens:
    """Return the tokens that a language model was asked to predict.

    With the head's bias released, or a u of no spread, every negative entry of a clean gradient is a target (exact).
    Otherwise entries that fall far below the others are returned (exact=False). Void without the head's gradient. In a
    tied table that was looked up, rows of inputs hold more than the head's part and are left out (their tokens are
    known as inputs); what remains are targets that were no inputs, such as last tokens.

    Args:
        adapter: The model.
        observation: The released gradient.
        seed: Draws the texts that u is fitted to.

    Returns:
        The targets.
    """
    if observation.task not in ("causal-lm", "masked-lm"):
        return TargetTokens(None, None, False, f"task {observation.task!r} has no token targets")
    head = adapter.model.get_output_embeddings()
    if head is None:
        return TargetTokens(None, None, False, f"{adapter.name} names no output head")
    names = {id(p): n for n, p in adapter.model.named_parameters()}
    bias = names.get(id(getattr(head, "bias", None)))
    if bias in observation.gradient:
        return _negative(observation.gradient[bias].double(), 0.0, f"read off {bias!r}")
    weight = names.get(id(head.weight))
    if weight not in observation.gradient:
        return TargetTokens(None, None, False, "the output head's gradient is not released")
    direction, spread = constant_direction(adapter, head, seed=seed)
    values = observation.gradient[weight].double() @ direction.to(observation.gradient[weight].device)
    how = f"read off {weight!r} along u, where h.u = 1 up to {spread:.1e}"
    if not (adapter.lookup_table_is_tied() and adapter.select(observation.shared).through_lookup):
        return _negative(values, spread, how)
    bag = token_bag(adapter, observation)
    if bag.ids is None:
        return TargetTokens(
            None, None, False, f"the head's table is the word table, and its looked-up rows: {bag.reason}"
        )
    kept = torch.ones(len(values), dtype=torch.bool, device=values.device)
    kept[bag.ids] = False
    read = _negative(values[kept], spread, f"{how}; inputs are left out", sums_to_zero=False)
    return TargetTokens(kept.nonzero()[:, 0][read.ids], read.scores, read.exact and bag.exact, read.reason)


def _negative(values: Tensor, spread: float, how: str, *, sums_to_zero: bool = True) -> TargetTokens:
    """Return the negative entries of a bias gradient: by sign where that is certain, by distance elsewhere.

    Entries of a clean one sum to zero, most of them are positive, and u must be as good as exact.
    """
    noisy = (values < 0).double().mean() > 0.4 or (
        sums_to_zero and values.sum().abs() > TOLERANCE * values.abs().sum()
    )
    certain = not noisy and spread < TOLERANCE
    deviation = 1.4826 * (values - values.median()).abs().median()
    # A sum of positive terms is above minus its rounding; u magnifies that, and its spread bounds the factor.
    limit = -TOLERANCE * values.abs().max() if certain else values.median() - OUTLIER * deviation
    index = (values < min(0.0, float(limit))).nonzero()[:, 0]
    index = index[values[index].argsort(stable=True)]
    reason = f"{how}; {'negative entries' if certain else 'entries far below the others, by distance not by sign'}"
    return TargetTokens(index, -values[index], bool(certain), reason)


@torch.no_grad()
def constant_direction(adapter, head, *, seed: int) -> tuple[Tensor, float]:
    """Return u (d,) with h . u near 1 for the head's inputs h, and its standard deviation over unseen ones.

    Least squares over hidden states of random texts, in float64.

    Args:
        adapter: The model.
        head: Its output head.
        seed: Draws the texts.

    Returns:
        The direction and the spread.
    """
    needed = 4 * STATES_PER_DIMENSION * head.weight.shape[1] // 3
    limit = adapter.max_positions()
    length = 16 if limit is None else min(16, limit)
    generator = torch.Generator().manual_seed(seed)
    states: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda module, arguments: states.append(arguments[0].double()))
    try:
        for _ in range(ceil(needed / (16 * length))):
            ids = draw_tokens(adapter, 16, length, generator)
            adapter.logits(adapter.embed(ids), _layout(adapter, torch.ones_like(ids)))
    finally:
        handle.remove()
    rows = torch.cat([s.flatten(0, -2) for s in states])
    fitted, unseen = rows[: 3 * len(rows) // 4], rows[3 * len(rows) // 4 :]
    u = torch.linalg.lstsq(fitted, torch.ones_like(fitted[:, :1])).solution[:, 0]
    return u, (unseen @ u - 1).square().mean().sqrt().item()


def _mean_probabilities(adapter, observation: Released, seed: int) -> Tensor:
    """Return the model's class probabilities (C,), averaged over random texts between the public special tokens."""
    generator = torch.Generator().manual_seed(seed)
    prefix, suffix = (torch.tensor(part, dtype=torch.long) for part in token_template(adapter))
    layout = observation.layout or {}
    lengths = layout["attention_mask"].sum(-1).tolist() if layout else [LENGTH] * observation.batch_size
    predicted = []
    with torch.no_grad():
        for length in lengths * max(1, GUESSES // len(lengths)):
            words = draw_tokens(adapter, 1, max(1, length - len(prefix) - len(suffix)), generator)[0]
            ids = torch.cat([prefix, words, suffix])[None]
            predicted.append(adapter.logits(adapter.embed(ids), _layout(adapter, torch.ones_like(ids))).softmax(-1))
    return torch.cat(predicted).mean(0).double().cpu()


def _layout(adapter, mask: Tensor) -> dict[str, Tensor]:
    layout = {"attention_mask": mask.to(adapter.device)}
    if getattr(adapter.config, "type_vocab_size", 0):
        layout["token_type_ids"] = torch.zeros_like(layout["attention_mask"])
    return layout
