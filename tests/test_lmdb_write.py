"""What write_lmdb stores, from which sources, compared with torchvision and PIL."""

import contextlib
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import stat
import struct
import sys
import warnings
import zlib
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose, Resize
from torchvision.transforms.functional import pil_to_tensor

from dlhelpers.course import data
from dlhelpers.lmdb_io import (
    LMDBDataset,
    SourceError,
    converting,
    info_lmdb,
    schema,
    sources,
    verify_lmdb,
    write_lmdb,
)


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("write") / "photos"
    return data.photos(root, count=40, size=64, progress=False)


@pytest.fixture(scope="session")
def wide(tmp_path_factory):
    """Photographs that are not square, and one that is upright."""
    root = tmp_path_factory.mktemp("wide")
    photographs = data._photographs()
    for number, (name, image) in enumerate(photographs.items()):
        (root / name).mkdir()
        image.save(root / name / "wide.jpg", quality=95)
        image.crop((10 * number, 0, 200, 427)).save(root / name / "high.jpg", quality=95)
    return root


def write(source, path, **options):
    return write_lmdb(source, path, **{"progress": False} | options)


def stored(path):
    """Everything that a reader sees: keys, targets, bytes."""
    dataset = LMDBDataset(path, decode=None)
    return [(key, target, dataset[i][0]) for i, ((key, _), target) in enumerate(_pairs(dataset))]


def _pairs(dataset):
    return zip(dataset.samples, dataset.targets, strict=True)


def jpeg(seed=0, size=(48, 40), mode="RGB", **options):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, "jpeg", **options)
    return buffer.getvalue()


def pixels_of(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def triples(count):
    return [(f"k{i}", jpeg(i), i) for i in range(count)]


# ---- sources ----


def test_a_folder_has_the_order_classes_and_targets_of_torchvisions_image_folder(tmp_path, photos):
    root = shutil.copytree(photos, tmp_path / "src")
    first = next(iter(sorted(root.glob("*/*.jpg"))))
    for name in ("deep/er/b.JPEG", "deep/a.jpg", "B.jpg", "a b.jpg", "0.png", "é.jpg", "deep.jpg"):
        file = root / "china" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(first, file)
    shutil.copytree(root / "flower", root / "Flower")
    (root / "china" / "note.txt").write_text("no image")
    report = write(root, tmp_path / "db")
    expected = ImageFolder(root)
    found = LMDBDataset(tmp_path / "db", decode="pil")
    assert found.classes == expected.classes
    assert found.class_to_idx == expected.class_to_idx
    assert found.targets == expected.targets
    assert [(str(root / key), target) for key, target in found.samples] == expected.samples
    assert report.ignored == ("china/note.txt", "photos.json")
    assert "2 files are no images by name" in str(report)


def test_bytes_are_kept_as_they_are(tmp_path, photos):
    report = write(photos, tmp_path / "db")
    files = [Path(path) for path, _ in ImageFolder(photos).samples]
    assert [item for _, _, item in stored(tmp_path / "db")] == [f.read_bytes() for f in files]
    assert report.image_bytes == sum(f.stat().st_size for f in files)
    assert report.count == 40


def test_an_image_folder_object_is_read_as_its_files(tmp_path, photos):
    write(photos, tmp_path / "a")
    write(ImageFolder(photos), tmp_path / "b")
    assert stored(tmp_path / "a") == stored(tmp_path / "b")
    assert LMDBDataset(tmp_path / "b").classes == ["china", "flower"]


def test_an_image_folder_with_a_transform_or_own_reading_gives_what_it_gives(tmp_path, photos):
    class Mirrored(ImageFolder):
        def __getitem__(self, index):
            image, target = super().__getitem__(index)
            return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), target

    for number, source in enumerate((ImageFolder(photos, Resize(20)), Mirrored(photos))):
        write(source, tmp_path / f"{number}")
        found = LMDBDataset(tmp_path / f"{number}", decode="pil")
        assert all(
            np.array_equal(np.asarray(found[i][0]), np.asarray(source[i][0])) for i in range(40)
        )
        assert found.classes == source.classes


