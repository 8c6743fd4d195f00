"""Texts that a language model finds likely, made of the tokens of a bag only: the first phase of FILM."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmleak.adapters.text import TextAdapter
from lmleak.attacks.lamp_moves import below

Text = tuple[int, ...]


@dataclass(frozen=True)
class BagBeams:
    """Beam search over sequences of bag tokens (Gupta et al. 2022, arXiv:2205.08514, section 4.2).

    The score of a sequence is sum_t log p(w_t | w_<t), less ``repetition`` nats whenever a token is used again, in
    this text or in one found before, because the bag does not tell multiplicities and every token of it was used. No
    pair of neighbours occurs twice in a text.
    """

    prior: TextAdapter
    """A causal language model over the same token ids."""
    bag: Tensor
    """(n,) token ids."""
    beams: int
    repetition: float
    start: int | None
    """The token that precedes every text, if the language model knows one."""

    def search(self, length: int, used: Tensor) -> tuple[Tensor, Tensor]:
        """Return the most likely sequences.

        Args:
            length: Tokens per sequence.
            used: (n,) how often texts found before hold each token of the bag.

        Returns:
            (k, length) token ids, k <= beams, best first, and (k,) scores in nats.
        """
        size = len(self.bag)
        chosen = torch.zeros(1, 0, dtype=torch.long, device=self.bag.device)  # places in the bag
        scores = torch.zeros(1, dtype=torch.float64, device=self.bag.device)
        for _ in range(length):
            counts = used + torch.stack([torch.bincount(row, minlength=size) for row in chosen])
            steps = self._log_probabilities(chosen) - self.repetition * counts
            steps = steps.masked_fill(_repeats_a_pair(chosen, size), -torch.inf)
            total = (scores[:, None] + steps).flatten()
            if not torch.isfinite(
                total
            ).any():  # every pair of neighbours is used: the bag is too small for a longer text
                break
            scores, best = total.topk(min(self.beams, int(torch.isfinite(total).sum())))
            chosen = torch.cat([chosen[best // size], (best % size)[:, None]], dim=1)
        return self.bag[chosen], scores

    @torch.no_grad()
    def _log_probabilities(self, chosen: Tensor) -> Tensor:
        """Return log p of every bag token as the next one, (k, n); equal for all where nothing precedes."""
        ids = self.bag[chosen]
        if self.start is not None:
            ids = torch.cat([ids.new_full((len(ids), 1), self.start), ids], dim=1)
        limit = self.prior.max_positions()
        ids = ids if limit is None else ids[:, -limit:]
        if not ids.shape[1]:
            return torch.zeros(len(ids), len(self.bag), dtype=torch.float64, device=self.bag.device)
        logits = self.prior.logits(self.prior.embed(ids), {"attention_mask": torch.ones_like(ids)})[:, -1]
        return logits.double().log_softmax(-1)[:, self.bag]


def _repeats_a_pair(chosen: Tensor, size: int) -> Tensor:
    """Return which next tokens would make a pair of neighbours that the sequence holds already, (k, n)."""
    repeats = torch.zeros(len(chosen), size, dtype=torch.bool, device=chosen.device)
    for t in range(1, chosen.shape[1]):
        same = chosen[:, t - 1] == chosen[:, -1]
        repeats[same, chosen[same, t]] = True
    return repeats


def edits(text: Text, bag: Sequence[int], count: int, lengths: range, generator: torch.Generator) -> list[Text]:
    """Return texts that differ from one in a single token: substituted, inserted or left out, in turns.

    Args:
        text: Token ids.
        bag: Token ids to choose from.
        count: How many are drawn; equal ones are returned once.
        lengths: Allowed lengths.
        generator: Draws them.

    Returns:
        At most ``count`` texts.
    """
    found = set()
    for kind in range(count):
        edited, place = list(text), below(len(text), generator)
        token = bag[below(len(bag), generator)]
        if kind % 4 == 1 and len(text) + 1 in lengths:
            edited.insert(below(len(text) + 1, generator), token)
        elif kind % 4 == 3 and len(text) - 1 in lengths:
            del edited[place]
        else:  # twice as often: lengths are roughly known
            edited[place] = token
        found.add(tuple(edited))
    return sorted(found - {tuple(text)})


def exchanges(
    first: Text, second: Text, count: int, lengths: range, generator: torch.Generator
) -> list[tuple[Text, Text]]:
    """Return pairs of texts that have exchanged one token, or their tails, in turns.

    Args:
        first: Token ids.
        second: Token ids of another text of the batch.
        count: How many are drawn.
        lengths: Allowed lengths; pairs of others are left out.
        generator: Draws the places.

    Returns:
        At most ``count`` pairs.
    """
    found = set()
    for kind in range(count):
        i, j = below(len(first), generator), below(len(second), generator)
        if kind % 2:
            pair = (first[:i] + second[j:], second[:j] + first[i:])
        else:
            pair = ((*first[:i], second[j], *first[i + 1 :]), (*second[:j], first[i], *second[j + 1 :]))
        found.add(pair)
    return sorted(pair for pair in found if all(len(text) in lengths for text in pair))
