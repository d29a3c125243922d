"""Kills, full disks, damaged files: nothing is lost, half visible, or silently wrong."""

import errno
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fresh
import lmdb
import pytest
from interrupts import heeding
from torchvision.datasets import ImageFolder

from dlhelpers.__main__ import main
from dlhelpers.course import data
from dlhelpers.lmdb_io import (
    DatabaseError,
    LMDBDataset,
    SourceError,
    converting,
    failures,
    info_lmdb,
    reading_apart,
    resuming,
    schema,
    verify_lmdb,
    write_lmdb,
)
from dlhelpers.printable import printable

COUNT = 240
posix = pytest.mark.skipif(os.name == "nt", reason="signals and limits of POSIX")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("faults") / "photos"
    return data.photos(root, count=COUNT, size=32, progress=False)


@pytest.fixture(scope="module")
def whole(photos):
    path = photos.parent / "whole.lmdb"
    write_lmdb(photos, path, progress=False)
    return contents(path)


def contents(path):
    dataset = LMDBDataset(path, decode=None)
    return [(key, *dataset[i]) for i, (key, _) in enumerate(dataset.samples)]


# a conversion with small commits that says when each of them is done, and waits to be let go on
CHILD = """
import sys
from dlhelpers.lmdb_io import converting, write_lmdb
converting._COMMIT_BYTES = 1
commit = converting.Conversion._commit
def told(self, batch):
    commit(self, batch)
    print(self.done, flush=True)
    sys.stdin.readline()
converting.Conversion._commit = told
write_lmdb(sys.argv[1], sys.argv[2], workers=int(sys.argv[3]), progress=False, resume=True)
print("whole", flush=True)
"""


