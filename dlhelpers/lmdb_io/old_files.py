"""How is a file of LMDB read that anybody may have written, and may have damaged?

LMDB trusts its file: a broken page can end the process. So a child process walks over the whole
tree first, and over where each value begins and ends.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dlhelpers.lmdb_io import schema
from dlhelpers.lmdb_io.environments import Environment, open_environment
from dlhelpers.lmdb_io.verifying import find_problems

__all__ = ["OldEnvironment", "open_old_file"]

_NAMED_BYTES = 48  # what LMDB keeps of a named database under its name
_EVERY = 1024  # entries between two lines of the child


def open_old_file(path: Path) -> OldEnvironment:
    """Return the environment of a file, after a child process has walked over it.

    Raises:
        DatabaseError: it is damaged, or no file of LMDB.
    """
    if problems := find_problems(path, __name__):
        why = problems[0] if str(path) in problems[0] else f"{path} is damaged: {problems[0]}"
        raise schema.DatabaseError(why)
    return open_environment(path, OldEnvironment)


class OldEnvironment(Environment):
    """A file of LMDB that anybody wrote."""

    databases = 64

    def _open_records(self) -> None:
        self._opened: dict[bytes | None, Any] = {None: None}

    def database(self, name: bytes | None) -> Any:
        """Return the handle of a named database; None stands for the main one."""
        if name not in self._opened:
            self._opened[name] = self._env.open_db(name, create=False)
        return self._opened[name]

    def get(self, key: bytes, name: bytes | None) -> bytes | None:
        """Return a value; None also for what cannot be a key."""
        return self._read(key, name, bytes)

    def length(self, key: bytes, name: bytes | None) -> int:
        """Return the bytes of a value, without a look at them; -1 where there is none."""
        found = self._read(key, name, len)
        return -1 if found is None else found

    def _read(self, key: bytes, name: bytes | None, make: Callable[[memoryview], Any]) -> Any:
        import lmdb

        handle = self.database(name)
        try:
            with self._env.begin(db=handle, buffers=True) as txn:
                view = txn.get(key)
                return None if view is None else make(view)
        except lmdb.BadValsizeError:
            return None

    def views(self, name: bytes | None) -> Iterator[tuple[memoryview, memoryview]]:
        """Yield (key, value) in order, as views that hold until the next."""
        with self._env.begin(db=self.database(name), buffers=True) as txn:
            yield from txn.cursor()

    def flags(self, name: bytes | None) -> dict[str, bool]:
        """Return how a database was made."""
        with self._env.begin() as txn:
            return (self.database(name) or self._env.open_db(None, txn=txn)).flags(txn)

    def size(self, name: bytes | None) -> int:
        """Return the number of entries."""
        with self._env.begin(db=self.database(name)) as txn:
            return txn.stat(self.database(name) or self._env.open_db(None, txn=txn))["entries"]

    def names(self) -> list[bytes]:
        """Return the names of named databases; they are few, and stand among the main's entries."""
        import lmdb

        if not 0 < self.size(None) < self.databases - 2:
            return []
        found = []
        for name in [bytes(k) for k, v in self.views(None) if len(v) == _NAMED_BYTES]:
            try:
                self.database(name)
            except lmdb.Error:  # an entry of that size
                continue
            found.append(name)
        return found


def _walk(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (kind, value) for :func:`read_apart`, and touch each page that LMDB goes through."""
    import lmdb

    try:
        environment = OldEnvironment(path)
        yield "meta", {"count": environment.size(None)}
        for name in (None, *environment.names()):
            count, number = environment.size(name), 0
            for number, (_, value) in enumerate(environment.views(name), 1):
                _ = value[:1], value[-1:]  # where it begins and ends
                if number % _EVERY == 0:
                    yield "at", number
                if number > count:
                    break
            if number != count:
                shown = "" if name is None else f" in {name[:60]!r}"
                yield "problem", f"it says {count} entries{shown}, but holds {number}"
    except (schema.DatabaseError, OSError, lmdb.Error) as error:
        yield "problem", str(error)
    yield "end", None


def _main(path: str, _entry: str) -> None:
    for event in _walk(Path(path)):
        print(json.dumps(event), flush=True)
