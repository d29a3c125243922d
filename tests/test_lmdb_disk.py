"""A growing file is brought to the disk while it grows."""

import errno
import os
import threading

import pytest

from dlhelpers.lmdb_io import LMDBDataset, converting, write_lmdb
from dlhelpers.lmdb_io.writing_back import WriteBack

needs_fdatasync = pytest.mark.skipif(
    not hasattr(os, "fdatasync"), reason="fdatasync of Linux: elsewhere fsync takes its place"
)


def triples(count):
    image = b"RAW\0" + (8).to_bytes(4, "little") * 2 + bytes(8 * 8 * 3)
    return [(f"key{n}", image, n) for n in range(count)]


@needs_fdatasync
def test_the_conversion_goes_on_while_the_disk_is_busy(tmp_path, monkeypatch):
    monkeypatch.setattr(converting, "_COMMIT_BYTES", 1)
    went_on, overlapped, commits = threading.Event(), [], []
    commit = converting.Conversion._commit

    def busy(handle):
        overlapped.append(went_on.wait(30))  # a conversion that waits for it never gets there

    def counted(self, batch):
        commit(self, batch)
        commits.append(self.count)
        if len(commits) == 4:
            went_on.set()

    monkeypatch.setattr(os, "fdatasync", busy)
    monkeypatch.setattr(converting.Conversion, "_commit", counted)
    write_lmdb(triples(100), tmp_path / "db", progress=False)
    assert overlapped[0]
    assert LMDBDataset(tmp_path / "db").targets == list(range(100))


@needs_fdatasync
@pytest.mark.parametrize(
    ("code", "says"), [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "your quota")]
)
def test_an_error_of_writing_back_ends_the_conversion(tmp_path, monkeypatch, code, says):
    monkeypatch.setattr(converting, "_COMMIT_BYTES", 1)

    def refused(handle):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fdatasync", refused)
    with pytest.raises(OSError, match=says) as error:
        write_lmdb(triples(100), tmp_path / "db", progress=False)
    assert error.value.errno == code
    assert not (tmp_path / "db").exists()
    monkeypatch.undo()
    report = write_lmdb(triples(100), tmp_path / "db", progress=False, resume=True)
    assert report.resumed_from > 0
    assert LMDBDataset(tmp_path / "db").targets == list(range(100))


@needs_fdatasync
def test_an_error_of_the_last_writing_back_is_no_success(tmp_path, monkeypatch):
    monkeypatch.setattr(converting, "_COMMIT_BYTES", 1)
    ended = threading.Event()

    def late(handle):
        ended.wait(30)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def finish(self, size, finish=WriteBack.finish):
        ended.set()
        finish(self, size)

    monkeypatch.setattr(os, "fdatasync", late)
    monkeypatch.setattr(WriteBack, "finish", finish)
    with pytest.raises(OSError, match="Input/output error"):
        write_lmdb(triples(40), tmp_path / "db", progress=False)
    assert not (tmp_path / "db").exists()


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_the_file_stays_open(tmp_path, fails):
    psutil = pytest.importorskip("psutil", reason="psutil (extra dev)")
    items = [*triples(20), ("bad", b"no image", 0)] if fails else triples(20)
    try:
        write_lmdb(items, tmp_path / "db", progress=False)
    except ValueError:
        assert fails
    found = [file.path for file in psutil.Process().open_files()]
    assert not [path for path in found if path.startswith(str(tmp_path))]
