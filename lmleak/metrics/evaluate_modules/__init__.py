"""Metrics for the ``evaluate`` library: one class per file, each a thin wrapper of plain functions.

Each file also works by its path, ``evaluate.load(".../token_recovery.py")``, without a network, and
instances go into ``evaluate.combine``. ``evaluate`` copies such a file elsewhere, takes the first metric
class it finds in it and reads its import lines with a regular expression. Hence: one import per line, one
metric class per file, no relative import.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from lmleak.lookup import lookup

if TYPE_CHECKING:
    import evaluate

METRICS = {
    "token_recovery": "TokenRecovery",  # precision, recall, F1, position accuracy, exact match of token ids
    "text_rouge": "TextRouge",  # ROUGE-1/2/L F-measures of strings
    "google_bleu": "GoogleBleu",  # sentence-level GLEU of strings
    "embedding_rmse": "EmbeddingRmse",  # error per coordinate of recovered embeddings
}
"""Name of each metric, which is its file's name here, and the class in that file."""


def load(name: str, **options) -> evaluate.Metric:
    """Return an ``evaluate`` metric by name.

    In all of them ``predictions[i]`` is scored against ``references[i]``; pair them first with
    :func:`lmleak.metrics.match`.

    Args:
        name: A name in ``METRICS``.
        **options: Passed to ``evaluate.Metric`` (``num_process``, ``process_id``, ``cache_dir``, ...).
            Unlike there, ``keep_in_memory`` is on where one process computes: references are private and
            belong on no disk.

    Returns:
        The metric: ``.compute(predictions=..., references=...)``, ``.add_batch(...)``.
    """
    class_name = lookup("metric", name, METRICS)
    options.setdefault("keep_in_memory", options.get("num_process", 1) == 1)
    # imported when asked for: evaluate takes seconds to import and scoring does not need it
    return getattr(import_module(f"{__name__}.{name}"), class_name)(**options)
