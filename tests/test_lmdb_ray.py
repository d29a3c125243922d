"""Shards as tasks of Ray: workers that die, errors, Ctrl-C, and calls that go on."""

import os
import signal
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dlhelpers.__main__ import main
from dlhelpers.lmdb_io import (
    LMDBDataset,
    SourceError,
    converting,
    on_ray,
    verify_lmdb,
    write_lmdb,
)

COUNT, SHARDS = 100, 4


@contextmanager
def limit(seconds):
    """Fail where the time is over, so that a cluster that hangs does not hang the tests."""

    def fail(*_):
        raise TimeoutError(f"Ray has not finished in {seconds} s")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def cluster():
    """A Ray with one core, of those processes alone that run tasks."""
    ray = pytest.importorskip("ray", reason='needs Ray: pip install "dlhelpers[ray]"')
    if not hasattr(signal, "SIGALRM"):
        pytest.skip("the time limit of these tests is a signal of POSIX")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with limit(240), pytest.MonkeyPatch.context() as patch:
        for beside in ("start_monitor", "start_log_monitor", "start_api_server"):
            patch.setattr(ray._private.node.Node, beside, lambda *_, **__: None, raising=False)
        ray.init(
            "local",  # whatever else runs on this machine
            num_cpus=1,  # and a worker for each: it imports torch
            include_dashboard=False,
            object_store_memory=80_000_000,
            log_to_driver=False,
            logging_level="ERROR",
        )
    yield ray
    with limit(60):
        ray.shutdown()


@pytest.fixture
def in_time(cluster):
    with limit(120):
        yield cluster
    assert cluster.is_initialized()  # who has started it stops it


def pixels(number):
    return np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)


def bitmaps(root, count=12):
    for number in range(count):
        path = root / f"c{2 * number // count}" / f"{number:03d}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(number)).save(path)
    return root


def shows(database, numbers):
    """Whether a database holds the pixels of these numbers, in order."""
    found = LMDBDataset(database, decode="pil")
    return len(found) == len(numbers) and all(
        np.array_equal(np.asarray(found[i][0]), pixels(n)) for i, n in enumerate(numbers)
    )


class Pixels:
    """A dataset whose item ``bad`` does something the first time that it is stored.

    It is none of those that are loaded to know the dataset again, each 99/15-th.
    """

    def __init__(self, folder, bad, act):
        self.folder, self.bad, self.act = Path(folder), bad, act
        self.marker = self.folder.with_suffix(".marker")

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        converting._COMMIT_BYTES = 1  # every 16 items
        is_storing = any(self.folder.glob(f".shard-{index * SHARDS // COUNT:05d}-*.part"))
        if index == self.bad and is_storing and not self.marker.exists():
            self.marker.touch()
            self.act(self)
        return pixels(index), index


def is_whole(folder):
    assert verify_lmdb(folder, progress=False).count == COUNT
    assert LMDBDataset(folder).targets == list(range(COUNT))
    assert sorted(p.name for p in folder.iterdir() if p.name[0] == ".") == []
    return shows(folder, range(COUNT))


# ---- on a Ray ----


def test_the_shard_of_a_worker_that_is_killed_is_written_by_another_one(tmp_path, in_time):
    folder = tmp_path / "db"
    source = Pixels(folder, 47, lambda _: os.kill(os.getpid(), signal.SIGKILL))
    report = on_ray.write(source, folder, SHARDS, progress=False)
    assert source.marker.exists()
    assert report.count == COUNT
    assert report.resumed_from == 16  # what the one that died had committed
    assert is_whole(folder)


@pytest.mark.slow
def test_a_worker_that_dies_each_time_is_named(tmp_path, in_time):
    def die(source):
        source.marker.unlink()
        os.kill(os.getpid(), signal.SIGKILL)

    source = Pixels(tmp_path / "db", 47, die)
    with pytest.raises(ChildProcessError, match=r"shard-00001-of-00004.*its worker died each time"):
        on_ray.write(source, source.folder, SHARDS, retries=0, progress=False)
    source.act = lambda _: None
    assert on_ray.write(source, source.folder, SHARDS, progress=False).count == COUNT
    assert is_whole(source.folder)


def test_so_it_is_where_ray_says_that_it_died(tmp_path, in_time, monkeypatch):
    def dies(*_):
        raise in_time.exceptions.WorkerCrashedError

    monkeypatch.setattr(in_time, "get", dies)
    with pytest.raises(ChildProcessError, match=r"shard-0000\d-of-00004.*its worker died each"):
        on_ray.write(Pixels(tmp_path / "db", -1, None), tmp_path / "db", SHARDS, progress=False)


