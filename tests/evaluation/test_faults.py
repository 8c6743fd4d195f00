"""What can break in the middle of a run: a process, the disk, a file. Nothing finished is lost or counted twice.

The processes are real, and really killed; ``faulty_run.py`` is what they run.
"""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmleak.errors import ConfigError, DataError
from lmleak.evaluation import ResultFolder, finish, process_state, run_items
from tests.evaluation import faulty_run
from tests.launching import fate, fork, launch, start_by_hand

DRIVER = Path(faulty_run.__file__)
SOON = 120  # seconds for a faulty run on a busy machine; the waits it must not fall into are far longer

pytestmark = [pytest.mark.filterwarnings("ignore::ResourceWarning")]


def run_alone(folder: Path) -> int:
    """The same run on one process, without a fault; its exit status."""
    return faulty_run.main([str(folder), "none"])


def worked(folder: Path) -> list[int]:
    return sorted(int(n) for log in folder.with_suffix(".log").iterdir() for n in log.read_text().split())


def finished(folder: Path) -> dict[int, list[dict]]:
    return ResultFolder(folder, {"items": 8}).finished()


def assert_complete(folder: Path) -> None:
    """All eight rows, each once, in order and with the right numbers."""
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_bytes().split(b"\n")[:-1]]
    assert [r["key"] for r in rows] == [str(i) for i in range(8)]
    assert [(r["square"], r["third"]) for r in rows] == [(i**2, i / 3) for i in range(8)]
    assert all(r["text"] == f"text {r['key']}\u2028\x85 of two lines" for r in rows)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_killed_process_ends_the_run_and_it_resumes(tmp_path):
    """Though the other process is busy for an hour: the launcher ends it, and nobody waits."""
    folder = tmp_path / "out"
    broken = launch(DRIVER, folder, "killed-early", timeout=SOON)
    assert broken.returncode != 0
    assert not (folder / "results.jsonl").exists()
    kept = finished(folder)
    assert 4 in kept  # the first of process 1
    assert set(kept) <= {0, 4}  # process 0 may have been ended before it finished any
    assert run_alone(folder) == 0  # even on another number of processes
    assert_complete(folder)
    again = [i for i in range(8) if worked(folder).count(i) > 1]
    assert not set(again) & set(kept)  # what was finished was not done again


@pytest.mark.slow
@pytest.mark.multiprocess
def test_without_a_launcher_the_survivor_says_so_and_ends(tmp_path):
    """As on two machines, where each launcher watches its own processes alone."""
    folder = tmp_path / "out"
    processes = start_by_hand(DRIVER, folder, "killed")
    try:
        _, said = processes[0].communicate(timeout=SOON)
        assert processes[1].wait(timeout=SOON) == -signal.SIGKILL
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert processes[0].returncode == 2, said
    assert "refused: another of the 2 processes died" in said
    assert "run the same command again to resume" in said
    assert set(finished(folder)) == {0, 1, 2, 3, 4}
    assert run_alone(folder) == 0
    assert_complete(folder)
    assert worked(folder) == [0, 1, 2, 3, 4, 5, 5, 6, 7]  # 5 is where process 1 was killed


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_full_disk_is_a_refusal_by_all_and_the_run_resumes(tmp_path):
    folder = tmp_path / "out"
    broken = launch(DRIVER, folder, "full", timeout=SOON)
    assert broken.returncode != 0
    assert broken.stderr.count("refused: cannot write") == 2  # both processes say it, and neither waits
    assert "rank-1.jsonl: File too large; make room" in broken.stderr
    assert not (folder / "results.jsonl").exists()
    assert run_alone(folder) == 0
    assert_complete(folder)
    assert worked(folder) == [0, 1, 2, 3, 4, 5, 5, 6, 7]  # 5 is what did not fit


