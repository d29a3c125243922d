"""Samples of several named fields come back exactly, or are refused by the name of the field."""

import collections
import dataclasses
import io
import os

import lmdb
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Subset
from torchvision.datasets import ImageFolder

from dlhelpers.dali_io import DALILoader, has_dali, image_pipeline
from dlhelpers.lmdb_io import (
    DatabaseError,
    LMDBDataset,
    SourceError,
    converting,
    info_lmdb,
    schema,
    verifying,
    write_listing,
    write_lmdb,
)
from dlhelpers.lmdb_io.arrays import pack_array, unpack_array
from dlhelpers.lmdb_io.fields import Fields
from dlhelpers.lmdb_io.samples import SampleReader

FIELDS = {"image": "jpeg", "mask": "png", "boxes": "numpy", "caption": "text", "label": "json"}
SHAPES = {"RGB": (3, 4, 3), "RGBA": (3, 4, 4), "LA": (3, 4, 2)}
MODES = ("1", "L", "P", "I;16", "I", "F", "RGB", "RGBA", "LA")


def image_of(mode, seed=0):
    rng = np.random.default_rng(seed)
    if mode == "P":  # two colours, and an index beyond them, as VOC has it for borders
        image = Image.frombytes("P", (4, 3), bytes([0, 1, 255, 0] * 3))
        image.putpalette([0, 0, 0, 200, 10, 10])
        return image
    if mode in SHAPES:
        return Image.fromarray(rng.integers(0, 256, SHAPES[mode], np.uint8))
    if mode == "F":
        return Image.fromarray(rng.normal(size=(3, 4)).astype(np.float32))
    dtype, low, high = {
        "1": (np.uint8, 0, 2),
        "L": (np.uint8, 0, 256),
        "I;16": (np.uint16, 0, 1 << 16),
        "I": (np.int32, -(1 << 31), 1 << 31),
    }[mode]
    pixels = rng.integers(low, high, (3, 4), dtype)
    return Image.fromarray(pixels.astype(bool) if mode == "1" else pixels)


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


JPEG = encoded(image_of("RGB"), "jpeg")
FRAMES = encoded(image_of("L"), "gif", save_all=True, append_images=[image_of("L", 1)])


def sample(number, changed=""):
    return {
        "image": JPEG,
        "mask": np.full((3, 4), number, np.uint16),
        "boxes": np.arange(4.0 * number, dtype=np.float32).reshape(number, 4),
        "caption": f"number {number}{changed}",
        "label": number,
    }


class Samples:
    """A map-style dataset of anything."""

    def __init__(self, items):
        self.items = list(items)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def write(source, path, fields=FIELDS, **options):
    return write_lmdb(source, path, fields=fields, progress=False, **options)


def stored(path):
    dataset = LMDBDataset(path)
    return [dataset.stored(number) for number in range(len(dataset))]


def same(first, second):
    """Whether two values are equal down to type, dtype, shape and bytes."""
    if isinstance(first, torch.Tensor):
        alike = isinstance(second, torch.Tensor) and first.dtype == second.dtype
        return alike and first.shape == second.shape and torch.equal(first, second)
    if isinstance(first, (np.ndarray, np.generic)):
        alike = type(first) is type(second) and first.dtype == second.dtype
        alike = alike and first.shape == second.shape
        # bytes tell NaNs apart; those between aligned parts are no values
        return alike and (first.tobytes() == second.tobytes() or bool(np.all(first == second)))
    return type(first) is type(second) and repr(first) == repr(second)  # NaN is itself there


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    path = tmp_path_factory.mktemp("fields") / "samples.lmdb"
    write(Samples(map(sample, range(3))), path)
    return path


# ---- what is stored comes back ----

NUMBERS = st.one_of(
    hnp.scalar_dtypes(),
    hnp.byte_string_dtypes(min_len=1),
    hnp.unicode_string_dtypes(min_len=1),
    hnp.array_dtypes(hnp.integer_dtypes() | hnp.floating_dtypes(), max_size=2),
)
ARRAYS = NUMBERS.flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, min_side=0, max_side=3))
)
TEXTS = st.text(st.characters(), max_size=8)  # lone surrogates among them
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


def back(fields, values, decode="auto"):
    """Return a sample after it was a record."""
    fields = Fields.given(fields)
    label, packed = fields.pack(values)
    record = schema.pack_record(0, b"key", schema.encode_target(label), packed)
    read = schema.unpack_record(memoryview(record), 0)
    assert fields.damage(memoryview(record)) == ""
    return SampleReader(fields, decode, False).sample(read, "path", 0)


