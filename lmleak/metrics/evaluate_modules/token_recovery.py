"""Recovered token ids against private ones, as an ``evaluate`` metric."""

from statistics import fmean

import datasets
import evaluate

from lmleak.metrics import text

SCORES = {
    "token_precision": text.token_precision,
    "token_recall": text.token_recall,
    "token_f1": text.token_f1,
    "position_accuracy": text.position_accuracy,
    "exact_match": text.exact_match,
}


class TokenRecovery(evaluate.Metric):
    """Mean over the pairs of token precision, recall, F1 (multisets), position accuracy and exact match."""

    def _info(self):
        ids = datasets.Sequence(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description="Share of private tokens that an attack recovered, in order and as a multiset.",
            citation="",
            inputs_description="""
Args:
    predictions: Lists of recovered token ids; predictions[i] is scored against references[i].
    references: Lists of private token ids, special tokens and padding removed.
Returns:
    token_precision, token_recall, token_f1, position_accuracy, exact_match: means over the pairs in [0, 1],
    None if there is no pair.
""",
            features=datasets.Features({"predictions": ids, "references": ids}),
        )

    def _compute(self, predictions, references):
        pairs = list(zip(predictions, references, strict=True))
        return {
            name: fmean(score(prediction, reference) for prediction, reference in pairs) if pairs else None
            for name, score in SCORES.items()
        }
