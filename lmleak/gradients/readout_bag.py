r"""The bag of tokens: which tokens were inputs, read off the gradient of the word-embedding table.

An untied table's row v gets the sum of dL/dx over the places where token v was looked up, and nothing else:

    (dL/dE)_v = sum_{i: token_i = v} dL/dx_i,

so a row is non-zero only if v was an input (Melis et al. 2019, arXiv:1805.04049, section 4.1). A table tied to the
head gets the head's part besides, on every row:

    (dL/dE)_v = sum_t c_tv h_t + S_v,     c = dL/dlogits (targets, V),  h_t the head's inputs,

with S_v, what was looked up, zero unless v was an input. The head's part has rank b <= number of distinct prefixes
(masked LM: of masked positions). While b < d it is a subspace that all rows lie in but those of inputs. An input's
row points out of it all by itself: its leverage in the whole matrix is 1 if the S_v are independent modulo that
subspace (rank < d shows that they are), and far above the median's in any case. So the subspace is found from rows of
low leverage, and rows outside it were inputs.
"""

import math
from dataclasses import dataclass

import torch
from scipy.stats import chi2
from torch import Tensor

from lmleak.gradients.readout_rank import TINY, Released, machine_epsilon, row_spectrum

SIGNIFICANCE = 0.01
"""Probability of one false row or more among all rows, under noise."""
LARGEST_SURPRISE = 690.0
"""Nats; smaller probabilities underflow."""
LEAST_FREEDOM = 0.25
"""Row norms that scatter like a chi-square of fewer than this times d degrees are no noise (Laplace: 0.4)."""
CLEAR = 2.0
"""Factor between the rounding expected of a row and its residual, either way, up to which the answer is unsure."""
FORWARD = 40.0
"""Machine epsilons by which sums over the batch may differ from exact ones, relative to the norm of a row."""


@dataclass(frozen=True)
class TokenBag:
    """The tokens that were inputs, without multiplicities, which a row's norm does not tell."""

    ids: Tensor | None
    """(n,) token ids, surest first; None if the gradient does not tell."""
    scores: Tensor | None
    """(n,) larger is surer; its unit is said in ``reason``."""
    exact: bool
    """Whether ids are precisely the inputs whose gradient is not zero: the last token of each text is none in a causal
    language model (nothing is predicted from it), nor is the token of the table's padding row."""
    reason: str
    """How the bag was read, or why it cannot be."""


@dataclass(frozen=True)
class RowNoise:
    """Noise of independent rows, fitted to those of small norm: ||row||^2 ~ scale x chi-square(freedom)."""

    scale: float
    freedom: float
    width: int

    @classmethod
    def fit(cls, squared: Tensor, width: int) -> "RowNoise":
        """Fit the median and the lower quartile of squared row norms, most of which must be noise.

        The cube root of a chi-square of k degrees over k is normal, of mean 1 - 2/(9k) and variance 2/(9k) (Wilson and
        Hilferty 1931), so the ratio q of the cube roots of quartile and median gives s^2 = 2/(9k) by
        (1 - q)(1 - s^2) = 0.6745 s. Gaussian noise has k = d, noise of heavier tails less.

        Args:
            squared: (V,) squared norms.
            width: d.

        Returns:
            The noise, with at most d degrees of freedom.
        """
        quartile, median = (squared.quantile(q).item() for q in (0.25, 0.5))
        gap = 1 - (quartile / max(median, TINY)) ** (1 / 3)
        s = (-0.6745 + math.sqrt(0.6745**2 + 4 * gap**2)) / (2 * gap) if gap > 0 else 0.0
        freedom = min(float(width), 2 / (9 * max(s, 1e-9) ** 2))
        return cls(max(median, TINY) / chi2.ppf(0.5, freedom), freedom, width)

    @property
    def plausible(self) -> bool:
        """Whether the norms scatter as those of independent noise do."""
        return self.freedom >= LEAST_FREEDOM * self.width

    def surprise(self, squared: Tensor) -> Tensor:
        """Return -log p of each squared norm, in nats."""
        p = torch.from_numpy(chi2.sf((squared / self.scale).cpu().numpy(), self.freedom))
        return -p.clamp(min=math.exp(-LARGEST_SURPRISE)).log().to(squared.device)


def significant_rows(rows: Tensor) -> tuple[Tensor, Tensor, bool, str]:
    """Return which rows of a gradient hold signal: index, scores, whether it is exact, and how it was decided.

    Rows that are exactly zero hold none. If few are, noise was added to all, and a row counts if its squared norm has
    probability below ``SIGNIFICANCE`` / V under the noise that the quieter half of the rows shows. The promise holds
    for Gaussian noise; Laplace noise of width 16 to 128 was seen to raise 0.1 to 0.8 false rows per 500.

    Args:
        rows: (V, d).

    Returns:
        Index (surest first), scores, exactness, words. The index is empty, and exact False, where neither applies.
    """
    squared = rows.double().square().sum(1)
    if (squared == 0).double().mean() >= 0.5:
        index = squared.nonzero()[:, 0]
        scores, exact, how = squared[index].sqrt(), True, "rows that are not exactly zero; scores are their norms"
    else:
        noise = RowNoise.fit(squared, rows.shape[1])
        if not noise.plausible:
            return (
                squared.nonzero()[:0, 0],
                squared[:0],
                False,
                "no row is zero, and their norms are not those of noise",
            )
        surprise = noise.surprise(squared)
        index = (surprise > -math.log(SIGNIFICANCE / len(rows))).nonzero()[:, 0]
        scores, exact = surprise[index], False
        sigma = math.sqrt(noise.scale * noise.freedom / noise.width)
        how = f"rows beyond noise of standard deviation {sigma:.2e}; scores are -log p in nats"
    order = scores.argsort(descending=True, stable=True)
    return index[order], scores[order], exact, how


