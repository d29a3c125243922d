"""How do the records of databases come into another one, as they are stored?

Nothing is decoded: a record's checksum is compared, and its key, target and bytes are written under
a new position. Classes are matched by name; of equal keys only the first can be kept.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dlhelpers.lmdb_io import schema
from dlhelpers.lmdb_io.doubles import doubles
from dlhelpers.lmdb_io.environments import Environment, open_environment
from dlhelpers.lmdb_io.identity import Stamp
from dlhelpers.lmdb_io.renumbering import match_classes, note_of, refuse_fields, renumbered
from dlhelpers.lmdb_io.shards import check_shards, shard_files
from dlhelpers.lmdb_io.sources import Loaded, Source, SourceError
from dlhelpers.printable import one_line

__all__ = [
    "Databases",
    "common_settings",
    "is_database",
    "names_databases",
    "open_databases",
    "version_of",
]

_LMDB_MAGIC = bytes.fromhex("dec0efbe")  # of its first page, after the page's header
_PAGE_HEADER = 16


def is_database(path: Path) -> bool:
    """Whether a path holds a file of LMDB, or shards and no class folders."""
    if path.is_dir():
        with os.scandir(path) as entries:
            has_folders = any(
                entry.is_dir() and entry.name[:1] != "." and entry.name != "lost+found"
                for entry in entries
            )
        return not has_folders and next(path.glob("shard-*-of-*.lmdb"), None) is not None
    try:
        with open(path, "rb") as file:
            return file.read(_PAGE_HEADER + 4)[_PAGE_HEADER:] == _LMDB_MAGIC
    except OSError:
        return False


def names_databases(source: Any) -> bool:
    """Whether a source is the path of a database, or of several, which have fields of their own."""
    paths = source if isinstance(source, (list, tuple)) else [source]
    return bool(paths) and all(
        isinstance(path, (str, os.PathLike)) and is_database(Path(path).expanduser())
        for path in paths
    )


def open_databases(paths: Sequence[Path]) -> Databases:
    """Return the records of the databases of a list.

    Raises:
        SourceError: none of the paths is a database, and the list was meant for something else.
        DatabaseError, FileNotFoundError, SourceError: as :class:`Databases`.
    """
    if not any(map(is_database, paths)):
        raise SourceError(
            f"{one_line(str(paths[0]))} is no database, as which a list of paths is read: "
            "otherwise an item must be (key, bytes, target), got str"
        )
    return Databases(paths)


def version_of(environment: Environment, meta: dict[str, Any]) -> bytes:
    """Return a digest of what a file holds."""
    digest = hashlib.blake2b(environment.get_entry(schema.META), digest_size=16)
    if "contents" not in meta:  # an earlier version wrote no digest of what it stored
        for _, record in environment.items(environment.records):
            digest.update(record[:4])
    return digest.hexdigest().encode()


def common_settings(settings: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the settings of records that were stored with any of some settings.

    Where these differ, ``differing`` holds the values of each, and none is that of all records.

    >>> common_settings([{"encode": "raw"}, {"encode": None}])
    {'encode': None, 'differing': {'encode': ['raw', None]}}
    """
    first = settings[0]
    if all(other == first for other in settings):
        return first
    found: dict[str, list[Any]] = {}
    for one in settings:
        own = {name: [value] for name, value in one.items() if name not in ("fields", "differing")}
        for name, values in (own | one.get("differing", {})).items():
            known = found.setdefault(name, [])
            known += [value for value in values if value not in known]
    told = {name: values for name, values in found.items() if values != [None]}
    fields = {"fields": first["fields"]} if first.get("fields") is not None else {}
    return dict.fromkeys(found) | fields | {"differing": told}


def _facts(file: Path) -> tuple[dict[str, Any], bytes, bytes]:
    """Return the meta entry of a file, the bytes of it, and the version of the file."""
    environment = open_environment(file)
    entry = environment.get_entry(schema.META)
    meta = schema.unpack_meta(entry, file)
    return meta, entry or b"", version_of(environment, meta)


@dataclass
class _Part:
    """One file of a source."""

    path: Path
    entry: bytes  # its meta entry
    version: bytes
    count: int
    numbers: list[int] | None  # of its classes in the new database


