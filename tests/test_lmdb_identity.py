"""Two versions of a source are never taken for one: shards, interrupted conversions, workers."""

import itertools
import os
import pickle
import random
import shutil
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor

import lmdb
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchvision.datasets import ImageFolder

from dlhelpers.lmdb_io import (
    DatabaseError,
    LMDBDataset,
    SourceError,
    comparing,
    converting,
    folder_source,
    identity,
    info_lmdb,
    locking,
    schema,
    verify_lmdb,
    write_lmdb,
)


def write(source, path, **options):
    return write_lmdb(source, path, **{"progress": False} | options)


def convert(source, folder, *ranks, world=2, **options):
    for rank in ranks:
        write(source, folder, shard=(rank, world), **options)


def pixels(number, changed=()):
    rng = np.random.default_rng(number + 1000 * (number in changed))
    return rng.integers(0, 256, (8, 8, 3), np.uint8)


def bitmaps(root, *, count=12, changed=(), time=1_000_000_000):
    """A folder of images that have one size in bytes, whatever they show."""
    for number in range(count):
        path = root / f"c{2 * number // count}" / f"{number:03d}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(number, changed)).save(path)
        os.utime(path, (time, time))
    return root


def touch(root, time=2_000_000_000):
    for path in root.glob("*/*"):
        os.utime(path, (time, time))


def refuses(folder, message):
    for opened in (LMDBDataset, info_lmdb):
        with pytest.raises(DatabaseError, match=message):
            opened(folder)


def shows(folder, source):
    """Whether a folder of shards holds just what ImageFolder reads."""
    found, expected = LMDBDataset(folder, decode="pil"), ImageFolder(source)
    return found.targets == expected.targets and all(
        np.array_equal(np.asarray(found[i][0]), np.asarray(expected[i][0]))
        for i in range(len(expected))
    )


# ---- shards of a folder ----


def rename(root):
    (root / "c0" / "001.bmp").rename(root / "c0" / "x.bmp")


def move(root):
    (root / "c0" / "001.bmp").rename(root / "c1" / "000.bmp")


def resize(root):
    Image.new("RGB", (9, 9)).save(root / "c0" / "001.bmp")


def rewrite(root):
    path = root / "c0" / "001.bmp"
    Image.fromarray(pixels(77)).save(path)
    os.utime(path, (3_000_000_000, 3_000_000_000))


@pytest.mark.parametrize(
    ("change", "what"),
    [(rename, "names"), (move, "names or targets"), (resize, "sizes"), (rewrite, "contents")],
)
@pytest.mark.parametrize("options", [{}, {"resize": 4, "encode": "png"}])
def test_a_shard_of_the_source_before_it_changed_is_refused_by_name(
    tmp_path, change, what, options
):
    source = bitmaps(tmp_path / "source")
    convert(source, tmp_path / "out", 0, 1, **options)
    change(source)  # in the part of rank 0, which does not run again
    convert(source, tmp_path / "out", 1, **options)
    said = rf"differ in the {what}.*shard-00000-of-00002.lmdb is of another.*Run rank 0 again"
    refuses(tmp_path / "out", said)
    convert(source, tmp_path / "out", 0, **options)
    assert options or shows(tmp_path / "out", source)
    assert len(LMDBDataset(tmp_path / "out")) == 12


def test_the_folder_is_whole_again_once_the_last_rank_has_run(tmp_path):
    source = bitmaps(tmp_path / "source", count=16)
    convert(source, tmp_path / "out", *range(4), world=4)
    bitmaps(source, count=16, changed=(9, 14), time=2_000_000_000)
    for rank in (3, 0):
        convert(source, tmp_path / "out", rank, world=4)
        refuses(tmp_path / "out", "shard-00001-of-00004.lmdb.* of another conversion")
    with pytest.raises(DatabaseError, match=r"shard-00001-of-00004\.lmdb, shard-00002-of-00004"):
        verify_lmdb(tmp_path / "out", progress=False)
    convert(source, tmp_path / "out", 2, world=4)  # the part of rank 1 is what it was
    assert shows(tmp_path / "out", source)
    convert(source, tmp_path / "out", 1, world=4)
    assert shows(tmp_path / "out", source)


