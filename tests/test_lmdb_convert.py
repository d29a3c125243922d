"""Databases that tutorials and Caffe wrote: the same images and labels, or refused by name."""

import collections
import copyreg
import functools
import io
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
from contextlib import suppress

import lmdb
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dlhelpers.__main__ import main
from dlhelpers.lmdb_io import (
    DatabaseError,
    LMDBDataset,
    SourceError,
    convert_lmdb,
    old_files,
    unpickling,
    verify_lmdb,
    write_lmdb,
)
from dlhelpers.lmdb_io.datum import Datum, read_datum
from dlhelpers.lmdb_io.old_databases import open_old
from dlhelpers.lmdb_io.old_samples import sample_of
from dlhelpers.lmdb_io.old_values import plain_target, read_plain
from dlhelpers.lmdb_io.unpickling import PickleError, unpickle

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
PIXELS = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)


def encoded(pixels, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


PNGS = [encoded(pixels) for pixels in PIXELS]


@pytest.fixture(autouse=True)
def no_child(request, monkeypatch):
    """Files that were written well need no child that walks over them first."""
    if "damaged" not in request.node.name:
        monkeypatch.setattr(old_files, "find_problems", lambda *_: [])


def old_database(path, entries, name=None, subdir=True, **options):
    """Write entries as tutorials do: into a folder, or one file."""
    env = lmdb.open(os.fspath(path), subdir=subdir, map_size=1 << 24, max_dbs=8, sync=False)
    database = env.open_db(name, **options) if name or options else None
    with env.begin(write=True, db=database) as txn:
        for key, value in entries.items():
            txn.put(key, value)
    env.close()
    return path


def converted(tmp_path, entries, name=None, subdir=True, **options):
    """Return [(key, image bytes, target), ...] and the report of a conversion."""
    old = old_database(tmp_path / "old", entries, name, subdir)
    report = convert_lmdb(old, tmp_path / "new.lmdb", progress=False, **options)
    dataset = LMDBDataset(tmp_path / "new.lmdb", decode=None)
    keys = [key for key, _ in dataset.samples]
    return [(key, *dataset[n]) for n, key in enumerate(keys)], str(report)


def pixels_of(data):
    return np.asarray(Image.open(io.BytesIO(bytes(data))))


def folder2lmdb(samples, protocol=pickle.HIGHEST_PROTOCOL, length=None):
    """Return the entries that folder2lmdb.py of Efficient-PyTorch and its copies write."""
    entries = {f"{n}".encode("ascii"): pickle.dumps(s, protocol) for n, s in enumerate(samples)}
    entries[b"__keys__"] = pickle.dumps([f"{n}".encode() for n in range(len(samples))], protocol)
    entries[b"__len__"] = pickle.dumps(len(samples) if length is None else length, protocol)
    return entries


# ---- what tutorials write ----


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_folder2lmdb_keeps_bytes_labels_and_the_order_of_its_keys(tmp_path, protocol):
    entries = folder2lmdb([(png, n % 3) for n, png in enumerate(PNGS)], protocol)
    found, report = converted(tmp_path, entries, subdir=bool(protocol % 2))
    assert found == [(str(n), png, n % 3) for n, png in enumerate(PNGS)]
    assert "folder2lmdb" in report
    assert "12 records" in report


@pytest.mark.parametrize(
    ("sample", "target"),
    [
        (lambda n: [PNGS[n], n], 0),
        (lambda n: (n, PNGS[n]), 0),
        (lambda n: (PNGS[n],), None),
        (lambda n: PNGS[n], None),
        (lambda n: (PNGS[n], np.int64(7)), 7),
        (lambda n: (PNGS[n], np.array([1, 2])), [1, 2]),
        (lambda n: (PNGS[n], np.array(5, dtype=">i2")), 5),
        (lambda n: (PNGS[n], "cät"), "cät"),
        (lambda n: (PNGS[n], "cät".encode()), "cät"),
        (lambda n: (PNGS[n], np.float32(0.5), "a.jpg"), [0.5, "a.jpg"]),
        (lambda n: {"image": PNGS[n], "label": 3}, 3),
        (lambda n: {"jpg": PNGS[n], "box": np.eye(1), "n": [1]}, {"box": [[1]], "n": [1]}),
        (lambda n: collections.OrderedDict(image=PNGS[n], label=True), True),
        (lambda n: (bytearray(PNGS[n]), 1), 1),
        (lambda n: (np.frombuffer(PNGS[n], np.uint8), 1), 1),
        (lambda n: (np.frombuffer(PNGS[n], np.uint8)[:, None], 1), 1),  # of cv2.imencode
    ],
)  # fmt: skip
def test_every_shape_of_a_sample_gives_its_image_and_the_rest_as_target(tmp_path, sample, target):
    for protocol in (0, 2, 5):
        folder = tmp_path / str(protocol)
        folder.mkdir()
        (found, *_), _ = converted(folder, folder2lmdb([sample(0)], protocol))
        assert bytes(found[1]) == PNGS[0]
        assert found[2] == target
        assert type(found[2]) is type(target)


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (lambda a: a, PIXELS[0]),
        (np.asfortranarray, PIXELS[0]),
        (lambda a: a.transpose(2, 0, 1), PIXELS[0]),
        (lambda a: np.ascontiguousarray(a.transpose(2, 0, 1))[None], PIXELS[0]),
        (lambda a: a[..., 0], PIXELS[0, ..., 0]),
        (lambda a: a[..., :1], PIXELS[0, ..., 0]),
        (Image.fromarray, PIXELS[0]),
        (lambda a: Image.fromarray(a[..., 0]), PIXELS[0, ..., 0]),
        (lambda a: Image.open(io.BytesIO(PNGS[0])), PIXELS[0]),
    ],
)
def test_pixels_of_arrays_and_pictures_arrive(tmp_path, layout, expected, protocol):
    entries = {b"00000007": pickle.dumps((layout(PIXELS[0]), 3), protocol)}
    [(key, image, target)], _ = converted(tmp_path, entries)
    assert (key, target) == ("00000007", 3)
    assert np.array_equal(pixels_of(image), expected)


