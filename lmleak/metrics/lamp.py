"""ROUGE as LAMP and DAGER print it, special tokens counted as words, to compare with published BERT figures.

Their texts are ``tokenizer.decode(ids)`` with special tokens kept, and ``rouge_score`` reads "[CLS]" and "[SEP]"
as the words "cls" and "sep": two unrelated seven-word sentences score ROUGE-1 = 2/9. Predictions are assigned by
the Hungarian method on 1 - ROUGE-1. Where we differ: the mean over texts is the plain one, not the middle of 1000
random resamples, and a reference without a prediction is scored against the empty text. DAGER's decoder runs let
one prediction serve several references; here none does.

Source: Balunovic et al. 2022, arXiv:2202.08827 (LAMP), whose evaluation code DAGER (arXiv:2405.15586) reuses.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from statistics import fmean

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from scipy.optimize import linear_sum_assignment

from lmleak.adapters.text import TextAdapter
from lmleak.errors import DataError
from lmleak.metrics.text import Rouge
from lmleak.types import Reconstruction, TextBatch


@dataclass(frozen=True)
class LampScores:
    """Mean ROUGE F-measures over the references, in [0, 1]; never to be mixed with those of ``score_text``."""

    rouge1: float
    rouge2: float
    rougeL: float
    per_example: tuple[Rouge, ...]
    """One per reference, in order."""

    @property
    def rouge1_plus_rouge2(self) -> float:
        """R-1 + R-2, in [0, 2]: the sum that the papers' logs select by."""
        return self.rouge1 + self.rouge2


def lamp_scores(reconstruction: Reconstruction, batch: TextBatch, adapter: TextAdapter) -> LampScores:
    """Score what an attack recovered as LAMP and DAGER do.

    A reconstruction and a batch hold no special tokens; the tokenizer's own (for BERT [CLS] and [SEP]) are put
    back around both, which gives the text that the papers decode from the model's input.

    Args:
        reconstruction: The attack's answer.
        batch: The truth.
        adapter: The model, for its tokenizer.

    Returns:
        The scores. Refused as ``DataError`` without references or without a tokenizer.
    """
    predictions = [with_special_tokens(ids, adapter) for ids in reconstruction.token_ids]
    return lamp_score_strings(predictions, [with_special_tokens(ids, adapter) for ids in batch.token_ids])


def lamp_score_strings(predictions: Sequence[str], references: Sequence[str]) -> LampScores:
    """Score texts that still hold their special tokens.

    Args:
        predictions: Recovered texts, any number, in any order.
        references: True texts.

    Returns:
        The scores.

    Raises:
        DataError: If there is no reference.
    """
    if not references:
        raise DataError("nothing to score against: expected at least one reference text, got none")
    scorer = RougeScorer(list(Rouge._fields), use_stemmer=False)
    score = np.zeros((len(references), len(predictions)))
    for row, reference in enumerate(references):
        for column, prediction in enumerate(predictions):
            score[row, column] = scorer.score(reference, prediction)["rouge1"].fmeasure
    assigned = dict(zip(*linear_sum_assignment(score, maximize=True), strict=True))
    examples = []
    for row, reference in enumerate(references):
        found = scorer.score(reference, predictions[assigned[row]] if row in assigned else "")
        examples.append(Rouge(*(float(found[kind].fmeasure) for kind in Rouge._fields)))
    return LampScores(*(fmean(values) for values in zip(*examples, strict=True)), per_example=tuple(examples))


def with_special_tokens(token_ids: Sequence[int], adapter: TextAdapter) -> str:
    """Return the text of tokens with the special tokens that the tokenizer puts around every text.

    Args:
        token_ids: Tokens without special ones.
        adapter: The model, for its tokenizer.

    Returns:
        For instance "[CLS] call me [SEP]"; the plain text where the tokenizer adds nothing (GPT-2).

    Raises:
        DataError: If the adapter has no tokenizer.
    """
    if adapter.tokenizer is None:
        raise DataError("this adapter has no tokenizer, so nothing says which special tokens surround a text")
    special, template = adapter.special_ids(), list(adapter.tokenizer("a")["input_ids"])
    opening = list(takewhile(special.__contains__, template))
    closing = list(takewhile(special.__contains__, reversed(template)))[::-1]
    return adapter.tokenizer.decode([*opening, *map(int, token_ids), *closing])
