"""DALILoader iterates as torch's DataLoader does, where DALI's own iterator does not."""

import gc
import itertools
import logging
import os
import pickle
import subprocess
import sys
import threading
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import fresh
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from torchvision.datasets import ImageFolder

from dlhelpers.course import data
from dlhelpers.dali_io import DALILoader, ImageError, has_dali, image_pipeline
from dlhelpers.dali_io.plan import Plan
from dlhelpers.lmdb_io import LMDBDataset, write_lmdb

pytestmark = pytest.mark.skipif(not has_dali(), reason="DALI (extra dali) is for Linux only")
BATCH = 4


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Files whose pixels tell their number, and their number as the target."""
    folder = tmp_path_factory.mktemp("numbered")
    found = []
    for number in range(2 * BATCH + 1):
        pixels = np.full((12, 12, 3), 20 * number, np.uint8)
        pixels[:, :6] //= 2  # what is flipped shows it
        Image.fromarray(pixels).save(folder / f"{number}.png")
        found.append((str(folder / f"{number}.png"), number))
    return found


def loader_of(samples, count=None, train=False, **options):
    plain = {"size": 8, "resize": 8, "batch_size": BATCH, "device": "cpu", "mean": (0, 0, 0)}
    pipeline = image_pipeline(samples[:count], train=train, std=(1, 1, 1), threads=1, **plain)
    return DALILoader(pipeline, **options)


def numbers(batches):
    return [targets.tolist() for _, targets in batches]


def same(batches, others):
    return all(
        torch.equal(a, b)
        for one, other in zip(batches, others, strict=True)
        for a, b in zip(one, other, strict=True)
    )


# ---- what a batch is ----


def test_a_batch_goes_straight_into_cross_entropy(samples):
    images, targets = next(iter(loader_of(samples)))
    assert (images.dtype, images.shape) == (torch.float32, (BATCH, 3, 8, 8))
    assert (targets.dtype, targets.shape) == (torch.int64, (BATCH,))
    assert images.is_contiguous()
    torch.nn.functional.cross_entropy(torch.randn(BATCH, 10), targets)


def test_every_image_comes_with_its_own_target(samples):
    for images, targets in loader_of(samples, shuffle=True):
        assert torch.equal((images.amax((1, 2, 3)) * 255 / 20).round().long(), targets)


def test_a_batch_keeps_its_values_when_the_next_ones_come(samples):
    batches = list(loader_of(samples))
    copies = [images.clone() for images, _ in loader_of(samples)]
    assert all(torch.equal(images, copy) for (images, _), copy in zip(batches, copies, strict=True))


# ---- len: NVIDIA/DALI#1203, #4440 ----


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("count", range(1, 2 * BATCH + 2))
def test_len_is_that_of_a_dataloader_in_every_epoch_issues_1203_and_4440(samples, count, drop_last):
    wanted = DataLoader(
        TensorDataset(torch.arange(count)), batch_size=BATCH, drop_last=drop_last, shuffle=False
    )
    loader = loader_of(samples, count, drop_last=drop_last)
    for _ in range(3):
        batches = numbers(loader)
        assert batches == [batch.tolist() for (batch,) in wanted]
        assert len(loader) == len(wanted) == len(batches)


def dalis_iterator(samples, policy):
    from nvidia.dali import fn, pipeline_def
    from nvidia.dali.plugin.pytorch import DALIClassificationIterator, LastBatchPolicy

    files, labels = zip(*samples, strict=True)

    @pipeline_def(batch_size=BATCH, num_threads=1, device_id=None)
    def read():
        encoded, targets = fn.readers.file(files=list(files), labels=list(labels), name="reader")
        return fn.decoders.image(encoded), targets

    return DALIClassificationIterator(
        read(),
        reader_name="reader",
        last_batch_policy=LastBatchPolicy[policy],
        auto_reset=True,
    )


def test_dalis_own_iterator_is_what_the_issues_are_about(samples):
    """If this fails, DALI has mended it, and the notebook has to say so."""
    theirs = dalis_iterator(samples[: BATCH + 1], "FILL")  # its default
    assert len({len(list(theirs)) for _ in range(2)}) == 2  # 1203, 4440
    theirs = dalis_iterator(samples, "PARTIAL")
    first = next(iter(theirs))[0]["label"]
    assert (first.dtype, first.shape) == (torch.int32, (BATCH, 1))  # not what a loss wants
    assert len(list(theirs)) == 2  # 2559: goes on where the loop was left


# ---- leaving early: NVIDIA/DALI#2559 ----


@pytest.mark.parametrize("taken", [0, 1, 2, 3])
def test_a_loop_left_early_can_be_started_again_issue_2559(samples, taken, caplog):
    loader = loader_of(samples)
    whole = numbers(loader)
    for _ in range(3):
        batches = iter(loader)
        for _ in range(taken):
            next(batches)
        with caplog.at_level(logging.WARNING):
            assert numbers(loader) == whole
    assert caplog.records == []


def test_what_was_taken_before_changes_nothing_after(samples):
    one, other = (loader_of(samples, train=True, seed=3) for _ in range(2))
    list(one)
    next(iter(other))
    assert same(list(one), list(other))  # epoch 1 of both


@pytest.mark.parametrize("where", ["while reading", "in DALI"])
def test_an_interrupted_loop_gives_no_batch_with_other_targets(samples, where, monkeypatch):
    loader = loader_of(samples * 4, train=True)
    batches = iter(loader)
    next(batches)

    def interrupted(*_):
        monkeypatch.undo()
        raise KeyboardInterrupt

    if where == "while reading":
        monkeypatch.setattr(Future, "result", interrupted)
    else:
        monkeypatch.setattr(loader._executor._built, "share_outputs", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(batches)
    with pytest.raises(RuntimeError, match="was interrupted"):
        next(batches)
    check = loader_of(samples * 4, train=True)
    check.set_epoch(1)
    assert same(list(loader), list(check))


def test_a_loop_may_be_shared_by_threads(samples):
    batches = iter(loader_of(samples * 20))
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda _: numbers(batches), range(4)))
    assert sorted(n for part in parts for batch in part for n in batch) == sorted(
        [number for _, number in samples] * 20
    )


def test_a_used_loader_can_be_pickled(samples):
    loader = loader_of(samples, train=True, seed=3)
    list(loader)
    copy = pickle.loads(pickle.dumps(loader))
    assert copy.epoch == 1
    assert same(list(copy), list(loader))


def test_an_older_loop_says_that_a_newer_one_has_begun(samples):
    loader = loader_of(samples)
    old = iter(loader)
    next(old)
    iter(loader)
    with pytest.raises(RuntimeError, match="a DALILoader for each"):
        next(old)


def test_a_loop_that_is_over_stays_over(samples):
    batches = iter(loader_of(samples))
    list(batches)
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(batches)


# ---- peek: NVIDIA/DALI#5275 ----


def test_peek_shows_a_batch_that_is_not_lost_issue_5275(samples):
    loader = loader_of(samples, shuffle=True, seed=1)
    whole = list(loader_of(samples, shuffle=True, seed=1))
    seen = [loader.peek(), loader.peek()]
    assert same(seen, [whole[0]] * 2)
    batches = iter(loader)
    assert same([next(batches)], whole[:1])
    assert same([loader.peek()], whole[1:2])
    assert same(list(batches), whole[1:])


def test_peek_after_an_epoch_shows_the_next_one(samples):
    loader = loader_of(samples, shuffle=True)
    list(loader)
    seen = loader.peek()
    assert loader.epoch == 1
    assert same([seen], list(loader)[:1])


def test_peek_follows_set_epoch(samples):
    loader, other = loader_of(samples, shuffle=True), loader_of(samples, shuffle=True)
    loader.peek()
    loader.set_epoch(7)
    other.set_epoch(7)
    assert same([loader.peek()], list(other)[:1])


def test_a_loop_after_peek_follows_set_epoch(samples):
    loader, other = loader_of(samples, shuffle=True), loader_of(samples, shuffle=True)
    loader.peek()
    for one in (loader, other):
        one.set_epoch(7)
    assert same(list(loader), list(other))


def test_peek_where_no_batch_is_says_so(samples):
    with pytest.raises(StopIteration):
        loader_of(samples, 3, drop_last=True).peek()
    assert numbers(loader_of(samples, 3, drop_last=True)) == []


def test_no_two_batches_of_ranks_epochs_and_seeds_draw_the_same_crops():
    order = np.arange(3 * BATCH)
    pipeline = SimpleNamespace(batch_size=BATCH, train=True)
    drawn = {}
    for seed, rank, epoch in itertools.product(range(2), range(2), range(2)):
        plan = Plan(pipeline, seed, (rank, 2), skips=False)
        for job in plan.jobs(epoch, order, range(3), 0):
            numbers = tuple(np.random.default_rng(job.seed).random(4))
            drawn[numbers] = seed, rank, epoch, job.number
    assert len(drawn) == 2 * 2 * 2 * 3


# ---- order: epochs, seeds, shards ----


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 2 * BATCH + 1),
    world=st.integers(1, 3),
    epoch=st.integers(0, 5),
    seed=st.integers(0, 3),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
)
def test_the_order_is_that_of_distributedsampler(
    samples, count, world, epoch, seed, shuffle, drop_last
):
    for rank in range(world):
        options = {"shuffle": shuffle, "seed": seed, "drop_last": drop_last}
        sampler = DistributedSampler(range(count), world, rank, **options)
        sampler.set_epoch(epoch)
        wanted = DataLoader(range(count), BATCH, sampler=sampler, drop_last=drop_last)
        loader = loader_of(samples, count, shard=(rank, world), **options)
        loader.set_epoch(epoch)
        assert len(loader) == len(wanted)
        assert numbers(loader) == [batch.tolist() for batch in wanted]


def test_seed_and_epoch_decide_on_every_pixel(samples):
    loader = loader_of(samples, train=True, seed=5)
    first, second = list(loader), list(loader)
    assert not same(first, second)
    again = loader_of(samples, train=True, seed=5)
    again.set_epoch(1)
    assert same(list(again), second)
    assert same(list(again), list(loader))  # epoch 2 of both
    assert not same(list(loader_of(samples, train=True, seed=6)), first)


def test_each_epoch_and_each_shard_draws_its_own_crops(samples):
    """Not only the order changes: the same image is cut otherwise."""
    ordered = {"train": True, "shuffle": False}
    loader = loader_of(samples, **ordered)
    assert not same(list(loader), list(loader))
    again = loader_of(samples, **ordered)
    assert same(list(again), list(loader_of(samples, **ordered)))
    one_image = [samples[3]] * 8
    shards = [list(loader_of(one_image, shard=(rank, 2), **ordered)) for rank in (0, 1)]
    assert numbers(shards[0]) == numbers(shards[1])
    assert not same(*shards)


def test_random_operators_of_augment_follow_seed_and_shard(samples):
    from nvidia.dali import fn

    def noisy(images):
        return fn.noise.salt_and_pepper(images, prob=0.5)

    def batches(seed, shard):
        pipeline = image_pipeline(
            [samples[3]] * 8, size=8, batch_size=4, train=False, device="cpu", augment=noisy
        )
        return list(DALILoader(pipeline, seed=seed, shard=shard))

    assert same(batches(1, (0, 2)), batches(1, (0, 2)))
    assert not same(batches(1, (0, 2)), batches(1, (1, 2)))
    assert not same(batches(1, (0, 2)), batches(2, (0, 2)))


def test_threads_and_prefetch_reach_dali(samples):
    pipeline = image_pipeline(
        samples, size=8, batch_size=4, train=True, device="cpu", threads=3, prefetch=5
    )
    built = pipeline.build(lambda: None)
    assert (built.num_threads, built.prefetch_queue_depth) == (3, 5)
    assert built.max_batch_size == 4


def test_threads_and_prefetching_change_no_pixel(samples):
    def batches(**options):
        pipeline = image_pipeline(
            samples, size=8, batch_size=BATCH, train=True, device="cpu", **options
        )
        return list(DALILoader(pipeline, seed=2))

    wanted = batches(threads=1, prefetch=1)
    assert same(batches(threads=2, prefetch=4), wanted)


# ---- images that cannot be read ----


@pytest.fixture
def damaged(tmp_path):
    """Twenty photos of which four are damaged, each in its own way."""
    folder = data.photos(tmp_path / "photos", count=20, size=96, progress=False)
    files = [path for path, _ in ImageFolder(folder).samples]
    whole = Path(files[2]).read_bytes()
    bad = {2: whole[: len(whole) // 2], 3: whole[:200], 9: b"no image at all", 17: b""}
    for number, content in bad.items():
        Path(files[number]).write_bytes(content)
    return files, list(bad)


def damaged_loader(files, train, **options):
    pipeline = image_pipeline(
        [(file, number) for number, file in enumerate(files)],
        size=32,
        batch_size=8,
        train=train,
        device="cpu",
        scale=(1, 1),  # the whole image, so that all of its damage is seen
    )
    return DALILoader(pipeline, **options)


@pytest.mark.parametrize("train", [False, True])
def test_a_damaged_image_is_named(damaged, train):
    files, bad = damaged
    with pytest.raises(ImageError) as told:
        list(damaged_loader(files, train, shuffle=False))
    assert {name for name, _ in told.value.images} == {files[bad[0]], files[bad[1]]}  # batch 0
    assert files[bad[0]] in str(told.value)
    assert "truncated" in str(told.value)
    assert 'on_error="skip"' in str(told.value)


def test_skip_leaves_damaged_images_out_and_lists_them(damaged):
    files, bad = damaged
    loader = damaged_loader(files, train=False, on_error="skip")
    with pytest.warns(UserWarning, match="is left out"):
        batches = numbers(loader)
    assert [len(batch) for batch in batches] == [6, 7, 3]
    assert sorted(itertools.chain(*batches)) == [n for n in range(20) if n not in bad]
    assert [name for name, _ in loader.skipped] == [files[n] for n in bad]
    assert numbers(loader) == batches  # the next epoch does not stumble again
    assert len(loader) == 3


def test_skip_changes_nothing_about_the_other_images(damaged):
    files, bad = damaged
    loader = damaged_loader(files, train=True, on_error="skip", seed=4)
    with pytest.warns(UserWarning, match="is left out"):
        stumbling = list(loader)
    loader.set_epoch(0)
    assert same(list(loader), stumbling)
    for number in bad:
        Image.new("RGB", (96, 96)).save(files[number], "JPEG")
    mended = list(damaged_loader(files, train=True, seed=4))
    for (images, targets), (all_images, all_targets) in zip(stumbling, mended, strict=True):
        kept = ~torch.isin(all_targets, torch.tensor(bad))
        assert torch.equal(all_targets[kept], targets)
        assert torch.equal(all_images[kept], images)


@pytest.mark.parametrize("bad", [(30,), (2, 13, 30, 31)])
def test_an_image_that_is_damaged_far_behind_loses_no_batch_before_it(tmp_path, bad):
    folder = data.photos(tmp_path / "photos", count=40, size=64, progress=False)
    files = [path for path, _ in ImageFolder(folder).samples]
    for number in bad:
        Path(files[number]).write_bytes(b"no image at all")
    pipeline = image_pipeline(
        [(file, number) for number, file in enumerate(files)],
        size=32, batch_size=4, train=False, device="cpu",
    )  # fmt: skip
    loader = DALILoader(pipeline, on_error="skip")
    with pytest.warns(UserWarning, match="is left out"):
        batches = numbers(loader)
    assert len(batches) == 10
    assert list(itertools.chain(*batches)) == [n for n in range(40) if n not in bad]
    given = []
    with pytest.raises(ImageError):
        given.extend(number for _, targets in DALILoader(pipeline) for number in targets.tolist())
    assert given == list(range(len(given)))
    assert len(given) <= bad[0]


def test_a_loop_after_peek_raised_raises_as_well(damaged):
    files, _ = damaged
    loader = damaged_loader(files, train=False)
    with pytest.raises(ImageError):
        loader.peek()
    with pytest.raises(ImageError):
        list(loader)


def test_a_batch_of_nothing_but_damaged_images_is_left_out(damaged):
    files, bad = damaged
    loader = damaged_loader([files[n] for n in bad] * 2 + files[10:12], False, on_error="skip")
    with pytest.warns(UserWarning, match="is left out"):
        assert numbers(loader) == [[8, 9]]
    assert numbers(loader) == [[8, 9]]


def test_after_an_error_the_loader_can_be_used_again(damaged):
    files, bad = damaged
    loader = damaged_loader(files, train=False)
    for _ in range(2):
        with pytest.raises(ImageError):
            list(loader)
    for number in bad:
        Image.new("RGB", (96, 96)).save(files[number], "JPEG")
    assert len(numbers(loader)) == 3


def test_a_damaged_record_of_a_database_names_its_key(tmp_path):
    folder = data.photos(tmp_path / "photos", count=12, size=64, progress=False)
    write_lmdb(folder, tmp_path / "photos.lmdb", progress=False)
    image = (folder / "china" / "0000004.jpg").read_bytes()
    damaged = bytearray(image)
    damaged[len(image) // 2] ^= 1
    content = (tmp_path / "photos.lmdb").read_bytes()  # old pages may hold a second copy
    (tmp_path / "photos.lmdb").write_bytes(content.replace(image, damaged))
    pipeline = image_pipeline(
        LMDBDataset(tmp_path / "photos.lmdb"), size=32, batch_size=4, train=False, device="cpu"
    )
    with pytest.raises(ImageError, match=r"key 'china/0000004\.jpg'.*checksum"):
        list(DALILoader(pipeline))


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_no_image_is_blamed_for_an_error_of_augment(samples, on_error):
    from nvidia.dali import fn

    def too_large(images):
        return fn.crop(images, crop=(100, 100))

    pipeline = image_pipeline(
        samples, size=8, batch_size=4, train=False, device="cpu", augment=too_large
    )
    loader = DALILoader(pipeline, on_error=on_error)
    with pytest.raises(RuntimeError, match=r"fn\.crop"):
        list(loader)
    assert loader.skipped == []


def test_an_error_that_no_image_is_to_blame_for_is_passed_on(samples):
    def unbuildable(images):
        raise KeyError("the augmentation's own")

    pipeline = image_pipeline(samples, size=8, batch_size=4, train=False, augment=unbuildable)
    with pytest.raises(KeyError, match="own"):
        list(DALILoader(pipeline))


# ---- options ----


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("shard", (2, 2), "shard must be"),
        ("shard", (-1, 2), "shard must be"),
        ("shard", 3, "shard must be"),
        ("on_error", "ignore", "on_error must be"),
        ("seed", -1, "seed must be"),
        ("seed", 1.5, "seed must be"),
    ],
)
def test_an_option_out_of_range_is_told(samples, option, value, says):
    with pytest.raises(ValueError, match=says):
        loader_of(samples, **{option: value})


def test_an_epoch_below_zero_is_told(samples):
    with pytest.raises(ValueError, match="epoch must be"):
        loader_of(samples).set_epoch(-1)


def test_what_is_no_pipeline_is_told():
    with pytest.raises(TypeError, match="image_pipeline"):
        DALILoader("photos")


def test_close_gives_threads_back_and_the_loader_goes_on(samples):
    before = threading.active_count()
    loader = loader_of(samples)
    whole = numbers(loader)
    next(iter(loader))
    loader.close()
    assert threading.active_count() <= before + 1
    assert numbers(loader) == whole


def test_a_loader_that_nobody_holds_any_more_is_gone_at_once(samples):
    gc.disable()
    try:
        loader = loader_of(samples)
        next(iter(loader))
        built = weakref.ref(loader._executor)
        del loader
        assert built() is None
    finally:
        gc.enable()


def test_a_program_that_leaves_a_loop_ends(samples):
    code = (
        "from dlhelpers.dali_io import DALILoader, image_pipeline\n"
        f"pipeline = image_pipeline({samples!r}, size=8, batch_size=2, train=True)\n"
        "print(len(next(iter(DALILoader(pipeline)))[1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=os.environ
    )
    assert (done.returncode, done.stdout.strip()) == (0, "2")


def test_importing_the_module_does_not_import_dali():
    code = "import sys, dlhelpers.dali_io; print('nvidia.dali' in sys.modules)"
    assert fresh.run(code).stdout.strip() == "False"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_pipeline_gives_what_the_cpu_pipeline_gives(tmp_path):
    folder = data.photos(tmp_path / "photos", count=16, size=256, progress=False)
    for train in (False, True):
        batches = [
            list(
                DALILoader(
                    image_pipeline(folder, size=64, batch_size=8, train=train, device=device)
                )
            )
            for device in ("cpu", "cuda")
        ]
        for (cpu, targets), (gpu, labels) in zip(*batches, strict=True):
            assert gpu.is_cuda
            assert torch.equal(labels.cpu(), targets)
            assert (gpu.cpu() - cpu).abs().mean() < 0.02  # two JPEG decoders
