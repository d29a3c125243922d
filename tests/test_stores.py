"""The containers give back what they were given; their time and pages are accounted for."""

import os
import pickle
import sys
import tarfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dlhelpers.course import data, stores
from dlhelpers.course.stores import timing
from dlhelpers.lmdb_io import load_decoder

linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux accounts for pages")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = data.photos(tmp_path_factory.mktemp("data") / "photos", count=48, size=64)
    paths = sorted(folder.glob("*/*.jpg"), key=lambda path: path.name)
    return [path.read_bytes() for path in paths]


@pytest.fixture(params=stores.installed())
def store(request, photos, tmp_path):
    return stores.make_store(request.param, photos, [i % 3 for i in range(len(photos))], tmp_path)


def test_every_store_gives_every_image_back_in_order(store, photos):
    assert len(store) == len(photos)
    assert list(store) == photos


def test_every_store_takes_as_many_bytes_as_its_images_at_least(store, photos):
    assert store.stored_bytes >= sum(map(len, photos))


def test_any_image_can_be_read_or_the_store_says_that_it_cannot(store, photos):
    if store.only_in_order:
        with pytest.raises(TypeError, match=f"{store.name} can only be read in order"):
            store[5]
    else:
        assert [store[i] for i in (40, 0, 47, 5)] == [photos[i] for i in (40, 0, 47, 5)]
        assert store.reopened()[7] == photos[7]


@pytest.mark.parametrize("name", ["memmap", "hdf5", "pth", "lmdb"])
@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.binary(min_size=1, max_size=300), min_size=1, max_size=9))
def test_images_of_any_length_come_back(tmp_path, name, images):
    if name not in stores.installed():
        pytest.skip(f"{name} needs a package")
    images = [b"BM" + (len(image) + 2).to_bytes(4, "little") + image for image in images]
    if name == "lmdb":  # stores images alone, and looks at them
        images = [_bmp(image) for image in images]
    store = stores.make_store(name, images, [0] * len(images), tmp_path)
    assert [store[i] for i in range(len(images))] == images


def _bmp(image):
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.frombytes("L", (len(image), 1), image).save(buffer, "bmp")
    return buffer.getvalue()


def test_a_store_that_is_there_is_replaced(photos, tmp_path):
    stores.make_store("memmap", photos, [0] * len(photos), tmp_path)
    second = stores.make_store("memmap", photos[:3], [0] * 3, tmp_path)
    assert list(second) == photos[:3]


@pytest.mark.parametrize("name", stores.installed())
def test_nothing_of_a_store_that_was_there_before_is_left(photos, tmp_path, name):
    stores.make_store(name, photos[:9], [0, 1, 2] * 3, tmp_path)
    fresh = stores.make_store(name, photos[9:12], [0, 1, 1], tmp_path / "fresh")
    again = stores.make_store(name, photos[9:12], [0, 1, 1], tmp_path)
    assert list(again) == list(fresh) == photos[9:12]
    assert again.stored_bytes == pytest.approx(fresh.stored_bytes, rel=0.01)


def test_a_store_of_files_leaves_other_files_alone(photos, tmp_path):
    other = tmp_path / "files" / "0" / "mine.jpg"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"mine")
    stores.make_store("files", photos[:3], [0, 1, 2], tmp_path)
    store = stores.make_store("files", photos[:2], [1, 1], tmp_path)
    assert (list(store), other.read_bytes()) == (photos[:2], b"mine")
    assert sorted(path.name for path in (tmp_path / "files").iterdir()) == ["0", "1"]


def test_an_index_counts_from_the_end_as_well_and_out_of_range_is_named(store, photos):
    if store.only_in_order:
        pytest.skip(f"{store.name} has no index")
    assert [store[-1], store[-48]] == [photos[-1], photos[0]]
    for index in (48, -49):
        with pytest.raises(IndexError, match=f"index {index} is out of range.*48 images"):
            store[index]


def test_the_webdataset_is_a_tar_file_that_any_tool_reads(photos, tmp_path):
    pytest.importorskip("webdataset", reason="webdataset (extra stores)")
    store = stores.make_store("webdataset", photos[:4], [0, 1, 0, 2], tmp_path)
    with tarfile.open(store.path) as tar:
        assert tar.getnames()[:2] == ["0000000.jpg", "0000000.cls"]
        assert tar.extractfile("0000003.jpg").read() == photos[3]
        assert tar.extractfile("0000003.cls").read() == b"2"


def test_the_tfrecord_is_read_by_the_package_of_that_name(photos, tmp_path):
    tfrecord = pytest.importorskip("tfrecord", reason="tfrecord (extra stores)")
    store = stores.make_store("tfrecord", photos[:4], [0, 1, 0, 2], tmp_path)
    rows = tfrecord.tfrecord_loader(str(store.path), None, {"image": "byte", "target": "int"})
    found = [(bytes(row["image"]), int(row["target"][0])) for row in rows]
    assert found == list(zip(photos[:4], [0, 1, 0, 2], strict=True))


def test_mistakes_are_named(photos, tmp_path):
    with pytest.raises(ValueError, match=r"no store 'zip'; there are files, lmdb"):
        stores.make_store("zip", photos, [0] * len(photos), tmp_path)
    with pytest.raises(ValueError, match="48 images and 2 targets"):
        stores.make_store("files", photos, [0, 1], tmp_path)


