"""What does one sample of several named fields look like in a record?

A database of fields has the version 3 of :mod:`schema`; its settings hold ``fields``, a list of
[name, kind]. The image of a record is then a table and the fields, one behind the other:

    offset   0  "F", and one byte: 0 the sample was a dict, 1 a tuple, 2 a list
             2  uint16  number of fields
             4  of each field: uint32 CRC-32, uint64 bytes
                ...     fields, in order

The checksum of the record covers all of it; those of the fields tell which one is damaged. The
label, a field of kind ``json`` that is called ``label`` or ``target``, is the target of the record
and takes no bytes here. Nothing is pickled.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dlhelpers.arguments import whole_number
from dlhelpers.lmdb_io import schema
from dlhelpers.lmdb_io.arrays import pack_array, unpack_array
from dlhelpers.lmdb_io.checksums import crc32
from dlhelpers.lmdb_io.pictures import PICTURES, encode_picture
from dlhelpers.printable import one_line

__all__ = ["KINDS", "FieldEncoding", "Fields"]

KINDS = (*PICTURES, "numpy", "text", "json", "bytes")
_LABELS = ("label", "target")
_HEAD, _ENTRY = struct.Struct("<cBH"), struct.Struct("<IQ")
_CONTAINERS = (dict, tuple, list)


@dataclass(frozen=True)
class Fields:
    """Names and kinds of the fields of each sample.

    Attributes:
        kinds: (name, kind) in order.
    """

    kinds: tuple[tuple[str, str], ...]

    @classmethod
    def given(cls, fields: Any) -> Fields:
        """Return the fields that a user has named.

        Raises:
            TypeError, ValueError: they are no names with kinds.
        """
        if not isinstance(fields, Mapping):
            raise TypeError(
                'fields must name each field with its kind, such as {"image": "jpeg", "mask": '
                f'"png"}}, got {type(fields).__name__}'
            )
        if not 0 < len(fields) < 1 << 16:
            raise ValueError(f"fields must name from 1 to 65535 fields, got {len(fields)}")
        for name, kind in fields.items():
            if not isinstance(name, str) or not name:
                raise ValueError(f"the name of a field must be a text, not empty, got {name!r}")
            if not isinstance(kind, str) or kind not in KINDS:
                raise ValueError(
                    f"the kind of the field {name!r} must be one of {', '.join(KINDS)}, got "
                    f"{kind!r}"
                )
        return cls(tuple(fields.items()))

    @classmethod
    def stored(cls, meta: Mapping[str, Any], path: Any) -> Fields | None:
        """Return the fields that a meta entry tells; None where records hold one image each.

        Raises:
            DatabaseError: they are none that this package reads.
        """
        found = meta["settings"].get("fields")
        if found is None and meta["version"] != schema.FIELDS:
            return None
        try:
            if meta["version"] != schema.FIELDS:
                raise ValueError(f"version {meta['version']} of the schema has none")
            fields = cls.given(dict(found))
            if len(fields.kinds) != len(found):
                raise ValueError("a name comes twice")
        except (TypeError, ValueError) as error:
            raise schema.DatabaseError(
                f"{path}: the fields {found!r} are none that this package reads ({error}): convert "
                "the source again, or install the dlhelpers that wrote it "
                f"({meta.get('library', 'not said')})"
            ) from None
        return fields

    @property
    def names(self) -> tuple[str, ...]:
        """Names in order."""
        return tuple(name for name, _ in self.kinds)

    @property
    def label(self) -> str | None:
        """Name of the field that is the record's target; None without."""
        found = dict(self.kinds)
        return next((name for name in _LABELS if found.get(name) == "json"), None)

    def __str__(self) -> str:
        return ", ".join(f"{one_line(name)} {kind}" for name, kind in self.kinds)

    # ---- a sample and its bytes ----

    def pack(self, sample: Any, quality: int | None = None) -> tuple[Any, bytes]:
        """Return (label, image of the record); the label is None without such a field.

        Args:
            sample: a mapping or dataclass with these names, or a sequence in their order.
            quality: of JPEG and WebP.

        Raises:
            ValueError: a field is missing or cannot be stored; names it.
        """
        container, values = self._values(sample)
        label, target = self.label, None
        table, blobs = [], []
        for (name, kind), value in zip(self.kinds, values, strict=True):
            try:
                blob = _encoded(value, kind, quality)
            except Exception as error:  # images and tensors of others raise a dozen kinds
                what = str(error) if isinstance(error, ValueError) else ""
                what = what or f"{type(error).__name__}: {error}"
                raise ValueError(f"field {name!r}: {what}") from error
            checksum = crc32(blob)
            if name == label:
                target, blob = value, b""
            table.append(_ENTRY.pack(checksum, len(blob)))
            blobs.append(blob)
        head = _HEAD.pack(b"F", container, len(self.kinds))
        return target, b"".join((head, *table, *blobs))

    def unpack(self, image: memoryview) -> tuple[type, list[memoryview]]:
        """Return the kind of container, and the bytes of each field, as they are stored.

        Raises:
            ValueError: the table does not fit the bytes or these fields.
        """
        sizes = [size for _, size in self._table(image)]
        end = _HEAD.size + _ENTRY.size * len(sizes)
        found = []
        for size in sizes:
            found.append(image[end : end + size])
            end += size
        return _CONTAINERS[image[1]], found

    def damage(self, view: memoryview) -> str:
        """Return which part of a record does not fit its checksum, empty where all do."""
        try:
            _, target, image = schema.record_parts(view)
            table = self._table(image)
            _, blobs = self.unpack(image)
        except (ValueError, struct.error):
            return "its header or the table of its fields"
        found = [
            repr(name)
            for name, (checksum, _), blob in zip(self.names, table, blobs, strict=True)
            if crc32(target if name == self.label else blob) != checksum
        ]
        if found:
            return f"the field{'s' * (len(found) > 1)} {', '.join(found)}"
        return "" if schema.is_whole(view) else "its key or its header"

    def _table(self, image: memoryview) -> list[tuple[int, int]]:
        count = len(self.kinds)
        start = _HEAD.size + _ENTRY.size * count
        if len(image) < start:
            raise ValueError(f"{len(image)} bytes hold no {count} fields")
        mark, container, stored = _HEAD.unpack_from(image)
        table = [*_ENTRY.iter_unpack(image[_HEAD.size : start])]
        whole = start + sum(size for _, size in table)
        if (mark, stored, whole) != (b"F", count, len(image)) or container >= len(_CONTAINERS):
            raise ValueError("the table of the fields does not fit what is stored")
        return table

    def _values(self, sample: Any) -> tuple[int, list[Any]]:
        names = self.names
        if dataclasses.is_dataclass(sample) and not isinstance(sample, type):
            sample = {f.name: getattr(sample, f.name) for f in dataclasses.fields(sample)}
        if isinstance(sample, Mapping):
            if missing := [name for name in names if name not in sample]:
                has = ", ".join(map(repr, sample)) or "no key"
                raise ValueError(f"field {missing[0]!r} is missing, the sample has {has}")
            if extra := [key for key in sample if key not in names]:
                raise ValueError(
                    f"the sample has the key {extra[0]!r} as well: name it in fields=, or leave it "
                    "out of the sample"
                )
            return 0, [sample[name] for name in names]
        if not isinstance(sample, (tuple, list)):
            raise ValueError(
                f"a sample must be a dict with the keys {', '.join(names)}, or a tuple in this "
                f"order, got {type(sample).__name__}"
            )
        if len(sample) != len(names):
            raise ValueError(
                f"the sample has {len(sample)} values, expected were {len(names)}: "
                f"{', '.join(names)}"
            )
        own = getattr(sample, "_fields", names)  # of a named tuple
        for position, name in enumerate(own):
            if name in names and names.index(name) != position:
                raise ValueError(
                    f"field {name!r} is number {position} of the named tuple and number "
                    f"{names.index(name)} of fields=: give both in the same order"
                )
        return (2 if isinstance(sample, list) else 1), list(sample)


