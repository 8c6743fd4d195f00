"""How well a batch of texts explains the gradients of the first blocks: a likelihood, differentiable in x.

It depends on hidden states only, so its gradient is one forward and one backward pass through these blocks; nothing is
differentiated twice.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lmleak.adapters.examples import token_template
from lmleak.attacks.span_layers import Site, dependence, forward, linear_groups
from lmleak.attacks.span_score import RIDGE, FirstLayerScore, SoftRowSpace, posterior, soft_row_space
from lmleak.errors import UnsupportedCombinationError, UnsupportedModelError
from lmleak.types import Observation

RIDGE_SHARE = 0.01
"""Inputs of trained models are nearly collinear, and their coefficients much larger than the mean signal suggests:
with this share the true text leaves the noise it should, with 1 ten times as much."""
DIRECTIONS = 2
"""Directions of a gradient that are fitted, per token of the batch; its signal has at most one per token."""
SMALLEST_RIDGE = 1e-10
"""Inputs that differ by less than the root of this, relative to their norm, count as one: rounding in float32."""


class _Reached(Exception):
    """Ends a forward pass on purpose."""


def sentence_maps(adapter, gradient: Mapping[str, Tensor], blocks: int) -> list[Site]:
    """Return the released maps that see more than one token, in order of execution.

    All maps of the first ``blocks`` blocks behind block 0's attention, and the attention input of the block after.
    Left out is what lies in the last block of a model whose loss does not read every position: most inputs carry no
    gradient there.

    Args:
        adapter: The model.
        gradient: Released gradient per parameter name.
        blocks: How many blocks are read.

    Returns:
        At least one site.

    Raises:
        UnsupportedCombinationError: If there is none, with the reason.
    """
    depth = len(adapter.blocks) - (adapter.task != "causal-lm")
    groups = [paths for block in adapter.blocks[: min(blocks, depth)] for paths in linear_groups(adapter, block + ".")]
    if blocks < depth:
        groups.append(adapter.attention_inputs(blocks))
    sites = [Site(paths, f"the input of {paths[0]}") for paths in groups if any(dependence(adapter, paths[0]))]
    released = [site for site in sites if site.is_released(gradient)]
    if released:
        return released
    if not sites:
        raise UnsupportedCombinationError(
            f"{adapter.name} has {len(adapter.blocks)} block(s), of whose last only the positions that the loss reads "
            "carry a gradient, so no map behind an attention spans the tokens. Use a matching attack (dlg, tag)"
        )
    raise UnsupportedCombinationError(
        "attack 'subspace' needs the gradient of a map that sees more than one token, to tell which belong together: "
        f"one of {', '.join(path for site in sites for path in site.paths)}. None is released (shared='block:0' does)"
    )


class KnownText:
    """What is public about the batch: lengths, and the special tokens around every text. Padding is on the right here.

    Args:
        adapter: The model.
        observation: The observation, with its layout.
    """

    def __init__(self, adapter, observation: Observation):
        self.adapter = adapter
        given = {name: tensor.to(adapter.device) for name, tensor in observation.layout.items()}
        real = given["attention_mask"].bool()
        order = (~real).long().argsort(dim=1, stable=True)[:, : int(real.sum(1).max())]  # real tokens first
        self.layout = {name: tensor.gather(1, order) for name, tensor in given.items()}
        self.real = real.gather(1, order)
        """(B, T) True where there is a token."""
        self.tokens = torch.where(self.real, -1, adapter.pad_id)
        """(B, T) public token ids; -1 where private."""
        prefix, suffix = (torch.tensor(part, dtype=torch.long) for part in token_template(adapter))
        for row, length in enumerate(self.real.sum(1).tolist()):
            if length > len(prefix) + len(suffix):  # shorter: not made by this tokenizer, so nothing is known
                self.tokens[row, : len(prefix)] = prefix.to(self.tokens)
                self.tokens[row, length - len(suffix) : length] = suffix.to(self.tokens)
        self.read = self.real.clone()
        """(B, T) True where the loss depends on the token as an input: not at the end of a language model's text."""
        if adapter.task == "causal-lm":
            self.read[torch.arange(len(real)), self.real.sum(1) - 1] = False
        self.free = self.read & (self.tokens < 0)
        """(B, T) True where a token is to be found."""

    def fill(self, ids: Tensor, rows: Tensor) -> Tensor:
        """Return token ids (n, T) with what is public put in; ``rows`` (n,) says which text of the batch each is."""
        public = self.tokens[rows]
        return torch.where(public >= 0, public, ids)


