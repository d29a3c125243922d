"""LMDBDataset against torchvision's ImageFolder, PIL and torch's own collation."""

import io
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fresh
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, DistributedSampler, Subset, default_collate
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from dlhelpers.course import data
from dlhelpers.lmdb_io import (
    DatabaseError,
    LMDBDataset,
    decoders,
    decoding,
    info_lmdb,
    load_decoder,
    verify_lmdb,
    write_lmdb,
)

COUNT = 40

# both start workers that have nothing of the parent's; one that is spawned imports torch: seconds
TWIN = "forkserver" if fresh.CONTEXT is None else "spawn"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("read") / "photos"
    return data.photos(root, count=COUNT, size=64, progress=False)


@pytest.fixture(scope="module")
def database(photos):
    path = photos.parent / "photos.lmdb"
    write_lmdb(photos, path, progress=False)
    return path


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photograph(photos):
    return ImageFolder(photos)[0][0]


# ---- as ImageFolder ----


def test_pil_images_are_those_of_image_folder_pixel_by_pixel(photos, database):
    found, expected = LMDBDataset(database, decode="pil"), ImageFolder(photos)
    assert len(found) == len(expected)
    for (image, target), (other, wanted) in zip(found, expected, strict=False):
        assert (image.mode, image.tobytes(), target) == (other.mode, other.tobytes(), wanted)


def test_it_stands_in_for_image_folder(photos, database):
    found, expected = LMDBDataset(database), ImageFolder(photos)
    assert found.classes == expected.classes
    assert found.class_to_idx == expected.class_to_idx
    assert found.targets == expected.targets
    keys = [os.path.relpath(path, photos).replace(os.sep, "/") for path, _ in expected.samples]
    assert found.samples == list(zip(keys, expected.targets, strict=True))
    assert [found.find(key) for key in keys] == list(range(COUNT))


def test_a_transform_gets_what_image_folders_would_get(photos, database):
    chain = v2.Compose([v2.Resize(32), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])
    found, expected = LMDBDataset(database, chain, "pil"), ImageFolder(photos, chain)
    for index in (0, 17, -1):
        assert torch.equal(found[index][0], expected[index][0])
    renamed = LMDBDataset(database, target_transform=lambda target: target + 10)
    assert [renamed[i][1] - 10 for i in range(COUNT)] == expected.targets


def test_the_image_is_a_uint8_tensor_of_channels_first(database):
    image, target = LMDBDataset(database)[3]
    assert (image.shape, image.dtype, type(target)) == ((3, 64, 64), torch.uint8, int)


def test_stored_bytes_are_given_where_nothing_is_decoded(photos, database):
    found = LMDBDataset(database, decode=None)
    paths = [path for path, _ in ImageFolder(photos).samples]
    assert [found[i][0] for i in range(COUNT)] == [Path(path).read_bytes() for path in paths]


@pytest.mark.parametrize("index", [-1, np.int64(5), torch.tensor(7), True])
def test_any_whole_number_is_an_index(database, index):
    dataset = LMDBDataset(database, decode=None)
    assert dataset[index] == dataset[int(index) % COUNT]


def test_an_index_out_of_range_is_named(database):
    for index in (COUNT, -COUNT - 1):
        with pytest.raises(IndexError, match=f"index {index} is out of range.* has 40 images"):
            LMDBDataset(database)[index]
    with pytest.raises(TypeError):
        LMDBDataset(database)[1.5]


def test_options_out_of_range_are_named(database):
    with pytest.raises(ValueError, match=r"decode must be auto, simplejpeg, .*got 'jpeg4py'"):
        LMDBDataset(database, decode="jpeg4py")
    with pytest.raises(ValueError, match="memory_format must be auto"):
        LMDBDataset(database, memory_format="nhwc")
    with pytest.raises(ValueError, match="collate=True needs tensors"):
        LMDBDataset(database, decode=None, collate=True)


def test_a_decoder_that_is_not_installed_is_named(database, monkeypatch):
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    decoding.load_decoder.cache_clear()
    with pytest.raises(ImportError, match=r"'simplejpeg' does not work here .*dlhelpers\[codecs\]"):
        LMDBDataset(database, decode="simplejpeg")
    decoding.load_decoder.cache_clear()


# ---- decoders ----


