"""capture, attack and score: from private texts to a file, from the file alone to texts, and how right they are."""

import json
import resource
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lmleak
from lmleak.attacks import ATTACKS, Attack
from lmleak.attacks.base import Assumptions, reconstruction
from lmleak.cli import REFUSED, main
from lmleak.data.embedded import REFERENCE_MODELS
from lmleak.types import AttackCost
from tests.launching import python

TEXTS = ["my pin is 4426 call Ana now", "the rent is due on monday"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test works in a folder of its own that holds the data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    rows = "".join(f"{text},{i}\n" for i, text in enumerate(TEXTS))
    (tmp_path / "data.csv").write_text("body,label\n" + rows)
    return tmp_path


def capture(*options, model="reference-gpt2", size="2"):
    return main(["capture", "--model", model, "--data", "data.csv", "--text-column", "body", "--batch-size", size,
                 "--device", "cpu", *options])  # fmt: skip


def attack(*options, model="reference-gpt2"):
    return main(["attack", "gradient.safetensors", "--model", model, "--device", "cpu", *options])


def score(*options):
    return main(["score", "recovered.jsonl", "gradient.private-reference.jsonl", *options])


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def mean_cells(printed):
    """The last row of the printed table of scores."""
    (row,) = [line for line in printed.splitlines() if line.startswith("mean")]
    return row.split()[1:]


def refusal(capsys):
    error = capsys.readouterr().err
    assert "refused:" in error
    assert "Traceback" not in error
    return error


def test_texts_come_back_from_the_files_alone(folder, capsys):
    assert capture() == 0
    printed = capsys.readouterr().out
    assert "never send it" in printed
    assert "note" not in printed
    (folder / "data.csv").unlink()
    before = (folder / "gradient.safetensors").read_bytes()
    (folder / "gradient.private-reference.jsonl").rename(folder / "kept-apart")
    assert attack("--attack", "span") == 0
    printed = capsys.readouterr()
    assert all(text in printed.out for text in TEXTS)
    for word in ("confidence", "stopped: ", "note: ", "cost: ", "gradient evaluations", "peak memory"):
        assert word in printed.out
    assert sorted(row["text"] for row in lines(folder / "recovered.jsonl")) == sorted(TEXTS)
    summary = json.loads((folder / "recovered.summary.json").read_text())
    assert summary["gradient"]["batch_size"] == summary["sequences"] == 2
    assert summary["cost"]["seconds"] > 0
    (folder / "kept-apart").rename(folder / "gradient.private-reference.jsonl")
    assert score("--lamp-compat") == 0
    cells = mean_cells(capsys.readouterr().out)
    assert cells == ["1.00"] * 8 + ["0.00"] + ["1.00"] * 4  # the ninth is the edit distance
    assert (folder / "gradient.safetensors").read_bytes() == before


def test_the_gradient_file_is_what_capture_gradient_gives_and_holds_no_text(folder, capsys):
    assert capture("--shared", "block:0", "--defenses", "clip(max_norm=1)+gaussian(std=0.01)", "--seed", "7") == 0
    assert "this file is for measuring" in capsys.readouterr().out
    adapter = lmleak.load_adapter("reference-gpt2")
    expected = lmleak.capture_gradient(adapter, adapter.batch(TEXTS), shared="block:0")
    expected = lmleak.parse_defense("clip(max_norm=1)+gaussian(std=0.01)", seed=7)(expected)
    found = lmleak.SharedGradient.load(folder / "gradient.safetensors", adapter)
    assert all(torch.equal(found.gradient[name], tensor) for name, tensor in expected.gradient.items())
    assert found.gradient.keys() == expected.gradient.keys()
    assert found.defenses == expected.defenses
    content = (folder / "gradient.safetensors").read_bytes()
    assert b"Ana" not in content
    assert b"input_ids" not in content
    reference = folder / "gradient.private-reference.jsonl"
    assert [row["text"] for row in lines(reference)] == TEXTS
    assert lines(reference)[0]["token_ids"] == list(adapter.batch(TEXTS).token_ids[0])
    assert stat.S_IMODE(reference.stat().st_mode) == 0o600


def test_what_the_server_is_told_can_be_chosen(folder):
    assert capture("--label-column", "label", model="reference-bert") == 0
    told = lmleak.SharedGradient.load("gradient.safetensors")
    assert told.labels.tolist() == [0, 1]
    assert "attention_mask" in told.layout
    assert [row["label"] for row in lines(folder / "gradient.private-reference.jsonl")] == [0, 1]
    assert lines(folder / "gradient.private-reference.jsonl")[0]["text_with_special_tokens"].startswith("[CLS] my")
    assert capture("--no-reveal-labels", "--no-reveal-lengths", model="reference-bert") == 0
    hidden = lmleak.SharedGradient.load("gradient.safetensors")
    assert hidden.labels is None
    assert not hidden.layout
    with_labels = [
        "--labels",
        "1",
        "--texts",
        "call Ana",
        "--output",
        "other/g.safetensors",
        "--reference",
        "kept/r.jsonl",
    ]
    assert main(["capture", "--model", "reference-bert", *with_labels]) == 0
    assert lines(folder / "kept/r.jsonl")[0]["label"] == 1


def test_the_batch_is_chosen_by_index(folder):
    assert capture("--index", "1", size="1") == 0
    assert attack() == 0
    assert score() == 0
    assert [row["text"] for row in lines(folder / "gradient.private-reference.jsonl")] == TEXTS[1:]
    assert [row["text"] for row in lines(folder / "recovered.jsonl")] == TEXTS[1:]


def test_an_update_of_several_clients_and_steps(capsys):
    assert capture("--clients", "2", "--epochs", "2", "--learning-rate", "0.1", "--shared", "all") == 0
    assert "2 local step(s) of 2 client(s)" in capsys.readouterr().out
    update = lmleak.SharedGradient.load("gradient.safetensors")
    assert (update.aggregation.clients, update.aggregation.steps) == (2, 2)
    assert capture("--epochs", "2") == REFUSED
    assert "learning_rate" in refusal(capsys)
    assert capture("--clients", "3") == REFUSED
    assert "cannot be divided" in refusal(capsys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text-column", "boddy"], "Did you mean 'body'"),
        (["--data", "absent.csv"], "no data file"),
        (["--index", "1"], "batch 1 of size 2 needs 4 examples, but data.csv holds 2"),
        (["--index", "-1"], "counts batches from 0"),
        (["--batch-size", "0"], "at least 1"),
        (["--data", "empty.csv"], "example 2: the text is empty"),
        (["--texts", "a"], "not both"),
        (["--defenses", "gausian(std=1)"], "Did you mean 'gaussian'"),
        (["--defenses", "gaussian(std=a)"], "std must be a number, got 'a'"),
        (["--shared", "block:9"], "block"),
        (["--device", "tpu"], "write cpu, cuda or auto"),
        (["--output", "."], "is a folder"),
        (["--output", "data.csv/g"], "cannot write"),
        (["--reference", "gradient.safetensors"], "the reference must stay private"),
        (["--model", "reference-bertt"], "reference-bert"),
        (["--model", "reference-bert"], "label"),
    ],
)
def test_capture_refuses_bad_input_and_writes_nothing(folder, capsys, options, message):
    (folder / "empty.csv").write_text("body,label\nhello you,0\n  ,1\n")
    held = sorted(p.name for p in folder.iterdir())
    if options == ["--model", "reference-bert"]:
        (folder / "data.csv").write_text("body\nhello there\nand you\n")  # no labels for a classifier
    assert capture(*options) == REFUSED
    assert message in refusal(capsys)
    assert sorted(p.name for p in folder.iterdir()) == held