@pytest.mark.parametrize("order", [*itertools.permutations(range(3))])
def test_local_copies_with_other_times_are_one_source(tmp_path, order):
    copies = [
        bitmaps(tmp_path / f"copy {n}", time=1_000_000_000 + 10_000_000 * n) for n in range(3)
    ]
    for rank in order:
        convert(copies[rank], tmp_path / "out", rank, world=3)
    assert shows(tmp_path / "out", copies[0])


def test_local_copies_that_show_something_else_are_two_sources(tmp_path):
    first = bitmaps(tmp_path / "first")
    second = bitmaps(tmp_path / "second", changed=(1,), time=2_000_000_000)
    convert(first, tmp_path / "out", 0)
    convert(second, tmp_path / "out", 1)
    refuses(tmp_path / "out", "contents of the source's images: shard-00000.*Run rank 0 again")


@pytest.mark.parametrize("workers", [0, 1])
def test_files_are_only_read_again_where_their_times_differ(tmp_path, monkeypatch, workers):
    compared = []
    load = comparing.load_chunks

    def counted(loader, tasks, workers):
        tasks = list(tasks)
        compared.append(len(tasks))
        return load(loader, iter(tasks), workers)

    monkeypatch.setattr(comparing, "load_chunks", counted)
    source = bitmaps(tmp_path / "source")
    convert(source, tmp_path / "out", 0, 1, 0)
    assert compared == []
    touch(source)
    convert(source, tmp_path / "out", 0, workers=workers)
    assert compared == [6]  # the part of the other rank
    assert shows(tmp_path / "out", source)


def test_times_of_another_machine_and_another_folder_say_nothing():
    def meta(rank, version, place):
        whole = {"names": "n", "sizes": "s", "contents": "", "version": version, "place": place}
        facts = {"classes": None, "settings": {}, "total": 2, "source": "folder"}
        return facts | {"shard": [rank, 2], "identity": whole}

    here = meta(0, "monday", ["machine a", "folder 1"])
    for place, odd in (
        (["machine b", "folder 2"], []),  # a local copy
        (["machine a", "folder 2"], [1]),
        (["machine b", "folder 1"], [1]),  # mounted on both
    ):
        assert identity.odd_shards([here, meta(1, "tuesday", place)], 0)[1] == odd
        assert identity.odd_shards([here, meta(1, "monday", place)], 0)[1] == []


def test_ranks_that_run_again_all_at_once_find_their_old_shards_unchanged(tmp_path):
    source = bitmaps(tmp_path / "source", count=6)
    convert(source, tmp_path / "out", 0, 1, 2, world=3)
    for rank in (1, 2):
        (tmp_path / "out" / f".shard-{rank:05d}-of-00003.lmdb.part").write_bytes(b"")
    for rank, copy in enumerate("abc"):
        own = bitmaps(tmp_path / copy, count=6, time=(rank + 2) * 1_000_000_000)
        convert(own, tmp_path / "out", rank, world=3)
        assert shows(tmp_path / "out", source)


def test_a_version_that_was_found_equal_once_does_not_vouch_for_a_later_one(tmp_path):
    source = bitmaps(tmp_path / "source", count=6)
    convert(source, tmp_path / "out", 0, 1, 2, world=3)
    touch(source)
    convert(source, tmp_path / "out", 2, world=3)
    assert shows(tmp_path / "out", source)
    bitmaps(source, count=6, changed=(5,), time=3_000_000_000)  # in the part of rank 2
    convert(source, tmp_path / "out", 1, world=3)
    refuses(tmp_path / "out", "Run the ranks 0, 2 again")
    convert(source, tmp_path / "out", 2, world=3)
    assert shows(tmp_path / "out", source)


@pytest.mark.parametrize("lock", [True, False])
def test_ranks_that_finish_at_the_same_moment_are_one_conversion(tmp_path, monkeypatch, lock):
    together = threading.Barrier(3, timeout=30)
    look, been = comparing.Neighbours.equal_versions, set()

    def at_once(self, mine):
        found = look(self, mine)
        if self not in been:  # nobody has finished: none has seen another
            been.add(self)
            together.wait()
        return found

    monkeypatch.setattr(comparing.Neighbours, "equal_versions", at_once)
    copies = [bitmaps(tmp_path / name, time=ord(name) * 1_000_000_000) for name in "abc"]
    with ThreadPoolExecutor(3) as pool:
        ranks = [
            pool.submit(write, copies[rank], tmp_path / "out", shard=(rank, 3), lock=lock)
            for rank in range(3)
        ]
    assert [rank.result().count for rank in ranks] == [4, 4, 4]
    assert shows(tmp_path / "out", copies[0])
    assert sorted(path.name[:6] for path in (tmp_path / "out").iterdir()) == ["shard-"] * 3


