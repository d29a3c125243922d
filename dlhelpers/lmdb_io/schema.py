"""What stands where in a database, byte by byte.

One LMDB file (``subdir=False``) with four named databases and two entries beside them:

    records   position, 12 ASCII digits  ->  record
    index     source key                 ->  JSON [position, target] or [position, target, key]
    skipped   source position, 12 digits ->  JSON [source key, why]
    columns   keys and targets in order, in blocks and arrays: dlhelpers.lmdb_io.columns; missing
              in files of earlier versions, which read files that have it
    meta      CRC-32 in 8 hexadecimal digits, a blank, and a JSON object: count, classes, settings,
              digests of names and contents; of a shard also the identity of the whole source
    state     the same: items of the source that are done, and their digests

A record is a header, the source key, the target and the image, one behind the other:

    offset   0  uint32  CRC-32 of everything behind it
             4  uint64  position
            12  uint16  bytes of the source key
            14  uint32  bytes of the target
            18  ...     source key, UTF-8
                ...     target, JSON; an int for a class
                ...     image, encoded as the source had it, or raw (below)

Where records hold several fields, :mod:`fields` says what stands in place of the image.

Numbers are little-endian. Nothing is pickled. A raw image is the three bytes ``RAW``, its EXIF
orientation (2 to 8; 0 where it needs none) as one byte, its height and width as uint32, and
height x width x 3 bytes RGB, not turned. LMDB allows keys of 511 bytes: of a
longer source key the index holds the first 446 bytes, a zero and the SHA-256 in hexadecimal digits,
and its JSON holds the whole key. The entry ``state`` says how far the source was read; ``meta`` is
written last, so that an unfinished file is never taken for a whole one.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dlhelpers.lmdb_io.checksums import crc32
from dlhelpers.lmdb_io.shared_classes import read_meta
from dlhelpers.printable import printable

__all__ = [
    "COLUMNS",
    "FIELDS",
    "FORMAT",
    "HEADER",
    "INDEX",
    "META",
    "RECORDS",
    "SKIPPED",
    "STATE",
    "TURNED",
    "VERSION",
    "DatabaseError",
    "Record",
    "decode_key",
    "encode_key",
    "encode_target",
    "index_entry",
    "index_key",
    "is_same_record",
    "is_whole",
    "pack_meta",
    "pack_record",
    "position_key",
    "read_index",
    "read_target",
    "record_parts",
    "unpack_meta",
    "unpack_record",
]

FORMAT = "dlhelpers-lmdb"
VERSION, TURNED = 1, 2  # the second where a raw image has an orientation, and nowhere else
FIELDS = 3  # where records hold several fields, see fields.py
RECORDS, INDEX, SKIPPED, COLUMNS = b"records", b"index", b"skipped", b"columns"
META, STATE = b"meta", b"state"
HEADER = struct.Struct("<IQHI")  # of a record
_BEHIND_POSITION = 12
_LONGEST_KEY = 511  # LMDB's own limit
_LONGEST_SOURCE_KEY = 65_535


class DatabaseError(ValueError):
    """A file that is no whole database of this schema; the message names what is wrong where."""

    def __str__(self) -> str:
        return printable(super().__str__())


class Record(NamedTuple):
    """One record: its source key, target, and a view of the encoded image."""

    key: str
    target: Any
    image: memoryview


def position_key(position: int) -> bytes:
    """Return the key of a record; zero-padded, so that the order of bytes is that of numbers.

    >>> position_key(7)
    b'000000000007'
    """
    return b"%012d" % position


def encode_key(key: str) -> bytes:
    """Return a source key as bytes; file names that are no UTF-8 survive.

    Raises:
        ValueError: it is no text, empty, or longer than 65,535 bytes.
    """
    if not isinstance(key, str) or not key:
        raise ValueError(f"a key must be a text that is not empty, got {key!r}: give str(key)")
    try:
        data = key.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise ValueError(f"key {key[:40]!r} is no text that UTF-8 can write ({error})") from None
    if len(data) > _LONGEST_SOURCE_KEY:
        raise ValueError(f"key {key[:40]!r}... has {len(data)} bytes, 65535 are allowed")
    return data


def decode_key(data: bytes) -> str:
    """Return what :func:`encode_key` was given."""
    return data.decode("utf-8", "surrogateescape")


def encode_target(target: Any, what: str = "target") -> bytes:
    """Return a target as JSON; NumPy and torch scalars become plain numbers, tuples lists.

    ``what`` is what a message calls it.

    Raises:
        ValueError: JSON has no such value.

    >>> encode_target(3), encode_target({"boxes": [(1, 2, 3, 4)]})
    (b'3', b'{"boxes":[[1,2,3,4]]}')
    """
    if type(target) is int:
        return b"%d" % target
    if hasattr(target, "item") and not getattr(target, "shape", ()):
        target = target.item()
    try:
        if isinstance(target, (Mapping, list, tuple)):
            _need_text_keys(target)  # json would turn {1: 2} into {"1": 2} and say nothing
        return json.dumps(target, separators=(",", ":"), ensure_ascii=True).encode()
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{what} {str(target)[:60]!r} of type {type(target).__name__} cannot be stored "
            f"({error}): give an int, or numbers, texts, lists and dicts (tensor.tolist())"
        ) from None


def _need_text_keys(value: Any) -> None:
    if isinstance(value, Mapping):
        if odd := [key for key in value if not isinstance(key, str)]:
            raise TypeError(f"a dict needs texts as keys, not {odd[0]!r}")
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for inner in value:
            _need_text_keys(inner)


def pack_record(position: int, key: bytes, target: bytes, image: bytes) -> bytes:
    """Return a record; :func:`unpack_record` gives its parts back."""
    head = HEADER.pack(0, position, len(key), len(target))[4:] + key + target
    checksum = crc32(image, crc32(head))
    return b"".join((checksum.to_bytes(4, "little"), head, image))


def is_same_record(first: bytes | None, second: bytes) -> bool:
    """Whether two records differ in nothing but their position."""
    return first is not None and first[_BEHIND_POSITION:] == second[_BEHIND_POSITION:]


def unpack_record(view: memoryview, position: int, check: bool = True) -> Record:
    """Return the parts of a record.

    Args:
        view: the stored bytes; the image in the result is a part of it, not a copy.
        position: where the record was read.
        check: computes the checksum.

    Raises:
        DatabaseError: the record is damaged or belongs elsewhere.
    """
    if len(view) < HEADER.size:
        raise DatabaseError(f"record {position} is damaged: {len(view)} bytes are no record")
    checksum, stored, key_size, target_size = HEADER.unpack_from(view)
    if check and crc32(view[4:]) != checksum:
        raise DatabaseError(
            f"record {position} is damaged: its checksum differs; verify_lmdb finds all such "
            "records, and a new conversion fixes them"
        )
    first = HEADER.size + key_size
    last = first + target_size
    if stored != position or last > len(view):
        raise DatabaseError(f"record {position} is damaged: it says that it is record {stored}")
    try:
        return Record(
            decode_key(bytes(view[HEADER.size : first])),
            read_target(bytes(view[first:last])),
            view[last:],
        )
    except ValueError as error:
        raise DatabaseError(f"record {position} is damaged: {error}") from None


def read_target(data: bytes) -> Any:
    """Return what :func:`encode_target` was given, as JSON gives it back.

    Raises:
        ValueError: it is no JSON.
    """
    return int(data) if data.isdigit() else json.loads(data)


def record_parts(view: memoryview) -> tuple[memoryview, memoryview, memoryview]:
    """Return the bytes of key, target and image of a record that may be damaged.

    Raises:
        struct.error: it has no header.
    """
    _, _, key_size, target_size = HEADER.unpack_from(view)
    first = HEADER.size + key_size
    last = first + target_size
    return view[HEADER.size : first], view[first:last], view[last:]


def is_whole(view: memoryview) -> bool:
    """Whether a record is as its checksum says."""
    return crc32(view[4:]) == int.from_bytes(view[:4], "little")


def index_key(key: bytes) -> bytes:
    """Return the key of the index, which is never longer than LMDB allows."""
    if len(key) <= _LONGEST_KEY:
        return key
    return key[:446] + b"\0" + hashlib.sha256(key).hexdigest().encode()


def index_entry(position: int, key: bytes, target: bytes) -> bytes:
    """Return the index's value: JSON of position, target, and the key where it was cut."""
    cut = b"," + json.dumps(decode_key(key)).encode() if len(key) > _LONGEST_KEY else b""
    return b"[%d,%s%s]" % (position, target, cut)


