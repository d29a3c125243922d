"""Read and encode what a source holds, here or in worker processes that never outlive this one."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from itertools import islice
from typing import Any

from dlhelpers.lmdb_io import schema
from dlhelpers.lmdb_io.encoding import Encoding
from dlhelpers.lmdb_io.sources import Source

__all__ = ["Item", "Loader", "load_chunks"]

_CHUNK = 16  # images that a worker gets at a time


class Item:
    """One task's result: what to store, or why it cannot be."""

    __slots__ = ("identity", "image", "key", "name", "target", "why")

    def __init__(self, name: str, identity: bytes, why: str = "") -> None:
        self.name, self.identity, self.why = name, identity, why
        self.key = self.target = self.image = b""


class Loader:
    """Loads and encodes tasks; what DataLoader's workers call."""

    def __init__(self, source: Source, encoding: Encoding) -> None:
        self.source, self.encoding = source, encoding

    def __getitems__(self, tasks: list[Any]) -> list[Item]:
        """Return the items of some tasks."""
        return [self[task] for task in tasks]

    def __getitem__(self, task: Any) -> Item:
        """Return one item; what is wrong with it is in it."""
        try:
            key, target, image, identity = self.source.load(task)
            item = Item(key, identity)
            item.key = schema.encode_key(key)
            item.target = schema.encode_target(target)
            item.image = self.encoding.apply(image)
        except Exception as error:  # a reader's own code and decoders raise all kinds
            why = str(error)
            if not isinstance(error, (ValueError, OSError)) or not why:
                why = f"{type(error).__name__}: {why}"
            return Item(self.source.name(task), self.source.identity(task), why)
        return item


def load_chunks(loader: Loader, tasks: Iterator[Any], workers: int) -> Iterator[list[Item]]:
    """Yield the items of all tasks in order, a chunk at a time."""
    chunks = iter(lambda: list(islice(tasks, _CHUNK)), [])
    if not workers:
        return map(loader.__getitems__, chunks)
    from torch.utils.data import DataLoader

    return iter(
        DataLoader(
            loader,
            batch_sampler=chunks,
            num_workers=workers,
            collate_fn=_unchanged,
            prefetch_factor=4,
            worker_init_fn=_die_with_parent,
        )
    )


def _unchanged(items: list[Item]) -> list[Item]:
    return items


def _die_with_parent(_worker: int) -> None:
    # one that fills its pipe when nobody reads any more would wait there for ever
    threading.Thread(target=_watch_parent, daemon=True).start()


def _watch_parent() -> None:
    from multiprocessing import get_start_method, parent_process
    from multiprocessing.connection import wait

    parent = parent_process()
    # Linux's default from Python 3.14 on: a server forks the workers, and ends with the parent
    starter = os.getppid() if get_start_method() == "forkserver" else parent.pid
    # a sibling may hold the other end of the sentinel, so look at the starter as well
    while os.getppid() == starter and not wait([parent.sentinel], timeout=1.0):
        pass
    os._exit(1)