def test_a_missing_package_is_named(photos, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r"'hdf5' needs h5py .*dlhelpers\[stores\]"):
        stores.make_store("hdf5", photos, [0] * len(photos), tmp_path)


# ---- time ----


def test_the_four_stages_are_timed_apart(photos, tmp_path, monkeypatch):
    ticks = iter(range(10**6))
    monkeypatch.setattr(timing, "perf_counter", lambda: float(next(ticks)))  # a second a look
    store = stores.make_store("files", photos, [0] * len(photos), tmp_path)
    split = stores.split_time(store, load_decoder("pil"), range(40), batch_size=8)
    assert split.as_dict() == {"open": 1e6, "read": 1e6, "decode": 1e6, "collate": 1e6 / 8}
    assert split.store_share == pytest.approx(2 / 3.125)
    assert split.total_us == pytest.approx(3.125e6)


def test_a_split_needs_one_batch(photos, tmp_path):
    store = stores.make_store("memmap", photos, [0] * len(photos), tmp_path)
    with pytest.raises(ValueError, match="3 indices are less than one batch of 32"):
        stores.split_time(store, load_decoder("pil"), range(3))


@given(st.integers(1, 40), st.integers(1, 16), st.integers(1, 8))
def test_each_epoch_reads_every_item_once(count, size, calls):
    seen = []
    step = stores.next_batch(seen.append, count, size=size)
    for _ in range(calls):
        step()
    assert len(seen) == calls * size
    for begin in range(0, len(seen) - count + 1, count):
        assert sorted(seen[begin : begin + count]) == list(range(count))


def test_two_readers_do_not_follow_each_other():
    first, second = [], []
    stores.next_batch(first.append, 1000, size=1000)()
    stores.next_batch(second.append, 1000, size=1000)()
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 50


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_reads_the_whole_order_here_and_in_a_worker(photos, tmp_path, workers):
    store = stores.make_store("lmdb", photos, [0] * len(photos), tmp_path)
    store[0]  # opened in the parent
    assert stores.loader_time(store, "pil", range(40), workers=workers, batch_size=8) > 0


def test_what_a_spawned_worker_gets_holds_no_open_file(photos, tmp_path):
    store = stores.make_store("memmap", photos, [0] * len(photos), tmp_path)
    sent = pickle.loads(pickle.dumps(timing._Decoded(store, "pil")))
    assert sent._store is None
    assert np.array_equal(sent[3].numpy(), load_decoder("pil")(photos[3]))


# ---- pages ----


def evictable(path):
    """Whether this file system can drop a file at all; memory file systems cannot."""
    path.write_bytes(os.urandom(1 << 20))
    return stores.evict(path) == 0


@linux
def test_an_evicted_file_comes_back_page_by_page(tmp_path):
    if not evictable(tmp_path / "probe"):
        pytest.skip("files here lie in memory")
    path = tmp_path / "large"
    path.write_bytes(os.urandom(64 << 20))
    assert stores.resident_share(path) == 1
    assert stores.evict(path) == 0
    with open(path, "rb", buffering=0) as file:
        file.read(4096)
    assert 0 < stores.resident_share(path) < 0.5
    path.read_bytes()
    assert stores.resident_share(path) == 1


@linux
def test_a_folder_counts_as_all_its_files(tmp_path):
    for name, size in (("a", 4096), ("b", 3 * 4096), ("empty", 0)):
        (tmp_path / name).write_bytes(bytes(size))
    assert stores.resident_share(tmp_path) == 1


@linux
def test_a_child_pays_for_what_it_writes_and_not_for_what_it_reads():
    block = np.ones(64 << 20, np.uint8)

    def write():
        block[:] = 2

    assert stores.private_growth(write) >= block.nbytes
    assert stores.private_growth(lambda: int(block[::4096].sum())) < block.nbytes / 10
    assert block[0] == 1  # the child's write was its own


@linux
def test_a_child_that_raises_is_reported(capfd):
    with pytest.raises(RuntimeError, match="raised in the forked child"):
        stores.private_growth(lambda: 1 / 0)


def test_without_accounts_nothing_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(stores.pagecache, "_private_bytes", lambda: None)
    assert stores.private_growth(lambda: None) is None
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    assert stores.evict(tmp_path) is None


def test_a_reading_hands_every_item_to_its_use_once_an_epoch(photos):
    seen = []
    step = stores.reading(photos, seen.append, size=len(photos) // 2)
    assert (step(), step()) == (None, None)
    assert sorted(seen) == sorted(photos)
    counted = [0] * len(photos)

    class Counting:
        def __len__(self):
            return len(photos)

        def __getitem__(self, index):
            counted[index] += 1

    stores.reading(Counting(), size=len(photos))()
    assert counted == [1] * len(photos)


def test_a_reading_anew_opens_the_store_once_a_call_and_reads_all_of_it(photos, tmp_path):
    store = stores.make_store("memmap", photos, [0] * len(photos), tmp_path)
    store.reopened = lambda again=store.reopened: opened.append(again()) or opened[-1]
    opened, seen = [], []
    step = stores.reading_anew(store, seen.append)
    step(), step()
    assert len(opened) == 2
    assert sorted(seen) == sorted(photos * 2)
