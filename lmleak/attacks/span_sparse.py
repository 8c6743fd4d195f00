r"""Which tokens were where, under noise: the gradient of the first map explained by few tokens of the vocabulary.

A row space judges every token alone. Under noise that fails twice: the same token at another position, or another
token at the same position, has a similar input f(v, p) and looks almost as good as what is there; and inputs whose
output gradients are alike (attention spreads one text's gradient over all its positions) leave only their sum in the
row space, so that none of them lies in it. Both go away when the tokens must explain the gradient together. Every row
of the gradient, scaled to unit noise, is taken as Gaussian,

    g_i ~ N(0, C),      C = I + sum_a gamma_a x_a x_a^T,      x_a = f(v, p) / ||f(v, p)||,

and the powers gamma maximise the likelihood; most of them become zero (multiple-response sparse Bayesian learning,
Wipf and Rao 2007, doi:10.1109/TSP.2007.894265, equation 18 with the faster fixed point of MacKay in the end). An atom
is then judged against the gradient as the *others* explain it (Tipping and Faul 2003, their q and s):

    r_a = (x^T C_a^-1 S C_a^-1 x / m) / (x^T C_a^-1 x),      C_a = C - gamma_a x_a x_a^T,      S = sum_i g_i g_i^T:

the power along x, of rows that the others have been taken from, in units of what chance leaves. Noise of one RMS of
the gradient, share of the visible tokens among the 2 B best of their position, ridge energy -> this: two texts in the
embedded GPT-2 0.38 -> 0.85 (three batches), four of twelve random tokens in a GPT-2 of full size 0.45 -> 1.00.
"""

import torch
from torch import Tensor

from lmleak.attacks.span_layers import forward
from lmleak.attacks.span_score import RIDGE, FirstLayerScore, Null

ATOMS = 32
"""Atoms per position and round; tokens beyond them are judged, but explain nothing."""
FREE_ATOMS = 1024
"""Atoms in all, for models without positions at the first layer."""
ROUNDS = 2
"""Times that the atoms are chosen."""
ITERATIONS = 30
"""Updates of the powers per round; the second half uses the faster rule."""
NEGLIGIBLE = 1e-5
"""Powers below this share of the largest are zero."""
RANGE = 1e5
"""Largest power, in units of the noise, up to which gradients are called noisy. Beyond it (rounding to bfloat16, or
none) the row space tells all, and the powers would take thousands of updates."""


def sparse_powers(atoms: Tensor, rows: Tensor, count: int) -> Tensor:
    """Return the powers gamma that maximise the likelihood of the rows.

    Args:
        atoms: (K, d) unit vectors.
        rows: (d, d) S, the sum of g g^T over rows of unit noise.
        count: m, how many rows there are.

    Returns:
        (K,), most of them small or zero.
    """
    power = torch.full_like(atoms[:, 0], rows.trace().item() / count / len(atoms))
    kept = torch.arange(len(atoms), device=atoms.device)
    for iteration in range(ITERATIONS):
        x = atoms[kept]
        inverse, explained = _precision(x, power[kept], rows, count)
        ratio = _quadratic(x, explained) / _quadratic(x, inverse)
        power[kept] *= ratio.sqrt() if iteration < ITERATIONS // 2 else ratio
        kept = (power > NEGLIGIBLE * power.max()).nonzero()[:, 0]
        power = torch.zeros_like(power).index_copy(0, kept, power[kept])
    return power


def _precision(atoms: Tensor, power: Tensor, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return C^-1 and C^-1 S C^-1 / m, (d, d)."""
    covariance = (atoms.T * power) @ atoms
    covariance.diagonal().add_(1.0)
    inverse = torch.linalg.inv(covariance)
    inverse = (inverse + inverse.T) / 2
    return inverse, inverse @ rows @ inverse / count


def _quadratic(x: Tensor, matrix: Tensor) -> Tensor:
    """Return x^T M x for every row."""
    return ((x @ matrix) * x).sum(-1)


class SparseFirstLayer(FirstLayerScore):
    """Surprise of every token at every position, each judged by what the tokens elsewhere do not explain.

    Where there is next to no noise this is :class:`FirstLayerScore`.
    """

    def surprise(self, start: int, stop: int) -> Tensor:
        """Return nats, (V, stop - start): how unlikely it is that a token not in the batch explains so much.

        Args:
            start: First position.
            stop: End of the positions; all of them compete, so a call should hold the whole texts.
        """
        if self.space.power.max() > RANGE:
            return super().surprise(start, stop)
        ratio = self._ratios(start, stop)
        share = ratio / (1 + ratio)
        return Null.fit(share).surprise(share)

    def _ratios(self, start: int, stop: int) -> Tensor:
        """Return r of every token and position, (V, stop - start)."""
        basis, power = self.space.basis, self.space.power
        count, d = self.space.rows, len(basis)
        rows = count * (basis * power) @ basis.T
        loaded = torch.linalg.inv(rows / count + RIDGE * torch.eye(d, dtype=rows.dtype, device=rows.device))
        ratio = 1 / self._forms(start, stop, loaded)  # Capon's spectrum
        atoms = min(len(ratio), FREE_ATOMS if self.position_free else ATOMS)
        chosen = torch.zeros_like(ratio, dtype=torch.bool)
        for _ in range(ROUNDS):
            chosen.scatter_(0, ratio.topk(atoms, dim=0).indices, True)
            tokens, columns = chosen.nonzero().T
            x = self._inputs(tokens, start + columns)
            gamma = sparse_powers(x, rows, count)
            inverse, explained = _precision(x, gamma, rows, count)
            without = torch.zeros_like(ratio)
            without[tokens, columns] = gamma
            s, q = self._forms(start, stop, inverse), self._forms(start, stop, explained)
            # By the matrix inversion lemma, s_a = s / (1 - gamma s) and q_a = q / (1 - gamma s)^2.
            ratio = q / (s * (1 - without * s).clamp(min=1e-9))
        return ratio

    def _inputs(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Return f(v, p) of pairs as unit vectors, (n, d) float64."""
        length = int(positions.max()) + 1
        found = []
        for ids, p in zip(tokens.split(256), positions.split(256), strict=True):
            x = forward(self.adapter, ids[:, None].expand(-1, length), stop_at=self.path)
            found.append(x[torch.arange(len(ids), device=x.device), p].double())
        return torch.nn.functional.normalize(torch.cat(found), dim=-1)

    def _forms(self, start: int, stop: int, matrix: Tensor) -> Tensor:
        """Return x^T M x of every token and position, (V, stop - start)."""
        values, vectors = torch.linalg.eigh(matrix)
        return self.energies(start, stop, vectors * values.clamp(min=0).sqrt())