class Databases(Source):
    """The records of some databases, files or folders of shards, one after the other.

    Args:
        paths: of the databases.

    Raises:
        DatabaseError, FileNotFoundError: one is not whole, or missing.
        SourceError: their classes cannot be matched, or their records are of different kinds.
    """

    kind = "database"
    copies = in_thread = True

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = frozenset(path.resolve() for path in paths)
        given: set[Any] = set()
        self._parts: list[_Part] = []
        self._open: tuple[int, int, Environment] | None = None
        found: list[list[dict[str, Any]]] = []
        notes = []
        for number, path in enumerate(path.resolve() for path in paths):
            files = shard_files(path)
            facts = [_facts(file) for file in files]
            for file in files:
                stat = file.stat()  # under whatever name
                if (which := (stat.st_dev, stat.st_ino or file.resolve())) in given:
                    name = one_line(str(file))
                    raise SourceError(f"{name} is given twice: give each database once")
                given.add(which)
            metas = [meta for meta, *_ in facts]
            check_shards(path, files, metas)
            classes = metas[0]["classes"]
            known = self.classes if number else classes
            names = (f"{paths[0]}", f"{path}")
            self.classes, numbers = match_classes(known, classes, names)
            if numbers is not None:
                refuse_fields(f"{path}", metas[0]["settings"])
                notes.append(note_of(one_line(str(path)), classes, numbers))
            for file, (meta, entry, version) in zip(files, facts, strict=True):
                self._parts.append(_Part(file, entry, version, meta["count"], numbers))
            found.append(metas)
        self.notes = tuple(notes)
        self.paths |= {part.path for part in self._parts}
        self._ends = list(itertools.accumulate(part.count for part in self._parts))
        self.count = self._ends[-1]
        self._take_settings(paths, [metas[0]["settings"] for metas in found])
        versions = {meta["version"] for metas in found for meta in metas}
        if max(versions) > schema.TURNED:
            self.version = max(versions)
        digest = hashlib.blake2b(digest_size=16)
        for part in self._parts:
            digest.update(b"%s|%d|" % (part.version, part.count))
        self.identity = {
            "names": digest.hexdigest(),
            "sizes": "",
            "contents": [],
            "version": "",
            "place": [],
        }
        self._doubles = self._find_doubles() if len(self._parts) > 1 else {}
        self.refused = next(iter(self._doubles.values()), None)

    def _take_settings(self, paths: Sequence[Path], settings: list[dict[str, Any]]) -> None:
        for path, other in zip(paths, settings, strict=True):
            if other.get("fields") != settings[0].get("fields"):
                raise SourceError(
                    f"{path} has the fields {other.get('fields')}, {paths[0]} has "
                    f"{settings[0].get('fields')}: only databases of the same fields can be merged"
                )
        self.settings = common_settings(settings)

    def _find_doubles(self) -> dict[tuple[int, int], tuple[str, str]]:
        """Return why records are left out, whose key an earlier one has."""
        found: dict[tuple[int, int], tuple[str, str]] = {}
        for key, first, second in doubles(
            [partial(self._keys, n) for n in range(len(self._parts))]
        ):
            position, _, name = self._entry(second, key)
            one, other = (self._parts[number].path for number in (first, second))
            why = f"its key is in {one} and in {other}: keys must be unique"
            found[second, position] = name, why
        return dict(sorted(found.items()))

    def _keys(self, number: int) -> Iterator[bytes]:
        environment = self._environment(number)
        return environment.keys(environment.index)

    def _entry(self, number: int, key: bytes) -> tuple[int, Any, str]:
        environment = self._environment(number)
        with environment.begin(db=environment.index, buffers=False) as txn:
            return schema.read_index(key, txn.get(key))

    def tasks(self) -> Iterator[tuple[int, int]]:
        """Yield (number of the file, position in it) of each record."""
        return self.part(range(self.count))

    def part(self, own: range) -> Iterator[tuple[int, int]]:
        """Yield the tasks of some positions."""
        position = own.start
        while position < own.stop:
            number = bisect.bisect_right(self._ends, position)
            first = self._ends[number] - self._parts[number].count
            last = min(own.stop, self._ends[number])
            yield from ((number, at - first) for at in range(position, last))
            position = last

    def copy(self, task: tuple[int, int]) -> tuple[bytes, bytes, bytes]:
        """Return key, target and image of a record, whose checksum is compared."""
        key, target, image = self._read(task)
        return schema.encode_key(key), schema.encode_target(target), image

    def load(self, task: tuple[int, int]) -> Loaded:
        """Return a record whose image is to be encoded anew."""
        if "fields" in self.settings:
            raise ValueError("a record of several fields is copied as it is, or not at all")
        return Loaded(*self._read(task), self.stamp(task))

    def _read(self, task: tuple[int, int]) -> tuple[str, Any, bytes]:
        if task in self._doubles:
            raise ValueError(self._doubles[task][1])
        number, position = task
        with self._environment(number).begin() as txn:
            if (view := txn.get(schema.position_key(position))) is None:
                raise schema.DatabaseError(f"record {position} is missing")
            record = schema.unpack_record(view, position)
            target = renumbered(record.target, self._parts[number].numbers)
            return record.key, target, bytes(record.image)

    def _environment(self, number: int) -> Environment:
        """Return the file's, of which one at a time is kept open."""
        if self._open is None or self._open[:2] != (number, os.getpid()):
            part = self._parts[number]
            environment = open_environment(part.path)
            if environment.get_entry(schema.META) != part.entry:
                raise schema.DatabaseError(f"{part.path} was replaced meanwhile: start again")
            self._open = number, os.getpid(), environment
        return self._open[2]

    def name(self, task: tuple[int, int]) -> str:
        """Return the file and the position; of a key that is taken the key."""
        if task in self._doubles:
            return self._doubles[task][0]
        return f"record {task[1]} of {self._parts[task[0]].path}"

    def stamp(self, task: tuple[int, int]) -> Stamp:
        """Return the version of the file, and the position."""
        number, position = task
        return Stamp(b"%d|%s|%d" % (number, self._parts[number].version, position), 0)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": None}
