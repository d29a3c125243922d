"""Is a source still what it was when a part of it was converted?"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from dlhelpers.lmdb_io import schema
from dlhelpers.lmdb_io.encoding import Encoding
from dlhelpers.lmdb_io.environments import open_environment
from dlhelpers.lmdb_io.identity import Trace, Whole, choose_version, spread
from dlhelpers.lmdb_io.loading import Item, Loader, load_chunks
from dlhelpers.lmdb_io.shards import part, shard_name
from dlhelpers.lmdb_io.sources import Source

__all__ = ["content_of", "gives_the_same", "identity_of", "is_same_part", "version_of"]

_TWICE = 16  # items that are loaded twice, to see whether a dataset repeats itself
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
    reader = Loader(loader.source, Encoding(), loader.compares)
    for items in load_chunks(reader, iter(tasks), workers):
        for item in items:
            record = b"" if item.why else schema.pack_record(position, *item.parts)
            now.add(item.stamp, content_of(item, record))
            position += not item.why
    return now.contents.hex() == contents


def gives_the_same(
    loader: Loader, tasks: Sequence[Any], read: Mapping[str, Any], workers: int
) -> bool:
    """Whether items of a dataset, spread over those that are done, are what was stored of them.

    Args:
        loader: of the conversion.
        tasks: those that are done.
        read: functions from a key to a value: ``records``, ``index`` and ``skipped``.
        workers: processes that load them.
    """
    numbers = spread(len(tasks), _RELOADED)
    chunks = load_chunks(loader, iter([tasks[number] for number in numbers]), workers)
    for number, item in zip(numbers, chain.from_iterable(chunks), strict=True):
        if read["skipped"](schema.position_key(number)) is not None:
            if not item.why:
                return False
            continue
        entry = None if item.why else read["index"](schema.index_key(item.key))
        if entry is None:
            return False
        position = json.loads(entry)[0]
        if read["records"](schema.position_key(position)) != schema.pack_record(
            position, *item.parts
        ):
            return False
    return True


def identity_of(source: Source, whole: Whole | None, workers: int) -> dict[str, Any]:
    """Return the identity of a whole source; ``whole`` where all of it has gone by already."""
    if whole is None:
        whole = Whole()
        for task in source.tasks():
            whole.add(source.stamp(task))
    return whole.identity(_contents(source, workers), source.place)


class _Prober:
    """Loads what is known by its content alone, here or in a worker."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def __getitems__(self, tasks: list[Any]) -> list[bytes]:
        return [self._source.content(task) for task in tasks]


def _contents(source: Source, workers: int) -> str:
    """Return a digest of the contents that stamps say nothing of; empty where there are none, and
    where a source does not repeat itself."""
    if not (probes := source.probes()):
        return ""
    again = [probes[number] for number in spread(len(probes), _TWICE)]
    # where the conversion loads them: what a dataset opens here would be open in the workers
    found = [*chain.from_iterable(load_chunks(_Prober(source), iter([*probes, *again]), workers))]
    first = [found[number] for number in spread(len(probes), _TWICE)]
    if first != found[len(probes) :]:
        return ""
    digest = hashlib.blake2b(b"%d" % source.count, digest_size=16)
    for content in found[: len(probes)]:
        digest.update(b"%d:%s" % (len(content), content))
    return digest.hexdigest()


def version_of(mine: Mapping[str, Any], target: Path, loader: Loader, workers: int) -> str:
    """Return the version that a finished shard shall bear, see :func:`choose_version`.

    Args:
        mine: its meta entry.
        target: its file.
        loader: of the conversion.
        workers: processes that read.
    """

    def is_unchanged(meta: Mapping[str, Any]) -> bool:
        own = part(loader.source.count, *meta["shard"])
        tasks = [task for number, task in enumerate(loader.source.tasks()) if number in own]
        return is_same_part(loader, tasks, meta["times"], meta["contents"], workers)

    if not mine["identity"]["version"]:
        return ""
    return choose_version(mine, _others(mine["shard"], target), is_unchanged)


def _others(shard: Sequence[int], target: Path) -> Iterator[tuple[dict[str, Any], bool]]:
    """Yield (meta entry, whether it is written again right now) of the other shards."""
    rank, world = shard
    for other in range(world):
        path = target.with_name(shard_name(other, world))
        if other == rank or not path.exists():
            continue
        try:
            meta = schema.unpack_meta(open_environment(path).get_entry(schema.META), path)
        except (schema.DatabaseError, OSError):  # opening the folder will name it
            continue
        if meta.get("identity"):
            yield meta, path.with_name(f".{path.name}.part").exists()
