"""Keys and targets of a database as sequences over arrays in its file."""

import collections
import contextlib
import gc
import io
import itertools
import mmap
import multiprocessing
import os
import pickle
import random
import re

import lmdb
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.model_selection import StratifiedShuffleSplit, train_test_split
from torch.utils.data import ConcatDataset, Subset, WeightedRandomSampler
from torchvision.datasets import ImageFolder

from dlhelpers.dali_io.sources import open_source
from dlhelpers.lmdb_io import (
    DatabaseError,
    LMDBDataset,
    column_writer,
    columns,
    converting,
    environments,
    finishing,
    listed,
    loading,
    mapping,
    schema,
    verify_lmdb,
    verifying,
    write_lmdb,
)


def png():
    data = io.BytesIO()
    Image.new("L", (8, 8)).save(data, "PNG")
    return data.getvalue()


PNG = png()
SEEDS = random.Random(0)


def write(pairs, path, **options):
    items = [(key, PNG, target) for key, target in pairs]
    return write_lmdb(items, path, **{"progress": False} | options)


def opened(path, **options):
    return LMDBDataset(path, decode=None, **options)


def changed(path, change, entry=schema.META):
    """Change a database by a function of (transaction, columns, index, meta entry)."""
    with (
        lmdb.open(str(path), subdir=False, max_dbs=5, lock=False, map_size=1 << 24) as env,
        env.begin(write=True) as txn,
    ):
        meta = schema.unpack_meta(txn.get(entry), path)
        databases = [env.open_db(name, txn) for name in (schema.COLUMNS, schema.INDEX)]
        change(txn, *databases, meta)
        txn.put(entry, schema.pack_meta(meta))


def as_earlier(path):
    """Take the columns from a file, which earlier versions did not write."""
    changed(path, lambda txn, database, _, meta: (txn.drop(database), meta.pop("columns", None)))


def damage_of(path):
    """What verify_lmdb's child says, without the child."""
    return [value for kind, value in verifying._check(path) if kind == "problem"]


@pytest.fixture
def small(monkeypatch):
    """Blocks of three records, arrays of seven, and maps of the smallest values."""
    monkeypatch.setattr(column_writer, "_BLOCK_RECORDS", 3)
    monkeypatch.setattr(column_writer, "_ARRAY_RECORDS", 7)
    monkeypatch.setattr(column_writer, "_BLOCK_BYTES", 600)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """2,000 records of 10 classes, in one file and in three."""
    root = tmp_path_factory.mktemp("many")
    pairs = [(f"{i % 10}/{i:05d}.png", i % 10) for i in range(2000)]
    write(pairs, root / "one")
    for rank in range(3):
        write(pairs, root / "parts", shard=(rank, 3))
    return root, pairs


# ---- what a list would hold ----

INTEGERS = st.one_of(
    st.integers(0, 9), st.integers(-(2**31), 2**31 - 1), st.integers(-(2**63), 2**63 - 1)
)
OTHERS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=3,
)
KEYS = st.binary(min_size=1, max_size=40).map(lambda data: data.decode("utf-8", "surrogateescape"))
LONG_KEYS = st.integers(440, 520).map("k".__mul__)


