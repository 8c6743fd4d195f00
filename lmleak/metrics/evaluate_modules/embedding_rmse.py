"""Error of recovered embeddings, as an ``evaluate`` metric."""

import datasets
import evaluate

from lmleak.metrics import text


class EmbeddingRmse(evaluate.Metric):
    """Root mean square error per coordinate over all sequences together, in units of x."""

    def _info(self):
        matrix = datasets.Sequence(datasets.Sequence(datasets.Value("float64")))
        return evaluate.MetricInfo(
            description="Error per coordinate of recovered embeddings, pooled over sequences; compares with "
            "the rms of an inversion influence.",
            citation="",
            inputs_description="""
Args:
    predictions: Recovered embeddings per sequence, (T_i, D); predictions[i] is scored against references[i].
    references: True embeddings per sequence, (T_i, D).
Returns:
    embedding_rmse: error per coordinate, None if there is no pair or the lengths of any differ.
""",
            features=datasets.Features({"predictions": matrix, "references": matrix}),
        )

    def _compute(self, predictions, references):
        errors = [text.squared_error(p, r) for p, r in zip(predictions, references, strict=True)]
        return {"embedding_rmse": text.pooled_rmse(errors)}
