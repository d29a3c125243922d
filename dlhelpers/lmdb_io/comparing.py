"""Is a source still what it was when a part of it was converted?"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

from dlhelpers.lmdb_io import schema
from dlhelpers.lmdb_io.checksums import crc32
from dlhelpers.lmdb_io.encoding import Encoding
from dlhelpers.lmdb_io.environments import open_environment
from dlhelpers.lmdb_io.identity import Trace, Whole, equal_versions, spread
from dlhelpers.lmdb_io.loading import Item, Loader, load_chunks
from dlhelpers.lmdb_io.repeating import load_repeated
from dlhelpers.lmdb_io.shards import part, shard_name
from dlhelpers.lmdb_io.sources import Source

__all__ = [
    "Neighbours",
    "content_of",
    "gives_the_same",
    "identity_of",
    "is_same_part",
    "mark_of",
    "marked",
]

_MARKS = 32  # items of a shard that are compared in place of all, where every time differs
_SHARE = 40  # of so many items that a rank converts, one is loaded twice to know the source again
_LEAST = 16
_RELOADED = 64  # items of a dataset that are loaded again before a conversion goes on after them


def content_of(item: Item, record: bytes) -> int:
    """Return the CRC-32 that stands for an item's content; ``record`` is empty if skipped."""
    return int.from_bytes(record[:4], "little") if item.content is None else item.content


def is_same_part(
    loader: Loader, tasks: Sequence[Any], times: int, contents: str, workers: int
) -> bool:
    """Whether a part of a source still holds what was converted; reads it if times differ.

    Args:
        loader: of the conversion.
        tasks: of the part.
        times, contents: of the trace of the part when it was converted.
        workers: processes that read.
    """
    now = Trace()
    for task in tasks:
        now.add(loader.source.stamp(task))
    if now.times == times:
        return True
    now, position = Trace(), 0
    reader = _reader(loader)
    for items in load_chunks(reader, iter(tasks), workers):
        for item in items:
            record = b"" if item.why else schema.pack_record(position, *item.parts)
            now.add(item.stamp, content_of(item, record))
            position += not item.why
    return now.contents.hex() == contents


def _reader(loader: Loader) -> Loader:
    """Return a loader of what encoded images were made from, or of what is stored as it is."""
    encoding = Encoding() if loader.compares else loader.encoding
    return Loader(loader.source, encoding, loader.compares)


def gives_the_same(
    loader: Loader, tasks: Sequence[Any], read: Mapping[str, Any], workers: int
) -> bool:
    """Whether items of a dataset, spread over those that are done, are what was stored of them.

    Those that are another each time say nothing.

    Args:
        loader: of the conversion.
        tasks: those that are done.
        read: functions from a key to a value: ``records``, ``index`` and ``skipped``.
        workers: processes that load them.
    """
    numbers = spread(len(tasks), _RELOADED)
    found = load_repeated(_Recorder(loader), [tasks[number] for number in numbers], workers)
    for number, record in zip(numbers, found, strict=True):
        if record is None:  # it is another each time, whether the dataset has changed or not
            continue
        if not record or read["skipped"](schema.position_key(number)) is not None:
            if record or read["skipped"](schema.position_key(number)) is None:
                return False
            continue
        key = schema.encode_key(schema.unpack_record(memoryview(record), 0).key)
        if (entry := read["index"](schema.index_key(key))) is None:
            return False
        position = schema.read_index(key, entry)[0]
        if not schema.is_same_record(read["records"](schema.position_key(position)), record):
            return False
    return True


class _Recorder:
    """Gives the record of a task, as the first of a file; nothing where it cannot be stored."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __call__(self, task: Any) -> bytes:
        item = self._loader[task]
        return b"" if item.why else schema.pack_record(0, *item.parts)


def marked(count: int) -> list[int]:
    """Return the positions of a part whose contents its meta entry tells one by one."""
    return spread(count, _MARKS)


def mark_of(item: Item) -> int:
    """Return the CRC-32 of an item's content, wherever it is stored; 0 if skipped."""
    if item.why:
        return 0
    return crc32(item.image) if item.content is None else item.content


