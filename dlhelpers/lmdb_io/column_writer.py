"""How do the columns of keys and targets grow with the records of a file?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dlhelpers.lmdb_io import schema
from dlhelpers.lmdb_io.columns import (
    head_of,
    pack_block,
    pack_targets,
    targets_key,
    unpack_block,
)

__all__ = ["ColumnWriter"]

_BLOCK_RECORDS, _BLOCK_BYTES = 1 << 14, 1 << 22  # a block ends at the first that it reaches
_ARRAY_RECORDS = 1 << 24  # and a few more, since an array holds whole blocks


@dataclass
class ColumnWriter:
    """The columns of a growing file: what is not stored yet, and where it begins.

    Attributes:
        count: records whose keys and targets were added.
    """

    count: int = 0
    _keys: list[bytes] = field(default_factory=list)
    _targets: list[bytes] = field(default_factory=list)
    _bytes: int = 0
    _full: list[tuple[int, bytes]] = field(default_factory=list)

    def copy(self) -> ColumnWriter:
        """Return a copy, to go back to where a transaction fails."""
        parts = (self._keys, self._targets, self._full)
        keys, targets, full = (part.copy() for part in parts)
        return ColumnWriter(self.count, keys, targets, self._bytes, full)  # type: ignore[arg-type]

    def add(self, key: bytes, target: bytes) -> None:
        """Add the key and the target (JSON) of the next record."""
        self._keys.append(key)
        self._targets.append(target)
        self._bytes += len(key) + len(target)
        self.count += 1
        if len(self._keys) == _BLOCK_RECORDS or self._bytes >= _BLOCK_BYTES:
            self._end_block()

    def _end_block(self) -> None:
        if self._keys:
            first = self.count - len(self._keys)
            self._full.append((first, pack_block(first, self._keys, self._targets)))
            self._keys, self._targets, self._bytes = [], [], 0

    def put(self, txn: Any, database: Any) -> None:
        """Store the blocks that are full."""
        for first, block in self._full:
            txn.put(schema.position_key(first), block, db=database)
        self._full = []

    def take_up(self, txn: Any, database: Any, records: Any, count: int) -> None:
        """Go on behind ``count`` records: keep the blocks that fit, and read the other records.

        Raises:
            DatabaseError: a record is missing or damaged.
        """
        kept = set()
        for key, value in txn.cursor(database):
            try:
                block = unpack_block(memoryview(value), self.count)
            except schema.DatabaseError:
                break
            if key != schema.position_key(self.count) or self.count + len(block) > count:
                break
            kept.add(key)
            self.count += len(block)
        for key in [*txn.cursor(database).iternext(keys=True, values=False)]:
            if key not in kept:
                txn.delete(key, db=database)
        for position in range(self.count, count):
            stored = txn.get(schema.position_key(position), db=records) or b""
            record = schema.unpack_record(memoryview(stored), position, check=False)
            self.add(schema.encode_key(record.key), schema.encode_target(record.target))

    def finish(self, env: Any, database: Any, make_room: Callable[[int], None]) -> dict[str, Any]:
        """Store the last block and the arrays of targets; return what ``meta`` tells of them.

        Args:
            env: the environment of the file.
            database: its named database of columns.
            make_room: is called with the bytes that the next transaction stores.
        """
        self._end_block()
        make_room(sum(len(block) for _, block in self._full))
        with env.begin(write=True) as txn:
            self.put(txn, database)
        with env.begin(db=database, buffers=True) as txn:
            heads = [head_of(view) for _, view in txn.cursor()]
        kinds = [kind for _, _, kind in heads]
        if not all(kinds):
            return {"blocks": len(heads), "arrays": None}
        arrays = 0
        while heads:
            own = [heads.pop(0)]
            while heads and heads[0][1] - own[0][1] < _ARRAY_RECORDS:
                own.append(heads.pop(0))
            array = _gathered(env, database, [first for _, first, _ in own], max(kinds))
            make_room(len(array))
            with env.begin(write=True) as txn:
                txn.put(targets_key(own[0][1]), array, db=database)
            arrays += 1
        return {"blocks": len(kinds), "arrays": arrays}


def _gathered(env: Any, database: Any, firsts: Sequence[int], kind: int) -> bytes:
    """Return the targets of some blocks as one array, packed."""
    with env.begin(db=database, buffers=True) as txn:
        parts = [
            unpack_block(txn.get(schema.position_key(first)), first).targets for first in firsts
        ]
        return pack_targets(firsts[0], parts, kind)
