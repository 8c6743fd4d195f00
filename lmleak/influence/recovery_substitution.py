"""What replacing a token really does to the gradient, without linearising: one gradient per candidate.

Delta_tv = g(text with token t replaced by v) - g(text), targets following the text. Under noise sigma n the log
likelihood of a text k = (k_1 ... k_N) is -||sum_t Delta_t,k_t - sigma n||^2 / (2 sigma^2) if replacements add up:
exact for one replacement, an approximation for several. An attacker who knows the vocabulary maximises it.

Gradients are kept as count sketches (Charikar, Chen and Farach-Colton 2002): every coordinate is added with a random
sign to one of m buckets. Inner products are unbiased, squared norms err by about sqrt(2 / m) relatively, unless few
coordinates dominate; white noise stays white. Memory is m numbers per candidate instead of P.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lmleak.adapters.base import ModelAdapter
from lmleak.adapters.targets import causal_targets
from lmleak.types import Batch

SWEEPS = 20  # of coordinate ascent
CHUNK = 16  # gradients computed at once


class Sketch:
    """A random linear map from gradients to R^m that keeps inner products on average.

    Args:
        parameters: The parameters whose gradient is sketched.
        size: m.
        generator: Source of buckets and signs.
    """

    def __init__(self, parameters: dict[str, Tensor], size: int, generator: torch.Generator):
        self.size = size
        self.buckets, self.signs = {}, {}
        for name, p in parameters.items():
            buckets = torch.randint(size, (p.numel(),), generator=generator)
            signs = torch.randint(2, (p.numel(),), generator=generator) * 2 - 1
            self.buckets[name], self.signs[name] = buckets.to(p.device), signs.to(p)

    def __call__(self, gradients: dict[str, Tensor]) -> Tensor:
        """Return the sketches (K, m) of K gradients, each tensor (K, *shape)."""
        first = next(iter(gradients.values()))
        sketch = first.new_zeros(len(first), self.size)
        for name, value in gradients.items():
            sketch.index_add_(1, self.buckets[name], value.reshape(len(value), -1) * self.signs[name])
        return sketch


def text_gradients(adapter: ModelAdapter, batch: Batch, ids: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Return the gradients that a client would send for other texts of the same layout.

    Args:
        adapter: The model, a text adapter.
        batch: Gives layout and class labels.
        ids: (K, B, T) token ids of K batches.
        names: Parameters whose gradient is wanted.

    Returns:
        One tensor (K, *shape) per name.
    """
    theta = {name: adapter.parameters()[name] for name in names}
    follows = adapter.task == "causal-lm"  # the targets are the text
    mask = batch.layout["attention_mask"]
    targets = torch.stack([causal_targets(i, mask) for i in ids]) if follows else batch.targets

    def gradient(x, y):
        return torch.func.grad(lambda parameters: adapter.loss(x, y, batch.layout, parameters))(theta)

    return torch.func.vmap(gradient, in_dims=(0, 0 if follows else None))(adapter.embed(ids), targets)


@dataclass(frozen=True)
class SubstitutionTable:
    """The effect of every candidate at every position."""

    changes: Tensor
    """(N, C, m) sketches of Delta, float32; the true token's is zero."""
    candidates: Tensor
    """(N, C) token ids; the true token comes first."""
    gradients: int
    """Gradients spent."""


def substitution_table(
    adapter: ModelAdapter,
    batch: Batch,
    positions: list[tuple[int, int]],
    candidates: Tensor,
    names: tuple[str, ...],
    *,
    size: int,
    generator: torch.Generator,
) -> SubstitutionTable:
    """Compute the effect of every candidate at every position.

    Args:
        adapter: The model.
        batch: The private batch.
        positions: (text, position) of each of the N tokens.
        candidates: (N, C) token ids, the true token first.
        names: Shared parameters.
        size: Length m of a sketch.
        generator: Source of the sketch's randomness.

    Returns:
        The table.
    """
    ids = batch.inputs["input_ids"]
    sketch = Sketch({n: adapter.parameters()[n] for n in names}, size, generator)
    rows = []
    for (text, position), tokens in zip(positions, candidates, strict=True):
        texts = ids.repeat(len(tokens), 1, 1)
        texts[:, text, position] = tokens.to(ids)
        parts = [sketch(text_gradients(adapter, batch, chunk, names)) for chunk in texts.split(CHUNK)]
        effects = torch.cat(parts)
        rows.append((effects - effects[0]).float().cpu())
    return SubstitutionTable(torch.stack(rows), candidates.cpu(), candidates.numel())


def substitution_hits(
    table: SubstitutionTable, noise_std: float, draws: int, generator: torch.Generator, *, others_known: bool
) -> Tensor:
    """The attacker who maximises the likelihood over replaced tokens, started at the truth.

    Coordinate ascent: each position in turn takes its best candidate while the others stay, until nothing moves. It
    ends in a local optimum near the truth, so it bounds from above what an attacker without that start finds.

    Args:
        table: Effects of the replacements.
        noise_std: sigma.
        draws: Number of noise draws.
        generator: Source of the noise.
        others_known: Judge every position with all others at the truth: no replacements have to add up.

    Returns:
        Hits (draws, N), Boolean.
    """
    changes = table.changes
    noise = torch.randn(draws, changes.shape[-1], generator=generator) * noise_std
    gain = torch.einsum("tcm,km->ktc", changes, noise) - changes.square().sum(-1) / 2  # sigma^2 log likelihood ratio
    if others_known:
        return _first_best(gain, generator) == 0
    state = torch.zeros(draws, len(changes), dtype=torch.long)
    total = torch.zeros_like(noise)  # sum_t Delta_t,k_t
    for _ in range(SWEEPS):
        before = state.clone()
        for t, change in enumerate(changes):
            rest = total - change[state[:, t]]
            state[:, t] = _first_best(gain[:, t] - rest @ change.T, generator)
            total = rest + change[state[:, t]]
        if torch.equal(state, before):
            break
    return state == 0


def _first_best(score: Tensor, generator: torch.Generator) -> Tensor:
    """Return the index of the best score; where others tie with the truth (index 0), it is drawn by lot."""
    best = score.argmax(-1)
    ties = (score == score[..., :1]).sum(-1)
    truth_is_best = score[..., 0] >= score.amax(-1)
    loses = torch.rand(ties.shape, generator=generator) * ties >= 1
    last = score.shape[-1] - 1 - (score == score[..., :1]).flip(-1).long().argmax(-1)
    return torch.where(truth_is_best, torch.where(loses, last, 0), best)