@pytest.mark.parametrize("targets", [st.integers(0, 9), INTEGERS, OTHERS, INTEGERS | OTHERS])
@pytest.mark.usefixtures("small")
def test_any_mix_of_keys_and_targets_reads_as_the_lists_that_were_written(tmp_path, targets):
    number = itertools.count()

    @settings(max_examples=8, deadline=None)
    @given(
        st.lists(
            st.tuples(KEYS | LONG_KEYS, targets), min_size=1, max_size=20, unique_by=lambda p: p[0]
        ),
        st.integers(1, 3),
        st.tuples(*[st.none() | st.integers(-25, 25)] * 2, st.sampled_from([None, -3, -1, 2, 4])),
    )
    def reads_as_written(pairs, world, bounds):
        path = tmp_path / f"{next(number)}"
        for rank in range(world):
            write(pairs, path, **({"shard": (rank, world)} if world > 1 else {}))
        files = [path] if world == 1 else sorted(path.iterdir())
        assert not any(damage_of(file) for file in files)
        for earlier in ([], files[:-1], files[-1:]):  # none, all but one, all
            for file in earlier:
                as_earlier(file)
            dataset = opened(path)
            assert dataset.samples == pairs
            assert [*dataset.targets] == [target for _, target in pairs]
            assert [type(t) for t in dataset.targets] == [type(t) for _, t in pairs]
            assert dataset.samples[slice(*bounds)] == pairs[slice(*bounds)]
            assert dataset.targets[slice(*bounds)] == [t for _, t in pairs][slice(*bounds)]
            assert [dataset.samples[i] for i in range(-len(pairs), len(pairs))] == pairs * 2
            assert [dataset.find(key) for key, _ in pairs] == [*range(len(pairs))]
            del dataset

    reads_as_written()


@pytest.mark.parametrize("kind", ["one", "parts"])
def test_the_sequences_behave_as_lists_do(many, kind):
    root, pairs = many
    dataset, expected = opened(root / kind), [target for _, target in pairs]
    targets, samples = dataset.targets, dataset.samples
    assert (len(targets), len(samples)) == (2000, 2000)
    assert targets == expected
    assert expected == targets
    assert targets != expected[:-1]
    assert targets != [*expected[:-1], 77]
    assert targets != tuple(expected)
    assert targets == opened(root / "one").targets
    assert (samples == pairs, pairs == samples, samples == pairs[::-1]) == (True, True, False)
    assert (targets[-1], targets[np.int64(7)], samples[-2000]) == (9, 7, pairs[0])
    assert {type(target) for target in targets} == {type(targets[3])} == {int}
    assert (targets.count(3), targets.index(4), 11 in targets) == (200, 4, False)
    assert collections.Counter(targets) == collections.Counter(expected)
    assert targets[5:9] + expected[:2] == expected[5:9] + expected[:2]
    assert expected[:2] + targets[5:9] == expected[:2] + expected[5:9]
    assert targets[:2] + targets[5:9] == expected[:2] + expected[5:9]
    assert [*reversed(targets[:30])] == expected[:30][::-1]
    assert repr(targets[:3]) == "[0, 1, 2]"
    assert repr(targets) == "[0, 1, 2, 3, 4, 5, 6, 7, 8, ..., 9]"
    for sequence in (targets, samples):
        for index in (2000, -2001):
            with pytest.raises(IndexError, match="out of range, there are 2000 items"):
                sequence[index]
        with pytest.raises(TypeError):
            sequence[0] = 1
        with pytest.raises(TypeError):
            sequence["0"]
        with pytest.raises(TypeError, match="unhashable"):
            hash(sequence)


