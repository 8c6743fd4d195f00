"""The scores of one reconstruction against the private batch, in total and per private text."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

from torch import Tensor

from lmleak.errors import DataError
from lmleak.metrics.entities import entity_recall
from lmleak.metrics.matching import match
from lmleak.metrics.text import (
    Tokens,
    edit_distance,
    exact_match,
    google_bleu,
    pooled_rmse,
    position_accuracy,
    rouge,
    squared_error,
    token_f1,
    token_precision,
    token_recall,
)
from lmleak.metrics.words import words_and_punctuation
from lmleak.types import Reconstruction, TextBatch


@dataclass(frozen=True)
class RecoveryScores:
    """The numbers, in [0, 1] with 1 a perfect recovery; ``embedding_rmse`` and ``edit_distance`` are errors."""

    rouge1: float
    """ROUGE-1 F-measure over the words of the text (see :func:`lmleak.metrics.text.rouge`)."""
    rouge2: float
    rougeL: float
    token_precision: float
    """Share of recovered tokens that are in the reference, as multisets, whatever the order."""
    token_recall: float
    token_f1: float
    position_accuracy: float
    """Share of reference positions whose token is right at that position."""
    exact_match: float
    """1 if every token is right and none is too many."""
    google_bleu: float
    """Sentence-level GLEU over words and punctuation marks, case kept."""
    embedding_rmse: float | None
    """Error per coordinate of x, comparable with ``rms`` of an influence; None where not measurable."""
    edit_distance: float
    """Tokens to insert, delete or replace, over the longer length: an error in [0, 1], 0 a perfect recovery."""
    entity_recall: float | None
    """Share of the reference's names and numbers in the prediction; None if the reference holds none."""


@dataclass(frozen=True)
class ExampleScore(RecoveryScores):
    """The scores of one private text and of the prediction that was matched to it."""

    prediction: int | None
    """Index into the reconstruction; None if it returned fewer sequences than there are texts."""
    text: str
    """The matched prediction's text; empty if there is none."""
    token_ids: tuple[int, ...] | None
    """The matched prediction's tokens; None where only strings were scored."""
    correct: tuple[bool, ...]
    """Per reference token: was it recovered at its position."""
    in_bag: tuple[bool, ...]
    """Per reference token: is it in the prediction, as a multiset; they sum to the overlap.

    Of a token that was recovered fewer times than it occurs, those at their position count first.
    """


@dataclass(frozen=True)
class TextScore(RecoveryScores):
    """The mean over the private texts; the embedding error pools all coordinates.

    ``embedding_rmse`` is None unless every private text has one: an average over only those sequences whose
    length the attack got right would flatter it. ``entity_recall`` is the mean over those texts that hold a name or
    a number, None if none does.
    """

    num_references: int
    num_predictions: int
    """Sequences that the attack returned; those in excess of the references were free guesses."""
    per_example: tuple[ExampleScore, ...]
    """One per private text, in the order of the batch."""

    def to_dict(self) -> dict:
        """Return the scores as JSON holds them: numbers, strings, lists, None where something is missing."""
        return json.loads(json.dumps(asdict(self), allow_nan=False))


MEANS = ("rouge1", "rouge2", "rougeL", "token_precision", "token_recall", "token_f1", "position_accuracy",
         "exact_match", "google_bleu")  # fmt: skip
"""The shares of recovery, 1 the best, that a set of texts averages."""


def score_text(
    reconstruction: Reconstruction,
    batch: TextBatch,
    embeddings: Sequence[Tensor] | None = None,
    *,
    words: str = "latin",
) -> TextScore:
    """Score what an attack recovered against the private batch.

    Predictions are assigned to references without replacement (:func:`lmleak.metrics.matching.match`), each
    pair is scored, and the scores are averaged over the references (a plain mean, no resampling). A
    reference without a prediction is scored against the empty one.

    Args:
        reconstruction: The attack's answer.
        batch: The truth: ``texts`` and ``token_ids``, special tokens and padding removed.
        embeddings: The true inputs per sequence, (T_i, D), special tokens included, to measure the error of
            an attack that recovers embeddings.
        words: How texts are cut for ROUGE: "latin" (published numbers) or "unicode" (any script).

    Returns:
        The scores.

    Raises:
        DataError: If there are no texts to compare, the batch holds no reference, or the parts of either side differ
            in number.
    """
    if not isinstance(reconstruction, Reconstruction) or not isinstance(batch, TextBatch):
        raise DataError(
            f"score_text compares a Reconstruction with a batch of texts, got a {type(reconstruction).__name__} and a "
            f"{type(batch).__name__}; images are scored by score_images"
        )
    if len(batch.texts) != batch.size:
        raise DataError(
            f"the batch has {batch.size} example(s) but {len(batch.texts)} reference text(s) to score "
            "against; build it with adapter.batch(texts), which keeps them"
        )
    truth = _Sequences("references", batch.texts, _integers(batch.token_ids), embeddings)
    answer = _Sequences(
        "predictions", reconstruction.texts, _integers(reconstruction.token_ids), reconstruction.embeddings
    )
    return _score(answer, truth, words, with_ids=True)


