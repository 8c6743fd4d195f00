"""From candidates to texts: annealed descent on token logits, then substitution and exchange of tokens.

A guess is a whole batch. Several (restarts) descend side by side as one tensor; the likeliest are then polished. Both
steps maximise the likelihood of :class:`lmleak.attacks.subspace_objective.GradientLikelihood`. It is a likelihood of
the batch: two equal texts explain no more than one, so the texts of a guess keep apart without a penalty of their own.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lmleak.adapters.base import Prior
from lmleak.attacks.span_score import Null, posterior
from lmleak.attacks.subspace_objective import Candidates, GradientLikelihood, KnownText

IMPOSSIBLE = -30.0
"""Least log-probability of a token at the start."""
TEMPERATURES = (1.0, 0.05)
"""Of the softmax over candidates, first and last; falls geometrically."""
DISCRETE = 0.99
"""Mean probability of the likeliest candidates from which the descent has nothing more to decide."""
TRIED = 8
"""Substitutes tried per token when a guess is polished."""
SWEEPS = 6
"""Over all tokens, at most."""


@dataclass(frozen=True)
class Guess:
    """A whole batch."""

    ids: Tensor
    """(B, T) tokens, public ones included."""
    inputs: list[Tensor]
    """Per site (B, T, d), what they put in."""
    nats: float
    """Log-likelihood, up to a constant of the gradient."""


class Search:
    """The search for the texts of a batch.

    Args:
        known: Lengths and public tokens.
        candidates: Tokens per position.
        likelihood: Of whole batches.
    """

    def __init__(self, known: KnownText, candidates: Candidates, likelihood: GradientLikelihood):
        self.known, self.candidates, self.likelihood = known, candidates, likelihood
        self.size, self.length = known.real.shape
        self.rows = torch.arange(self.size, device=known.real.device)
        self.tried = min(len(candidates.ids[0]), TRIED)

    # Descent ------------------------------------------------------------------------------------------------

    def relax(
        self, count: int, restarts: int, steps: int, learning_rate: float, *, free: bool, seed: int
    ) -> tuple[list[Guess], int, str]:
        """Return guesses found by descent with falling temperature.

        Args:
            count: Candidates K per position.
            restarts: R.
            steps: Steps at most.
            learning_rate: Of Adam.
            free: Whether embeddings are free.
            seed: Seed of the starts.

        Returns:
            The distinct guesses, the likeliest first; the steps taken, and why they ended.
        """
        generator = torch.Generator().manual_seed(seed)
        shape = (restarts, self.size, self.length, min(count, self.candidates.ids.shape[1]))
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64).to(self.candidates.probability)
        start = (
            self.candidates.probability[:, :count].log().clamp(min=IMPOSSIBLE) - (-uniform.log()).log()
        )  # Gumbel: the largest is a draw from q
        embeddings = self.known.adapter.embed(self.candidates.ids[:, :count])
        mixture = (
            FreeEmbeddings(embeddings, start, self.known.adapter.prior()) if free else TokenMixture(embeddings, start)
        )
        optimizer = torch.optim.Adam([mixture.unknown], lr=learning_rate)
        first, last = TEMPERATURES
        stopped, step = "the annealing ended", 0
        for step in range(1, steps + 1):
            temperature = first * (last / first) ** ((step - 1) / max(1, steps - 1))
            x, p = mixture(temperature)
            loss = -self._relaxed(x) + mixture.penalty(self.known.free)
            (mixture.unknown.grad,) = torch.autograd.grad(loss, [mixture.unknown])
            optimizer.step()
            if p.detach().amax(-1)[:, self.known.free].mean() > DISCRETE:
                stopped = "every token is decided"
                break
        chosen = mixture(last)[1].detach().argmax(-1)  # (R, B, T)
        ids = self.candidates.ids[torch.arange(self.length), chosen]
        public = self.known.tokens
        ids = torch.where(public >= 0, public, ids).unique(dim=0)
        return sorted((self.guess(i) for i in ids), key=lambda g: -g.nats), step, stopped

    def _relaxed(self, x: Tensor) -> Tensor:
        """Return the likelihood, summed over restarts, of embeddings x (R, B, T, D)."""
        public = self.known.adapter.embed(self.known.tokens.clamp(min=0))
        x = torch.where((self.known.tokens < 0)[..., None], x, public)
        inputs = self.likelihood.inputs(x.flatten(0, 1), self.rows.repeat(len(x)))
        return self.likelihood.nats([h.unflatten(0, x.shape[:2]) for h in inputs]).sum()

    # Polish -------------------------------------------------------------------------------------------------

    def guess(self, ids: Tensor) -> Guess:
        """Return the guess of token ids (B, T) with its likelihood."""
        inputs = self.likelihood.inputs_of(ids, self.rows)
        return Guess(ids, inputs, self.likelihood.nats(inputs).item())

    def polish(self, guess: Guess) -> tuple[Guess, int]:
        """Improve a guess token by token until no substitution or exchange between two texts raises its likelihood.

        Args:
            guess: The start.

        Returns:
            The guess, and how many sweeps over all tokens it took.
        """
        sweeps, before = 0, None
        while sweeps < SWEEPS and (before is None or not torch.equal(guess.ids, before)):
            before, sweeps = guess.ids, sweeps + 1
            for t in range(self.length):
                for b in self.known.free[:, t].nonzero()[:, 0].tolist():
                    guess = max(self.neighbours(guess, b, t), key=lambda g: g.nats)
        return guess, sweeps

    def gains(self, guess: Guess, b: int, t: int) -> Tensor:
        """Return what each candidate at token t of text b explains of the first layer beyond the others, (K,)."""
        return self.likelihood.sites[0].gain(self.candidates.inputs[t], self._other_inputs(guess, b, t))

    def _other_inputs(self, guess: Guess, b: int, t: int) -> Tensor:
        others = self.known.read.clone()
        others[b, t] = False
        return guess.inputs[0][others]

    def neighbours(self, guess: Guess, b: int, t: int) -> list[Guess]:
        """Return the guess, and those with token t of text b substituted or exchanged, or all from t on exchanged."""
        old = guess.ids[b, t].item()
        others = [i for i in self.known.free[:, t].nonzero()[:, 0].tolist() if i != b and guess.ids[i, t] != old]
        substitutes = self.candidates.ids[t, self.gains(guess, b, t).topk(self.tried).indices].tolist()
        values = sorted({*substitutes, *guess.ids[others, t].tolist()} - {old})
        later = [u for u in self._movable(b, t) if guess.ids[b, u] != old]
        changed = torch.tensor([b] * len(values) + others + [b] * len(later), device=guess.ids.device)
        trial = guess.ids[changed].clone()
        moved = guess.ids[b, later].tolist()
        trial[:, t] = torch.tensor(values + [old] * len(others) + moved, device=trial.device)
        trial[range(len(trial) - len(later), len(trial)), later] = old
        partners, tails = self._tails(guess.ids, b, t)
        count = len(trial) + len(partners)
        trial = torch.cat([trial, *tails])
        changed = torch.cat([changed, changed.new_full((len(partners),), b), changed.new_tensor(partners)])
        inputs = self.likelihood.inputs_of(trial, changed)
        # Every neighbour is B rows of a pool: the guess's own rows, then those on trial.
        index = torch.arange(self.size, device=trial.device).repeat(count, 1)
        index[:, b] = self.size + torch.arange(count, device=trial.device)
        for n, i in enumerate(others, start=len(values)):
            index[n, b] = self.size + values.index(guess.ids[i, t].item())
            index[n, i] = self.size + n
        for n, i in enumerate(partners, start=count - len(partners)):
            index[n, i] = self.size + n + len(partners)
        pools = [torch.cat(pair) for pair in zip(guess.inputs, inputs, strict=True)]
        nats = self.likelihood.nats([pool[index] for pool in pools]).tolist()
        ids = torch.cat([guess.ids, trial])[index]
        return [guess, *(Guess(ids[n], [pool[index[n]] for pool in pools], value) for n, value in enumerate(nats))]

    def _tails(self, ids: Tensor, b: int, t: int) -> tuple[list[int], tuple[Tensor, Tensor]]:
        """Return the texts that can exchange all from token t on with text b, and both texts after it, (n, T) each."""
        free = self.known.free & self.known.free[b] & (torch.arange(self.length, device=ids.device) >= t)
        partners = [i for i in free[:, t].nonzero()[:, 0].tolist() if i != b and (ids[i] != ids[b])[free[i]].sum() > 1]
        shared = free[partners]
        return partners, (torch.where(shared, ids[partners], ids[b]), torch.where(shared, ids[b], ids[partners]))

    def _movable(self, b: int, t: int) -> list[int]:
        """Return the later positions whose token the first layer would as soon see at t."""
        if not self.candidates.position_free:
            return []
        return [u for u in self.known.free[b].nonzero()[:, 0].tolist() if u > t]

    def confidence(self, guess: Guess) -> Tensor:
        """Return per token (B, T) how sure it is, given the rest of the guess; 1 where public.

        Args:
            guess: The guess.

        Returns:
            Its probability among its neighbours by likelihood, times the probability that it is real by its gain at
            the first layer, calibrated on all candidates of the position; 0 for a mask token, which was not written.
        """
        result = torch.ones(guess.ids.shape, dtype=torch.float64)
        for b, t in self.known.free.nonzero().tolist():
            nats = torch.tensor([g.nats for g in self.neighbours(guess, b, t)], dtype=torch.float64)
            # As a share of what some direction explains, which without noise is 1 for the true token and for no other.
            most = self.likelihood.sites[0].largest_gain(self._other_inputs(guess, b, t))
            share = self.gains(guess, b, t) / most
            real = posterior(Null.fit(share).surprise(share), 1)
            result[b, t] = nats.softmax(0)[0] * real[self.candidates.ids[t] == guess.ids[b, t]].sum().cpu()
        if self.known.adapter.task == "masked-lm":
            result[guess.ids == self.known.adapter.tokenizer.mask_token_id] = 0.0
        return result


class TokenMixture:
    """Unknown: logits of the candidates (R, B, T, K). x is the mean embedding under their softmax."""

    def __init__(self, embeddings: Tensor, start: Tensor):
        self.embeddings = embeddings
        self.unknown = start.clone().requires_grad_()

    def __call__(self, temperature: float) -> tuple[Tensor, Tensor]:
        """Return x (R, B, T, D) and the probabilities p (R, B, T, K)."""
        p = (self.unknown / temperature).softmax(-1)
        return torch.einsum("rbtk,tkd->rbtd", p.to(self.embeddings), self.embeddings), p

    def penalty(self, free: Tensor) -> float:
        """Return 0: the simplex needs no prior."""
        return 0.0


class FreeEmbeddings:
    """Unknown: embeddings x = mean + std u, held by the Gaussian prior; p falls with the distance to the candidates.

    Distances are scaled by sqrt(2 D), their spread among unrelated embeddings.
    """

    def __init__(self, embeddings: Tensor, start: Tensor, prior: Prior):
        self.embeddings = embeddings
        self.mean, self.std = prior.mean, prior.std
        x = torch.einsum("rbtk,tkd->rbtd", start.softmax(-1).to(self.embeddings), self.embeddings)
        self.unknown = ((x - self.mean) / self.std).requires_grad_()

    def __call__(self, temperature: float) -> tuple[Tensor, Tensor]:
        """Return x (R, B, T, D) and the probabilities p (R, B, T, K)."""
        standard = (self.embeddings - self.mean) / self.std
        squares = self.unknown.square().sum(-1, keepdim=True) + standard.square().sum(-1)
        distance = squares - 2 * torch.einsum("rbtd,tkd->rbtk", self.unknown, standard)
        p = (-distance.double() / (2 * math.sqrt(standard.shape[-1]) * temperature)).softmax(-1)
        return self.mean + self.std * self.unknown, p

    def penalty(self, free: Tensor) -> Tensor:
        """Return -log prior, in nats, up to a constant."""
        return self.unknown.square().sum(-1)[:, free].sum() / 2
