"""Files appear whole or not at all."""

import stat

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lmleak.errors import ConfigError
from lmleak.files import (
    refuse_unwritable,
    write_atomically,
    write_bytes_atomically,
    write_csv_atomically,
    write_tensors_atomically,
    write_text_atomically,
)


def test_a_file_and_its_folders_are_written(tmp_path):
    path = tmp_path / "a" / "b" / "file.txt"
    assert write_text_atomically(path, "Grüße\n") == path
    assert path.read_text(encoding="utf-8") == "Grüße\n"
    assert write_bytes_atomically(str(path), b"\x00") == path
    assert path.read_bytes() == b"\x00"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_failed_write_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = write_text_atomically(tmp_path / "file.txt", "old")

    def half(temporary):
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, half)
    with pytest.raises(UnicodeEncodeError):
        write_text_atomically(path, "\udcff")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    for target in (path, tmp_path / "new.txt"):
        with pytest.raises(ConfigError, match=rf"cannot write .*{target.name}: disk full; make room"):
            write_text_atomically(target, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_a_table_has_four_digits_and_nothing_where_there_is_none(tmp_path):
    lines = [{"name": "a, b", "value": 1234.56789, "count": 123456}, {"name": "c", "value": None, "count": 0}]
    path = write_csv_atomically(tmp_path / "a.csv", [*lines, {"name": "d", "value": np.float64(1e-9 / 3), "count": 1}])
    assert path.read_text() == 'name,value,count\n"a, b",1235,123456\nc,,0\nd,3.333e-10,1\n'


def test_tensors_that_do_not_fit_the_disk_are_refused_as_other_files_are(tmp_path, monkeypatch):
    path = write_tensors_atomically(tmp_path / "a.safetensors", {"w": torch.arange(6.0).reshape(2, 3).T})
    assert torch.equal(load_file(path)["w"], torch.arange(6.0).reshape(2, 3).T)
    monkeypatch.setattr("lmleak.files.save_file", lambda *_, **__: (_ for _ in ()).throw(SafetensorError("disk full")))
    with pytest.raises(ConfigError, match=r"cannot write .*: disk full; make room"):
        write_tensors_atomically(path, {"w": torch.zeros(1)})
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    assert load_file(path)["w"].shape == (3, 2)


def test_what_cannot_be_written_is_refused_beforehand(tmp_path):
    refuse_unwritable(tmp_path / "new" / "folder" / "file.txt", "output")
    refuse_unwritable("file-in-the-current-folder.txt", "output")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="is a folder; name a file in it"):
        refuse_unwritable(tmp_path, "output")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write reference=.* is no folder"):
        refuse_unwritable(tmp_path / "file" / "below.txt", "reference")
