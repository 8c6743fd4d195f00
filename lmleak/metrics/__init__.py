"""Scores of a reconstruction, agreement of two numbers over examples, and thin ``evaluate`` wrappers.

The functions in :mod:`lmleak.metrics.text` and :mod:`lmleak.metrics.agreement` are the truth; the wrappers
call them.
"""

from lmleak.metrics.agreement import Correlation, Interval, bootstrap_mean, rank_correlation
from lmleak.metrics.evaluate_modules import METRICS, load
from lmleak.metrics.matching import match
from lmleak.metrics.score import (
    ExampleScore,
    RecoveryScores,
    TextScore,
    score_strings,
    score_text,
    token_correctness,
)
from lmleak.metrics.text import (
    Rouge,
    embedding_rmse,
    exact_match,
    google_bleu,
    position_accuracy,
    rouge,
    token_f1,
    token_overlap,
    token_precision,
    token_recall,
)
from lmleak.metrics.words import WORDS, unicode_words, words_and_punctuation

__all__ = [
    "METRICS",
    "WORDS",
    "Correlation",
    "ExampleScore",
    "Interval",
    "RecoveryScores",
    "Rouge",
    "TextScore",
    "bootstrap_mean",
    "embedding_rmse",
    "exact_match",
    "google_bleu",
    "load",
    "match",
    "position_accuracy",
    "rank_correlation",
    "rouge",
    "score_strings",
    "score_text",
    "token_correctness",
    "token_f1",
    "token_overlap",
    "token_precision",
    "token_recall",
    "unicode_words",
    "words_and_punctuation",
]