def read_index(key: bytes, value: bytes) -> tuple[int, Any, str]:
    """Return (position, target, source key) of an entry of the index.

    Raises:
        DatabaseError: the entry is damaged.
    """
    try:
        position, target, *whole = json.loads(value)
        return int(position), target, (whole[0] if whole else decode_key(key))
    except (TypeError, ValueError) as error:
        raise DatabaseError(f"the index's entry {key[:60]!r} is damaged: {error}") from None


def pack_meta(meta: Mapping[str, Any]) -> bytes:
    """Return ``meta`` or ``state`` with its checksum."""
    text = json.dumps(meta, separators=(",", ":")).encode()
    return b"%08x %s" % (crc32(text), text)


def unpack_meta(value: bytes | None, path: str | Path) -> dict[str, Any]:
    """Return the meta entry of a database, checked.

    Raises:
        DatabaseError: the file belongs to something else, to another version, or is damaged.
    """
    if value is None:
        raise DatabaseError(
            f"{path} is an LMDB file, but none that write_lmdb has written (it has no entry "
            "'meta'): convert_lmdb (python -m dlhelpers lmdb convert) reads "
            "many such, write_lmdb its source"
        )
    checksum, _, text = value.partition(b" ")
    try:
        if int(checksum, 16) != crc32(text):
            raise ValueError("its checksum differs")
        meta = read_meta(text)
    except ValueError as error:
        raise DatabaseError(
            f"{path}: the entry 'meta' is damaged or not written by write_lmdb ({error}): "
            "convert the source again"
        ) from None
    if meta.get("format") != FORMAT:
        raise DatabaseError(f"{path} has the format {meta.get('format')!r}, expected {FORMAT!r}")
    if meta.get("version") not in (VERSION, TURNED, FIELDS):
        raise DatabaseError(
            f"{path} has version {meta.get('version')!r} of the schema, this package reads "
            f"{VERSION} to {FIELDS}: convert the source again, or install the dlhelpers that "
            f"wrote it ({meta.get('library', 'not said')})"
        )
    return meta