def conversion(source, path, workers=0, start=None):
    begin = f"import multiprocessing; multiprocessing.set_start_method({start!r})"
    child = heeding(begin + CHILD)
    command = [sys.executable, "-c", child, str(source), str(path), str(workers)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def kill_after(child, lines):
    """Let a conversion reach its n-th commit, let it go on, and kill it; return images done."""
    done = ""
    for _ in range(lines):
        done = child.stdout.readline()
        child.stdin.write("\n")
        child.stdin.flush()
    child.kill()
    child.communicate()
    return done.strip()


def left_in(folder):
    return sorted(name for name in os.listdir(folder) if name != "photos")


def survives_kills(photos, whole, folder, kills, workers=0):
    """Kill a conversion over an old database up to five times, then let it end.

    A kill comes while the commit after the last one that was read is at work or done: five kills
    see 12 of the 15 at most.
    """
    old = [("old", photos.joinpath("china", "0000000.jpg").read_bytes(), 7)]
    write_lmdb(old, folder / "db", progress=False)
    before = (folder / "db").read_bytes()
    for number in range(kills):
        child = conversion(photos, folder / "db", workers)
        done = kill_after(child, lines=1 + number % 2)
        assert 0 < int(done) < COUNT
        assert (folder / "db").read_bytes() == before
        assert verify_lmdb(folder / "db", progress=False).count == 1
    report = write_lmdb(photos, folder / "db", progress=False, resume=True)
    assert report.resumed_from > 0
    assert contents(folder / "db") == whole
    assert verify_lmdb(folder / "db", progress=False).count == COUNT
    assert left_in(folder) == ["db"]


@posix
def test_a_killed_conversion_leaves_the_old_database_and_goes_on(photos, whole, tmp_path):
    survives_kills(photos, whole, tmp_path, kills=2)


@posix
def test_a_killed_conversion_with_workers_goes_on(photos, whole, tmp_path):
    survives_kills(photos, whole, tmp_path, kills=1, workers=2)


@posix
@pytest.mark.slow
def test_fifty_kills_lose_nothing(photos, whole, tmp_path):
    for round_ in range(10):
        folder = tmp_path / f"{round_}"
        folder.mkdir()
        survives_kills(photos, whole, folder, kills=5)


@posix
@posix
def test_no_worker_of_a_forking_server_outlives_its_conversion(photos, tmp_path):
    psutil = pytest.importorskip("psutil", reason="psutil (extra dev)")
    child = conversion(photos, tmp_path / "db", workers=1, start="forkserver")
    assert child.stdout.readline()
    started = psutil.Process(child.pid).children(recursive=True)
    child.kill()
    child.communicate()
    _, alive = psutil.wait_procs(started, timeout=30)
    assert len(started) >= 2  # the server is one of them
    assert alive == []


def test_a_kill_before_the_rename_costs_nothing(photos, whole, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_lmdb(photos, tmp_path / "db", progress=False)
    monkeypatch.undo()
    report = write_lmdb(photos, tmp_path / "db", progress=False, resume=True)
    assert report.resumed_from == COUNT
    assert contents(tmp_path / "db") == whole


@posix
@pytest.mark.parametrize(
    "how", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_no_worker_outlives_its_conversion(photos, tmp_path, how):
    psutil = pytest.importorskip("psutil", reason="psutil (extra dev)")
    child = conversion(photos, tmp_path / "db", workers=2)
    child.stdout.readline()
    workers = psutil.Process(child.pid).children(recursive=True)
    assert len(workers) >= 2
    child.send_signal(how)
    child.communicate()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert alive == []
    assert not (tmp_path / "db").exists()


def interrupted(photos, path, monkeypatch, at=100, **options):
    """Stop a conversion at an item, in this process."""
    monkeypatch.setattr(converting, "_COMMIT_BYTES", 1)
    commit = converting.Conversion._commit

    def stops(self, batch):
        commit(self, batch)
        if self.done >= at:
            raise KeyboardInterrupt

    monkeypatch.setattr(converting.Conversion, "_commit", stops)
    with pytest.raises(KeyboardInterrupt) as stopped:
        write_lmdb(photos, path, progress=False, **options)
    monkeypatch.undo()
    assert "images are kept: resume=True" in stopped.value.__notes__[0]


def test_ctrl_c_keeps_what_was_converted(photos, whole, tmp_path, monkeypatch):
    interrupted(photos, tmp_path / "db", monkeypatch)
    assert not (tmp_path / "db").exists()
    report = write_lmdb(photos, tmp_path / "db", progress=False, resume=True)
    assert 100 <= report.resumed_from < COUNT
    assert contents(tmp_path / "db") == whole


def test_without_resume_it_starts_afresh(photos, whole, tmp_path, monkeypatch):
    interrupted(photos, tmp_path / "db", monkeypatch)
    assert write_lmdb(photos, tmp_path / "db", progress=False).resumed_from == 0
    assert contents(tmp_path / "db") == whole


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("settings", r"its settings were .*'resize': None"),
        ("rewritten file", "the source has changed"),
        ("removed files", "the source has"),
        ("new class", "its classes were"),
    ],
)
def test_another_source_or_setting_starts_afresh_and_says_so(
    photos, tmp_path, monkeypatch, change, why
):
    source = shutil.copytree(photos, tmp_path / "photos")
    interrupted(source, tmp_path / "db", monkeypatch)
    options = {}
    if change == "settings":
        options["resize"] = 16
    elif change == "rewritten file":  # a JPEG of the same size, with another density
        path = source / "china" / "0000000.jpg"
        content = path.read_bytes()
        path.write_bytes(content[:15] + bytes([content[15] ^ 2]) + content[16:])
        os.utime(path, (1, 1))
    elif change == "removed files":
        for path in sorted(source.glob("*/*.jpg"))[::2]:
            path.unlink()
    else:
        shutil.copytree(source / "china", source / "abroad")
    with pytest.warns(UserWarning, match=f"cannot go on .*{why}.*starting afresh"):
        report = write_lmdb(source, tmp_path / "db", progress=False, resume=True, **options)
    assert report.resumed_from == 0
    assert report.count == len(ImageFolder(source))


def test_a_bad_image_stops_and_once_mended_the_rest_follows(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(converting, "_COMMIT_BYTES", 1)
    source = shutil.copytree(photos, tmp_path / "photos")
    bad = sorted((source / "flower").iterdir())[50]
    good = bad.read_bytes()
    bad.write_bytes(good[: len(good) // 2])
    with pytest.raises(SourceError, match=rf"flower/{bad.name}: not an image.*resume=True"):
        write_lmdb(source, tmp_path / "db", progress=False)
    bad.write_bytes(good)
    report = write_lmdb(source, tmp_path / "db", progress=False, resume=True)
    assert report.resumed_from == 170
    assert report.count == COUNT


def test_what_was_skipped_before_the_stop_is_listed_after_it(photos, tmp_path, monkeypatch):
    source = shutil.copytree(photos, tmp_path / "photos")
    (source / "china" / "0000000.jpg").write_bytes(b"")
    (source / "flower" / "0000001.jpg").write_bytes(b"no image")
    interrupted(source, tmp_path / "db", monkeypatch, on_error="skip")
    options = {"progress": False, "resume": True, "on_error": "skip"}
    report = write_lmdb(source, tmp_path / "db", **options)
    assert [name for name, _ in report.skipped] == ["china/0000000.jpg", "flower/0000001.jpg"]
    assert report.count == COUNT - 2
    assert info_lmdb(tmp_path / "db").skipped == report.skipped


def test_an_iterator_goes_on_behind_what_it_gives_again(photos, tmp_path, monkeypatch):
    def items(changed=False):
        for number, (path, target) in enumerate(ImageFolder(photos).samples):
            key = "other" if changed and number == 5 else f"{number}"
            yield key, Path(path).read_bytes(), target

    interrupted(items(), tmp_path / "db", monkeypatch)
    with (
        pytest.warns(UserWarning, match="starting afresh"),
        pytest.raises(SourceError, match="gives its items only once, and the source has changed"),
    ):
        write_lmdb(items(True), tmp_path / "db", progress=False, resume=True)
    interrupted(items(), tmp_path / "db", monkeypatch)
    report = write_lmdb(items(), tmp_path / "db", progress=False, resume=True)
    assert report.resumed_from >= 100
    assert report.count == COUNT


def test_a_dataset_that_gives_other_images_now_starts_afresh(photos, tmp_path, monkeypatch):
    class Changing:
        shift = 0

        def __len__(self):
            return COUNT

        def __getitem__(self, index):
            return ImageFolder(photos)[(index + self.shift) % COUNT]

    interrupted(Changing(), tmp_path / "db", monkeypatch)
    other = Changing()
    other.shift = 1
    with pytest.warns(UserWarning, match="gives other images now: starting afresh"):
        report = write_lmdb(other, tmp_path / "db", progress=False, resume=True)
    assert report.resumed_from == 0
    interrupted(Changing(), tmp_path / "db", monkeypatch)
    assert write_lmdb(Changing(), tmp_path / "db", progress=False, resume=True).resumed_from >= 100


def test_the_file_is_on_the_disk_before_it_has_its_name(photos, tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace

    def synced(handle):
        order.append(("sync", os.fstat(handle).st_size > 100_000))
        fsync(handle)

    def renamed(source, target):
        order.append(("rename", True))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    write_lmdb(photos, tmp_path / "db", progress=False)
    assert order[-3:] == [("sync", True), ("rename", True), ("sync", False)]


@pytest.mark.parametrize("boots", [("before", "after"), ("", "")])  # "": where none is told
def test_after_a_crash_of_the_machine_only_a_sound_part_is_taken_up(
    photos, tmp_path, monkeypatch, boots
):
    monkeypatch.setattr(resuming, "boot_id", lambda: boots[0])
    interrupted(photos, tmp_path / "db", monkeypatch)
    monkeypatch.setattr(resuming, "boot_id", lambda: boots[1])
    partial = tmp_path / ".db.part"
    sound = partial.read_bytes()
    assert write_lmdb(photos, tmp_path / "db", progress=False, resume=True).resumed_from >= 100

    damaged = bytearray(sound)
    image = (photos / "china" / "0000010.jpg").read_bytes()
    damaged[sound.find(image) + 100] ^= 4
    for content, why in ((bytes(damaged), "damaged when the machine"), (sound[:20_000], "")):
        partial.write_bytes(content)
        with pytest.warns(UserWarning, match=f"{why}.*starting afresh"):
            report = write_lmdb(photos, tmp_path / "db", progress=False, resume=True)
        assert (report.resumed_from, report.count) == (0, COUNT)


# ---- the lock ----


def test_two_conversions_into_one_file_do_not_mix(photos, whole, tmp_path):
    child = conversion(photos, tmp_path / "db")
    child.stdout.readline()
    with pytest.raises(BlockingIOError, match="another process is converting into"):
        write_lmdb(photos, tmp_path / "db", progress=False)
    child.communicate("\n" * 100)
    assert contents(tmp_path / "db") == whole


@posix
def test_the_lock_of_a_killed_writer_does_not_block(photos, tmp_path):
    child = conversion(photos, tmp_path / "db")
    kill_after(child, 1)
    assert (tmp_path / ".db.lock").exists()
    assert write_lmdb(photos, tmp_path / "db", progress=False).count == COUNT
    assert left_in(tmp_path) == ["db"]


@posix
@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_mount_without_locks_says_so_and_can_do_without(photos, tmp_path, monkeypatch, code):
    import fcntl

    def fails(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "lockf", fails)
    with pytest.raises(
        OSError, match=r"gives no lock \(.*-o flock.*lock=False \(--no-lock\)"
    ) as no:
        write_lmdb(photos, tmp_path / "db", progress=False)
    assert no.value.errno == code
    assert left_in(tmp_path) == []
    assert main(["lmdb", "write", str(photos), str(tmp_path / "db"), "--quiet", "--no-lock"]) == 0
    assert left_in(tmp_path) == ["db"]


def test_without_a_lock_threads_of_one_process_are_kept_apart(photos, tmp_path):
    image = (photos / "china" / "0000000.jpg").read_bytes()

    def items():
        with pytest.raises(BlockingIOError, match="is converting into"):
            write_lmdb([("b", image, 0)], tmp_path / "db", progress=False, lock=False)
        yield "a", image, 0

    assert write_lmdb(items(), tmp_path / "db", progress=False, lock=False).count == 1


# ---- disks ----


@posix
def test_a_file_over_the_limit_is_a_clear_error_and_goes_on_later(photos, whole, tmp_path):
    code = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, resource.RLIM_INFINITY))\n"
        "from dlhelpers.__main__ import main\n"
        "from dlhelpers.lmdb_io import converting\n"
        "converting._COMMIT_BYTES = 1\n"
        "sys.exit(main(['lmdb', 'write', sys.argv[1], sys.argv[2], '--quiet']))\n"
    )
    done = fresh.run(code, photos, tmp_path / "db")
    assert done.returncode == 2
    assert "the file is larger than the limit" in done.stderr
    assert "images are kept: resume=True" in done.stderr
    assert not (tmp_path / "db").exists()
    report = write_lmdb(photos, tmp_path / "db", progress=False, resume=True)
    assert report.resumed_from > 0
    assert contents(tmp_path / "db") == whole


@pytest.fixture
def small_disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    if sys.platform != "linux" or os.getuid() or shutil.which("mount") is None:
        pytest.skip("only root mounts a small disk")
    command = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(place)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no tmpfs can be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=False)


def test_a_full_disk_keeps_the_old_database_and_says_what_to_do(photos, small_disk, monkeypatch):
    monkeypatch.setattr(converting, "_COMMIT_BYTES", 1)
    image = (photos / "china" / "0000000.jpg").read_bytes()
    write_lmdb([("old", image, 0)], small_disk / "db", progress=False)
    before = (small_disk / "db").read_bytes()
    filler = small_disk / "filler"
    filler.write_bytes(bytes(300_000))
    with pytest.raises(OSError, match=r"the disk is full: free some space\. \d+ images are kept"):
        write_lmdb(photos, small_disk / "db", progress=False)
    assert (small_disk / "db").read_bytes() == before
    filler.unlink()
    first = sorted(photos.glob("china/*.jpg"))[:100]
    items = [(path.name, path.read_bytes(), 0) for path in first]
    assert write_lmdb(items, small_disk / "db", progress=False).count == 100


def test_a_disk_that_holds_no_commit_keeps_nothing_and_says_so(photos, small_disk):
    with pytest.raises(
        OSError, match=r"the disk is full: free some space\. Nothing was kept"
    ) as full:
        write_lmdb(photos, small_disk / "db", progress=False, encode="raw")
    assert full.value.errno == errno.ENOSPC
    assert "resume" not in str(full.value)
    assert os.listdir(small_disk) == []


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (errno.EDQUOT, "your quota on this disk is used up"),
        (errno.EFBIG, "the file is larger than the limit for files here: shard="),
    ],
)
def test_a_quota_and_the_largest_file_of_a_file_system_are_no_full_disk(
    photos, tmp_path, monkeypatch, code, says
):
    def refused(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refused)
    monkeypatch.setattr(failures, "_size_limit", lambda: -1)
    with pytest.raises(OSError, match=f"{says}.*{COUNT} images are kept: resume=True"):
        write_lmdb(photos, tmp_path / "db", progress=False)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_an_error_of_the_sources_own_disk_is_not_taken_for_one_of_the_target(
    photos, tmp_path, monkeypatch, code
):
    monkeypatch.setattr(converting, "_COMMIT_BYTES", 1)
    image = (photos / "china" / "0000000.jpg").read_bytes()

    def items():
        yield from ((f"{n}", image, 0) for n in range(20))
        raise OSError(code, "of the cache", "/elsewhere")

    with pytest.raises(OSError, match="of the cache: '/elsewhere'") as error:
        write_lmdb(items(), tmp_path / "db", progress=False)
    assert error.value.__notes__ == [
        "16 images are kept: resume=True (--resume) goes on after them"
    ]