class Candidates:
    """The tokens that the first layer allows at each position, with the probability that they were there.

    Args:
        known: Lengths and public tokens.
        scores: The first-layer scores.
        count: How many tokens are kept per position.
    """

    def __init__(self, known: KnownText, scores: FirstLayerScore, count: int):
        adapter, length = known.adapter, known.real.shape[1]
        self.position_free = scores.position_free
        usable = torch.ones(adapter.vocabulary_size, dtype=torch.bool, device=adapter.device)
        usable[sorted(adapter.special_ids())] = False
        usable = usable.nonzero()[:, 0]
        surprise = scores.surprise(0, 1).expand(-1, length) if scores.position_free else scores.surprise(0, length)
        probability = torch.stack([
            posterior(surprise[usable, t], max(1, int(known.free[:, t].sum()))) for t in range(length)
        ])  # fmt: skip
        best = probability.topk(min(count, len(usable)), dim=1)
        self.ids: Tensor = usable[best.indices]
        """(T, K), the most likely first."""
        self.probability: Tensor = best.values
        """(T, K) that the token stands there in at least one of the texts."""
        inputs = [
            forward(adapter, ids[:, None].expand(-1, t + 1), stop_at=scores.path)[:, t]
            for t, ids in enumerate(self.ids)
        ]
        self.inputs: Tensor = F.normalize(torch.stack(inputs).double(), dim=-1)
        """(T, K, d) what they put into block 0's attention, of unit norm."""


@dataclass(frozen=True)
class _Scaled:
    """One site, its gradient in units of its noise."""

    rows: Tensor
    """(d, n) s_k v_k."""
    ridge: float
    noise: float
    """U0."""
    rest: float = 0.0
    """Sum of s_k^2 over the directions left out."""

    def beyond(self, vectors: Tensor, others: Tensor) -> Tensor:
        """Return the part of vectors (n, d) that some inputs (N, d), of unit norm, do not span, up to epsilon."""
        gram = others @ others.T
        gram.diagonal().add_(self.ridge)
        return vectors - torch.linalg.solve(gram, others @ vectors.T).T @ others

    def gain(self, h: Tensor, others: Tensor) -> Tensor:
        """Return how much of G each of several inputs explains beyond what others explain, in units of noise.

        Args:
            h: (n, d) unit norm.
            others: (N, d) unit norm.

        Returns:
            ||G h'||^2 / (||h'||^2 + epsilon), (n,), with h' the part of h that the others do not span.
        """
        part = self.beyond(h, others)
        return (part @ self.rows).square().sum(1) / (part.square().sum(1) + self.ridge)

    def largest_gain(self, others: Tensor) -> Tensor:
        """Return the most that any direction explains beyond what others (N, d) explain."""
        return torch.linalg.matrix_norm(self.beyond(self.rows.T, others), 2).square()

    def nats(self, h: Tensor) -> Tensor:
        """Return -(U0 / 2) log(U / U0), (...,), for inputs (..., N, d)."""
        tokens = h.shape[-2]
        identity = torch.eye(tokens, dtype=h.dtype, device=h.device).expand(*h.shape[:-1], tokens)
        q = torch.linalg.qr(torch.cat([h.mT, self.ridge**0.5 * identity], dim=-2)).Q  # (..., d + N, N)
        coefficients = q[..., : h.shape[-1], :].mT @ self.rows  # (..., N, n)
        fitted = q @ coefficients
        left = (self.rows - fitted[..., : h.shape[-1], :]).square().sum((-2, -1))
        left = left + fitted[..., h.shape[-1] :, :].square().sum((-2, -1))
        return -self.noise / 2 * ((left + self.rest) / self.noise).log()


