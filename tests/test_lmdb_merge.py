"""Databases are merged, resharded and appended to: every record as it was, whole or not at all."""

import io
import json
import os
import re
import shutil
import signal

import lmdb
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import Subset, TensorDataset
from torchvision.datasets import ImageFolder

from dlhelpers.__main__ import main
from dlhelpers.lmdb_io import (
    DatabaseError,
    LMDBDataset,
    SourceError,
    appending,
    converting,
    encoding,
    environments,
    info_lmdb,
    merging,
    resuming,
    schema,
    verify_lmdb,
    write_lmdb,
    writing,
)
from dlhelpers.lmdb_io.encoding import Encoding
from dlhelpers.lmdb_io.renumbering import match_classes


def write(source, path, **options):
    return write_lmdb(source, path, **{"progress": False} | options)


def bitmap(number):
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), number % 256, np.uint8)).save(buffer, "bmp")
    return buffer.getvalue()


def folder(root, classes, numbers):
    for number in numbers:
        path = root / classes[number % len(classes)] / f"{number:03d}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bitmap(number))
    return root


def triples(numbers, target=lambda number: number % 3):
    return [(f"k{number:03d}", bitmap(number), target(number)) for number in numbers]


def stored(path):
    dataset = LMDBDataset(path, decode=None)
    return [dataset.stored(index) for index in range(len(dataset))]


def named(path):
    """(key, class name, bytes), which no merge may change."""
    classes = LMDBDataset(path).classes
    return [(key, classes[target], image) for key, target, image in stored(path)]