def test_a_rank_that_was_killed_in_its_turn_holds_nobody_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(locking, "_PATIENCE_S", 0.05)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".shards.turn").write_bytes(b"")
    source = bitmaps(tmp_path / "source")
    convert(source, tmp_path / "out", 0, 1, lock=False)
    assert shows(tmp_path / "out", source)
    assert not (tmp_path / "out" / ".shards.turn").exists()


def during_a_conversion(monkeypatch, key, change):
    """Run ``change`` when the file of a key is about to be read."""
    load = folder_source.FolderSource.load

    def changing(self, task):
        if task[1] == key:
            change()
        return load(self, task)

    monkeypatch.setattr(folder_source.FolderSource, "load", changing)


def test_a_source_that_changes_while_a_rank_runs_is_refused(tmp_path, monkeypatch):
    source = bitmaps(tmp_path / "source")
    convert(source, tmp_path / "out", 0)
    with monkeypatch.context() as patch:

        def change():
            bitmaps(source, changed=range(12), time=2_000_000_000)

        during_a_conversion(patch, "c1/008.bmp", change)
        with pytest.raises(SourceError, match=r"changed while it was converted.*run this rank"):
            convert(source, tmp_path / "out", 1)
    convert(source, tmp_path / "out", 1)
    refuses(tmp_path / "out", "Run rank 0 again")


def test_files_that_are_only_touched_while_a_rank_runs_are_taken(tmp_path, monkeypatch):
    source = bitmaps(tmp_path / "source")
    convert(source, tmp_path / "out", 0)
    with monkeypatch.context() as patch:
        during_a_conversion(patch, "c1/008.bmp", lambda: touch(source))
        convert(source, tmp_path / "out", 1)
    assert shows(tmp_path / "out", source)


def test_shards_that_were_mixed_up_are_named(tmp_path):
    source = bitmaps(tmp_path / "source")
    out = tmp_path / "out"
    convert(source, out, 0, 2, world=3)
    refuses(out, r"missing are the ranks \[1\].*shard=\(1, 3\)")
    names = [f"shard-{rank:05d}-of-00003.lmdb" for rank in range(3)]
    shutil.copy(out / names[0], out / names[1])
    refuses(out, f"{names[1]} was renamed or copied, it holds shard 0 of 3")
    write(source, tmp_path / "whole")
    shutil.copy(tmp_path / "whole", out / names[1])
    refuses(out, f"{names[1]} was renamed or copied, it holds a whole database")
    convert(source, out, 1, world=3)
    shutil.copy(out / names[0], out / "shard-00000-of-00002.lmdb")
    refuses(out, r"different numbers of shards \(shard-\*-of-00002.lmdb, shard-\*-of-00003.lmdb\)")


def test_a_folder_of_something_else_is_named(tmp_path):
    lmdb.open(str(tmp_path / "py-lmdb")).close()
    refuses(tmp_path / "py-lmdb", r"is a database of LMDB in a folder \(data.mdb\)")
    (tmp_path / "started").mkdir()
    (tmp_path / "started" / ".shard-00000-of-00002.lmdb.part").write_bytes(b"")
    refuses(tmp_path / "started", "holds no finished shard yet.*resume=True")
    (tmp_path / "empty").mkdir()
    refuses(tmp_path / "empty", "is a folder without shards")


def test_shards_of_two_kinds_of_source_are_told_apart(tmp_path):
    root = bitmaps(tmp_path / "files")
    convert(root, tmp_path / "out", 0)
    other = Pixels()
    other.classes = ["c0", "c1"]
    convert(other, tmp_path / "out", 1)
    refuses(tmp_path / "out", r"the kind of source \((folder and \w+|\w+ and folder)\)")


# ---- shards of what has no listing ----


