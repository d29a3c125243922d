"""What is kept of one file of a database while it is read."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from dlhelpers.lmdb_io import schema
from dlhelpers.lmdb_io.environments import Environment, open_environment
from dlhelpers.lmdb_io.fields import Fields

__all__ = ["DatabaseFile"]


class DatabaseFile:
    """One file of a dataset: opened when it is read, in each process anew.

    Attributes:
        path: of the file.
        meta: its meta entry.
        fields: of its records; None where they hold an image and a target.

    Raises:
        DatabaseError: it is no whole database of this schema.
    """

    def __init__(self, path: Path, readahead: bool | None) -> None:
        self.path, self._readahead = path, readahead
        self._environment: Environment | None = None
        environment = open_environment(path, readahead=readahead)
        self._entry = environment.get_entry(schema.META)  # or a digest of it
        self.meta = schema.unpack_meta(self._entry, path)
        self.fields = Fields.stored(self.meta, path)

    def open(self) -> Environment:
        """Return its environment in this process.

        Raises:
            DatabaseError: the file was replaced.
        """
        environment = self._environment
        if environment is not None and environment.pid == os.getpid():
            return environment
        environment = open_environment(self.path, readahead=self._readahead)
        entry = environment.get_entry(schema.META)
        if self._entry not in (entry, _digest_of(entry)):
            raise schema.DatabaseError(
                f"{self.path} was replaced after this dataset was made: make a new LMDBDataset"
            )
        self._environment = environment
        return environment

    @property
    def identity(self) -> bytes:
        """What tells its content apart from that of another file."""
        environment = self.open()
        entry = environment.get_entry(schema.META)
        if "contents" in self.meta:
            return entry
        # an earlier version wrote no digest of what it stored
        checksums = (record[:4] for _, record in environment.items(environment.records))
        return entry + b"".join(checksums)

    def read(self, txn: Any, position: int, check: bool) -> schema.Record:
        """Return a record, compared with its checksum where ``check`` says so.

        Raises:
            DatabaseError: it is missing or damaged.
        """
        try:
            view = txn.get(schema.position_key(position))
        except Exception as error:
            import lmdb  # only a failure needs it: reading pays for no import

            if not isinstance(error, lmdb.Error):
                raise
            raise schema.DatabaseError(
                f"{self.path}: record {position} cannot be read ({error}): verify_lmdb lists what "
                "else is damaged"
            ) from None
        if view is None:
            raise schema.DatabaseError(
                f"{self.path}: record {position} is missing of {self.meta['count']}: verify_lmdb "
                "lists what else is damaged"
            )
        try:
            return schema.unpack_record(view, position, check)
        except schema.DatabaseError as error:
            damage = self.fields.damage(view) if self.fields else ""
            part = f"; what differs is {damage}" if damage else ""
            raise schema.DatabaseError(f"{self.path}: {error}{part}") from None

    def __getstate__(self) -> dict[str, Any]:
        # a worker needs the classes of all shards once: they are in ``meta`` as well
        return self.__dict__ | {"_environment": None, "_entry": _digest_of(self._entry)}


def _digest_of(entry: bytes | None) -> bytes:
    """Return a digest of a meta entry; one of a digest is itself."""
    entry = entry or b""
    return entry if len(entry) == 16 else hashlib.blake2b(entry, digest_size=16).digest()
