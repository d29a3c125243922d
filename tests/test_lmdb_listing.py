"""One scan of a folder serves all ranks, and any number of shards any number of writers."""

import io
import os
import pickle
import random
import shutil

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
    Listing,
    LMDBDataset,
    SourceError,
    listing,
    scanning,
    schema,
    sharing,
    verify_lmdb,
    write_listing,
    write_lmdb,
)

ODD_NAMES = (b"caf\xe9.bmp", b"two\nlines.bmp", "ü 日本.bmp".encode(), b"UPPER.BMP", b".bmp")


def write(source, path, **options):
    return write_lmdb(source, path, **{"progress": False} | options)


def picture(path, number, time=1_000_000_000):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    rng = np.random.default_rng(number)
    image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
    with open(path, "wb") as file:
        image.save(file, "bmp")
    os.utime(path, (time, time))


def photos(root, count=20):
    """Images of three classes, some in deep folders or of odd names, beside other files."""
    for number in range(count):
        inside = "deep/er/" * (number % 4 == 1)
        picture(f"{root}/c{3 * number // count}/{inside}{number:03d}.bmp", number)
    for number, name in enumerate(ODD_NAMES):
        picture(os.path.join(os.fsencode(root), b"c1", name), 1000 + number)
    (root / "c2" / "notes.txt").write_text("no image")
    return root


def stored(path):
    dataset = LMDBDataset(path, decode=None)
    return [dataset.stored(index) for index in range(len(dataset))]


def files(root):
    """(key, target, bytes) in the order of ImageFolder."""
    dataset = ImageFolder(root)
    return [
        (os.path.relpath(path, root), target, open(path, "rb").read())
        for path, target in dataset.samples
    ]


@pytest.fixture(scope="module")
def scanned(tmp_path_factory):
    """A folder and its listing in blocks of four, both to be read only."""
    root = photos(tmp_path_factory.mktemp("scanned") / "photos")
    path = root.with_name("listing")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scanning, "_BLOCK", 4)
        write_listing(root, path, progress=False)
    return root, path


# ---- what a listing gives ----


@pytest.mark.parametrize("world", [2, 7])
def test_shards_of_a_listing_hold_what_image_folder_reads(world, scanned, tmp_path):
    root, path = scanned
    for rank in range(world):
        write(path, tmp_path / "out", shard=(rank, world))
    assert stored(tmp_path / "out") == files(root)
    assert LMDBDataset(tmp_path / "out").classes == ImageFolder(root).classes


def test_more_ranks_than_images(tmp_path):
    root = photos(tmp_path / "photos", count=3)
    shutil.rmtree(root / "c1")
    write_listing(root, tmp_path / "l", progress=False)
    for rank in range(4):
        write(tmp_path / "l", tmp_path / "out", shard=(rank, 4))
    assert stored(tmp_path / "out") == files(root)


def test_a_listing_is_a_source_without_shards_too(scanned, tmp_path):
    root, path = scanned
    report = write(path, tmp_path / "db")
    assert (stored(tmp_path / "db"), report.ignored) == (files(root), ("c2/notes.txt",))
    source = Listing(path)
    in_worker = pickle.loads(pickle.dumps(source))
    assert [in_worker.load(task) for task in source.tasks()] == list(
        map(source.load, source.tasks())
    )


def test_a_listing_of_an_image_folder_is_that_of_its_files(scanned, tmp_path):
    root, path = scanned
    write_listing(ImageFolder(root), tmp_path / "of_dataset", threads=3, progress=False)
    assert list(Listing(tmp_path / "of_dataset").tasks()) == list(Listing(path).tasks())
    for source in (ImageFolder(root, transform=str), Subset(ImageFolder(root), [0])):
        with pytest.raises(TypeError, match="an ImageFolder that reads its files as they are"):
            write_listing(source, tmp_path / "none", progress=False)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 25), st.integers(0, 25))
def test_any_part_is_read_alone(scanned, first, last):
    source = Listing(scanned[1])
    whole = list(source.tasks())
    assert list(source.part(range(first, last))) == whole[first:last]


def test_a_rank_reads_its_blocks_alone(scanned, monkeypatch):
    source, read = Listing(scanned[1]), []
    block = source._block
    monkeypatch.setattr(source, "_block", lambda *args: read.append(args[0]) or block(*args))
    share = sharing.Share(source, (2, 5))  # images 10 to 14 of 25
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", lambda *path, **_: pytest.fail(f"looks at {path}"))
        share.look(0)
        assert len(list(share.tasks())) == 5
    assert read == [2, 3]


