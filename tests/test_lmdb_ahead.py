"""While a commit is at work the next files are read, and nothing else changes by it."""

import shutil
import threading
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import Subset
from torchvision.datasets import ImageFolder

from dlhelpers.course import data
from dlhelpers.lmdb_io import (
    LMDBDataset,
    SourceError,
    converting,
    folder_source,
    listing,
    write_listing,
    write_lmdb,
)
from dlhelpers.lmdb_io.identity import Stamp
from dlhelpers.lmdb_io.loading import Item
from dlhelpers.lmdb_io.reading_ahead import ReadAhead

COUNT = 96


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return data.photos(
        tmp_path_factory.mktemp("ahead") / "photos", count=COUNT, size=16, progress=False
    )


@pytest.fixture(scope="module")
def stored(photos):
    """What the database of the folder holds, read by ImageFolder and from the files."""
    found = []
    for path, target in ImageFolder(photos).samples:
        with open(path, "rb") as file:
            found.append((file.read(), target))
    return found


@pytest.fixture
def waiting(monkeypatch):
    """Each chunk is committed, and no commit ends before something was read ahead; return in
    which threads files were read."""
    seen = []
    monkeypatch.setattr(converting, "_COMMIT_BYTES", 1)
    load, stop = folder_source.FolderSource.load, ReadAhead.stop

    def loads(self, task):
        seen.append(threading.current_thread() is threading.main_thread())
        return load(self, task)

    def stops(self):
        if self._thread is not None:
            self._thread.join(30)  # it ends behind one chunk, which is more than a byte
        stop(self)

    monkeypatch.setattr(folder_source.FolderSource, "load", loads)
    monkeypatch.setattr(ReadAhead, "stop", stops)
    return seen


def contents(path):
    return [*LMDBDataset(path, decode=None)]


def an_item(size):
    item = Item("", Stamp(b"", 0), None)
    item.image = bytes(size)
    return item


class Ends(BaseException):
    """What no code of a source raises."""


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9), max_size=12),
    ahead=st.lists(st.booleans(), min_size=14, max_size=14),
    most=st.integers(0, 20),
    fails=st.booleans(),
)
def test_chunks_come_in_their_order_and_an_error_in_its_place(sizes, ahead, most, fails):
    made, taken = [[an_item(size)] for size in sizes], count()

    def chunks():
        for items in made:
            next(taken)
            yield items
        if fails:
            raise Ends

    reader, found = ReadAhead(chunks(), most), []
    error = None
    for goes_on in ahead:
        if goes_on:
            reader.start()
            reader.stop()
        waits = sum(len(items[0].image) for items in reader._ready)
        assert waits - max(sizes, default=0) < max(most, 1)
        try:
            found.append(next(reader))
        except BaseException as raised:
            error = raised
            break
    assert len(found) == len(made)
    assert all(one is two for one, two in zip(found, made, strict=True))
    assert type(error) is (Ends if fails else StopIteration)
    assert next(taken) == len(made)


def test_files_are_read_while_a_commit_is_at_work(photos, stored, tmp_path, waiting):
    write_lmdb(photos, tmp_path / "db", progress=False)
    assert waiting == [True] * 16 + [False] * (COUNT - 16)
    assert contents(tmp_path / "db") == stored
    assert threading.active_count() == 1 or not [
        thread for thread in threading.enumerate() if thread._target == ReadAhead._load
    ]


def test_files_of_a_subset_and_of_a_listing_are_too(photos, stored, tmp_path, waiting):
    part = Subset(ImageFolder(photos), range(40))
    write_lmdb(part, tmp_path / "part", progress=False)
    assert contents(tmp_path / "part") == stored[:40]
    write_listing(photos, tmp_path / "listing", progress=False)
    write_lmdb(tmp_path / "listing", tmp_path / "db", progress=False)
    assert contents(tmp_path / "db") == stored
    assert waiting.count(True) == 32


def test_code_of_others_runs_in_the_thread_that_called(photos, stored, tmp_path, waiting):
    here = []

    def loader(path):
        here.append(threading.current_thread() is threading.main_thread())
        return Image.open(path).convert("RGB")

    def items():
        for number, (image, target) in enumerate(stored):
            here.append(threading.current_thread() is threading.main_thread())
            yield str(number), image, target

    own = ImageFolder(photos, loader=loader)
    assert write_lmdb(own, tmp_path / "own", progress=False).count == COUNT
    write_lmdb(items(), tmp_path / "items", progress=False)
    assert contents(tmp_path / "items") == stored
    mixed = [Subset(own, range(20)), Subset(ImageFolder(photos), range(20, 40))]
    assert write_lmdb(mixed[0] + mixed[1], tmp_path / "mixed", progress=False).count == 40
    assert all(here)
    assert all(waiting)


def test_what_was_read_ahead_counts_only_once_it_is_stored(photos, stored, tmp_path, waiting):
    source = shutil.copytree(photos, tmp_path / "photos")
    bad = ImageFolder(source).samples[20][0]
    with open(bad, "wb"):
        pass
    with pytest.raises(SourceError, match=r"not an image.* 20 images are kept"):
        write_lmdb(source, tmp_path / "db", progress=False)
    with open(bad, "wb") as file:
        file.write(stored[20][0])
    report = write_lmdb(source, tmp_path / "db", progress=False, resume=True)
    assert report.resumed_from == 20
    assert contents(tmp_path / "db") == stored


def test_an_error_while_reading_ahead_ends_the_conversion(
    photos, stored, tmp_path, waiting, monkeypatch
):
    write_listing(photos, tmp_path / "listing", progress=False)
    part = listing.Listing.part

    def breaks(self, own):
        for number, task in enumerate(part(self, own)):
            if number == 40:
                raise OSError(5, "the disk is gone")
            yield task

    with monkeypatch.context() as patch:
        patch.setattr(listing.Listing, "part", breaks)
        with pytest.raises(OSError, match="the disk is gone") as error:
            write_lmdb(tmp_path / "listing", tmp_path / "db", progress=False)
    assert "images are kept: resume=True" in error.value.__notes__[0]
    report = write_lmdb(tmp_path / "listing", tmp_path / "db", progress=False, resume=True)
    assert report.resumed_from == 32
    assert contents(tmp_path / "db") == stored
