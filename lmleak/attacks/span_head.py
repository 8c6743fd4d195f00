"""What the output head's own gradient adds to the prefix tree: last tokens, endings and multiplicities, exactly.

The head is a linear map too, and its inputs h_t are known once the prefixes t are: dL/dW = C^T H over all distinct
prefixes. C follows by least squares while the prefixes are fewer than the width, and cross-entropy makes it speak:

    causal LM:       c_tv = (m_t p_tv - n_tv) / N      m_t texts hold prefix t and go on, n_tv of them with token v
    classification:  c_tk = (m_t p_tk - n_tk) / B      m_t texts are exactly t, n_tk of them of class k

p is the model's own prediction, so the counts can be solved for, and they must come out as integers, which is the
check. The last token of a causal LM is found only here: it is a target, never an input that reaches the loss.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lmleak.attacks.span_layers import forward, head_gradient
from lmleak.attacks.span_tree import Prefix
from lmleak.types import Observation

ROUNDING = 0.15
"""Largest accepted distance of a count from an integer."""
UNEXPLAINED = 1e-3
"""Largest accepted share of a head-gradient row outside the span of the prefixes' hidden states."""
LARGEST = 64
"""Most probable tokens that m_t is estimated from, or 4 B: the median of c / p, since at most B are targets."""
ROWS = 2**12
"""Rows of the head's gradient per pass."""
LEAVES = 8
"""Texts per forward pass."""


@dataclass(frozen=True)
class Ending:
    """One text of the batch."""

    prefix: Prefix
    last: int | None
    """The token after the prefix, read from the head; None where the text is the prefix, or its last token unknown."""
    certainty: float
    """1 where the counts are integers, 0 where they are half-way between two."""


class Unreadable(Exception):
    """Why the head's gradient cannot be read: a reason to report, not a failure."""


def read_head(adapter, observation: Observation, prefixes: list[Prefix]) -> list[Ending]:
    """Return the texts of the batch, one entry each, duplicates included.

    Args:
        adapter: The model.
        observation: The released gradient.
        prefixes: All prefixes of the tree, ancestors before descendants.

    Returns:
        ``observation.batch_size`` texts.

    Raises:
        Unreadable: With the reason.
    """
    path, gradient = head_gradient(adapter, observation.gradient)
    if gradient is None:
        raise Unreadable("the output head's gradient is not released")
    if len(prefixes) >= gradient.shape[1]:
        raise Unreadable(f"{len(prefixes)} distinct prefixes are not fewer than the hidden size {gradient.shape[1]}")
    hidden, logits = _states(adapter, path, prefixes)
    coefficients, explained = head_coefficients(gradient, hidden)
    probabilities = logits.softmax(-1)
    if adapter.task == "causal-lm":
        also_looked_up = adapter.lookup_table_is_tied() and _has_looked_up_rows(adapter, observation)
        if observation.aggregation.clients > 1:
            if also_looked_up or not explained.all():
                raise Unreadable("the recovered prefixes do not explain the head's gradient of several clients")
            return _read_weighted_targets(prefixes, coefficients, probabilities, observation.batch_size)
        return _read_targets(prefixes, coefficients, probabilities, explained, observation.batch_size, also_looked_up)
    if not explained.all():
        raise Unreadable("the recovered prefixes do not explain the head's gradient")
    return read_classes(prefixes, coefficients.double(), probabilities.double(), observation.batch_size)


def _has_looked_up_rows(adapter, observation: Observation) -> bool:
    return adapter.select(observation.shared).through_lookup


def _states(adapter, path: str, prefixes: list[Prefix]) -> tuple[Tensor, Tensor]:
    """Return the head's input (K, d) and output (K, classes) after every prefix."""
    continued = {prefix[:-1] for prefix in prefixes}
    leaves = sorted((prefix for prefix in prefixes if prefix not in continued), key=len)
    known: dict[Prefix, tuple[Tensor, Tensor]] = {}
    calls: list[tuple[Tensor, Tensor]] = []
    hook = adapter.model.get_submodule(path).register_forward_hook(
        lambda module, arguments, output: calls.append((arguments[0], output))
    )
    try:
        for start in range(0, len(leaves), LEAVES):
            chunk = leaves[start : start + LEAVES]
            longest = len(chunk[-1])
            # In a causal model what follows a prefix does not change it, so any token fills up the shorter ones.
            ids = torch.tensor([leaf + leaf[-1:] * (longest - len(leaf)) for leaf in chunk], device=adapter.device)
            forward(adapter, ids)
            states, outputs = (tensor.reshape(*ids.shape, -1) for tensor in calls.pop())
            for row, leaf in enumerate(chunk):
                known |= {leaf[: t + 1]: (states[row, t], outputs[row, t]) for t in range(len(leaf))}
    finally:
        hook.remove()
    return tuple(torch.stack(column) for column in zip(*(known[p] for p in prefixes), strict=True))


