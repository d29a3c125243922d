"""Is every record of a database as it was written?

LMDB trusts its file: a broken page can end the process. So a child process does the reading, and
what becomes of it is reported.
"""

from __future__ import annotations

import heapq
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlhelpers.extras import need
from dlhelpers.lmdb_io import schema
from dlhelpers.lmdb_io.columns import check_columns
from dlhelpers.lmdb_io.environments import Environment, open_environment
from dlhelpers.lmdb_io.fields import Fields
from dlhelpers.lmdb_io.shards import check_shards, shard_files
from dlhelpers.printable import one_line, printable
from dlhelpers.progress import bar

__all__ = [
    "DatabaseInfo",
    "VerifyReport",
    "find_problems",
    "info_lmdb",
    "peek_state",
    "verify_lmdb",
]

_SILENCE_S = 120.0  # a child that says nothing for so long hangs on a broken page
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


@dataclass(frozen=True, repr=False)
class DatabaseInfo:
    """What a database says of itself.

    Attributes:
        path: file or folder of shards.
        count: images.
        classes: their names; None without.
        image_bytes, file_bytes: of the images, and of the files.
        settings: encode, resize and quality of the conversion.
        skipped: (what, why) of all that the conversion left out.
        library: versions that wrote it.
        fields: name -> kind of a database of fields; None of images with targets.
    """

    path: Path
    count: int
    classes: tuple[str, ...] | None
    image_bytes: int
    file_bytes: int
    settings: dict[str, Any]
    skipped: tuple[tuple[str, str], ...]
    library: str
    fields: dict[str, str] | None = None

    def __repr__(self) -> str:
        classes = "none" if self.classes is None else f"{len(self.classes)}"
        shown = ", ".join(map(one_line, (self.classes or ())[:5])) + (
            ", ..." if len(self.classes or ()) > 5 else ""
        )
        settings = ", ".join(f"{k} {v}" for k, v in self.settings.items() if v is not None)
        lines = [
            one_line(str(self.path)),
            f"  images    {self.count}, {self.image_bytes / 1e6:.1f} MB in a file of "
            f"{self.file_bytes / 1e6:.1f} MB",
            f"  classes   {classes}" + (f": {shown}" if shown else ""),
            *[
                f"  field     {one_line(name)}: {kind}"
                for name, kind in (self.fields or {}).items()
            ],
            f"  stored    {settings or 'bytes as the source had them'}",
            f"  written   by {self.library}",
            f"  skipped   {len(self.skipped)}",
        ]
        lines += [f"    {one_line(what)}: {one_line(why)}" for what, why in self.skipped]
        return printable("\n".join(lines))


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
        found, facts = _in_a_child(file, progress)
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
    return _in_a_child(path, progress=False, module=module)[0]


def peek_state(path: Path) -> dict[str, Any] | str:
    """Return the state of a conversion under way, or why it cannot be read.

    A child process looks, since a file that was cut when the machine went down crashes its reader.
    """
    problems, state = _in_a_child(path, progress=False, entry=schema.STATE)
    return "; ".join(problems) if problems or state is None else state


def info_lmdb(path: str | os.PathLike[str]) -> DatabaseInfo:
    """Return what a database says of itself; no image is read.

    Raises:
        DatabaseError, FileNotFoundError: as LMDBDataset.
    """
    path = Path(path).expanduser().resolve()
    files = shard_files(path)
    metas, skipped = [], []
    for file in files:
        environment = open_environment(file)
        metas.append(schema.unpack_meta(environment.get_entry(schema.META), file))
        skipped += [tuple(json.loads(v)) for _, v in environment.items(environment.skipped)]
    check_shards(path, files, metas)
    classes = metas[0]["classes"]
    fields = Fields.stored(metas[0], path)
    return DatabaseInfo(
        path=path,
        count=sum(meta["count"] for meta in metas),
        classes=None if classes is None else tuple(classes),
        image_bytes=sum(meta["image_bytes"] for meta in metas),
        file_bytes=sum(file.stat().st_size for file in files),
        settings={k: v for k, v in metas[0]["settings"].items() if k != "fields"},
        skipped=tuple(skipped),
        library=metas[0]["library"],
        fields=dict(fields.kinds) if fields else None,
    )


def _keys_in_two_shards(files: list[Path]) -> list[str]:
    if len(files) < 2:
        return []
    problems, before, shard = [], b"", ""
    for key, name in heapq.merge(*map(_keys_of, files)):
        if key == before:
            problems.append(f"key {key[:60]!r} is in {shard} and in {name}")
        before, shard = key, name
    return problems


def _keys_of(file: Path) -> Iterator[tuple[bytes, str]]:
    environment = open_environment(file)
    return ((key, file.name) for key in environment.keys(environment.index))


def _in_a_child(
    path: Path, progress: bool | None, entry: bytes = b"", module: str = __name__
) -> tuple[list[str], dict[str, Any] | None]:
    """Run :func:`_main` on a file; return problems and the meta entry, or the given entry."""

    root = str(Path(__file__).resolve().parents[2])
    known = os.environ.get("PYTHONPATH")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (root, known)))}
    code = f"import sys; from {module} import _main; _main(*sys.argv[1:])"
    command = [sys.executable, "-c", code, os.fspath(path), entry.decode()]
    problems: list[str] = []
    meta, at, ended = None, 0, False
    with (
        tempfile.TemporaryFile() as errors_file,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors_file, env=environment
        ) as child,
        bar(progress=progress, desc="verify", unit="img") as shown,
    ):
        try:
            for line in _lines(child):
                kind, value = json.loads(line)
                if kind == "at":
                    shown.update(value - at)
                    at = value
                elif kind == "meta":
                    meta = value
                    shown.total = value["count"]
                elif kind == "problem":
                    problems.append(value)
                else:
                    ended = True
        finally:
            if not ended:
                child.kill()
                child.wait()
        errors_file.seek(0)
        errors = errors_file.read().decode(errors="replace")
    if not ended:
        problems.append(_last_words(child.returncode, at, errors))
    return problems, meta


def _lines(child: Any) -> Iterator[bytes]:
    """Yield the child's lines, until its end or until it hangs."""
    if os.name == "nt":  # pipes cannot be waited for there
        yield from child.stdout
        return
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        while selector.select(_SILENCE_S):
            if not (data := os.read(child.stdout.fileno(), 1 << 16)):
                child.wait()
                return
            *lines, rest = (rest + data).split(b"\n")
            yield from lines


def _last_words(status: int, at: int, errors: str) -> str:
    where = f"at or behind record {at}"
    if status == -signal.SIGKILL:
        return f"LMDB hangs on the file {where}, or reading was killed"
    if status < 0:
        return f"LMDB crashes on a broken page {where} ({signal.Signals(-status).name})"
    last = errors.strip().splitlines()[-1:] or [f"exit status {status}"]
    return f"reading failed {where}: {last[0]}"


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