def test_every_text_comes_back():
    text = "".join(map(chr, [*range(0x180), 0xDFFF, 0xD800, 0xFFFE, 0x1F600]))
    assert back({"a": "text", "b": "json"}, (text, {text: [text]})) == (text, {text: [text]})


@settings(max_examples=10, deadline=None)
@given(ARRAYS, TEXTS, JSON, JSON, st.binary(max_size=20))
def test_arrays_texts_json_and_bytes_come_back_exactly(array, text, value, label, data):
    survive(array, text, value, label, data)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None)
@given(ARRAYS, TEXTS, JSON, JSON, st.binary(max_size=200))
def test_many_arrays_texts_json_and_bytes_come_back_exactly(array, text, value, label, data):
    survive(array, text, value, label, data)


def survive(array, text, value, label, data):
    kinds = {"array": "numpy", "text": "text", "value": "json", "label": "json", "data": "bytes"}
    values = {"array": array, "text": text, "value": value, "label": label, "data": data}
    found = back(kinds, values)
    assert list(found) == list(kinds)
    assert all(same(values[name], found[name]) for name in kinds), (values, found)


@pytest.mark.parametrize(
    "value",
    [
        np.arange(24).reshape(2, 3, 4)[::-1, :, ::2],
        np.asfortranarray(np.ones((2, 3), ">f4")),
        np.zeros((0, 3), "m8[us]"),
        np.array(True),
        np.complex64(1 + 2j),
        np.datetime64("NaT"),
        np.zeros(2, np.dtype([("a", "i1"), ("b", "<f8", (2,))], align=True)),
        np.zeros(2, "V3"),
        torch.randn(2, 3, dtype=torch.bfloat16).T,
        torch.tensor(2, dtype=torch.uint16),
        torch.zeros(0, 4),
        torch.ones(2, requires_grad=True),
        torch.randn(3, dtype=torch.complex64).conj(),
    ],
    ids=lambda value: f"{type(value).__name__} {value.dtype}",
)
def test_odd_arrays_and_tensors_come_back_in_memory_of_their_own(value):
    found = back({"a": "numpy"}, (value,))[0]
    if isinstance(value, torch.Tensor):
        value = value.detach().resolve_conj()
    assert same(value.copy(order="C") if isinstance(value, np.ndarray) else value, found)
    if isinstance(found, np.ndarray):
        assert found.flags.writeable
        assert found.flags.owndata