def test_a_full_disk_is_refused_and_leaves_no_part(folder, capsys, monkeypatch):
    def fail(source, target):
        raise OSError(28, "No space left on device", str(target))

    held = sorted(p.name for p in folder.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", fail)
        assert capture() == REFUSED
    assert "cannot write gradient.safetensors: No space left on device" in refusal(capsys)
    assert sorted(p.name for p in folder.iterdir()) == held
    assert capture() == 0
    monkeypatch.setattr("os.replace", fail)
    assert attack() == REFUSED
    assert "No space left on device" in refusal(capsys)
    assert not list(folder.glob("*recovered*"))


@pytest.mark.parametrize("limit", [1000, 100_000])  # bytes: no header fits, or only a part of the tensors
def test_a_gradient_that_does_not_fit_on_the_disk_is_refused(folder, capsys, limit):
    """safetensors has an error of its own for it."""
    held = sorted(p.name for p in folder.iterdir())
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # stands in for the end of the disk
    try:
        status = capture()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert status == REFUSED
    assert "cannot write gradient.safetensors: " in refusal(capsys)
    assert sorted(p.name for p in folder.iterdir()) == held


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_printing_to_a_full_disk_is_refused(folder):
    (folder / "recovered.jsonl").write_text('{"text": "hello there"}\n')
    (folder / "private.txt").write_text("hello you\n")
    with open("/dev/full", "w") as full:
        done = python("-m", "lmleak.cli", "score", "recovered.jsonl", "private.txt", stdout=full, cwd=folder)
    assert done.returncode == REFUSED
    assert done.stderr == (
        "refused: cannot write the standard output: No space left on device; make room there or name another place\n"
    )


@pytest.mark.parametrize("command", ["capture", "audit"])
def test_labels_for_a_language_model_are_refused(folder, capsys, command):
    held = sorted(p.name for p in folder.iterdir())
    texts = ["--texts", *TEXTS, "--labels", "0", "1"]
    assert main([command, "--model", "reference-gpt2", "--device", "cpu", *texts]) == REFUSED
    error = refusal(capsys)
    assert "got 2 labels, but reference-gpt2 is a language model (task 'causal-lm')" in error
    assert "drop labels=, or give a classifier" in error
    assert sorted(p.name for p in folder.iterdir()) == held


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1000])


