"""Where do samples of several fields come from?

Of image folders and databases, however they are wrapped, the stored bytes are taken; of a database
that has the same fields its records as they are. Any other dataset gives its samples.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from dlhelpers.lmdb_io.arrays import pack_array
from dlhelpers.lmdb_io.checksums import crc32
from dlhelpers.lmdb_io.encoding import Encoding
from dlhelpers.lmdb_io.fields import FieldEncoding, Fields
from dlhelpers.lmdb_io.identity import Stamp
from dlhelpers.lmdb_io.item_sources import DatasetSource, TripleSource
from dlhelpers.lmdb_io.opening import open_source
from dlhelpers.lmdb_io.plain import is_plain_folder
from dlhelpers.lmdb_io.sources import Forwarded, Loaded, Source, SourceError
from dlhelpers.lmdb_io.wrappers import (
    RecordSource,
    inner_datasets,
    is_plain_database,
    look_through,
)

__all__ = ["open_samples"]


def open_samples(
    source: Any, fields: Any, encode: Any, resize: Any, quality: int | None
) -> tuple[Source, Encoding | FieldEncoding]:
    """Return what :func:`write_lmdb` converts, and how it is stored.

    Args:
        source, fields, encode, resize, quality: as given to :func:`write_lmdb`.

    Raises:
        TypeError, ValueError: an argument is out of range, or does not go with fields.
        SourceError: databases inside the source have other fields.
    """
    if fields is not None:
        found = Fields.given(fields)
    elif (found := _stored_fields(source)) is None:
        encoding, opened = Encoding(encode, resize, quality), open_source(source)
        if opened.settings.get("fields"):
            _refuse_changes(encode, resize)
        return opened, encoding
    _refuse_changes(encode, resize)
    return _open(source, FieldEncoding(found, quality)), FieldEncoding(found, quality)


def _refuse_changes(encode: Any, resize: Any) -> None:
    for name, value in (("encode", encode), ("resize", resize)):
        if value is not None:
            raise ValueError(
                f"{name}={value!r} does not go with fields, which may hold masks and boxes of the "
                "same image: resize all of them alike in the dataset (masks without "
                "interpolation), and name the encoding of each field in fields="
            )


def _stored_fields(source: Any) -> Fields | None:
    """Return the fields of the databases that lie inside a source."""
    inside = [data for data in inner_datasets(source) if is_plain_database(data) and data.fields]
    return Fields.given(inside[0].fields) if inside else None


def _open(source: Any, encoding: FieldEncoding) -> Source:
    def open_plain(dataset: Any) -> Source:
        if is_plain_folder(dataset):
            return _Pairs(open_source(dataset), encoding)
        return _Samples(dataset, encoding)

    def open_database(dataset: Any) -> Source:
        if dataset.fields is None:
            return _Pairs(RecordSource(dataset), encoding)
        if (stored := Fields.given(dataset.fields)) != encoding.fields:
            raise SourceError(
                f"{dataset.path} has the fields {stored}, expected were {encoding.fields}: give "
                "fields= as they are there, or read it with a transform that gives the others"
            )
        return RecordSource(dataset)

    if isinstance(source, (str, os.PathLike, Source)) or _are_paths(source):
        opened = open_source(source)
        if (stored := opened.settings.get("fields")) is None:
            return _Pairs(opened, encoding)
        if stored != encoding.as_dict()["fields"]:
            raise SourceError(
                f"the databases have the fields {stored}, expected were {encoding.fields}: leave "
                "out fields= to keep them, or read them with a transform that gives the others"
            )
        return opened
    if isinstance(source, (list, tuple)):
        return _KeyedSamples(source, encoding)
    if (found := look_through(source, open_plain, open_database)) is not None:
        return found
    if is_plain_folder(source):
        return open_plain(source)
    if not isinstance(source, (str, bytes, bytearray, Mapping)):
        if hasattr(source, "__getitem__") and hasattr(source, "__len__"):
            return _Samples(source, encoding)
        if isinstance(source, Iterable):
            return _KeyedSamples(source, encoding)
    if isinstance(source, (bytes, bytearray, Mapping)):
        raise TypeError(
            "source must be a map-style dataset of samples, or an iterable of (key, sample), got "
            f"{type(source).__name__}"
        )
    raise TypeError(f"source must be a dataset, a path or an iterable, got {type(source).__name__}")


def _are_paths(source: Any) -> bool:
    is_list = isinstance(source, (list, tuple)) and len(source) > 0
    return is_list and all(isinstance(path, (str, os.PathLike)) for path in source)


class _Samples(DatasetSource):
    """A dataset whose items are samples."""

    def __init__(self, dataset: Any, encoding: FieldEncoding) -> None:
        super().__init__(dataset)
        self._encoding = encoding

    def load(self, task: Any) -> Loaded:
        label, packed = self._encoding.pack(self._dataset[task])
        return Loaded(str(task), label, packed, self.stamp(task))


class _KeyedSamples(TripleSource):
    """An iterable of (key, sample)."""

    def __init__(self, items: Iterable[Any], encoding: FieldEncoding) -> None:
        super().__init__(items)
        self._encoding = encoding

    def load(self, task: Any) -> Loaded:
        key, sample = _pair(task[1])
        label, packed = self._encoding.pack(sample)
        return Loaded(key, label, packed, self.stamp(task))

    def name(self, task: Any) -> str:
        try:
            return f"item {task[0]}, key {_pair(task[1])[0]!r}"
        except ValueError:
            return f"item {task[0]}"

    def stamp(self, task: Any) -> Stamp:
        try:
            key, sample = _pair(task[1])
            return Stamp(repr(key).encode(), _content(sample))
        except Exception:  # whatever a tensor or a sample of others raises
            return Stamp(b"no item", -1)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_encoding": self._encoding}


def _pair(item: Any) -> tuple[str, Any]:
    if isinstance(item, (tuple, list)) and len(item) == 2 and isinstance(item[0], str):
        return item[0], item[1]
    raise ValueError(
        f"an item must be (key, sample) with a text as key, got {type(item).__name__}: number "
        "samples without keys, as in ((str(n), sample) for n, sample in enumerate(samples))"
    )


def _content(value: Any) -> int:
    """Return a CRC-32 that tells two samples apart; nothing is encoded for it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return _content([*value, *value.values()])
    if isinstance(value, (tuple, list)):
        return crc32(repr([*map(_content, value)]).encode())
    if isinstance(value, (bytes, bytearray, memoryview)):
        return crc32(value)
    if hasattr(value, "detach") or isinstance(value, (np.ndarray, np.generic)):
        return crc32(pack_array(value))
    if hasattr(value, "tobytes"):  # a PIL image
        palette = value.getpalette() if getattr(value, "mode", "") == "P" else None
        return crc32(value.tobytes(), crc32(repr((value.mode, palette)).encode()))
    known = value is None or isinstance(value, (str, int, float))
    return crc32((repr(value) if known else type(value).__name__).encode())


class _Pairs(Forwarded):
    """The images and classes of a folder or database, as samples of two fields."""

    def __init__(self, inner: Source, encoding: FieldEncoding) -> None:
        if len(encoding.fields.kinds) != 2:
            raise SourceError(
                f"the source gives (image, class), the fields are {encoding.fields}: name two, "
                'such as {"image": "image", "label": "json"}'
            )
        super().__init__(inner)
        self._encoding = encoding
        self.copies = self.in_thread = False  # they are packed anew
        self.settings, self.version = {}, Source.version

    def load(self, task: Any) -> Loaded:
        loaded = self._inner.load(task)
        label, packed = self._encoding.pack((loaded.image, loaded.target))
        return loaded._replace(target=label, image=packed)