def score_strings(
    predictions: Sequence[str],
    references: Sequence[str],
    *,
    predicted_ids: Sequence[Sequence[int]] | None = None,
    true_ids: Sequence[Sequence[int]] | None = None,
    words: str = "latin",
) -> TextScore:
    """Score recovered strings where no reconstruction is at hand.

    Args:
        predictions: Recovered texts, any number, in any order.
        references: True texts, special tokens removed on both sides.
        predicted_ids: Token ids per prediction. Give ids of one tokenizer for both sides or for neither; without
            them, tokens are what white space separates.
        true_ids: Token ids per reference.
        words: How texts are cut for ROUGE: "latin" (published numbers) or "unicode" (any script).

    Returns:
        The scores, as in :func:`score_text`; ``embedding_rmse`` is None, and without ids ``token_ids`` too.

    Raises:
        DataError: If there is no reference, a string is given where a list of strings belongs, or ids come for one
            side only or in another number than the texts.
    """
    for name, value in (("predictions", predictions), ("references", references)):
        if isinstance(value, str):
            raise DataError(f"{name} must be a list of strings, got one string; write [{name[:-1]}]")
    if (predicted_ids is None) != (true_ids is None):
        raise DataError("got token ids for one side only; give predicted_ids= and true_ids=, or neither")
    with_ids = predicted_ids is not None
    split = [[text.split() for text in texts] for texts in (predictions, references)]
    predicted, true = map(_integers, (predicted_ids, true_ids)) if with_ids else split
    truth, answer = _Sequences("references", references, true), _Sequences("predictions", predictions, predicted)
    return _score(answer, truth, words, with_ids=with_ids)


@dataclass(frozen=True)
class _Sequences:
    """One side of the comparison."""

    kind: str
    """"predictions" or "references", for messages."""
    texts: Sequence[str]
    tokens: Sequence[Tokens]
    embeddings: Sequence[Tensor] | None = None

    def __post_init__(self):
        if len(self.texts) != len(self.tokens):
            raise DataError(
                f"got {len(self.texts)} text(s) but {len(self.tokens)} token sequence(s) as {self.kind}; "
                "expected one of each per sequence"
            )
        if self.embeddings is not None and len(self.embeddings) != len(self.tokens):
            raise DataError(
                f"got {len(self.tokens)} token sequence(s) but embeddings of {len(self.embeddings)} "
                f"as {self.kind}; expected one tensor (T_i, D) per sequence"
            )


def _integers(sequences) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(token) for token in sequence) for sequence in sequences)


def _score(answer: _Sequences, truth: _Sequences, words: str, *, with_ids: bool) -> TextScore:
    """Match, score each pair, average."""
    if not truth.texts:
        raise DataError("nothing to score against: expected at least one reference text, got none")
    assigned = match(
        answer.tokens,
        truth.tokens,
        predicted_embeddings=answer.embeddings,
        true_embeddings=truth.embeddings,
    )
    examples, errors = [], []
    for i, j in enumerate(assigned):
        text, tokens = ("", ()) if j is None else (answer.texts[j], answer.tokens[j])
        recovered = None if j is None or answer.embeddings is None else answer.embeddings[j]
        errors.append(None if truth.embeddings is None else squared_error(recovered, truth.embeddings[i]))
        examples.append(
            ExampleScore(
                **_pair_scores(text, tokens, truth.texts[i], truth.tokens[i], words),
                embedding_rmse=pooled_rmse(errors[-1:]),
                prediction=j,
                text=text,
                token_ids=tuple(tokens) if with_ids else None,
            )
        )
    known = [example.entity_recall for example in examples if example.entity_recall is not None]
    return TextScore(
        **{name: fmean(getattr(example, name) for example in examples) for name in MEANS},
        embedding_rmse=pooled_rmse(errors),
        edit_distance=fmean(example.edit_distance for example in examples),
        entity_recall=fmean(known) if known else None,
        num_references=len(truth.texts),
        num_predictions=len(answer.texts),
        per_example=tuple(examples),
    )


def _pair_scores(text: str, tokens: Tokens, true_text: str, true_tokens: Tokens, words: str) -> dict:
    """Return what depends on one prediction and its reference alone."""
    correct, in_bag = token_correctness(tokens, true_tokens)
    return {
        **rouge(text, true_text, words)._asdict(),
        "token_precision": token_precision(tokens, true_tokens),
        "token_recall": token_recall(tokens, true_tokens),
        "token_f1": token_f1(tokens, true_tokens),
        "position_accuracy": position_accuracy(tokens, true_tokens),
        "exact_match": exact_match(tokens, true_tokens),
        "google_bleu": google_bleu(words_and_punctuation(text), words_and_punctuation(true_text)),
        "edit_distance": edit_distance(tokens, true_tokens),
        "entity_recall": entity_recall(text, true_text),
        "correct": correct,
        "in_bag": in_bag,
    }


def token_correctness(prediction: Tokens, reference: Tokens) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
    """Return per reference token whether it is right at its position, and whether it is in the prediction.

    Args:
        prediction: Recovered tokens.
        reference: True tokens.

    Returns:
        ``correct`` and ``in_bag``, each as long as the reference. Of a token that the reference holds more
        often than the prediction, ``in_bag`` marks as many as were recovered: those at their position,
        then from the left.
    """
    correct = tuple(i < len(prediction) and prediction[i] == token for i, token in enumerate(reference))
    available = Counter(prediction)
    available.subtract(token for token, right in zip(reference, correct, strict=True) if right)
    in_bag = []
    for token, right in zip(reference, correct, strict=True):
        in_bag.append(right or available[token] > 0)
        available[token] -= not right
    return correct, tuple(in_bag)