def poison(path):
    """Write NaN into the file by hand: lmleak itself would not."""
    with safe_open(path, framework="pt") as file:
        header, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    next(iter(tensors.values())).fill_(float("nan"))
    save_file(tensors, path, metadata=header)


@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        (truncate, [], "truncated?"),
        (poison, [], "holds NaN or Inf"),
        (lambda path: path.write_text("hello"), [], "not a readable safetensors file"),
        (lambda path: path.unlink(), [], "no gradient file at"),
        (None, ["--model", "reference-bert"], "The gradient says task 'causal-lm' and model 'reference-gpt2'"),
        (None, ["--model", "shape.yaml"], "has shape (384,), the model's parameter (48,)"),
        (None, ["--task", "masked-lm"], "The gradient says task 'causal-lm'"),
        (None, ["--model", "reference-bert", "--task", "causal-lm"], "reference-bert is an encoder"),
        (None, ["--attack", "spam"], "Did you mean 'span'"),
        (None, ["--attack", "span(beam=a)"], "beam must be an integer, got 'a'"),
        (None, ["--attack", "tag(learning_rate=a)"], "learning_rate must be a number, got 'a'"),
        (None, ["--output", "gradient.safetensors"], "would overwrite"),
        (None, ["--output", "data.csv/r.jsonl"], "cannot write"),
        (None, ["extra.safetensors"], "unknown argument 'extra.safetensors'"),
    ],
)
def test_attack_refuses_bad_input_and_writes_nothing(folder, capsys, damage, options, message):
    (folder / "shape.yaml").write_text(
        "model_type: gpt2\ntask: causal-lm\ntokenizer: reference-gpt2\nconfig: {n_embd: 16, n_layer: 2, n_head: 2}\n"
    )
    assert capture() == 0
    if damage is not None:
        damage(folder / "gradient.safetensors")
    held = sorted(p.name for p in folder.iterdir())
    capsys.readouterr()
    assert attack(*options) == REFUSED
    assert message in refusal(capsys)
    assert sorted(p.name for p in folder.iterdir()) == held