@pytest.mark.skipif(os.name == "nt" or os.getuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_named(photos, tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(PermissionError, match="db"):
        write_lmdb(photos, tmp_path / "db", progress=False)


# ---- damage ----


def problems(path):
    try:
        verify_lmdb(path, progress=False)
    except DatabaseError as error:
        return str(error)
    return ""


def spans(path, stored):
    """Where each record's bytes lie in the file: all places, since LMDB leaves old pages as is."""
    content = path.read_bytes()
    found = []
    for position, (key, image, target) in enumerate(stored):
        record = schema.pack_record(position, key.encode(), b"%d" % target, image)
        starts = [match.start() for match in re.finditer(re.escape(record), content)]
        assert starts
        found.append((starts, len(record), position))
    return found


def batched(path):
    dataset = LMDBDataset(path, collate=True)
    return lambda position: dataset.__getitems__([position])


def flips_in_records(photos, whole, tmp_path, count, seed):
    write_lmdb(photos, tmp_path / "db", progress=False)
    content, places = (tmp_path / "db").read_bytes(), spans(tmp_path / "db", whole)
    rng = random.Random(seed)
    for number in range(count):
        starts, length, position = rng.choice(places)
        damaged = bytearray(content)
        byte, bit = rng.randrange(length), 1 << rng.randrange(8)
        for start in starts:  # the page in use is one of them
            damaged[start + byte] ^= bit
        path = tmp_path / f"{number}"
        path.write_bytes(damaged)
        said = problems(path)
        assert f"record {position} is damaged" in said, (number, said)
        for read in (LMDBDataset(path).__getitem__, batched(path)):
            with pytest.raises(DatabaseError, match=f"record {position} is damaged"):
                read(position)
        path.unlink()


# in a process of its own: LMDB itself can crash on what is damaged
READ = """
import hashlib, json, sys
from dlhelpers.lmdb_io import LMDBDataset
for path in sys.argv[1:]:
    dataset = LMDBDataset(path, decode=None)
    rows = [[key, *dataset[i]] for i, (key, _) in enumerate(dataset.samples)]
    found = [dataset.find(row[0]) for row in rows]
    held = [[k, b.hex(), t] for k, b, t in rows], found, dataset.classes
    print(hashlib.sha256(json.dumps(held).encode()).hexdigest(), flush=True)
"""


def flips_elsewhere(photos, whole, tmp_path, count, seed):
    """Flip bytes outside the records; return how many were found (the rest harmed nothing)."""
    write_lmdb(photos, tmp_path / "db", progress=False)
    content, places = (tmp_path / "db").read_bytes(), spans(tmp_path / "db", whole)
    inside = bytearray(len(content))
    for starts, length, _ in places:
        for start in starts:
            inside[start : start + length] = b"\1" * length
    outside = [i for i, byte in enumerate(inside) if not byte and content[i]]
    held = [[k, b.hex(), t] for k, b, t in whole], list(range(COUNT)), ["china", "flower"]
    expected = hashlib.sha256(json.dumps(held).encode()).hexdigest()
    rng, not_found = random.Random(seed), []
    for number in range(count):
        damaged = bytearray(content)
        damaged[rng.choice(outside)] ^= 1 << rng.randrange(8)
        path = tmp_path / f"{number}"
        path.write_bytes(damaged)
        if problems(path):
            path.unlink()
        else:
            not_found.append(str(path))
    done = fresh.run(READ, *not_found)
    read = dict(zip(not_found, done.stdout.split(), strict=False))
    assert read == dict.fromkeys(not_found, expected), done.stderr
    return count - len(not_found)


def test_flipped_bytes_in_records_are_found_and_named(photos, whole, tmp_path):
    flips_in_records(photos, whole, tmp_path, count=5, seed=0)


@pytest.mark.slow
def test_two_hundred_flipped_bytes_in_records_are_all_found(photos, whole, tmp_path):
    flips_in_records(photos, whole, tmp_path, count=200, seed=1)


def test_flipped_bytes_elsewhere_are_found_or_harm_nothing(photos, whole, tmp_path):
    flips_elsewhere(photos, whole, tmp_path, count=4, seed=0)


@pytest.mark.parametrize(
    ("entry", "said"),
    [(b"china/0000000.jpg[0,0]", "in the index"), (b'"china","flower"]', "'meta' is damaged")],
)
def test_flipped_bytes_in_the_index_and_in_the_meta_entry_are_found(photos, tmp_path, entry, said):
    write_lmdb(photos, tmp_path / "db", progress=False)
    content = bytearray((tmp_path / "db").read_bytes())
    place = content.find(entry)
    while place > 0:  # also in pages that are no longer used
        content[place + len(entry) - 4] ^= 2
        place = content.find(entry)
    (tmp_path / "db").write_bytes(content)
    assert said in problems(tmp_path / "db")


@pytest.mark.slow
def test_two_hundred_flipped_bytes_elsewhere_are_found_or_harm_nothing(photos, whole, tmp_path):
    assert flips_elsewhere(photos, whole, tmp_path, count=200, seed=1) > 0


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9, 0.9999])
def test_a_truncated_file_is_refused(photos, tmp_path, share):
    write_lmdb(photos, tmp_path / "db", progress=False)
    size = os.path.getsize(tmp_path / "db")
    os.truncate(tmp_path / "db", int(size * share))
    with pytest.raises(DatabaseError, match=r"is truncated: it has|is no LMDB file"):
        LMDBDataset(tmp_path / "db")
    assert "truncated" in problems(tmp_path / "db") or "no LMDB" in problems(tmp_path / "db")


