"""GLEU of recovered texts, as an ``evaluate`` metric."""

from statistics import fmean

import datasets
import evaluate

from lmleak.metrics import text
from lmleak.metrics.words import words_and_punctuation


class GoogleBleu(evaluate.Metric):
    """Mean over the pairs of the sentence-level GLEU."""

    def _info(self):
        string = datasets.Value("string")
        return evaluate.MetricInfo(
            description="Sentence-level GLEU, min(precision, recall) over 1-4-grams of words and punctuation "
            "marks, averaged over the pairs. Not the corpus ratio of evaluate's own google_bleu.",
            citation="Wu et al. 2016, arXiv:1609.08144",
            inputs_description="""
Args:
    predictions: Recovered texts; predictions[i] is scored against references[i].
    references: Private texts, special tokens removed on both sides.
    max_order: Longest n-gram counted, 4 by default.
Returns:
    google_bleu: mean over the pairs in [0, 1], None if there is no pair.
""",
            features=datasets.Features({"predictions": string, "references": string}),
        )

    def _compute(self, predictions, references, max_order=4):
        scores = [
            text.google_bleu(words_and_punctuation(p), words_and_punctuation(r), max_order)
            for p, r in zip(predictions, references, strict=True)
        ]
        return {"google_bleu": fmean(scores) if scores else None}