def test_arrays_are_turned_to_rgb_where_bgr_is_said(tmp_path):
    entries = {b"a": pickle.dumps((PIXELS[0], 3))}
    [(_, image, _)], report = converted(tmp_path, entries, bgr=True)
    assert np.array_equal(pixels_of(image), PIXELS[0, ..., ::-1])
    assert "BGR" in report


def test_a_pickle_of_python_2_gives_bytes_and_text(tmp_path):
    png = PNGS[0]
    two = (
        b"\x80\x02}q\x00(U\x05imageT" + struct.pack("<I", len(png)) + png + b"U\x05labelU\x03catu."
    )
    [(_, image, target)], _ = converted(tmp_path, {b"a": two})
    assert (image, target) == (png, "cat")


@pytest.mark.parametrize("keys", [lambda k: k, lambda k: k.decode(), lambda k: int(k)])
def test_listed_keys_may_be_bytes_text_or_numbers_in_any_order(tmp_path, keys):
    entries = {b"%d" % n: pickle.dumps((png, n)) for n, png in enumerate(PNGS)}
    order = random.Random(0).sample(sorted(entries), len(entries))
    entries |= {b"__keys__": pickle.dumps([keys(key) for key in order]), b"__len__": b"12"}
    found, _ = converted(tmp_path, entries)
    assert found == [(key.decode(), PNGS[int(key)], int(key)) for key in order]


def test_keys_without_a_list_are_taken_as_numbers(tmp_path):
    found, _ = converted(tmp_path, {b"%d" % n: pickle.dumps((PNGS[n], n)) for n in range(12)})
    assert [target for _, _, target in found] == list(range(12))


@pytest.mark.parametrize(
    ("image", "label"),
    [("image-%09d", "label-%09d"), ("img_%d", "target_%d"), ("%05d/x", "%05d/y")],
)
def test_labels_under_keys_of_their_own_stay_text(tmp_path, image, label):
    words = ["Straße", "0123", "", "x y"] + [str(n) for n in range(8)]
    entries = {(image % n).encode(): PNGS[n - 1] for n in range(1, 13)}
    entries |= {(label % n).encode(): words[n - 1].encode() for n in range(1, 13)}
    entries |= {b"num-samples": b"12", b"lexicon": b"one two"}
    found, report = converted(tmp_path, entries)
    assert found == [(image % n, PNGS[n - 1], words[n - 1]) for n in range(1, 13)]
    assert "1 other entry was not converted: lexicon" in report


TWO_PICTURES = [
    ("image_%d", "gt_%d"),
    ("im%03d", "gt%03d"),
    ("%04d_lq", "%04d_gt"),
    ("lr/%d.png", "hr/%d.png"),
    ("%d", "%d_mask"),
    ("%d.jpg", "%d_mask.png"),
    ("train/%d.jpg", "train/%d_GroundTruth.png"),
    ("Image/%d.jpg", "Mask/%d.png"),
    ("rgb-%d", "depth-%d"),
    ("%d.jpg", "%d.png"),
    ("TR/%d.JPG", "TR/%d.PNG"),
    ("%d_img.png", "%d_GT.png"),
]


@pytest.mark.parametrize(("image", "mask"), TWO_PICTURES)
def test_two_pictures_of_a_sample_are_never_two_samples(tmp_path, image, mask):
    entries = {(image % n).encode(): PNGS[n] for n in range(1, 6)}
    entries |= {(mask % n).encode(): PNGS[n + 5] for n in range(1, 6)}
    old = old_database(tmp_path / "old", entries)
    with pytest.raises((DatabaseError, SourceError), match=r'fields=.*"mask": "png"'):
        convert_lmdb(old, tmp_path / "new", progress=False)
    with pytest.raises((DatabaseError, SourceError), match=r"no image that could|two pictures"):
        convert_lmdb(old, tmp_path / "new", progress=False, on_error="skip")
    assert not (tmp_path / "new").exists()


def test_labels_stand_beside_images_of_any_word_and_ending(tmp_path):
    for number, (image, label) in enumerate(
        [("photo_%d", "label_%d"), ("%d.jpg", "%d_label.txt"), ("images/%d.jpg", "labels/%d.txt")]
    ):
        entries = {(image % n).encode(): PNGS[n] for n in range(1, 6)}
        entries |= {(label % n).encode(): b"%d" % n for n in range(1, 6)}
        folder = tmp_path / f"{number}"
        folder.mkdir()
        found, _ = converted(folder, entries)
        assert found == [(image % n, PNGS[n], f"{n}") for n in range(1, 6)]


@pytest.mark.parametrize(
    "names", [["cat.%d.jpg", "dog.%d.jpg", "mask.%d.jpg"], ["%d.jpg", "a%d.png"]]
)
def test_classes_of_equal_numbers_are_no_pairs(tmp_path, names):
    entries = {(name % n).encode(): PNGS[n] for n in range(1, 6) for name in names}
    found, _ = converted(tmp_path, entries)
    assert [key.encode() for key, _, _ in found] == sorted(entries)


def test_images_and_labels_in_two_named_databases(tmp_path):
    old_database(tmp_path / "old", {b"%d" % n: png for n, png in enumerate(PNGS)}, b"images")
    labels = {b"%d" % n: pickle.dumps(n) for n in range(12)}
    found, report = converted(tmp_path, labels, b"labels")
    assert found == [(key, PNGS[int(key)], int(key)) for key in sorted(map(str, range(12)))]
    assert "images, labels" in report


