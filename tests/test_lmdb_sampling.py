"""WindowSampler, by counting what each rank is given: in order, resumed, and on other ranks."""

import ctypes
import gc
import hashlib
import itertools
import json
import math
import mmap
import os
import pickle
import re
import socket
import subprocess
import sys
import tracemalloc
import warnings
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    DistributedSampler,
    Subset,
    random_split,
)

from dlhelpers.lmdb_io import LMDBDataset, WindowSampler, ordering, write_lmdb

MASK = 2**64 - 1


class Numbers(torch.utils.data.Dataset):
    """Items that are their own index."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return index


def samplers(dataset, world, **options):
    return [WindowSampler(dataset, world, rank, **options) for rank in range(world)]


def dealt(ranks):
    """The samples of a whole pass, turn by turn as the ranks read them."""
    turns = itertools.zip_longest(*map(list, ranks))
    return [index for turn in turns for index in turn if index is not None]


# ---- the order ----


def splitmix(seed):
    """The generator as its authors' C program has it, in Python's integers."""
    while True:
        seed = (seed + 0x9E3779B97F4A7C15) & MASK
        value = ((seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
        yield value ^ (value >> 31)


def shuffled(items, name):
    key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    return [item for _, item in sorted(zip(splitmix(key), items, strict=False))]


def order_by_definition(shards, window, block, seed, epoch):
    """Items of all shards, read off from the description of the order."""
    if window is None:
        return shuffled([item for shard in shards for item in shard], f"{seed}|{epoch}|all")
    blocks = [
        shard[first : first + block] for shard in shards for first in range(0, len(shard), block)
    ]
    line = [item for part in shuffled(blocks, f"{seed}|{epoch}|blocks") for item in part]
    parts = [line[first : first + window] for first in range(0, len(line), window)]
    return [
        item
        for number, part in enumerate(parts)
        for item in shuffled(part, f"{seed}|{epoch}|window {number}")
    ]


def test_the_generator_is_splitmix64():
    # the values that implementations in other languages are checked with
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert ordering._splitmix(1234567, 3).tolist() == expected
    assert list(itertools.islice(splitmix(1234567), 3)) == expected


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 20), min_size=1, max_size=4).filter(sum),
    window=st.none() | st.integers(1, 30),
    block=st.integers(1, 25),
    seed=st.sampled_from([0, 7, 2**64 - 1]),
    epoch=st.integers(0, 3),
    world=st.integers(1, 3),
)
def test_the_order_is_that_of_its_definition(sizes, window, block, seed, epoch, world):
    ends = np.cumsum(sizes).tolist()
    shards = [list(range(end - size, end)) for size, end in zip(sizes, ends, strict=True)]
    parts = ConcatDataset([Subset(Numbers(size), range(size)) for size in sizes])
    ranks = samplers(parts, world, window=window, block=window and block, seed=seed, drop_last=True)
    for sampler in ranks:
        sampler.set_epoch(epoch)
    expected = order_by_definition(shards, window, block, seed, epoch)
    assert dealt(ranks) == expected[: sum(sizes) // world * world]


def test_without_shuffling_it_deals_as_distributed_sampler():
    for count, world, drop_last in itertools.product((0, 1, 2, 7, 12), (1, 2, 5), (False, True)):
        for rank in range(world):
            options = {"shuffle": False, "drop_last": drop_last}
            theirs = DistributedSampler(Numbers(count), world, rank, **options)
            mine = WindowSampler(Numbers(count), world, rank, window=3, **options)
            assert isinstance(mine, DistributedSampler)
            expected = list(theirs) if count >= world or not drop_last else []  # theirs may fail
            assert list(mine) == expected
            assert len(mine) == mine.num_samples == len(expected)
            assert mine.total_size == len(expected) * world


@pytest.mark.parametrize(("count", "table"), [(2, 2**20), (3, 2**20), (16, 2**20), (16, 0)])
def test_each_item_comes_equally_often_at_each_place(monkeypatch, table, count):
    monkeypatch.setattr(ordering, "_LARGEST_TABLE", table)
    order = ordering.Order(Numbers(count), shuffle=True, window=None, block=None, seed=5)
    epochs = 500
    places = np.arange(count)
    found = np.array([order.epoch(epoch)(places) for epoch in range(epochs)])
    assert (np.sort(found, axis=1) == places).all()
    counts = np.array([np.bincount(column, minlength=count) for column in found.T])
    expected = epochs / count
    # chi squared with (count - 1)^2 degrees of freedom: mean that, variance twice that
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = (count - 1) ** 2
    assert statistic < freedom + 6 * math.sqrt(2 * freedom) + 12


@pytest.mark.parametrize("count", [1, 2, 3, 64, 65, 1000, 4096])
def test_a_permutation_without_a_table_gives_each_item_once(monkeypatch, count):
    monkeypatch.setattr(ordering, "_LARGEST_TABLE", 0)
    found = list(WindowSampler(Numbers(count)))
    assert sorted(found) == list(range(count))
    assert count < 64 or found != sorted(found)


@pytest.mark.parametrize("lag", [1, 63, 64, 2048])
def test_a_permutation_without_a_table_leaves_no_pattern(monkeypatch, lag):
    monkeypatch.setattr(ordering, "_LARGEST_TABLE", 0)
    theirs = np.random.default_rng(0).permutation(4096)
    mine = np.array(list(WindowSampler(Numbers(4096))))
    distances = [len(np.unique(np.roll(order, lag) - order)) for order in (mine, theirs)]
    assert distances[0] == pytest.approx(distances[1], rel=0.05)


def test_epochs_and_seeds_have_orders_of_their_own():
    sampler, again = (WindowSampler(Numbers(50), window=20, seed=1) for _ in range(2))
    found = []
    for epoch in (0, 1, 2, 0):
        sampler.set_epoch(epoch)
        again.set_epoch(epoch)
        found.append(list(sampler))
        assert found[-1] == list(again)
    assert found[3] == found[0]
    found[3] = list(WindowSampler(Numbers(50), window=20, seed=2))
    assert len({tuple(order) for order in found}) == 4


# ---- what a disk and a model see ----


class Pixels(Numbers):
    """Square images of one gray each, which is also their target."""

    def __init__(self, count, size):
        super().__init__(count)
        self.shape = (size, size, 3)

    def __getitem__(self, index):
        return np.full(self.shape, index, np.uint8), index


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A folder of three shards, 40 images of 8 x 8."""
    path = tmp_path_factory.mktemp("sampling") / "shards"
    for rank in range(3):
        write_lmdb(Pixels(40, 8), path, shard=(rank, 3), encode="raw", progress=False)
    return path