# ---- files that are no longer as they were listed ----


def shortened(path):
    path.write_bytes(path.read_bytes()[:-1])
    os.utime(path, (1_000_000_000, 1_000_000_000))


CHANGES = {
    "has": shortened,
    "modified at": lambda path: picture(str(path), 999, time=2_000_000_000),
    "no longer there": lambda path: path.unlink(),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_file_is_named_or_skipped(what, tmp_path):
    root = photos(tmp_path / "photos")
    write_listing(root, tmp_path / "l", progress=False)
    expected = files(root)
    CHANGES[what](root / "c0" / "002.bmp")
    with pytest.raises(SourceError, match=rf"c0/002\.bmp: .*{what}.*list the folder again"):
        write(tmp_path / "l", tmp_path / "db")
    report = write(tmp_path / "l", tmp_path / "db", on_error="skip")
    assert [name for name, _ in report.skipped] == ["c0/002.bmp"]
    assert stored(tmp_path / "db") == [item for item in expected if item[0] != "c0/002.bmp"]


def test_a_new_file_is_not_taken(tmp_path):
    root = photos(tmp_path / "photos")
    write_listing(root, tmp_path / "l", progress=False)
    expected = files(root)
    picture(str(root / "c0" / "new.bmp"), 5)
    write(tmp_path / "l", tmp_path / "db")
    assert stored(tmp_path / "db") == expected


def test_a_copy_elsewhere_is_compared_by_sizes_and_says_so(tmp_path):
    root = photos(tmp_path / "photos")
    write_listing(root, tmp_path / "l", progress=False)
    expected = files(root)
    shutil.copytree(root, tmp_path / "copy", copy_function=shutil.copyfile)
    shutil.rmtree(root)
    with pytest.raises(FileNotFoundError, match="is no folder here: give the place"):
        write(tmp_path / "l", tmp_path / "db")
    report = write(Listing(tmp_path / "l", root=tmp_path / "copy"), tmp_path / "db")
    assert stored(tmp_path / "db") == expected
    assert "modification times are not" in str(report)


def test_a_folder_that_is_mounted_elsewhere_is_compared_by_times_too(tmp_path):
    root = photos(tmp_path / "photos")
    write_listing(root, tmp_path / "l", progress=False)
    root.rename(tmp_path / "mounted")  # the same folder under another path
    picture(str(tmp_path / "mounted" / "c0" / "002.bmp"), 999, time=2_000_000_000)
    with pytest.raises(SourceError, match=r"c0/002\.bmp: changed since it was listed"):
        write(Listing(tmp_path / "l", root=tmp_path / "mounted"), tmp_path / "db")


# ---- which shards belong together ----


def test_shards_of_a_listing_and_of_the_same_scan_belong_together(scanned, tmp_path):
    root, path = scanned
    write(path, tmp_path / "out", shard=(0, 2))
    write(root, tmp_path / "out", shard=(1, 2))
    assert stored(tmp_path / "out") == files(root)


@pytest.mark.parametrize("second", ["listing", "folder"])
@pytest.mark.parametrize("change", ["content", "name", "size"])
def test_shards_of_two_scans_never_mix(change, second, tmp_path):
    root = photos(tmp_path / "photos")
    write_listing(root, tmp_path / "l", progress=False)
    write(tmp_path / "l", tmp_path / "out", shard=(0, 2))
    if change == "content":
        picture(str(root / "c0" / "000.bmp"), 999, time=2_000_000_000)
    elif change == "name":
        (root / "c2" / "019.bmp").rename(root / "c2" / "020.bmp")
    else:
        shortened(root / "c0" / "000.bmp")
    source = root
    if second == "listing":
        source = tmp_path / "again"
        write_listing(root, source, progress=False)
    write(source, tmp_path / "out", shard=(1, 2))
    with pytest.raises(DatabaseError, match="the shards differ in"):
        LMDBDataset(tmp_path / "out")


def test_an_interrupted_conversion_is_not_continued_with_another_listing(tmp_path, monkeypatch):
    root = photos(tmp_path / "photos")
    (root / "c2" / "019.bmp").write_bytes(b"no image")
    os.utime(root / "c2" / "019.bmp", (1_000_000_000,) * 2)
    write_listing(root, tmp_path / "l", progress=False)
    with pytest.raises(SourceError):
        write(tmp_path / "l", tmp_path / "db")
    picture(str(root / "c0" / "000.bmp"), 999, time=2_000_000_000)  # of the same size
    picture(str(root / "c2" / "019.bmp"), 19)
    write_listing(root, tmp_path / "l", progress=False)
    with pytest.warns(UserWarning, match="starting afresh"):
        assert write(tmp_path / "l", tmp_path / "db", resume=True).resumed_from == 0
    assert stored(tmp_path / "db") == files(root)


def test_an_interrupted_conversion_is_continued_with_its_listing(tmp_path):
    root = photos(tmp_path / "photos")
    write_listing(root, tmp_path / "l", progress=False)
    good = (root / "c2" / "019.bmp").read_bytes()
    (root / "c2" / "019.bmp").unlink()
    with pytest.raises(SourceError, match=r"23 images are kept"):
        write(tmp_path / "l", tmp_path / "db")
    (root / "c2" / "019.bmp").write_bytes(good)
    os.utime(root / "c2" / "019.bmp", (1_000_000_000,) * 2)
    assert write(tmp_path / "l", tmp_path / "db", resume=True).resumed_from == 23
    assert stored(tmp_path / "db") == files(root)


# ---- the file itself ----


def test_a_damaged_listing_is_refused(scanned, tmp_path):
    """Every byte of the end and some of each block: what is read differs, or is refused."""
    data = scanned[1].read_bytes()
    tasks = list(Listing(scanned[1]).tasks())
    rng = random.Random(0)
    damaged = tmp_path / "damaged"
    for at in [*rng.sample(range(len(data)), 60), *range(len(data) - 26, len(data)), 0, 18, 19]:
        damaged.write_bytes(
            data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
        )
        with pytest.raises(SourceError, match=r"damaged|no listing|of version"):
            assert list(Listing(damaged).tasks()) == tasks
    for size in rng.sample(range(19, len(data)), 20):
        damaged.write_bytes(data[:size])
        with pytest.raises(SourceError, match="damaged"):
            Listing(damaged)


def test_a_listing_of_a_later_version_says_so(tmp_path):
    (tmp_path / "l").write_bytes(b"dlhelpers-listing 2\n" + bytes(100))
    with pytest.raises(SourceError, match="version b'2', this package reads version 1"):
        write(tmp_path / "l", tmp_path / "db")


def test_a_listing_replaces_a_listing_and_nothing_else(scanned, tmp_path):
    root, _ = scanned
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(FileExistsError, match="is no listing"):
        write_listing(root, tmp_path / "notes", progress=False)
    for path in (root, tmp_path / "notes"):
        with pytest.raises(SourceError, match="is no listing: write one"):
            Listing(path)
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    with pytest.raises(SourceError, match="holds no image"):
        write_listing(tmp_path / "empty", tmp_path / "l", progress=False)
    assert sorted(os.listdir(tmp_path)) == ["empty", "notes"]


def test_a_scan_that_fails_leaves_the_old_listing(scanned, tmp_path, monkeypatch):
    shutil.copy(scanned[1], tmp_path / "l")
    monkeypatch.setattr(scanning, "pack_meta", lambda header: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_listing(scanned[0], tmp_path / "l", progress=False)
    assert (tmp_path / "l").read_bytes() == scanned[1].read_bytes()
    assert os.listdir(tmp_path) == ["l"]


def test_problems_of_the_folder_are_in_the_listing(tmp_path):
    root = photos(tmp_path / "photos")
    (root / "empty").mkdir()
    os.symlink("nowhere", root / "c0" / "link.bmp")
    report = write_listing(root, tmp_path / "l", progress=False)
    assert "empty/: the class folder holds no image" in str(report)
    with pytest.raises(SourceError, match="empty/"):
        write(tmp_path / "l", tmp_path / "db")
    report = write(tmp_path / "l", tmp_path / "db", on_error="skip")
    assert [name for name, _ in report.skipped] == ["empty/", "c0/link.bmp"]


# ---- more shards than writers ----


@pytest.mark.parametrize(("shards", "world"), [(1, 1), (7, 3), (2, 3)])
def test_writers_share_any_number_of_shards(shards, world, scanned, tmp_path):
    root, path = scanned
    for rank in reversed(range(world)):
        source = path if rank % 2 else root
        report = write(source, tmp_path / "out", shards=shards, shard=(rank, world))
        assert f"{len(range(rank, shards, world))} of {shards} shard" in str(report)
    assert len(list((tmp_path / "out").glob("shard-*"))) == shards
    assert stored(tmp_path / "out") == files(root)


@pytest.mark.parametrize("kind", ["dataset", "triples", "database"])
def test_every_source_is_written_in_shards(kind, scanned, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (10, 3, 8, 8), np.uint8)
    source = TensorDataset(torch.from_numpy(images), torch.arange(10))
    if kind == "triples":
        source = [(key, data, target) for key, target, data in files(scanned[0])[:10]]
    elif kind == "database":
        write(source, tmp_path / "db")
        source = LMDBDataset(tmp_path / "db")
    write(source, tmp_path / "one")
    assert write(source, tmp_path / "out", shards=4).count == 10
    assert stored(tmp_path / "out") == stored(tmp_path / "one")
    report = write(source, tmp_path / "out", shards=4, resume=True)
    assert "4 of 4 shards, 4 of them already complete" in str(report)


def test_the_source_is_looked_at_once_for_all_shards(scanned, tmp_path, monkeypatch):
    looked = []
    stat = os.stat
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", lambda path, **kw: looked.append(path) or stat(path, **kw))
        write(scanned[0], tmp_path / "out", shards=5)
    images = [path for path in looked if str(path).endswith((".bmp", ".BMP"))]
    assert len(images) == 25 + 25  # once, and the few that a shard's meta entry tells: here all


def test_whole_shards_are_kept_and_others_written(scanned, tmp_path):
    root, _ = scanned
    write(root, tmp_path / "out", shards=4)
    files_ = sorted((tmp_path / "out").iterdir())
    files_[1].unlink()
    before = [file.stat().st_ino for file in files_ if file.exists()]
    report = write(root, tmp_path / "out", shards=4, resume=True)
    assert "4 of 4 shards, 3 of them already complete" in str(report)
    assert (report.count, report.resumed_from) == (25, 25 - 6)
    assert [file.stat().st_ino for file in files_ if file != files_[1]] == before


@pytest.mark.parametrize("change", ["settings", "content", "skipped"])
def test_shards_of_something_else_are_written_again(change, tmp_path):
    root, options = photos(tmp_path / "photos"), {}
    bad = root / "c0" / "003.bmp"
    good = bad.read_bytes()
    if change == "skipped":
        bad.write_bytes(bytes(len(good)))
        os.utime(bad, (1_000_000_000,) * 2)
    write(root, tmp_path / "out", shards=3, on_error="skip")
    if change == "settings":
        options = {"encode": "png"}
    elif change == "content":
        picture(str(root / "c0" / "000.bmp"), 999, time=2_000_000_000)
    else:
        bad.write_bytes(good)
        os.utime(bad, (1_000_000_000,) * 2)
    write(root, tmp_path / "out", shards=3, resume=True, **options)
    if change == "settings":
        assert all(image[:4] == b"\x89PNG" for _, _, image in stored(tmp_path / "out"))
    else:
        assert stored(tmp_path / "out") == files(root)


def test_an_iterator_cannot_fill_several_shards(scanned, tmp_path):
    items = ((key, data, target) for key, target, data in files(scanned[0]))
    with pytest.raises(SourceError, match="gives its items only once, and 2 shards"):
        write(items, tmp_path / "out", shards=2)
    for shards in (0, -1, 2.5, True, 100_000):
        with pytest.raises(ValueError, match="shards must be a whole number"):
            write(scanned[0], tmp_path / "out", shards=shards)
    assert not list(tmp_path.glob("out/*"))


# ---- the command ----


def test_the_command_lists_and_writes(scanned, tmp_path, capsys, monkeypatch):
    root, _ = scanned
    assert main(["lmdb", "list", str(root), str(tmp_path / "l"), "--quiet"]) == 0
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        options = ["--shard", "torchrun", "--shards", "3", "--root", str(root), "--quiet"]
        assert main(["lmdb", "write", str(tmp_path / "l"), str(tmp_path / "out"), *options]) == 0
    assert "25 images of 3 classes" in capsys.readouterr().out
    assert stored(tmp_path / "out") == files(root)
    for _, key, target, _, _ in Listing(tmp_path / "l").tasks():
        assert schema.decode_key(schema.encode_key(key)) == key
        assert target < 3


def test_a_list_is_gone_through_twice_however_many_shards(tmp_path):
    """Once to know all of it, once to write it."""

    class Counted(list):
        taken = 0

        def __iter__(self):
            for item in list.__iter__(self):
                Counted.taken += 1
                yield item

    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, "PNG")
    images = Counted((f"key {n}", buffer.getvalue(), n) for n in range(60))
    write_lmdb(images, tmp_path / "db", shards=12, progress=False)
    assert Counted.taken <= 2 * 60
    assert LMDBDataset(tmp_path / "db").targets == list(range(60))
    single = tmp_path / "single"
    for rank in range(12):  # the same identity, whoever looked
        write_lmdb(list(images), single, shard=(rank, 12), progress=False)
    write_lmdb(list(images), single, shards=12, resume=True, progress=False)
    assert "12 of them already complete" in str(
        write_lmdb(list(images), single, shards=12, resume=True, progress=False)
    )


def pictures(root, count=6):
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, "PNG")
    for number in range(count):
        path = root / f"c{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(buffer.getvalue())
    return root


