"""Where does the time of one image go, here and with workers?"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Dataset

from dlhelpers.lmdb_io.decoding import load_decoder

if TYPE_CHECKING:
    from dlhelpers.course.stores.containers import Store

__all__ = ["Split", "loader_time", "next_batch", "reading", "reading_anew", "split_time"]


@dataclass(frozen=True)
class Split:
    """Where the time of one image goes; medians over batches.

    Attributes:
        open_us, read_us, decode_us, collate_us: microseconds for each image.
    """

    open_us: float
    read_us: float
    decode_us: float
    collate_us: float

    @property
    def total_us(self) -> float:
        """All four together."""
        return self.open_us + self.read_us + self.decode_us + self.collate_us

    @property
    def store_share(self) -> float:
        """What the container is responsible for, from 0 to 1."""
        return (self.open_us + self.read_us) / self.total_us

    def as_dict(self) -> dict[str, float]:
        """Return stage -> microseconds."""
        return {
            "open": self.open_us,
            "read": self.read_us,
            "decode": self.decode_us,
            "collate": self.collate_us,
        }


def split_time(
    store: Store,
    decode: Callable[[bytes], Any],
    order: Sequence[int],
    *,
    batch_size: int = 32,
) -> Split:
    """Measure the four stages of reading images in an order, batch by batch, in this process.

    Args:
        store: a container that is read at random.
        decode: from encoded bytes to uint8 pixels [H, W, 3], all of one size.
        order: indices, a few batches of them.
        batch_size: images that are collated into one tensor.

    Raises:
        ValueError: fewer indices than a batch.
    """
    if len(order) < batch_size:
        raise ValueError(f"{len(order)} indices are less than one batch of {batch_size}")
    rows = []
    for first in range(0, len(order) - batch_size + 1, batch_size):
        times = [0.0] * 4
        pixels = []
        for index in order[first : first + batch_size]:
            marks = [perf_counter()]
            opened = store.open(index)
            marks.append(perf_counter())
            data = store.read(opened)
            marks.append(perf_counter())
            pixels.append(torch.from_numpy(decode(data)))
            marks.append(perf_counter())
            for stage, (begin, end) in enumerate(itertools.pairwise(marks)):
                times[stage] += end - begin
        begin = perf_counter()
        torch.stack(pixels)
        times[3] = perf_counter() - begin
        rows.append([1e6 * seconds / batch_size for seconds in times])
    return Split(*(median(column) for column in zip(*rows, strict=True)))


def reading(
    source: Any, use: Callable[[Any], Any] | None = None, *, size: int = 32
) -> Callable[[], None]:
    """Return a :func:`next_batch` over all items of a store, a dataset or a list.

    Args:
        source: has a length and, for each index, an item.
        use: called with each item, such as a decoder; None reads the items and no more.
        size: items read at each call.

    >>> seen = []
    >>> reading([b"cat", b"dog"], seen.append, size=2)()
    >>> sorted(seen)
    [b'cat', b'dog']
    """
    if use is None:
        return next_batch(source.__getitem__, len(source), size=size)
    return next_batch(lambda index: use(source[index]), len(source), size=size)


def reading_anew(store: Store, use: Callable[[bytes], Any] = len) -> Callable[[], None]:
    """Return a callable that opens a store anew and reads all of it in random order.

    For reads from the disk, with :func:`evict` before each call: what stays mapped between calls
    could not be dropped.
    """

    def step() -> None:
        opened = store.reopened()
        for index in random.sample(range(len(store)), len(store)):
            use(opened[index])

    return step


def next_batch(read: Callable[[int], Any], count: int, *, size: int = 32) -> Callable[[], None]:
    """Return a callable that reads ``size`` items in random order, the next ones at each call.

    What ``measure.compare`` calls. Each such callable goes through its own order of all items, as
    an epoch does, so that none follows in the tracks of another and finds its data in the
    processor's caches.

    Args:
        read: called with an index from 0 to ``count - 1``; its result is dropped.
        count: number of items.
        size: items read at each call.

    >>> seen = []
    >>> step = next_batch(seen.append, 6, size=3)
    >>> step(), step(), sorted(seen)
    (None, None, [0, 1, 2, 3, 4, 5])
    """
    endless = itertools.cycle(random.Random().sample(range(count), count))

    def step() -> None:
        for index in itertools.islice(endless, size):
            read(index)

    return step


def loader_time(
    store: Store,
    decoder: str,
    order: Sequence[int],
    *,
    workers: int,
    batch_size: int = 32,
) -> float:
    """Return microseconds for each image through a DataLoader, its start not counted.

    Args:
        store, batch_size: as in :func:`split_time`.
        decoder: a name that ``lmdb_io.load_decoder`` knows, such as ``pil``.
        order: indices; read once to start the workers and once more for the time.
        workers: processes; 0 reads here.
    """
    loader = DataLoader(
        _Decoded(store, decoder),
        batch_size=batch_size,
        sampler=order,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    for _ in loader:
        pass
    begin = perf_counter()
    for _ in loader:
        pass
    return 1e6 * (perf_counter() - begin) / len(order)


class _Decoded(Dataset):
    """Decoded images of a store, opened anew in each process: HDF5 and LMDB ask for that."""

    def __init__(self, store: Store, decoder: str) -> None:
        self._kind, self._path, self._count = type(store), store.path, len(store)
        self._decoder, self._store, self._pid = decoder, store, os.getpid()

    def __getitem__(self, index: int) -> torch.Tensor:
        if self._store is None or self._pid != os.getpid():
            self._store, self._pid = self._kind(self._path, self._count), os.getpid()
        return torch.from_numpy(load_decoder(self._decoder)(self._store[index]))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_store": None}
