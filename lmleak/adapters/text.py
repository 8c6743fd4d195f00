"""Language models: x is the output of the token-embedding table, (B, T, D).

x enters the model by a hook that replaces what the embedding module returns; the model is given token ids that
only carry the layout (padding where there is padding, one fixed filler elsewhere). This is the ``inputs_embeds``
path without its gaps: models that find padding or count positions from token ids keep working, and no family
needs code of its own. Before first use the adapter checks that logits from x equal logits from the true ids.
"""

import inspect
from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmleak.adapters.base import ModelAdapter, Prior
from lmleak.adapters.families import FAMILIES, POSITIONS_FROM_MASK
from lmleak.adapters.precision import KeepDouble
from lmleak.adapters.structure import attention_inputs, find_blocks, text_roles
from lmleak.errors import DataError, UnsupportedModelError
from lmleak.types import IGNORE, Batch, TextBatch

TEXT_TASKS = ("sequence-classification", "causal-lm", "masked-lm")
MASKING_PROBABILITY = 0.15  # Devlin et al. 2019, arXiv:1810.04805, section 3.1


class TextAdapter(ModelAdapter):
    """A transformers language model.

    Args:
        model: A model with an output head (``...ForSequenceClassification``, ``...ForCausalLM``, ``...ForMaskedLM``).
        tokenizer: Its tokenizer; None if batches are given as token ids.
        task: One of ``TEXT_TASKS``.
        name: Name for reports.
    """

    def __init__(self, model: nn.Module, tokenizer=None, *, task: str, name: str = ""):
        super().__init__(model, task=task, name=name or getattr(model, "name_or_path", "") or type(model).__name__)
        if not hasattr(self.model, "get_input_embeddings") or self.model.get_input_embeddings() is None:
            raise UnsupportedModelError(f"{type(model).__name__} has no token-embedding table, so x has no definition")
        if hasattr(self.model, "set_attn_implementation"):
            # Fused attention kernels have neither a double backward nor forward derivatives.
            self.model.set_attn_implementation("eager")
        self.tokenizer = tokenizer
        self.config = self.model.config
        self.embedding = self.model.get_input_embeddings()
        self.family = FAMILIES.get(self.config.model_type)
        self.blocks = find_blocks(self.model, getattr(self.config, "num_hidden_layers", None))
        self.pad_id = self._pad_id()
        self.config.pad_token_id = self.pad_id  # the private copy's: where classifiers look for the last token
        self._x: Tensor | None = None
        self._through_lookup = False
        self._parity_checked = False
        self.embedding.register_forward_hook(self._replace_embeddings)

    # The unknown -----------------------------------------------------------------------------------------

    def _replace_embeddings(self, module, arguments, looked_up: Tensor) -> Tensor | None:
        if self._x is None:
            return None
        # The difference is zero in value and carries the derivative of the looked-up rows.
        return self._x + (looked_up - looked_up.detach()) if self._through_lookup else self._x

    def embed(self, token_ids: Tensor) -> Tensor:
        """Return the embedding module's output for token ids of any shape, (..., D)."""
        with torch.no_grad():
            return self.embedding(token_ids.to(self.device))

    def table(self) -> Tensor:
        """Return the whole embedding table as the model consumes it, (V, D)."""
        return self.embed(torch.arange(self.embedding.num_embeddings))

    def input(self, batch: Batch) -> Tensor:
        """Return x0 = E[input_ids], (B, T, D)."""
        return self.embed(batch.inputs["input_ids"])

    def free(self, batch: Batch) -> Tensor:
        """Return True on every coordinate of a real token, False on padding, (B, T, D)."""
        mask = batch.layout["attention_mask"].bool()
        return mask[..., None].expand(*mask.shape, self.embedding.embedding_dim)

    def prior(self) -> Prior:
        """Return the mean (D,) and the coordinate standard deviation of the embedding table."""
        table = self.table()
        mean = table.mean(0)
        return Prior(mean, (table - mean).square().mean().sqrt().item())

    def nearest_tokens(self, x: Tensor) -> Tensor:
        """Return the token of highest cosine similarity for each position of x (..., D)."""
        table = self.table()
        usable = table.norm(dim=-1) > 0  # a padding row is often exactly zero and has no direction
        similarity = F.normalize(x, dim=-1) @ F.normalize(table, dim=-1).T
        return similarity.masked_fill(~usable, -torch.inf).argmax(-1)

    # The model as a function of x ------------------------------------------------------------------------

    def logits(
        self, x: Tensor, layout: Mapping[str, Tensor], parameters: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Return the logits for input x: (B, classes) or (B, T, V)."""
        mask = layout["attention_mask"]
        ids = torch.where(mask.bool(), self._filler_id(), self.pad_id)
        return self._run(ids, layout, parameters, x=x)

    def _run(self, ids, layout, parameters, x=None, through_lookup=False) -> Tensor:
        self._x, self._through_lookup = x, through_lookup
        arguments = {"input_ids": ids.to(self.device), **layout, **self._positions(layout)}
        keep_precision = KeepDouble() if self.dtype == torch.float64 else nullcontext()
        try:
            with keep_precision:
                return torch.func.functional_call(self.model, dict(parameters or {}), (), arguments).logits
        finally:
            self._x, self._through_lookup = None, False

    def _positions(self, layout) -> dict[str, Tensor]:
        """Return position_ids that skip left padding, for families that would count it; nothing otherwise."""
        mask = layout["attention_mask"]
        counts_padding = self.family is None or self.family.positions == POSITIONS_FROM_MASK
        if (
            not counts_padding
            or not _has_argument(self.model.forward, "position_ids")
            or bool((mask[:, 0] == 1).all())
        ):
            return {}
        return {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}

    def loss(
        self,
        x: Tensor,
        targets: Tensor,
        layout: Mapping[str, Tensor],
        parameters: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Return the mean cross-entropy, as the model's own loss computes it.

        Args:
            x: Embeddings (B, T, D).
            targets: (B,) classes or (B, T) tokens with ``IGNORE``; or probabilities (B, C) or (B, T, V), where a
                position of all zeros carries no loss. Causal targets are aligned with the inputs and shifted here.
            layout: attention_mask (B, T) and, for BERT, token_type_ids.
            parameters: Replacements by name.

        Returns:
            The loss in nats, averaged over examples (classification) or over target positions.
        """
        return self._cross_entropy(self.logits(x, layout, parameters), targets)

    def loss_through_lookup(self, batch: Batch, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return the same loss with the true ids looked up, so that the table's rows get their gradient."""
        logits = self._run(batch.inputs["input_ids"], batch.layout, parameters, x=x, through_lookup=True)
        return self._cross_entropy(logits, batch.targets)

    def _cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        if self.task == "causal-lm":
            logits, targets = logits[:, :-1], targets[:, 1:]
        logits = logits.reshape(-1, logits.shape[-1])
        if not targets.is_floating_point():
            return F.cross_entropy(logits, targets.reshape(-1), ignore_index=IGNORE)
        targets = targets.reshape(-1, logits.shape[-1])
        weight = targets.sum()  # number of positions with a target, if each sums to one
        return -(targets * logits.log_softmax(-1)).sum() / weight

    # Batches ---------------------------------------------------------------------------------------------

    def batch(
        self,
        examples: Sequence[str] | Sequence[Sequence[int]],
        labels=None,
        *,
        max_length: int | None = None,
        padding_side: str = "right",
        seed: int = 0,
    ) -> TextBatch:
        """Return a padded batch.

        Args:
            examples: Texts, or token-id sequences that already hold their special tokens.
            labels: Classes, for sequence classification only.
            max_length: Truncate longer texts to this many tokens; by default a text longer than the model's
                positions is refused.
            padding_side: "right" or "left".
            seed: Chooses the masked positions of a masked LM.

        Returns:
            The batch on the model's device.

        Raises:
            DataError: On empty or too long text, wrong labels, or ids outside the vocabulary.
        """
        if isinstance(examples, str) or not len(examples):
            raise DataError("expected a non-empty list of texts, got " + ("one string" if examples else "nothing"))
        if padding_side not in ("right", "left"):
            raise DataError(f"padding_side must be 'right' or 'left', got {padding_side!r}")
        sequences = [self._token_ids(i, example, max_length) for i, example in enumerate(examples)]
        length = max(map(len, sequences))
        ids = torch.full((len(sequences), length), self.pad_id)
        mask = torch.zeros_like(ids)
        for row, sequence in enumerate(sequences):
            where = slice(0, len(sequence)) if padding_side == "right" else slice(length - len(sequence), length)
            ids[row, where], mask[row, where] = torch.tensor(sequence), 1
        ids, targets = self._targets(ids, mask, labels, seed)
        layout = {"attention_mask": mask.to(self.device)}
        if getattr(self.config, "type_vocab_size", 0) and _has_argument(self.model.forward, "token_type_ids"):
            layout["token_type_ids"] = torch.zeros_like(layout["attention_mask"])
        special = self.special_ids()
        private = tuple(tuple(t for t in sequence if t not in special) for sequence in sequences)
        batch = TextBatch(
            inputs={"input_ids": ids.to(self.device)}, targets=targets.to(self.device), layout=layout,
            texts=tuple(self.decode(t) for t in private), token_ids=private,
        )  # fmt: skip
        self._check_parity(batch)
        return batch

    def _token_ids(self, index: int, example, max_length: int | None) -> list[int]:
        if isinstance(example, str):
            if self.tokenizer is None:
                raise DataError("this adapter has no tokenizer; pass tokenizer=, or token ids instead of texts")
            if not example.strip():
                raise DataError(f"text {index} is empty; there is nothing to protect or to recover in it")
            sequence = list(self.tokenizer(example, add_special_tokens=True)["input_ids"])
        else:
            sequence = [int(t) for t in example]
        if max_length is not None and len(sequence) > max_length:
            closing = sequence[-1:] if sequence[-1] in self.special_ids() else []
            sequence = sequence[: max_length - len(closing)] + closing
        limit = self.max_positions()
        if limit is not None and len(sequence) > limit:
            raise DataError(
                f"text {index} has {len(sequence)} tokens, the model has {limit} positions; shorten it or pass max_length="
            )
        if not set(sequence) - self.special_ids():
            raise DataError(f"text {index} has no token besides special ones; there is nothing to recover in it")
        if outside := [t for t in sequence if not 0 <= t < self.embedding.num_embeddings]:
            raise DataError(
                f"text {index} holds token id {outside[0]}, but the embedding table has "
                f"{self.embedding.num_embeddings} rows; is the tokenizer this model's?"
            )
        if self.task == "causal-lm" and len(sequence) < 2:
            raise DataError(f"text {index} has one token; a causal language model needs two to have a loss")
        return sequence

    def _targets(self, ids: Tensor, mask: Tensor, labels, seed: int) -> tuple[Tensor, Tensor]:
        if self.task == "sequence-classification":
            return ids, self.check_labels(labels, len(ids), self.config.num_labels)
        if labels is not None:
            raise DataError(f"task {self.task!r} takes its targets from the text; drop labels=")
        if self.task == "causal-lm":
            # A first token behind left padding would be predicted from padding; like any first token it has no loss.
            after_padding = F.pad(mask, (1, 0), value=1)[:, :-1] == 0
            return ids, ids.masked_fill((mask == 0) | after_padding, IGNORE)
        if self.tokenizer is None or self.tokenizer.mask_token_id is None:
            raise DataError("a masked language model needs a tokenizer with a mask token")
        special = torch.isin(ids, torch.tensor(sorted(self.special_ids())))
        scores = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed))
        scores = scores.masked_fill(special | (mask == 0), 2.0)
        # At least one position per text, so that every text has a loss. Every chosen position becomes the mask
        # token (no random or kept tokens): the plain form of the objective.
        chosen = (scores < MASKING_PROBABILITY) | (scores == scores.min(-1, keepdim=True).values)
        return ids.masked_fill(chosen, self.tokenizer.mask_token_id), ids.masked_fill(~chosen, IGNORE)

    def _check_parity(self, batch: TextBatch) -> None:
        """Refuse, once, a model in which the token ids act other than through the embedding table."""
        if self._parity_checked:
            return
        with torch.no_grad():
            from_ids = self._run(batch.inputs["input_ids"], batch.layout, None)
            from_x = self.logits(self.input(batch), batch.layout)
        if from_ids.dim() == 3:
            real = batch.layout["attention_mask"].bool()
            from_ids, from_x = from_ids[real], from_x[real]
        error = (from_ids - from_x).abs().max() / from_ids.abs().max().clamp(min=1e-30)
        if not error < 1e-4:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} computes different logits from embeddings than from token ids (relative "
                f"difference {error:.1e}): it uses the ids elsewhere too, so x does not determine the loss"
            )
        self._parity_checked = True

    # Tokens ----------------------------------------------------------------------------------------------

    def _pad_id(self) -> int:
        for source in (self.tokenizer, self.config):
            for attribute in ("pad_token_id", "eos_token_id"):
                value = getattr(source, attribute, None)
                value = value[0] if isinstance(value, list) else value
                if value is not None and 0 <= value < self.embedding.num_embeddings:
                    return value
        return 0

    def _filler_id(self) -> int:
        special = self.special_ids() | {self.pad_id}
        return next(i for i in range(self.embedding.num_embeddings) if i not in special)

    def special_ids(self) -> set[int]:
        """Return the ids of special tokens, which carry no private text; the mask token counts as text."""
        if self.tokenizer is None:
            return set()
        return set(self.tokenizer.all_special_ids) - {
            self.tokenizer.mask_token_id,
            self.tokenizer.unk_token_id,
        }

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return text, special tokens removed; without a tokenizer, the ids in words."""
        special = self.special_ids()
        kept = [int(t) for t in token_ids if int(t) not in special]
        if self.tokenizer is None:
            return " ".join(map(str, kept))
        return self.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()

    def token_strings(self, token_ids: Sequence[int]) -> list[str]:
        """Return one display string per token."""
        if self.tokenizer is None:
            return [str(int(t)) for t in token_ids]
        return [self.tokenizer.decode([int(t)]) or f"<{int(t)}>" for t in token_ids]

    def max_positions(self) -> int | None:
        """Return how many tokens the model accepts, or None if it states no limit."""
        limit = getattr(self.config, "max_position_embeddings", None) or getattr(self.config, "n_positions", None)
        if limit is None:
            return None
        return limit - (self.family.reserved_positions(self.config) if self.family else 0)

    # Structure -------------------------------------------------------------------------------------------

    def lookup_table(self) -> str | None:
        """Return the name of the word-embedding table."""
        table = self.embedding.weight
        return next((name for name, p in self.model.named_parameters() if p is table), None)

    def lookup_table_is_tied(self) -> bool:
        """Return whether the output head is the word-embedding table."""
        head = self.model.get_output_embeddings()
        return head is not None and head.weight is self.embedding.weight

    def roles(self) -> dict[str, tuple[str, ...]]:
        """Return parameter names by role: "embeddings", "block i", "head"."""
        return text_roles(self.model, list(self.parameters()), self.blocks)

    def attention_inputs(self, block: int) -> tuple[str, ...]:
        """Return the module paths of the linear maps that read a block's attention input."""
        if block >= len(self.blocks):
            raise UnsupportedModelError(
                f"{self.name} has {len(self.blocks)} recognised blocks, asked for block {block}"
            )
        layout = {"attention_mask": torch.ones(1, 3, dtype=torch.long, device=self.device)}
        ids = torch.full((1, 3), self._filler_id())
        with torch.no_grad():
            return attention_inputs(self.model, self.blocks[block], lambda: self._run(ids, layout, None))


def _has_argument(function, argument: str) -> bool:
    return argument in inspect.signature(function).parameters