def test_one_of_several_named_databases_is_asked_for(tmp_path):
    old_database(tmp_path / "old", {b"a": PNGS[0]}, b"train")
    old_database(tmp_path / "old", {b"b": PNGS[1]}, b"val")
    with pytest.raises(DatabaseError, match=r"train, val.*--database NAME"):
        open_old(tmp_path / "old")
    with pytest.raises(DatabaseError, match=r"no database 'tset', but train, val"):
        open_old(tmp_path / "old", database="tset")
    convert_lmdb(tmp_path / "old", tmp_path / "new", database="val", progress=False)
    assert LMDBDataset(tmp_path / "new", decode=None)[0][0] == PNGS[1]


def test_plain_images_have_no_labels_and_names_that_are_no_utf8_survive(tmp_path):
    images = {b"caf\xe9": encoded(PIXELS[0], "WEBP"), b"b": encoded(PIXELS[1], "JPEG")}
    found, report = converted(tmp_path, images)
    assert [(key.encode("utf-8", "surrogateescape"), data) for key, data, _ in found] == [
        (b"b", images[b"b"]),
        (b"caf\xe9", images[b"caf\xe9"]),
    ]
    assert "without labels" in report


def test_basicsr_gives_the_images_in_the_order_of_its_list(tmp_path):
    old = old_database(tmp_path / "old", {b"b x": PNGS[0], b"a": PNGS[1]})
    (old / "meta_info.txt").write_text("b x.png (8,8,3) 1\na.png (8,8,3) 1\n")
    convert_lmdb(old, tmp_path / "new", progress=False)
    assert [k for k, _ in LMDBDataset(tmp_path / "new", decode=None).samples] == ["b x", "a"]


def test_classes_that_stand_beside_the_samples_are_taken(tmp_path):
    entries = folder2lmdb([(PNGS[0], 1)]) | {b"classes": pickle.dumps(["cat", "dog"])}
    converted(tmp_path, entries)
    assert LMDBDataset(tmp_path / "new.lmdb", decode=None).classes == ["cat", "dog"]


def test_samples_may_be_called_as_counts_and_classes_are(tmp_path):
    entries = {name: pickle.dumps((PNGS[0], 1)) for name in (b"length", b"classes", b"keys")}
    found, _ = converted(tmp_path, entries)
    assert [key for key, *_ in found] == ["classes", "keys", "length"]


def test_integer_keys_become_their_numbers(tmp_path):
    keys = [3, 300, 70000]
    entries = {n.to_bytes(8, sys.byteorder): PNGS[0] for n in keys}
    old_database(tmp_path / "old", entries, b"photos", integerkey=True)
    convert_lmdb(tmp_path / "old", tmp_path / "new", progress=False)
    assert [k for k, _ in LMDBDataset(tmp_path / "new", decode=None).samples] == [*map(str, keys)]


def test_msgpack_of_bytes_numbers_and_arrays(tmp_path):
    msgpack = pytest.importorskip("msgpack")
    array = {b"nd": True, b"type": "|u1", b"kind": b"", b"shape": (8, 8, 3)}
    rows = [[PNGS[0], 1], [array | {b"data": PIXELS[1].tobytes()}, 2]]
    entries = {b"%08d" % n: msgpack.packb(row) for n, row in enumerate(rows)}
    found, _ = converted(tmp_path, entries | {b"__keys__": msgpack.packb(sorted(entries))})
    assert [target for *_, target in found] == [1, 2]
    assert np.array_equal(pixels_of(found[1][1]), PIXELS[1])


# ---- Caffe ----


@pytest.fixture(scope="module")
def datum_type():
    """Caffe's message, made by Google's library from its .proto."""
    descriptor = pytest.importorskip("google.protobuf.descriptor_pb2")
    from google.protobuf import descriptor_pool, message_factory

    field = descriptor.FieldDescriptorProto
    kinds = {
        "channels": field.TYPE_INT32, "height": field.TYPE_INT32, "width": field.TYPE_INT32,
        "data": field.TYPE_BYTES, "label": field.TYPE_INT32, "float_data": field.TYPE_FLOAT,
        "encoded": field.TYPE_BOOL,
    }  # fmt: skip
    proto = descriptor.FileDescriptorProto(name="caffe_datum.proto", package="caffe_of_tests")
    message = proto.message_type.add(name="Datum")
    for number, (name, kind) in enumerate(kinds.items(), 1):
        label = field.LABEL_REPEATED if name == "float_data" else field.LABEL_OPTIONAL
        message.field.add(name=name, number=number, type=kind, label=label)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(proto)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("caffe_of_tests.Datum"))


int32 = st.integers(-(2**31), 2**31 - 1)


@settings(max_examples=40, deadline=None)
@given(st.tuples(*[st.integers(0, 2**31 - 1)] * 3), st.binary(max_size=300), int32, st.booleans(),
       st.lists(st.just(1.5), max_size=3))  # fmt: skip
def test_a_datum_is_read_as_googles_library_writes_it(
    datum_type, sides, data, label, is_encoded, floats
):
    channels, height, width = sides
    message = datum_type(
        channels=channels, height=height, width=width, data=data, label=label, encoded=is_encoded,
        float_data=floats,
    )  # fmt: skip
    expected = Datum(channels, height, width, data, label, 4 * len(floats), is_encoded)
    assert read_datum(message.SerializeToString()) == expected


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=40))
def test_any_bytes_are_a_datum_or_refused(data):
    with suppress(ValueError):
        read_datum(data)


def field_of(number, value):
    """Return a field of protocol buffers, whose numbers are below 2 ** 14."""
    size = value if isinstance(value, int) else len(value)
    kind, data = (0, b"") if isinstance(value, int) else (2, value)
    return bytes([number << 3 | kind, size & 0x7F | 0x80, size >> 7]) + data


def caffe(pixels, label):
    """Return what convert_imageset writes: [C, H, W], blue first."""
    height, width, channels = pixels.shape
    data = pixels[..., ::-1].transpose(2, 0, 1).tobytes()
    fields = (channels, height, width, data, label)
    return b"".join(field_of(number, value) for number, value in enumerate(fields, 1))