def test_a_corrupt_shard_stops_the_run_before_it_does_harm(tmp_path, capsys):
    folder = tmp_path / "out"
    started = ResultFolder(folder, {"items": 8})
    started.open()
    for i in range(5):
        started.append(i // 4, i, [faulty_run.row(i, faulty_run.ITEMS[i])])
    shard = folder / "shards" / "rank-0.jsonl"
    good = shard.read_bytes()
    shard.write_bytes(good.replace(b'"third": 0.3333', b'"third": 0.3433'))  # still JSON, and still a number
    assert run_alone(folder) == 2
    assert "rank-0.jsonl, line 2 is damaged" in capsys.readouterr().err
    assert not (folder / "results.jsonl").exists()
    lines = good.split(b"\n")
    shard.write_bytes(b"\n".join([lines[0], *lines[2:]]))  # as the message says
    assert run_alone(folder) == 0
    assert_complete(folder)
    assert worked(folder) == [1, 5, 6, 7]


class SlowToRead(ResultFolder):
    """A folder on a slow disk, for all processes but the first."""

    def finished(self):
        if os.environ["RANK"] != "0":
            time.sleep(2)
        return super().finished()


def resume_slowly(path: Path) -> None:
    state = process_state()
    folder = SlowToRead(path, {"items": 8})
    run_items(range(8), lambda i, item: [{"key": str(i), "by": state.process_index}], folder, state, label="working")
    finish(state)


@pytest.mark.multiprocess
def test_a_process_that_reads_the_folder_late_splits_the_same_items(tmp_path):
    """Each once read for itself what remains: item 6 of 8 was lost when process 1 was slow, and the run refused."""
    run = ResultFolder(tmp_path / "out", {"items": 8})
    run.open()
    for i in range(5):
        run.append(0, i, [{"key": str(i), "by": 0}])
    fork(resume_slowly, tmp_path / "out")
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [(r["key"], r["by"]) for r in rows[5:]] == [("5", 0), ("6", 0), ("7", 1)]


# Every byte and every moment, on one process ---------------------------------------------------------------


def three_items(path: Path) -> tuple[ResultFolder, Path]:
    run = ResultFolder(path, {"items": 3})
    run.open()
    for i in range(3):
        run.append(0, i, [{"key": str(i), "value": i / 7, "text": "naïve\u2028"}])
    return run, path / "shards" / "rank-0.jsonl"


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_flipped_bit_changes_a_number(tmp_path_factory, data):
    """Damage is refused, or what it hit (an unfinished last line) is done again."""
    run, shard = three_items(tmp_path_factory.mktemp("flip"))
    good, expected = shard.read_bytes(), run.finished()
    at = data.draw(st.integers(0, len(good) - 1))
    bad = bytearray(good)
    bad[at] ^= 1 << data.draw(st.integers(0, 7))
    shard.write_bytes(bytes(bad))
    again = ResultFolder(run.path, {"items": 3})
    again.open()
    try:
        found = again.finished()
    except DataError:
        found = {}
    assert all(rows == expected[item] for item, rows in found.items())


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_cut_anywhere_the_whole_lines_stay(tmp_path_factory, data):
    """What a kill in the middle of a write leaves."""
    run, shard = three_items(tmp_path_factory.mktemp("cut"))
    good, expected = shard.read_bytes(), run.finished()
    shard.write_bytes(good[: data.draw(st.integers(0, len(good)))])
    whole = shard.read_bytes().count(b"\n")
    again = ResultFolder(run.path, {"items": 3})
    again.open()
    assert again.finished() == {i: expected[i] for i in range(whole)}
    for i in range(whole, 3):
        again.append(1, i, expected[i])
    assert len(again.merge(range(3))) == 3


def killed_at(path: Path, rename_number: int) -> None:
    """Let a process open and merge the folder that is killed at its rename of this number, from 0."""

    def run_until_killed():
        left, rename = rename_number, os.replace

        def replace(*arguments):
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            rename(*arguments)

        os.replace = replace
        run = ResultFolder(path, {"items": 3})
        run.open()
        run.merge(range(3))

    assert fate(run_until_killed) == -signal.SIGKILL


@pytest.mark.parametrize("rename", [0, 1])
def test_killed_while_the_folder_is_made_it_can_still_be_made(tmp_path, rename):
    killed_at(tmp_path / "out", rename)
    assert not (tmp_path / "out" / "config.yaml").exists()
    run, _ = three_items(tmp_path / "out")
    assert len(run.merge(range(3))) == 3


def test_killed_while_merging_there_are_old_results_or_new_ones(tmp_path):
    run, _ = three_items(tmp_path / "out")
    killed_at(tmp_path / "out", 2)  # after those of the two files of settings
    assert not (tmp_path / "out" / "results.jsonl").exists()
    assert len(run.merge(range(3))) == 3
    before = (tmp_path / "out" / "results.jsonl").read_bytes()
    killed_at(tmp_path / "out", 2)
    assert (tmp_path / "out" / "results.jsonl").read_bytes() == before


def test_a_folder_with_rows_but_without_settings_is_not_taken_over(tmp_path):
    three_items(tmp_path / "out")
    (tmp_path / "out" / "config.yaml").unlink()
    with pytest.raises(ConfigError, match="holds no lmleak results"):
        ResultFolder(tmp_path / "out", {"items": 3}).open()
