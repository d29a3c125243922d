"""What is kept of one file of a database while it is read."""

from __future__ import annotations

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
        stored_meta, meta: its meta entry, as stored and unpacked.
        fields: of its records; None where they hold an image and a target.

    Raises:
        DatabaseError: it is no whole database of this schema.
    """

    def __init__(self, path: Path, readahead: bool | None) -> None:
        self.path, self._readahead = path, readahead
        self._environment: Environment | None = None
        environment = open_environment(path, readahead=readahead)
        self.stored_meta = environment.get_entry(schema.META)
        self.meta = schema.unpack_meta(self.stored_meta, path)
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
        if environment.get_entry(schema.META) != self.stored_meta:
            raise schema.DatabaseError(
                f"{self.path} was replaced after this dataset was made: make a new LMDBDataset"
            )
        self._environment = environment
        return environment

    @property
    def identity(self) -> bytes:
        """What tells its content apart from that of another file."""
        if "contents" in self.meta:
            return self.stored_meta
        # an earlier version wrote no digest of what it stored
        environment = self.open()
        checksums = (record[:4] for _, record in environment.items(environment.records))
        return self.stored_meta + b"".join(checksums)

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
                f"{self.path}: record {position} cannot be read ({error}): verify_lmdb tells what "
                "else is damaged"
            ) from None
        if view is None:
            raise schema.DatabaseError(
                f"{self.path}: record {position} is missing of {self.meta['count']}: verify_lmdb "
                "tells what else is damaged"
            )
        try:
            return schema.unpack_record(view, position, check)
        except schema.DatabaseError as error:
            damage = self.fields.damage(view) if self.fields else ""
            part = f"; what differs is {damage}" if damage else ""
            raise schema.DatabaseError(f"{self.path}: {error}{part}") from None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_environment": None}