def test_pixels_of_caffe_arrive_as_rgb_and_encoded_images_as_they_are(tmp_path):
    entries = {b"%08d_a.jpg" % n: caffe(PIXELS[n], n) for n in range(4)}
    entries[b"00000004_b.jpg"] = field_of(4, PNGS[4]) + field_of(5, 4) + field_of(7, 1)
    entries[b"00000005_c.jpg"] = caffe(PIXELS[5, ..., :1], 5)
    entries[b"00000006_d.jpg"] = field_of(4, PNGS[6]) + field_of(5, 6)  # not said, but encoded
    found, report = converted(tmp_path, entries)
    assert [(key, target) for key, _, target in found] == [
        (key.decode(), n) for n, key in enumerate(entries)
    ]
    assert found[6][1] == PNGS[6]
    for n in range(4):
        assert np.array_equal(pixels_of(found[n][1]), PIXELS[n])
    assert found[4][1] == PNGS[4]
    assert np.array_equal(pixels_of(found[5][1]), PIXELS[5, ..., 0])
    assert "Caffe" in report
    assert "BGR" in report


def test_pixels_of_caffe_stay_where_they_are_rgb_by_word(tmp_path):
    [(_, image, _)], _ = converted(tmp_path, {b"a": caffe(PIXELS[0], 1)}, bgr=False)
    assert np.array_equal(pixels_of(image), PIXELS[0, ..., ::-1])


# ---- refused by name, and nothing is written ----


class Photo:
    """What many a tutorial pickles: an object of its own class."""

    def __init__(self):
        self.image, self.label = PNGS[0], 3


TENSOR = (
    b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(ctorch.storage\n_load_from_bytes\nC\x01x\x85RtR."
)
PAIR = {b"image-1": PNGS[0], b"label-1": b"a", b"image-2": PNGS[1]}


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({b"a": pickle.dumps(Photo())}, r"a: its pickle needs .*test_lmdb_convert\.Photo"),
        ({b"a": TENSOR}, r"torch\._utils\._rebuild_tensor_v2.*tensors"),
        ({b"a": pickle.dumps((np.array([{}]), 1))}, r"NumPy array of type 'O8'"),
        ({b"a": pickle.dumps(np.zeros(3, "i4,f4"))}, r"NumPy array of type 'V8'"),
        ({b"a": pickle.dumps((np.float32(PIXELS[0]), 1))}, r"none: .*float32 array \[8, 8, 3\]"),
        ({b"a": pickle.dumps((PIXELS[0, :3], 1))}, r"\(3, 8, 3\) may be"),
        ({b"a": pickle.dumps((np.dstack([PIXELS[0]] * 2), 1))}, r"uint8 array \[8, 8, 6\]"),
        ({b"a": pickle.dumps((PNGS[0], PNGS[1]))}, r"holds 2"),
        ({b"a": pickle.dumps({"image": PNGS[0], "mask": PIXELS[0, ..., 0]})}, r"'mask'"),
        ({b"a": pickle.dumps((b"nothing", 1))}, r"7 bytes, beginning b'nothing'"),
        ({b"a": pickle.dumps((PNGS[0], b"\xff\0"))}, r"neither text nor a number"),
        ({b"a": pickle.dumps((PNGS[0], {1: 2}))}, r"a dict needs texts as keys"),
        ({b"a": pickle.dumps((PNGS[0], {1}))}, r"set"),
        ({b"a": pickle.dumps((PNGS[0][:60], 1))}, r"a: not an image"),
        ({b"a": pickle.dumps((PNGS[0], 1))[:-9] + b"."}, r"damaged"),
        ({b"a": field_of(6, bytes(12)) + field_of(5, 1)}, r"float_data"),
        ({b"a": caffe(PIXELS[0], 1)[:-30]}, r"form|ends within"),
        ({b"a": caffe(np.dstack([PIXELS[0], PIXELS[0]]), 1)}, r"\(6, 8, 8\).*1 or 3 channels"),
        ({b"a": PIXELS[0].tobytes()}, r"192 bytes, beginning"),
        ({b"a": b"hello", b"b": b""}, r"a: 5 bytes, beginning b'hello'; b: 0 bytes"),
        ({b"a": bytes(16) + b"\xff" * 4 + b"\xa8\1\0\0\x10\0\0\0\0\0\n\0\x0c\0"}, r"pyarrow<12"),
        ({}, r"empty"),
        ({b"__len__": pickle.dumps(0), b"__keys__": pickle.dumps([])}, r"lists no record"),
        (folder2lmdb([(PNGS[0], 1)]) | {b"__keys__": pickle.dumps(3)}, r"__keys__ holds a int"),
        (folder2lmdb([(PNGS[0], 1)]) | {b"__keys__": pickle.dumps(Photo())}, r"Photo"),
        (folder2lmdb([PNGS[0]]) | {b"__keys__": pickle.dumps([b"0", b"1"])}, r"says 1 record,"),
        (folder2lmdb([PNGS[0]], length=5), r"__len__: says 5 records, but there are 1"),
        (folder2lmdb([(PNGS[0], 1)] * 2) | {b"__keys__": pickle.dumps([b"0", b"0"])}, r"unique"),
        (folder2lmdb([PNGS[0]] * 2) | {b"__keys__": b'["0", "7"]'}, r"7: .* no such entry"),
        (folder2lmdb([PNGS[0]]) | {b"__keys__": b'["7"]'}, r"no value at all"),
        (folder2lmdb([PNGS[0]]) | {b"__keys__": pickle.dumps([("a", 1)])}, r"cannot be a key"),
        (folder2lmdb([PNGS[0]]) | {b"__keys__": pickle.dumps([16**5000])}, r"'0x10000.*be a key"),
        (PAIR, r"image-2: .*no label"),
        (PAIR | {b"label-2": b"a", b"label-3": b"a", b"num-samples": b"3"}, r"no such entry"),
        (PAIR | {b"label-2": b"a", b"num-samples": b"3"}, r"num-samples: says 3 records"),
        (PAIR | {b"label-2": PNGS[0]}, r"image-2: its label is an image"),
        (PAIR | {b"label-2": np.int64(3).tobytes()}, r"image-2: its label is neither text"),
    ],
)  # fmt: skip
def test_what_cannot_be_kept_is_refused_by_name(tmp_path, entries, says):
    old = old_database(tmp_path / "old", entries)
    with pytest.raises((DatabaseError, SourceError), match=says):
        convert_lmdb(old, tmp_path / "new", progress=False)
    assert not (tmp_path / "new").exists()