class Items:
    def __init__(self, *items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def test_pixels_come_back_as_they_were_from_every_kind_of_dataset_item(tmp_path):
    rng = np.random.default_rng(0)
    array = rng.integers(0, 256, (20, 30, 3), np.uint8)
    grey = array[..., 0]
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    source = Items(
        (array, 0),
        (tensor, 1),
        (Image.fromarray(array), 2),
        (grey, 3),
        (tensor[:1], 4),
        (torch.from_numpy(grey.copy()), 5),
        (grey[..., None], 6),
        (Image.fromarray(array).convert("RGBA"), 7),
    )
    three = np.repeat(grey[..., None], 3, 2)
    expected = [array, array, array, three, three, three, three, array]
    for encode in (None, "png", "raw"):
        write(source, tmp_path / "db", encode=encode)
        found = LMDBDataset(tmp_path / "db")
        for number, pixels in enumerate(expected):
            image, target = found[number]
            assert torch.equal(image, torch.from_numpy(pixels).permute(2, 0, 1))
            assert target == number


def test_encoded_bytes_of_a_dataset_are_kept(tmp_path):
    source = Items((jpeg(1), 5), (bytearray(jpeg(2)), 6), (memoryview(jpeg(3)), 7))
    write(source, tmp_path / "db")
    assert stored(tmp_path / "db") == [("0", 5, jpeg(1)), ("1", 6, jpeg(2)), ("2", 7, jpeg(3))]


@pytest.mark.parametrize("kind", [list, tuple, iter, lambda x: (item for item in x)])
def test_an_iterable_gives_keys_bytes_and_targets(tmp_path, kind):
    items = triples(5)
    write(kind(items), tmp_path / "db")
    assert stored(tmp_path / "db") == [(k, t, b) for k, b, t in items]
    assert LMDBDataset(tmp_path / "db").classes is None


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Items((torch.rand(3, 8, 8), 0)), r"uint8 tensor \[3, H, W\].*float32: leave ToTensor"),
        (Items((torch.zeros(4, 8, 8, dtype=torch.uint8), 0)), r"shape \(4, 8, 8\)|shape \(8, 8, 4"),
        (Items((np.zeros((8, 8, 2), np.uint8), 0)), "must be encoded bytes, a PIL image"),
        (Items(("a.jpg", 0)), "got str"),
        (Items((jpeg(), 0, 1)), r"item 0: a dataset must give \(image, target\), got tuple of 3"),
        (Items(jpeg()), r"a dataset must give \(image, target\), got bytes"),
        ([("a", jpeg())], r"an item must be \(key, bytes, target\), got tuple of 2"),
        (["a.jpg"], r"an item must be \(key, bytes, target\), got str"),
        ([(7, jpeg(), 0)], r"a key must be a text that is not empty, got 7: give str\(key\)"),
        ([("", jpeg(), 0)], "a key must be a text that is not empty"),
        ([("k" * 70_000, jpeg(), 0)], "has 70000 bytes, 65535 are allowed"),
        ([("\ud800", jpeg(), 0)], "is no text that UTF-8 can write"),
        ([("a", jpeg(), object())], "of type object cannot be stored.*give an int"),
        ([("a", jpeg(), torch.zeros(2))], "of type Tensor cannot be stored"),
        ([("a", jpeg(), {1: "one"})], "cannot be stored.*texts as keys"),
        ([("a", b"", 0)], "no bytes at all"),
        ([], "the source holds no image"),
    ],
)
def test_what_cannot_be_stored_is_named(tmp_path, source, message):
    with pytest.raises(SourceError, match=message):
        write(source, tmp_path / "db")
    assert not (tmp_path / "db").exists()


@pytest.mark.parametrize("source", [5, None, b"folder", {"a": 1}])
def test_what_is_no_source_is_refused(tmp_path, source):
    with pytest.raises(TypeError, match=f"got {type(source).__name__}"):
        write(source, tmp_path / "db")


def test_a_dataset_that_ends_early_replaces_nothing(tmp_path):
    class Short(Items):
        def __len__(self):
            return 9

    with pytest.raises(SourceError, match="item 2: IndexError"):
        write(Short((jpeg(), 0), (jpeg(), 0)), tmp_path / "db")

    class Liar(list):
        def __len__(self):
            return 9

    with pytest.raises(SourceError, match="has 9 items and gave 3: nothing was replaced"):
        write(Liar(triples(3)), tmp_path / "db")
    assert not (tmp_path / "db").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": -1}, "workers must be a whole number"),
        ({"map_size": 0}, "map_size must be a number of bytes"),
        ({"on_error": "ignore"}, 'on_error must be "raise" or "skip"'),
        ({"shard": (2, 2)}, "shard must be"),
        ({"encode": "gif"}, "encode must be one of"),
        ({"resize": 0}, "resize must be"),
        ({"resize": (1, 2, 3)}, "resize must be"),
        ({"quality": 50}, "would change nothing"),
        ({"quality": 96, "encode": "jpeg"}, "from 1 to 95, got 96"),
        ({"quality": 50, "encode": "png"}, "means nothing for png"),
    ],
)
def test_an_option_out_of_range_is_named(tmp_path, photos, options, message):
    with pytest.raises(ValueError, match=message):
        write(photos, tmp_path / "db", **options)


# ---- resize and encodings ----