@pytest.mark.parametrize("kind", ["png", "image"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("given_as", ["image", "pixels", "tensor", "bytes"])
def test_masks_keep_mode_and_pixels(mode, kind, given_as):
    image = image_of(mode)
    pixels = np.asarray(image)
    value = image
    if given_as == "pixels":
        value = pixels
    elif given_as == "tensor":
        value = torch.from_numpy(np.array(pixels))
        value = value.permute(2, 0, 1) if value.ndim == 3 else value
    elif given_as == "bytes":
        value = encoded(image, "tiff")
    (tensor,) = back({"a": kind}, (value,))
    (same_image,) = back({"a": kind}, (value,), decode="pil")
    if given_as not in ("pixels", "tensor"):  # which know nothing of palettes
        assert same_image.mode == mode
    found = tensor.permute(1, 2, 0) if tensor.ndim == 3 else tensor
    assert found.numpy().dtype == pixels.dtype
    assert np.array_equal(found.numpy(), pixels)
    assert np.array_equal(np.asarray(same_image), pixels)


def test_a_palette_keeps_its_colours_and_its_transparency():
    image = Image.frombytes("P", (2, 2), bytes([0, 1, 200, 2]))
    image.putpalette([*range(9)])
    image.info["transparency"] = 1
    (found,) = back({"a": "png"}, (image,), decode="pil")
    assert found.tobytes() == image.tobytes()
    assert found.getpalette()[:9] == [*range(9)]
    assert found.convert("RGBA").getpixel((1, 0)) == image.convert("RGBA").getpixel((1, 0))


@pytest.mark.parametrize(
    ("kind", "image"),
    [
        ("jpeg", JPEG),
        ("png", encoded(image_of("RGBA"), "png")),
        ("image", encoded(image_of("L"), "gif")),
    ],
)
def test_bytes_of_the_format_are_kept(kind, image):
    assert back({"a": kind}, (image,), decode=None) == (image,)


@pytest.mark.parametrize("kind", ["jpeg", "webp", "raw"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_pictures_are_read_as_rgb(kind, mode):
    (tensor,) = back({"a": kind}, (image_of(mode),))
    expected = np.asarray(image_of(mode).convert("RGB"))
    assert tensor.shape == (3, 3, 4)
    assert tensor.dtype == torch.uint8
    if kind == "raw":
        assert np.array_equal(tensor.permute(1, 2, 0).numpy(), expected)


@dataclasses.dataclass
class Pair:
    a: int
    b: str


Scene = dataclasses.make_dataclass("Scene", [*FIELDS])
Named = collections.namedtuple("Named", "a b")
Other = collections.namedtuple("Other", "x y")


@pytest.mark.parametrize(
    ("given_sample", "expected"),
    [
        ({"b": "x", "a": 1}, {"a": 1, "b": "x"}),
        (Pair(1, "x"), {"a": 1, "b": "x"}),
        ((1, "x"), (1, "x")),
        ([1, "x"], [1, "x"]),
        (Named(1, "x"), (1, "x")),
        (Other(1, "x"), (1, "x")),
    ],
)
def test_a_sample_comes_back_as_the_container_it_was(given_sample, expected):
    assert back({"a": "json", "b": "text"}, given_sample) == expected


# ---- what cannot be stored is refused by name ----


@pytest.mark.parametrize(
    ("kind", "value", "words"),
    [
        ("jpeg", image_of("P"), "mode 'P' .* as jpeg without loss: use the kind png"),
        ("jpeg", image_of("I;16"), "'I;16' .* kind png"),
        ("jpeg", encoded(image_of("1"), "png"), "mode '1' .* kind png"),
        ("webp", image_of("RGBA"), "'RGBA' .* kind png"),
        ("raw", np.zeros((2, 2), np.int32), "'I' .* kind png"),
        ("png", np.zeros((2, 2), np.int64), "dtype int64: use the kind numpy"),
        ("png", torch.rand(3, 2, 2), "float32: use the kind numpy, and leave ToTensor"),
        ("png", torch.zeros(1, 2, 2, dtype=torch.uint8), r"come back as \(2, 2\): give value\[0\]"),
        ("png", np.zeros((0, 2), np.uint8), "use the kind numpy"),
        ("png", image_of("RGB").convert("HSV"), "'HSV' .*RGB"),
        ("png", encoded(image_of("RGB"), "ppm").replace(b"\n255\n", b"\n999\n") * 2, "10 bits"),
        ("png", FRAMES, "2 frames would lose all but one: use the kind image"),
        ("jpeg", Image.open(io.BytesIO(FRAMES)), "2 frames"),
        ("image", b"no image", "not an image"),
        ("jpeg", JPEG[:90], "not an image"),
        ("png", None, "None cannot be stored as png"),
        ("png", "mask.png", "expected encoded bytes, .* str 'mask.png'"),
        ("numpy", np.array([None]), "Python objects"),
        ("numpy", np.zeros(1, [("a", "O")]), "Python objects"),
        ("numpy", np.ma.masked_array([1, 2], [0, 1]), "MaskedArray"),
        ("numpy", [1, 2], "expected a NumPy array, .* list"),
        ("numpy", torch.zeros(2).to_sparse(), "sparse_coo tensor"),
        ("numpy", torch.zeros(2, device="meta"), "meta tensor"),
        ("numpy", 10**30, "Python objects"),
        ("text", b"x", "expected a text, got bytes"),
        ("text", None, "None"),
        ("json", {1: 2}, "texts as keys"),
        ("json", np.zeros(2), "JSON"),
        ("bytes", "x", "expected bytes, got str"),
    ],
)
def test_what_a_kind_cannot_hold_is_refused_with_the_kind_to_use(kind, value, words):
    with pytest.raises(ValueError, match=f"(?s)^field 'a b': .*{words}"):
        Fields.given({"a b": kind}).pack([value])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"a": 1}, "field 'b' is missing, the sample has 'a'"),
        ({}, "field 'a' is missing, the sample has no key"),
        ({"a": 1, "b": "x", "c": 2}, "the key 'c' as well"),
        ((1,), "1 values, expected were 2: a, b"),
        ((1, "x", 2), "3 values"),
        ("ab", "got str"),
        (None, "got NoneType"),
        (Pair, "got type"),
        (collections.namedtuple("Turned", "b a")("x", 1), "field 'b' is number 0 of the named"),
    ],
)
def test_a_sample_of_other_fields_is_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        Fields.given({"a": "json", "b": "text"}).pack(wrong)