def kinds(image):
    grey, rgba = image.convert("L"), image.convert("RGBA")
    rgba.putalpha(grey)
    wide = Image.fromarray((np.asarray(grey).astype(np.uint16) * 257)[:, :50])
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: turned by 90 degrees
    return {
        "progressive JPEG": encoded(image, "jpeg", quality=90, progressive=True),
        "4:4:4 JPEG": encoded(image, "jpeg", quality=90, subsampling=0),
        "odd size JPEG": encoded(image.crop((0, 0, 37, 51)), "jpeg", quality=90),
        "grey JPEG": encoded(grey, "jpeg", quality=90),
        "CMYK JPEG": encoded(image.convert("CMYK"), "jpeg", quality=90),
        "turned JPEG": encoded(image.crop((0, 0, 60, 40)), "jpeg", quality=90, exif=turned),
        "PNG": encoded(image, "png"),
        "grey PNG": encoded(grey, "png"),
        "RGBA PNG": encoded(rgba, "png"),
        "palette PNG": encoded(image.quantize(64), "png"),
        "16 bit PNG": encoded(wide, "png"),
        "WebP": encoded(image, "webp"),
        "BMP": encoded(image, "bmp"),
        "GIF": encoded(image, "gif"),
        "TIFF": encoded(image, "tiff"),
    }


@pytest.mark.parametrize("decode", decoders())
def test_decoders_agree_with_pil_on_every_kind_of_image(photos, tmp_path, decode):
    images = kinds(photograph(photos))
    items = [(name, image, 0) for name, image in images.items()]
    write_lmdb(items, tmp_path / "db", progress=False)
    dataset = LMDBDataset(tmp_path / "db", decode=decode)
    for (name, image), (found, _) in zip(images.items(), dataset, strict=False):
        wanted = np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))
        got = np.asarray(found) if decode == "pil" else found.permute(1, 2, 0).numpy()
        assert got.shape == wanted.shape, name
        assert np.abs(got.astype(int) - wanted).max() <= 3, name


def test_raw_pixels_come_back_and_outlive_the_transaction(photos, tmp_path):
    write_lmdb(photos, tmp_path / "db", encode="raw", progress=False)
    dataset = LMDBDataset(tmp_path / "db")
    kept = [image for image, _ in dataset.__getitems__(range(COUNT))]
    del dataset
    for image, (wanted, _) in zip(kept, ImageFolder(photos), strict=False):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(wanted))
        image += 1  # writable: not a view of the read-only map


@pytest.mark.parametrize("decode", decoders())
def test_an_image_that_no_decoder_takes_is_named(tmp_path, photos, decode):
    good = encoded(photograph(photos), "png")
    broken = good[:200] + bytes(100) + good[300:]  # begins and ends as a PNG does
    write_lmdb([("a", good, 0), ("b", broken, 0)], tmp_path / "db", progress=False)
    verify_lmdb(tmp_path / "db", progress=False)  # the bytes are what the source had
    with pytest.raises(DatabaseError, match=r"record 1, key 'b': the image cannot be decoded"):
        LMDBDataset(tmp_path / "db", decode=decode)[1]


@pytest.mark.parametrize("with_opencv", [True, False])
def test_planar_pixels_are_the_transpose(monkeypatch, with_opencv):
    if not with_opencv:
        monkeypatch.setattr(decoding, "_splitter", lambda: None)
    pixels = np.random.default_rng(0).integers(0, 256, (7, 5, 3), np.uint8)
    assert np.array_equal(decoding.planar(pixels), pixels.transpose(2, 0, 1))


# ---- memory layout and batches ----


def test_the_layout_fits_what_comes_next(database):
    contiguous = (64 * 64, 64, 1)
    last = (1, 3 * 64, 3)

    def layout(**options):
        return LMDBDataset(database, **options)[0][0].stride()

    assert layout() == contiguous
    assert layout(memory_format="channels_last") == last
    given = {}

    class Resize(v2.Resize):
        def forward(self, image):
            given["stride"] = image.stride()
            return super().forward(image)

    LMDBDataset(database, v2.Compose([Resize(32)]))[0]
    assert given["stride"] == last
    LMDBDataset(database, Resize(32), memory_format="contiguous")[0]
    assert given["stride"] == contiguous
    LMDBDataset(database, lambda image: given.update(stride=image.stride()))[0]
    assert given["stride"] == contiguous


def test_layouts_hold_the_same_pixels(database):
    a = LMDBDataset(database)[5][0]
    b = LMDBDataset(database, memory_format="channels_last")[5][0]
    assert torch.equal(a, b)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("memory_format", ["auto", "contiguous", "channels_last"])