def test_records_that_are_refused_can_be_left_out_and_are_listed(tmp_path):
    samples = [(PNGS[0], 0), Photo(), (PNGS[2], 2), (b"", 3)]
    found, report = converted(tmp_path, folder2lmdb(samples, length=5), on_error="skip")
    assert [key for key, *_ in found] == ["0", "2"]
    for part in ("3 skipped", "__len__: says 5", "1: its pickle needs", "3: a sample must hold"):
        assert part in report


def test_a_database_of_ours_and_one_with_two_values_under_a_key_are_refused(tmp_path):
    write_lmdb([("a", PNGS[0], 1)], tmp_path / "ours", progress=False)
    with pytest.raises(DatabaseError, match="was written by write_lmdb"):
        open_old(tmp_path / "ours")
    old = old_database(tmp_path / "old", {b"a": b"1"}, b"images", dupsort=True)
    with pytest.raises(DatabaseError, match="dupsort"):
        open_old(old)


def test_a_file_that_is_open_stays_open_and_usable(tmp_path):
    write_lmdb([("a", PNGS[0], 1)], tmp_path / "ours", progress=False)
    dataset = LMDBDataset(tmp_path / "ours", decode=None)
    assert dataset[0] == (PNGS[0], 1)
    with pytest.raises(DatabaseError, match="open in this process"):
        open_old(tmp_path / "ours")
    assert dataset[0] == (PNGS[0], 1)
    source = open_old(old_database(tmp_path / "old", {b"a": PNGS[0]}))
    assert open_old(tmp_path / "old").load(source.items[0]).image == PNGS[0]  # twice at once
    with pytest.raises(DatabaseError, match=r"open in this process|none that write_lmdb"):
        LMDBDataset(tmp_path / "old" / "data.mdb")
    assert source.load(source.items[0]).image == PNGS[0]