def test_shards_come_whole_and_in_random_order(shards):
    dataset = LMDBDataset(shards)
    shard_of = [0] * 13 + [1] * 13 + [2] * 14
    seen = set()
    sampler = WindowSampler(dataset, window=5)
    for epoch in range(20):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert sorted(order) == list(range(40))
        # windows mix the ends of neighbors, five items each way at most
        first = [shard_of[index] for index in order]
        places = [np.flatnonzero(np.array(first) == shard) for shard in range(3)]
        assert all(np.ptp(place) < len(place) + 10 for place in places)
        seen.add(tuple(dict.fromkeys(first)))
    assert len(seen) == 6


def test_the_images_are_those_of_the_indices(shards):
    dataset = LMDBDataset(shards)
    ranks = samplers(dataset, 2, window=8)
    targets = [
        target
        for sampler in ranks
        for _, batch in DataLoader(dataset, batch_size=6, sampler=sampler)
        for target in batch.tolist()
    ]
    assert sorted(targets) == list(range(40))


def reads(order, records, memory):
    """Count the runs of ``records`` neighbors that a disk reads, if memory keeps some runs."""
    kept, count = OrderedDict(), 0
    for index in order:
        run = index // records
        if run in kept:
            kept.move_to_end(run)
            continue
        count += 1
        kept[run] = None
        if len(kept) > memory:
            kept.popitem(last=False)
    return count