def test_whole_batches_equal_torchs_collation(database, workers, memory_format):
    plain = LMDBDataset(database)
    batched = LMDBDataset(database, collate=True, memory_format=memory_format)
    loader = DataLoader(batched, 12, num_workers=workers, collate_fn=batched.collate_fn)
    found = [(images.clone(), targets) for images, targets in loader]
    assert [len(images) for images, _ in found] == [12, 12, 12, 4]
    for number, (images, targets) in enumerate(found):
        wanted = default_collate(
            [plain[i] for i in range(12 * number, min(COUNT, 12 * number + 12))]
        )
        assert torch.equal(images, wanted[0])
        assert torch.equal(targets, wanted[1])


def test_a_batch_goes_through_the_transform(database):
    chain = v2.Compose([v2.Resize(32), v2.ToDtype(torch.float32, scale=True)])
    batched = LMDBDataset(database, chain, collate=True)
    images, _ = batched.__getitems__([3, 4])
    assert torch.equal(images, torch.stack([LMDBDataset(database, chain)[i][0] for i in (3, 4)]))


@pytest.mark.parametrize("memory_format", ["auto", "contiguous"])
def test_targets_of_a_batch_are_transformed(database, memory_format):
    options = {"memory_format": memory_format, "target_transform": lambda target: target + 10}
    batched = LMDBDataset(database, collate=True, **options)
    assert batched.__getitems__([0, -1])[1].tolist() == [10, 11]


def test_a_batch_is_decoded_into_the_same_memory_again(database):
    batched = LMDBDataset(database, collate=True)
    first, _ = batched.__getitems__(range(8))
    address, kept = first.data_ptr(), first.clone()
    second, _ = batched.__getitems__(range(8, 16))
    assert second.data_ptr() == address
    assert not torch.equal(first, kept)  # as the docstring says: clone what you keep


def test_threads_of_the_caller_have_a_buffer_each(database):
    batched, plain = LMDBDataset(database, collate=True), LMDBDataset(database)

    def right(first):
        images, _ = batched.__getitems__([first, first + 1])
        return torch.equal(images, torch.stack([plain[first][0], plain[first + 1][0]]))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(right, list(range(COUNT - 1)) * 10))


def test_batches_of_workers_can_be_kept(database):
    batched = LMDBDataset(database, collate=True)
    loader = DataLoader(batched, 4, num_workers=2, collate_fn=batched.collate_fn)
    kept = [images for images, _ in loader]
    plain = LMDBDataset(database)
    assert torch.equal(torch.cat(kept), torch.stack([plain[i][0] for i in range(COUNT)]))


@pytest.mark.parametrize("collate", [False, True])
@pytest.mark.parametrize("threads", [2, 5, 64])
def test_threads_read_the_same_batch_as_one(database, collate, threads):
    alone = LMDBDataset(database, collate=collate)
    shared = LMDBDataset(database, collate=collate, threads=threads)
    for indices in ([3], [7, 2], list(range(COUNT))[::-1]):
        wanted = alone.collate_fn(alone.__getitems__(indices))
        found = shared.collate_fn(shared.__getitems__(indices))
        assert torch.equal(found[0], wanted[0])
        assert torch.equal(found[1], wanted[1])


def test_threads_work_at_the_same_time(database):
    meet = threading.Barrier(2, timeout=30)  # one thread alone would wait for ever
    dataset = LMDBDataset(database, lambda image: meet.wait() and image, threads=2)
    assert len(dataset.__getitems__(range(8))) == 8


def test_an_error_in_a_thread_reaches_the_reader(database):
    def fails(image):
        raise KeyError("in a transform")

    for collate in (False, True):
        with pytest.raises(KeyError, match="in a transform"):
            LMDBDataset(database, fails, threads=3, collate=collate).__getitems__(range(9))
    with pytest.raises(ValueError, match="threads must be a whole number, 1 or more, got 0"):
        LMDBDataset(database, threads=0)


@pytest.mark.parametrize(
    "start",
    [
        pytest.param(start, marks=[pytest.mark.slow] * (start == TWIN))
        for start in multiprocessing.get_all_start_methods()
    ],
)
def test_threads_work_in_workers_too(database, start):
    dataset = LMDBDataset(database, collate=True, threads=2)
    wanted = torch.cat([dataset.__getitems__(range(i, i + 8))[0].clone() for i in range(0, 40, 8)])
    loader = DataLoader(
        dataset, 8, num_workers=1, multiprocessing_context=start, collate_fn=dataset.collate_fn
    )
    assert torch.equal(torch.cat([images for images, _ in loader]), wanted)


