"""Read and encode what a source holds, here or in worker processes that never outlive this one."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from itertools import islice
from typing import Any

from dlhelpers.lmdb_io import schema
from dlhelpers.lmdb_io.checksums import crc32
from dlhelpers.lmdb_io.encoding import Encoding
from dlhelpers.lmdb_io.identity import Stamp
from dlhelpers.lmdb_io.sources import Source

__all__ = ["Item", "Loader", "load_chunks"]

_CHUNK = 16  # images that a worker gets at a time


class Item:
    """One task's result: what to store, or why it cannot be.

    Attributes:
        name: what messages call it.
        stamp: of the source.
        content: CRC-32 of what was encoded; None where the record's own tells as much.
        why: it cannot be stored; empty where it can.
    """

    __slots__ = ("content", "image", "key", "name", "stamp", "target", "why")

    def __init__(self, name: str, stamp: Stamp, content: int | None, why: str = "") -> None:
        self.name, self.stamp, self.content, self.why = name, stamp, content, why
        self.key = self.target = self.image = b""

    @property
    def parts(self) -> tuple[bytes, bytes, bytes]:
        """Key, target and image, as :func:`schema.pack_record` takes them."""
        return self.key, self.target, self.image


class Loader:
    """Loads and encodes tasks; what DataLoader's workers call.

    Attributes:
        compares: whether encoded images are known again by what they were made from.
    """

    def __init__(self, source: Source, encoding: Encoding, compares: bool | None = None) -> None:
        self.source, self.encoding = source, encoding
        self.compares = encoding.changes if compares is None else compares
        self._copies = source.copies and not encoding.changes

    @property
    def settings(self) -> dict[str, Any]:
        """How the images are stored, as JSON writes it."""
        own = self.encoding.as_dict()
        return own if self.encoding.changes else own | dict(self.source.settings)

    def __getitems__(self, tasks: list[Any]) -> list[Item]:
        """Return the items of some tasks."""
        return [self[task] for task in tasks]

    def __getitem__(self, task: Any) -> Item:
        """Return one item; what is wrong with it is in it."""
        stamp = content = None
        try:
            if self._copies:
                stamp = self.source.stamp(task)
                key, target, image = self.source.copy(task)
                item = Item(schema.decode_key(key), stamp, None)
                item.key, item.target, item.image = key, target, image
                return item
            key, target, image, stamp = self.source.load(task)
            if self.compares and isinstance(image, (bytes, bytearray, memoryview)):
                content = crc32(image)
            item = Item(key, stamp, content)
            item.key = schema.encode_key(key)
            item.target = schema.encode_target(target)
            item.image = self.encoding.apply(image)
        except Exception as error:  # a reader's own code and decoders raise all kinds
            why = str(error)
            if not isinstance(error, (ValueError, OSError)) or not why:
                why = f"{type(error).__name__}: {why}"
            stamp = self.source.stamp(task) if stamp is None else stamp
            return Item(self.source.name(task), stamp, content, why)
        return item


def load_chunks(loader: Any, tasks: Iterator[Any], workers: int) -> Iterator[list[Any]]:
    """Yield what a Loader's ``__getitems__`` gives of all tasks, in order, a chunk at a time."""
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


def _unchanged(items: list[Any]) -> list[Any]:
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
