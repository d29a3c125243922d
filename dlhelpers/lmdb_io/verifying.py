"""Is every record of a database as it was written?

LMDB trusts its file: a broken page can end the process. So a child process does the reading, and
what becomes of it is reported.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dlhelpers.extras import need
from dlhelpers.lmdb_io import schema
from dlhelpers.lmdb_io.columns import check_columns
from dlhelpers.lmdb_io.doubles import doubles
from dlhelpers.lmdb_io.environments import Environment, open_environment
from dlhelpers.lmdb_io.fields import Fields
from dlhelpers.lmdb_io.reading_apart import read_apart
from dlhelpers.lmdb_io.shards import check_shards, shard_files
from dlhelpers.printable import one_line, printable

__all__ = ["VerifyReport", "find_problems", "peek_state", "verify_lmdb"]

_EVERY = 256  # records between two lines of the child
_MOST = 1000  # problems that are listed


@dataclass(frozen=True)
class VerifyReport:
    """A database whose every record is as it was written.

    Attributes:
        path: the database.
        count: records that were read.
        image_bytes: of their images.
    """

    path: Path
    count: int
    image_bytes: int

    def __str__(self) -> str:
        return printable(
            f"{one_line(str(self.path))}: all {self.count} records are as they were written"
        )


def verify_lmdb(path: str | os.PathLike[str], *, progress: bool | None = None) -> VerifyReport:
    """Read every record and compare checksums, count, order and index.

    Args:
        path: the file, or a folder of shards.
        progress: a bar on long runs; None draws it in a terminal only.

    Returns:
        A VerifyReport where everything is as it was written.

    Raises:
        DatabaseError: something is not; names each record that is damaged. Also where LMDB itself
            crashes on the file, which a child process suffers in place of this one.
        FileNotFoundError: there is no such file.
    """
    need("lmdb", "verify_lmdb")
    path = Path(path).expanduser()
    files = shard_files(path)
    count = image_bytes = 0
    problems: list[str] = []
    seen: list[dict[str, Any]] = []
    for file in files:
        if not file.exists():
            Environment(file)  # says how to fix it
        found, facts = read_apart(file, __name__, progress=progress)
        prefix = f"{file.name}: " if len(files) > 1 else ""
        problems += [prefix + problem for problem in found]
        if facts:
            count, image_bytes = count + facts["count"], image_bytes + facts["image_bytes"]
            seen.append(facts)
    if not problems:
        check_shards(path, files, seen)
        problems += _keys_in_two_shards(files)
    if problems:
        shown = "\n  ".join(map(one_line, problems[:_MOST]))
        raise schema.DatabaseError(
            f"{path} is damaged, {len(problems)} problem{'s' * (len(problems) > 1)}:\n  {shown}\n"
            "convert its source again, or copy the file again"
        )
    return VerifyReport(path, count, image_bytes)


def find_problems(path: Path, module: str = __name__) -> list[str]:
    """Return what is wrong with one file, whole or under way, found in a child process.

    The child calls ``_main(path, "")`` of a module, which prints what :func:`_check` yields.
    """
    return read_apart(path, module)[0]


def peek_state(path: Path) -> dict[str, Any] | str:
    """Return the state of a conversion under way, or why it cannot be read.

    A child process looks, since a file that was cut when the machine went down crashes its reader.
    """
    problems, state = read_apart(path, __name__, schema.STATE)
    return "; ".join(problems) if problems or state is None else state


def _keys_in_two_shards(files: list[Path]) -> list[str]:
    if len(files) < 2:
        return []
    return [
        f"key {key[:60]!r} is in {files[first].name} and in {files[second].name}"
        for key, first, second in doubles([partial(_keys_of, file) for file in files])
    ]


def _keys_of(file: Path) -> Iterator[bytes]:
    environment = open_environment(file)
    return environment.keys(environment.index)


def _check(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (kind, value): ``meta``, ``at``, ``problem``, at last ``end``."""
    import lmdb

    try:
        environment = Environment(path)
        stored = environment.get_entry(schema.META) or environment.get_entry(schema.STATE)
        meta = schema.unpack_meta(stored, path)
        fields = Fields.stored(meta, path)
    except (schema.DatabaseError, OSError, lmdb.Error) as error:
        yield "problem", str(error)
        yield "end", None
        return
    yield "meta", meta
    count = meta["count"]
    for position in range(count):
        if position % _EVERY == 0:
            yield "at", position
        try:
            _check_record(environment, position, fields)
        except schema.DatabaseError as error:
            yield "problem", str(error)
        except lmdb.Error as error:  # ends its transaction, so that each record has its own
            yield "problem", f"record {position} cannot be read: {error}"
    yield "at", count
    for database, name in ((environment.records, "records"), (environment.index, "index")):
        stored = environment.count(database)
        if stored != count:
            yield "problem", f"the {name} hold {stored} entries, expected were {count}"
    try:
        yield from _walk(environment, count, meta.get("skipped"))
        for problem in check_columns(environment, meta):
            yield ("at", count) if problem is None else ("problem", problem)
    except lmdb.Error as error:
        yield "problem", f"the entries cannot be listed: {error}"
    yield "end", None