class GradientLikelihood:
    """Log-likelihood of the gradients of the first blocks' maps for a whole batch of texts.

    A map's gradient is G = D^T H + E, with H (N, d) what the texts put into it, D unknown and E noise, unit after
    scaling (:func:`lmleak.attacks.span_score.soft_row_space`). Maximised over D with a ridge, what is left of G is

        U = tr(G [I - H^T (H H^T + epsilon I)^-1 H] G^T),        epsilon = RIDGE_SHARE noise / signal per token,

    and U0 = m (d - N) of it is noise. With the noise level profiled out as well, each map adds

        -(U0 / 2) log(U / U0) = -(U - U0) / (2 noise^2) + ...  nats

    near the truth, and stays well scaled far from it. Unlike a mean energy of single inputs it asks both that what
    the texts put in lies in the row space and that the texts explain the whole of it: repeated or similar tokens gain
    nothing.

    Args:
        known: Lengths and public tokens.
        gradients: Stacked gradient of each site, in order of execution.
    """

    def __init__(self, known: KnownText, gradients: Mapping[Site, Tensor]):
        self.known, self.adapter = known, known.adapter
        self.paths = [site.paths[0] for site in gradients]
        self.parameters = self.adapter.parameters()  # detached: only the embeddings are differentiated
        self.spaces = [soft_row_space(rows) for rows in gradients.values()]
        self.sites = [
            self._site(space, *rows.shape) for space, rows in zip(self.spaces, gradients.values(), strict=True)
        ]

    def _site(self, space: SoftRowSpace, m: int, d: int) -> "_Scaled":
        tokens = int(self.known.read.sum())
        squares = RIDGE * m * space.weight / (1 - space.weight).clamp(min=torch.finfo(torch.float64).eps)
        signal = (squares - m).clamp(min=0).sum().item()
        ridge = min(1.0, max(SMALLEST_RIDGE, RIDGE_SHARE * m * tokens / max(signal, 1e-12)))
        kept = min(len(squares), DIRECTIONS * tokens)
        rows = space.basis[:, :kept] * squares[:kept].sqrt()
        return _Scaled(rows, ridge, float(m * max(1, d - tokens)), squares[kept:].sum().item())

    def inputs(self, x: Tensor, rows: Tensor) -> list[Tensor]:
        """Return what enters each site, (n, T, d) float64 of unit norm, for embeddings (n, T, D).

        Args:
            x: Embeddings.
            rows: (n,) which text of the batch each is, for its length and public tokens.

        Returns:
            One tensor per site.
        """
        seen = self._inputs(x, {name: tensor[rows] for name, tensor in self.known.layout.items()})
        return [F.normalize(seen[path].reshape(*x.shape[:2], -1).double(), dim=-1) for path in self.paths]

    def inputs_of(self, ids: Tensor, rows: Tensor) -> list[Tensor]:
        """Return :meth:`inputs` of token ids (n, T), without a graph."""
        with torch.no_grad():
            return self.inputs(self.adapter.embed(ids), rows)

    def nats(self, inputs: list[Tensor]) -> Tensor:
        """Return the log-likelihood of batches, (...,), given what enters each site, (..., B, T, d)."""
        return sum(
            site.nats(h.flatten(-3, -2)[..., self.known.read.flatten(), :])
            for site, h in zip(self.sites, inputs, strict=True)
        )

    def _inputs(self, x: Tensor, layout: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what enters each site; the pass ends at the last one."""
        seen: dict[str, Tensor] = {}

        def read(path):
            def hook(module, arguments, keywords):
                seen[path] = arguments[0] if arguments else next(iter(keywords.values()))
                if len(seen) == len(self.paths):
                    raise _Reached

            return hook

        modules = self.adapter.model.get_submodule
        handles = [modules(p).register_forward_pre_hook(read(p), with_kwargs=True) for p in self.paths]
        try:
            self.adapter.logits(x, layout, self.parameters)
        except _Reached:
            return seen
        finally:
            for handle in handles:
                handle.remove()
        raise UnsupportedModelError(f"a forward pass of {self.adapter.name} never reached {self.paths[-1]!r}")