def head_coefficients(gradient: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Solve gradient = C^T H for C, (K, classes); and say which rows of the gradient H explains."""
    q, r = torch.linalg.qr(hidden.double().T)  # (d, K), (K, K)
    diagonal = r.diagonal().abs()
    if diagonal.min() < 1e3 * torch.finfo(hidden.dtype).eps * diagonal.max():
        raise Unreadable("hidden states of the recovered prefixes are linearly dependent")
    c, outside, norms = hidden.new_empty(len(hidden), len(gradient)), [], []
    for start in range(0, len(gradient), ROWS):
        rows = gradient[start : start + ROWS].double()
        inside = rows @ q
        c[:, start : start + ROWS] = torch.linalg.solve_triangular(r, inside.T, upper=True)  # no copy in float64
        norms.append(rows.norm(dim=1))
        outside.append(norms[-1].square() - inside.norm(dim=1).square())
    norms = torch.cat(norms)
    explained = torch.cat(outside).clamp(min=0).sqrt() <= UNEXPLAINED * norms + 1e-6 * norms.max()
    return c, explained


def _read_targets(
    prefixes: list[Prefix], c: Tensor, p: Tensor, explained: Tensor, batch_size: int, also_looked_up: bool
) -> list[Ending]:
    """Read the next tokens of every prefix (causal LM).

    A tied table shared whole also holds the gradient of its looked-up rows. Those rows cannot be read; what they
    hide follows from the counts of the others.

    Args:
        prefixes: The K distinct prefixes.
        c: (K, V) coefficients.
        p: (K, V) the model's predictions.
        explained: (V,) whether a row of the gradient lies in the span of the hidden states.
        batch_size: B.
        also_looked_up: Whether rows of input tokens hold more than the head's part.

    Returns:
        B texts.

    Raises:
        Unreadable: If the counts are no integers, or do not fit the tree.
    """
    readable = explained.clone()
    if also_looked_up:
        readable[torch.tensor(sorted({t for prefix in prefixes for t in prefix}), device=readable.device)] = False
    if not explained[readable].all() or (not also_looked_up and not explained.all()):
        raise Unreadable("the recovered prefixes do not explain the head's gradient")
    going_on = _going_on(c, p.masked_fill(~readable, 0.0), batch_size, int(readable.sum()))  # m / N
    roots = torch.tensor([len(prefix) == 1 for prefix in prefixes], device=c.device)
    positions = batch_size / going_on[roots].sum()  # N, since every text goes on after its first token
    if not 0 < positions < float("inf"):
        raise Unreadable("the counts read from the head's gradient are not positive")
    m, off_m = _integers(positions * going_on)
    following = _targets(positions, going_on, c, p, readable)
    index = {prefix: k for k, prefix in enumerate(prefixes)}
    endings = []
    for k, prefix in enumerate(prefixes):
        hidden_children = 0
        for token in (~readable).nonzero()[:, 0].tolist() if also_looked_up else ():
            child = index.get((*prefix, token))
            hidden_children += int(m[child]) if child is not None else 0
        for token, count, off in following[k]:
            child = index.get((*prefix, token))
            ended = count - (int(m[child]) if child is not None else 0)
            if ended < 0:
                raise Unreadable("the counts read from the head's gradient contradict the tree")
            endings += ended * [Ending(prefix, token, 1 - 2 * max(off, off_m[k].item()))]
        unknown = int(m[k]) - sum(count for _, count, _ in following[k]) - hidden_children
        if unknown < 0 or (unknown and not also_looked_up):
            raise Unreadable("the counts read from the head's gradient contradict each other")
        endings += unknown * [Ending(prefix, None, 1 - 2 * off_m[k].item())]
    if len(endings) != batch_size:
        raise Unreadable(f"the head's gradient tells of {len(endings)} texts instead of {batch_size}")
    return endings


def _read_weighted_targets(prefixes: list[Prefix], c: Tensor, p: Tensor, batch_size: int) -> list[Ending]:
    """Read the next tokens of every prefix where texts have unequal weights (several clients, each a mean of its own).

    A text of client j weighs 1 / (clients N_j) and N_j is unknown, so weights are read, not counts: w_tv that of the
    texts with token v after prefix t. What does not go on from there ends. A text that two clients hold, or one
    client twice, cannot be told from a heavier one, and the batch then comes out too small.

    Args:
        prefixes: The K distinct prefixes.
        c: (K, V) coefficients.
        p: (K, V) the model's predictions.
        batch_size: B.

    Returns:
        B texts.

    Raises:
        Unreadable: If a weight is between none and a text's, or the texts are not B.
    """
    going_on = _going_on(c, p, batch_size, p.shape[1])
    lightest = going_on.min().item()
    if not lightest > 0:
        raise Unreadable("the weights read from the head's gradient are not positive")
    index = {prefix: k for k, prefix in enumerate(prefixes)}
    endings, worst = [], 0.0
    for k, prefix in enumerate(prefixes):
        ended = going_on[k] * p[k].double() - c[k].double()  # (V,)
        for token in (ended > ROUNDING * lightest).nonzero()[:, 0].tolist():
            child = index.get((*prefix, token))
            ended[token] -= going_on[child] if child is not None else 0.0
        here = (ended > (1 - ROUNDING) * lightest).nonzero()[:, 0]
        endings += [(prefix, token) for token in here.tolist()]
        ended[here] = 0.0
        worst = max(worst, ended.abs().max().item() / lightest)
    if worst > ROUNDING:
        raise Unreadable(f"weights read from the head's gradient are {worst:.2f} of a text's away from none")
    if len(endings) != batch_size:
        raise Unreadable(f"the head's gradient tells of {len(endings)} distinct texts instead of {batch_size}")
    return [Ending(prefix, token, 1 - 2 * worst) for prefix, token in endings]


def _going_on(c: Tensor, p: Tensor, batch_size: int, usable: int) -> Tensor:
    """Return the weight of the texts that go on after every prefix, (K,): c = weight x p but for at most B targets."""
    largest = p.topk(min(max(LARGEST, 4 * batch_size), usable), dim=1)
    ratios = c.gather(1, largest.indices).double() / largest.values.double().clamp(min=1e-12)
    return ratios.median(dim=1).values


def _targets(
    positions: Tensor, going_on: Tensor, c: Tensor, p: Tensor, readable: Tensor
) -> list[list[tuple[int, int, float]]]:
    """Return per prefix the tokens that follow it, how often, and how far that count was from an integer."""
    following = []
    for k in range(len(c)):  # row by row: prefixes x vocabulary is the largest thing here
        n, off = _integers((positions * (going_on[k] * p[k].double() - c[k].double())).masked_fill(~readable, 0.0))
        tokens = n.nonzero()[:, 0]
        following.append(list(zip(tokens.tolist(), n[tokens].tolist(), off[tokens].tolist(), strict=True)))
    return following


def read_classes(prefixes: list[Prefix], c: Tensor, p: Tensor, batch_size: int) -> list[Ending]:
    """Read which prefixes are whole texts (classification): the m that makes all class counts integers."""
    m = torch.arange(batch_size + 1, device=c.device, dtype=c.dtype)
    counts = m[:, None, None] * p - batch_size * c  # (B + 1, K, classes)
    off = (counts - counts.round()).abs().amax(-1) + F.relu(-counts.round()).amax(-1)
    best = (off + 1e-6 * m[:, None]).argmin(0)  # of two that fit equally well, the smaller
    off = off.gather(0, best[None])[0]
    if off.max() > ROUNDING:
        raise Unreadable(f"class counts read from the head's gradient are {off.max():.2f} away from integers")
    endings = []
    for k, prefix in enumerate(prefixes):
        endings += int(best[k]) * [Ending(prefix, None, 1 - 2 * off[k].item())]
    if len(endings) != batch_size:
        raise Unreadable(f"the head's gradient tells of {len(endings)} texts instead of {batch_size}")
    return endings


def _integers(values: Tensor) -> tuple[Tensor, Tensor]:
    """Round counts to integers and say how far they were."""
    rounded = values.round()
    off = (values - rounded).abs()
    if off.max() > ROUNDING or rounded.min() < 0:
        raise Unreadable(f"counts read from the head's gradient are {off.max():.2f} away from integers")
    return rounded.long(), off