def test_a_window_reads_the_file_once_and_a_full_shuffle_many_times():
    count, window, records = 20_000, 1024, 32  # blocks of 32
    memory = 2 * window // records  # runs: a tenth of the file
    once = count // records
    assert reads(WindowSampler(Numbers(count), window=window), records, memory) <= 1.1 * once
    # as many as records, but for those that happen to be in memory
    expected = count * (1 - memory / once)
    found = reads(WindowSampler(Numbers(count)), records, memory)
    assert found == pytest.approx(expected, rel=0.02)


def pages_in_memory(path):
    """Count the pages of a file that the page cache holds, as the kernel says."""
    size = path.stat().st_size
    with open(path, "rb") as file, mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ) as mapped:
        view = np.frombuffer(mapped, np.uint8)
        found = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
        arguments = (
            ctypes.c_void_p(view.ctypes.data),
            ctypes.c_size_t(size),
            found.ctypes.data_as(ctypes.c_void_p),
        )
        done = ctypes.CDLL(None, use_errno=True).mincore(*arguments)
        del view, arguments
    assert done == 0
    return int((found & 1).sum())


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's page cache is looked at")
@pytest.mark.slow
def test_neighbors_are_read_ahead_where_that_is_wanted(tmp_path):
    path = tmp_path / "many.lmdb"
    write_lmdb(Pixels(200, 128), path, encode="raw", progress=False)
    found = {}
    for readahead in (False, True):
        dataset = LMDBDataset(path, decode=None, readahead=readahead)
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        before = pages_in_memory(path)
        if before > 200:
            pytest.skip("this file system keeps its files in memory")
        pickle.loads(pickle.dumps(dataset))[100]  # in a worker, too
        found[readahead] = pages_in_memory(path) - before
        del dataset
        gc.collect()
    record = 128 * 128 * 3 // mmap.PAGESIZE
    assert record <= found[False] < 5 * record  # with pages of the tree; the kernel rounds up
    assert found[True] > found[False] + record