def test_a_listing_can_be_sent_to_another_process(tmp_path, monkeypatch):
    source = pictures(tmp_path / "photos")
    write_listing(source, tmp_path / "photos.listing", progress=False)
    monkeypatch.chdir(tmp_path)
    sent = pickle.dumps(Listing("photos.listing", root=source))
    monkeypatch.chdir(source)
    assert write_lmdb(pickle.loads(sent), tmp_path / "db", progress=False).count == 6


def test_a_file_of_the_far_future_is_listed(tmp_path):
    source = pictures(tmp_path / "photos")
    os.utime(source / "c0" / "0.png", ns=(0, 10_413_792_000_000_000_000))
    write_listing(source, tmp_path / "photos.listing", progress=False)
    assert write_lmdb(tmp_path / "photos.listing", tmp_path / "db", progress=False).count == 6


def test_a_copy_at_the_root_of_a_mount_is_a_copy(tmp_path, monkeypatch):
    """The roots of two mounts have the same inode."""
    source, copy = pictures(tmp_path / "photos"), tmp_path / "copy"
    write_listing(source, tmp_path / "photos.listing", progress=False)
    shutil.copytree(source, copy, copy_function=shutil.copyfile)
    place = listing.folder_place(source)
    monkeypatch.setattr(listing, "folder_place", lambda root: place)
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    report = write_lmdb(Listing(tmp_path / "photos.listing", copy), tmp_path / "db", progress=False)
    assert report.count == 6
    assert "is not the folder that was listed" in str(report)


