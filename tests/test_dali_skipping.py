"""on_error="skip": whatever becomes of a file, and whenever, training goes on, on every rank."""

import copy
import itertools
import os
import pickle
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fresh
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DistributedSampler

from dlhelpers.dali_io import DALILoader, ImageError, has_dali, image_pipeline, sources
from dlhelpers.lmdb_io import LMDBDataset, write_lmdb

pytestmark = [
    pytest.mark.skipif(not has_dali(), reason="DALI (extra dali) is for Linux only"),
    pytest.mark.filterwarnings("ignore:.*is left out"),
]
COUNT, BATCH = 12, 4


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    found = []
    for number in range(COUNT):
        found.append(tmp_path / f"{number}.jpg")
        pixels = rng.integers(0, 255, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).save(found[-1], quality=90)
    return found


def loader_of(files, train=False, augment=None, **options):
    pipeline = image_pipeline(
        [(file, number) for number, file in enumerate(files)],
        size=8, batch_size=BATCH, train=train, device="cpu", threads=1, scale=(1, 1),
        augment=augment,
    )  # fmt: skip
    return DALILoader(pipeline, **{"on_error": "skip", **options})


def numbers(batches):
    return [targets.tolist() for _, targets in batches]


def replaced(path, make):
    path.unlink()
    make(path)