@pytest.mark.parametrize(
    ("encode", "size"),
    [
        pytest.param(encode, size, marks=[pytest.mark.slow] * (encode == "png" and size != 300))
        for encode in ("png", "raw")
        for size in (50, 300, 427, 500, (40, 70))
    ],
)
def test_resize_equals_torchvisions_exactly_where_the_encoding_loses_nothing(
    tmp_path, wide, size, encode
):
    write(wide, tmp_path / "db", resize=size, encode=encode)
    found, expected = LMDBDataset(tmp_path / "db"), ImageFolder(wide, Resize(size))
    for number in range(len(expected)):
        assert torch.equal(found[number][0], pil_to_tensor(expected[number][0]))


def test_resize_of_a_jpeg_equals_torchvisions_within_its_rounding(tmp_path, wide):
    write(wide, tmp_path / "db", resize=150, quality=95)
    found, expected = LMDBDataset(tmp_path / "db"), ImageFolder(wide, Resize(150))
    for number in range(len(expected)):
        image = expected[number][0]
        again = io.BytesIO()
        image.save(again, "jpeg", quality=95)
        assert stored(tmp_path / "db")[number][2] == again.getvalue()
        difference = found[number][0].int() - pil_to_tensor(image).int()
        assert difference.abs().float().mean() < 5


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "1", "CMYK"])
def test_every_colour_mode_is_resized_as_after_image_folders_loader(tmp_path, mode):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 4), np.uint8)
    image = Image.fromarray(pixels, "RGBA")
    if mode != "RGBA":
        image = image.convert("RGB").convert(mode) if mode != "LA" else image.convert("LA")
    folder = tmp_path / "src" / "a"
    folder.mkdir(parents=True)
    image.save(folder / ("a.tif" if mode == "CMYK" else "a.png"))
    for encode, resize in itertools.product((None, "png", "raw"), (None, 20)):
        write(tmp_path / "src", tmp_path / "db", resize=resize, encode=encode)
        transform = Resize(resize) if resize else None
        expected = ImageFolder(tmp_path / "src", transform)[0][0]
        assert torch.equal(LMDBDataset(tmp_path / "db")[0][0], pil_to_tensor(expected))


def test_an_image_of_the_size_asked_for_is_not_encoded_again(tmp_path, photos):
    write(photos, tmp_path / "db", resize=64)
    files = [Path(path) for path, _ in ImageFolder(photos).samples]
    assert [item for _, _, item in stored(tmp_path / "db")] == [f.read_bytes() for f in files]


def test_numpys_integers_are_whole_numbers_in_the_file_as_well(tmp_path):
    folder = data.photos(tmp_path / "few", count=4, size=32)
    options = {"encode": "jpeg", "quality": np.int64(80), "workers": np.int64(0)}
    report = write_lmdb(folder, tmp_path / "db", shard=(np.int64(0), np.int64(2)), **options)
    assert 0 < report.count < 4


def test_quality_is_what_pil_makes_of_it(tmp_path, photos):
    source = ImageFolder(photos)
    for encode, quality in itertools.product(("jpeg", "webp"), (None, 30)):
        write(photos, tmp_path / "db", encode=encode, quality=quality)
        again = io.BytesIO()
        source[3][0].save(again, encode, quality=quality or 90)
        assert stored(tmp_path / "db")[3][2] == again.getvalue()


def test_a_raw_image_is_its_header_and_its_pixels(tmp_path, photos):
    write(photos, tmp_path / "db", encode="raw")
    image = np.asarray(ImageFolder(photos)[7][0])
    header = b"RAW\0" + struct.pack("<II", 64, 64)
    assert stored(tmp_path / "db")[7][2] == header + image.tobytes()
    write([("raw", header + image.tobytes(), 0)], tmp_path / "again")
    assert stored(tmp_path / "again")[0][2] == header + image.tobytes()


# ---- commits, map, workers ----


def test_a_tiny_map_grows_by_itself_over_many_commits(tmp_path, photos, monkeypatch):
    monkeypatch.setattr(converting, "_COMMIT_BYTES", 5_000)
    commits = []
    commit = converting.Conversion._commit

    def counted(self, batch):
        commits.append(len(batch))
        commit(self, batch)

    monkeypatch.setattr(converting.Conversion, "_commit", counted)
    write(photos, tmp_path / "a", map_size=1)
    assert len([size for size in commits if size]) >= 3
    assert sum(commits) == 40
    monkeypatch.undo()
    write(photos, tmp_path / "b")
    assert stored(tmp_path / "a") == stored(tmp_path / "b")


def test_one_record_larger_than_the_map_is_stored(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (900, 900, 3), np.uint8)
    write(Items((pixels, 0)), tmp_path / "db", encode="raw", map_size=1 << 16)
    assert verify_lmdb(tmp_path / "db", progress=False).image_bytes == 900 * 900 * 3 + 12