def token_bag(adapter, observation: Released) -> TokenBag:
    """Return the set of input tokens that the gradient of the word-embedding table tells.

    Void if the table's gradient is withheld or frozen, or holds the head's part alone (shared="no-word-embeddings");
    for a tied table also if b >= d. Under noise rows are tested one by one, and quiet tokens are missed. Of a tied
    table, targets and tokens that the model finds probable then stand out as well: in a trained model of width 128,
    95 to 100 % of the inputs were among 1.2 to 14 times as many rows, the fewer the stronger the noise.

    Args:
        adapter: The model.
        observation: The released gradient.

    Returns:
        The bag.
    """
    table = adapter.lookup_table()
    if table not in observation.gradient:
        return TokenBag(None, None, False, "the gradient of the word-embedding table is not released")
    gradient = observation.gradient[table]
    if not adapter.lookup_table_is_tied():
        index, scores, exact, how = significant_rows(gradient)
        return TokenBag(index, scores, exact, how) if len(index) else TokenBag(None, None, False, how)
    if not adapter.select(observation.shared).through_lookup:
        return TokenBag(
            None, None, False,
            f"shared={observation.shared!r} gives the tied table's gradient through the head alone, without the rows "
            "that were looked up",
        )  # fmt: skip
    return _tied_bag(gradient, machine_epsilon(adapter, gradient))


def _tied_bag(gradient: Tensor, eps: float) -> TokenBag:
    """Return the rows outside the head's part."""
    rows = gradient.double()
    norms = rows.norm(dim=1)
    if not norms.any():
        return TokenBag(None, None, False, "the gradient of the word-embedding table is zero")
    kept = _least_leverage(rows, norms, eps)
    spectrum = row_spectrum(rows[kept], eps)
    if spectrum.rank >= rows.shape[1]:
        return _noisy_tied_bag(rows)
    basis = spectrum.directions.T
    inside = rows @ basis
    residual = (rows - inside @ basis.T).norm(dim=1)
    # As an input of the head moves out of its span by rounding: sigma_{r+1} ||diag(1/sigma) V^T row||.
    ratio = residual / (spectrum.tail * (inside / spectrum.sigma).norm(dim=1) + FORWARD * eps * norms).clamp(min=TINY)
    index = (ratio > 1).nonzero()[:, 0]
    index = index[ratio[index].argsort(descending=True, stable=True)]
    exact = not bool(((ratio > 1 / CLEAR) & (ratio < CLEAR)).any())
    return TokenBag(
        index, ratio[index], exact,
        f"rows of the tied table outside the head's part, of rank {spectrum.rank} < {rows.shape[1]}; scores are "
        f"residuals in units of expected rounding{'' if exact else ', some of them unclear'}",
    )  # fmt: skip


def _least_leverage(rows: Tensor, norms: Tensor, eps: float) -> Tensor:
    """Return rows that are no inputs, by leverage in the row-equilibrated matrix.

    Those below 1/2 if the matrix is of deficient rank, because inputs have 1; the lower half of the rows otherwise.
    """
    spectrum = row_spectrum(rows, eps)
    leverage = ((rows / norms.clamp(min=TINY)[:, None]) @ spectrum.directions.T / spectrum.sigma).square().sum(1)
    leverage *= spectrum.rank / leverage.sum()  # singular values came relative to the largest
    if spectrum.rank < rows.shape[1]:
        return (leverage < 0.5).nonzero()[:, 0]
    return leverage.argsort(stable=True)[: len(rows) // 2]


def _noisy_tied_bag(rows: Tensor) -> TokenBag:
    """Return the rows that stand out of the noise once the head's resolved directions are projected out.

    Those directions are the singular vectors of the quieter half of the rows above the edge sigma (sqrt m + sqrt d) of
    pure noise.
    """
    width = rows.shape[1]
    squared = rows.square().sum(1)
    quiet = squared.argsort(stable=True)[: len(rows) // 2]
    noise = RowNoise.fit(squared, width)
    edge = math.sqrt(noise.scale * noise.freedom / width) * (math.sqrt(len(quiet)) + math.sqrt(width))
    _, sigma, directions = torch.linalg.svd(rows[quiet], full_matrices=False)
    basis = directions[: min(int((sigma > edge).sum()), width // 2)].T
    index, scores, _, how = significant_rows(rows - (rows @ basis) @ basis.T)
    if not len(index):
        return TokenBag(
            None, None, False,
            f"the head's part of the tied table seems to fill the space of {width} dimensions: distinct prefixes and "
            f"input tokens together exceed the hidden size, or noise was added that no row stands out of ({how})",
        )  # fmt: skip
    return TokenBag(
        index,
        scores,
        False,
        f"{how}; the table is tied, so targets and tokens that the model finds probable stand out besides inputs",
    )