class Pixels:
    def __init__(self, *, count=12, changed=(), is_random=False):
        self.count, self.changed, self.is_random = count, changed, is_random

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        array = pixels(index, self.changed)
        return (np.roll(array, np.random.randint(8)) if self.is_random else array), index % 3


def triples(changed=()):
    return [(f"k{n}", Image.fromarray(pixels(n, changed)), n) for n in range(9)]


def tensors(changed=False):
    images = torch.from_numpy(np.stack([pixels(n) for n in range(10)])).permute(0, 3, 1, 2)
    images = images.contiguous()
    images[1, 0, 0, 0] += changed
    return TensorDataset(images, torch.arange(10))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (Pixels(), Pixels(changed=(2,))),
        (Pixels(count=1100), Pixels(count=1100, changed=range(1100))),
        (tensors(), tensors(changed=True)),
        (triples(), triples((0,))),
        (lambda: iter(triples()), lambda: iter(triples((2,)))),
        (Subset(Pixels(), [5, 1, 3, 0]), Subset(Pixels(changed=(5,)), [5, 1, 3, 0])),
    ],
    ids=["dataset", "large dataset", "tensors", "list", "iterator", "subset"],
)
def test_shards_of_a_source_without_a_listing_know_its_contents(tmp_path, before, after):
    def make(source):
        return source() if callable(source) else source

    for rank in range(2):
        convert(make(before), tmp_path / "out", rank)
    count = len(LMDBDataset(tmp_path / "out"))
    convert(make(after), tmp_path / "out", 1)  # what changed is in the part of rank 0
    refuses(tmp_path / "out", "contents.*shard-00000.*Run rank 0 again")
    convert(make(after), tmp_path / "out", 0)
    assert len(LMDBDataset(tmp_path / "out")) == count


def test_a_dataset_that_never_repeats_itself_can_be_sharded(tmp_path):
    for rank in range(2):
        convert(Pixels(is_random=True, count=40), tmp_path / "out", rank)
    assert len(LMDBDataset(tmp_path / "out")) == 40


class Flips(Pixels):
    """Flips by a generator of its own, about every other time."""

    draws = itertools.cycle([0, 1, 1, 0, 0, 0, 1])

    def __getitem__(self, index):
        return pixels(index)[:: 1 - 2 * next(self.draws)], 0


def test_a_dataset_that_flips_by_a_generator_of_its_own_can_be_sharded(tmp_path):
    for rank in range(2):
        convert(Flips(count=40), tmp_path / "out", rank)
    assert len(LMDBDataset(tmp_path / "out")) == 40


class Replaces(Pixels):
    """Gives another image in place of one that cannot be read, as many datasets do."""

    def __init__(self, *, draw, broken=(2, 9, 20), **options):
        super().__init__(count=40, **options)
        self.draw, self.broken = draw, broken

    def __getitem__(self, index):
        return super().__getitem__(self.draw(40) if index in self.broken else index)