def test_images_of_two_sizes_cannot_be_one_batch(tmp_path, photos):
    image = photograph(photos)
    items = [("a", encoded(image, "png"), 0), ("b", encoded(image.resize((9, 9)), "png"), 0)]
    write_lmdb(items, tmp_path / "db", progress=False)
    with pytest.raises(
        ValueError, match=r"record 1 has the shape .*collate=True needs images of one"
    ):
        LMDBDataset(tmp_path / "db", collate=True).__getitems__([0, 1])


# ---- processes ----


@pytest.mark.parametrize(
    ("start", "collate"),
    [
        pytest.param(
            start,
            collate,
            marks=[pytest.mark.slow] * (start == TWIN or (collate and start != "fork")),
        )
        for start in multiprocessing.get_all_start_methods()
        for collate in (False, True)
    ],
)
def test_workers_read_what_the_parent_has_opened(database, start, collate):
    dataset = LMDBDataset(database, collate=collate)
    held = LMDBDataset(database)
    wanted = torch.stack([held[i][0] for i in range(COUNT)])  # opened here, before the fork
    loader = DataLoader(
        dataset,
        8,
        num_workers=2 if start == "fork" else 1,
        multiprocessing_context=start,
        collate_fn=dataset.collate_fn,
    )
    assert torch.equal(torch.cat([images for images, _ in loader]), wanted)
    assert torch.equal(held[3][0], wanted[3])  # the parent's is as it was


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_of_a_child_reads_as_well(database):
    dataset = LMDBDataset(database, decode=None)
    wanted = [dataset[i][0] for i in range(4)]

    def child(depth):
        if [dataset[i][0] for i in range(4)] != wanted:
            os._exit(1)
        if dataset._files[0].open().pid != os.getpid():  # one that was inherited
            os._exit(2)
        if depth:
            pid = os.fork()
            if not pid:
                child(depth - 1)
            os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        os._exit(0)

    pid = os.fork()
    if not pid:
        child(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert [dataset[i][0] for i in range(4)] == wanted


def test_one_file_is_opened_any_number_of_times_in_one_process(database):
    datasets = [LMDBDataset(database, decode=None) for _ in range(20)]
    assert len({dataset[7] for dataset in datasets}) == 1
    del datasets[:19]
    assert datasets[0][7]


def test_threads_read_at_once(database):
    dataset = LMDBDataset(database, decode=None)
    wanted = [dataset[i] for i in range(COUNT)]
    fresh = LMDBDataset(database, decode=None)
    order = np.random.default_rng(0).integers(0, COUNT, 2000).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(fresh.__getitem__, order)) == [wanted[i] for i in order]


def test_a_dataset_can_be_pickled_after_it_was_read(database):
    dataset = LMDBDataset(database)
    image = dataset[5][0]
    assert dataset.targets
    sent = pickle.dumps(dataset)
    assert len(sent) < 3000  # its path, and no list of anything
    assert torch.equal(pickle.loads(sent)[5][0], image)


def test_two_processes_of_a_distributed_run_read_each_image_once(database):
    dataset = LMDBDataset(database, decode=None)
    seen = []
    for rank in range(2):
        sampler = DistributedSampler(dataset, num_replicas=2, rank=rank, shuffle=True)
        loader = DataLoader(dataset, 4, sampler=sampler, num_workers=1, collate_fn=list)
        seen += [image for batch in loader for image, _ in batch]
    assert sorted(seen) == sorted(dataset[i][0] for i in range(COUNT))


def test_a_subset_reads_in_batches(database):
    part = Subset(LMDBDataset(database, decode=None), [7, 3])
    assert part.__getitems__([1, 0]) == [part[1], part[0]]


def test_reading_leaves_no_file_behind_and_needs_no_right_to_write(photos, tmp_path):
    folder = tmp_path / "read-only"
    folder.mkdir()
    write_lmdb(photos, folder / "db", progress=False)
    assert os.listdir(folder) == ["db"]
    (folder / "db").chmod(0o444)
    folder.chmod(0o555)
    for parent in tmp_path.parents:  # another user has to get here
        if parent.stat().st_uid == os.getuid() and str(parent).startswith("/tmp/"):
            parent.chmod(parent.stat().st_mode | 0o055)
    tmp_path.chmod(0o755)
    code = (
        "import os, sys\n"
        "from dlhelpers.lmdb_io import LMDBDataset, verify_lmdb\n"
        "if os.getuid() == 0: os.setgid(65534), os.setuid(65534)\n"
        "assert not os.access(os.path.dirname(sys.argv[1]), os.W_OK)\n"
        "print(len(LMDBDataset(sys.argv[1])[3][0]))\n"
    )
    done = fresh.run(code, folder / "db")
    folder.chmod(0o755)
    assert done.stdout == "3\n", done.stderr
    assert os.listdir(folder) == ["db"]


