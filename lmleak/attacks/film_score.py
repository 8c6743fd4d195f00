"""How well a batch of texts explains a released gradient, and how likely it is: the score of FILM's third phase."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lmleak.adapters.text import TextAdapter
from lmleak.attacks.film_beam import Text
from lmleak.attacks.objectives import LayerCosine
from lmleak.gradients.capture import gradient_of
from lmleak.types import IGNORE, Observation


@dataclass(frozen=True)
class Bag:
    """The distinct tokens of a batch."""

    ids: Tensor
    """(n,) token ids."""
    exact: bool
    """Whether every one of them is certainly in the batch."""


@dataclass(frozen=True)
class ScoredTexts:
    """The best of several batches of texts."""

    texts: list[Text]
    objective: float
    distance: float


class TextScore:
    """LayerCosine(g(texts), g*) + prior_weight * mean nats per token + share of an exact bag that no text uses.

    Args:
        adapter: The model.
        observation: The released gradient g*.
        prior: The language model.
        start: The token that precedes every text for it, if any.
        bag: The tokens of the batch.
        prior_weight: Weight of nats per token.
    """

    def __init__(
        self,
        adapter,
        observation: Observation,
        prior: TextAdapter,
        start: int | None,
        bag: Bag,
        prior_weight: float,
    ):
        self.adapter, self.prior, self.start, self.prior_weight = adapter, prior, start, prior_weight
        self.needed = set(bag.ids.tolist()) if bag.exact else set()
        looked_up = adapter.select(observation.shared).through_lookup
        # Looked-up rows are no function of x alone, and have told what they can: the bag.
        observed = {
            name: tensor.to(adapter.device, adapter.dtype)
            for name, tensor in observation.gradient.items()
            if not (looked_up and name == adapter.lookup_table())
        }
        self.compared = bool(observed) and any(tensor.any() for tensor in observed.values())
        self.distance = LayerCosine(observed) if self.compared else None
        self.evaluations = 0

    def score(self, batches: list[list[Text]]) -> ScoredTexts:
        """Return the batch of least objective."""
        nats = self._nats(batches)
        distances = [self._gradient_distance(texts) for texts in batches]
        objectives = [
            d + self.prior_weight * n + len(self.needed.difference(*texts)) / max(1, len(self.needed))
            for d, n, texts in zip(distances, nats, batches, strict=True)
        ]
        best = min(range(len(batches)), key=objectives.__getitem__)
        return ScoredTexts(batches[best], objectives[best], distances[best])

    def _gradient_distance(self, texts: list[Text]) -> float:
        if not self.compared:
            return 1.0
        ids, layout = _padded(self.adapter, texts)
        targets = ids.masked_fill(layout["attention_mask"] == 0, IGNORE)
        names = tuple(self.distance.observed)
        guess, _ = gradient_of(self.adapter, self.adapter.embed(ids), targets, layout, names)
        self.evaluations += 1
        return self.distance(guess).item()

    @torch.no_grad()
    def _nats(self, batches: list[list[Text]]) -> list[float]:
        """Return -mean log p per token of each batch."""
        before = () if self.start is None else (self.start,)
        rows = [text if text[0] == self.start else (*before, *text) for texts in batches for text in texts]
        limit = self.prior.max_positions()
        rows = rows if limit is None else [row[:limit] for row in rows]
        ids, layout = _padded(self.prior, rows)
        predicted = layout["attention_mask"][:, 1:]
        logits = self.prior.logits(self.prior.embed(ids), layout)[:, :-1]
        nats = (F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none") * predicted).sum(1)
        per_token = nats / predicted.sum(1).clamp(min=1)
        return per_token.reshape(len(batches), -1).mean(1).tolist()


def _padded(adapter, texts: list[Text]) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Return (n, T) ids and their layout, padded on the right."""
    longest = max(map(len, texts))
    ids = torch.tensor([[*text, *[adapter.pad_id] * (longest - len(text))] for text in texts], device=adapter.device)
    lengths = torch.tensor([len(text) for text in texts], device=adapter.device)
    return ids, {"attention_mask": (torch.arange(longest, device=adapter.device) < lengths[:, None]).long()}