def test_a_problem_that_is_gone_is_not_listed_after_a_stop_at_the_end(tmp_path, monkeypatch):
    source = pictures(tmp_path / "photos")
    (source / "c9").mkdir()

    def stops(*paths):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stops)
        with pytest.raises(KeyboardInterrupt):
            write_lmdb(source, tmp_path / "db", on_error="skip", progress=False)
    shutil.copy(source / "c0" / "0.png", source / "c9" / "0.png")
    options = {"on_error": "skip", "resume": True, "progress": False}
    assert write_lmdb(source, tmp_path / "db", **options).count == 7
    assert verify_lmdb(tmp_path / "db", progress=False).count == 7


def test_shards_do_not_become_a_class_of_their_source(tmp_path):
    source = pictures(tmp_path / "photos")
    write_listing(source, tmp_path / "photos.listing", progress=False)
    for one in (source, tmp_path / "photos.listing", ImageFolder(source)):
        for options in ({"shards": 2}, {"shard": (0, 2)}):
            with pytest.raises(ValueError, match="would become a class of it"):
                write_lmdb(one, source / "db", progress=False, **options)
    assert sorted(os.listdir(source)) == ["c0", "c1"]


def test_what_was_skipped_is_tried_again(tmp_path):
    source = pictures(tmp_path / "photos")
    write_listing(source, tmp_path / "photos.listing", progress=False)
    options = {"shards": 3, "on_error": "skip", "resume": True, "progress": False}
    (source / "c0" / "0.png").rename(tmp_path / "away.png")
    assert write_lmdb(tmp_path / "photos.listing", tmp_path / "db", **options).count == 5
    (tmp_path / "away.png").rename(source / "c0" / "0.png")
    report = write_lmdb(tmp_path / "photos.listing", tmp_path / "db", **options)
    assert (report.count, report.skipped) == (6, ())
    assert "2 of them already complete" in str(report)