# ---- a file that is replaced ----


def test_an_open_dataset_goes_on_with_the_old_file(photos, tmp_path):
    write_lmdb(photos, tmp_path / "db", progress=False)
    dataset = LMDBDataset(tmp_path / "db", decode=None)
    before = [dataset[i] for i in range(COUNT)]
    write_lmdb(photos, tmp_path / "db", resize=32, progress=False)
    assert [dataset[i] for i in range(COUNT)] == before
    assert LMDBDataset(tmp_path / "db")[0][0].shape == (3, 32, 32)


def test_a_dataset_made_before_and_read_after_says_so(photos, tmp_path):
    write_lmdb(photos, tmp_path / "db", progress=False)
    dataset = LMDBDataset(tmp_path / "db")
    write_lmdb(photos, tmp_path / "db", resize=32, progress=False)
    with pytest.raises(DatabaseError, match="was replaced after this dataset was made"):
        dataset[0]


def test_there_is_nothing_to_read_before_the_conversion_is_whole(tmp_path):
    seen = []

    def items():
        for number in range(3):
            with pytest.raises(FileNotFoundError) as missing:
                LMDBDataset(tmp_path / "db")
            seen.append(str(missing.value))
            yield f"{number}", encoded(Image.new("L", (8, 8)), "png"), 0

    write_lmdb(items(), tmp_path / "db", progress=False)
    assert all("a conversion is under way" in text for text in seen)
    assert len(LMDBDataset(tmp_path / "db")) == 3


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no database; convert .*nothing.lmdb"):
        LMDBDataset(tmp_path / "nothing.lmdb")


# ---- shards ----


@pytest.fixture(scope="module")
def shards(photos):
    folder = photos.parent / "shards"
    for rank in range(3):
        write_lmdb(photos, folder, shard=(rank, 3), progress=False)
    return folder


def test_shards_are_one_dataset_in_the_order_of_the_whole(database, shards):
    whole, parts = LMDBDataset(database, decode=None), LMDBDataset(shards, decode=None)
    assert parts.samples == whole.samples
    assert [parts[i] for i in range(COUNT)] == [whole[i] for i in range(COUNT)]
    order = [39, 0, 14, 13, 26, -1]
    assert parts.__getitems__(order) == [whole[i] for i in order]
    assert [parts.find(key) for key, _ in whole.samples] == list(range(COUNT))
    assert verify_lmdb(shards, progress=False).count == COUNT
    assert info_lmdb(shards).count == COUNT


def test_a_missing_shard_is_named(photos, tmp_path):
    for rank in (0, 2):
        write_lmdb(photos, tmp_path, shard=(rank, 3), progress=False)
    with pytest.raises(DatabaseError, match=r"missing are the ranks \[1\]"):
        LMDBDataset(tmp_path)
    with pytest.raises(FileExistsError, match="shards of another number"):
        write_lmdb(photos, tmp_path, shard=(0, 2), progress=False)


def test_shards_of_two_sources_are_refused(photos, tmp_path):
    write_lmdb(photos, tmp_path, shard=(0, 2), progress=False)
    write_lmdb(photos, tmp_path, shard=(1, 2), resize=32, progress=False)
    with pytest.raises(DatabaseError, match="the shards differ in their settings"):
        LMDBDataset(tmp_path)


def test_shards_of_a_source_that_grew_in_between_are_refused(photos, tmp_path):
    samples = [(f"{n}", encoded(photograph(photos), "png"), 0) for n in range(6)]
    write_lmdb(samples[:4], tmp_path, shard=(0, 2), progress=False)
    write_lmdb(samples, tmp_path, shard=(1, 2), progress=False)
    with pytest.raises(DatabaseError, match="the shards differ in their total"):
        LMDBDataset(tmp_path)
    with pytest.raises(DatabaseError, match="the shards differ in their total"):
        verify_lmdb(tmp_path, progress=False)