def test_paths_that_are_no_database(tmp_path):
    old_database(tmp_path / "train", {b"a": PNGS[0]})
    with pytest.raises(FileNotFoundError, match=r"without data\.mdb: give one of train"):
        open_old(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_old(tmp_path / "nothing")
    with pytest.raises(ValueError, match="bgr must be"):
        open_old(tmp_path / "train", bgr="no")
    with pytest.raises(FileExistsError, match="nothing was touched"):
        convert_lmdb(tmp_path / "train", tmp_path / "train" / "data.mdb", progress=False)


# ---- pickles ----


class Runs:
    """Pickles as a call of any function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class Restores:
    def __reduce__(self):
        return object.__new__, (Restores,), {"a": 1}


def flag(tmp_path):
    return tmp_path / "executed"


def test_what_follows_a_pickle_is_not_dropped_in_silence():
    with pytest.raises(PickleError, match="1 byte follows the end"):
        unpickle(pickle.dumps(3) + b".")


@pytest.mark.parametrize("mode", ["P", "RGBA", "CMYK", "L"])
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_pictures_of_pil_are_read_as_pickle_reads_them(mode, protocol):
    picture = Image.fromarray(PIXELS[0]).convert(mode)
    found = unpickle(pickle.dumps(picture, protocol))
    assert np.array_equal(np.asarray(found.convert("RGB")), np.asarray(picture.convert("RGB")))


def test_a_picture_that_lies_about_its_size_is_refused_before_it_is_made():
    data = pickle.dumps(Image.fromarray(PIXELS[0]), 2)
    lies = data.replace(b"K\x08K\x08\x86", b"M\x60\xeaM\x60\xea\x86")
    assert lies != data
    with pytest.raises(PickleError, match="60000 x 60000 RGB in 192 bytes"):
        unpickle(lies)


NEW = b"ccopyreg\n_reconstructor\n"
CALLS = {
    "os.system": lambda flag: pickle.dumps(Runs(os.system, f"touch {flag}")),
    "posix.system": lambda flag: b"cposix\nsystem\n(Vtouch %s\ntR." % os.fsencode(flag),
    "eval": lambda flag: pickle.dumps(Runs(eval, f"open({str(flag)!r}, 'w')")),
    "exec": lambda flag: pickle.dumps(Runs(exec, f"open({str(flag)!r}, 'w')"), 0),
    "open": lambda flag: pickle.dumps(Runs(open, str(flag), "w"), 2),
    "getattr": lambda flag: pickle.dumps(Runs(getattr, np.dtype, "newbyteorder")),
    "dotted": lambda flag: b"\x80\x04\x8c\x05numpy\x8c\x15ndarray.__reduce_ex__\x93.",
    "dotted module": lambda flag: b"\x80\x04\x8c\x0dnumpy.ndarray\x8c\x08tofile..\x93.",
    "copyreg": lambda flag: NEW + b"(cos\nPathLike\nc__builtin__\nobject\nNtR.",
    "copyreg of known": lambda flag: NEW + b"(cnumpy\nndarray\nc__builtin__\nobject\nNtR.",
    "instance": lambda flag: b"(V%s\nios\nmkdir\n." % os.fsencode(flag),
    "object": lambda flag: b"(cos\nmkdir\nV%s\no." % os.fsencode(flag),
    "instance of known": lambda flag: b"(I99999999999\ni__builtin__\nbytes\n.",
    "state of a function": lambda flag: b"c_codecs\nencode\n}(V__kwdefaults__\n}ub.",
    "state of a class": lambda flag: b"\x80\x02cnumpy\ndtype\n}X\x05\0\0\0buildNsb.",
    "state of a list": lambda flag: b"]}X\x01\0\0\0aK\1sb.",
    "persistent": lambda flag: b"Pabc\n.",
    "persistent binary": lambda flag: b"\x80\x02K\1Q.",
    "extension": lambda flag: b"\x80\x02\x82\xf0.",
    "a function as value": lambda flag: b"c_codecs\nencode\n.",
    "object arrays": lambda flag: pickle.dumps(np.array([Runs(os.mkdir, str(flag))], object)),
    "array subclass": lambda flag: pickle.dumps(np.ma.array([1])),
    "set state": lambda flag: pickle.dumps(Restores()),
    "partial": lambda flag: pickle.dumps(Runs(functools.partial, os.mkdir, str(flag))),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_no_pickle_runs_anything(tmp_path, name):
    data = CALLS[name](flag(tmp_path))
    before = set(sys.modules)
    with pytest.raises(PickleError, match=r"needs|holds|sets|refers|makes|calls"):
        unpickle(data)
    assert not flag(tmp_path).exists()
    own = ("dlhelpers", "numpy", "encodings")  # what the reader itself may load, the first time
    assert not [name for name in set(sys.modules) - before if not name.startswith(own)]


def test_a_class_with_an_extension_code_is_refused_though_it_was_used_before(monkeypatch):
    copyreg.add_extension("collections", "Counter", 0xF0)
    try:
        assert pickle.loads(b"\x80\x02\x82\xf0.") is collections.Counter
        with pytest.raises(PickleError, match="extension code"):
            unpickle(b"\x80\x02\x82\xf0.")
    finally:
        copyreg.remove_extension("collections", "Counter", 0xF0)


def test_names_are_refused_before_their_module_is_imported(tmp_path, monkeypatch):
    (tmp_path / "planted.py").write_text(f"open({str(flag(tmp_path))!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PickleError, match=r"needs planted\.function"):
        unpickle(b"cplanted\nfunction\n.")
    assert not flag(tmp_path).exists()


LAUGHS = (
    b"(lp0\n" + b"".join(b"(" + b"g%d\n" % n * 10 + b"lp%d\n" % (n + 1) for n in range(9)) + b"."
)
AB = b"c_codecs\nencode\n(Vab\nVlatin1\ntR"
ZEROS = b"cnumpy\ndtype\n(Vu1\nI00\nI01\ntR"


@pytest.mark.parametrize(
    "bomb",
    [
        LAUGHS,
        LAUGHS[:-1] + b"cnumpy.core.numeric\n_frombuffer\n(" + AB + ZEROS + b"g9\ntR.",
        LAUGHS[:-1] + b"cnumpy\ndtype\n(g9\ntR.",
        LAUGHS.replace(b"l", b"t")[:-1] + b"0(g9\nNd.",  # a key whose hash takes for ever
        b"\x80\x02" + LAUGHS.replace(b"l", b"t")[:-1] + b"0}g9\nNs.",
        b"\x80\x02" + LAUGHS.replace(b"l", b"t")[:-1] + b"0}(g9\nNu.",
        b"\x80\x04" + LAUGHS.replace(b"l", b"t")[:-1] + b"0\x8f(g9\n\x90.",
        LAUGHS.replace(b"l", b"t")[:-1] + b"ccollections\nOrderedDict\n(((g9\nNtltR.",
        b"(" * 9_000 + b"t" * 9_000 + b".",
        b"]" * 9_000 + b"a" * 8_999 + b".",
        b"]\x94h\0a.",
        b"\x80\x02]q\0h\0a.",  # holds itself
        b"\x80\x02Nr\xff\xff\xff\x7f0N.",  # C's reader makes room for two thousand million
        b"\x80\x05\x96\xff\xff\xff\xff\xff\0\0\0abc.",
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\0\0\0abc.",
        b"\x80\x02\x8b\xff\xff\xff\x7fabc.",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\0\0\0N.",
        b"c__builtin__\nbytes\n(I99999999999\ntR.",
        b"cnumpy.core.numeric\n_frombuffer\n(" + AB + ZEROS + b"(I99999999\nI99999999\nttR.",
        b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(VS999999999\ntR" + AB + b"tR.",
        b"I" + b"9" * 5000 + b"\n.",
        b"(V" + b"a" * 20_000 + b"\np0\n0" + b"(c_codecs\nencode\n(g0\nVlatin1\ntR" * 500 + b"l.",
    ],
    ids=range(22),
)
def test_a_small_pickle_cannot_unfold_to_gigabytes(bomb):
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with suppress(PickleError):
        assert unpickle(bomb) is None  # where what is too large is never asked for
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


MODULUS = 2**61 - 1  # of the hashes of numbers: what it divides has the hash 0
SAME = [n * MODULUS for n in range(3)]


def keyed(keys, protocol=2):
    """Return pickles of dicts with these keys, by each of the opcodes that make one."""
    pairs = pickle.dumps([(key, None) for key in keys], protocol)[2:-1]
    flat = b"".join(pickle.dumps(key, protocol)[2:-1] + b"N" for key in keys)
    single = b"".join(pickle.dumps(key, protocol)[2:-1] + b"Ns" for key in keys)
    ways = (b"(" + flat + b"d", b"}(" + flat + b"u", b"}" + single)
    return [
        b"\x80\x02" + way + b"."
        for way in (*ways, b"ccollections\nOrderedDict\n" + pairs + b"\x85R")
    ]


def test_no_dict_is_built_whose_keys_can_be_made_to_meet(tmp_path):
    many = range(30_001)
    for hostile, says in (
        (SAME, "a number of more than 60 bits as key"),
        ([-SAME[1]], "a number of more than 60 bits as key"),
        ([2.0**61], "a dict with a float as key"),
        (many, "more than 30000 numbers as keys"),
    ):
        for data in keyed(hostile):
            with pytest.raises(PickleError, match=says):
                unpickle(data)
    texts = [f"{n}" for n in many]
    for data in keyed(texts) + keyed(many[:-1]):
        assert len(unpickle(data)) >= len(many) - 1
    two = b"".join(data[2:-1] for data in keyed(many[:15_002])[:2])
    with pytest.raises(PickleError, match="more than 30000 numbers"):
        unpickle(b"\x80\x02" + two + b"\x86.")


def test_numbers_that_a_pickle_gives_its_values_are_not_looked_up_by_their_hashes():
    reader = unpickling._Reader(
        io.BytesIO(b"(" + b"".join(b"Np%d\n0" % n for n in SAME) + b"t."), 9
    )
    assert reader.load() == ()
    assert [*reader.memo] == [str(n) for n in SAME]
    assert unpickle(b"(" + b"I%d\np%d\n" % (7, SAME[1]) + b"g%d\nt." % SAME[1]) == (7, 7)


def test_the_keys_of_msgpack_are_bounded_as_those_of_pickles_are():
    msgpack = pytest.importorskip("msgpack")
    assert read_plain(msgpack.packb({"a": {1: 2}})) == {"a": {1: 2}}
    for hostile, says in (
        ({SAME[1]: 0}, "more than 60 bits"),
        ({1.5: 0}, "a float as key"),
        (dict.fromkeys(range(30_001)), "30000 numbers"),
    ):
        with pytest.raises(ValueError, match=says):
            sample_of(msgpack.packb({"image": PNGS[0], "label": hostile}), "msgpack")


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9)
    | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.tuples(inner, inner)
    | st.dictionaries(st.text(max_size=5) | st.integers(-(2**59), 2**59), inner, max_size=4),
    max_leaves=6,
)  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(plain, st.sampled_from(PROTOCOLS))
def test_plain_values_are_read_as_pickle_reads_them(value, protocol):
    assert unpickle(pickle.dumps(value, protocol)) == value


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["u1", "i8", ">i2", "f4", "?", "<U3", "S4", "f2", ">f8"]),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from(PROTOCOLS),
    st.booleans(),
)
def test_arrays_and_scalars_are_read_as_numpy_reads_them(dtype, shape, protocol, is_fortran):
    numbers = np.arange(int(np.prod(shape)) + 1).astype(dtype)
    array = np.require(numbers[1:].reshape(shape), requirements="F" if is_fortran else "C")
    found, scalar = unpickle(pickle.dumps((array, numbers[0]), protocol))
    assert found.dtype == array.dtype
    assert np.array_equal(found, array)
    assert scalar == numbers[0].item()


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_any_flipped_pickle_is_read_or_refused(data):
    whole = bytearray(pickle.dumps((PNGS[0][:20], np.arange(3), "a"), data.draw(st.integers(0, 5))))
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    with suppress(PickleError):  # and nothing else
        unpickle(bytes(whole))


# ---- the conversion around it ----


def test_what_was_interrupted_goes_on_and_a_changed_database_does_not(tmp_path):
    samples = [(png, n) for n, png in enumerate(PNGS)]
    old = old_database(tmp_path / "old", folder2lmdb([*samples[:6], Photo(), *samples[7:]]))
    with pytest.raises(SourceError, match="6 images are kept: resume=True"):
        convert_lmdb(old, tmp_path / "new", progress=False)
    stamp = os.stat(old / "data.mdb")
    assert (
        convert_lmdb(
            old, tmp_path / "new", progress=False, resume=True, on_error="skip"
        ).resumed_from
        == 6
    )
    assert os.stat(old / "data.mdb")[6:9] == stamp[6:9]  # size, and time it was modified

    with pytest.raises(SourceError):
        convert_lmdb(old, tmp_path / "new", progress=False)
    shutil.rmtree(old)
    old_database(old, folder2lmdb([(PNGS[1], 0), *samples[1:]]))
    with pytest.warns(UserWarning, match="the source has changed"):
        convert_lmdb(old, tmp_path / "new", progress=False, resume=True)
    assert LMDBDataset(tmp_path / "new", decode=None)[0][0] == PNGS[1]


def test_shards_of_an_old_database_belong_together(tmp_path):
    old = old_database(tmp_path / "old", folder2lmdb([(png, n) for n, png in enumerate(PNGS)]))
    for rank in range(2):
        convert_lmdb(old, tmp_path / "new", shard=(rank, 2), progress=False)
    dataset = LMDBDataset(tmp_path / "new", decode=None)
    assert [dataset[n] for n in range(12)] == [(png, n) for n, png in enumerate(PNGS)]


def test_nothing_is_written_beside_the_old_database(tmp_path):
    old = old_database(tmp_path / "old", folder2lmdb([(PNGS[0], 1)]))
    (old / "lock.mdb").unlink()
    data = (old / "data.mdb").read_bytes()
    convert_lmdb(old, tmp_path / "new", progress=False)
    assert os.listdir(old) == ["data.mdb"]
    lmdb.open(os.fspath(old), readonly=True, lock=False).close()  # nobody holds it any more
    assert (old / "data.mdb").read_bytes() == data


@pytest.mark.slow
def test_damaged_files_end_with_an_error(tmp_path):
    old = old_database(tmp_path / "old", {b"%d" % n: PNGS[n] * 40 for n in range(8)}, subdir=False)
    whole = old.read_bytes()
    for damaged in (whole[:100], whole[:-4096], whole[:8192] + b"\xff" * (len(whole) - 8192)):
        old.write_bytes(damaged)
        with pytest.raises(DatabaseError, match=r"no LMDB file|truncated|damaged"):
            open_old(old)


@pytest.mark.slow
def test_damaged_bytes_anywhere_are_an_error_or_change_values_alone(tmp_path):
    entries = folder2lmdb([(PNGS[n] * (1 + 30 * (n % 2)), n) for n in range(12)])
    old = old_database(tmp_path / "old", entries, subdir=False)
    whole, numbers = old.read_bytes(), random.Random(1)
    program = "import sys; from dlhelpers.__main__ import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "lmdb", "convert", "--quiet", "--skip-errors"]
    for number in range(60):
        data = bytearray(whole)
        for _ in range(numbers.choice((1, 20, 400))):
            data[numbers.randrange(len(data))] = numbers.randrange(256)
        old.write_bytes(data)
        new = tmp_path / f"{number}.lmdb"
        done = subprocess.run([*command, old, new], capture_output=True, text=True, check=False)
        assert done.returncode in (0, 2), done.stderr
        if done.returncode == 0:
            verify_lmdb(new, progress=False)


def test_the_command_converts_and_names_what_it_refuses(tmp_path, capsys):
    old = old_database(tmp_path / "old", folder2lmdb([(PIXELS[0], 1), Photo()]))
    new = tmp_path / "new.lmdb"
    command = ["lmdb", "convert", str(old), str(new), "--quiet"]
    assert main(command) == 2
    assert "Photo" in capsys.readouterr().err
    assert main([*command, "--skip-errors", "--bgr", "--encode", "raw"]) == 0
    out = capsys.readouterr().out
    assert "folder2lmdb" in out
    assert "1 skipped" in out
    pixels = LMDBDataset(new, decode=None)[0][0][12:]
    assert pixels == PIXELS[0, ..., ::-1].tobytes()


def test_msgpack_that_is_nested_too_deeply_is_called_that():
    pytest.importorskip("msgpack")
    with pytest.raises(ValueError, match=r"not readable msgpack \(\w+"):
        sample_of(b"\x91" * 5000 + b"\xc0", "msgpack")


def test_which_of_two_arrays_is_the_image_is_not_guessed(tmp_path):
    mask = np.zeros((24, 32), np.uint8)
    samples = [
        (np.zeros((3, 24, 32), np.float32), mask),
        {"ct": np.zeros((24, 32), np.int16), "mask": mask},
        (np.zeros((24, 32, 3)), np.eye(10, dtype=np.uint8)[:1]),
    ]
    for number, sample in enumerate(samples):
        old = old_database(tmp_path / f"{number}", {b"0": pickle.dumps(sample)}, subdir=False)
        with pytest.raises(ValueError, match=r"which of its arrays|one image"):
            convert_lmdb(old, tmp_path / f"new{number}", progress=False)
    boxes = (np.zeros((24, 32, 3), np.uint8), np.zeros((5, 4), np.float32))
    old = old_database(tmp_path / "boxes", {b"0": pickle.dumps(boxes)}, subdir=False)
    assert convert_lmdb(old, tmp_path / "kept", progress=False).count == 1


def test_labels_that_look_like_an_image_are_texts():
    for text in ("P1 24h", "BMW", "GIF89a?"):
        assert plain_target(text.encode()) == text
    with pytest.raises(ValueError, match="neither text nor a number"):
        plain_target(b"\x01")


def test_a_deep_list_beside_the_samples_is_no_crash():
    assert read_plain(b"[" * 100_000) == "[" * 100_000


def test_a_call_costs_what_it_is_given(tmp_path):
    size = 2000
    pairs = b"".join(b"K\x01K\x02\x86" for _ in range(size))
    data = b"\x80\x02ccollections\nOrderedDict\nq\x00(" + pairs + b"tq\x010"
    data += b"h\x00h\x01\x85R0" * size + b"N."
    with pytest.raises(PickleError):
        unpickle(data)


def test_a_database_is_read_without_the_code_that_lies_beside_it(tmp_path):
    """The child that walks over a damaged file imports nothing from the current folder."""
    old_database(tmp_path / "old", {b"0": pickle.dumps((PNGS[0], 1)), b"__len__": pickle.dumps(1)})
    beside = tmp_path / "json.py"
    beside.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise ImportError\n")
    code = f"from dlhelpers.lmdb_io import convert_lmdb; convert_lmdb({str(tmp_path / 'old')!r}, "
    code += f"{str(tmp_path / 'new')!r}, progress=False)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "ran").exists()
    assert len(LMDBDataset(tmp_path / "new")) == 1


def test_an_array_without_elements_cannot_fill_the_memory():
    with pytest.raises(PickleError, match=r"of shape \[100000000, 0\] holds nothing"):
        unpickle(pickle.dumps((PNGS[0], np.empty((10**8, 0)))))
    assert unpickle(pickle.dumps(np.empty((0, 4)))).shape == (0, 4)  # no boxes


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"nd": True, "type": "<f3", "shape": [1], "data": b"123"}, "array is damaged .TypeError"),
        ({"nd": True, "type": "<f4", "shape": [1], "data": "text"}, "array is damaged .TypeError"),
        ({"nd": False, "type": "<f4", "data": b""}, "array is damaged .IndexError"),
        ({"nd": True, "type": "<f4", "data": b"1234"}, "array is damaged .KeyError"),
        ({"nd": True, "type": "<f4", "shape": ["x"], "data": b"1234"}, "array is damaged .TypeErr"),
        ({"nd": True, "type": "<f4", "shape": [10**8, 0], "data": b""}, "holds nothing"),
        (functools.reduce(lambda inner, _: [inner], range(700), 1), "nested too deeply"),
    ],
    ids=["type", "data", "empty", "no shape", "shape", "no elements", "deep"],
)
def test_damaged_arrays_in_msgpack_are_named(value, says):
    msgpack = pytest.importorskip("msgpack")
    with pytest.raises(ValueError, match=says):
        sample_of(msgpack.packb({"image": PNGS[0], "label": value}), "msgpack")


def test_keys_that_are_the_same_text_once_as_bytes_are_refused():
    with pytest.raises(ValueError, match="two of its 3 keys are the same text"):
        sample_of(pickle.dumps({b"image": PNGS[0], "image": PNGS[1], "y": 3}), "pickle")