def test_a_combination_that_cannot_work_is_refused_with_the_reason(folder, capsys):
    assert capture("--no-reveal-lengths") == 0
    assert attack("--attack", "tag") == REFUSED
    assert "assumes that lengths are known" in refusal(capsys)
    assert capture("--shared", "head") == 0
    assert attack() == REFUSED
    assert "attention input of block 0" in refusal(capsys)
    assert not (folder / "recovered.jsonl").exists()


def test_texts_left_from_an_earlier_attack_are_not_scored(folder, capsys):
    assert capture() == 0
    assert attack() == 0
    assert capture("--defenses", "gaussian(std=1, unit=rms)") == 0
    assert score() == REFUSED
    assert "left from an earlier attack?" in refusal(capsys)
    assert score("--any-gradient") == 0
    rows = lines(folder / "recovered.jsonl") + lines(folder / "gradient.private-reference.jsonl")
    (folder / "recovered.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert score() == REFUSED
    assert "belong to different gradients" in refusal(capsys)


@dataclass(frozen=True)
class FirstWord(Attack):
    """Return one text, whatever the batch."""

    name: ClassVar[str] = "first-word"
    paper: ClassVar[str] = "none; a test"
    assumes: ClassVar[Assumptions] = Assumptions(
        tasks=("sequence-classification",), lengths=False, labels=False, parameters="none"
    )

    def recover(self, adapter, observation, *, seed):
        guess = [adapter.tokenizer("my \x1b[31m")["input_ids"]]
        return reconstruction(self.name, adapter, guess, [[1.0] * len(guess[0])], cost=AttackCost(0.0),
                              stopped="guessed", objective=float("inf"))  # fmt: skip


def test_what_an_attack_did_not_find_counts_as_nothing(folder, capsys, monkeypatch):
    monkeypatch.setitem(ATTACKS, "first-word", FirstWord)
    assert capture("--label-column", "label", model="reference-bert") == 0
    assert attack("--attack", "first-word", model="reference-bert") == 0
    printed = capsys.readouterr().out
    assert "first-word returned 1 text(s) for a batch of 2" in printed
    assert "\x1b" not in printed
    first, second = lines(folder / "recovered.jsonl")
    assert first["text_with_special_tokens"].startswith("[CLS] my")
    assert (second["text"], second["token_ids"], second["text_with_special_tokens"]) == ("", [], "")
    assert json.loads((folder / "recovered.summary.json").read_text())["objective"] is None
    assert score("--lamp-compat") == 0
    assert 0 < float(mean_cells(capsys.readouterr().out)[0]) < 0.5


def test_plain_files_can_be_scored(folder, capsys):
    (folder / "recovered.txt").write_text("the rent is due\n\n", encoding="utf-8")
    (folder / "reference.jsonl").write_text("".join(json.dumps({"sentence": t}) + "\n" for t in TEXTS[::-1]))
    assert main(["score", "recovered.txt", "reference.jsonl", "--lamp-compat"]) == 0
    printed = capsys.readouterr().out
    assert "words between spaces" in printed
    assert "say nothing of special tokens" in printed
    cells = mean_cells(printed)
    rouge1 = f"{2 * 1 * (4 / 6) / (1 + 4 / 6) / 2:.2f}"
    assert cells[0] == cells[-3] == rouge1
    assert cells[4] == f"{4 / 6 / 2:.2f}"  # token recall
    assert cells[8] == f"{(2 / 6 + 1) / 2:.2f}"  # edit distance
    assert cells[9] == "0.00"  # names and numbers: 4426 and Ana are missing


@pytest.mark.parametrize(
    ("recovered", "reference", "message"),
    [
        ("a\n", None, "holds 1 text(s)"),
        ("a\nb\nc\n", None, "holds 3 text(s)"),
        ("", None, "holds no text"),
        ("a\nb\n", "x\n \n", "line 2: the private text is empty"),
        (b"\xff\xfe\n", None, "not UTF-8"),
    ],
)
def test_score_refuses_bad_files(folder, capsys, recovered, reference, message):
    (folder / "r.txt").write_bytes(recovered if isinstance(recovered, bytes) else recovered.encode())
    (folder / "t.txt").write_text(reference or "\n".join(TEXTS) + "\n")
    assert main(["score", "r.txt", "t.txt"]) == REFUSED
    assert message in refusal(capsys)


@pytest.mark.parametrize(
    "line", ["{", "7", "{}", '{"text": 3}', '{"text": "a", "token_ids": ["b"]}', '{"text": "a", "gradient": 7}', ""]
)
def test_score_refuses_damaged_lines(folder, capsys, line):
    (folder / "r.jsonl").write_text('{"text": "a"}\n' + line + "\n")
    (folder / "t.txt").write_text("a\nb\n")
    assert main(["score", "r.jsonl", "t.txt"]) == REFUSED
    assert "r.jsonl, line 2: " in refusal(capsys)
    assert main(["score", "absent.jsonl", "t.txt"]) == REFUSED
    assert "no file of texts" in refusal(capsys)


def test_lamp_scores_need_special_tokens_on_both_sides_or_none(folder, capsys):
    assert capture("--label-column", "label", model="reference-bert") == 0
    reference = "gradient.private-reference.jsonl"
    (folder / "r.txt").write_text("x\ny\n")
    assert main(["score", "r.txt", reference, "--lamp-compat"]) == REFUSED
    assert "r.txt has no text_with_special_tokens" in refusal(capsys)
    unrelated = [
        {"text": "x", "token_ids": [1], "text_with_special_tokens": "[CLS] one two three four five [SEP]"}
    ] * 2
    (folder / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in unrelated))
    assert main(["score", "r.jsonl", reference, "--lamp-compat"]) == 0
    cells = mean_cells(capsys.readouterr().out)
    assert cells[0] == "0.00"
    assert cells[-3] == f"{(4 / (7 + 9) + 4 / (7 + 8)) / 2:.2f}"  # the floor of two shared words