def test_they_are_those_of_image_folder(tmp_path):
    for number in range(9):
        (tmp_path / "source" / f"c{number % 3}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / f"c{number % 3}" / f"{number}.png").write_bytes(PNG)
    folder = ImageFolder(tmp_path / "source")
    write_lmdb(folder, tmp_path / "db", progress=False)
    assert opened(tmp_path / "db").targets == folder.targets


@pytest.mark.parametrize("kind", ["one", "parts"])
def test_what_people_do_with_targets_works(many, kind):
    root, pairs = many
    targets, expected = opened(root / kind).targets, np.array([target for _, target in pairs])
    counts = np.bincount(targets)
    assert counts.tolist() == [200] * 10
    for tensor in (torch.as_tensor(targets[:50]), torch.tensor(targets[:50])):
        assert tensor.dtype == torch.int64
        assert tensor.tolist() == expected[:50].tolist()
    weights = 1 / torch.tensor(counts)
    assert torch.equal(weights[torch.tensor(np.array(targets))], weights[expected])
    assert np.array_equal((1 / counts)[targets], (1 / counts)[expected])
    assert len([*WeightedRandomSampler((1 / counts)[targets], 5)]) == 5
    split = StratifiedShuffleSplit(1, test_size=100, random_state=0)
    assert all(map(np.array_equal, *map(next, [split.split(t, t) for t in (targets, expected)])))
    halves, wanted = (
        train_test_split([*range(2000)], stratify=t, random_state=0) for t in (targets, expected)
    )
    assert halves == wanted
    assert (np.asarray(targets) == 3).sum() == 200
    assert np.asarray(targets, np.float32).dtype == np.float32
    assert np.array_equal(np.asarray(targets[::-2]), expected[::-2])


def is_mapped(array):
    while isinstance(array, np.ndarray):
        array = array.base
    return isinstance(getattr(array, "obj", None), mmap.mmap)


def test_the_array_is_a_part_of_the_file_that_outlives_the_dataset(many, monkeypatch):
    monkeypatch.setattr(mapping, "_WORTH_IT", 1 << 12)
    root, pairs = many
    dataset = opened(root / "one")
    array = np.asarray(dataset.targets)
    assert is_mapped(array)
    assert is_mapped(open_source(dataset).targets)
    assert np.shares_memory(array, np.asarray(dataset.targets[100:]))
    assert array.flags.aligned
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1
    copy = np.array(dataset.targets)
    copy[0] = 5
    assert dataset.targets[0] == 0
    del dataset
    gc.collect()
    assert array.tolist() == [target for _, target in pairs]


def test_only_a_small_array_or_a_foreign_page_is_copied(many, monkeypatch, tmp_path):
    root, pairs = many
    assert not is_mapped(np.asarray(opened(root / "one").targets))  # 8 kB
    monkeypatch.setattr(mapping, "_WORTH_IT", 1 << 12)
    monkeypatch.setattr(
        listed, "mapped", lambda view, path, size: mapping.mapped(view, path, size // 2)
    )
    targets = opened(root / "one").targets
    assert not is_mapped(np.asarray(targets))
    assert targets == [target for _, target in pairs]


@pytest.mark.parametrize(
    ("targets", "dtype"),
    [
        ([0, 255], np.int32),
        ([-(2**31), 2**31 - 1], np.int32),
        ([2**31], np.int64),
        ([-(2**63), 2**63 - 1], np.int64),
        ([2**63], np.uint64),
        ([1.5, 2], np.float64),
        ([True, False], np.bool_),
        (["a", "b"], np.dtype("<U1")),
        ([[1, 2], [3, 4]], np.int64),
    ],
)
def test_arrays_have_a_type_that_torch_takes_as_an_index(tmp_path, targets, dtype):
    write([(str(n), target) for n, target in enumerate(targets)], tmp_path / "db")
    for _ in range(2):
        found = opened(tmp_path / "db").targets
        assert np.asarray(found).dtype == dtype
        assert found == targets
        assert np.asarray(found).tolist() == targets
        del found
        as_earlier(tmp_path / "db")


# ---- other processes ----


def send_all(dataset, connection):
    connection.send(([*dataset.targets], dataset.samples[-1], np.asarray(dataset.targets).sum()))


@pytest.mark.parametrize("kind", ["one", "parts"])
def test_pickled_and_forked_sequences_read_for_themselves(many, kind, monkeypatch):
    monkeypatch.setattr(mapping, "_WORTH_IT", 1 << 12)
    root, pairs = many
    dataset = opened(root / kind)
    expected = [target for _, target in pairs]
    assert (dataset.targets, dataset.samples) == (expected, pairs)  # all is open
    for thing in (dataset.targets[3:], dataset.samples[3:], dataset):
        assert len(pickle.dumps(thing)) < 6000
    again = pickle.loads(pickle.dumps(dataset))
    assert (again.targets, again.samples) == (expected, pairs)
    assert pickle.loads(pickle.dumps(dataset.samples[3:])) == pairs[3:]
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=send_all, args=(dataset, theirs))
    child.start()
    assert ours.recv() == (expected, pairs[-1], sum(expected))
    child.join()
    assert child.exitcode == 0


def test_datasets_around_it_keep_keys_and_targets(many, tmp_path):
    root, pairs = many
    dataset = opened(root / "parts")
    half = ConcatDataset([Subset(dataset, range(0, 100, 2)), Subset(dataset, [1999, 5])])
    write_lmdb(half, tmp_path / "db", progress=False)
    assert opened(tmp_path / "db").samples == [*pairs[:100:2], pairs[1999], pairs[5]]


# ---- damage ----


def stored_at(path):
    """Offsets of each byte of the columns, in pages that LMDB has put aside too."""
    data, found = path.read_bytes(), []
    environment = environments.open_environment(path)
    for _, value in environment.items(environment.columns):
        places = [match.start() for match in re.finditer(re.escape(value), data)]
        found += [[place + n for place in places] for n in range(len(value))]
    return found


@pytest.mark.parametrize("integers", [True, False])
@pytest.mark.usefixtures("small")
def test_a_flip_in_the_columns_is_found_and_never_read(tmp_path, integers):
    pairs = [(f"key {n}", n if integers else {"n": [n]}) for n in range(10)]
    write(pairs, tmp_path / "db")
    whole, places = (tmp_path / "db").read_bytes(), stored_at(tmp_path / "db")
    for place in SEEDS.sample(places, 40):
        damaged = bytearray(whole)
        bit = 1 << SEEDS.randrange(8)
        for offset in place:
            damaged[offset] ^= bit
        (tmp_path / "damaged").write_bytes(damaged)
        assert any("from record" in problem for problem in damage_of(tmp_path / "damaged"))
        dataset = opened(tmp_path / "damaged")
        assert [dataset[i][1] for i in range(10)] == [target for _, target in pairs]
        for sequence, expected in (
            (dataset.targets, [target for _, target in pairs]),
            (dataset.samples, pairs),
        ):
            with contextlib.suppress(DatabaseError):
                assert sequence == expected
        del dataset, sequence
    with pytest.raises(DatabaseError, match=r"from record .* damaged"):
        verify_lmdb(tmp_path / "damaged", progress=False)


def drop_columns(txn, database, index, meta):
    txn.drop(database)


def drop_a_block(txn, database, index, meta):
    txn.delete(schema.position_key(3), db=database)


def drop_the_array(txn, database, index, meta):
    txn.delete(columns.targets_key(0), db=database)


def tell_another_target(txn, database, index, meta):
    block = columns.pack_block(3, [b"key 3", b"key 4", b"key 5"], [b"3", b"9", b"5"])
    txn.put(schema.position_key(3), block, db=database)


def tell_another_key(txn, database, index, meta):
    block = columns.pack_block(3, [b"key 3", b"key 7", b"key 5"], [b"3", b"4", b"5"])
    txn.put(schema.position_key(3), block, db=database)


def tell_other_targets(txn, database, index, meta):
    array = columns.pack_targets(0, [np.array([0, 1, 2, 3, 9, 5, 6, 7, 8], np.int32)], 4)
    txn.put(columns.targets_key(0), array, db=database)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (drop_columns, "columns of keys and targets are missing"),
        (drop_a_block, "block of keys and targets from record 3 on is damaged or missing"),
        (drop_the_array, "array of targets from record 0 on is missing"),
        (tell_another_target, "record 4: its key or target is another in the columns"),
        (tell_another_key, "record 4: its key or target is another in the columns"),
        (tell_other_targets, "array of targets is wrong from record 3 to 5"),
    ],
)
@pytest.mark.usefixtures("small")
def test_verify_compares_columns_with_the_index(tmp_path, change, problem):
    write([(f"key {n}", n) for n in range(10)], tmp_path / "db")
    assert not damage_of(tmp_path / "db")
    changed(tmp_path / "db", change)
    assert any(problem in found for found in damage_of(tmp_path / "db"))
    if change in (drop_columns, drop_a_block, drop_the_array):
        dataset = opened(tmp_path / "db")
        broken = dataset.targets if change is drop_the_array else dataset.samples
        with pytest.raises(DatabaseError, match=r"missing.*new conversion"):
            broken[5]