def foreign(path, entries=(), **named):
    env = lmdb.open(str(path), subdir=False, max_dbs=4, lock=False)
    with env.begin(write=True) as txn:
        for key, value in entries:
            txn.put(key, value)
    for name in named:
        env.open_db(name.encode())
    env.close()


def test_a_foreign_file_is_refused(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "text").write_text("not a database\n" * 1000)
    foreign(tmp_path / "lmdb", [(b"00000001", b"an image")])
    foreign(tmp_path / "half", records=1, index=1, skipped=1)
    messages = {
        "empty": "is no LMDB file",
        "text": "is no LMDB file",
        "lmdb": "none that write_lmdb has written",
        "half": "none that write_lmdb has written|no entry",
    }
    for name, message in messages.items():
        with pytest.raises(DatabaseError, match=message):
            LMDBDataset(tmp_path / name)
        with pytest.raises(DatabaseError, match=message):
            verify_lmdb(tmp_path / name, progress=False)
        with pytest.raises(DatabaseError, match=message):
            info_lmdb(tmp_path / name)


def rewritten(path, **changes):
    env = lmdb.open(str(path), subdir=False, max_dbs=4, lock=False)
    with env.begin(write=True) as txn:
        meta = schema.unpack_meta(txn.get(schema.META), path)
        txn.put(schema.META, schema.pack_meta(meta | changes))
    env.close()


