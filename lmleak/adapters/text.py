"""Language models: x is the output of the token-embedding table, (B, T, D).

x enters the model by a hook that replaces what the embedding module returns; the model is given token ids that
only carry the layout (padding where there is padding, one fixed filler elsewhere). This is the ``inputs_embeds``
path without its gaps: models that find padding or count positions from token ids keep working, and no family
needs code of its own. Before first use the adapter checks that logits from x equal logits from the true ids.
"""

import inspect
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmleak.adapters.base import ModelAdapter, Prior
from lmleak.adapters.checks import check_padding, check_parity, refuse_other_losses, refuse_undefined_input
from lmleak.adapters.examples import example_list, pad, token_ids, truncate
from lmleak.adapters.families import FAMILIES, POSITIONS_FROM_MASK
from lmleak.adapters.precision import KeepDouble
from lmleak.adapters.structure import attention_inputs, find_blocks, position_padding, sees_ahead, text_roles
from lmleak.adapters.targets import causal_targets, cross_entropy, masked_targets, token_labels
from lmleak.errors import DataError, UnsupportedModelError
from lmleak.types import Batch, TextBatch


class TextAdapter(ModelAdapter):
    """A transformers language model.

    Args:
        model: A model with the output head of a task.
        tokenizer: Its tokenizer; None if batches are given as token ids.
        task: One of ``TEXT_TASKS``.
        name: Name for reports.
    """

    def __init__(self, model: nn.Module, tokenizer=None, *, task: str, name: str = ""):
        super().__init__(model, task=task, name=name or getattr(model, "name_or_path", "") or type(model).__name__)
        refuse_undefined_input(self.model)
        if task == "sequence-classification":
            refuse_other_losses(self.model)
        if hasattr(self.model, "set_attn_implementation"):
            # Fused attention kernels have neither a double backward nor forward derivatives.
            self.model.set_attn_implementation("eager")
        if getattr(self.model.config, "_experts_implementation", None) == "grouped_mm":
            self.model.set_experts_implementation("eager")  # the grouped kernel has no float64
        self.tokenizer = tokenizer
        self.config = self.model.config
        self.embedding = self.model.get_input_embeddings()
        self.family = FAMILIES.get(self.config.model_type)
        self.blocks = find_blocks(self.model, getattr(self.config, "num_hidden_layers", None))
        self._attention_inputs: dict[int, tuple[str, ...]] = {}
        self.position_padding = position_padding(self.model)
        self.vocabulary_size, self.width = self.embedding.weight.shape
        self.pad_id = self._pad_id()
        # The private copy's: where classifiers look for the last token, and outputs by name.
        self.config.pad_token_id, self.config.return_dict = self.pad_id, True
        self._x: Tensor | None = None
        self._through_lookup = False
        self._parity_checked = False
        self._padding_checked: set[str] = set()
        self.embedding.register_forward_hook(self._replace_embeddings)

    # The unknown -----------------------------------------------------------------------------------------

    def _replace_embeddings(self, module, arguments, looked_up: Tensor) -> Tensor | None:
        if self._x is None:
            return None
        if looked_up.shape != self._x.shape:
            raise DataError(
                f"x is shaped {tuple(self._x.shape)}, but {type(self.model).__name__} embeds these tokens as "
                f"{tuple(looked_up.shape)}: a wrong x, or a model that rearranges its input"
            )
        # The difference is zero in value and carries the derivative of the looked-up rows.
        x = self._x.clone()  # for models that write into what they were given
        return x + (looked_up - looked_up.detach()) if self._through_lookup else x

    def embed(self, token_ids: Tensor) -> Tensor:
        """Return the embedding module's output for token ids of any shape, (..., D)."""
        with torch.no_grad():
            return self.embedding(token_ids.to(self.device))

    def table(self) -> Tensor:
        """Return the whole embedding table as the model consumes it, (V, D)."""
        return self.embed(torch.arange(self.vocabulary_size))

    def input(self, batch: Batch) -> Tensor:
        """Return x0 = E[input_ids], (B, T, D)."""
        return self.embed(batch.inputs["input_ids"])

    def free(self, batch: Batch) -> Tensor:
        """Return True on every coordinate of a real token, False on padding, (B, T, D)."""
        mask = batch.layout["attention_mask"].bool()
        return mask[..., None].expand(*mask.shape, self.width)

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
        """Return the logits for input x: (B, classes), (B, T, classes) or (B, T, V)."""
        mask = layout["attention_mask"]
        ids = torch.where(mask.bool(), self._filler_id(), self.pad_id)
        return self._run(ids, layout, parameters, x=x)

    def logits_from_ids(self, batch: Batch) -> Tensor:
        """Return the logits that the model computes from the true token ids."""
        return self._run(batch.inputs["input_ids"], batch.layout, None)

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
        automatic = self.family is not None and self.family.positions != POSITIONS_FROM_MASK
        # A table with a row for padding is read at positions that the model counts itself (RoBERTa and its kin).
        automatic = automatic or self.position_padding is not None
        if automatic or not self._accepts("position_ids") or bool((mask[:, 0] == 1).all()):
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
            targets: (B,) classes, or (B, T) classes or tokens with ``IGNORE``; or probabilities on a last axis (C, V),
                where a position of all zeros has no loss. Causal targets are aligned with the inputs and shifted here.
            layout: attention_mask (B, T) and, for BERT, token_type_ids.
            parameters: Replacements by name.

        Returns:
            The loss in nats, averaged over examples (classification) or over target positions.
        """
        return cross_entropy(self.task, self.logits(x, layout, parameters), targets)

    def loss_through_lookup(self, batch: Batch, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return the same loss with the true ids looked up, so that the table's rows get their gradient."""
        logits = self._run(batch.inputs["input_ids"], batch.layout, parameters, x=x, through_lookup=True)
        return cross_entropy(self.task, logits, batch.targets)

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
            labels: Classes, for classification: one per text, or a list of one per token (special ones: ``IGNORE``).
            max_length: Truncate longer texts to this many tokens; by default a text longer than the model's
                positions is refused.
            padding_side: "right" or "left".
            seed: Chooses the masked positions of a masked LM.

        Returns:
            The batch on the model's device. ``DataError`` on empty or too long text, wrong labels or ids outside the
            vocabulary; ``UnsupportedModelError`` or ``UnsupportedCombinationError`` where the model is not a
            function of x, or not of x alone when padded.
        """
        sequences = [self._token_ids(i, example, max_length) for i, example in enumerate(example_list(examples))]
        ids, mask = pad(sequences, self.pad_id, padding_side)
        ids, targets = self._targets(ids, mask, labels, seed)
        layout = {"attention_mask": mask.to(self.device)}
        if getattr(self.config, "type_vocab_size", 0) and self._accepts("token_type_ids"):
            layout["token_type_ids"] = torch.zeros_like(layout["attention_mask"])
        special = self.special_ids()
        private = tuple(tuple(t for t in sequence if t not in special) for sequence in sequences)
        batch = TextBatch(
            inputs={"input_ids": ids.to(self.device)}, targets=targets.to(self.device), layout=layout,
            texts=tuple(self.decode(t) for t in private), token_ids=private,
        )  # fmt: skip
        self._check_once(batch, padding_side)
        return batch

    def _token_ids(self, index: int, example, max_length: int | None) -> list[int]:
        sequence = truncate(token_ids(index, example, self.tokenizer), max_length, self.special_ids())
        limit = self.max_positions()
        if limit is not None and len(sequence) > limit:
            raise DataError(
                f"text {index} has {len(sequence)} tokens, the model has {limit} positions; shorten it or pass "
                "max_length="
            )
        if not set(sequence) - self.special_ids():
            raise DataError(f"text {index} has no token besides special ones; there is nothing to recover in it")
        if outside := [t for t in sequence if not 0 <= t < self.vocabulary_size]:
            raise DataError(
                f"text {index} holds token id {outside[0]}, but the embedding table has "
                f"{self.vocabulary_size} rows; is the tokenizer this model's?"
            )
        if self.task == "causal-lm" and len(sequence) < 2:
            raise DataError(f"text {index} has one token; a causal language model needs two to have a loss")
        return sequence

    def _targets(self, ids: Tensor, mask: Tensor, labels, seed: int) -> tuple[Tensor, Tensor]:
        if self.task == "sequence-classification":
            return ids, self.check_labels(labels, len(ids), self.config.num_labels)
        if self.task == "token-classification":
            return ids, token_labels(labels, mask, self.config.num_labels)
        if labels is not None:
            raise DataError(f"task {self.task!r} takes its targets from the text; drop labels=")
        if self.task == "causal-lm":
            return ids, causal_targets(ids, mask)
        if self.tokenizer is None or self.tokenizer.mask_token_id is None:
            raise DataError("a masked language model needs a tokenizer with a mask token")
        return masked_targets(ids, mask, self.special_ids(), self.tokenizer.mask_token_id, seed)

    def _check_once(self, batch: TextBatch, side: str) -> None:
        """Check parity and padding at first use; parity also where a text holds the padding token.

        Models that find padding or count positions by token id would take such a token for padding.
        """
        ids, real = batch.inputs["input_ids"], batch.layout["attention_mask"].bool()
        if not self._parity_checked or bool((ids[real] == self.pad_id).any()):
            check_parity(self, batch)
            self._parity_checked = True
        if side not in self._padding_checked and not bool(real.all()):
            check_padding(self, batch, side)
            self._padding_checked.add(side)

    # Tokens ----------------------------------------------------------------------------------------------

    def _pad_id(self) -> int:
        for source in (self.tokenizer, self.config):
            for attribute in ("pad_token_id", "eos_token_id"):
                value = getattr(source, attribute, None)
                value = value[0] if isinstance(value, list) else value
                if value is not None and 0 <= value < self.embedding.weight.shape[0]:
                    return value
        return 0

    def _filler_id(self) -> int:
        special = self.special_ids() | {self.pad_id}
        return next(i for i in range(self.vocabulary_size) if i not in special)

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
        if limit is None or limit <= 0:  # XLNet says -1
            return None
        return limit - (0 if self.position_padding is None else self.position_padding + 1)

    def _accepts(self, argument: str) -> bool:
        """Return whether the model's forward takes an argument; PEFT wrappers hide theirs behind ``**kwargs``."""
        model = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        return argument in inspect.signature(model.forward).parameters

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

    @cached_property
    def is_causal(self) -> bool:
        """Whether every position sees only the tokens before it; True without recognised blocks."""
        special = self.special_ids() | {self.pad_id}
        words = sorted(range(self.vocabulary_size), key=special.__contains__)[:5]  # special ones if need be
        layout = {"attention_mask": torch.ones(1, 4, dtype=torch.long, device=self.device)}

        def run(last: int):
            with torch.no_grad():
                self._run(torch.tensor([[*words[:3], words[3 + last]]]), layout, None)

        return not self.blocks or not sees_ahead(self.model, self.blocks[0], run)

    def attention_inputs(self, block: int) -> tuple[str, ...]:
        """Return the module paths of the linear maps that read a block's attention input."""
        if block not in self._attention_inputs:
            self._attention_inputs[block] = self._find_attention_inputs(block)
        return self._attention_inputs[block]

    def _find_attention_inputs(self, block: int) -> tuple[str, ...]:
        if block >= len(self.blocks):
            raise UnsupportedModelError(
                f"{self.name} has {len(self.blocks)} recognised blocks, asked for block {block}"
            )
        layout = {"attention_mask": torch.ones(1, 3, dtype=torch.long, device=self.device)}
        ids = torch.full((1, 3), self._filler_id())
        with torch.no_grad():
            return attention_inputs(self.model, self.blocks[block], lambda: self._run(ids, layout, None))