def test_a_map_that_was_reckoned_too_small_loses_and_doubles_nothing(tmp_path, monkeypatch):
    grown = []
    grow = converting.Conversion._grow

    def late(self, need):  # the reckoning beforehand does nothing, MapFullError has to
        if need == self.map_size:
            grown.append(need)
            grow(self, need)

    monkeypatch.setattr(converting.Conversion, "_grow", late)
    first, *others = triples(300)
    items = [first, ("k0", jpeg(), 0), *others]  # a duplicate before the map is full
    report = write(items, tmp_path / "db", map_size=1 << 17, on_error="skip")
    assert grown
    assert report.count == 300
    assert len(report.skipped) == 1
    assert stored(tmp_path / "db") == [(k, t, b) for k, b, t in (first, *others)]


def test_a_commit_that_did_not_fit_leaves_the_file_that_a_large_map_leaves(tmp_path, monkeypatch):
    monkeypatch.setattr(converting, "_COMMIT_S", math.inf)  # all of it in one commit
    kept = triples(300)
    items = [kept[0], ("k0", jpeg(), 0), *kept[1:]]
    write(items, tmp_path / "at once", map_size=1 << 24, on_error="skip")
    attempts, grow = [], converting.Conversion._grow

    def late(self, need):
        if need == self.map_size:
            attempts.append(self.done)
            grow(self, need)

    monkeypatch.setattr(converting.Conversion, "_grow", late)
    report = write(items, tmp_path / "in tries", map_size=1, on_error="skip")
    assert attempts[0] == 0  # what was counted before the map was full is taken back
    assert report.image_bytes == sum(len(image) for _, image, _ in kept)
    assert entries(tmp_path / "in tries") == entries(tmp_path / "at once")


def entries(path):
    """All that the file holds, counts and digest among it."""
    with lmdb.open(str(path), subdir=False, readonly=True, lock=False, max_dbs=3) as env:
        names = [schema.RECORDS, schema.INDEX, schema.SKIPPED]
        found = {}
        with env.begin() as txn:
            for name in names:
                found[name] = list(txn.cursor(db=env.open_db(name, txn, create=False)))
            return found | {name: txn.get(name) for name in (schema.META, schema.STATE)}


@pytest.mark.parametrize("options", [{}, {"resize": 32}])
def test_two_workers_store_the_same_bytes_as_none(tmp_path, photos, options):
    write(photos, tmp_path / "a", **options)
    write(photos, tmp_path / "b", workers=2, **options)
    assert stored(tmp_path / "a") == stored(tmp_path / "b")


@pytest.mark.parametrize(
    "start",
    [
        pytest.param(start, marks=pytest.mark.slow if start == "spawn" else ())
        for start in multiprocessing.get_all_start_methods()
    ],
)
def test_workers_convert_however_they_are_started(tmp_path, photos, start):
    usual = multiprocessing.get_start_method()
    multiprocessing.set_start_method(start, force=True)
    try:
        write(photos, tmp_path / "db", workers=1)
    finally:
        multiprocessing.set_start_method(usual, force=True)
    assert [key for key, _, _ in stored(tmp_path / "db")] == [
        path.relative_to(photos).as_posix() for path in sorted(photos.glob("*/*.*"))
    ]


def test_workers_take_datasets_and_generators_and_name_what_is_broken(tmp_path):
    write(Items(*[(jpeg(i), i) for i in range(40)]), tmp_path / "a", workers=2)
    assert [target for _, target, _ in stored(tmp_path / "a")] == list(range(40))
    items = triples(40)
    items[20] = ("k20", b"broken", 20)
    report = write(iter(items), tmp_path / "b", workers=2, on_error="skip")
    assert [target for _, target, _ in stored(tmp_path / "b")] == [*range(20), *range(21, 40)]
    assert report.skipped[0][0] == "k20" or "k20" in report.skipped[0][0]


# ---- keys and targets ----


def test_keys_that_lmdb_finds_too_long_are_stored_found_and_told_apart(tmp_path):
    long = ["p/" * 300 + end for end in ("a.jpg", "b.jpg")] + ["x" * 511, "x" * 512, "é" * 30_000]
    write([(key, jpeg(i), i) for i, key in enumerate(long)], tmp_path / "db")
    dataset = LMDBDataset(tmp_path / "db")
    assert dataset.samples == [(key, i) for i, key in enumerate(long)]
    assert [dataset.find(key) for key in long] == list(range(5))
    with pytest.raises(KeyError, match="has no key"):
        dataset.find("p/" * 300)
    assert verify_lmdb(tmp_path / "db", progress=False).count == 5
    with pytest.raises(SourceError, match="taken by record 0"):
        write([(long[0], jpeg(), 0), (long[0], jpeg(), 1)], tmp_path / "twice")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have Unicode names alone")