def test_one_key_in_two_shards_is_found(tmp_path):
    image = encoded(Image.new("L", (8, 8)), "png")
    for rank in range(2):
        items = [("same", image, 0), ("same", image, 0)]
        write_lmdb(items, tmp_path, shard=(rank, 2), progress=False)
    with pytest.raises(DatabaseError, match=r"key b'same' is in shard-00000.* and in shard-00001"):
        verify_lmdb(tmp_path, progress=False)


def test_a_folder_without_shards_is_named(tmp_path):
    with pytest.raises(DatabaseError, match="is a folder without shards"):
        LMDBDataset(tmp_path)


def test_an_iterator_without_length_is_dealt_out_in_turn(tmp_path):
    image = encoded(Image.new("L", (8, 8)), "png")
    for rank in range(2):
        items = ((f"{n}", image, n) for n in range(5))
        write_lmdb(items, tmp_path, shard=(rank, 2), progress=False)
    assert LMDBDataset(tmp_path).targets == [0, 2, 4, 1, 3]


@pytest.mark.slow  # the shards' tests write the same files in one process
def test_two_ranks_under_torchrun_write_one_dataset(photos, database, tmp_path):
    script = tmp_path / "convert.py"
    script.write_text(
        "import os, sys\n"
        "import torch.distributed as dist\n"
        "from torch.utils.data import DataLoader, DistributedSampler\n"
        "from dlhelpers.lmdb_io import LMDBDataset, write_lmdb\n"
        "dist.init_process_group('gloo')\n"
        "rank, world = dist.get_rank(), dist.get_world_size()\n"
        "write_lmdb(sys.argv[1], sys.argv[2], shard=(rank, world), progress=False)\n"
        "dist.barrier()\n"
        "dataset = LMDBDataset(sys.argv[2], decode=None)\n"
        "mine = [key for key, _ in (dataset.samples[i] for i in DistributedSampler(dataset))]\n"
        "parts = [None] * world\n"
        "dist.all_gather_object(parts, mine)\n"
        "said = open(f'{sys.argv[2]}.{rank}', 'w')\n"
        "print(len(dataset), len(set(sum(parts, []))), file=said, flush=True)\n"
        "dist.destroy_process_group()\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "--standalone", str(script), str(photos), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    said = [Path(f"{tmp_path / 'out'}.{rank}").read_text() for rank in range(2)]
    assert said == ["40 40\n", "40 40\n"], done.stderr
    assert LMDBDataset(tmp_path / "out").samples == LMDBDataset(database).samples


# ---- memory ----


@pytest.mark.skipif(sys.platform != "linux", reason="Linux accounts for private memory")
def test_a_readers_own_memory_does_not_grow_with_the_dataset(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (100, 100, 3), np.uint8)
    code = (
        "import sys\n"
        "from dlhelpers.lmdb_io import LMDBDataset\n"
        "from dlhelpers.course.stores.pagecache import _private_bytes\n"
        "dataset = LMDBDataset(sys.argv[1])\n"
        "for i in range(100): dataset[i]\n"
        "before = _private_bytes()\n"
        "for i in range(100, len(dataset)): dataset[i]\n"
        "print(_private_bytes() - before)\n"
    )
    items = ((f"{n}", pixels, n) for n in range(1100))
    write_lmdb(items, tmp_path / "db", encode="raw", progress=False)
    grown = fresh.run(code, tmp_path / "db").stdout
    assert int(grown) < 1000 * 30_012 / 20


def test_a_decoder_that_is_too_old_is_passed_over(monkeypatch):
    cv2 = pytest.importorskip("cv2", reason="OpenCV (extra codecs)")
    monkeypatch.delattr(cv2, "IMREAD_COLOR_RGB")
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    for cached in (decoding.load_decoder, decoding.decoders):
        cached.cache_clear()
    try:
        assert decoders()[0] == "torchvision"
        assert load_decoder("auto") is load_decoder("torchvision")
    finally:
        for cached in (decoding.load_decoder, decoding.decoders):
            cached.cache_clear()


def test_auto_is_the_first_decoder_that_is_installed():
    assert load_decoder("auto") is load_decoder(decoders()[0])


def test_verify_opens_one_shard_at_a_time(tmp_path):
    """So that the limit of open files is no limit of shards."""
    resource = pytest.importorskip("resource")
    png = io.BytesIO()
    Image.new("L", (2, 2)).save(png, "PNG")
    samples = [(f"k{i:02}", png.getvalue(), 0) for i in range(40)]
    write_lmdb(samples, tmp_path / "db", shards=40, progress=False)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 20, hard))
    try:
        assert verify_lmdb(tmp_path / "db", progress=False).count == 40
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
