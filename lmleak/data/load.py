"""Private examples from a file, a data set on the hub, or the embedded samples."""

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from lmleak.data.embedded import sample_messages
from lmleak.errors import ConfigError, DataError
from lmleak.lookup import suggest

TEXT_COLUMNS = ("text", "sentence", "content", "message", "comment")
LABEL_COLUMNS = ("label", "labels", "class", "target")
FILE_KINDS = (".txt", ".csv", ".tsv", ".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class Examples:
    """Texts to protect, in file order."""

    texts: tuple[str, ...]
    labels: tuple[int | str, ...] | None
    """Classes as they stand in the data; None if there is no label column."""
    origin: str
    """Where they come from, for the report."""


def load_examples(
    source: str | None,
    *,
    text_column: str | None = None,
    label_column: str | None = None,
    split: str | None = None,
    limit: int | None = None,
) -> Examples:
    """Read examples.

    Args:
        source: A .txt (one text per line, blank lines skipped), .csv, .tsv, .jsonl or .parquet file, the id of a
            data set on the hub, or None for the embedded samples. Tab-separated files are read without quoting.
        text_column: Column of the text. A number counts columns from 0 in a csv or tsv file without a header. By
            default the first of ``TEXT_COLUMNS`` that exists, or the only column.
        label_column: Column of the class, likewise; by default the first of ``LABEL_COLUMNS`` that exists.
        split: Split of a hub data set; by default "train".
        limit: Read the first ``limit`` examples only.

    Returns:
        The examples.

    Raises:
        DataError: If the file is missing, a column unknown, a text empty, or there is nothing to read.
    """
    if source is None:
        rows: Iterator[Mapping] = ({"text": m.text, "label": m.label} for m in sample_messages())
        origin = "embedded sample messages"
    elif Path(source).suffix in FILE_KINDS or Path(source).exists():
        path = Path(source)
        if not path.is_file():
            raise DataError(f"no data file at {source}")
        headerless = text_column is not None and text_column.isdigit()
        rows, origin = _file_rows(path, headerless), path.name
    else:
        rows, origin = _hub_rows(source, split), source
    rows = list(islice(rows, limit))
    if not rows:
        raise DataError(f"{origin} holds no examples")
    columns = list(rows[0])
    text_column = _column(text_column, columns, TEXT_COLUMNS, origin)
    label_column = _column(label_column, columns, LABEL_COLUMNS, origin, optional=True)
    texts = tuple(_text(row, number, text_column, origin) for number, row in enumerate(rows, 1))
    labels = None if label_column is None else tuple(_label(row.get(label_column)) for row in rows)
    return Examples(texts, labels, origin)


def _column(asked: str | None, columns: list[str], usual: tuple[str, ...], origin: str, *, optional=False):
    if asked is not None:
        if asked not in columns:
            raise DataError(f"{origin} has no column {asked!r}. {suggest(asked, columns)}")
        return asked
    found = next((c for c in usual if c in columns), None)
    if found is None and not optional:
        if len(columns) == 1:
            return columns[0]
        raise DataError(
            f"cannot tell which column of {origin} holds the text; pass text_column=. {suggest('', columns)}"
        )
    return found


def _text(row: Mapping, number: int, column: str, origin: str) -> str:
    text = row.get(column)
    if not isinstance(text, str):
        raise DataError(f"{origin}, example {number}: column {column!r} holds {text!r}, expected text")
    if not text.strip():
        raise DataError(f"{origin}, example {number}: the text is empty; remove the row or name another text_column=")
    return text


def _label(value):
    """Return an integer where the value is one, also as text; otherwise the value."""
    if isinstance(value, str) and value.strip().lstrip("-").isdigit():
        return int(value)
    return value


def _file_rows(path: Path, headerless: bool) -> Iterator[Mapping]:
    if path.suffix == ".parquet":
        from datasets import Dataset  # imported here: it takes seconds

        try:
            yield from Dataset.from_parquet(str(path), keep_in_memory=True)
        except (OSError, ValueError, RuntimeError) as error:  # what pyarrow and datasets raise on a damaged file
            raise DataError(f"{path.name} cannot be read as parquet: {str(error).splitlines()[0]}") from error
        return
    try:
        with open(path, encoding="utf-8", newline="") as file:
            if path.suffix in (".csv", ".tsv"):
                dialect = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
                reader = csv.reader(file, **dialect)
                header = None if headerless else next(reader, None)
                for number, values in enumerate(reader, 1):
                    names = header or [str(i) for i in range(len(values))]
                    if len(values) != len(names):
                        raise DataError(
                            f"{path.name}, example {number}: {len(values)} columns where {len(names)} are expected"
                        )
                    yield dict(zip(names, values, strict=True))
            elif path.suffix in (".jsonl", ".json"):
                yield from _json_rows(path, file)
            else:
                yield from ({"text": line.strip()} for line in file if line.strip())
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except csv.Error as error:
        raise DataError(f"{path.name} cannot be read as {path.suffix}: {error}") from error


def _json_rows(path: Path, file) -> Iterator[Mapping]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path.name}, line {number}: not valid JSON ({error.msg}); expected one object per line"
            ) from error
        if not isinstance(row, dict):
            raise DataError(f'{path.name}, line {number}: expected an object like {{"text": ...}}, got {row!r:.40}')
        yield row


def _hub_rows(source: str, split: str | None) -> Iterator[Mapping]:
    from datasets import load_dataset

    name, _, configuration = source.partition(":")
    try:
        dataset = load_dataset(name, configuration or None, split=split or "train")
    except (OSError, ValueError) as error:  # ConnectionError and DatasetNotFoundError are OSErrors
        raise ConfigError(
            f"{source!r} is neither a file ({', '.join(FILE_KINDS)}) nor a data set that can be reached: "
            f"{str(error).splitlines()[0]}"
        ) from error
    return iter(dataset)
