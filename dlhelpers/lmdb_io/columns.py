"""How are keys and targets stored a second time, so that a list of them needs no object each?

The index finds the record of a key. A list of all keys and targets, in the order of the records, is
kept in columns: blocks of some thousand records, and arrays of the targets where all are integers.
Blocks are stored in the same transaction as their records, so that a kill leaves both or none; a
resumed conversion reads the rest from its records. The named database ``columns`` holds

    first position, 12 digits        ->  block
    t, first position, 12 digits     ->  targets, 2**24 or fewer

Both begin with a header, and their numbers are little-endian:

    offset   0  uint32  CRC-32 of everything behind it
             4  uint32  number of records
             8  uint64  position of the first
            16  uint32  targets as: 4 int32, 8 int64, 0 JSON
            20  uint32  0
            24  ...     of targets: an array; of a block: uint32 offsets of the keys, and of the
                        targets where they are JSON, one more than records; keys; targets

The entry ``meta`` says under ``columns`` how many blocks and arrays there are. What it does not
mention is not used: an earlier version may have gone on with the file.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dlhelpers.lmdb_io import schema
from dlhelpers.lmdb_io.checksums import crc32
from dlhelpers.lmdb_io.environments import Environment

__all__ = [
    "Block",
    "Texts",
    "check_columns",
    "head_of",
    "pack_block",
    "pack_targets",
    "read_pair",
    "read_targets",
    "targets_key",
    "unpack_block",
]

_HEADER = struct.Struct("<IIQII")
_ENDS = struct.Struct("<II")  # where a text begins and ends
_AT_ONCE = 1 << 23  # bytes that are copied to be cut


@dataclass(frozen=True)
class Texts:
    """Byte strings in one piece: the i-th is ``data[starts[i]:ends[i]]``."""

    starts: np.ndarray
    ends: np.ndarray
    data: Any

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: int) -> bytes:
        return bytes(self.data[int(self.starts[number]) : int(self.ends[number])])

    def between(self, first: int, last: int) -> list[bytes]:
        """Return those from ``first`` to before ``last``."""
        starts, ends = self.starts[first:last].tolist(), self.ends[first:last].tolist()
        low, high = min(starts, default=0), max(ends, default=0)
        if high - low > _AT_ONCE:  # in another order than that of the records
            return [bytes(self.data[a:b]) for a, b in zip(starts, ends, strict=True)]
        data = bytes(self.data[low:high])  # of which slices are made faster than of a view
        return [data[a - low : b - low] for a, b in zip(starts, ends, strict=True)]


@dataclass(frozen=True)
class Block:
    """Keys and targets of consecutive records; targets are JSON, or integers [N]."""

    keys: Texts
    targets: Texts | np.ndarray

    def __len__(self) -> int:
        return len(self.keys)

    def keys_between(self, first: int, last: int) -> list[str]:
        """Return the source keys of some records."""
        return [schema.decode_key(key) for key in self.keys.between(first, last)]

    def targets_between(self, first: int, last: int) -> list[Any]:
        """Return the targets of some records."""
        if isinstance(self.targets, np.ndarray):
            return self.targets[first:last].tolist()
        return [json.loads(text) for text in self.targets.between(first, last)]


def pack_block(first: int, keys: Sequence[bytes], targets: Sequence[bytes]) -> bytes:
    """Return a block of the records from ``first`` on; targets are JSON."""
    kind, integers = _as_integers(targets)
    offsets = _offsets(keys) if kind else _offsets(keys) + _offsets(targets)
    behind = integers.tobytes() if kind else b"".join(targets)
    return _packed(len(keys), first, kind, bytearray().join([offsets, *keys, behind]))


def unpack_block(view: Any, first: int, check: bool = True) -> Block:
    """Return a block as a view of its bytes.

    Raises:
        DatabaseError: it is damaged.
    """
    count, kind = _read_header(view, first, "the block of keys and targets", check)
    at, size = _HEADER.size, 4 * (count + 1)
    offsets = np.frombuffer(view, "<u4", count + 1, at)
    keys_at = at + (size if kind else 2 * size)
    behind = keys_at + int(offsets[-1])
    keys = Texts(offsets[:-1], offsets[1:], view[keys_at:behind])
    if kind:
        return Block(keys, np.frombuffer(view, f"<i{kind}", count, behind))
    offsets = np.frombuffer(view, "<u4", count + 1, at + size)
    return Block(keys, Texts(offsets[:-1], offsets[1:], view[behind:]))


def read_pair(view: Any, number: int) -> tuple[str, Any]:
    """Return (source key, target) of one record of a block that was checked before."""
    count, _, kind = head_of(view)
    offsets = _HEADER.size + 4 * number
    keys = _HEADER.size + 4 * (count + 1) * (1 if kind else 2)
    first, last = _ENDS.unpack_from(view, offsets)
    key = schema.decode_key(bytes(view[keys + first : keys + last]))
    behind = keys + int.from_bytes(view[_HEADER.size + 4 * count :][:4], "little")
    if kind:
        at = behind + kind * number
        return key, int.from_bytes(view[at : at + kind], "little", signed=True)
    first, last = _ENDS.unpack_from(view, offsets + 4 * (count + 1))
    return key, json.loads(bytes(view[behind + first : behind + last]))


def head_of(view: Any) -> tuple[int, int, int]:
    """Return (number of records, position of the first, bytes of an integer or 0) of a block."""
    return _HEADER.unpack_from(view)[1:4]


def targets_key(first: int) -> bytes:
    """Return the key of the array of targets that begins at a record.

    >>> targets_key(0)
    b't000000000000'
    """
    return b"t" + schema.position_key(first)


def pack_targets(first: int, parts: Sequence[np.ndarray], kind: int) -> bytes:
    """Return an array of targets of ``kind`` bytes each, joined of parts."""
    count = sum(map(len, parts))
    joined = bytearray(kind * count)
    np.concatenate(parts, out=np.frombuffer(joined, f"<i{kind}"), casting="same_kind")
    return _packed(count, first, kind, joined)


def read_targets(txn: Any, arrays: int, mapped: Callable[[Any], Any] = lambda view: view) -> Any:
    """Return the targets of a file as one array, int32 or int64 [N].

    Args:
        txn: a transaction of the columns, with buffers.
        arrays: how many there are.
        mapped: from the bytes of an array to what is read in their place.

    Raises:
        DatabaseError: one is missing or damaged.
    """
    found: list[np.ndarray] = []
    for _ in range(arrays):
        first = sum(map(len, found))
        view = txn.get(targets_key(first))
        if view is None:
            raise schema.DatabaseError(f"the array of targets from record {first} on is missing")
        view = mapped(view)
        count, kind = _read_header(view, first, "the array of targets")
        found.append(np.frombuffer(view, f"<i{kind}", count, _HEADER.size))
    return found[0] if len(found) == 1 else np.concatenate(found or [np.empty(0, "<i4")])


def check_columns(environment: Environment, meta: Mapping[str, Any]) -> Iterator[str | None]:
    """Yield what is wrong with the columns of a file whose index is right, None for each block.

    A file under way has blocks for a part of its records; of its arrays it says nothing.
    """
    told = meta.get("columns")
    if environment.columns is None:
        if told is not None:
            yield "the columns of keys and targets are missing"
        return
    count = blocks = 0
    with environment.begin(db=environment.columns) as txn:
        try:
            targets = read_targets(txn, told["arrays"]) if told and told["arrays"] else None
            for key, view in txn.cursor():
                if key[:1] == b"t":
                    break
                block = unpack_block(view, count)
                if bytes(key) != schema.position_key(count):
                    raise schema.DatabaseError(f"the columns' order is broken at record {count}")
                yield from _compared(block, count, targets, environment)
                count, blocks = count + len(block), blocks + 1
        except schema.DatabaseError as error:
            yield str(error)
            return
    found, expected = (blocks, count), (told["blocks"], meta["count"]) if told else ()
    if told and found != expected:
        yield f"the columns have {count} keys in {blocks} blocks, expected were {expected[::-1]}"
    if targets is not None and len(targets) != count:
        yield f"the arrays have {len(targets)} targets, expected were {count}"


def _compared(
    block: Block, first: int, targets: np.ndarray | None, environment: Environment
) -> Iterator[str | None]:
    """Compare a block with the index, and with the targets that stand in arrays."""
    yield None
    keys = block.keys.between(0, len(block))
    texts = [*map(schema.encode_target, block.targets_between(0, len(block)))]
    with environment.begin(db=environment.index, buffers=False) as txn:
        for position, (key, text) in enumerate(zip(keys, texts, strict=True), first):
            if txn.get(schema.index_key(key)) != schema.index_entry(position, key, text):
                yield f"record {position}: its key or target is another in the columns"
    if targets is not None and not np.array_equal(
        block.targets, targets[first : first + len(block)]
    ):
        yield f"the array of targets is wrong from record {first} to {first + len(block) - 1}"


def _as_integers(texts: Sequence[bytes]) -> tuple[int, np.ndarray | None]:
    """Return (bytes of an integer, targets) where all are integers, otherwise (0, None)."""
    try:
        found = np.fromiter(map(int, texts), np.int64, len(texts))
    except (ValueError, OverflowError):  # other JSON, or beyond 64 bits
        return 0, None
    narrow = found.astype("<i4")
    return (4, narrow) if np.array_equal(narrow, found) else (8, found.astype("<i8"))


def _offsets(parts: Sequence[bytes]) -> bytes:
    ends = np.zeros(len(parts) + 1, np.int64)
    np.cumsum([*map(len, parts)], out=ends[1:])
    return ends.astype("<u4").tobytes()


def _packed(count: int, first: int, kind: int, data: bytearray) -> bytes:
    head = _HEADER.pack(0, count, first, kind, 0)[4:]
    checksum = crc32(data, crc32(head))
    return b"".join((checksum.to_bytes(4, "little"), head, data))


def _read_header(view: Any, first: int, what: str, check: bool = True) -> tuple[int, int]:
    """Return (number of records, bytes of an integer) of a block or array that is as written."""
    if view is not None and len(view) >= _HEADER.size:
        checksum, count, stored, kind, _ = _HEADER.unpack_from(view)
        is_sound = not check or crc32(memoryview(view)[4:]) == checksum
        if is_sound and stored == first:
            return count, kind
    raise schema.DatabaseError(
        f"{what} from record {first} on is damaged or missing: its checksum differs"
    )
