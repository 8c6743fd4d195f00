"""How likely a token is in a batch, by a noisy gradient: a soft row space and scores calibrated on the vocabulary.

A linear map's gradient is G = D^T X + E, with X the inputs of all tokens of the batch and E noise: added on purpose,
or the rounding of bfloat16, int8 or float32. Three steps, none of which is told what the noise was:

1. Every row of G is divided by its noise level, read off the trailing spectrum (:func:`noise_of_rows`).
   The spectrum is then signal above a bulk of unit noise, whose scale random-matrix theory gives.
2. The energy of an input h in that space is e(h) = sum_k w_k (v_k^T h)^2 / ||h||^2, with soft weights w_k.
3. log(e / (1 - e)) of all tokens of the vocabulary is the null distribution of any one of them, since nearly none is
in
   the batch (:class:`Null`). Its negative log tail probability, the *surprise* in nats, is comparable between
   positions, layers and sites, and adds up (Fisher's method).
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from lmleak.adapters.base import ModelAdapter
from lmleak.attacks.span_filter import CHUNK, FirstLayerFilter
from lmleak.attacks.span_layers import forward
from lmleak.attacks.span_subspace import RowSpace
from lmleak.errors import UnsupportedCombinationError
from lmleak.gradients.readout_rank import TINY

RIDGE = 0.2
"""Penalty in units of the noise in a fixed direction; 0.1 to 1 find about the same tokens."""
EDGE = 1.02
"""A singular value is signal above this multiple of the bulk edge, which finite matrices of noise exceed a little."""
SWEEPS = 3
"""Row scalings: the spectrum tells the rows' noise, and rows of equal noise give a better spectrum."""
QUIET = 1e-6
"""Rows are not scaled up beyond the noise level of the loudest divided by this: they are zero."""
TAIL = (0.75, 0.90)
"""Quantiles of the null distribution that its tail is extrapolated from. Few tokens of a vocabulary are in a batch,
but in a small vocabulary, or without positions, some percent are: they must not reach the upper one."""
LOGIT_RANGE = 1e-12
"""Energies are kept this far from 0 and 1."""


@dataclass(frozen=True)
class SoftRowSpace:
    """All directions that a gradient has rows in, each with the weight of its evidence."""

    basis: Tensor
    """(d, n) float64: right singular vectors v_1..v_n of the gradient with rows of equal noise, orthonormal."""
    weight: Tensor
    """(n,) w_k in (0, 1): near 1 for a direction far above the noise."""
    rank: int
    """How many singular values exceed what noise alone would give; 0 if none does."""
    noise: float
    """Noise per coordinate in the gradient's unit; the geometric mean over its rows."""
    power: Tensor
    """(n,) s_k^2 / m: mean square of the rows along each direction, in units of the noise."""
    rows: int
    """m."""

    def energy(self, x: Tensor) -> Tensor:
        """Return sum_k w_k (v_k^T x)^2 / ||x||^2 over the last axis, in [0, 1], computed in float64."""
        x = x.double()
        inside = ((x @ self.basis).square() * self.weight).sum(-1)
        return inside / x.square().sum(-1).clamp(min=TINY)


def soft_row_space(rows: Tensor) -> SoftRowSpace:
    """Return the row space of a gradient as far as noise lets it be seen.

    With rows of unit noise, G = sum_k s_k u_k v_k^T of shape (m, d), the energy of h is what ridge regression of h on
    the rows explains, with a penalty of a share of the noise that a fixed direction of G holds, m:

        e(h) = max_c [||h||^2 - ||h - G^T c||^2 - lambda ||c||^2] / ||h||^2
             = sum_k w_k (v_k^T h)^2 / ||h||^2,      w_k = s_k^2 / (s_k^2 + lambda),      lambda = RIDGE m.

    1 - e is the reciprocal of Capon's minimum-variance spectrum for small lambda. Weak tokens whose direction is lost
    in the bulk of the spectrum still raise it, which a basis truncated at the bulk edge forgets: under noise of one
    RMS, the 16 B best tokens held 0.74 to 0.98 of the true ones after truncation, 0.93 to 1.00 like this (three
    models).

    Args:
        rows: (m, d) stacked weight gradients of maps that read one tensor.

    Returns:
        The soft row space.

    Raises:
        UnsupportedCombinationError: If the gradient is zero.
    """
    rows = rows.double()
    if not rows.any():
        raise UnsupportedCombinationError("the released gradient of these maps is zero, so its row space says nothing")
    m, d = rows.shape
    noise = noise_of_rows(rows)
    sigma, directions = _spectrum(rows / noise)
    rank, unit = _rank(sigma, m, d)
    squares = (sigma / unit).square()
    return SoftRowSpace(
        directions.T.contiguous(), squares / (squares + RIDGE * m), rank, unit * noise.log().mean().exp().item(),
        squares / m, m,
    )  # fmt: skip