def test_an_item_that_cannot_be_stored_is_named_or_skipped(tmp_path):
    items = [sample(0), sample(1) | {"mask": None}, sample(2)]
    path = tmp_path / "skip.lmdb"
    with pytest.raises(SourceError, match="item 1: field 'mask': None"):
        write(Samples(items), path)
    assert not path.exists()
    report = write(Samples(items), path, on_error="skip")
    assert [what for what, _ in report.skipped] == ["item 1"]
    assert "field 'mask'" in report.skipped[0][1]
    assert [*LMDBDataset(path).targets] == [0, 2]


@pytest.mark.parametrize(
    ("fields", "options", "words"),
    [
        ({}, {}, "got 0"),
        (["image"], {}, "got list"),
        ({"a": "jpg"}, {}, "kind of the field 'a' must be one of image, jpeg, .* got 'jpg'"),
        ({"": "png"}, {}, "not empty"),
        ({1: "png"}, {}, "got 1"),
        ({"a": "png"}, {"resize": 8}, "resize=8 does not go with fields"),
        ({"a": "png"}, {"encode": "jpeg"}, "encode='jpeg' does not go with fields"),
        ({"a": "png"}, {"quality": 9}, "no field is of the kind jpeg"),
        ({"a": "jpeg", "b": "webp"}, {"quality": 99}, "from 1 to 95"),
    ],
)
def test_arguments_out_of_range_are_named(tmp_path, fields, options, words):
    with pytest.raises((TypeError, ValueError), match=words):
        write(Samples([(1,)]), tmp_path / "none.lmdb", fields, **options)
    assert not [*tmp_path.iterdir()]


def test_quality_is_that_of_jpeg_fields(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    for quality in (5, 95):
        write(Samples([(noise,)]), tmp_path / f"{quality}.lmdb", {"a": "jpeg"}, quality=quality)
        found = LMDBDataset(tmp_path / f"{quality}.lmdb", decode=None)[0][0]
        assert found == encoded(Image.fromarray(noise), "jpeg", quality=quality)


# ---- the dataset ----


def test_the_dataset_gives_samples_by_number_key_and_label(database):
    dataset = LMDBDataset(database)
    assert dataset.fields == FIELDS
    assert [*dataset.targets] == [0, 1, 2]
    assert [*dataset.samples] == [("0", 0), ("1", 1), ("2", 2)]
    assert dataset.find("2") == 2
    for number in range(3):
        found, expected = dataset[number], sample(number)
        assert np.array_equal(found["mask"].numpy(), expected["mask"])
        assert same(found["boxes"], expected["boxes"])
        assert (found["caption"], found["label"]) == (expected["caption"], number)
        assert found["image"].shape == (3, 3, 4)
    key, target, parts = dataset.stored(1)
    assert (key, target, parts["image"], parts["label"]) == ("1", 1, JPEG, b"1")
    assert "5 fields" not in repr(dataset)
    assert "mask png" in repr(dataset)


def test_transform_gets_the_whole_sample_and_batches_are_collated(database):
    def joint(found):
        assert set(found) == set(FIELDS)
        return {"image": found["image"], "mask": found["mask"].int() + 1, "label": found["label"]}

    dataset = LMDBDataset(database, joint, threads=2)
    (batch,) = DataLoader(dataset, batch_size=3, collate_fn=dataset.collate_fn)
    assert batch["image"].shape == (3, 3, 3, 4)
    assert batch["mask"][:, 0, 0].tolist() == [1, 2, 3]
    assert batch["label"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("options", [{"collate": True}, {"target_transform": str}])
def test_options_of_images_with_targets_are_refused_by_name(database, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}.* does not go with .* fields"):
        LMDBDataset(database, **options)


def test_without_a_label_there_are_no_targets(tmp_path):
    write(Samples([("x",)]), tmp_path / "a.lmdb", {"label": "text"})
    dataset = LMDBDataset(tmp_path / "a.lmdb")
    assert [*dataset.samples] == [("0", None)]
    with pytest.raises(AttributeError, match=r"none of its fields \(label text\) is"):
        _ = dataset.targets


def test_the_description_names_fields(database):
    info = info_lmdb(database)
    assert info.fields == FIELDS
    assert "mask: png" in repr(info)
    assert info.settings == {"encode": None, "resize": None, "quality": None}


def test_the_version_goes_up_for_databases_of_fields_alone(database, tmp_path):
    write_lmdb([("key", JPEG, 0)], tmp_path / "plain.lmdb", progress=False)
    versions = [LMDBDataset(p)._metas[0]["version"] for p in (tmp_path / "plain.lmdb", database)]
    assert versions == [schema.VERSION, schema.FIELDS]
    plain = LMDBDataset(tmp_path / "plain.lmdb")
    assert plain.fields is None
    assert plain.stored(0) == ("key", 0, JPEG)


def rewritten(path, to, change):
    """Copy a database with another meta entry, as a later version may write it."""
    to.write_bytes(path.read_bytes())
    with lmdb.open(str(to), subdir=False, lock=False) as env, env.begin(write=True) as txn:
        meta = schema.unpack_meta(txn.get(schema.META), to)
        change(meta)
        txn.put(schema.META, schema.pack_meta(meta))
    return to


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda meta: meta["settings"]["fields"].append(["x", "audio"]), "got 'audio'"),
        (lambda meta: meta["settings"]["fields"].append(["mask", "png"]), "twice"),
        (lambda meta: meta["settings"].pop("fields"), "None"),
        (lambda meta: meta.update(version=1), "version 1"),
        (lambda meta: meta["settings"].update(fields=7), "7"),
    ],
)
def test_fields_that_are_unknown_are_refused(database, tmp_path, change, words):
    path = rewritten(database, tmp_path / "other.lmdb", change)
    for opens in (LMDBDataset, info_lmdb):
        with pytest.raises(DatabaseError, match=f"fields .*{words}"):
            opens(path)