@dataclass(frozen=True)
class FieldEncoding:
    """How samples of fields are stored; stands in for :class:`Encoding` in a conversion.

    Attributes:
        fields: of each sample.
        quality: of JPEG (1 to 95) and WebP (1 to 100); None is 90.
    """

    fields: Fields
    quality: int | None = None
    changes = False  # samples arrive packed
    version = schema.FIELDS

    def __post_init__(self) -> None:
        if self.quality is None:
            return
        kinds = {kind for _, kind in self.fields.kinds}
        if not kinds & {"jpeg", "webp"}:
            raise ValueError(
                f"quality={self.quality} would change nothing, since no field is of the kind jpeg "
                "or webp"
            )
        most = 95 if "jpeg" in kinds else 100
        object.__setattr__(self, "quality", whole_number("quality", self.quality, 1, most))

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as JSON writes them."""
        kinds = [list(kind) for kind in self.fields.kinds]
        return {"encode": None, "resize": None, "quality": self.quality, "fields": kinds}

    def apply(self, image: Any) -> bytes:
        """Return a sample that was packed by :meth:`pack`."""
        return image

    def pack(self, sample: Any) -> tuple[Any, bytes]:
        """Return (label, image of the record), see :meth:`Fields.pack`."""
        return self.fields.pack(sample, self.quality)


def decode_field(data: memoryview, kind: str) -> Any:
    """Return the value of a field that is no image.

    Raises:
        ValueError: the bytes are none of this kind.
    """
    if kind == "numpy":
        return unpack_array(data)
    if kind == "text":
        return str(data, "utf-8", "surrogatepass")
    return schema.read_target(bytes(data)) if kind == "json" else bytes(data)


def _encoded(value: Any, kind: str, quality: int | None) -> bytes:
    if value is None and kind != "json":
        raise ValueError(f"None cannot be stored as {kind}: give a value, or use the kind json")
    if kind == "numpy":
        return pack_array(value)
    if kind == "json":
        return schema.encode_target(value, "value")
    if kind == "text":
        if not isinstance(value, str):
            raise ValueError(f"expected a text, got {type(value).__name__}: {_HINTS[kind]}")
        return value.encode("utf-8", "surrogatepass")
    if kind == "bytes":
        if not isinstance(value, (bytes, bytearray, memoryview)):
            raise ValueError(f"expected bytes, got {type(value).__name__}: {_HINTS[kind]}")
        return bytes(value)
    return encode_picture(value, kind, quality if kind in ("jpeg", "webp") else None)


_HINTS = {
    "text": "give str(value), or use the kind json or bytes",
    "bytes": "use the kind text for texts, numpy for arrays, json for numbers and lists",
}