def test_arguments_that_are_not_utf8_are_refused(capsys):
    for command in ("audit", "capture", "attack", "score", "\udce9"):
        assert main([command, "caf\udce9"]) == REFUSED
        assert "is not UTF-8 text" in refusal(capsys)


EXPORT = next(
    block.partition("```")[0]
    for block in (Path(__file__).resolve().parents[1] / "README.md").read_text().split("```python\n")
    if "lmleak.SharedGradient(" in block
)


def test_a_file_exported_from_a_training_loop_is_that_of_capture_gradient(folder):
    source = str(REFERENCE_MODELS["reference-gpt2"])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source).eval(), AutoTokenizer.from_pretrained(source)
    exec(EXPORT, {"model": model, "tokenizer": tokenizer, "texts": TEXTS, "torch": torch, "lmleak": lmleak})
    adapter = lmleak.load_adapter("reference-gpt2")
    expected = lmleak.capture_gradient(adapter, adapter.batch(TEXTS), shared="all")
    expected.save("expected.safetensors")
    headers = []
    for name in ("gradient", "expected"):
        with safe_open(f"{name}.safetensors", framework="pt") as file:
            header = {k: v for k, v in file.metadata().items() if k not in ("model", "weights")}
            headers.append(header | {"names": list(file.keys())})
    assert headers[0] == headers[1]
    exported = lmleak.SharedGradient.load("gradient.safetensors", adapter)
    for name, tensor in expected.gradient.items():
        torch.testing.assert_close(exported.gradient[name], tensor, rtol=1e-4, atol=1e-6 * tensor.abs().max().item())
    assert torch.equal(exported.layout["attention_mask"], expected.layout["attention_mask"])
    assert attack() == 0
    assert sorted(row["text"] for row in lines(folder / "recovered.jsonl")) == sorted(TEXTS)


def test_a_table_is_no_file_of_texts(folder, capsys):
    (folder / "texts.csv").write_text("text\nhello there\n")
    assert main(["score", str(folder / "texts.csv"), str(folder / "texts.csv")]) == REFUSED
    assert ".jsonl" in refusal(capsys)