def test_another_version_of_the_schema_is_refused(photos, tmp_path):
    write_lmdb(photos, tmp_path / "db", progress=False)
    rewritten(tmp_path / "db", version=0)
    for opened in (LMDBDataset, verify_lmdb, info_lmdb):
        with pytest.raises(DatabaseError, match=r"version 0 of the schema, this package reads 1"):
            opened(tmp_path / "db")


def test_a_wrong_count_and_a_missing_record_are_found(photos, tmp_path):
    write_lmdb(photos, tmp_path / "db", progress=False)
    rewritten(tmp_path / "db", count=COUNT + 1)
    assert f"record {COUNT} is missing" in problems(tmp_path / "db")
    with pytest.raises(DatabaseError, match=f"record {COUNT} is missing of {COUNT + 1}"):
        LMDBDataset(tmp_path / "db")[COUNT]
    rewritten(tmp_path / "db", count=COUNT - 1)
    assert f"hold {COUNT} entries, expected were {COUNT - 1}" in problems(tmp_path / "db")


def test_a_wrong_index_is_found(photos, tmp_path):
    write_lmdb(photos, tmp_path / "db", progress=False)
    env = lmdb.open(str(tmp_path / "db"), subdir=False, max_dbs=4, lock=False)
    with env.begin(write=True) as txn:
        txn.put(b"china/0000000.jpg", b"[1,0]", db=env.open_db(schema.INDEX, txn))
    env.close()
    assert "record 0: its key is wrong or missing in the index" in problems(tmp_path / "db")


