"""ROUGE of recovered texts, as an ``evaluate`` metric."""

from statistics import fmean

import datasets
import evaluate

from lmleak.metrics import text


class TextRouge(evaluate.Metric):
    """Mean over the pairs of the ROUGE-1, ROUGE-2 and ROUGE-L F-measures, without stemmer or resampling."""

    def _info(self):
        string = datasets.Value("string")
        return evaluate.MetricInfo(
            description="ROUGE F-measures of recovered texts, averaged plainly over the pairs.",
            citation="Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries",
            inputs_description="""
Args:
    predictions: Recovered texts; predictions[i] is scored against references[i].
    references: Private texts, special tokens removed on both sides.
    words: "latin" (as rouge_score, default) or "unicode" (any script).
Returns:
    rouge1, rouge2, rougeL: means over the pairs in [0, 1], None if there is no pair.
""",
            features=datasets.Features({"predictions": string, "references": string}),
        )

    def _compute(self, predictions, references, words="latin"):
        scores = [text.rouge(p, r, words) for p, r in zip(predictions, references, strict=True)]
        return {
            name: fmean(getattr(score, name) for score in scores) if scores else None for name in text.Rouge._fields
        }
