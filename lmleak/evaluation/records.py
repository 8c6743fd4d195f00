"""Texts as files that ``lmleak score`` compares: what an attack recovered, and the private reference.

One JSON object per line: ``text``, ``token_ids`` (special tokens and padding removed), ``text_with_special_tokens``
(as LAMP and DAGER decode it) and ``gradient``, a digest of the gradient file that they belong to; of a recovered text
also ``confidence`` per token, of a private one its class as ``label``. Any .jsonl with a text column and any .txt with
one text per line can stand in.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from lmleak.adapters import TextAdapter
from lmleak.data.load import TEXT_COLUMNS
from lmleak.errors import DataError
from lmleak.metrics import with_special_tokens


@dataclass(frozen=True)
class TextRecords:
    """The texts of one file, in its order."""

    texts: tuple[str, ...]
    token_ids: tuple[tuple[int, ...], ...] | None
    """None unless every line has them."""
    with_special_tokens: tuple[str, ...] | None
    """None unless every line has it."""
    gradient: str | None
    """Digest of the gradient file that they belong to; None where the file does not say."""


def file_digest(path: str | Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    return sha256(Path(path).read_bytes()).hexdigest()


def text_record(text: str, token_ids: Sequence[int], adapter: TextAdapter) -> dict[str, Any]:
    """Return the fields that recovered and private texts have in common."""
    marked = None if adapter.tokenizer is None else with_special_tokens(token_ids, adapter)
    return {"text": text, "token_ids": [int(token) for token in token_ids], "text_with_special_tokens": marked}


def json_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return rows as JSON lines."""
    return "".join(json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n" for row in rows)


def read_records(path: str | Path) -> TextRecords:
    """Read a .jsonl file with a text column, or any other file as one text per line, blank lines included.

    Args:
        path: The file.

    Returns:
        Its texts, and their tokens where the file has them.

    Raises:
        DataError: If the file is missing, a table, holds no line, is not UTF-8, or a line is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"no file of texts at {path}")
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    lines = content.split("\n")[: -1 if content.endswith("\n") else None]  # str.splitlines would cut at U+2028 too
    if not content:
        raise DataError(f"{path} holds no text")
    if path.suffix in (".csv", ".tsv", ".parquet"):
        raise DataError(f"{path}: texts to score are read from .jsonl (a text column) or .txt (one text per line)")
    if path.suffix not in (".jsonl", ".json"):
        return TextRecords(tuple(line.rstrip("\r") for line in lines), None, None, None)
    rows = [_row(path, number, line) for number, line in enumerate(lines, 1)]
    digests = {row.get("gradient") for row in rows}
    if len(digests) > 1:
        raise DataError(f"the lines of {path} belong to different gradients; score them file by file")
    return TextRecords(
        texts=tuple(row["text"] for row in rows),
        token_ids=_column(rows, "token_ids", tuple),
        with_special_tokens=_column(rows, "text_with_special_tokens", str),
        gradient=digests.pop(),
    )


def _row(path: Path, number: int, line: str) -> dict[str, Any]:
    """Return one line, its text under "text"."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {number}: not valid JSON ({error.msg}); expected one object per line"
        ) from error
    name = next((column for column in TEXT_COLUMNS if isinstance(row, dict) and column in row), None)
    if name is None or not isinstance(row[name], str):
        raise DataError(f'{path}, line {number}: expected an object like {{"text": "..."}}, got {line:.60}')
    ids, marked = row.get("token_ids"), row.get("text_with_special_tokens")
    is_ids = isinstance(ids, list) and all(type(token) is int for token in ids)
    if not (ids is None or is_ids) or not all(isinstance(x, str | None) for x in (marked, row.get("gradient"))):
        raise DataError(f"{path}, line {number}: token_ids must be a list of integers, all else text")
    return row | {"text": row[name]}


def _column(rows: Sequence[Mapping[str, Any]], name: str, kind: type) -> tuple | None:
    if any(row.get(name) is None for row in rows):
        return None
    return tuple(kind(row[name]) for row in rows)