def test_a_reader_that_crashes_or_hangs_is_reported_and_not_suffered(photos, tmp_path, monkeypatch):
    write_lmdb(photos, tmp_path / "db", progress=False)
    crash = "import json, os; print(json.dumps(['at', 256]), flush=True); os.kill(os.getpid(), 11)"
    hang = "import json, time; print(json.dumps(['at', 256]), flush=True); time.sleep(600)"
    popen = subprocess.Popen
    for code, said in (
        (crash, "LMDB crashes on a broken page.*256.*SIGSEGV"),
        (hang, "hangs.*256"),
    ):
        monkeypatch.setattr(reading_apart, "_SILENCE_S", 3.0 if code is hang else 60.0)
        monkeypatch.setattr(
            reading_apart.subprocess,
            "Popen",
            lambda command, code=code, **options: popen([command[0], "-c", code], **options),
        )
        with pytest.raises(DatabaseError, match=said):
            verify_lmdb(tmp_path / "db", progress=False)


# ---- command line ----


def test_the_command_line_writes_verifies_and_describes(photos, tmp_path, capsys):
    target = str(tmp_path / "db")
    assert main(["lmdb", "write", str(photos), target, "--resize", "16", "--quiet"]) == 0
    assert f"{COUNT} images" in capsys.readouterr().out
    assert main(["lmdb", "verify", target, "--quiet"]) == 0
    assert f"all {COUNT} records are as they were written" in capsys.readouterr().out
    assert main(["lmdb", "info", target]) == 0
    said = capsys.readouterr().out
    assert "resize 16" in said
    assert "2: china, flower" in said