def noise_of_rows(rows: Tensor) -> Tensor:
    """Return the noise per coordinate of every row, (m, 1), up to a common factor.

    It is the root mean square of the row outside the signal's right singular vectors (at most half of them). Where the
    levels scatter no more than such estimates do (noise added with one standard deviation), they are shrunk to their
    geometric mean, by the usual empirical-Bayes factor; rounding makes each row's noise proportional to the row.

    Args:
        rows: (m, d).

    Returns:
        (m, 1), positive.
    """
    half = min(rows.shape) // 2
    noise = torch.ones_like(rows[:, :1])
    for _ in range(SWEEPS):
        scaled = rows / noise
        sigma, directions = _spectrum(scaled)
        trailing = directions[min(half, _rank(sigma, *rows.shape)[0]) :]
        level = (scaled @ trailing.T).square().mean(dim=1, keepdim=True).sqrt()
        # Below rounding of the rows themselves there is no noise to be seen, and dividing by it would overflow.
        rounding = torch.finfo(rows.dtype).eps * scaled.square().mean().sqrt().item()
        noise = noise * level.clamp(min=max(QUIET * level.max().item(), rounding, TINY))
    logs = noise.log()
    by_chance = 1 / (2 * max(1, len(trailing)))  # variance of the log of such an estimate
    excess = (logs.var() - by_chance).clamp(min=0) if len(rows) > 1 else logs.new_zeros(())
    return (logs.mean() + excess / (excess + by_chance) * (logs - logs.mean())).exp()