@pytest.mark.parametrize(("window", "block"), [(1024, 32), (1024, 128), (4096, None)])
def test_batches_of_a_sorted_file_mix_as_many_classes_as_documented(window, block):
    count, batch, size = 64 * 1024, 64, 128  # 512 classes of 128
    order = np.array(list(WindowSampler(Numbers(count), window=window, block=block)))
    found = [len(np.unique(part // size)) for part in order.reshape(-1, batch)]
    blocks = window / (block or math.isqrt(window))
    assert np.mean(found) == pytest.approx(blocks * (1 - (1 - 1 / blocks) ** batch), rel=0.06)


def runs(places):
    return 1 + int((np.abs(np.diff(np.sort(places))) > 1).sum())


def test_parts_of_a_split_are_read_in_the_order_of_the_file():
    whole = Numbers(4000)
    half, _ = random_split(whole, [0.5, 0.5], torch.Generator().manual_seed(1))
    order = [half.indices[index] for index in WindowSampler(half, window=100)]
    assert sorted(order) == sorted(half.indices)
    # each window holds ten blocks of ten, which lie within about twenty records of the file
    spans = [len(np.unique(np.array(part) // 20)) for part in np.reshape(order, (-1, 100))]
    assert np.mean(spans) < 30


@pytest.mark.parametrize(
    "wrap",
    [
        lambda d: Subset(d, [3, 1, 1, -1]),
        lambda d: Subset(Subset(d, torch.tensor([7, 5, 3, 1])), np.array([0, -1])),
        lambda d: Subset(ConcatDataset([Subset(d, range(9, 0, -1)), d]), range(4, 14)),
        lambda d: ConcatDataset([d, Subset(d, []), d]),
        lambda d: Subset(d, []),
    ],
)
@pytest.mark.parametrize("options", [{}, {"window": 4}, {"window": 4, "block": 3}])
def test_wrapped_datasets_give_each_item_once(shards, wrap, options):
    for inner in (Numbers(10), LMDBDataset(shards)):
        dataset = wrap(inner)
        assert sorted(dealt(samplers(dataset, 1, **options))) == list(range(len(dataset)))


def test_a_class_with_a_length_of_its_own_is_a_plain_dataset(shards):
    class Twice(LMDBDataset):
        def __len__(self):
            return 2 * super().__len__()

    assert sorted(WindowSampler(Twice(shards), window=8)) == list(range(80))


def test_fourteen_million_items_take_no_list_of_them():
    count = 14_000_000
    for options, most in (({}, 2e6), ({"window": 10_000}, 12e6), ({"shuffle": False}, 2e6)):
        tracemalloc.start()
        sampler = WindowSampler(Numbers(count), 8, 3, **options)
        state = sampler.state_dict() | {"consumed": count - 100_000}
        sampler.load_state_dict(state)
        found = [index for index, _ in zip(sampler, range(5000), strict=False)]
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(set(found)) == 5000
        assert peak < most


# ---- going on ----


def run(ranks, batch, steps):
    """Let all ranks consume up to some batches in step; return what each read, batch by batch."""
    passes, read = [iter(sampler) for sampler in ranks], []
    for _ in range(steps):
        batches = [list(itertools.islice(a_pass, batch)) for a_pass in passes]
        assert len({len(part) for part in batches}) == 1
        if not batches[0]:
            break
        for sampler, part in zip(ranks, batches, strict=True):
            sampler.advance(len(part))
        read += [index for part in batches for index in part]
    return read


stop = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(0, 8))


@settings(max_examples=150, deadline=None)
@given(
    count=st.integers(0, 60),
    stops=st.lists(stop, max_size=4),
    world=st.integers(1, 6),
    batch=st.integers(1, 7),
    window=st.none() | st.integers(1, 30),
    drop_last=st.booleans(),
    shuffle=st.booleans(),
)
def test_each_item_is_read_once_however_often_training_stops(
    count, stops, world, batch, window, drop_last, shuffle
):
    """Each stop is (ranks, their batch, steps); then come the rest, and the next epoch."""
    dataset = Numbers(count)
    options = {"window": window, "drop_last": drop_last, "shuffle": shuffle, "seed": 3}
    read, state, named = Counter(), None, []
    for ranks_now, batch_now, steps in [*stops, (world, batch, 10**6)]:
        ranks = samplers(dataset, ranks_now, **options)
        for sampler in ranks:
            if state is None:
                sampler.set_epoch(1)
            else:
                sampler.load_state_dict(json.loads(json.dumps(state)))
                assert sampler.epoch == 1
                sampler.set_epoch(sampler.epoch)
            left = count - (state["consumed"] if state else 0)
            share = left // ranks_now if drop_last else math.ceil(left / ranks_now)
            assert len(sampler) == share
        now = run(ranks, batch_now, steps)
        assert len(now) <= share * ranks_now
        read.update(now)
        if len(now) == share * ranks_now and not drop_last and share:
            named += ranks[0].repeats  # read, since the pass went to its end
        states = [sampler.state_dict() for sampler in ranks]
        assert all(one == states[0] for one in states)
        state = states[0]
    again = Counter(named)
    assert len(named) < max(max(w for w, *_ in [*stops, (world, 0, 0)]), 1)
    if drop_last:
        assert set(read.values()) <= {1}
        assert count - len(read) < world
    else:
        assert read == Counter(range(count)) + again
        assert state["consumed"] == count
    for sampler in ranks:
        sampler.set_epoch(2)
        assert len(sampler) == (count // world if drop_last else math.ceil(count / world))
    fresh = samplers(dataset, world, **options)
    for sampler in fresh:
        sampler.set_epoch(2)
    assert dealt(ranks) == dealt(fresh)


def test_a_pass_that_is_left_begins_again_where_it_began():
    sampler = WindowSampler(Numbers(20))
    whole = list(sampler)
    assert [next(iter(sampler)) for _ in range(2)] == whole[:1] * 2  # a look at the first
    sampler.load_state_dict(sampler.state_dict() | {"consumed": 12})
    assert len(sampler) == 8
    assert [next(iter(sampler)) for _ in range(2)] == whole[12:13] * 2
    assert list(sampler) == whole[12:]
    assert list(sampler) == whole
    assert len(sampler) == 20


def test_the_last_pass_counts_and_an_earlier_one_goes_on():
    sampler = WindowSampler(Numbers(20))
    first = iter(sampler)
    read = [next(first) for _ in range(5)]
    sampler.advance(5)
    second = iter(sampler)
    assert next(second) == read[0]
    read += first
    assert sorted(read) == list(range(20))
    with pytest.raises(ValueError, match=r"advance\(2\) after 0: the sampler has handed out 1 sam"):
        sampler.advance(2)
    sampler.advance(1)
    assert sampler.state_dict()["consumed"] == 1
    assert len(list(second)) == 19


@pytest.mark.parametrize("change", ["load", "set_epoch"])
def test_a_pass_from_before_leaves_a_new_place_alone(change):
    sampler = WindowSampler(Numbers(20))
    before = iter(sampler)
    read = [next(before) for _ in range(3)]
    if change == "load":
        sampler.load_state_dict(sampler.state_dict() | {"epoch": 2, "consumed": 12})
    else:
        sampler.set_epoch(2)
    expected = sampler.state_dict()
    assert sorted(read + list(before)) == list(range(20))  # such as a loader that is still read
    assert sampler.state_dict() == expected
    assert len(sampler) == len(list(sampler)) == 20 - expected["consumed"]


def test_the_state_at_the_end_of_an_epoch_has_nothing_left_of_it():
    sampler = WindowSampler(Numbers(10), seed=1)
    sampler.set_epoch(4)
    run([sampler], 4, 100)
    state = sampler.state_dict()
    other = WindowSampler(Numbers(10), seed=1)
    other.load_state_dict(state)
    assert (other.epoch, len(other)) == (4, 0)
    other.set_epoch(4)
    assert list(other) == []
    other.set_epoch(5)
    assert len(other) == len(list(other)) == 10


def test_leaving_a_resumed_epoch_by_mistake_warns():
    state = WindowSampler(Numbers(10)).state_dict() | {"epoch": 3, "consumed": 4}
    sampler = WindowSampler(Numbers(10))
    sampler.load_state_dict(state)
    with pytest.warns(UserWarning, match=r"set_epoch\(0\) leaves epoch 3.*6 of 10 samples to go"):
        sampler.set_epoch(0)
    assert len(sampler) == 10
    sampler.load_state_dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler.set_epoch(4)  # the loop says that the epoch was over
        assert len(sampler) == 10
        sampler.load_state_dict(state | {"consumed": 10})
        sampler.set_epoch(0)


# ---- loaders ----


def batches(loader, count=None):
    """Read some batches, all of them without a count."""
    return [batch.tolist() for batch in itertools.islice(loader, count)]


def flat(parts):
    return [index for part in parts for index in part]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_plain_loader_goes_on_from_what_was_consumed(workers):
    dataset = Numbers(50)
    options = {"batch_size": 4, "num_workers": workers, "persistent_workers": workers > 0}
    sampler = WindowSampler(dataset, window=10)
    loader = DataLoader(dataset, sampler=sampler, **options)
    whole = list(WindowSampler(dataset, window=10))
    assert len(loader) == 13
    read = []
    for batch in loader:
        read += batch.tolist()
        sampler.advance(len(batch))
        if len(read) == 12:
            break
    assert sampler._handed_out == (28 if workers else 12)  # three batches, and four in advance
    state = sampler.state_dict()
    assert state["consumed"] == 12
    sampler.load_state_dict(state)  # in the same process, whose workers live on
    for batch in loader:
        assert len(loader) == math.ceil(38 / 4)
        read += batch.tolist()
        sampler.advance(len(batch))
    assert read == whole
    assert len(loader) == 13
    assert flat(batches(loader)) == whole


def test_a_loader_without_the_last_batch_begins_the_next_epoch_at_its_beginning():
    dataset = Numbers(10)
    sampler = WindowSampler(dataset)
    loader = DataLoader(dataset, batch_size=4, sampler=sampler, drop_last=True)
    for epoch in (0, 0, 1, 2):  # one of them twice
        sampler.set_epoch(epoch)
        assert len(loader) == 2
        for batch in loader:
            sampler.advance(len(batch))
        assert sampler.state_dict() | {"epoch": epoch, "consumed": 8} == sampler.state_dict()


@pytest.fixture
def stateful():
    return pytest.importorskip(
        "torchdata.stateful_dataloader", reason="torchdata (extra torchdata) is not installed"
    )


TORCHDATAS_OWN = "ignore:'set_vital' is deprecated"


def stateful_loader(stateful, world=1, rank=0, kind="sampler", **options):
    dataset = Numbers(50)
    sampler = WindowSampler(dataset, world, rank, window=10, seed=2)
    options = {"batch_size": 4, "sampler": sampler} | options
    if kind == "batch_sampler":
        del options["sampler"], options["batch_size"]
        drop_last = options.pop("drop_last")
        options["batch_sampler"] = stateful.sampler.BatchSampler(sampler, 4, drop_last)
    return sampler, stateful.StatefulDataLoader(dataset, **options)


@pytest.mark.filterwarnings(TORCHDATAS_OWN)
@pytest.mark.parametrize("kind", ["sampler", "batch_sampler"])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("every", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_stateful_loader_goes_on_by_itself(stateful, kind, drop_last, workers, every):
    options = {
        "kind": kind,
        "drop_last": drop_last,
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "snapshot_every_n_steps": every,
    }
    sampler, loader = stateful_loader(stateful, **options)
    reference = WindowSampler(Numbers(50), window=10, seed=2)
    epochs = []
    for epoch in (1, 2):
        reference.set_epoch(epoch)
        indices = list(reference)
        parts = [indices[first : first + 4] for first in range(0, 50, 4)]
        epochs.append(parts[: 12 if drop_last else 13])
    for count in (0, 1, 5, 12):
        sampler.set_epoch(1)
        begun = iter(loader)
        read = batches(begun, count)
        state = pickle.loads(pickle.dumps(loader.state_dict()))
        other_sampler, other = stateful_loader(stateful, **options)
        other.load_state_dict(state)
        resumed = iter(other)
        assert other_sampler.epoch == 1
        for done, batch in enumerate(resumed, count):
            if every == 1 or not workers:  # otherwise the loader reads some batches again
                assert len(other) == len(epochs[0]) - count  # while it is consumed, too
            assert batch.tolist() == epochs[0][done]
            read.append(batch.tolist())
        assert read == epochs[0]
        other_sampler.set_epoch(2)
        assert len(other) == len(epochs[1])
        assert batches(other) == epochs[1]


@pytest.mark.filterwarnings(TORCHDATAS_OWN)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_loader_has_two_workers_and_goes_on_with_other_ranks(stateful, workers):
    read, state = [], None
    for world, count in ((1, 3), (2, 2), (3, None)):
        now, states = [], []
        for rank in range(world):
            sampler, loader = stateful_loader(stateful, world, rank, num_workers=workers)
            sampler.set_epoch(1)
            if state is not None:
                loader.load_state_dict(state)
            begun = iter(loader)
            now.append(flat(batches(begun, count)))
            states.append(loader.state_dict())
        read += flat(now)
        state = states[0]
    extra = Counter(read) - Counter(range(50))
    assert set(read) == set(range(50))
    assert sorted(extra.elements()) == sorted(sampler.repeats)
    assert len(sampler.repeats) < 3


@pytest.mark.filterwarnings(TORCHDATAS_OWN)
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_stateful_loader_that_had_finished_begins_a_new_epoch(stateful, workers, drop_last):
    options = {"drop_last": drop_last, "num_workers": workers}
    sampler, loader = stateful_loader(stateful, **options)
    sampler.set_epoch(1)
    first = batches(loader)
    state = loader.state_dict()
    sampler.set_epoch(2)
    second = batches(loader)
    assert first != second
    for epoch, expected in ((None, first), (1, first), (2, second)):
        sampler, other = stateful_loader(stateful, **options)
        if epoch is not None:
            sampler.set_epoch(epoch)  # before the loader knows its state
        other.load_state_dict(state)
        begun = iter(other)
        assert len(other) == len(expected)
        assert batches(begun) == expected


@pytest.mark.filterwarnings(TORCHDATAS_OWN)
def test_a_stateful_loader_that_resumes_warns_of_another_epoch(stateful):
    sampler, loader = stateful_loader(stateful)
    sampler.set_epoch(5)
    batches(begun := iter(loader), 2)
    state = loader.state_dict()
    del begun
    late, other = stateful_loader(stateful)
    late.set_epoch(0)
    other.load_state_dict(state)
    with pytest.warns(UserWarning, match=r"set_epoch\(0\) leaves epoch 5.*42 of 50"):
        read = flat(batches(other))
    assert read == list(WindowSampler(Numbers(50), window=10, seed=2))
    # within one process the epoch that was read in the meantime does not count
    loader.load_state_dict(state)
    sampler.set_epoch(6)
    batches(loader, 1)
    loader.load_state_dict(state)
    assert len(flat(batches(loader, 2))) == 8
    assert (sampler.epoch, len(sampler)) == (5, 42)
    assert len(flat(batches(loader))) == 50  # a pass that was left begins anew


# ---- options, states, ranks ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window must be a whole number, 1 or more, got 0"),
        ({"window": 2.5}, "window must be a whole number, 1 or more, got 2.5"),
        ({"window": 4, "block": 0}, "block must be a whole number, 1 or more, got 0"),
        ({"block": 4}, "block=4 needs a window"),
        ({"num_replicas": 0, "rank": 0}, "num_replicas must be a whole number, 1 or more, got 0"),
        ({"num_replicas": 2, "rank": 2}, "rank must be a whole number from 0 to 1, got 2"),
        ({"rank": 1}, "rank must be a whole number from 0 to 0, got 1"),
        ({"seed": -1}, "seed must be a whole number from 0 to 18446744073709551615, got -1"),
        ({"shuffle": None}, "shuffle must be True or False, got None"),
        ({"drop_last": 3}, "drop_last must be True or False, got 3"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        WindowSampler(Numbers(10), **options)


def test_what_has_no_length_is_refused():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(range(3))

    for dataset in (Stream(), Subset(Stream(), [0]), iter([1])):
        with pytest.raises(TypeError, match="dataset must have a length, got"):
            WindowSampler(dataset)
    for indices in ([10], [-11]):
        with pytest.raises(ValueError, match=f"indices {indices[0]} to {indices[0]}.*10 items"):
            WindowSampler(Subset(Numbers(10), indices))


def test_bad_epochs_and_counts_are_named():
    sampler = WindowSampler(Numbers(10))
    for epoch in (-1, 1.5, None):
        with pytest.raises(
            ValueError, match=f"epoch must be a whole number, 0 or more, got {epoch}"
        ):
            sampler.set_epoch(epoch)
    for samples in (-1, 1.0, [1, 2]):
        with pytest.raises(ValueError, match="samples must be a whole number, 0 or more"):
            sampler.advance(samples)
    with pytest.raises(ValueError, match=r"advance\(1\) after 0: .* handed out 0 samples"):
        sampler.advance(1)  # no loader reads from it
    assert sampler.state_dict()["consumed"] == 0


BASE = {"window": 6, "block": 2}


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        (Numbers(21), BASE, "a dataset of 20 items, this one has 21"),
        (Numbers(20), BASE | {"seed": 1}, "the seed 0, this sampler 1: give seed=0"),
        (Numbers(20), BASE | {"window": 7}, "the window 6, this sampler 7: give window=6"),
        (Numbers(20), {}, "the window 6, this sampler None: give window=6"),
        (Numbers(20), BASE | {"block": 3}, "blocks of 2 records, this sampler of 3: give block=2"),
        (Numbers(20), {"shuffle": False}, "shuffle=True, this sampler False: give shuffle=True"),
        (
            Subset(Numbers(30), range(20)),
            BASE,
            "same number of items, but other ones: select",
        ),
        (ConcatDataset([Numbers(9), Numbers(11)]), BASE, "in other shards"),
    ],
)
def test_a_state_of_another_order_is_refused(dataset, options, message):
    sampler = WindowSampler(Numbers(20), **BASE)
    run([sampler], 5, 2)
    state = sampler.state_dict()
    other = WindowSampler(dataset, **options)
    before = list(other)
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(state)
    assert list(other) == before


def test_what_does_not_change_the_order_does_not_bar_a_state():
    state = WindowSampler(Numbers(20), shuffle=False, window=6, seed=1).state_dict()
    WindowSampler(Numbers(20), 3, 1, shuffle=False, drop_last=True).load_state_dict(state)
    parts = ConcatDataset([Numbers(9), Numbers(11)])
    WindowSampler(parts).load_state_dict(WindowSampler(Numbers(20)).state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: None, "expected what WindowSampler.state_dict.. gives, .* got None"),
        (lambda state: [1, 2], r"got \[1, 2\]"),
        (lambda state: {}, "got no epoch, consumed, length"),
        (lambda state: {"yielded": 3}, "got no epoch, consumed"),  # of torchdata's own sampler
        (lambda state: state | {"consumed": 21}, "consumed must be .* from 0 to 20, got 21"),
        (lambda state: state | {"consumed": -1}, "consumed must be .* from 0 to 20, got -1"),
        (lambda state: state | {"consumed": 3.0}, "consumed must be .* got 3.0"),
        (lambda state: state | {"epoch": "3"}, "epoch must be .* got '3'"),
    ],
)
def test_what_is_no_state_is_refused(change, message):
    sampler = WindowSampler(Numbers(20))
    sampler.set_epoch(2)
    with pytest.raises(ValueError, match=message):
        sampler.load_state_dict(change(sampler.state_dict()))
    assert (sampler.epoch, len(sampler)) == (2, 20)


def test_a_sampler_can_be_pickled_while_it_is_read():
    sampler = WindowSampler(Numbers(20), window=6)
    first = iter(sampler)
    read = [next(first) for _ in range(3)]
    sampler.advance(3)
    copied = pickle.loads(pickle.dumps(sampler))
    copied.load_state_dict(copied.state_dict())
    assert read + list(copied) == read + list(first)


RANK = """
import sys, torch, torch.distributed as dist
from torch.utils.data import DataLoader
from dlhelpers.lmdb_io import LMDBDataset, WindowSampler
rank, world, path, port, state, steps = *map(int, sys.argv[1:3]), *sys.argv[3:5], *sys.argv[5:]
dist.init_process_group("gloo", f"tcp://localhost:{port}", rank=rank, world_size=world)
dataset = LMDBDataset(path)
sampler = WindowSampler(dataset, window=8)
assert (sampler.num_replicas, sampler.rank) == (world, rank)
if state != "-":
    sampler.load_state_dict(torch.load(state))
sampler.set_epoch(1)
read = []
loader = DataLoader(dataset, batch_size=4, sampler=sampler, num_workers=2)
for step, (images, targets) in enumerate(loader):
    if step == int(steps):
        break
    dist.all_reduce(torch.ones(1))
    read += targets.tolist()
    sampler.advance(len(targets))
if rank == 0:
    torch.save(sampler.state_dict(), path + ".state")
dist.barrier()
print(*read)
"""


@pytest.mark.slow
def test_two_ranks_over_gloo_stop_and_three_go_on(shards):
    def ranks(world, state, steps):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        children = [
            subprocess.Popen(
                [sys.executable, "-c", RANK, *map(str, (rank, world, shards, port, state, steps))],
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
            for rank in range(world)
        ]
        found = [child.communicate(timeout=120)[0] for child in children]
        assert [child.returncode for child in children] == [0] * world
        return [int(target) for out in found for target in out.split()]

    before = ranks(2, "-", 2)
    assert len(before) == 16
    after = ranks(3, f"{shards}.state", 100)
    assert set(before + after) == set(range(40))
    assert len(before + after) == 40  # three ranks divide the 24 that were left
