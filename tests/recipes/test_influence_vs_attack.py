"""The recipe on one process and on two, started anew where it was killed; the same rows every time."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import pytest

from lmleak.config import parse_config
from tests.launching import ROOT, launch

RECIPE = ROOT / "recipes" / "influence_vs_attack.py"
SETTINGS = [
    "--model", "reference-gpt2", "--samples", "3", "--max-length", "6", "--noise-levels", "0.1", "10", "--attacks",
    "tag(iterations=4, candidates=4)", "--probes", "2", "--probe-steps", "8", "--max-products", "40",
    "--device", "cpu",
]  # fmt: skip


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def assert_same(left, right, path="row"):
    """Text equal, numbers to 1e-5, timing aside."""
    assert type(left) is type(right), path
    if isinstance(left, dict):
        assert left.keys() == right.keys(), path
        for key in left:
            if not key.endswith(("seconds", "peak_bytes")):
                assert_same(left[key], right[key], f"{path}.{key}")
    elif isinstance(left, list):
        assert len(left) == len(right), path
        for i, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_same(a, b, f"{path}[{i}]")
    elif isinstance(left, float):
        assert left == pytest.approx(right, rel=1e-5, abs=1e-12), path
    else:
        assert left == right, path


@pytest.fixture(scope="module")
def one_process(recipe, tmp_path_factory):
    """The finished folder, and what was printed."""
    folder, printed = tmp_path_factory.mktemp("one") / "out", io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert recipe.main([*SETTINGS, "--output", str(folder), "--processes", "1"]) == 0
    return folder, printed.getvalue()


def test_one_process_writes_everything(one_process):
    folder, printed = one_process
    assert len(rows(folder)) == 3 * 3
    assert (folder / "report.html").stat().st_size > 10_000
    assert json.loads((folder / "summary.json").read_text())["correlations"]
    assert "Spearman rank correlation" in printed
    assert "report:" in printed


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_killed_run_is_finished_by_two_processes_with_the_same_rows(one_process, tmp_path):
    """A kill leaves a finished item and half of another, as tests/evaluation/test_faults.py shows."""
    folder, (whole, _) = tmp_path / "killed", one_process
    shard = folder / "shards" / "rank-0.jsonl"
    shard.parent.mkdir(parents=True)
    for name in ("config.yaml", "identity.yaml"):
        shutil.copy(whole / name, folder / name)
    first, second, *_ = (whole / "shards" / "rank-0.jsonl").read_text().splitlines(keepends=True)
    shard.write_text(first + second[: len(second) // 2])
    finished = launch(RECIPE, *SETTINGS, "--output", folder, "--processes", "2")
    assert finished.returncode == 0, finished.stderr
    lines = [file.read_text().splitlines(keepends=True) for file in sorted((folder / "shards").glob("rank-*.jsonl"))]
    assert lines[0][0] == first  # what was finished was not computed again
    assert [len(each) for each in lines] == [1 + 1, 1]  # both really worked
    assert_same(rows(folder), rows(whole))


def test_wrong_number_of_processes_is_refused(recipe, tmp_path, capsys):
    folder = tmp_path / "out"
    assert recipe.main([*SETTINGS, "--output", str(folder), "--processes", "2"]) == 2
    assert "2 were asked for" in capsys.readouterr().err
    assert not folder.exists()


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs" / "influence_vs_attack").glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_config_parses(recipe, path):
    config = parse_config(recipe.StudyConfig, ["--config", str(path)])
    assert config.output.startswith("runs/")