# ---- damage ----


def raw_record(path, number):
    record = LMDBDataset(path).record(number)
    parts = (schema.encode_key(record.key), schema.encode_target(record.target), record.image)
    return schema.pack_record(number, *parts)


def owners(record, fields):
    """Return which field each byte of a record is of; None of key, header and table."""
    found, end = [None] * len(record), len(record)
    _, blobs = fields.unpack(schema.unpack_record(memoryview(record), 1).image)
    for name, blob in reversed([*zip(fields.names, blobs, strict=True)]):
        found[end - len(blob) : end] = [name] * len(blob)
        end -= len(blob)
    found[record.index(b"1F\x00")] = "label"  # a target of one byte, before the table
    return found


def test_a_flip_of_any_byte_is_found_and_its_field_named(database):
    record, fields = raw_record(database, 1), Fields.given(FIELDS)
    for at, owner in enumerate(owners(record, fields)):
        damaged = bytearray(record)
        damaged[at] ^= 1 << at % 8
        view = memoryview(bytes(damaged))
        with pytest.raises(DatabaseError, match="record 1 is damaged"):
            schema.unpack_record(view, 1)
        said = fields.damage(view)
        assert said == f"the field {owner!r}" if owner else said, at


def test_reading_and_verifying_name_the_damaged_field(database, tmp_path):
    path = tmp_path / "damaged.lmdb"
    path.write_bytes(database.read_bytes().replace(b"number 2", b"Number 2"))
    with pytest.raises(DatabaseError, match=r"record 2 is damaged.* the field 'caption'"):
        LMDBDataset(path)[2]
    assert LMDBDataset(path)[1]["label"] == 1
    assert LMDBDataset(path, checksum=False)[2]["caption"] == "Number 2"
    problems = [value for kind, value in verifying._check(path) if kind == "problem"]
    assert len(problems) == 1
    assert "record 2 is damaged" in problems[0]
    assert problems[0].endswith("the field 'caption'")


def test_verifying_looks_at_each_field_as_well(database, tmp_path):
    path = tmp_path / "other.lmdb"
    path.write_bytes(database.read_bytes())
    record = LMDBDataset(database).record(1)
    image = bytes(record.image).replace(b"number 1", b"number 9")
    whole = schema.pack_record(1, b"1", b"1", image)  # as a writer with a fault would make it
    with lmdb.open(str(path), subdir=False, lock=False, max_dbs=3) as env:
        records = env.open_db(schema.RECORDS)
        with env.begin(write=True) as txn:
            txn.put(schema.position_key(1), whole, db=records)
    problems = [value for kind, value in verifying._check(path) if kind == "problem"]
    assert problems == ["record 1 is damaged; what differs is the field 'caption'"]