def identity_of(source: Source, whole: Whole | None, workers: int, world: int) -> dict[str, Any]:
    """Return the identity of a whole source.

    Args:
        source: to look at.
        whole: where all of it has gone by already.
        workers: processes that load what has to be.
        world: number of shards; each rank looks at a small part of its own number of items.
    """
    if whole is None:
        whole = Whole()
        for task in source.tasks():
            whole.add(source.stamp(task))
    return whole.identity(_contents(source, workers, world), source.place)


def _contents(source: Source, workers: int, world: int) -> list[int | None]:
    """Return the CRC-32 of contents that stamps say nothing of; None of what does not repeat."""
    probes = source.probes()
    most = max(_LEAST, (source.count or 0) // world // _SHARE)
    tasks = [probes[number] for number in spread(len(probes), most)]
    found = load_repeated(source.content, tasks, workers)
    return [None if content is None else crc32(content) for content in found]


class Neighbours:
    """The other shards of a folder, compared once each with the source as it is now.

    Args:
        target: file of this rank's shard.
        shard: (rank, world) of it.
        loader: of the conversion.
        workers: processes that read.
    """

    def __init__(self, target: Path, shard: tuple[int, int], loader: Loader, workers: int) -> None:
        self._target, self._shard = target, shard
        self._loader, self._workers = loader, workers
        self._found: dict[str, bool] = {}  # what was compared, by all that can change it

    def equal_versions(self, mine: Mapping[str, Any]) -> list[str]:
        """Return what :func:`identity.equal_versions` says of those that are there now."""
        if not mine["identity"]["version"]:
            return []
        metas = [*self._metas()]
        if metas and metas[0]["classes"] == mine["classes"]:  # a list that they share
            mine = {**mine, "classes": metas[0]["classes"]}
        return equal_versions(mine, metas, self._is_unchanged)

    def _is_unchanged(self, meta: Mapping[str, Any]) -> bool:
        key = repr([meta[name] for name in ("shard", "times", "contents")])
        if key not in self._found:
            source = self._loader.source
            own = part(source.count, *meta["shard"])
            tasks = [*source.part(own)]
            self._found[key] = self._is_same_part(tasks, meta)
        return self._found[key]

    def _is_same_part(self, tasks: Sequence[Any], meta: Mapping[str, Any]) -> bool:
        numbers, marks = marked(len(tasks)), meta.get("marks", ())
        stamps = [self._loader.source.stamp(tasks[number]) for number in numbers]
        is_copy = len(marks) == len(numbers) < len(tasks) and all(
            stamp.time != time for stamp, (time, _) in zip(stamps, marks, strict=True)
        )
        if not is_copy:  # where only some times differ, those files are what may have changed
            times, contents = meta["times"], meta["contents"]
            return is_same_part(self._loader, tasks, times, contents, self._workers)
        reader = _reader(self._loader)
        some = iter([tasks[number] for number in numbers])
        found = chain.from_iterable(load_chunks(reader, some, self._workers))
        return [mark_of(item) for item in found] == [mark for _, mark in marks]

    def _metas(self) -> Iterator[dict[str, Any]]:
        rank, world = self._shard
        for other in range(world):
            path = self._target.with_name(shard_name(other, world))
            if other == rank:
                continue
            try:
                stat = os.stat(path)
                meta = _read_meta(path, stat.st_ino, stat.st_mtime_ns, stat.st_size)
            except (schema.DatabaseError, OSError):  # opening the folder will name it
                continue
            if meta.get("identity") and meta["shard"] == [other, world]:
                yield meta


@lru_cache(maxsize=1 << 12)
def _read_meta(path: Path, *_version: int) -> dict[str, Any]:
    """Return the meta entry of a file; each shard asks for those of all others."""
    return schema.unpack_meta(open_environment(path).get_entry(schema.META), path)