def test_file_names_that_are_no_utf8_survive(tmp_path):
    folder = os.fsencode(tmp_path) + b"/src/stra\xdfe"
    os.makedirs(folder)
    for name in (b"\xff\xfe.jpg", b"gr\xfcn.jpg"):
        with open(folder + b"/" + name, "wb") as file:
            file.write(jpeg())
    write(tmp_path / "src", tmp_path / "db")
    expected = ImageFolder(tmp_path / "src")
    dataset = LMDBDataset(tmp_path / "db", decode="pil")
    assert dataset.classes == expected.classes
    assert [(str(tmp_path / "src" / k), t) for k, t in dataset.samples] == expected.samples
    assert dataset.find(os.fsdecode(b"stra\xdfe/gr\xfcn.jpg")) == 0
    assert verify_lmdb(tmp_path / "db", progress=False).count == 2
    info_lmdb(tmp_path / "db")


def test_targets_are_what_json_holds(tmp_path):
    targets = [
        0, -3, 2**70, 1.5, "a text", "\ud800 é", None, True, [1, [2.5, "x"]],
        {"boxes": [[1, 2, 3, 4]], "labels": ["cat"]},
    ]  # fmt: skip
    scalars = [np.int64(3), torch.tensor(4), np.float32(0.5), np.bool_(True), (1, 2)]
    given = [*targets, *scalars]
    write([(f"{i}", jpeg(i), t) for i, t in enumerate(given)], tmp_path / "db")
    dataset = LMDBDataset(tmp_path / "db", decode=None)
    expected = [*targets, 3, 4, 0.5, True, [1, 2]]
    assert dataset.targets == expected
    assert [dataset._files[0].read(t, i, True).target for t in [dataset._files[0].open().begin()]
            for i in range(len(given))] == expected  # fmt: skip
    assert verify_lmdb(tmp_path / "db", progress=False).count == len(given)


keys = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=1200)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**12 - 1), keys, json_values, st.binary(max_size=3000))
def test_a_record_gives_back_what_was_packed(position, key, target, image):
    packed = schema.pack_record(
        position, schema.encode_key(key), schema.encode_target(target), image
    )
    record = schema.unpack_record(memoryview(packed), position)
    assert (record.key, record.target, bytes(record.image)) == (key, target, image)
    assert type(record.target) is type(target)
    assert schema.position_key(position) == str(position).rjust(12, "0").encode()


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 10**6), st.integers(1, 255))
def test_a_record_with_any_byte_changed_is_refused(image, place, flip):
    packed = bytearray(schema.pack_record(3, b"key", b"7", image))
    packed[place % len(packed)] ^= flip
    with pytest.raises(schema.DatabaseError, match="record 3 is damaged"):
        schema.unpack_record(memoryview(packed), 3)


@settings(max_examples=60, deadline=None)
@given(st.binary(min_size=1, max_size=1500), st.integers(0, 10**12 - 1), json_values)
def test_an_index_entry_gives_back_key_and_target(data, position, target):
    key = schema.decode_key(data)
    assert schema.encode_key(key) == data
    entry = schema.index_entry(position, data, schema.encode_target(target))
    name = schema.index_key(data)
    assert len(name) <= 511
    assert schema.read_index(name, entry) == (position, target, key)


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.text(), json_values), st.integers(0, 10**6), st.integers(1, 255))
def test_a_meta_entry_comes_back_and_a_changed_byte_is_noticed(facts, place, flip):
    meta = facts | {"format": schema.FORMAT, "version": schema.VERSION}
    packed = bytearray(schema.pack_meta(meta))
    assert schema.unpack_meta(bytes(packed), "x") == meta
    packed[place % len(packed)] ^= flip
    with contextlib.suppress(schema.DatabaseError):
        assert schema.unpack_meta(bytes(packed), "x") == meta  # the checksum's letters' case


# ---- bad images, keys, folders ----