def test_without_a_checksum_damage_is_read_or_named_and_never_crashes(database):
    record, fields = raw_record(database, 2), Fields.given(FIELDS)
    rng = np.random.default_rng(0)
    for at in rng.choice(len(record), 150, replace=False):
        damaged = bytearray(record)
        damaged[at] ^= 0x41
        try:
            found = schema.unpack_record(memoryview(bytes(damaged)), 2, check=False)
            SampleReader(fields, "pil", False).sample(found, "path", 2)
        except DatabaseError:
            pass


# ---- sources ----


def test_an_iterable_gives_keys_and_samples(database, tmp_path):
    write(((str(n), sample(n)) for n in range(3)), tmp_path / "a.lmdb")
    assert stored(tmp_path / "a.lmdb") == stored(database)
    with pytest.raises(SourceError, match=r"must be \(key, sample\).*got dict: number samples"):
        write([sample(0)], tmp_path / "b.lmdb")
    with pytest.raises(SourceError, match="item 0, key 'k': field 'mask' is missing"):
        write([("k", {"image": JPEG})], tmp_path / "b.lmdb")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("folder")
    for name in "ab":
        (root / name).mkdir()
        for number in range(2):
            image_of("RGB", number).save(root / name / f"{number}.jpg")
    return root


def test_a_folder_gives_its_bytes_classes_and_keys(folder, tmp_path):
    fields = {"picture": "jpeg", "label": "json"}
    images = ImageFolder(folder)
    write_lmdb(images, tmp_path / "plain.lmdb", progress=False)
    plain = LMDBDataset(tmp_path / "plain.lmdb")
    expected = [plain.stored(number) for number in range(4)]
    for source in (str(folder), images, Subset(images, range(4)), plain):
        write(source, tmp_path / "a.lmdb", fields)
        found = LMDBDataset(tmp_path / "a.lmdb", decode=None)
        assert (found.classes, [*found.targets]) == (["a", "b"], [0, 0, 1, 1])
        assert [(k, t, found[n][0]) for n, (k, t) in enumerate(found.samples)] == expected
    with pytest.raises(SourceError, match=r"gives \(image, class\), the fields are mask"):
        write(str(folder), tmp_path / "b.lmdb", {"mask": "png"})


def test_wrapped_databases_arrive_losslessly_with_their_fields(database, tmp_path):
    dataset = LMDBDataset(database)
    other = Samples([sample(7)])
    source = ConcatDataset([Subset(dataset, [2, 0]), dataset, other])
    write_lmdb(source, tmp_path / "a.lmdb", progress=False)
    found = stored(tmp_path / "a.lmdb")
    before = stored(database)
    assert [parts for _, _, parts in found[:5]] == [before[n][2] for n in (2, 0, 0, 1, 2)]
    assert [key for key, _, _ in found[:3]] == ["2", "0", "0#2"]
    assert found[5][1:] == (7, LMDBDataset(tmp_path / "a.lmdb").stored(5)[2])
    assert LMDBDataset(tmp_path / "a.lmdb").fields == FIELDS
    with pytest.raises(SourceError, match=r"fields image jpeg, .* expected were image png"):
        write(dataset, tmp_path / "b.lmdb", FIELDS | {"image": "png"})
    with pytest.raises(ValueError, match="resize=4 does not go with fields"):
        write_lmdb(dataset, tmp_path / "b.lmdb", resize=4, progress=False)


def test_two_shards_are_the_whole_and_share_their_fields(tmp_path):
    items = Samples(map(sample, range(5)))
    write(items, tmp_path / "whole.lmdb")
    for rank in range(2):
        write(items, tmp_path / "shards", shard=(rank, 2))
    assert stored(tmp_path / "shards") == stored(tmp_path / "whole.lmdb")
    assert info_lmdb(tmp_path / "shards").fields == FIELDS
    write(items, tmp_path / "shards", FIELDS | {"image": "image"}, shard=(1, 2))
    with pytest.raises(DatabaseError, match="differ in their settings"):
        LMDBDataset(tmp_path / "shards")


def interrupted(source, path, monkeypatch, fields=FIELDS):
    """Stop a conversion at its first commit, which holds 16 samples."""
    commit = converting.Conversion._commit

    def stops(self, batch):
        commit(self, batch)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(converting, "_COMMIT_BYTES", 1)
        patch.setattr(converting.Conversion, "_commit", stops)
        with pytest.raises(KeyboardInterrupt):
            write(source, path, fields)


def numbered(items):
    return ((str(number), item) for number, item in enumerate(items))


