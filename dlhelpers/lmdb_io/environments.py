"""One read-only LMDB environment for each file and process, opened when it is needed.

LMDB forbids to open a file twice in one process, and to use an environment behind a fork. So
environments are shared by file within a process; a child that inherits one puts it aside and opens
its own; and nothing is written, not even a lock file, so that read-only folders work.
"""

from __future__ import annotations

import errno
import os
import threading
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from dlhelpers.extras import need
from dlhelpers.lmdb_io import schema

__all__ = ["Environment", "lmdb_path", "open_environment"]

_lock = threading.Lock()
_shared: weakref.WeakValueDictionary[tuple[int, ...], Environment] = weakref.WeakValueDictionary()


def _forget_in_child() -> None:
    global _lock
    _lock = threading.Lock()  # another thread may have held it at the fork


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)


class Environment:
    """An open file of records, for reading.

    Attributes:
        databases: how many named ones can be opened.
        path: the file.
        pid: the process that opened it.
        columns: its named database of keys and targets; None where there is none.
        page_size: of the file, in bytes.
        begin: starts a read transaction on the records.
    """

    databases = 4

    def __init__(self, path: Path, *, whole: bool = True, readahead: bool | None = None) -> None:
        """Open a file; ``whole`` asks that each of its pages is there, ``readahead`` lets the
        system read more than is asked for (None where memory holds the file).

        Raises:
            FileNotFoundError, PermissionError: as the system says.
            DatabaseError: the file is no LMDB file, has no records, or is truncated.
        """
        lmdb = need("lmdb", "a database")
        self.path, self.pid = path, os.getpid()
        size = _file_size(path)
        try:
            self._env = lmdb.open(
                lmdb_path(path),
                subdir=False,
                readonly=True,
                lock=False,
                readahead=_fits_in_memory(size) if readahead is None else readahead,
                meminit=False,
                max_dbs=self.databases,
                max_spare_txns=8,
            )
        except lmdb.Error as error:
            if "already open" in str(error):
                raise schema.DatabaseError(
                    f"{path} is open in this process already, by lmdb.open: close that first, "
                    "LMDB allows one for each file"
                ) from None
            if os.strerror(errno.EMFILE) in str(error):
                raise _too_many_open(path) from None
            raise schema.DatabaseError(f"{path} is no LMDB file: {error}") from None
        try:
            # beyond the end of a truncated file the map would end the process, without an error
            self.page_size = self._env.stat()["psize"]
            needed = (self._env.info()["last_pgno"] + 1) * self.page_size
            if whole and size < needed:
                raise schema.DatabaseError(
                    f"{path} is truncated: it has {size} bytes of {needed}; copy it again, or "
                    "convert its source again"
                )
            self._open_records()
        except BaseException:
            self._env.close()
            raise

    def _open_records(self) -> None:
        import lmdb

        try:
            self.records, self.index, self.skipped = (
                self._env.open_db(name, create=False)
                for name in (schema.RECORDS, schema.INDEX, schema.SKIPPED)
            )
        except lmdb.Error:  # not found, of another kind, or broken
            raise schema.DatabaseError(
                f"{self.path} is an LMDB file, but none that write_lmdb has written (it holds no "
                "records of its schema): convert_lmdb (python -m dlhelpers lmdb convert) reads "
                "many such, write_lmdb its source"
            ) from None
        try:
            self.columns = self._env.open_db(schema.COLUMNS, create=False)
        except lmdb.Error:  # not found in a file of an earlier version, or broken
            self.columns = None
        self.begin = partial(self._env.begin, db=self.records, buffers=True)

    def get_entry(self, name: bytes) -> bytes | None:
        """Return ``meta`` or ``state``, None where there is none."""
        with self._env.begin() as txn:
            return txn.get(name)

    def items(self, database: Any) -> Iterator[tuple[bytes, bytes]]:
        """Yield (key, value) of a named database in order of the keys."""
        with self._env.begin(db=database) as txn:
            yield from txn.cursor()

    def keys(self, database: Any) -> Iterator[bytes]:
        """Yield the keys of a named database in order."""
        with self._env.begin(db=database) as txn:
            yield from txn.cursor().iternext(keys=True, values=False)

    def count(self, database: Any) -> int:
        """Return the number of entries that a named database says it has."""
        with self._env.begin() as txn:
            return txn.stat(database)["entries"]

    def close(self) -> None:
        """Close the file; in a child that inherited it, forget it."""
        self._env.close()

    def __del__(self) -> None:
        if hasattr(self, "_env"):
            self._env.close()


def lmdb_path(path: Path) -> str | bytes:
    """Return a path as lmdb.open takes it, which encodes texts by itself and strictly."""
    return str(path) if os.name == "nt" else os.fsencode(path)


def open_environment(
    path: Path, kind: type[Environment] = Environment, readahead: bool | None = None
) -> Any:
    """Return the environment of a file in this process, opened if it is not yet.

    It stays open as long as somebody holds it, as the first of them wanted to read ahead. ``kind``
    is the class that opens it.

    Raises:
        FileNotFoundError, PermissionError, DatabaseError: as :class:`Environment`; also where the
            file is open as another kind.
    """
    with _lock:
        stat = os.stat(path) if path.exists() else None
        key = None if stat is None else (stat.st_dev, stat.st_ino or hash(str(path)))
        found = _shared.get(key) if key else None
        if found is not None and found.pid == os.getpid():
            if type(found) is kind:
                return found
            raise schema.DatabaseError(
                f"{path} is open in this process already, as a database of another kind: close "
                "that one first, LMDB allows one for each file"
            )
        if found is not None:  # inherited through a fork
            found.close()
        environment = kind(path, readahead=readahead)
        _shared[key] = environment
        return environment


def _fits_in_memory(size: int) -> bool:
    """Whether the system may read ahead: an epoch wants every page, so what is read around one
    record is wanted soon, as long as memory holds it until then."""
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # Windows
        return True
    return size < memory // 2


def _file_size(path: Path) -> int:
    try:
        with open(path, "rb") as file:  # says at once what may not be read
            return os.fstat(file.fileno()).st_size
    except OSError as error:
        if error.errno == errno.EMFILE:
            raise _too_many_open(path) from None
        if not isinstance(error, FileNotFoundError):
            raise
        started = path.with_name(f".{path.name}.part")
        hint = "convert an image folder with write_lmdb"
        if started.exists():
            hint = "a conversion is under way or was interrupted: write_lmdb(..., resume=True)"
        raise FileNotFoundError(errno.ENOENT, f"there is no database; {hint}", str(path)) from None


def _too_many_open(path: Path) -> OSError:
    return OSError(
        errno.EMFILE,
        "this process has too many files open: allow more (`ulimit -n 4096`), or copy the database "
        "into fewer shards (`python -m dlhelpers lmdb merge`)",
        str(path),
    )