def _check_record(environment: Environment, position: int, fields: Fields | None) -> None:
    with environment.begin() as txn:
        view = txn.get(schema.position_key(position))
        if view is None:
            raise schema.DatabaseError(f"record {position} is missing")
        damage = fields.damage(view) if fields else ""
        part = f"; what differs is {damage}" if damage else ""
        try:
            key, entry = _entry(schema.unpack_record(view, position), position)
        except schema.DatabaseError as error:
            raise schema.DatabaseError(f"{error}{part}") from None
        if damage:
            raise schema.DatabaseError(f"record {position} is damaged{part}")
        if txn.get(key, db=environment.index) != entry:
            raise schema.DatabaseError(
                f"record {position}: its key is wrong or missing in the index"
            )


def _walk(environment: Environment, count: int, skipped: int | None) -> Iterator[tuple[str, Any]]:
    """Go through all entries in order, as a listing does."""
    for number, key in enumerate(environment.keys(environment.records)):
        if key != schema.position_key(number) or number >= count:
            yield "problem", f"the records' order is broken at entry {number}, key {key[:20]!r}"
            break
    before = b""
    for number, (key, value) in enumerate(environment.items(environment.index)):
        if number % (1 << 16) == 0:
            yield "at", count  # still alive
        if number and key <= before:
            yield "problem", f"the index's order is broken at {key[:60]!r}"
            break
        before = key
        try:
            schema.read_index(key, value)
        except schema.DatabaseError as error:
            yield "problem", str(error)
    found = 0
    for _, value in environment.items(environment.skipped):
        found += 1
        try:
            _what, _why = json.loads(value)
        except (TypeError, ValueError):
            yield "problem", f"entry {found} of the skipped images is damaged"
    if skipped is not None and found != skipped:
        yield "problem", f"{found} skipped images are listed, {skipped} are counted"


def _entry(record: schema.Record, position: int) -> tuple[bytes, bytes]:
    key = schema.encode_key(record.key)
    target = schema.encode_target(record.target)
    return schema.index_key(key), schema.index_entry(position, key, target)


def _peek(path: Path, entry: bytes) -> Iterator[tuple[str, Any]]:
    try:
        stored = Environment(path, whole=False).get_entry(entry)
        if stored is None:
            yield "problem", "it was stopped before its first images were kept"
        else:
            yield "meta", schema.unpack_meta(stored, path)
    except (schema.DatabaseError, OSError) as error:
        yield "problem", str(error)
    yield "end", None


def _main(path: str, entry: str) -> None:
    events = _peek(Path(path), entry.encode()) if entry else _check(Path(path))
    for event in events:
        print(json.dumps(event), flush=True)