def test_the_command_line_says_what_is_wrong(photos, tmp_path, capsys, monkeypatch):
    target = tmp_path / "db"
    assert main(["lmdb", "verify", str(target), "--quiet"]) == 2
    assert "there is no database" in capsys.readouterr().err
    write_lmdb(photos, target, progress=False)
    content = bytearray(target.read_bytes())
    content[content.find((photos / "china" / "0000000.jpg").read_bytes()) + 50] ^= 1
    target.write_bytes(content)
    assert main(["lmdb", "verify", str(target), "--quiet"]) == 2
    assert "record 0 is damaged" in capsys.readouterr().err
    assert main(["lmdb", "write", str(photos), str(target), "--shard", "2", "--quiet"]) == 2
    assert "--shard must be RANK/WORLD" in capsys.readouterr().err
    monkeypatch.delenv("RANK", raising=False)
    assert main(["lmdb", "write", str(photos), str(target), "--shard", "torchrun"]) == 2
    assert "needs RANK" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have Unicode names alone")
def test_the_command_line_shows_names_that_are_no_utf8(photos, tmp_path):
    folder = os.fsencode(tmp_path) + b"/src/stra\xdfe"
    os.makedirs(folder)
    image = (photos / "china" / "0000000.jpg").read_bytes()
    for name, content in ((b"gr\xfcn.jpg", image), (b"\xff.jpg", b""), (b"\xfe.txt", b"")):
        with open(folder + b"/" + name, "wb") as file:
            file.write(content)
    target = tmp_path / os.fsdecode(b"d\xe9.lmdb")
    child = "import sys; from dlhelpers.__main__ import main; sys.exit(main(sys.argv[1:]))"
    strict = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    said = []
    for arguments, status in (
        (["write", str(tmp_path / "src"), str(target), "--quiet"], 2),
        (["write", str(tmp_path / "src"), str(target), "--skip-errors"], 0),
        (["info", str(target)], 0),
        (["verify", str(target)], 0),
    ):
        done = subprocess.run(
            [sys.executable, "-c", child, "lmdb", *arguments],
            capture_output=True,
            env=strict,
            check=False,
        )
        assert done.returncode == status, done.stderr
        said.append((done.stdout + done.stderr).decode())
    for text, shown in zip(said, (r"\xff.jpg", r"\xfe.txt", r"stra\xdfe", r"d\xe9"), strict=True):
        assert shown in text


