"""What linearised gradients say about tokens: closed forms on a dense A = J J^T, all in float64.

Released: g(x0) + sigma n. To first order the attacker observes P (x - x0) + s with P = A / sigma^2, s ~ N(0, P), and
x = (x_1 ... x_N) are N embeddings of D coordinates. Every function returns ``hits``, Boolean (draws, N): whether the
attacker decodes token t correctly under noise draw k. Their mean over draws is the probability of recovery.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

SWEEPS = 8  # of the mean field
SETTLED = 0.01  # change of the mean probability at which the mean field stops


@dataclass(frozen=True)
class LinearGaussian:
    """The linearised problem of one batch, for any noise level."""

    values: Tensor
    """(N D,) eigenvalues of A, clamped at 0 (single precision leaves small negative ones)."""
    vectors: Tensor
    """(N D, N D) eigenvectors of A as columns."""
    x: Tensor
    """(N, D) the true embeddings x0."""
    table: Tensor
    """(V, D) embeddings of the tokens that the attacker considers."""
    truth: Tensor
    """(N,) row of the table that is the true token."""
    prior_mean: Tensor
    """(D,) mu."""
    prior_std: float
    """tau."""

    @classmethod
    def from_gram(
        cls, gram: Tensor, x: Tensor, table: Tensor, truth: Tensor, prior_mean: Tensor, prior_std: float
    ) -> "LinearGaussian":
        """Return the problem for a dense A (N D, N D); tensors of any float dtype and device."""
        gram, x, table, prior_mean = (t.double().cpu() for t in (gram, x, table, prior_mean))
        values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
        return cls(values.clamp(min=0), vectors, x, table, truth.cpu(), prior_mean, prior_std)

    def precision(self, noise_std: float, power: float = 1.0) -> Tensor:
        """Return P^power, (N D, N D), P = A / sigma^2."""
        return (self.vectors * (self.values / noise_std**2) ** power) @ self.vectors.T

    def blocks(self, matrix: Tensor) -> Tensor:
        """Return the diagonal blocks of an (N D, N D) matrix, (N, D, D)."""
        size, width = self.x.shape
        return matrix.reshape(size, width, size, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def gaussian_hits(problem: LinearGaussian, noise_std: float, draws: int, generator: torch.Generator) -> Tensor:
    """The attacker with prior N(mu, tau^2 I) who decodes by cosine similarity, as ``nearest_tokens`` does.

    W = (P + I / tau^2)^-1; estimate ~ N(mu + W P (x0 - mu), W P W): the maximum a posteriori under a random noise.

    Args:
        problem: The linearised problem.
        noise_std: sigma.
        draws: Number of noise draws.
        generator: Source of the noise.

    Returns:
        Hits (draws, N).
    """
    p = problem.values / noise_std**2
    shrink = 1 / (p + problem.prior_std**-2)
    deviation = problem.vectors.T @ (problem.x - problem.prior_mean).reshape(-1)
    noise = torch.randn(draws, len(p), generator=generator, dtype=torch.float64)
    estimate = (shrink * (p * deviation + p.sqrt() * noise)) @ problem.vectors.T
    estimate = estimate.reshape(draws, *problem.x.shape) + problem.prior_mean
    similarity = F.normalize(estimate, dim=-1) @ F.normalize(problem.table, dim=-1).T
    return similarity.argmax(-1) == problem.truth


def effective_precision(problem: LinearGaussian, noise_std: float, others: Tensor | None) -> Tensor:
    """Return S_t (N, D, D): the precision about token t once the other tokens are integrated out.

    With Gaussian beliefs of covariance C_s about the others, C = diag(C_s): R = P^1/2 (I + P^1/2 C P^1/2)^-1 P^1/2 is
    what is known of everything, R_tt = (I + S_t C_t)^-1 S_t what is left of token t, hence
    S_t = R_tt^1/2 (I - R_tt^1/2 C_t R_tt^1/2)^-1 R_tt^1/2. For C = tau^2 I this is Cov_tt^-1 - I / tau^2 (Schur).

    Args:
        problem: The linearised problem.
        noise_std: sigma.
        others: C_s, (N, D, D); None if the others are known, when S_t = P_tt.

    Returns:
        S_t.
    """
    if others is None:
        return problem.blocks(problem.precision(noise_std))
    root = problem.precision(noise_std, 0.5)
    size, width = problem.x.shape
    spread = torch.einsum("iab,ibk->iak", others, root.reshape(size, width, -1)).reshape(root.shape)
    inner = root.T @ spread
    inner.diagonal().add_(1)
    factor = torch.linalg.cholesky((inner + inner.T) / 2)
    left = torch.linalg.solve_triangular(factor, root, upper=False)
    known = problem.blocks(left.T @ left)
    root_t = symmetric_root(known)
    gap = torch.eye(width, dtype=root.dtype) - root_t @ others @ root_t
    values, vectors = torch.linalg.eigh((gap + gap.mT) / 2)
    # Exactly known directions leave a gap of 0, which rounding makes negative.
    inverse = (vectors / values.clamp(min=1e-12).unsqueeze(-2)) @ vectors.mT
    return root_t @ inverse @ root_t


def symmetric_root(matrix: Tensor) -> Tensor:
    """Return the symmetric square root of positive semidefinite matrices (..., D, D)."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    return (vectors * values.clamp(min=0).sqrt().unsqueeze(-2)) @ vectors.mT