DAMAGES = {
    "missing": Path.unlink,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "without its last bytes": lambda path: path.write_bytes(path.read_bytes()[:-40]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("404 Not Found" * 99),
    "a page of zeros": lambda path: path.write_bytes(bytes(4096)),
    "a header alone": lambda path: path.write_bytes(path.read_bytes()[:200]),
    "a folder": lambda path: replaced(path, Path.mkdir),
    "a link to itself": lambda path: replaced(path, lambda link: link.symlink_to(link)),
    "a link to nowhere": lambda path: replaced(path, lambda link: link.symlink_to("/no/where")),
    "a path through a file": lambda path: replaced(
        path, lambda link: link.symlink_to(f"{__file__}/a.jpg")
    ),
    "without permission": lambda path: path.chmod(0),
}


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("damage", DAMAGES)
def test_whatever_becomes_of_a_file_the_others_are_given(files, damage, epoch):
    if damage == "without permission" and os.geteuid() == 0:
        pytest.skip("the superuser may read every file")
    for train, bad in ((False, {1}), (True, {2, COUNT - 1})):
        loader = loader_of(files, train, shuffle=False)
        for _ in range(epoch):
            assert numbers(loader) == np.arange(COUNT).reshape(-1, BATCH).tolist()
        kept = {number: files[number].read_bytes() for number in bad}
        for number in bad:
            DAMAGES[damage](files[number])
        for _ in range(2):
            given = [number for number in range(COUNT) if number not in bad]
            assert list(itertools.chain(*numbers(loader))) == given
            assert len(loader) == COUNT // BATCH
        assert {name for name, _ in loader.skipped} == {str(files[number]) for number in bad}
        assert len(loader.skipped) == len(bad)
        for number, content in kept.items():
            if files[number].is_dir():
                files[number].rmdir()
            files[number].unlink(missing_ok=True)
            files[number].write_bytes(content)


def test_a_file_that_goes_while_the_epoch_runs_is_left_out(files):
    loader = loader_of(files * 4, shuffle=False)
    batches = iter(loader)
    next(batches)
    files[3].unlink()
    given = list(itertools.chain(*numbers(batches)))
    others = [number for number in range(BATCH, 4 * COUNT) if number % COUNT != 3]
    assert [number for number in given if number % COUNT != 3] == others
    assert 3 * COUNT + 3 not in given  # what was read ahead before may be there
    assert str(files[3]) in {name for name, _ in loader.skipped}


def test_a_file_that_is_replaced_by_a_larger_one_gives_the_new_picture(files):
    loader = loader_of(files, shuffle=False)
    list(loader)
    Image.new("RGB", (400, 90), "red").save(files[5], "PNG")
    images, targets = next(itertools.islice(loader, 1, None))
    wanted = loader_of(files, shuffle=False)
    assert torch.equal(images, next(itertools.islice(wanted, 1, None))[0])
    assert targets.tolist() == [4, 5, 6, 7]


# ---- several ranks ----


def good_walk(order, bad, count):
    """The rank's order without bad images, repeated."""
    return list(itertools.islice(itertools.cycle(n for n in order if n not in bad), count))


def order_of(rank, world, epoch, count=COUNT):
    sampler = DistributedSampler(range(count), world, rank, seed=3)
    sampler.set_epoch(epoch)
    return list(sampler)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("bad", [{0}, {0, 1, 2}, {1, 4, 7, 10}, {11, 3}])
def test_in_training_every_rank_gives_as_many_whole_batches(files, world, bad):
    for number in bad:
        files[number].unlink()
    for rank in range(world):
        loader = loader_of(files, True, seed=3, shard=(rank, world))
        for epoch in range(2):
            order = order_of(rank, world, epoch)
            if set(order) <= bad:
                continue
            walk = good_walk(order, bad, len(order))
            wanted = [walk[at : at + BATCH] for at in range(0, len(order), BATCH)]
            loader.set_epoch(epoch)
            assert numbers(loader) == wanted
            assert len(wanted) == len(loader)
            loader.set_epoch(epoch)
            assert numbers(loader) == wanted  # now that they are known
        skipped = [name for name, _ in loader.skipped]
        assert len(skipped) == len(set(skipped))
        assert set(skipped) <= {str(files[number]) for number in bad}


def test_an_image_that_has_been_given_and_then_goes_moves_no_other(files):
    """Batch 1 goes on where batch 0 ended, and the order begins again behind the first image."""
    order = np.array(order_of(0, 2, 0))
    plan = loader_of(files, True, seed=3, shard=(0, 2))._plan
    plan.bad.update({int(order[0]): "gone", int(order[-1]): "gone"})
    (job,) = plan.jobs(0, order, range(1, 2), BATCH)
    assert job.indices.tolist() == [order[4], order[1]]


def test_in_evaluation_no_rank_repeats_an_image(files):
    files[order_of(0, 2, 0)[0]].unlink()
    for rank in range(2):
        loader = loader_of(files, False, shuffle=True, seed=3, shard=(rank, 2))
        given = list(itertools.chain(*numbers(loader)))
        assert given == [n for n in order_of(rank, 2, 0) if files[n].exists()]


def test_skipping_changes_no_crop_before_it(files):
    wanted = list(loader_of(files * 2, True, seed=3, shard=(0, 2)))
    files[order_of(0, 2, 0, 2 * COUNT)[6] % COUNT].unlink()
    given = list(loader_of(files * 2, True, seed=3, shard=(0, 2)))
    assert torch.equal(given[0][0], wanted[0][0])
    assert [len(targets) for _, targets in given] == [len(targets) for _, targets in wanted]


RANK = """
import os, sys, warnings
warnings.simplefilter("ignore")
import torch, torch.distributed as dist
from datetime import timedelta
from dlhelpers.dali_io import DALILoader, image_pipeline

rank, where, files = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
dist.init_process_group(
    "gloo", init_method=f"file://{where}", rank=rank, world_size=2, timeout=timedelta(seconds=40)
)
samples = [(file, number) for number, file in enumerate(files)]
pipeline = image_pipeline(samples, size=8, batch_size=2, train=True, device="cpu", threads=1)
loader = DALILoader(pipeline, seed=3, shard=(rank, 2), on_error="skip")
for epoch in range(2):
    loader.set_epoch(epoch)
    for images, targets in loader:
        dist.all_reduce(images.sum())
        print(*targets.tolist())
    dist.barrier()
    if epoch == 0 and rank == 0:
        for number in (0, 2, 4):
            os.unlink(files[number])
    dist.barrier()
print(*sorted(name for name, _ in loader.skipped))
dist.destroy_process_group()
"""


def test_two_processes_that_skip_do_not_wait_for_each_other(files, tmp_path):
    """Three images are lost between two shuffled epochs: each rank goes on with its next ones."""
    with ThreadPoolExecutor(2) as both:
        told = list(both.map(lambda rank: fresh.run(RANK, rank, tmp_path / "gloo", *files), (0, 1)))
    bad = {0, 2, 4}
    for rank, process in enumerate(told):
        *batches, skipped = process.stdout.splitlines() or [""]
        orders = [order_of(rank, 2, epoch) for epoch in range(2)]
        walk = [*orders[0], *good_walk(orders[1], bad, len(orders[1]))]
        assert batches == [f"{one} {two}" for one, two in zip(*[iter(walk)] * 2, strict=True)], told
        assert {Path(name) for name in skipped.split()} == {
            files[number] for number in bad & {*orders[1]}
        }
    assert all(bad & {*order_of(rank, 2, 1)} for rank in range(2))  # both have to replace some


# ---- nothing is left ----


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("shard", [(0, 1), (1, 2)])
@pytest.mark.parametrize("epoch", [0, 1])
def test_where_no_image_is_left_one_error_says_so(files, train, shard, epoch):
    loader = loader_of(files, train, shard=shard)
    for _ in range(epoch):
        list(loader)
    for file in files:
        file.unlink()
    for _ in range(2):
        with pytest.raises(ImageError, match=r"images cannot be read: .*No image is left"):
            list(loader)
    with pytest.raises(ImageError, match="No image is left"):
        loader.peek()
    assert 'on_error="skip"' not in str(ImageError(loader.skipped, all_of_them=True))


# ---- errors that are no image's ----


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_an_error_that_has_passed_is_tried_again(files, on_error, monkeypatch):
    stored, left = sources.Files.stored, [1]

    def sometimes(self, indices):
        if 5 in indices and left:
            left.pop()
            raise TimeoutError("the server did not answer")
        return stored(self, indices)

    monkeypatch.setattr(sources.Files, "stored", sometimes)
    loader = loader_of(files, shuffle=False, on_error=on_error)
    assert numbers(loader) == np.arange(COUNT).reshape(-1, BATCH).tolist()
    assert loader.skipped == []
    assert not left


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_what_dali_refuses_and_pillow_decodes_is_decoded_by_pillow(files, on_error, monkeypatch):
    Image.open(files[5]).save(files[5], "GIF")
    wanted = list(loader_of(files, shuffle=False))
    monkeypatch.setattr(sources, "for_dali", lambda data: (data, (40, 40)))  # as if it knew GIF
    given = list(loader_of(files, shuffle=False, on_error=on_error))
    for (images, targets), (same, labels) in zip(given, wanted, strict=True):
        assert torch.equal(targets, labels)
        assert torch.equal(images, same)


def test_a_warning_that_is_made_an_error_leaves_a_loader_that_can_be_used(files):
    files[5].unlink()
    loader = loader_of(files, shuffle=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=r"5\.jpg is left out"):
            list(loader)
    assert sum(map(len, numbers(loader))) == COUNT - 1


def test_ctrl_c_while_bad_images_are_looked_for_ends_the_loop(files, monkeypatch):
    files[5].unlink()
    loader = loader_of(files, shuffle=False)
    batches = iter(loader)

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(loader._executor, "find_bad", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(batches)
    with pytest.raises(RuntimeError, match="was interrupted"):
        next(batches)
    assert sum(map(len, numbers(loader))) == COUNT - 1


def test_several_threads_read_the_images_of_a_batch(files, monkeypatch):
    """And what one of them stumbles over is skipped as well."""
    stored = sources.Files.stored
    calls = []

    def noted(self, indices):
        calls.append(list(indices))
        time.sleep(0.001)
        return stored(self, indices)

    monkeypatch.setattr(sources.Files, "stored", noted)
    files[6].unlink()
    pipeline = image_pipeline(
        [(file, number) for number, file in enumerate(files)],
        size=8, batch_size=BATCH, train=False, device="cpu", threads=2,
    )  # fmt: skip
    loader = DALILoader(pipeline, on_error="skip")
    assert numbers(loader) == [[0, 1, 2, 3], [4, 5, 7], [8, 9, 10, 11]]
    assert [0, 1] in calls
    assert [2, 3] in calls


# ---- databases ----


@pytest.fixture(params=[None, "raw"])
def database(request, files, tmp_path):
    (tmp_path / "photos" / "c").mkdir(parents=True)
    for file in files:
        file.rename(tmp_path / "photos" / "c" / f"{int(file.stem):02}.jpg")
    path = tmp_path / "photos.lmdb"
    write_lmdb(tmp_path / "photos", path, encode=request.param, progress=False)
    return path


def pipeline_of(database):
    return image_pipeline(
        LMDBDataset(database), size=8, batch_size=BATCH, train=True, device="cpu", threads=1
    )


@pytest.mark.parametrize("again", [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy])
def test_pipeline_and_loader_over_a_database_can_be_copied_before_and_after_use(database, again):
    wanted = list(DALILoader(pipeline_of(database), seed=1))
    loader = DALILoader(again(pipeline_of(database)), seed=1)
    for epoch in range(2):
        loader.set_epoch(0)
        given = list(again(loader) if epoch else loader)
        assert numbers(given) == numbers(wanted)
        assert all(torch.equal(a, b) for (a, _), (b, _) in zip(given, wanted, strict=True))


def test_a_damaged_first_record_is_skipped_as_any_other(database):
    image = LMDBDataset(database, decode=None)[0][0]
    content = database.read_bytes()
    database.write_bytes(content.replace(image[-100:], bytes([image[-100] ^ 1]) + image[-99:]))
    loader = DALILoader(pipeline_of(database), on_error="skip", shuffle=False)
    assert [len(targets) for _, targets in loader] == [BATCH - 1, BATCH, BATCH]
    assert "key 'c/00.jpg'" in loader.skipped[0][0]


def test_a_database_that_was_replaced_gives_one_error(database, tmp_path):
    loader = DALILoader(pipeline_of(database), on_error="skip")
    list(loader)
    copied = pickle.loads(pickle.dumps(loader))
    for path in sorted((tmp_path / "photos" / "c").iterdir())[6:]:
        path.unlink()
    database.unlink()
    write_lmdb(tmp_path / "photos", database, encode="png", progress=False)
    with pytest.raises(ImageError, match=r"was replaced.*No image is left"):
        list(copied)
