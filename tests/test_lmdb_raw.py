"""Raw images: from the map into the batch in one copy, and nothing but what the record says."""

import importlib
import io
import mmap
import struct
import sys
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from dlhelpers.lmdb_io import DatabaseError, LMDBDataset, checksums, schema, write_lmdb
from dlhelpers.lmdb_io.raw_batches import RawBatch

COUNT, SIDE = 24, 8
LAYOUTS = ("auto", "channels_last", "contiguous")


def encoded(pixels, kind, **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def raw(pixels, orientation=0):
    return struct.pack("<3sBII", b"RAW", orientation, *pixels.shape[:2]) + pixels.tobytes()


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (COUNT, SIDE, SIDE, 3), np.uint8)


@pytest.fixture(scope="module")
def targets():
    return [(-1) ** n * n * 1001 for n in range(COUNT)]


@pytest.fixture(scope="module")
def mixed(pixels, targets, tmp_path_factory):
    """Two shards of raw images, turned raw images and PNGs, with keys of many lengths."""
    folder = tmp_path_factory.mktemp("raw") / "shards"
    images = [
        encoded(p, "png") if n % 5 == 3 else raw(p, 6 if n % 7 == 4 else 0)
        for n, p in enumerate(pixels)
    ]
    keys = ["k" * (1 + 37 * n) for n in range(COUNT)]
    for rank in range(2):
        items = list(zip(keys, images, targets, strict=True))
        write_lmdb(items, folder, shard=(rank, 2), progress=False)
    return folder


@pytest.mark.parametrize("checksum", [True, False])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_holds_what_was_written_whatever_is_beside_it(
    mixed, pixels, targets, layout, threads, checksum
):
    dataset = LMDBDataset(
        mixed, collate=True, memory_format=layout, threads=threads, checksum=checksum
    )
    numbers = [dataset.find("k" * (1 + 37 * n)) for n in range(COUNT)]
    for first in (0, 3, 4):  # a raw image, a PNG, and one that is turned
        chosen = [first, *range(COUNT - 1, -1, -1), first]
        found, labels = dataset.__getitems__([numbers[n] for n in chosen])
        assert np.array_equal(found.permute(0, 2, 3, 1).numpy(), pixels[chosen])
        assert labels.tolist() == [targets[n] for n in chosen]
        assert found.is_contiguous() == (layout == "contiguous")


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_one_by_one_holds_the_same(mixed, pixels, targets, layout):
    dataset = LMDBDataset(mixed, memory_format=layout)
    for n in range(COUNT):
        image, target = dataset[dataset.find("k" * (1 + 37 * n))]
        image += 0  # it is the reader's own
        assert np.array_equal(image.permute(1, 2, 0).numpy(), pixels[n])
        assert target == targets[n]


def test_targets_are_transformed_once_each(mixed, targets):
    seen = []
    dataset = LMDBDataset(
        mixed, collate=True, target_transform=lambda target: seen.append(target) or len(seen)
    )
    _, labels = dataset.__getitems__(range(COUNT))
    assert sorted(seen) == sorted(targets)
    assert sorted(labels.tolist()) == [n + 1 for n in range(COUNT)]


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_large_images_are_shared_by_threads_and_by_workers(tmp_path, layout):
    pixels = np.random.default_rng(1).integers(0, 256, (6, 160, 150, 3), np.uint8)
    write_lmdb([(str(n), raw(p), n) for n, p in enumerate(pixels)], tmp_path / "db", progress=False)
    dataset = LMDBDataset(tmp_path / "db", collate=True, memory_format=layout, threads=2)
    here, _ = dataset.__getitems__(range(6))
    assert np.array_equal(here.permute(0, 2, 3, 1).numpy(), pixels)
    assert here.data_ptr() % mmap.PAGESIZE == 0
    loader = DataLoader(dataset, 3, num_workers=1, collate_fn=dataset.collate_fn)
    there = torch.cat([images for images, _ in list(loader)])
    assert np.array_equal(there.permute(0, 2, 3, 1).numpy(), pixels)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("checksum", [True, False])
def test_no_image_is_made_on_the_way_into_a_batch(tmp_path, layout, checksum):
    side = 96
    image = np.zeros((side, side, 3), np.uint8)
    write_lmdb([(str(n), raw(image), n) for n in range(8)], tmp_path / "db", progress=False)
    dataset = LMDBDataset(tmp_path / "db", collate=True, memory_format=layout, checksum=checksum)
    dataset.__getitems__(range(8))  # makes room for the batch
    tracemalloc.start()
    try:
        dataset.__getitems__(range(8))
        assert tracemalloc.get_traced_memory()[1] < image.nbytes
    finally:
        tracemalloc.stop()