def test_reports_and_errors_can_be_printed_whatever_names_they_hold(photos, tmp_path):
    name = "gr\udcfcn"
    image = (photos / "china" / "0000000.jpg").read_bytes()
    items = [(name, image, 0), (f"{name}2", b"", 0)]
    report = write_lmdb(items, tmp_path / "db", progress=False, on_error="skip")
    info = info_lmdb(tmp_path / "db")
    said = [str(report), str(info)]
    with pytest.raises(SourceError) as refused:
        write_lmdb(items, tmp_path / "other", progress=False)
    said.append(str(refused.value))
    missing = tmp_path / name
    for fails in (LMDBDataset, info_lmdb, lambda path: write_lmdb(path, path, progress=False)):
        with pytest.raises(FileNotFoundError) as refused:
            fails(missing)
        said.append(str(refused.value))
    for text in said:
        assert "gr\\xfcn" in text or "gr\\udcfcn" in text
        text.encode()  # what a strict stream does


def test_what_cannot_be_printed_is_escaped_and_the_rest_stays():
    assert printable("line\n\tné 東") == "line\n\tné 東"
    assert printable("a\udce9b\ud800c\x1b[2Jd\x7f") == "a\\xe9b\\ud800c\\x1b[2Jd\\x7f"
    assert printable("a\x9b31mb\x85") == "a\\x9b31mb\\x85"
    assert printable("gpj\u202egnp.exe\u2066") == "gpj\\u202egnp.exe\\u2066"
    assert printable("a\rb\u2028c\u2029d") == "a\\rb\\u2028c\\u2029d"
    assert printable("a\u200bb\ufeffc\U000e0001d") == "a\\u200bb\\ufeffc\\U000e0001d"
    assert all(
        printable(chr(code)).replace("\n", "").replace("\t", "").isprintable()
        for code in range(0x11000)
    )


def test_the_command_line_skips_and_shards(photos, tmp_path, capsys):
    source = shutil.copytree(photos, tmp_path / "photos")
    (source / "china" / "0000000.jpg").write_bytes(b"")
    assert main(["lmdb", "write", str(source), str(tmp_path / "db"), "--quiet"]) == 2
    assert "china/0000000.jpg: not an image" in capsys.readouterr().err
    options = ["--quiet", "--skip-errors", "--resize", "8x12"]
    for rank in ("0/2", "1/2"):
        command = ["lmdb", "write", str(source), str(tmp_path / "parts"), "--shard", rank]
        assert main(command + options) == 0
    assert "1 skipped" in capsys.readouterr().out
    dataset = LMDBDataset(tmp_path / "parts")
    assert len(dataset) == COUNT - 1
    assert dataset[0][0].shape == (3, 8, 12)


@posix
def test_ctrl_c_on_the_command_line_says_how_to_go_on(photos, tmp_path):
    code = (
        "import sys\n"
        "from dlhelpers.__main__ import main\n"
        "from dlhelpers.lmdb_io import converting\n"
        "converting._COMMIT_BYTES = 1\n"
        "commit = converting.Conversion._commit\n"
        "def told(self, batch):\n"
        "    commit(self, batch)\n"
        "    print('committed', flush=True)\n"
        "    sys.stdin.readline()\n"
        "converting.Conversion._commit = told\n"
        "sys.exit(main(['lmdb', 'write', sys.argv[1], sys.argv[2], '--quiet']))\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", heeding(code), str(photos), str(tmp_path / "db")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    child.stdout.readline()
    time.sleep(0.2)  # until it waits for its line; earlier would do as well
    child.send_signal(signal.SIGINT)
    _, said = child.communicate()
    assert child.returncode == 130
    assert "16 images are kept: resume=True (--resume) goes on" in said