# ---- conversions that stop and go on ----


class StopHere(Exception):  # noqa: N818
    pass


def stop(*_args, **_options):
    raise StopHere


def stops_at(calls, function):
    numbers = itertools.count(1)
    return lambda *args: stop() if next(numbers) == calls else function(*args)


def look_here(path):
    """What peek_state's child says, without the child."""
    events = dict(verifying._peek(path, schema.STATE))
    return events.get("problem") or events["meta"]


STEPS = [
    *[(converting.Conversion, "_commit", calls) for calls in (2, 4, 6)],
    *[(column_writer.ColumnWriter, "put", calls) for calls in (1, 3, 7)],
    *[(column_writer, "pack_targets", calls) for calls in (1, 2, 3)],
    (finishing, "_publish", 1),
    (os, "replace", 1),
]


@pytest.mark.parametrize(("owner", "name", "calls"), STEPS)
@pytest.mark.filterwarnings("ignore:.*stopped before its first images")
@pytest.mark.usefixtures("small")
def test_a_stop_at_any_step_leaves_what_is_resumed(tmp_path, monkeypatch, owner, name, calls):
    monkeypatch.setattr(converting, "_COMMIT_BYTES", 4 * len(PNG))
    monkeypatch.setattr(verifying, "peek_state", look_here)
    monkeypatch.setattr(loading, "_CHUNK", 4)
    pairs = [(f"key {n}", n * 2**29) for n in range(20)]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stops_at(calls, getattr(owner, name)))
        with pytest.raises(StopHere):
            write(pairs, tmp_path / "db")
    assert not (tmp_path / "db").exists()
    if (name, calls) == ("_commit", 6):  # an earlier version, without columns, went on with it
        changed(tmp_path / ".db.part", drop_a_block, schema.STATE)
    kept = write([*pairs, ("one more", 7)], tmp_path / "db", resume=True).resumed_from
    assert kept % 4 == 0
    assert kept or calls < 4
    assert opened(tmp_path / "db").samples == [*pairs, ("one more", 7)]
    assert opened(tmp_path / "db").targets == [*[target for _, target in pairs], 7]
    assert not damage_of(tmp_path / "db")