@pytest.mark.parametrize("kind", [Samples, numbered])
def test_an_interrupted_conversion_goes_on(tmp_path, monkeypatch, kind):
    items = [sample(number % 4) for number in range(20)]
    path = tmp_path / "a.lmdb"
    interrupted(kind(items), path, monkeypatch)
    assert not path.exists()
    assert write(kind(items), path, resume=True).resumed_from == 16
    write(kind(items), tmp_path / "b.lmdb")
    assert stored(path) == stored(tmp_path / "b.lmdb")


def test_other_samples_or_fields_start_afresh_and_say_so(tmp_path, monkeypatch):
    items = [sample(number % 4) for number in range(20)]
    changed = [sample(number % 4, changed="!") for number in range(20)]
    path = tmp_path / "a.lmdb"
    for kind, source, fields, words in (
        (Samples, changed, FIELDS, "gives other images"),
        (list, [*numbered(changed)], FIELDS, "source has changed"),
        (list, [*numbered(items)], FIELDS | {"image": "image"}, "settings were"),
    ):
        interrupted(kind(items if kind is Samples else numbered(items)), path, monkeypatch)
        with pytest.warns(UserWarning, match=words):
            assert write(kind(source), path, fields, resume=True).resumed_from == 0


def test_changed_dataclasses_of_an_iterable_start_afresh(tmp_path, monkeypatch):
    items = [Scene(**sample(number % 4)) for number in range(20)]
    changed = [dataclasses.replace(item, caption="!") for item in items]
    path = tmp_path / "a.lmdb"
    interrupted([*numbered(items)], path, monkeypatch)
    assert write([*numbered(items)], path, resume=True).resumed_from == 16
    interrupted([*numbered(items)], path, monkeypatch)
    with pytest.warns(UserWarning, match="source has changed"):
        write([*numbered(changed)], path, resume=True)


def test_files_that_were_only_touched_are_taken_as_they_were(tmp_path, monkeypatch):
    (tmp_path / "folder" / "a").mkdir(parents=True)
    for number in range(20):
        (tmp_path / "folder" / "a" / f"{number}.jpg").write_bytes(JPEG)
    fields, path = {"image": "png", "label": "json"}, tmp_path / "a.lmdb"
    interrupted(tmp_path / "folder", path, monkeypatch, fields)
    os.utime(tmp_path / "folder" / "a" / "0.jpg", (1, 1))
    assert write(tmp_path / "folder", path, fields, resume=True).resumed_from == 16


# ---- DALI ----


@pytest.mark.skipif(not has_dali(), reason="DALI (extra dali) is for Linux only")
def test_dali_takes_one_image_and_one_label(database, tmp_path):
    write_lmdb([(str(n), JPEG, n) for n in range(3)], tmp_path / "plain.lmdb", progress=False)
    options = {"size": 2, "batch_size": 3, "train": False, "device": "cpu", "threads": 1}
    found = image_pipeline(LMDBDataset(database), fields=("image", "label"), **options)
    plain = image_pipeline(LMDBDataset(tmp_path / "plain.lmdb"), **options)
    ((images, targets),), ((expected, labels),) = DALILoader(found), DALILoader(plain)
    assert torch.equal(images, expected)
    assert torch.equal(targets, labels)


@pytest.mark.skipif(not has_dali(), reason="DALI (extra dali) is for Linux only")
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (None, "DALI takes one image and one label, so name them"),
        (("image", "mask", "label"), "DALI takes no more"),
        ("image", "names of one image and one label"),
        (("boxes", "label"), "'boxes' is of the kind numpy"),
        (("nothing", "label"), "'nothing' does not exist"),
        (("image", "caption"), "'caption' is of the kind text"),
    ],
)
def test_dali_refuses_other_fields_by_name(database, fields, words):
    with pytest.raises(ValueError, match=words):
        image_pipeline(
            LMDBDataset(database), fields=fields, size=2, batch_size=3, train=False, device="cpu"
        )


class Masked:
    """An image, and a mask whose values are the class."""

    def __init__(self, classes):
        self.classes = classes

    def __len__(self):
        return 4

    def __getitem__(self, index):
        image = np.full((8, 8, 3), index, np.uint8)
        return {"image": image, "mask": np.full((8, 8), index % 2, np.uint8), "label": index % 2}


MASKED = {"image": "png", "mask": "png", "label": "json"}