NUMBERS = itertools.count()
DRAWS = {
    "python": random.randrange,
    "numpy": np.random.randint,
    "torch": lambda count: int(torch.randint(count, ())),
    "what was drawn before": lambda count: next(NUMBERS) % count,
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_items_that_are_others_each_time_refuse_nothing(tmp_path, monkeypatch, draw):
    for rank in range(2):
        convert(Replaces(draw=draw), tmp_path / "out", rank)
    assert len(LMDBDataset(tmp_path / "out")) == 40
    interrupted(Replaces(draw=draw), tmp_path / "db", monkeypatch)
    assert write(Replaces(draw=draw), tmp_path / "db", resume=True).resumed_from == 16


def test_the_other_items_of_such_a_dataset_still_tell_two_versions_apart(tmp_path, monkeypatch):
    draw = random.randrange
    convert(Replaces(draw=draw), tmp_path / "out", 0)
    convert(Replaces(draw=draw, changed=(5,)), tmp_path / "out", 1)
    refuses(tmp_path / "out", "contents.*shard-00000.*Run rank 0 again")
    interrupted(Replaces(draw=draw), tmp_path / "db", monkeypatch)
    with pytest.warns(UserWarning, match="gives other images now: starting afresh"):
        write(Replaces(draw=draw, changed=(5,)), tmp_path / "db", resume=True)


@pytest.mark.parametrize("workers", [0, 1])
def test_looking_at_a_dataset_leaves_the_random_numbers_as_they_were(tmp_path, workers):
    def stored(**options):
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(3)
        report = write(Draws(), tmp_path / "out", workers=workers, **options)
        return [image for _, image, _ in contents(report.path)]

    whole = stored()
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    (tmp_path / "out").unlink(missing_ok=True)
    assert stored(shard=(0, 1)) == whole


class Draws:
    def __len__(self):
        return 8

    def __getitem__(self, index):
        drawn = random.randrange(256), np.random.randint(256), int(torch.randint(256, ()))
        return np.full((4, 4, 3), drawn, np.uint8), 0


def test_shards_of_a_database_know_which_one(tmp_path):
    for name, changed in (("a", ()), ("b", (2,))):
        write(bitmaps(tmp_path / f"source {name}", changed=changed), tmp_path / name)
    convert(LMDBDataset(tmp_path / "a"), tmp_path / "out", 0, 1)
    assert shows(tmp_path / "out", tmp_path / "source a")
    convert(LMDBDataset(tmp_path / "b"), tmp_path / "out", 1)
    refuses(tmp_path / "out", "Run rank 0 again")


# ---- an interrupted conversion ----


def interrupted(source, path, monkeypatch, **options):
    """Stop a conversion at its first commit, which holds 16 images."""
    commit = converting.Conversion._commit

    def stops(self, batch):
        commit(self, batch)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(converting, "_COMMIT_BYTES", 1)
        patch.setattr(converting.Conversion, "_commit", stops)
        with pytest.raises(KeyboardInterrupt) as stopped:
            write(source, path, **options)
        traceback.clear_frames(stopped.tb)  # ends the workers, which frames keep alive


@pytest.mark.parametrize("options", [{}, {"resize": 4, "encode": "png"}, {"shard": (0, 2)}])
def test_resume_goes_by_contents_where_times_differ(tmp_path, monkeypatch, options):
    source = bitmaps(tmp_path / "source", count=40)
    interrupted(source, tmp_path / "out", monkeypatch, **options)
    touch(source)
    assert write(source, tmp_path / "out", resume=True, **options).resumed_from == 16

    interrupted(source, tmp_path / "out", monkeypatch, **options)
    bitmaps(source, count=40, changed=(3,), time=3_000_000_000)
    with pytest.warns(UserWarning, match="the source has changed: starting afresh"):
        report = write(source, tmp_path / "out", resume=True, **options)
    assert report.resumed_from == 0
    again = write(source, tmp_path / "again", **options)
    assert contents(report.path) == contents(again.path)


def contents(path):
    dataset = LMDBDataset(path, decode=None)
    return [(key, *dataset[i]) for i, (key, _) in enumerate(dataset.samples)]


def test_resume_looks_at_more_than_the_last_item_of_a_dataset(tmp_path, monkeypatch):
    interrupted(Pixels(count=40), tmp_path / "out", monkeypatch)
    with pytest.warns(UserWarning, match="gives other images now: starting afresh"):
        write(Pixels(count=40, changed=(2,)), tmp_path / "out", resume=True)
    interrupted(Pixels(count=40), tmp_path / "out", monkeypatch)
    assert write(Pixels(count=40), tmp_path / "out", resume=True).resumed_from == 16


# ---- a file that is replaced ----


@pytest.mark.parametrize(
    "source",
    [
        lambda root, changed: Pixels(changed=changed),
        lambda root, changed: bitmaps(root, changed=changed),
        lambda root, changed: triples(changed),
    ],
    ids=["dataset", "folder", "triples"],
)
def test_a_worker_that_finds_another_database_of_equal_sizes_refuses_it(tmp_path, source):
    write(source(tmp_path / "source", ()), tmp_path / "db")
    dataset = LMDBDataset(tmp_path / "db")
    dataset[0]  # the parent holds the old one open
    size = os.path.getsize(tmp_path / "db")
    write(source(tmp_path / "source", (1,)), tmp_path / "db")
    assert os.path.getsize(tmp_path / "db") == size
    with pytest.raises(DatabaseError, match="was replaced after this dataset was made") as refused:
        list(DataLoader(dataset, num_workers=1))
    traceback.clear_frames(refused.tb)


# ---- files of earlier versions ----


def as_before(path, entry=schema.META):
    """Take from a file what earlier versions did not write."""
    env = lmdb.open(str(path), subdir=False, max_dbs=4, lock=False)
    with env.begin(write=True) as txn:
        meta = schema.unpack_meta(txn.get(entry), path)
        old = {k: v for k, v in meta.items() if k not in ("identity", "contents", "times")}
        txn.put(entry, schema.pack_meta(old))
    env.close()


def test_databases_and_shards_of_earlier_versions_are_read(tmp_path):
    source = bitmaps(tmp_path / "source")
    write(source, tmp_path / "db", encode="raw")
    as_before(tmp_path / "db")
    assert shows(tmp_path / "db", source)
    assert verify_lmdb(tmp_path / "db", progress=False).count == 12
    convert(source, tmp_path / "out", 0, 1)
    for path in (tmp_path / "out").iterdir():
        as_before(path)
    assert shows(tmp_path / "out", source)
    convert(source, tmp_path / "out", 1)
    refuses(tmp_path / "out", "version of dlhelpers.*shard-00000.*Run rank 0 again")
    convert(source, tmp_path / "out", 0)
    assert shows(tmp_path / "out", source)


def test_a_conversion_that_an_earlier_version_began_starts_afresh(tmp_path, monkeypatch):
    source = bitmaps(tmp_path / "source", count=40)
    interrupted(source, tmp_path / "db", monkeypatch)
    as_before(tmp_path / ".db.part", schema.STATE)
    with pytest.warns(UserWarning, match="begun by an earlier version of dlhelpers: starting"):
        assert write(source, tmp_path / "db", resume=True).resumed_from == 0
    assert shows(tmp_path / "db", source)


class OpensLate:
    """Opens its file with the first image, as readers of HDF5 do."""

    def __init__(self):
        self.pid = None

    def __len__(self):
        return 40

    def __getitem__(self, index):
        self.pid = self.pid or os.getpid()
        if self.pid != os.getpid():
            raise RuntimeError("opened before a fork")
        return pixels(index), 0


def test_what_a_dataset_opens_is_opened_in_the_workers_alone(tmp_path, monkeypatch):
    convert(OpensLate(), tmp_path / "out", 0, 1, workers=1)
    assert len(LMDBDataset(tmp_path / "out")) == 40
    source = OpensLate()
    interrupted(source, tmp_path / "db", monkeypatch, workers=1)
    assert write(source, tmp_path / "db", workers=1, resume=True).resumed_from == 16
    assert source.pid is None


def test_a_conversion_that_was_stopped_at_once_says_so(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(converting.Conversion, "_commit", lambda self, batch: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write(Pixels(), tmp_path / "db")
    with pytest.warns(UserWarning, match="conversion, it was stopped before its first images"):
        assert write(Pixels(), tmp_path / "db", resume=True).count == 12


def test_an_old_database_that_is_written_again_is_another_source(tmp_path):
    for rank, changed in ((0, ()), (1, (2,))):
        write(Pixels(changed=changed), tmp_path / "old", encode="raw")
        as_before(tmp_path / "old")
        convert(LMDBDataset(tmp_path / "old"), tmp_path / "out", rank)
    refuses(tmp_path / "out", "Run rank 0 again")
    convert(LMDBDataset(tmp_path / "old"), tmp_path / "out", 0)
    assert len(LMDBDataset(tmp_path / "out")) == 12


def test_classes_with_several_names_resume_and_make_one_dataset(tmp_path, monkeypatch):
    source = ImageFolder(bitmaps(tmp_path / "source", count=40))
    source.classes = [("tench", "Tinca"), ("goldfish",)]  # as torchvision's ImageNet has them
    convert(source, tmp_path / "out", 0, 1)
    assert LMDBDataset(tmp_path / "out").class_to_idx == {"tench, Tinca": 0, "goldfish": 1}
    interrupted(source, tmp_path / "db", monkeypatch)
    assert write(source, tmp_path / "db", resume=True).resumed_from == 16


@pytest.mark.parametrize("options", [{}, {"resize": 4, "encode": "png"}])
@pytest.mark.parametrize("changed", [(), range(12)])
def test_of_a_copy_with_other_times_some_files_of_each_part_are_read(
    tmp_path, monkeypatch, options, changed
):
    monkeypatch.setattr(comparing, "_MARKS", 4)
    source = bitmaps(tmp_path / "source", count=24)
    (source / "c0" / "003.bmp").write_bytes(b"no image")
    copy = bitmaps(tmp_path / "copy", count=24, changed=changed, time=2_000_000_000)
    (copy / "c0" / "003.bmp").write_bytes(b"no image")
    convert(source, tmp_path / "out", 0, on_error="skip", **options)
    read = []
    load = folder_source.FolderSource.load
    monkeypatch.setattr(
        folder_source.FolderSource,
        "load",
        lambda self, task: read.append(task[1]) or load(self, task),
    )
    convert(copy, tmp_path / "out", 1, on_error="skip", **options)
    assert len(read) == 12 + 4
    if changed:
        refuses(tmp_path / "out", "contents.*Run rank 0 again")
    else:
        assert len(LMDBDataset(tmp_path / "out")) == 23


def test_one_file_that_changed_is_found_among_all(tmp_path, monkeypatch):
    monkeypatch.setattr(comparing, "_MARKS", 4)
    source = bitmaps(tmp_path / "source", count=24)
    convert(source, tmp_path / "out", 0, 1)
    rewrite(source)  # none of the four
    convert(source, tmp_path / "out", 1)
    refuses(tmp_path / "out", "contents.*Run rank 0 again")


def test_marks_outlive_an_interruption(tmp_path, monkeypatch):
    source = bitmaps(tmp_path / "source", count=80)
    interrupted(source, tmp_path / "out", monkeypatch, shard=(0, 2))
    assert write(source, tmp_path / "out", shard=(0, 2), resume=True).resumed_from == 16
    copy = bitmaps(tmp_path / "copy", count=80, time=2_000_000_000)
    convert(copy, tmp_path / "out", 1)
    assert shows(tmp_path / "out", source)


class Counted(Pixels):
    loads = 0

    def __getitem__(self, index):
        Counted.loads += 1
        return super().__getitem__(index)


def test_a_rank_looks_at_a_small_share_of_a_dataset(tmp_path):
    for rank in range(2):
        Counted.loads = 0
        convert(Counted(count=1600), tmp_path / "out", rank)
        assert Counted.loads <= 800 * 1.05


ODD_NAMES = ['a],"total":1', '"classes":[', '\\"],\\"total":', "é\ud800", "", "null"]


def test_all_shards_share_one_list_of_classes_and_read_it_once(tmp_path):
    images = TensorDataset(torch.zeros(8, 3, 8, 8, dtype=torch.uint8), torch.arange(8))
    images.classes = [*ODD_NAMES, *(f"class {n}" for n in range(2000))]
    write_lmdb(images, tmp_path / "db", shards=8, progress=False)
    whole = LMDBDataset(tmp_path / "db")
    assert whole.classes == images.classes
    lists = [meta["classes"] for meta in whole._metas]
    assert all(one is lists[0] for one in lists)
    whole.classes.clear()  # which is the user's own
    assert LMDBDataset(tmp_path / "db").classes == images.classes
    one = len(pickle.dumps(images.classes))
    copy = pickle.dumps(LMDBDataset(tmp_path / "db"))
    assert len(copy) < 2 * one
    again = pickle.loads(pickle.dumps(pickle.loads(copy)))
    assert again[7][1] == 7
    write_lmdb(images, tmp_path / "db", shards=8, encode="png", progress=False)
    with pytest.raises(DatabaseError, match="was replaced"):
        pickle.loads(copy)[0]
    del images.classes
    write_lmdb(images, tmp_path / "none.lmdb", progress=False)
    assert LMDBDataset(tmp_path / "none.lmdb").classes is None


def test_each_shard_is_read_once_for_all_that_follow(tmp_path, monkeypatch):
    """Every one that is finished is compared with all others."""
    folder = tmp_path / "photos" / "a"
    folder.mkdir(parents=True)
    for number in range(12):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number:02d}.png")
    read: list[str] = []
    unpack = schema.unpack_meta
    monkeypatch.setattr(
        schema, "unpack_meta", lambda entry, path: (read.append(path.name), unpack(entry, path))[1]
    )
    write_lmdb(tmp_path / "photos", tmp_path / "db", shards=12, progress=False)
    assert max(map(read.count, read)) <= 2
    assert len(LMDBDataset(tmp_path / "db")) == 12
