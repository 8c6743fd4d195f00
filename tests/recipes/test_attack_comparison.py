"""The study as it is run: tiny, on one process and two, resumed; the same rows every time."""

import csv
import json
from pathlib import Path

import pytest

from lmleak.attacks import ATTACKS
from lmleak.config import parse_config
from lmleak.errors import ConfigError
from tests.launching import ROOT, fork

TINY = [
    "--models", "reference-bert", "reference-gpt2", "--batch-sizes", "1", "2", "--samples", "2", "--max-length", "5",
    "--defenses", "none", "gaussian(std=10, unit=rms)", "--attacks", "span", "gs(iterations=2, candidates=2)",
    "film(iterations=1, candidates=2, beams=2)", "--device", "cpu",
]  # fmt: skip
MEASURED = ("seconds", "peak_bytes")  # differ from run to run


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def comparable(found: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.endswith(MEASURED)} for row in found]


@pytest.fixture(scope="module")
def study(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "out"
    assert recipe.main([*TINY, "--output", str(folder)]) == 0
    return folder


def test_every_attack_meets_every_gradient(study):
    found = rows(study)
    assert len(found) == 2 * 2 * 2 * 2 * 3  # models, batch sizes, defenses, samples, attacks
    assert len({row["key"] for row in found}) == len(found)
    assert {row["attack"].partition("(")[0] for row in found} == {"span", "gs", "film"}
    assert all(len(row["texts"]) == row["batch_size"] for row in found)
    for row in found:
        if "refused" in row:
            assert row["refused"]
            continue
        assert 0 <= row["rougeL"] <= 1
        assert 0 <= row["lamp_rouge1"] <= 1
        assert row["seconds"] > 0
        assert row["gradient_seconds"] > 0
        assert len(row["recovered"]) == row["batch_size"]
    exact = [row for row in found if row["attack"] == "span" and row["defense"] == "none" and row["batch_size"] == 1]
    assert [row["token_recall"] for row in exact] == [1.0] * 4
    film = {row["model"] for row in found if row["attack"].startswith("film") and "refused" not in row}
    assert film == {"reference-gpt2"}  # it works on language models only, and says so
    assert any("works on causal-lm" in row.get("refused", "") for row in found)


def test_samples_and_noise_differ_but_defenses_see_the_same_texts(study):
    texts = {}
    for row in rows(study):
        texts.setdefault((row["model"], row["batch_size"], row["sample"]), set()).add(tuple(row["texts"]))
    assert all(len(seen) == 1 for seen in texts.values())
    assert texts["reference-gpt2", 1, 0] != texts["reference-gpt2", 1, 1]


def test_table_and_figure_are_written(study, capsys):
    with open(study / "attack_comparison.csv", newline="") as file:
        entries = list(csv.DictReader(file))
    assert len(entries) == 2 * 2 * 2 * 3
    assert {entry["best"] for entry in entries if entry["defense"] == "none"} == {"span"}
    assert (study / "attack_comparison.png").read_bytes().startswith(b"\x89PNG")


def test_a_finished_run_is_summarised_again_and_other_settings_are_refused(recipe, study, capsys):
    before = (study / "results.jsonl").read_bytes()
    assert recipe.main([*TINY, "--output", str(study)]) == 0
    printed = capsys.readouterr().out
    assert "Attacks compared" in printed
    assert "impossible on" in printed
    assert (study / "results.jsonl").read_bytes() == before
    assert recipe.main([*TINY, "--output", str(study), "--seed", "1"]) == 2
    assert "different configuration" in capsys.readouterr().err


@pytest.mark.multiprocess
def test_two_processes_give_the_same_rows(recipe, study, tmp_path):
    fork(recipe.main, [*TINY, "--output", str(tmp_path / "two"), "--processes", "2"])
    assert len(list((tmp_path / "two" / "shards").glob("rank-*.jsonl"))) == 2
    two, one = comparable(rows(tmp_path / "two")), comparable(rows(study))
    assert len(two) == len(one)
    for left, right in zip(two, one, strict=True):
        assert left.keys() == right.keys()
        for key, value in left.items():
            expected = pytest.approx(right[key], rel=1e-5) if isinstance(value, float) else right[key]
            assert value == expected, (left["key"], key)


def test_files_by_path_and_their_columns(recipe, tmp_path):
    cola, sst2 = tmp_path / "cola.tsv", tmp_path / "sst2.tsv"
    cola.write_text("gj04\t1\t\tThe boat sank .\ngj04\t0\t*\tThe boat sink .\n")
    sst2.write_text("sentence\tlabel\na fine film\t1\na dull film\t0\n")
    folder = tmp_path / "out"
    arguments = [
        "--data", str(cola), str(sst2), "--text-columns", "3", "sentence", "--label-columns", "1", "label",
        "--batch-sizes", "2", "--samples", "1", "--attacks", "span", "--output", str(folder), "--device", "cpu",
    ]  # fmt: skip
    assert recipe.main(arguments) == 0
    found = rows(folder)
    assert [row["data"] for row in found] == [str(cola), str(sst2)] * 2
    assert found[0]["texts"][0].lower().startswith("the boat sank")
    assert all(row["token_recall"] == 1 for row in found if row["model"] == "reference-gpt2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text-columns", "a", "b"], "one entry for each of data"),
        (["--tasks", "causal-lm"], "one entry for each of models"),
        (["--batch-sizes", "0"], "batch_sizes must be at least 1"),
        (["--samples", "0"], "samples must be at least 1"),
        (["--attacks", "sapn"], "Did you mean 'span'"),
        (["--attacks", "span", "span"], "listed twice"),
        (["--defenses"], "defenses is empty"),
        (["--models", "m", "m"], "lists something twice"),
    ],
)
def test_wrong_settings_are_refused(recipe, arguments, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(recipe.ComparisonConfig, arguments)


def test_bad_input_is_refused_before_anything_is_written(recipe, tmp_path, capsys):
    folder = tmp_path / "out"
    bad = ["--defenses", "hide-layers(names='nowhere')", "--samples", "1", "--output", str(folder), "--device", "cpu"]
    assert recipe.main(bad) == 2
    assert "nothing would be hidden" in capsys.readouterr().err
    assert not folder.exists()


def test_no_attacks_means_all_of_them_with_fewer_iterations(recipe):
    from lmleak.attacks import parse_attack
    from lmleak.evaluation.attacks import attack_specs

    assert [parse_attack(spec).name for spec in attack_specs([])] == list(ATTACKS)
    assert attack_specs(["span", "tag", "dlg(iterations=9)"], 7) == ["span", "tag(iterations=7)", "dlg(iterations=9)"]
    assert attack_specs(["tag"], 10**6) == ["tag"]


@pytest.mark.parametrize("path", sorted((ROOT / "configs/attack_comparison").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_config_parses(recipe, path):
    config = parse_config(recipe.ComparisonConfig, ["--config", str(path)])
    assert config.output == f"runs/attack_comparison/{path.stem}"
