"""The result folder: nothing finished is lost, nothing is counted twice, nothing of another run is mixed in."""

import json
import resource

import pytest

from lmleak.errors import ConfigError, DataError
from lmleak.evaluation.shards import ResultFolder


def folder(path, **config):
    result = ResultFolder(path, {"seed": 0} | config)
    result.open()
    return result


def row(value):
    return {"key": str(value), "v": value}


def test_rows_come_back_in_item_order_whoever_wrote_them(tmp_path):
    run = folder(tmp_path / "out")
    run.append(1, 2, [row(2)])
    run.append(0, 0, [row(0), row(0.5)])
    run.append(1, 1, [row(1)])
    assert [r["v"] for r in run.merge(range(3))] == [0, 0.5, 1, 2]
    assert [json.loads(x)["v"] for x in (tmp_path / "out/results.jsonl").read_text().splitlines()] == [0, 0.5, 1, 2]


def test_a_full_disk_is_a_refusal_and_what_is_finished_stays(tmp_path):
    run = folder(tmp_path / "out")
    run.append(0, 0, [row(0)])
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))  # stands in for the end of the disk
    try:
        with pytest.raises(ConfigError, match=r"cannot write .*rank-0\.jsonl: File too large; make room"):
            run.append(0, 1, [row("x" * 500)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    again = folder(tmp_path / "out")
    assert list(again.finished()) == [0]
    again.append(0, 1, [row(1)])
    assert [r["v"] for r in again.merge(range(2))] == [0, 1]


def test_torn_last_line_is_dropped_and_the_rest_kept(tmp_path):
    run = folder(tmp_path / "out")
    run.append(0, 0, [row(0)])
    with open(tmp_path / "out/shards/rank-0.jsonl", "a") as file:
        file.write('{"item": 1, "rows": [{"v"')
    again = folder(tmp_path / "out")
    assert list(again.finished()) == [0]
    again.append(0, 1, [row(1)])
    assert [r["v"] for r in again.merge(range(2))] == [0, 1]


def test_item_written_twice_counts_once(tmp_path):
    run = folder(tmp_path / "out")
    run.append(0, 0, [row("first")])
    run.append(1, 0, [row("second")])
    assert [r["v"] for r in run.merge(range(1))] == ["first"]


def test_missing_item_leaves_no_results_file(tmp_path):
    run = folder(tmp_path / "out")
    run.append(0, 0, [row(0)])
    with pytest.raises(DataError, match="1 item"):
        run.merge(range(2))
    assert not (tmp_path / "out/results.jsonl").exists()


def test_other_configuration_is_refused_and_named(tmp_path):
    folder(tmp_path / "out", model="a")
    with pytest.raises(ConfigError, match="model: 'a' there, 'b' now"):
        folder(tmp_path / "out", model="b")


def test_foreign_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigError, match="holds no lmleak results"):
        folder(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(ConfigError, match="is a file"):
        folder(tmp_path / "thesis.txt")


def test_resume_can_be_forbidden(tmp_path):
    folder(tmp_path / "out")
    with pytest.raises(ConfigError, match="holds results already"):
        ResultFolder(tmp_path / "out", {"seed": 0}, resume=False).open()


def test_a_folder_opened_twice_does_not_refuse_itself(tmp_path):
    """As an audit of layers does, which writes gradients into it before there are rows."""
    run = ResultFolder(tmp_path / "out", {"seed": 0}, resume=False)
    run.open()
    run.append(0, 0, [row(0)])
    run.open()
    assert list(run.finished()) == [0]


def test_damaged_middle_line_is_named(tmp_path):
    run = folder(tmp_path / "out")
    run.append(0, 0, [])
    shard = tmp_path / "out/shards/rank-0.jsonl"
    shard.write_text("not json\n" + shard.read_text())
    with pytest.raises(DataError, match="line 1 is damaged"):
        run.finished()


def test_nan_never_reaches_the_disk(tmp_path):
    run = folder(tmp_path / "out")
    with pytest.raises(ValueError, match="not JSON compliant"):
        run.append(0, 0, [row(float("nan"))])
    assert run.finished() == {}


def test_other_weights_or_texts_under_the_same_settings_are_refused(tmp_path):
    ResultFolder(tmp_path / "out", {"seed": 0}, identity={"texts": "abc"}).open()
    with pytest.raises(ConfigError, match="texts: 'abc' there, 'abd' now"):
        ResultFolder(tmp_path / "out", {"seed": 0}, identity={"texts": "abd"}).open()


@pytest.mark.parametrize("damage", ["garbage: [", "- a", "\x00"])
@pytest.mark.parametrize("name", ["config.yaml", "identity.yaml"])
def test_damaged_settings_are_refused(tmp_path, name, damage):
    folder(tmp_path / "out")
    (tmp_path / "out" / name).write_text(damage)
    with pytest.raises(DataError, match="damaged"):
        folder(tmp_path / "out")


@pytest.mark.parametrize("rows", [7, [{}], [3], None])
def test_damaged_rows_are_refused(tmp_path, rows):
    run = folder(tmp_path / "out")
    run.append(0, 0, rows)  # with a digest that is right
    with pytest.raises(DataError, match="line 1 is damaged") as refusal:
        run.finished()
    assert "digest" not in str(refusal.value)


def test_folder_that_cannot_be_made_is_refused():
    with pytest.raises(ConfigError, match="cannot create"):
        folder("/proc/lmleak/out")