def test_images_of_another_size_are_named(tmp_path, pixels):
    images = [raw(pixels[0]), raw(pixels[1][:4])]
    write_lmdb([(str(n), i, n) for n, i in enumerate(images)], tmp_path / "db", progress=False)
    dataset = LMDBDataset(tmp_path / "db", collate=True)
    with pytest.raises(ValueError, match=r"record 1 has the shape \(4, 8, 3\), .*\(8, 8, 3\)"):
        dataset.__getitems__([0, 1])


# ---- records that are damaged ----


class Stored:
    """Stands in for a file: gives its records by position."""

    def __init__(self, records):
        self._records = records

    def open(self):
        return self

    begin = open

    def get(self, key):
        record = self._records[int(key)]
        return None if record is None else memoryview(record)

    def abort(self):
        pass


@settings(max_examples=80, deadline=None)
@given(data=st.data(), check=st.booleans())
def test_what_is_copied_is_what_the_record_says(data, check):
    records = []
    for position in range(4):
        key = data.draw(st.binary(min_size=1, max_size=20))
        target = data.draw(st.sampled_from([b"7", b"-3", b"{}", b"", b"x", b"1.5", b"true"]))
        shape = data.draw(st.sampled_from([(2, 2), (2, 2), (2, 2), (1, 4), (2, 3)]))
        image = raw(np.full((*shape, 3), 200 + position, np.uint8), data.draw(st.integers(0, 1)))
        record = bytearray(schema.pack_record(position, key, target, image))
        if data.draw(st.booleans()):
            record[data.draw(st.integers(0, len(record) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        cut = data.draw(st.sampled_from([None, None, None, 5, len(record) - 1]))
        records.append(bytes(record[:cut]) if data.draw(st.integers(0, 9)) else None)
    file, head = Stored(records), raw(np.zeros((2, 2, 3), np.uint8))[:12]
    out, targets = np.zeros((4, 2, 2, 3), np.uint8), [None] * 4
    batch = RawBatch(head, planar=False)
    left = batch.copy([(file, n) for n in range(4)], range(4), out, targets, check)
    for position, record in enumerate(records):
        try:
            wanted = schema.unpack_record(memoryview(record or b""), position, check)
        except DatabaseError:
            assert position in left
            continue
        is_like_the_others = bytes(wanted.image[:12]) == head and len(wanted.image) == 24
        assert (position in left) != is_like_the_others
        if is_like_the_others:
            assert out[position].tobytes() == bytes(wanted.image[12:])
            assert targets[position] == wanted.target


@pytest.mark.parametrize("check", [True, False])
def test_a_record_that_stands_at_another_position_is_left(check):
    image = raw(np.zeros((2, 2, 3), np.uint8))
    file, out = Stored([schema.pack_record(3, b"k", b"0", image)] * 4), np.empty((4, 2, 2, 3), "u1")
    batch, places = RawBatch(image[:12], planar=False), [(file, n) for n in range(4)]
    assert batch.copy(places, range(4), out, [None] * 4, check) == [0, 1, 2]


def test_a_damaged_image_is_named_in_a_batch_too(tmp_path, pixels):
    items = [(f"key{n}", raw(p), n) for n, p in enumerate(pixels)]
    path = write_lmdb(items, tmp_path / "db", progress=False).path
    content = bytearray(path.read_bytes())
    content[content.find(pixels[5].tobytes()) + 7] ^= 1
    path.write_bytes(content)
    with pytest.raises(DatabaseError, match="record 5 is damaged: its checksum differs"):
        LMDBDataset(path, collate=True).__getitems__(range(COUNT))
    found, _ = LMDBDataset(path, collate=True, checksum=False).__getitems__(range(COUNT))
    assert (found.permute(0, 2, 3, 1).numpy() != pixels).sum() == 1


# ---- the checksum ----


@given(st.binary(max_size=200), st.integers(0, 2**32 - 1))
def test_the_checksum_is_that_of_zlib(content, before):
    assert checksums.crc32(content, before) == zlib.crc32(content, before)
    assert checksums.crc32(memoryview(content)[3:]) == zlib.crc32(content[3:])


def test_the_checksum_of_large_contents_is_that_of_zlib():
    content = np.random.default_rng(0).bytes(100_003)
    assert checksums.crc32(content, checksums.crc32(b"head")) == zlib.crc32(b"head" + content)


def test_without_isal_zlib_computes_the_checksum(monkeypatch):
    monkeypatch.setitem(sys.modules, "isal", None)
    monkeypatch.setitem(sys.modules, "isal.isal_zlib", None)
    try:
        assert importlib.reload(checksums).crc32 is zlib.crc32
    finally:
        monkeypatch.undo()
        importlib.reload(checksums)
