"""A file takes whole records or nothing, says what is wrong, and goes on when it can."""

import logging
import os
import shutil

import pytest

from mixtral_jax import appending
from mixtral_jax.appending import AppendFile
from mixtral_jax.config import RunError


class Disk:
    """Stands before os.write: it has room for so many bytes, and then it is full."""

    def __init__(self, monkeypatch):
        self.room = 10**9
        self._write = os.write
        monkeypatch.setattr(appending.os, "write", self.write)

    def write(self, fd, data):
        if not self.room:
            raise OSError(28, "No space left on device")
        done = self._write(fd, data[: self.room])
        self.room -= done
        return done


def test_records_are_in_the_file_at_once(tmp_path):
    file = AppendFile(tmp_path / "a" / "b")
    file.append(b"one\n")
    assert (tmp_path / "a" / "b").read_bytes() == b"one\n"
    file.close()
    file.close()
    again = AppendFile(tmp_path / "a" / "b")
    again.append(b"two\n")
    again.close()
    assert (tmp_path / "a" / "b").read_bytes() == b"one\ntwo\n"


def test_a_full_disk_is_named_and_leaves_no_half_record(tmp_path, monkeypatch):
    disk = Disk(monkeypatch)
    path = tmp_path / "metrics.jsonl"
    file = AppendFile(path)
    file.append(b"one\n")
    disk.room = 2
    with pytest.raises(RunError, match=r"metrics\.jsonl cannot be written: No space left on device; free some space"):
        file.append(b"two\n")
    assert path.read_bytes() == b"one\n"
    disk.room = 100
    file.append(b"three\n")
    file.close()
    assert path.read_bytes() == b"one\ntwo\nthree\n"


def test_a_real_full_device():
    """/dev/full fails every write, as the last byte of a disk does."""
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    file = AppendFile("/dev/full")
    with pytest.raises(RunError, match="/dev/full cannot be written: No space left"):
        file.append(b"x")
    with pytest.raises(RunError, match="No space left"):
        file.close()


@pytest.fixture
def backlog(monkeypatch):
    monkeypatch.setattr(appending, "BACKLOG", 3)


def test_going_on_keeps_the_latest_records_and_speaks_once(tmp_path, monkeypatch, caplog, backlog):
    caplog.set_level(logging.WARNING)
    disk = Disk(monkeypatch)
    path = tmp_path / "metrics.jsonl"
    file = AppendFile(path, keep_going=True)
    file.append(b"0\n")
    disk.room = 0
    for i in range(1, 6):
        file.append(b"%d\n" % i)
    assert len(caplog.records) == 1
    assert path.read_bytes() == b"0\n"
    disk.room = 100
    file.append(b"6\n")
    assert path.read_bytes() == b"0\n4\n5\n6\n", "the latest three"
    assert "written again; 3 lines were lost" in caplog.records[1].getMessage()
    disk.room = 0
    file.append(b"7\n")
    assert len(caplog.records) == 3, "a new outage is said again"
    disk.room = 100
    file.close()
    assert path.read_bytes() == b"0\n4\n5\n6\n7\n", "close tries once more"


@pytest.mark.parametrize("keep_going", [False, True])
def test_a_folder_that_vanishes_is_noticed(tmp_path, caplog, keep_going):
    """The kernel would take the bytes for a deleted file and forget them."""
    folder = tmp_path / "run"
    file = AppendFile(folder / "metrics.jsonl", keep_going)
    file.append(b"one\n")
    moved = shutil.move(folder, tmp_path / "elsewhere")
    if keep_going:
        file.append(b"two\n")
        assert "its folder was removed" in caplog.text
    else:
        with pytest.raises(RunError, match=r"run/metrics\.jsonl cannot be written.*its folder was removed"):
            file.append(b"two\n")
    assert not folder.exists()
    shutil.move(moved, folder)
    file.append(b"three\n")
    file.close()
    assert (folder / "metrics.jsonl").read_bytes() == b"one\ntwo\nthree\n"


def test_a_file_that_was_replaced_is_noticed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = AppendFile(path)
    file.append(b"one\n")
    path.unlink()
    path.write_bytes(b"other\n")
    with pytest.raises(RunError, match="replaced by another file"):
        file.append(b"two\n")
    file.append(b"three\n")
    assert path.read_bytes() == b"other\ntwo\nthree\n", "what others wrote is not ours to cut"


def test_half_a_record_that_could_not_be_cut_at_once_is_cut_later(tmp_path, monkeypatch):
    disk = Disk(monkeypatch)
    file = AppendFile(tmp_path / "m")
    file.append(b"one\n")
    disk.room = 2
    with monkeypatch.context() as patch:
        patch.setattr(appending.os, "ftruncate", lambda *_: disk.write(-1, b""))
        with pytest.raises(RunError):
            file.append(b"two\n")
    assert (tmp_path / "m").read_bytes() == b"one\ntw"
    disk.room = 100
    file.append(b"three\n")
    assert (tmp_path / "m").read_bytes() == b"one\ntwo\nthree\n"


def test_a_file_that_cannot_be_opened_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"file/metrics\.jsonl cannot be written"):
        AppendFile(tmp_path / "file" / "metrics.jsonl")