def broken_files():
    whole = jpeg(5, (200, 150))
    thumbnail = jpeg(6, (64, 64))
    exif = b"Exif\0\0" + thumbnail
    with_thumbnail = whole[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + whole[2:]
    png = io.BytesIO()
    Image.fromarray(pixels_of(whole)).save(png, "png")
    webp = io.BytesIO()
    Image.fromarray(pixels_of(whole)).save(webp, "webp")
    return {
        "empty.jpg": b"",
        "text.jpg": b"this is no image",
        "half.jpg": whole[: len(whole) // 2],
        "header.jpg": whole[:20],
        "magic.jpg": b"\xff\xd8\xff" + bytes(500) + b"\xff\xd9",
        "behind-thumbnail.jpg": with_thumbnail[: len(exif) + 200],
        "half.png": png.getvalue()[: len(png.getvalue()) // 2],
        "half.webp": webp.getvalue()[: len(webp.getvalue()) // 2],
        "half.bmp": b"BM" + bytes(100),
        "page.png": b"<html>404</html>",
    }


@pytest.mark.parametrize("name", broken_files())
def test_a_broken_file_stops_the_conversion_and_is_named(tmp_path, photos, name):
    root = shutil.copytree(photos, tmp_path / "src")
    (root / "china" / name).write_bytes(broken_files()[name])
    with pytest.raises(SourceError, match=rf"china/{name}: .*on_error=\"skip\" leaves it out"):
        write(root, tmp_path / "db")
    assert not (tmp_path / "db").exists()


def test_skipped_files_are_listed_and_counted_and_the_others_are_all_there(tmp_path, photos):
    root = shutil.copytree(photos, tmp_path / "src")
    bad = broken_files()
    for name, content in bad.items():
        (root / "china" / name).write_bytes(content)
    (root / "china" / "gone.jpg").symlink_to(root / "nowhere.jpg")
    for workers in (0, 2):
        report = write(root, tmp_path / "db", on_error="skip", workers=workers)
        assert {what for what, _ in report.skipped} == {f"china/{n}" for n in (*bad, "gone.jpg")}
        assert report.count == 40
        assert "11 skipped" in str(report)
        info = info_lmdb(tmp_path / "db")
        assert sorted(info.skipped) == sorted(report.skipped)
        assert stored(tmp_path / "db") == [
            (os.path.relpath(path, photos), target, Path(path).read_bytes())
            for path, target in ImageFolder(photos).samples
        ]
        assert verify_lmdb(tmp_path / "db", progress=False).count == 40


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read_is_named(tmp_path, photos):
    root = shutil.copytree(photos, tmp_path / "src")
    (root / "china" / "0000000.jpg").chmod(0)
    with pytest.raises(SourceError, match=r"china/0000000.jpg: .*Permission denied"):
        write(root, tmp_path / "db")


def test_a_jpeg_with_bytes_behind_its_end_is_whole(tmp_path):
    write([("a", jpeg() + b"trailer" * 100, 0), ("b", jpeg(mode="CMYK"), 1)], tmp_path / "db")
    assert LMDBDataset(tmp_path / "db")[0][0].shape == (3, 40, 48)


def test_any_error_of_a_datasets_own_code_is_a_listed_skip(tmp_path):
    class Fails(Items):
        def __getitem__(self, index):
            if index == 1:
                raise RuntimeError("no such blob")
            return super().__getitem__(index)

    source = Fails(*[(jpeg(i), i) for i in range(3)])
    with pytest.raises(SourceError, match="item 1: RuntimeError: no such blob"):
        write(source, tmp_path / "db")
    report = write(source, tmp_path / "db", on_error="skip")
    assert report.skipped == (("item 1", "RuntimeError: no such blob"),)


def test_two_images_with_one_key_are_named_or_listed(tmp_path):
    items = [*triples(3), ("k1", jpeg(9), 9), ("k4", jpeg(4), 4)]
    with pytest.raises(SourceError, match="key 'k1' is taken by record 1: keys must be unique"):
        write(items, tmp_path / "db")
    report = write(items, tmp_path / "db", on_error="skip")
    assert [why for _, why in report.skipped] == [
        "its key 'k1' is taken by record 1: keys must be unique"
    ]
    assert [(k, t) for k, t, _ in stored(tmp_path / "db")] == [
        ("k0", 0), ("k1", 1), ("k2", 2), ("k4", 4),
    ]  # fmt: skip


def test_a_class_folder_without_images_is_named_or_kept_as_a_class(tmp_path, photos):
    root = shutil.copytree(photos, tmp_path / "src")
    (root / "bird").mkdir()
    (root / "bird" / "readme.md").write_text("soon")
    with pytest.raises(SourceError, match="bird/: the class folder holds no image"):
        write(root, tmp_path / "db")
    report = write(root, tmp_path / "db", on_error="skip")
    assert report.skipped == (("bird/", "the class folder holds no image"),)
    dataset = LMDBDataset(tmp_path / "db")
    assert dataset.classes == ["bird", "china", "flower"]
    assert set(dataset.targets) == {1, 2}
    assert len(info_lmdb(tmp_path / "db").skipped) == 1
    assert verify_lmdb(tmp_path / "db", progress=False).count == 40


def test_a_source_folder_that_is_none_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        write(tmp_path / "nowhere", tmp_path / "db")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file, expected a folder"):
        write(tmp_path / "file", tmp_path / "db")
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.jpg").write_bytes(jpeg())
    with pytest.raises(SourceError, match="holds no class folders"):
        write(tmp_path / "flat", tmp_path / "db")


# ---- the target ----


def test_only_the_file_is_left_readable_and_not_executable(tmp_path, photos):
    write(photos, tmp_path / "new" / "folder" / "db")
    assert os.listdir(tmp_path / "new" / "folder") == ["db"]
    mode = stat.S_IMODE(os.stat(tmp_path / "new" / "folder" / "db").st_mode)
    assert not mode & 0o111
    assert mode & 0o400


def test_a_target_that_is_a_folder_or_of_something_else_is_not_touched(tmp_path, photos):
    with pytest.raises(IsADirectoryError, match=r"is a folder, expected .*images\.lmdb"):
        write(photos, tmp_path)
    for content in (b"", b"precious", bytes(20_000)):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(FileExistsError, match=r"no whole database of write_lmdb.*nothing was"):
            write(photos, tmp_path / "file")
        assert (tmp_path / "file").read_bytes() == content
    assert os.listdir(tmp_path) == ["file"]


def test_a_name_forges_no_line_of_a_report(tmp_path):
    name = "x\nall 3 records are as they were written\n\t.jpg"
    (tmp_path / "src" / "a").mkdir(parents=True)
    (tmp_path / "src" / "a" / name).write_bytes(b"no")
    Image.new("RGB", (4, 4)).save(tmp_path / "src" / "a" / "ok.png")
    with pytest.raises(SourceError) as error:
        write(tmp_path / "src", tmp_path / "db")
    report = write(tmp_path / "src", tmp_path / "db", on_error="skip")
    for text in (str(error.value), str(report), str(info_lmdb(tmp_path / "db"))):
        assert "\\nall 3 records" in text
        assert "\nall 3 records" not in text
        assert "\t" not in text
    assert report.skipped[0][0] == f"a/{name}"


def test_an_old_database_is_replaced_by_a_whole_one(tmp_path, photos):
    write(triples(3), tmp_path / "db")
    write(photos, tmp_path / "db")
    assert len(LMDBDataset(tmp_path / "db")) == 40


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_more_than_eight_bits_are_refused_and_not_cut(tmp_path, mode):
    deep = Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000)
    deep = deep if mode == "I;16" else deep.convert("I").convert(mode)
    with pytest.raises(SourceError, match=f"mode '{mode}' has more than 8 bits"):
        write([("deep", deep, 0)], tmp_path / "db")


@pytest.mark.parametrize("name", ["16.png", "16.tif", "16.pgm", "32.tif", "float.tif"])
def test_files_of_more_than_eight_bits_are_kept_or_refused_and_not_cut(tmp_path, name):
    ramp = np.linspace(2000, 60_000, 64 * 48).reshape(48, 64)
    kind = {"16": np.uint16, "32": np.int32, "float": np.float32}[name.partition(".")[0]]
    path = tmp_path / "src" / "a" / name
    path.parent.mkdir(parents=True)
    Image.fromarray(ramp.astype(kind)).save(path)
    for options in ({"resize": 32}, {"encode": "png"}, {"encode": "raw"}, {"encode": "jpeg"}):
        with pytest.raises(SourceError, match=f"a/{name}: .*has more than 8 bits a channel"):
            write(tmp_path / "src", tmp_path / "db", **options)
    write(tmp_path / "src", tmp_path / "db")
    assert stored(tmp_path / "db")[0][2] == path.read_bytes()


def png_16(channels):
    """A PNG of 16 bits a channel, which PIL opens as one of 8."""
    colour = {2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + bytes(range(16 * channels)) for _ in range(8))
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, colour, 0, 0, 0)),)
    chunks += ((b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


@pytest.mark.parametrize(
    "data",
    [*map(png_16, (2, 3, 4)), b"P6\n# by hand\n8 8\n65535\n" + bytes(384)],
    ids=["grey and alpha", "rgb", "rgba", "ppm"],
)
def test_colours_of_more_than_eight_bits_are_kept_or_refused_and_not_cut(tmp_path, data):
    assert Image.open(io.BytesIO(data)).mode in ("LA", "RGB", "RGBA")
    for options in ({"resize": 4}, {"encode": "png"}, {"encode": "raw"}):
        with pytest.raises(SourceError, match="an image of 16 bits a channel would lose"):
            write([("deep", data, 0)], tmp_path / "db", **options)
    write([("deep", data, 0)], tmp_path / "db")
    assert stored(tmp_path / "db")[0][2] == data


@pytest.mark.parametrize("kind", ["png", "tiff", "ppm", "jpeg2000", "gif", "bmp", "webp"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1"])
def test_colours_of_eight_bits_and_fewer_are_encoded(tmp_path, kind, mode):
    buffer = io.BytesIO()
    with contextlib.suppress(OSError):  # not every format has every mode
        Image.new("RGB", (8, 8)).convert(mode).save(buffer, kind)
        assert write([("a", buffer.getvalue(), 0)], tmp_path / "db", encode="raw").count == 1


def test_only_raw_images_with_an_orientation_need_a_new_reader(tmp_path):
    oriented(tmp_path / "a.png", 6)
    upright = ("a", Image.new("RGB", (4, 4)), 0)
    for source, encode, version in (
        ([upright], "raw", 1),
        ([upright, ("b", (tmp_path / "a.png").read_bytes(), 0)], "raw", 2),
        ([("b", (tmp_path / "a.png").read_bytes(), 0)], "png", 1),
    ):
        write(source, tmp_path / "db", encode=encode)
        env = lmdb.open(str(tmp_path / "db"), subdir=False, max_dbs=4, lock=False)
        with env.begin() as txn:
            assert json.loads(txn.get(b"meta").partition(b" ")[2])["version"] == version
        env.close()
        assert len(LMDBDataset(tmp_path / "db")) == len(source)


def oriented(path, orientation, mode="RGB"):
    """Write an image that is neither square nor symmetric, with an orientation in its EXIF."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "a maker"
    image = Image.fromarray(pixels).resize((72, 48)).convert(mode)
    image.save(path, exif=exif, **({"quality": 95} if path.suffix != ".png" else {}))


@pytest.mark.parametrize("orientation", [*range(10)])
def test_turning_by_exif_gives_the_same_from_every_encoding(tmp_path, orientation):
    folder = tmp_path / "src" / "a"
    folder.mkdir(parents=True)
    for name in ("a.jpg", "b.png", "c.webp", "d.tif"):
        oriented(folder / name, orientation)
    oriented(folder / "e.jpg", orientation, "L")
    for encode, resize in itertools.product((None, "jpeg", "png", "webp", "raw"), (None, (30, 20))):
        write(tmp_path / "src", tmp_path / "db", encode=encode, resize=resize)
        steps = [Resize(resize)] if resize else []
        bound = 1e-9 if encode in ("png", "raw") else 12
        for turn in ([], [ImageOps.exif_transpose]):
            expected = ImageFolder(tmp_path / "src", Compose([*steps, *turn]))
            found = LMDBDataset(tmp_path / "db", Compose(turn), decode="pil")
            for number, (image, _) in enumerate(expected):
                difference = np.asarray(found[number][0]).astype(int) - np.asarray(image)
                assert abs(difference).mean() < bound


def test_an_orientation_that_a_dataset_leaves_in_its_images_is_kept(tmp_path):
    oriented(tmp_path / "a.png", 6)
    source = Items((Image.open(tmp_path / "a.png"), 0))
    for encode in (None, "raw", "png"):
        write(source, tmp_path / "db", encode=encode)
        image = LMDBDataset(tmp_path / "db", ImageOps.exif_transpose, decode="pil")[0][0]
        assert image.size == (48, 72)
        assert np.array_equal(
            np.asarray(image), np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "a.png")))
        )


def test_damaged_metadata_stops_no_conversion(tmp_path):
    items = [("a", jpeg(exif=b"Exif\0\0no metadata"), 0), ("b", jpeg(exif=b"Exif\0\0MM\0*"), 1)]
    assert write(items, tmp_path / "db", resize=20, encode="png").count == 2


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_a_link_as_target_is_followed(tmp_path, photos):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "db")
    write(photos, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert os.listdir(tmp_path / "elsewhere") == ["db"]
    assert len(LMDBDataset(tmp_path / "link")) == 40


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, photos, monkeypatch):
    walk = os.walk

    def refused(top, onerror, **options):
        onerror(PermissionError(13, "Permission denied", f"{top}/private"))
        return walk(top, **options)

    monkeypatch.setattr(os, "walk", refused)
    with pytest.raises(SourceError, match=r"china/private: cannot be listed: Permission denied"):
        write(photos, tmp_path / "db")
    report = write(photos, tmp_path / "db", on_error="skip")
    assert (report.count, len(report.skipped)) == (40, 2)


def test_nothing_is_pickled(tmp_path, photos):
    code = {
        p.name: "\n".join(line for line in p.read_text().splitlines() if ">>>" not in line)
        for p in Path(sources.__file__).parent.glob("*.py")
    }
    assert not [name for name, text in code.items() if re.search(r"pickle\.(dump|Pickler)", text)]
    # what others pickled is read by a reader that refuses whatever is not on its list
    reading = {
        name for name, text in code.items() if re.search(r"^\s*(import|from) pickle", text, re.M)
    }
    assert reading == {"unpickling.py"}


def test_a_fresh_conversion_warns_of_nothing(tmp_path, photos):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write(photos, tmp_path / "db", resume=True)
        write(photos, tmp_path / "db", workers=1)