def test_a_map_that_is_full_loses_no_key(tmp_path, monkeypatch):
    monkeypatch.setattr(column_writer, "_BLOCK_RECORDS", 50)
    monkeypatch.setattr(converting.Conversion, "make_room", lambda self, need: None)
    pairs = [(f"{'long' * 100} {n}", {"text": "x" * 500, "n": n}) for n in range(400)]
    write(pairs, tmp_path / "db", map_size=1)
    assert opened(tmp_path / "db").samples == pairs


def test_what_an_earlier_version_added_is_not_taken_from_old_columns(tmp_path):
    write([("a", 1), ("b", 2)], tmp_path / "db")
    changed(tmp_path / "db", lambda txn, database, _, meta: meta.pop("columns"))
    changed(tmp_path / "db", tell_other_targets)
    assert opened(tmp_path / "db").targets == [1, 2]
    assert not damage_of(tmp_path / "db")


def test_an_index_of_an_earlier_version_that_misses_a_record_is_named(tmp_path):
    write([("a", 1), ("b", 2), ("c", 3)], tmp_path / "db")
    as_earlier(tmp_path / "db")
    changed(tmp_path / "db", lambda txn, _, index, meta: txn.delete(b"b", db=index))
    for name in ("targets", "samples"):
        with pytest.raises(DatabaseError, match="index misses record 1"):
            list(getattr(opened(tmp_path / "db"), name))


def test_one_sample_of_a_damaged_block_is_refused(tmp_path):
    file = tmp_path / "a.lmdb"
    png = io.BytesIO()
    Image.new("L", (2, 2)).save(png, "PNG")
    write_lmdb([(f"k{i}", png.getvalue(), i) for i in range(6)], file, progress=False)
    content = file.read_bytes()
    assert b"k0k1k2k3k4k5" in content
    file.write_bytes(content.replace(b"k0k1k2k3k4k5", b"k9k1k2k3k4k5"))
    with pytest.raises(DatabaseError, match="checksum"):
        LMDBDataset(file).samples[0]
