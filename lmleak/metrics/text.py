"""What an attack got right, as plain functions of one prediction and its reference.

All but the two errors (of embeddings, and the edit distance) lie in [0, 1] and follow one convention: a prediction
equal to its reference scores 1, also when both are empty; otherwise an empty prediction or reference scores 0. Special
tokens and padding must be removed first: [CLS] and [SEP] left in both texts give two unrelated seven-word
sentences a ROUGE-1 of 2/9 (published BERT figures carry that floor).
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer

from lmleak.metrics.words import word_splitter

Tokens = Sequence[Hashable]


def token_overlap(prediction: Tokens, reference: Tokens) -> int:
    """Return sum_v min(count of v in the prediction, count of v in the reference), v over the vocabulary."""
    return (Counter(prediction) & Counter(reference)).total()


def token_precision(prediction: Tokens, reference: Tokens) -> float:
    """Return overlap / len(prediction): the share of predicted tokens in the reference, as multisets."""
    return _ratio(token_overlap(prediction, reference), len(prediction), prediction, reference)


def token_recall(prediction: Tokens, reference: Tokens) -> float:
    """Return overlap / len(reference): the share of reference tokens that were predicted, as multisets."""
    return _ratio(token_overlap(prediction, reference), len(reference), prediction, reference)


def token_f1(prediction: Tokens, reference: Tokens) -> float:
    """Return 2 overlap / (len(prediction) + len(reference)), the harmonic mean of precision and recall."""
    size = len(prediction) + len(reference)
    return _ratio(2 * token_overlap(prediction, reference), size, prediction, reference)


def position_accuracy(prediction: Tokens, reference: Tokens) -> float:
    """Return the share of reference positions i with prediction[i] = reference[i].

    Positions count from the first token. A position that the prediction does not reach is wrong. Tokens
    past the end of the reference are no position of it: they cost token precision and the exact match, not
    this number.
    """
    right = sum(p == r for p, r in zip(prediction, reference, strict=False))
    return _ratio(right, len(reference), prediction, reference)


def exact_match(prediction: Tokens, reference: Tokens) -> float:
    """Return 1 if the two sequences are the same tokens in the same order, else 0."""
    return float(list(prediction) == list(reference))


def edit_distance(prediction: Tokens, reference: Tokens) -> float:
    """Return the normalised edit distance ``d(p, r) / max(len p, len r)``: 0 is a perfect recovery, 1 the worst.

    d is the least number of tokens inserted, deleted or replaced that turns one sequence into the other:
    ``d[i, j] = min(d[i-1, j] + 1, d[i, j-1] + 1, d[i-1, j-1] + [p_i != r_j])`` with d[i, 0] = i and d[0, j] = j.

    Source: Levenshtein 1966; Wagner and Fischer 1974 for the recursion.

    Args:
        prediction: Recovered tokens.
        reference: True tokens.

    Returns:
        The distance, symmetric in its two sequences; 0 if both are empty, 1 if one is.
    """
    if not len(prediction) and not len(reference):
        return 0.0
    row = list(range(len(reference) + 1))  # d[i, :] for growing i
    for i, predicted in enumerate(prediction, 1):
        before, row[0] = row[0], i
        for j, true in enumerate(reference, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (predicted != true))
    return row[-1] / max(len(prediction), len(reference))


def google_bleu(prediction: Tokens, reference: Tokens, max_order: int = 4) -> float:
    """Return the sentence-level GLEU, min(precision, recall) over all n-grams of 1 to ``max_order`` tokens.

    ``matches / max(n-grams in the prediction, n-grams in the reference)``, matches counted as multisets.

    Source: Wu et al. 2016, arXiv:1609.08144, section 5. ``nltk.translate.gleu_score.sentence_gleu`` is
    the same except that it gives 0 when both are empty. A set of sentences is scored by the plain mean over
    sentences, not by the ratio of summed counts that ``corpus_gleu`` and ``evaluate``'s google_bleu use.

    Args:
        prediction: Recovered tokens.
        reference: True tokens.
        max_order: Longest n-gram counted.

    Returns:
        The score in [0, 1], symmetric in its two sequences.
    """
    predicted, true = (_ngrams(tokens, max_order) for tokens in (prediction, reference))
    matches = (predicted & true).total()
    return _ratio(matches, max(predicted.total(), true.total()), prediction, reference)


class Rouge(NamedTuple):
    """ROUGE F-measures of one pair, in [0, 1]."""

    rouge1: float
    """Over words."""
    rouge2: float
    """Over pairs of adjacent words."""
    rougeL: float
    """Over the longest common subsequence of words."""


def rouge(prediction: str, reference: str, words: str = "latin") -> Rouge:
    """Return the ROUGE-1, ROUGE-2 and ROUGE-L F-measures, ``2 P R / (P + R)``, without stemmer.

    Source: Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries". Computed by ``rouge_score``,
    with two differences: a reference without any [a-z0-9] is cut by
    :func:`lmleak.metrics.words.word_splitter` into words of its own script (``rouge_score`` gives 0
    whatever was recovered), and equal lists of words score 1 in all three (``rouge_score`` gives
    ROUGE-2 = 0 for a perfectly recovered single word).

    Args:
        prediction: Recovered text.
        reference: True text.
        words: How texts are cut: "latin" (that of ``rouge_score``) or "unicode" (any script).

    Returns:
        The three F-measures.
    """
    split = word_splitter(reference, words)
    if split(prediction) == split(reference):
        return Rouge(1.0, 1.0, 1.0)
    scorer = RougeScorer(list(Rouge._fields), tokenizer=_Splitter(split))
    scores = scorer.score(target=reference, prediction=prediction)
    return Rouge(*(float(scores[kind].fmeasure) for kind in Rouge._fields))


def embedding_rmse(prediction, reference) -> float | None:
    """Return ``sqrt(||x' - x||^2 / (T D))``, the error per coordinate of one recovered sequence.

    In units of x, so it compares with ``rms`` of an influence number (never with ``l2``).

    Args:
        prediction: Recovered embeddings (T', D), or None if the attack gave none.
        reference: True embeddings (T, D).

    Returns:
        The error, or None where it is not defined: no prediction, other length, no coordinate, or an attack
        that diverged to NaN or Inf.
    """
    return pooled_rmse([squared_error(prediction, reference)])


class SquaredError(NamedTuple):
    """The two sums an RMSE is the root of the ratio of, so that several sequences can be pooled."""

    sum: float
    """||x' - x||^2."""
    coordinates: int
    """T D."""


def squared_error(prediction, reference) -> SquaredError | None:
    """Return ``||x' - x||^2`` and T D, or None where :func:`embedding_rmse` is not defined."""
    if prediction is None:
        return None
    recovered, true = (torch.as_tensor(x).detach().to("cpu", torch.float64) for x in (prediction, reference))
    if recovered.shape != true.shape or not true.numel() or not torch.isfinite(recovered).all():
        return None
    return SquaredError((recovered - true).square().sum().item(), true.numel())


def pooled_rmse(errors: Sequence[SquaredError | None]) -> float | None:
    """Return the error per coordinate over several sequences together; None if any or all are missing."""
    if not errors or any(error is None for error in errors):
        return None
    return (sum(error.sum for error in errors) / sum(error.coordinates for error in errors)) ** 0.5


class _Splitter(Tokenizer):
    """What RougeScorer asks of a tokenizer."""

    def __init__(self, split):
        self.split = split

    def tokenize(self, text):
        """Return the words of a text."""
        return self.split(text)


def _ngrams(tokens: Tokens, max_order: int) -> Counter:
    return Counter(
        tuple(tokens[start : start + order])
        for order in range(1, max_order + 1)
        for start in range(len(tokens) - order + 1)
    )


def _ratio(part: int, whole: int, prediction: Tokens, reference: Tokens) -> float:
    """Return part / whole by the module's convention for empty sequences."""
    if not len(prediction) or not len(reference):
        return float(len(prediction) == len(reference))
    return part / whole
