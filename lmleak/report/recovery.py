"""What ``lmleak capture``, ``attack`` and ``score`` print."""

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from lmleak.adapters.targets import IMAGE_TASK
from lmleak.evaluation import AttackResult, CaptureResult, ScoreResult
from lmleak.types import Aggregation

COLUMNS = {
    "rouge1": "R-1", "rouge2": "R-2", "rougeL": "R-L", "token_precision": "prec", "token_recall": "rec",
    "token_f1": "F1", "position_accuracy": "pos", "exact_match": "same", "edit_distance": "edit",
    "entity_recall": "name",
}  # fmt: skip
LAMP_COLUMNS = {"lamp_rouge1": "L-1", "lamp_rouge2": "L-2", "lamp_rougeL": "L-L"}
LEGEND = (
    "R: ROUGE F-measures. prec, rec, F1: {tokens} as multisets. pos: right at its position. same: exact match. "
    "edit: normalised edit distance (0 is perfect). name: share of names and numbers recovered."
)


def capture_lines(result: CaptureResult) -> list[str]:
    """Return what was written, what it reveals, and what to keep."""
    shared, kind = result.shared, _kind(result.shared.task)
    revealed = [word for word, known in (("lengths", shared.layout), ("labels", shared.labels is not None)) if known]
    lines = [
        f"gradient: {result.gradient} ({shared.num_coordinates:,} numbers of {len(shared.gradient)} parameters, "
        f"{shared.batch_size} {kind}(s), {_steps(shared.aggregation)}; defenses: "
        f"{' + '.join(shared.defenses) or 'none'}; also reveals: {', '.join(revealed) or 'nothing'})",
        f"private reference: {result.reference} (holds the {kind}s: never send it)",
    ]
    if result.seeded:
        lines.append(
            "note: whoever guesses the seed can undo the noise or the dropout; this file is for measuring, not for use"
        )
    return lines


def recovery_table(result: AttackResult) -> Table:
    """Return the recovered texts with their confidence."""
    table = Table()
    table.add_column("text", overflow="fold")
    for name in ("tokens", "confidence", "least"):
        table.add_column(name, justify="right")
    recovered = result.reconstruction
    for text, confidence in zip(recovered.texts, recovered.confidence, strict=True):
        numbers = [f"{fmean(confidence):.2f}", f"{min(confidence):.2f}"] if confidence else ["\u2013"] * 2
        table.add_row(printable(text), str(len(confidence)), *numbers)
    return table


def recovery_lines(result: AttackResult) -> list[str]:
    """Return how much was recovered, why the attack ended, its notes, its cost and where the texts or images are."""
    kind = _kind(result.shared.task)
    number = len(result.reconstruction.images if kind == "image" else result.reconstruction.texts)
    recovered, cost = result.reconstruction, result.reconstruction.cost
    peak = "not measured" if cost.peak_bytes is None else f"{cost.peak_bytes / 2**20:.0f} MiB"
    return [
        f"{recovered.attack} returned {number} {kind}(s) for a batch of {result.shared.batch_size}",
        f"stopped: {recovered.stopped}",
        *(f"note: {note}" for note in recovered.notes),
        f"cost: {cost.seconds:.1f} s, {cost.gradient_evaluations} gradient evaluations, {cost.iterations} iterations, "
        f"peak memory {peak}",
        f"recovered: {result.recovered}",
        f"summary: {result.summary}",
    ]


def score_table(result: ScoreResult) -> Table:
    """Return the scores per text and their mean."""
    tokens = "tokens" if result.by_token_ids else "words between spaces"
    # Thirteen numbers and a narrow column of text fit on eighty columns only without lines and padding.
    legend = LEGEND.format(tokens=tokens)
    table = Table(caption=legend, caption_justify="left", box=SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column("text", overflow="fold")
    columns = COLUMNS if result.lamp is None else COLUMNS | LAMP_COLUMNS
    for heading in columns.values():
        table.add_column(heading, justify="right", no_wrap=True)
    lamps = [None] * len(result.references) if result.lamp is None else result.lamp.per_example
    for reference, example, lamp in zip(result.references, result.score.per_example, lamps, strict=True):
        table.add_row(printable(reference), *_cells(columns, example, lamp))
    table.add_section()
    table.add_row("mean", *_cells(columns, result.score, result.lamp))
    return table


def score_notes(result: ScoreResult) -> list[str]:
    """Return what the reader of the table should know."""
    notes = []
    if result.lamp is not None:
        notes.append(
            "note: the columns L count special tokens as words, as LAMP and DAGER do; two unrelated BERT sentences of "
            "seven words score R-1 = 0.22 there. Compare them with published figures only."
        )
        if not result.special_tokens_known:
            notes.append(
                "note: these files say nothing of special tokens: the columns L count only those in the texts"
            )
    return notes


def printable(text: str) -> Text:
    """Return recovered text as a terminal may show it: nothing in it is a command or a style."""
    return Text("".join(c if c.isprintable() else "\ufffd" for c in text))


def _cells(columns: Mapping[str, str], score: Any, lamp: Any) -> list[str]:
    values = [
        getattr(lamp, name.removeprefix("lamp_")) if name.startswith("lamp_") else getattr(score, name)
        for name in columns
    ]
    return ["\u2013" if value is None else f"{value:.2f}" for value in values]


def _kind(task: str) -> str:
    return "image" if task == IMAGE_TASK else "text"


def _steps(aggregation: Aggregation) -> str:
    if aggregation.clients == aggregation.steps == 1:
        return "one step of one client"
    return f"{aggregation.steps} local step(s) of {aggregation.clients} client(s)"