def posterior_scores(problem: LinearGaussian, precision: Tensor, noise: Tensor) -> Tensor:
    """Return log p(v | released) up to a constant, (draws, N, V), for a uniform prior over the table.

    score_v = -1/2 d_v^T S d_v + d_v^T S^1/2 n with d_v = E_v - x0: zero for the true token. Positions are worked
    through one by one; ``noise`` is (draws, N, D).
    """
    scores = []
    for t, root in enumerate(symmetric_root(precision)):
        away = (problem.table - problem.x[t]) @ root  # S^1/2 d_v, (V, D)
        scores.append(noise[:, t] @ away.T - away.square().sum(1) / 2)
    return torch.stack(scores, dim=1)


def decodes(problem: LinearGaussian, scores: Tensor, generator: torch.Generator) -> Tensor:
    """Return whether the true token scores highest; a tie is decided at random, as an attacker would."""
    mine = scores.gather(-1, problem.truth.expand(len(scores), -1).unsqueeze(-1))
    better, ties = (scores > mine).any(-1), (scores == mine).sum(-1)
    lot = torch.rand(better.shape, generator=generator, dtype=torch.float64)
    return ~better & (lot * ties < 1)


def posterior_hits(
    problem: LinearGaussian, noise_std: float, draws: int, generator: torch.Generator, others: str
) -> Tensor:
    """The attacker who knows the vocabulary and takes the token of highest posterior, position by position.

    Args:
        problem: The linearised problem.
        noise_std: sigma.
        draws: Number of noise draws.
        generator: Source of the noise and of lots.
        others: What is believed of the other tokens: "known" (an upper bound), "gaussian" (prior N(., tau^2 I)), or
            "mean-field" (covariance of their own discrete posteriors, averaged over the noise, to a fixed point).

    Returns:
        Hits (draws, N).
    """
    size, width = problem.x.shape
    noise = torch.randn(draws, size, width, generator=generator, dtype=torch.float64)
    if others == "known":
        belief = None
    else:
        belief = problem.prior_std**2 * torch.eye(width, dtype=torch.float64).expand(size, -1, -1)
    hits, before = None, None
    for _ in range(SWEEPS if others == "mean-field" else 1):
        scores = posterior_scores(problem, effective_precision(problem, noise_std, belief), noise)
        hits = decodes(problem, scores, generator)
        now = hits.double().mean().item()
        if others != "mean-field" or (before is not None and abs(now - before) < SETTLED):
            break
        belief, before = posterior_covariance(problem, scores), now
    return hits


def posterior_covariance(problem: LinearGaussian, scores: Tensor) -> Tensor:
    """Return the covariance of each token's discrete posterior, averaged over the noise, (N, D, D)."""
    weights = scores.softmax(-1)
    covariance = []
    for t in range(len(problem.x)):
        away = problem.table - problem.x[t]
        means = weights[:, t] @ away
        second = (away.T * weights[:, t].mean(0)) @ away
        covariance.append(second - means.T @ means / len(means))
    return torch.stack(covariance)