def rewrite_meta(path, change):
    """Change the meta entry of a file, as an earlier or a later version may have written it."""
    environment = lmdb.open(str(path), subdir=False, lock=False)
    with environment, environment.begin(write=True) as txn:
        meta = json.loads(bytes(txn.get(schema.META)).partition(b" ")[2])
        change(meta)
        txn.put(schema.META, schema.pack_meta(meta))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Databases to be read only: cats and dogs; ants and dogs in shards; triples without names."""
    root = tmp_path_factory.mktemp("made")
    write(folder(root / "photos_a", ["cat", "dog"], range(10)), root / "a.lmdb")
    write(folder(root / "photos_b", ["ant", "dog"], range(100, 112)), root / "b", shards=3)
    write(triples(range(7)), root / "plain.lmdb")
    return root


# ---- merging and resharding ----


@pytest.mark.parametrize("shards", [None, 1, 5])
def test_merged_records_are_those_of_the_parts(shards, made, tmp_path):
    report = write([made / "a.lmdb", made / "b"], tmp_path / "m", shards=shards)
    assert named(tmp_path / "m") == named(made / "a.lmdb") + named(made / "b")
    assert LMDBDataset(tmp_path / "m").classes == ["cat", "dog", "ant"]
    assert report.count == 22
    assert "b: 1 class has a new number, matched by name: ant 0 -> 2" in str(report)


def test_what_was_merged_is_as_it_was_written(made, tmp_path):
    write([made / "a.lmdb", made / "b"], tmp_path / "m", shards=2)
    assert verify_lmdb(tmp_path / "m").count == 22


@pytest.mark.parametrize("shards", [2, 15])
def test_resharding_changes_nothing_but_the_files(shards, made, tmp_path):
    report = write(made / "b", tmp_path / "out", shards=shards)
    assert stored(tmp_path / "out") == stored(made / "b")
    assert LMDBDataset(tmp_path / "out").classes == LMDBDataset(made / "b").classes
    assert "number" not in str(report)
    assert len(list((tmp_path / "out").glob("shard-*"))) == shards


TARGETS = st.one_of(
    st.integers(-(2**70), 2**70), st.none(), st.booleans(), st.floats(), st.text(max_size=3)
)
KEYS = st.one_of(st.text(min_size=1, max_size=4), st.text("ab", min_size=505, max_size=520)).filter(
    lambda text: text.isprintable()
)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(KEYS, TARGETS), min_size=2, max_size=6, unique_by=lambda x: x[0]))
def test_any_key_and_target_survives(tmp_path, items):
    items = [(key, bitmap(number), target) for number, (key, target) in enumerate(items)]
    write(items[:1], tmp_path / "one.lmdb")
    write(items[1:], tmp_path / "rest.lmdb")
    write([tmp_path / "one.lmdb", tmp_path / "rest.lmdb"], tmp_path / "m.lmdb")
    found = [(key, image, target) for key, target, image in stored(tmp_path / "m.lmdb")]
    assert repr(found) == repr(items)  # so that NaN is itself


def test_names_that_are_no_text_survive(tmp_path):
    key = os.fsdecode(b"caf\xe9\n.bmp")
    write([(key, bitmap(0), {"box": [1, 2]})], tmp_path / "a.lmdb")
    write([tmp_path / "a.lmdb"], tmp_path / "m.lmdb")
    assert stored(tmp_path / "m.lmdb") == [(key, {"box": [1, 2]}, bitmap(0))]


def test_records_are_copied_without_a_look_at_the_image(made, tmp_path, monkeypatch):
    monkeypatch.setattr(Encoding, "apply", lambda *_: pytest.fail("decodes"))
    monkeypatch.setattr(encoding, "decoded", lambda *_: pytest.fail("decodes"))
    write([made / "a.lmdb", made / "b"], tmp_path / "m.lmdb")
    assert named(tmp_path / "m.lmdb") == named(made / "a.lmdb") + named(made / "b")


def test_workers_copy_the_same(made, tmp_path):
    write([made / "a.lmdb", made / "b"], tmp_path / "m.lmdb", workers=1)
    assert named(tmp_path / "m.lmdb") == named(made / "a.lmdb") + named(made / "b")


def test_settings_and_the_schemas_version_go_along(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (8, 8)).save(tmp_path / "turned.jpg", exif=exif)
    items = [("a", (tmp_path / "turned.jpg").read_bytes(), 0)]
    write(items, tmp_path / "a.lmdb", encode="raw")
    write([tmp_path / "a.lmdb"], tmp_path / "m.lmdb")
    write([("b", bitmap(1), 0)], tmp_path / "b.lmdb")
    write([tmp_path / "a.lmdb", tmp_path / "b.lmdb"], tmp_path / "both.lmdb")
    write([("b", bitmap(1), 0)], tmp_path / "m.lmdb", append=True)  # stored raw as well
    versions = []
    for name in ("a", "b", "m", "both"):
        environment = environments.open_environment(tmp_path / f"{name}.lmdb")
        versions.append(schema.unpack_meta(environment.get_entry(schema.META), name)["version"])
    assert versions == [2, 1, 2, 2]
    assert info_lmdb(tmp_path / "m.lmdb").settings == info_lmdb(tmp_path / "a.lmdb").settings
    assert info_lmdb(tmp_path / "both.lmdb").settings["encode"] is None
    assert stored(tmp_path / "m.lmdb")[1][2][:3] == b"RAW"
    assert stored(tmp_path / "both.lmdb")[1][2] == bitmap(1)


def test_a_merge_can_encode_anew(made, tmp_path):
    write([made / "a.lmdb"], tmp_path / "m.lmdb", encode="png")
    for (key, target, image), (*same, old) in zip(
        stored(tmp_path / "m.lmdb"), stored(made / "a.lmdb"), strict=True
    ):
        assert [key, target] == same
        assert np.array_equal(encoding.decoded(image), encoding.decoded(old))


@pytest.mark.parametrize("shards", [None, 2])
def test_a_key_in_two_databases_is_refused_or_skipped(shards, made, tmp_path):
    write(triples(range(5, 9)), tmp_path / "more.lmdb")
    sources = [made / "plain.lmdb", tmp_path / "more.lmdb"]
    with pytest.raises(SourceError, match=r"k005: its key is in \S*plain\S* and in \S*more"):
        write(sources, tmp_path / "m", shards=shards)
    assert not (tmp_path / "m").exists()
    report = write(sources, tmp_path / "m", shards=shards, on_error="skip")
    assert [key for key, _ in report.skipped] == ["k005", "k006"]
    kept = [item for item in stored(tmp_path / "more.lmdb") if item[0] > "k006"]
    assert stored(tmp_path / "m") == stored(made / "plain.lmdb") + kept


def test_a_damaged_record_is_named_or_skipped(made, tmp_path):
    shutil.copy(made / "plain.lmdb", tmp_path / "bad.lmdb")
    data = (tmp_path / "bad.lmdb").read_bytes()
    flipped = bitmap(3)[:60] + b"\x55" + bitmap(3)[61:]
    (tmp_path / "bad.lmdb").write_bytes(
        data.replace(bitmap(3), flipped)
    )  # pages of old commits too
    with pytest.raises(SourceError, match=r"record 3 of \S*bad\.lmdb: record 3 is damaged"):
        write([tmp_path / "bad.lmdb"], tmp_path / "m.lmdb")
    write([tmp_path / "bad.lmdb"], tmp_path / "m.lmdb", on_error="skip")
    whole = stored(made / "plain.lmdb")
    assert stored(tmp_path / "m.lmdb") == whole[:3] + whole[4:]


def test_a_database_that_is_replaced_meanwhile_is_noticed(made, tmp_path):
    shutil.copy(made / "plain.lmdb", tmp_path / "a.lmdb")
    source = merging.Databases([tmp_path / "a.lmdb"])
    write(triples(range(20, 27)), tmp_path / "a.lmdb")
    with pytest.raises(SourceError, match="was replaced meanwhile"):
        write(source, tmp_path / "m.lmdb")


def test_what_cannot_be_merged_is_refused(made, tmp_path):
    a, b = made / "a.lmdb", made / "b"
    with pytest.raises(SourceError, match=r"plain\.lmdb has no class names and \S*a\.lmdb has"):
        write([a, made / "plain.lmdb"], tmp_path / "m.lmdb")
    with pytest.raises(ValueError, match="cannot be written at the same time"):
        write([a, b], a)
    with pytest.raises(ValueError, match="cannot be written at the same time"):
        write([a, b], b, shards=3)
    with pytest.raises(FileNotFoundError, match="there is no database"):
        write([a, made / "none.lmdb"], tmp_path / "m.lmdb")
    with pytest.raises(SourceError, match=r"photos_a is no database, as which a list of paths"):
        write([made / "photos_a"], tmp_path / "m.lmdb")
    shutil.copytree(b, tmp_path / "b")
    next((tmp_path / "b").iterdir()).unlink()
    with pytest.raises(DatabaseError, match="holds 2 of 3 shards"):
        write([tmp_path / "b"], tmp_path / "m.lmdb")
    shutil.copy(a, tmp_path / "fields.lmdb")
    rewrite_meta(tmp_path / "fields.lmdb", lambda meta: meta["settings"].update(fields=["box"]))
    with pytest.raises(SourceError, match="only databases of the same fields"):
        write([a, tmp_path / "fields.lmdb"], tmp_path / "m.lmdb")
    assert sorted(os.listdir(tmp_path)) == ["b", "fields.lmdb"]


def test_a_database_of_an_earlier_version_is_read(made, tmp_path):
    shutil.copy(made / "a.lmdb", tmp_path / "old.lmdb")
    rewrite_meta(tmp_path / "old.lmdb", lambda meta: meta.pop("contents"))
    write([tmp_path / "old.lmdb", made / "b"], tmp_path / "m.lmdb")
    write(made / "b", tmp_path / "old.lmdb", append=True)
    for name in ("m.lmdb", "old.lmdb"):
        assert named(tmp_path / name) == named(made / "a.lmdb") + named(made / "b")


def test_samples_of_fields_are_merged_and_appended(tmp_path):
    pytest.importorskip("dlhelpers.lmdb_io.fields")
    kinds = {"box": "numpy", "label": "json"}
    samples = [(f"k{n}", {"box": np.arange(n), "label": n % 3}) for n in range(12)]
    for name, part in (("a", samples[:5]), ("b", samples[5:]), ("c", samples[:5])):
        write(part, tmp_path / name, fields=kinds)
    write([tmp_path / "a", tmp_path / "b"], tmp_path / "m", shards=3)
    write(tmp_path / "b", tmp_path / "a", append=True)
    write(samples[5:], tmp_path / "c", fields=kinds, append=True)
    for name in ("m", "a", "c"):
        found = list(LMDBDataset(tmp_path / name))
        assert repr(found) == repr([sample for _, sample in samples])
    for source, path in (("b", "plain"), ("plain", "b")):
        write(triples(range(3)), tmp_path / "plain")
        with pytest.raises(ValueError, match=r"has the fields .*, the source"):
            write(tmp_path / source, tmp_path / path, append=True)


@settings(max_examples=60, deadline=None)
@given(*(st.lists(st.sampled_from("abcdef"), max_size=6, unique=True) for _ in range(2)))
def test_classes_are_matched_by_name(known, new):
    classes, numbers = match_classes(known, new, ("one", "two"))
    assert classes[: len(known)] == known
    assert sorted(classes) == sorted(set(known) | set(new))
    numbers = range(len(new)) if numbers is None else numbers
    assert [classes[number] for number in numbers] == new


def test_names_of_two_classes_are_matched_only_where_nothing_moves():
    cranes = ["crane", "cat", "crane"]
    assert match_classes(cranes, cranes, ("one", "two")) == (cranes, None)
    for known, new, named_ in ((cranes, ["cat"], "one"), (["cat"], cranes, "two")):
        with pytest.raises(SourceError, match=f"{named_} has several classes .*'crane'"):
            match_classes(known, new, ("one", "two"))


def test_a_target_of_no_class_is_named(tmp_path, made):
    write(folder(tmp_path / "p", ["ant"], [1]), tmp_path / "odd.lmdb")
    write([("x", bitmap(0), 0)], tmp_path / "odd.lmdb", append=True)
    with pytest.raises(SourceError, match="key 'x': its target 5 is not the number of a class: 1"):
        write([("x", bitmap(0), 5)], tmp_path / "odd.lmdb", append=True)


def test_targets_that_may_hold_class_numbers_are_not_left_wrong(made, tmp_path):
    """A list of labels stays where no class moves; a label of -1 stays always."""
    write(folder(tmp_path / "p", ["dog"], [50]), tmp_path / "moved.lmdb")
    for key, target in (("none", -1), ("several", [0, 0])):
        write([(key, bitmap(0), target)], tmp_path / "moved.lmdb", append=True)
    with pytest.raises(SourceError, match=r"record 2 of \S*: its target \[0, 0\] may hold class"):
        write([made / "a.lmdb", tmp_path / "moved.lmdb"], tmp_path / "m.lmdb")
    write([tmp_path / "moved.lmdb", made / "a.lmdb"], tmp_path / "m.lmdb")
    assert [target for _, target, _ in stored(tmp_path / "m.lmdb")[:3]] == [0, -1, [0, 0]]
    shutil.copy(made / "a.lmdb", tmp_path / "a.lmdb")
    write(tmp_path / "moved.lmdb", tmp_path / "a.lmdb", append=True, on_error="skip")
    assert [target for _, target, _ in stored(tmp_path / "a.lmdb")[10:]] == [1, -1]


def test_an_interrupted_merge_is_continued(made, tmp_path, monkeypatch):
    monkeypatch.setattr(converting, "_COMMIT_BYTES", 1)
    write(triples(range(40)), tmp_path / "a.lmdb")
    with monkeypatch.context() as patch:
        patch.setattr(converting.Conversion, "_put_state", count_down(2))
        with pytest.raises(KeyboardInterrupt):
            write([tmp_path / "a.lmdb"], tmp_path / "m.lmdb")
    assert write([tmp_path / "a.lmdb"], tmp_path / "m.lmdb", resume=True).resumed_from == 16
    assert stored(tmp_path / "m.lmdb") == stored(tmp_path / "a.lmdb")


def count_down(number):
    original = converting.Conversion._put_state
    left = [number]

    def put_state(self, txn):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        original(self, txn)

    return put_state


# ---- appending ----


def test_appended_images_follow_the_old_ones(made, tmp_path):
    shutil.copy(made / "a.lmdb", tmp_path / "a.lmdb")
    report = write(made / "photos_b", tmp_path / "a.lmdb", append=True)
    assert named(tmp_path / "a.lmdb") == named(made / "a.lmdb") + named(made / "b")
    assert LMDBDataset(tmp_path / "a.lmdb").classes == ["cat", "dog", "ant"]
    assert (report.count, report.appended_to, report.resumed_from) == (22, 10, 0)
    for line in ("12 of them appended to the 10", "1 class is new: ant", "ant 0 -> 2"):
        assert line in str(report)
    assert verify_lmdb(tmp_path / "a.lmdb").count == 22
    assert os.listdir(tmp_path) == ["a.lmdb"]


@pytest.mark.parametrize("kind", ["database", "dataset", "subset", "triples", "folder"])
def test_every_source_can_be_appended(kind, made, tmp_path):
    shutil.copy(made / "a.lmdb", tmp_path / "a.lmdb")
    sources = {
        "database": made / "b",
        "dataset": LMDBDataset(made / "b"),
        "subset": Subset(ImageFolder(made / "photos_b"), range(12)),
        "folder": ImageFolder(made / "photos_b"),
    }
    if kind == "triples":
        dog = [(key, image, 1) for key, _, image in stored(made / "b")]
        report = write(iter(dog), tmp_path / "a.lmdb", append=True)
        assert "targets are taken for the numbers of its classes" in str(report)
        assert stored(tmp_path / "a.lmdb")[10:] == [(key, 1, image) for key, image, _ in dog]
        return
    write(sources[kind], tmp_path / "a.lmdb", append=True)
    assert named(tmp_path / "a.lmdb") == named(made / "a.lmdb") + named(made / "b")


def test_what_was_skipped_before_stays_listed(made, tmp_path):
    broken = [("bad1", b"", 0), *triples(range(3)), ("bad2", b"", 0)]
    write(broken, tmp_path / "a.lmdb", on_error="skip")
    more = [*triples(range(3, 6)), ("bad3", b"", 0), *triples([0])]
    report = write(more, tmp_path / "a.lmdb", append=True, on_error="skip")
    assert [name.split("'")[1] for name, _ in report.skipped[:1]] == ["bad3"]
    names = [name for name, _ in info_lmdb(tmp_path / "a.lmdb").skipped]
    assert len(names) == 4
    assert all(f"bad{n}" in name for n, name in zip((1, 2, 3), names, strict=False))
    assert stored(tmp_path / "a.lmdb") == [(k, t, b) for k, b, t in triples(range(6))]
    write(triples(range(6, 8)), tmp_path / "a.lmdb", append=True)
    assert verify_lmdb(tmp_path / "a.lmdb").count == 8


def test_new_images_are_stored_as_the_old_ones(tmp_path):
    root = folder(tmp_path / "p", ["cat"], range(3))
    write(root, tmp_path / "a.lmdb", resize=(4, 6), encode="png")
    write(triples([9], target=lambda _: 0), tmp_path / "a.lmdb", append=True)
    assert LMDBDataset(tmp_path / "a.lmdb", decode="pil")[3][0].size == (6, 4)
    with pytest.raises(ValueError, match=r"encode='jpeg' differs from 'png'"):
        write(triples([8]), tmp_path / "a.lmdb", append=True, encode="jpeg")


def test_what_cannot_be_appended_is_refused(made, tmp_path):
    shutil.copy(made / "a.lmdb", tmp_path / "a.lmdb")
    before = (tmp_path / "a.lmdb").read_bytes()
    again = made / "photos_a"
    for source, path, options, error, message in [
        (again, tmp_path / "a.lmdb", {}, SourceError, "cat/000.bmp' is taken by record 0"),
        ([], tmp_path / "a.lmdb", {}, SourceError, "holds no image"),
        (again, tmp_path / "none", {}, FileNotFoundError, "no database to append to"),
        (again, made / "b", {}, IsADirectoryError, "lmdb merge .* DST --shards N"),
        (again, made / "b/shard-00001-of-00003.lmdb", {}, ValueError, "is shard 1 of 3"),
        (again, tmp_path / "a.lmdb", {"shards": 2}, ValueError, "leave out shard and shards"),
        (again, tmp_path / "a.lmdb", {"shard": (0, 2)}, ValueError, "leave out shard"),
        (made / "plain.lmdb", tmp_path / "a.lmdb", {}, SourceError, "has no class names"),
        (tmp_path / "a.lmdb", tmp_path / "a.lmdb", {}, ValueError, "at the same time"),
    ]:
        with pytest.raises(error, match=message):
            write(source, path, append=True, **options)
    assert (tmp_path / "a.lmdb").read_bytes() == before
    assert os.listdir(tmp_path) == ["a.lmdb"]


def test_a_reader_goes_on_with_the_old_file(made, tmp_path):
    shutil.copy(made / "plain.lmdb", tmp_path / "a.lmdb")
    reader = LMDBDataset(tmp_path / "a.lmdb", decode=None)
    first = reader[0]
    write(triples(range(20, 25)), tmp_path / "a.lmdb", append=True)
    assert len(reader) == 7
    assert reader[0] == first
    assert len(LMDBDataset(tmp_path / "a.lmdb")) == 12


def test_of_two_appends_at_the_same_time_none_is_lost(made, tmp_path, monkeypatch):
    shutil.copy(made / "plain.lmdb", tmp_path / "a.lmdb")
    other, lock = [triples(range(20, 25))], writing.only_writer

    def late(target, wanted):  # the other one ends while this one waits for the lock
        if other:
            write(other.pop(), tmp_path / "a.lmdb", append=True)
        return lock(target, wanted)

    monkeypatch.setattr(writing, "only_writer", late)
    with pytest.raises(BlockingIOError, match="was replaced just now: append again"):
        write(triples(range(30, 35)), tmp_path / "a.lmdb", append=True)
    write(triples(range(30, 35)), tmp_path / "a.lmdb", append=True)
    assert len(LMDBDataset(tmp_path / "a.lmdb")) == 17


def in_a_child(run):
    """Run in a forked child; return the signal that ended it."""
    if (pid := os.fork()) == 0:
        try:
            run()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_before(owner, name, call):
    """Replace a function by one that kills its process when it is called the n-th time."""
    original, left = getattr(owner, name), [call]

    def function(*args, **kwargs):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, function)


KILLS = {  # what is called when the process is killed, how many records are taken up then
    "before the copy": (appending, "_copy_file", 1, 0),
    "before the copy is taken": (os, "replace", 1, 0),
    "before the first commit": (converting.Conversion, "_put_state", 1, 0),
    "before the third commit": (converting.Conversion, "_put_state", 3, 32),
    "before the end": (os, "replace", 2, 50),
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("moment", KILLS)
def test_a_killed_append_leaves_the_old_database_and_is_continued(
    moment, made, tmp_path, monkeypatch
):
    owner, name, call, taken_up = KILLS[moment]
    monkeypatch.setattr(converting, "_COMMIT_BYTES", 1)
    shutil.copy(made / "plain.lmdb", tmp_path / "a.lmdb")
    before = (tmp_path / "a.lmdb").read_bytes()
    more = triples(range(100, 150))

    def run():
        killed_before(owner, name, call)
        write(more, tmp_path / "a.lmdb", append=True)

    assert in_a_child(run) == -signal.SIGKILL
    assert (tmp_path / "a.lmdb").read_bytes() == before
    report = write(more, tmp_path / "a.lmdb", append=True, resume=True)
    assert (report.count, report.resumed_from) == (57, taken_up)
    expected = [*triples(range(7)), *more]
    assert stored(tmp_path / "a.lmdb") == [(key, target, image) for key, image, target in expected]
    assert sorted(os.listdir(tmp_path)) == ["a.lmdb"]


def test_a_copy_that_was_cut_short_is_not_taken_up(made, tmp_path, monkeypatch):
    shutil.copy(made / "plain.lmdb", tmp_path / "a.lmdb")

    def half(source, target):
        target.write_bytes(source.read_bytes()[:20_000])
        os.kill(os.getpid(), signal.SIGKILL)

    def run():
        appending._copy_file = half
        write(triples([50]), tmp_path / "a.lmdb", append=True)

    assert in_a_child(run) == -signal.SIGKILL
    assert not (tmp_path / ".a.lmdb.part").exists()
    write(triples([50]), tmp_path / "a.lmdb", append=True, resume=True)
    assert len(stored(tmp_path / "a.lmdb")) == 8
    assert os.listdir(tmp_path) == ["a.lmdb"]


def test_an_interrupted_append_is_no_interrupted_conversion(made, tmp_path, monkeypatch):
    """What is appended may be the whole of a later conversion: the old records are not of it."""
    shutil.copy(made / "plain.lmdb", tmp_path / "a.lmdb")
    more = [*triples(range(20, 24)), ("bad", b"", 0)]
    with pytest.raises(SourceError, match="4 images are kept"):
        write(more, tmp_path / "a.lmdb", append=True)
    more[-1] = triples([24])[0]
    with pytest.warns(UserWarning, match="starting afresh"):
        write(more, tmp_path / "a.lmdb", resume=True)
    assert stored(tmp_path / "a.lmdb") == [(key, target, image) for key, image, target in more]


def test_an_append_is_continued_after_the_machine_went_down(made, tmp_path, monkeypatch):
    shutil.copy(made / "plain.lmdb", tmp_path / "a.lmdb")
    more = [*triples(range(20, 24)), ("bad", b"", 0)]
    with pytest.raises(SourceError):
        write(more, tmp_path / "a.lmdb", append=True)
    with pytest.raises(DatabaseError, match="has no entry 'meta'"):
        LMDBDataset(tmp_path / ".a.lmdb.part")
    monkeypatch.setattr(resuming, "boot_id", lambda: "another")  # so that every record is checked
    more[-1] = triples([24])[0]
    assert write(more, tmp_path / "a.lmdb", append=True, resume=True).resumed_from == 4
    assert len(stored(tmp_path / "a.lmdb")) == 12


def test_an_append_is_not_continued_on_another_database(made, tmp_path):
    shutil.copy(made / "plain.lmdb", tmp_path / "a.lmdb")
    more = [*triples(range(20, 24)), ("bad", b"", 0)]
    with pytest.raises(SourceError):
        write(more, tmp_path / "a.lmdb", append=True)
    shutil.copy(tmp_path / ".a.lmdb.part", tmp_path / "kept")
    write(triples(range(3)), tmp_path / "a.lmdb")
    os.replace(tmp_path / "kept", tmp_path / ".a.lmdb.part")
    with pytest.warns(UserWarning, match="starting afresh"):
        write(more[:-1], tmp_path / "a.lmdb", append=True, resume=True)
    assert len(stored(tmp_path / "a.lmdb")) == 7


def test_copies_share_their_bytes_or_not(tmp_path, monkeypatch):
    data = os.urandom(100_000)
    (tmp_path / "old").write_bytes(data)
    appending._copy_file(tmp_path / "old", tmp_path / "one")

    def refuses(*_):
        raise OSError(18, "another file system")

    monkeypatch.setattr(os, "copy_file_range", refuses, raising=False)
    (tmp_path / "two").write_bytes(bytes(200_000))
    appending._copy_file(tmp_path / "old", tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes() == data


# ---- the command ----


def test_the_command_merges_and_appends(made, tmp_path, capsys):
    a, b, out = str(made / "a.lmdb"), str(made / "b"), str(tmp_path / "out")
    assert main(["lmdb", "merge", a, b, out, "--shards", "2", "--quiet"]) == 0
    assert named(out) == named(a) + named(b)
    assert main(["lmdb", "merge", out, str(tmp_path / "one.lmdb"), "--quiet"]) == 0
    assert named(tmp_path / "one.lmdb") == named(out)
    shutil.copy(a, tmp_path / "a.lmdb")
    photos = str(made / "photos_b")
    assert main(["lmdb", "write", photos, str(tmp_path / "a.lmdb"), "--append", "--quiet"]) == 0
    assert named(tmp_path / "a.lmdb") == named(out)
    assert "12 of them appended to the 10" in capsys.readouterr().out
    assert main(["lmdb", "merge", a]) == 2
    assert "merge needs a database and a destination" in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["--shards", "2"]])
def test_a_merge_without_a_destination_touches_no_database(tmp_path, capsys, more):
    """The last of the paths would be replaced by the others."""
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, "PNG")
    png = buffer.getvalue()
    for name, first in (("a", 0), ("b", 3)):
        images = [(f"{name}{n}", png, n) for n in range(first, first + 3)]
        write_lmdb(images, tmp_path / name, progress=False, **({"shards": 2} if more else {}))
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    paths = [str(tmp_path / name) for name in "ab"]
    assert main(["lmdb", "merge", *paths, "--quiet", *more]) == 2
    assert "name a new destination" in capsys.readouterr().err
    assert before == {p: p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()}
    assert main(["lmdb", "merge", *paths, str(tmp_path / "new"), "--quiet", *more]) == 0
    assert len(LMDBDataset(tmp_path / "new")) == 6


def test_a_folder_of_shards_may_hold_the_file_systems_own_folders(made, tmp_path):
    write(triples(range(4)), tmp_path / "db", shards=2)
    (tmp_path / "db" / ".snapshot").mkdir()
    (tmp_path / "db" / "lost+found").mkdir()
    assert write([tmp_path / "db"], tmp_path / "new").count == 4


@pytest.mark.skipif(os.name == "nt", reason="rights of POSIX")
def test_an_append_leaves_the_rights_and_may_be_repeated(made, tmp_path):
    path = tmp_path / "a.lmdb"
    shutil.copy(made / "plain.lmdb", path)
    path.chmod(0o640)
    write(triples(range(20, 25)), path, append=True)
    assert path.stat().st_mode & 0o777 == 0o640
    report = write(triples(range(20, 25)), path, append=True, on_error="skip")  # as after a requeue
    assert len(report.skipped) == 5
    assert len(LMDBDataset(path)) == 12


def test_keys_that_are_item_numbers_are_told(tmp_path):
    images = TensorDataset(torch.zeros(3, 3, 8, 8, dtype=torch.uint8), torch.arange(3))
    write(images, tmp_path / "a.lmdb")
    with pytest.raises(SourceError, match=r"item numbers: give \(key, bytes, target\)"):
        write(images, tmp_path / "a.lmdb", append=True)


def test_a_database_that_is_given_twice_is_called_that(tmp_path):
    write(triples(range(2)), tmp_path / "a.lmdb")
    with pytest.raises(SourceError, match=r"a\.lmdb is given twice: give each database once"):
        write_lmdb([tmp_path / "a.lmdb"] * 2, tmp_path / "b.lmdb", progress=False)
    write(triples(range(4)), tmp_path / "s", shards=2)
    os.link(tmp_path / "a.lmdb", tmp_path / "link")
    for again in (
        [tmp_path / "a.lmdb", tmp_path / "link"],
        [tmp_path / "s", tmp_path / "s" / "shard-00001-of-00002.lmdb"],
    ):
        with pytest.raises(SourceError, match=r"(link|00002\.lmdb) is given twice"):
            write(again, tmp_path / "b.lmdb")
    assert not (tmp_path / "b.lmdb").exists()


def test_too_many_open_files_are_named_with_what_helps(tmp_path, monkeypatch):
    """Wherever the system says so: at a look at the file, or in LMDB."""
    write(triples(range(4)), tmp_path / "s", shards=2)
    full = OSError(24, os.strerror(24))

    def refused(*_, **__):
        raise full

    for place, name in ((environments, "open"), (lmdb, "open")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, refused, raising=False)
            full = OSError(24, os.strerror(24)) if place is environments else lmdb.Error(str(full))
            with pytest.raises(OSError, match=r"too many files open: .*ulimit -n.*fewer shards"):
                verify_lmdb(tmp_path / "s", progress=False)
            if place is lmdb:
                with pytest.raises(OSError, match=r"too many files open: .*ulimit -n"):
                    write(triples(range(4)), tmp_path / "b.lmdb")
    assert not (tmp_path / "b.lmdb").exists()


def settings_of(path):
    return re.search(r"stored +(.*)", str(info_lmdb(path)))[1]


def test_settings_that_differ_are_told_and_equal_ones_kept(tmp_path):
    """After merges and appends, of files and shards, and of what was merged before."""
    pictures = {name: triples(range(n, n + 2)) for n, name in enumerate("abcde") if not n % 2}
    write(pictures["a"], tmp_path / "a", encode="jpeg", quality=80)
    write(pictures["c"], tmp_path / "c", encode="jpeg", quality=80)
    write(pictures["e"], tmp_path / "e", shards=2)
    write([tmp_path / "a", tmp_path / "c"], tmp_path / "same", shards=2)
    told = settings_of(tmp_path / "same")
    assert told == settings_of(tmp_path / "a") == "encode jpeg, quality 80"
    write([tmp_path / "same", tmp_path / "e"], tmp_path / "both")
    told = "differing: encode jpeg or none, quality 80 or none"
    assert settings_of(tmp_path / "both") == told
    write([("f", bitmap(1), 0)], tmp_path / "raw", encode="raw")
    write([tmp_path / "both", tmp_path / "raw"], tmp_path / "three", shards=2)
    told = told.replace("or none, q", "or none or raw, q")
    assert settings_of(tmp_path / "three") == told
    write([("g", bitmap(1), 0)], tmp_path / "given")
    write(tmp_path / "raw", tmp_path / "given", append=True)  # copied as it is
    assert settings_of(tmp_path / "given") == "differing: encode none or raw"
    write([("h", bitmap(2), 0)], tmp_path / "given", append=True)  # which is taken as it is
    assert settings_of(tmp_path / "given") == "differing: encode none or raw"
    assert stored(tmp_path / "given")[2][2] == bitmap(2)


def test_fields_stay_where_the_quality_of_their_pictures_differs(tmp_path):
    for name, quality in (("a", 80), ("b", 90)):
        samples = [(name, {"image": Image.new("RGB", (8, 8)), "label": 1})]
        write(samples, tmp_path / name, fields={"image": "jpeg", "label": "json"}, quality=quality)
    write([tmp_path / "a", tmp_path / "b"], tmp_path / "m")
    assert settings_of(tmp_path / "m") == "differing: quality 80 or 90"
    assert info_lmdb(tmp_path / "m").fields == info_lmdb(tmp_path / "a").fields


def test_what_is_appended_has_the_fields_of_the_database(tmp_path):
    """Samples, and images and classes of a folder; whose shards lie outside of it."""
    fields = {"image": "image", "label": "json"}
    for name in ("a", "b"):
        (tmp_path / name / "cat").mkdir(parents=True)
        (tmp_path / name / "cat" / f"{name}.bmp").write_bytes(bitmap(1))
    with pytest.raises(ValueError, match="would become a class of it"):
        write(tmp_path / "a", tmp_path / "a" / "db", fields=fields, shards=2)
    write(tmp_path / "a", tmp_path / "m", fields=fields)
    write(tmp_path / "b", tmp_path / "m", append=True)
    write([("c", {"image": bitmap(2), "label": 0})], tmp_path / "m", append=True)
    found = LMDBDataset(tmp_path / "m")
    assert [key for key, _ in found.samples] == ["cat/a.bmp", "cat/b.bmp", "c"]
    assert found.classes == ["cat"]
    assert list(found.targets) == [0, 0, 0]
    assert found[2]["image"].flatten().unique().tolist() == [2]


def test_settings_that_differ_are_known_when_more_is_appended(tmp_path):
    fields = {"image": "jpeg", "label": "json"}
    for name, quality in (("a", 80), ("b", 90)):
        samples = [(name, {"image": Image.new("RGB", (8, 8)), "label": 1})]
        write(samples, tmp_path / name, fields=fields, quality=quality)
    write([tmp_path / "a", tmp_path / "b"], tmp_path / "m")
    more = [("c", {"image": Image.new("RGB", (8, 8)), "label": 1})]
    with pytest.raises(
        ValueError, match=r"quality=70 differs from 80 or 90, .* give quality=80 or"
    ):
        write(more, tmp_path / "m", append=True, quality=70)
    write(more, tmp_path / "m", append=True, quality=80)
    assert settings_of(tmp_path / "m") == "differing: quality 80 or 90"
    for name, encode in (("r", "raw"), ("j", "jpeg")):
        write([(name, bitmap(3), 0)], tmp_path / name, encode=encode)
    write([tmp_path / "r", tmp_path / "j"], tmp_path / "n")
    with pytest.raises(ValueError, match=r"encode='raw': .* with encode .*: leave encode out"):
        write([("d", bitmap(4), 0)], tmp_path / "n", append=True, encode="raw")


def test_no_items_are_no_list_of_databases(tmp_path):
    write(
        [("a", {"image": bitmap(1), "label": 0})],
        tmp_path / "m",
        fields={"image": "image", "label": "json"},
    )
    with pytest.raises(ValueError, match="holds no image that could be stored"):
        write([], tmp_path / "m", append=True)
