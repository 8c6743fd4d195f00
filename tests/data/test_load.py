"""Reading private examples: every format, every refusal."""

import json

import pytest

from lmleak.data import load_examples
from lmleak.errors import ConfigError, DataError


def test_embedded_samples_by_default():
    examples = load_examples(None, limit=5)
    assert len(examples.texts) == len(examples.labels) == 5
    assert examples.origin == "embedded sample messages"


def test_text_file_skips_blank_lines(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("first line\n\n  second line \n")
    assert load_examples(str(path)).texts == ("first line", "second line")


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_tables_agree(tmp_path, kind):
    rows = [{"text": 'he said, "hello"', "label": 1}, {"text": "plain", "label": 0}]
    path = tmp_path / f"data.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "parquet":
        from datasets import Dataset

        Dataset.from_list(rows).to_parquet(str(path))
    elif kind == "csv":
        path.write_text('text,label\n"he said, ""hello""",1\nplain,0\n')
    else:
        path.write_text('text\tlabel\nhe said, "hello"\t1\nplain\t0\n')
    examples = load_examples(str(path))
    assert examples.texts == tuple(row["text"] for row in rows)
    assert examples.labels == (1, 0)


def test_headerless_columns_by_number(tmp_path):
    path = tmp_path / "cola.tsv"
    path.write_text("gj04\t1\t\tOur friends won't buy this.\ngj04\t0\t*\tThey \"drank the pub.\n")
    examples = load_examples(str(path), text_column="3", label_column="1")
    assert examples.texts == ("Our friends won't buy this.", 'They "drank the pub.')
    assert examples.labels == (1, 0)


def test_limit_reads_the_first(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("\n".join(f"line {i}" for i in range(10)))
    assert load_examples(str(path), limit=3).texts == ("line 0", "line 1", "line 2")


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("d.csv", "text,label\nhello,1\n,0\n", {}, "example 2: the text is empty"),
        ("d.csv", "text,label\nhello,1\n", {"text_column": "txt"}, r"no column 'txt'. Did you mean 'text'\?"),
        ("d.csv", "text,label\nhello,1\n", {"label_column": "lable"}, r"Did you mean 'label'\?"),
        ("d.csv", "a,b\nhello,1\n", {}, "cannot tell which column"),
        ("d.csv", "text,label\nhello\n", {}, "example 1: 1 columns where 2 are expected"),
        ("d.csv", "text\n", {}, "holds no examples"),
        ("d.txt", "\n\n", {}, "holds no examples"),
        ("d.jsonl", '{"text": "a"}\n{"text": \n', {}, "line 2: not valid JSON"),
        ("d.jsonl", '["a"]\n', {}, "line 1: expected an object"),
        ("d.jsonl", '{"text": 3}\n', {}, "holds 3, expected text"),
        ("d.txt", b"\xff\xfe\x00bad", {}, "is not UTF-8"),
        ("d.parquet", b"PAR1 not really", {}, "cannot be read as parquet"),
    ],
)
def test_refusals(tmp_path, name, content, options, message):
    with pytest.raises(DataError, match=message):
        load_examples(write(tmp_path / name, content), **options)


def test_missing_file_and_unknown_data_set(tmp_path):
    with pytest.raises(DataError, match="no data file at"):
        load_examples(str(tmp_path / "absent.csv"))
    with pytest.raises(ConfigError, match="neither a file"):
        load_examples("surely/not-a-data-set")
