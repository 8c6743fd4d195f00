"""A causal language model as an attacker's prior over texts."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from lmleak.adapters.load import load_adapter
from lmleak.adapters.text import TextAdapter
from lmleak.errors import ConfigError

TEXTS_TOGETHER = 64


class LanguagePrior:
    """Scores texts by a causal language model, through its own tokenizer.

    Args:
        adapter: A causal language model with a tokenizer.
    """

    def __init__(self, adapter: TextAdapter):
        self.adapter = adapter
        tokenizer = adapter.tokenizer
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        self.start = [] if start is None else [start]

    @torch.no_grad()
    def nats_per_token(self, texts: Sequence[str]) -> Tensor:
        """Return the log-perplexity of each text, (K,): ``-mean_t log p(w_t | w_<t)`` in nats.

        Args:
            texts: Any texts.

        Returns:
            The log-perplexities; log V, that of the uniform model, for a text without tokens.
        """
        parts = [self._together(texts[i : i + TEXTS_TOGETHER]) for i in range(0, len(texts), TEXTS_TOGETHER)]
        return torch.cat(parts)

    def _together(self, texts: Sequence[str]) -> Tensor:
        adapter, limit = self.adapter, self.adapter.max_positions()
        rows = [self.start + adapter.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        rows = [torch.tensor(row[:limit], dtype=torch.long, device=adapter.device) for row in rows]
        longest = max(2, *(len(row) for row in rows))
        ids = torch.stack([F.pad(row, (0, longest - len(row)), value=adapter.pad_id) for row in rows])
        mask = torch.stack([torch.arange(longest, device=adapter.device) < len(row) for row in rows]).long()
        logits = adapter.logits(adapter.embed(ids), {"attention_mask": mask})[:, :-1]
        nats = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none") * mask[:, 1:]
        predicted = mask[:, 1:].sum(1)
        uniform = torch.full_like(nats[:, 0], adapter.vocabulary_size).log()
        return torch.where(predicted > 0, nats.sum(1) / predicted.clamp(min=1), uniform)


@lru_cache(maxsize=2)
def load_prior(name: str, device: torch.device) -> LanguagePrior:
    """Return the prior made of a model by name, kept for the next attack.

    Args:
        name: A causal language model, by a name that ``load_adapter`` takes.
        device: Where it runs.

    Returns:
        The prior.

    Raises:
        ConfigError: If it is no causal language model or has no tokenizer.
    """
    adapter = load_adapter(name, device=str(device))
    if adapter.task != "causal-lm" or adapter.tokenizer is None:
        lacks = "a tokenizer" if adapter.task == "causal-lm" else f"the task: it is a model for {adapter.task}"
        raise ConfigError(
            f"prior={name!r} must be a causal language model with its tokenizer, and lacks {lacks}; "
            "write for instance prior='reference-gpt2'"
        )
    return LanguagePrior(adapter)