def test_after_an_interrupt_the_same_call_goes_on(tmp_path, in_time, monkeypatch):
    source, wait, waits = Pixels(tmp_path / "db", -1, None), in_time.wait, []

    def interrupted(*given, **options):
        waits.append(given)
        if len(waits) == 2:
            raise KeyboardInterrupt
        return wait(*given, **options)

    monkeypatch.setattr(in_time, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt) as stopped:
        on_ray.write(source, source.folder, SHARDS, progress=False)
    assert "the same call continues" in stopped.value.__notes__[0]
    report = on_ray.write(source, source.folder, SHARDS, progress=False)
    assert report.resumed_from >= COUNT // SHARDS
    assert is_whole(source.folder)


@pytest.mark.slow
def test_after_ctrl_c_the_same_call_goes_on(tmp_path, in_time):
    def dawdle(_):
        for _ in range(200):
            time.sleep(0.01)

    def press():
        while not source.marker.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    source = Pixels(tmp_path / "db", 47, dawdle)
    options = {"cpus_per_task": 0.5, "progress": False}  # two at a time
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Thread(target=press, daemon=True).start()
        with pytest.raises(KeyboardInterrupt) as stopped:
            on_ray.write(source, source.folder, SHARDS, **options)
    finally:
        signal.signal(signal.SIGINT, before)
    assert "the same call continues" in stopped.value.__notes__[0]
    # the tasks of the first call are still at work, and have their locks
    report = on_ray.write(source, source.folder, SHARDS, **options)
    assert report.resumed_from >= 16
    assert is_whole(source.folder)


def test_the_command_writes_a_folder_once_and_again_where_it_changed(tmp_path, in_time, capsys):
    source, folder = bitmaps(tmp_path / "photos"), tmp_path / "db"
    command = ["lmdb", "write", str(source), str(folder), "--ray", "--shards", "3", "--quiet"]
    assert main(command) == 0
    files = {path.name: path.stat().st_ino for path in folder.glob("shard-*")}
    assert len(files) == 3
    assert shows(folder, range(12))
    assert main(command) == 0
    assert "12 were there from an earlier run" in capsys.readouterr().out
    assert files == {path.name: path.stat().st_ino for path in folder.glob("shard-*")}
    Image.fromarray(pixels(99)).save(source / "c0" / "001.bmp")
    assert main(command) == 0
    assert "were there" not in capsys.readouterr().out
    assert shows(folder, [0, 99, *range(2, 12)])


def test_an_image_that_cannot_be_stored_is_named_with_its_shard(tmp_path, in_time):
    source, folder = bitmaps(tmp_path / "photos"), tmp_path / "db"
    (source / "c1" / "zz.bmp").write_bytes(b"BM")
    with pytest.raises(SourceError, match=r"^shard-00002-of-00003\.lmdb: c1/zz\.bmp: "):
        on_ray.write(source, folder, 3, progress=False)
    report = on_ray.write(source, folder, 3, on_error="skip", progress=False)
    assert [what for what, _ in report.skipped] == ["c1/zz.bmp"]
    assert shows(folder, range(12))
    with pytest.raises(SourceError, match="zz"):  # a finished shard that lacks it is not enough
        on_ray.write(source, folder, 3, progress=False)


def test_a_source_that_cannot_be_sent_is_refused(tmp_path, in_time):
    with pytest.raises(TypeError, match="generator cannot be sent"):
        on_ray.write((x for x in ()), tmp_path / "db", 2, progress=False)
    with pytest.raises(ValueError, match="connected to Ray already"):
        on_ray.write("photos", tmp_path / "db", 2, address="10.0.0.1:6379")


# ---- without one ----


def test_a_task_waits_for_one_that_still_writes_its_shard(tmp_path):
    """As the tasks of a call that was interrupted do."""
    reached, leave = threading.Event(), threading.Event()

    class Waits(Pixels):
        def __getitem__(self, index):
            if index == 62 and threading.current_thread() is not threading.main_thread():
                reached.set()
                leave.wait(60)
            return pixels(index), index

    source = Waits(tmp_path / "db", -1, None)
    other = threading.Thread(target=on_ray._write_shard, args=(source, source.folder, (1, 2), {}))
    other.start()
    assert reached.wait(60)
    threading.Timer(0.3, leave.set).start()
    report = on_ray._write_shard(source, source.folder, (1, 2), {"shards": 2})
    other.join()
    assert report.resumed_from == report.count == COUNT // 2


