"""Which recovered sequence is scored against which private one."""

from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from lmleak.metrics.text import Tokens, embedding_rmse, position_accuracy, token_f1

TIE_BREAK = 1e-9  # below one token of any sequence, so nearer embeddings decide only between equal tokens


def match(
    predictions: Sequence[Tokens],
    references: Sequence[Tokens],
    *,
    predicted_embeddings: Sequence | None = None,
    true_embeddings: Sequence | None = None,
) -> tuple[int | None, ...]:
    """Assign to each reference at most one prediction, and each prediction to at most one reference.

    Maximises ``sum_r [token_f1(p(r), r) + position_accuracy(p(r), r)]`` over all assignments p without
    replacement (Hungarian method). Where several are best, the nearer embeddings decide if both sides have
    them, and then the lexical order of the sequences, so the order in which an attack returns them never
    matters.

    Published evaluations of gradient inversion often let one prediction serve several references (DAGER on
    decoders, GRAB), which flatters an attack that recovers one sentence many times. Predictions in excess
    of the references stay unused: an attack that returns many guesses gets its best ones, so compare
    attacks at equal numbers of sequences.

    Args:
        predictions: Recovered token sequences, any number.
        references: True token sequences.
        predicted_embeddings: Recovered embeddings (T_i, D) per prediction.
        true_embeddings: True embeddings (T_i, D) per reference.

    Returns:
        Per reference, the index of its prediction, or None where predictions ran out.
    """
    rows = sorted(range(len(references)), key=lambda i: tuple(references[i]))
    columns = sorted(range(len(predictions)), key=lambda j: tuple(predictions[j]))
    score = np.zeros((len(rows), len(columns)))
    for row, i in enumerate(rows):
        for column, j in enumerate(columns):
            score[row, column] = token_f1(predictions[j], references[i])
            score[row, column] += position_accuracy(predictions[j], references[i])
            if predicted_embeddings is not None and true_embeddings is not None:
                error = embedding_rmse(predicted_embeddings[j], true_embeddings[i])
                score[row, column] += 0.0 if error is None else TIE_BREAK / (1 + error)
    assigned: list[int | None] = [None] * len(references)
    for row, column in zip(*linear_sum_assignment(score, maximize=True), strict=True):
        assigned[rows[row]] = columns[column]
    return tuple(assigned)