def _spectrum(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the singular values and the right singular vectors as rows, min(m, d) of them."""
    if len(rows) > rows.shape[1]:
        rows = torch.linalg.qr(rows, mode="r").R
    _, sigma, directions = torch.linalg.svd(rows, full_matrices=False)
    return sigma, directions


def _rank(sigma: Tensor, m: int, d: int) -> tuple[int, float]:
    """Return how many singular values exceed the bulk edge, and the noise per coordinate, from the bulk's median."""
    rank, unit = 0, 1.0
    median, most = _bulk_median(m, d), max(1, len(sigma) - 2)
    while True:  # values above the edge are no part of the bulk: the rank only grows
        rounding = torch.finfo(sigma.dtype).eps * sigma[0].item()
        unit = max(sigma[rank:].median().item() / median, rounding, TINY)
        above = min(int((sigma > EDGE * unit * (math.sqrt(m) + math.sqrt(d))).sum()), most)
        if above <= rank:
            return rank, unit
        rank = above


def _bulk_median(m: int, d: int) -> float:
    """Return the median singular value of an (m, d) matrix of unit noise (Marchenko-Pastur law)."""
    few, many = sorted((m, d))
    ratio = few / many
    low, high = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2
    angle = torch.linspace(0, math.pi / 2, 20_001, dtype=torch.float64)[1:-1]
    x = low + (high - low) * angle.sin().square()
    mass = ((high - x) * (x - low)).sqrt() / x * angle.sin() * angle.cos()  # density times dx / d angle
    total = mass.cumsum(0)
    return math.sqrt(many * x[torch.searchsorted(total, total[-1] / 2)].item())


@dataclass(frozen=True)
class Null:
    """The distribution of log(e / (1 - e)) for inputs that were not in the batch, its upper tail taken as exponential.

    For random directions e has a Beta law, whose logit is near normal; vocabularies have heavier tails, and an
    exponential one fitted between the two quantiles ``TAIL`` errs on the careful side of a normal one.
    """

    upper: Tensor
    """The larger of the two quantiles."""
    slope: Tensor
    """Nats per unit beyond it."""

    @classmethod
    def fit(cls, energy: Tensor) -> "Null":
        """Return the null distributions along the first axis.

        Args:
            energy: (n, ...) energies, nearly all of inputs that were not in the batch.

        Returns:
            One distribution per remaining index.
        """
        lower, upper = torch.quantile(_logit(energy), energy.new_tensor(TAIL), dim=0)
        decay = math.log((1 - TAIL[0]) / (1 - TAIL[1]))
        return cls(upper, decay / (upper - lower).clamp(min=1e-6))

    def at(self, index: int) -> "Null":
        """Return one of the distributions."""
        return Null(self.upper[index], self.slope[index])

    def surprise(self, energy: Tensor) -> Tensor:
        """Return -log P(chance gives at least this energy) in nats; it goes on below 0 as a straight line."""
        return self.slope * (_logit(energy) - self.upper) - math.log(1 - TAIL[1])


def _logit(energy: Tensor) -> Tensor:
    return energy.logit(eps=LOGIT_RANGE)


def posterior(surprise: Tensor, count: float) -> Tensor:
    """Return the probability that each of several candidates is real, knowing about how many are.

    Two components: chance, whose density falls as exp(-surprise), and real tokens, whose surprise may be anything.
    Their odds are therefore kappa exp(surprise), and kappa follows from the number of real ones: the probabilities sum
    to it.

    Args:
        surprise: (n, ...) nats, candidates along the first axis.
        count: How many of them are real, less than n.

    Returns:
        Probabilities shaped like ``surprise``.
    """
    count = min(count, 0.999 * len(surprise))
    low, high = -surprise.amax(0) - 60, -surprise.amin(0) + 60
    for _ in range(60):  # bisection of log kappa: the sum rises with it
        middle = (low + high) / 2
        too_many = torch.sigmoid(surprise + middle).sum(0) > count
        low, high = torch.where(too_many, low, middle), torch.where(too_many, middle, high)
    return torch.sigmoid(surprise + low)


class FirstLayerScore(FirstLayerFilter):
    """Surprise of every token at every position, from the gradient of the attention input of block 0.

    Works for decoders and encoders: that input depends on one token and its position in both. The separable form of
    :mod:`lmleak.attacks.span_filter` makes it one matrix product for the whole vocabulary.

    Args:
        adapter: The model.
        path: The first linear map of block 0.
        space: Its soft row space.
        seed: Chooses the tokens that the setup is checked on.
        separable: Whether to try the separable form; the whole vocabulary is run through the model otherwise.
    """

    def __init__(self, adapter: ModelAdapter, path: str, space: SoftRowSpace, *, seed: int, separable: bool = True):
        # The setup checks want a hard subspace, any will do; nothing is accepted or refused by it here.
        first = space.basis[:, :1]
        hard = RowSpace(first, first.new_ones(1), 0.0, torch.finfo(adapter.dtype).eps)
        super().__init__(adapter, path, hard, seed=seed, separable=separable)
        self.space = space
        if self.norm is not None:
            self.norm = replace(self.norm, gain=self.norm.gain.double(), shift=self.norm.shift.double())

    def energy(self, start: int, stop: int) -> Tensor:
        """Return the energy of every token at positions ``start`` to ``stop`` - 1, (V, stop - start) float64."""
        return self.energies(start, stop, self.space.basis * self.space.weight.sqrt())

    def energies(self, start: int, stop: int, weighted: Tensor) -> Tensor:
        """Return ||W^T f||^2 / ||f||^2 of every token at positions ``start`` to ``stop`` - 1.

        Args:
            start: First position.
            stop: End of the positions.
            weighted: (d, n) W.

        Returns:
            (V, stop - start) float64.
        """
        vocabulary = torch.arange(self.adapter.vocabulary_size, device=self.adapter.device)
        if self.norm is None:
            chunks = vocabulary.split(max(1, CHUNK // (stop * self.space.basis.shape[0])))
            return torch.cat([
                (F.normalize(x.double(), dim=-1) @ weighted).square().sum(-1)
                for ids in chunks
                for x in [forward(self.adapter, ids[:, None].expand(-1, stop), stop_at=self.path)[:, start:]]
            ])  # fmt: skip
        positions = self._position_parts(self.norm, stop)[start:].double()
        return torch.cat([
            1 - self.norm.squared_residual(self._token_parts(self.norm, ids).double(), positions, weighted)
            for ids in vocabulary.split(max(1, CHUNK // self.space.basis.shape[0]))
        ])  # fmt: skip

    def surprise(self, start: int, stop: int) -> Tensor:
        """Return nats, (V, stop - start): how unlikely it is that a token not in the batch fits so well."""
        energy = self.energy(start, stop)
        return Null.fit(energy).surprise(energy)