@pytest.mark.parametrize("source", ["photos", "a:b/photos", "C:\\photos", "/data/in:2/x"])
def test_a_source_behind_ray_is_not_taken_for_its_address(source, capsys):
    with pytest.raises(SystemExit):
        main(["lmdb", "write", "--ray", source, "photos.lmdb"])
    assert "is no address such as 10.0.0.1:6379" in capsys.readouterr().err


@pytest.mark.parametrize("address", ["auto", "10.0.0.1:6379", "ray://head:10001", "[::1]:6379"])
def test_an_address_of_ray_is_taken(address, monkeypatch):
    given = []
    monkeypatch.setattr(on_ray, "write", lambda *_, **options: given.append(options["address"]))
    assert main(["lmdb", "write", "--ray", address, "a", "b", "--shards", "2"]) == 0
    assert given == [address]


def test_without_ray_it_says_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    command = ["lmdb", "write", str(tmp_path), str(tmp_path / "db"), "--ray", "--shards", "2"]
    assert main(command) == 2
    assert 'pip install "dlhelpers[ray]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shards": 0}, "shards must be a whole number, 1 or more, got 0"),
        ({"retries": -1}, "retries must be a whole number, 0 or more, got -1"),
        ({"cpus_per_task": 0}, "cpus_per_task must be a positive number, got 0"),
        ({"shard": (0, 2)}, "no option 'shard'"),
        ({"qualty": 9}, "no option 'qualty'"),
    ],
)
def test_odd_arguments_are_named_before_anything_starts(monkeypatch, tmp_path, options, message):
    monkeypatch.setitem(sys.modules, "ray", sys)  # nothing of it is used
    with pytest.raises((ValueError, TypeError), match=message):
        on_ray.write("photos", tmp_path / "db", **{"shards": 2} | options)


@pytest.mark.parametrize("more", [[], ["--shard", "0/2"], ["--shards", "2", "--append"]])
def test_the_command_asks_for_the_number_of_shards(more, tmp_path, capsys):
    assert main(["lmdb", "write", str(tmp_path), str(tmp_path / "db"), "--ray", *more]) == 2
    assert "--shard" in capsys.readouterr().err


# ---- what is finished ----


@pytest.fixture
def first(tmp_path):
    """Write the first of two shards; return the function, which says what was not written."""
    source, folder = bitmaps(tmp_path / "photos"), tmp_path / "db"

    def write(**options):
        given = {"resume": True, "progress": False, "shard": (0, 2), "shards": 2} | options
        return write_lmdb(source, folder, **given).resumed_from

    write.source = source
    assert write() == 0
    return write


def test_a_finished_shard_is_kept_when_resuming_alone(first):
    assert first() == 6
    assert first(resume=False) == 0
    assert first() == 6


@pytest.mark.parametrize("options", [{"resize": 4}, {"encode": "png"}])
def test_a_finished_shard_of_other_settings_is_written_again(first, options):
    assert first(**options) == 0
    assert first(**options) == 6


@pytest.mark.parametrize("name", ["c0/000.bmp", "c1/011.bmp"])  # of this shard and of the other
@pytest.mark.parametrize("change", ["touch", "remove", "rename", "grow"])
def test_a_finished_shard_of_another_source_is_written_again(first, name, change):
    path = first.source / name
    if change == "touch":
        os.utime(path, (1, 1))
    elif change == "remove":
        path.unlink()
    elif change == "rename":
        path.rename(path.with_stem("5x"))
    else:
        Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(path)
    assert first() == 0


def test_a_finished_shard_from_elsewhere_is_kept_only_with_equal_contents(first, monkeypatch):
    def move(number):  # to another machine, as it looks
        monkeypatch.setattr("platform.node", lambda: f"host {number}")
        first.source.rename(first.source.with_name("away"))
        bitmaps(first.source)
        for path in first.source.glob("*/*"):
            os.utime(path, (number, number))

    move(1)
    assert first() == 6
    first.source.with_name("away").rename(first.source.with_name("old"))
    move(2)
    path = first.source / "c0" / "003.bmp"
    Image.fromarray(pixels(99)).save(path)
    assert first() == 0
