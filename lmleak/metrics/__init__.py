"""Scores of a reconstruction, agreement of two numbers over examples, and thin ``evaluate`` wrappers.

The functions in :mod:`lmleak.metrics.text` and :mod:`lmleak.metrics.agreement` are the truth; the wrappers
call them.
"""

from lmleak.metrics.agreement import (
    Correlation,
    Interval,
    PairedDifference,
    bootstrap_mean,
    paired_bootstrap,
    rank_correlation,
    strongest_correlation,
)
from lmleak.metrics.calibration import calibration_error
from lmleak.metrics.entities import entities, entity_recall
from lmleak.metrics.evaluate_modules import METRICS, load
from lmleak.metrics.image import mse, psnr, ssim
from lmleak.metrics.image_score import ImageExampleScore, ImageScore, match_images, score_images
from lmleak.metrics.lamp import LampScores, lamp_score_strings, lamp_scores, with_special_tokens
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
    edit_distance,
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
    "ImageExampleScore",
    "ImageScore",
    "Interval",
    "LampScores",
    "PairedDifference",
    "RecoveryScores",
    "Rouge",
    "TextScore",
    "bootstrap_mean",
    "calibration_error",
    "edit_distance",
    "embedding_rmse",
    "entities",
    "entity_recall",
    "exact_match",
    "google_bleu",
    "lamp_score_strings",
    "lamp_scores",
    "load",
    "match",
    "match_images",
    "mse",
    "paired_bootstrap",
    "position_accuracy",
    "psnr",
    "rank_correlation",
    "rouge",
    "score_images",
    "score_strings",
    "score_text",
    "ssim",
    "strongest_correlation",
    "token_correctness",
    "token_f1",
    "token_overlap",
    "token_precision",
    "token_recall",
    "unicode_words",
    "with_special_tokens",
    "words_and_punctuation",
]