def test_classes_of_fields_are_not_renumbered_since_masks_hold_them_too(tmp_path):
    for name, classes in (("a", ["cat", "dog"]), ("b", ["cow", "dog"])):
        write_lmdb(Masked(classes), tmp_path / name, fields=MASKED, progress=False)
    before = (tmp_path / "a").read_bytes()
    with pytest.raises(SourceError, match="masks, boxes and json fields may hold the old ones"):
        write_lmdb([tmp_path / "a", tmp_path / "b"], tmp_path / "m", progress=False)
    with pytest.raises(SourceError, match="masks, boxes and json fields may hold the old ones"):
        write_lmdb(tmp_path / "b", tmp_path / "a", append=True, progress=False)
    assert (tmp_path / "a").read_bytes() == before


def test_paths_are_sources_of_fields_as_datasets_are(tmp_path):
    images = [(f"key {n}", Image.new("L", (8, 8), n), n) for n in range(4)]
    write_lmdb(images, tmp_path / "plain", progress=False)
    two = {"image": "image", "label": "json"}
    for number, source in enumerate((tmp_path / "plain", [tmp_path / "plain"])):
        write_lmdb(source, tmp_path / f"{number}", fields=two, progress=False)
        assert LMDBDataset(tmp_path / f"{number}").targets == [0, 1, 2, 3]
    write_lmdb(tmp_path / "0", tmp_path / "again", fields=two, progress=False)  # its own
    assert LMDBDataset(tmp_path / "again").targets == [0, 1, 2, 3]
    with pytest.raises(SourceError, match="leave out fields= to keep them"):
        write_lmdb(tmp_path / "0", tmp_path / "x", fields=MASKED, progress=False)
    with pytest.raises(ValueError, match="resize=4 does not go with fields"):
        write_lmdb(tmp_path / "0", tmp_path / "x", resize=4, progress=False)
    folder = tmp_path / "photos"
    for name in "ab":
        (folder / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(folder / name / "1.png")
    write_listing(folder, tmp_path / "photos.listing", progress=False)
    options = {"fields": two, "shards": 2, "progress": False}
    write_lmdb(tmp_path / "photos.listing", tmp_path / "shards", **options)
    assert LMDBDataset(tmp_path / "shards").targets == [0, 1]


def test_what_is_appended_to_fields_is_stored_as_they_are(tmp_path):
    fields = {"image": "jpeg", "label": "json"}
    keyed = [(f"key {n}", {"image": noise(n), "label": n}) for n in range(4)]
    write_lmdb(keyed[:2], tmp_path / "a", fields=fields, quality=30, progress=False)
    options = {"append": True, "progress": False}
    with pytest.raises(ValueError, match="give quality=30"):
        write_lmdb(keyed[2:], tmp_path / "a", fields=fields, **options)
    with pytest.raises(ValueError, match=r"\(key, sample\)"):
        write_lmdb([("x", b"", 1)], tmp_path / "a", quality=30, **options)
    write_lmdb(keyed[2:3], tmp_path / "a", fields=fields, quality=30, **options)
    write_lmdb(keyed[3:], tmp_path / "a", quality=30, **options)  # with the fields that it has
    assert LMDBDataset(tmp_path / "a").targets == [0, 1, 2, 3]


def noise(seed):
    return np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)


def test_one_element_of_a_column_and_zeros_at_the_end_of_a_text():
    column = torch.tensor([[0.0, 0, 3, 4]])[:, 3]  # of an image with one box
    assert torch.equal(unpack_array(pack_array(column)), column)
    with pytest.raises(ValueError, match="use the kind bytes or text"):
        pack_array(np.bytes_(b"a\0"))


def test_boxes_that_know_their_canvas_are_refused():
    from torchvision.tv_tensors import BoundingBoxes

    boxes = BoundingBoxes(torch.tensor([[1.0, 2, 3, 4]]), format="XYWH", canvas_size=(24, 32))
    with pytest.raises(ValueError, match=r"holds more than its values.*as_subclass"):
        pack_array(boxes)


def test_jpeg_and_webp_are_rgb_for_every_decoder(tmp_path):
    grey, clear = io.BytesIO(), io.BytesIO()
    Image.new("L", (8, 8), 99).save(grey, "JPEG")
    Image.new("RGBA", (8, 8), (1, 2, 3, 4)).save(clear, "WEBP")
    sample = {"a": grey.getvalue(), "b": clear.getvalue()}
    write_lmdb([("k", sample)], tmp_path / "d", fields={"a": "jpeg", "b": "webp"}, progress=False)
    assert [v.shape for v in LMDBDataset(tmp_path / "d")[0].values()] == [(3, 8, 8)] * 2
    assert [v.mode for v in LMDBDataset(tmp_path / "d", decode="pil")[0].values()] == ["RGB"] * 2
