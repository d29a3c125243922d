"""Which entries of an old database are its samples, where are their labels, and in which order?"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dlhelpers.lmdb_io import schema
from dlhelpers.lmdb_io.identity import spread
from dlhelpers.lmdb_io.old_files import OldEnvironment
from dlhelpers.lmdb_io.old_pairs import guessed_pairs, pairs_of, twins_of
from dlhelpers.lmdb_io.old_values import FORMS, form_of, plain_target, read_plain, shown_bytes
from dlhelpers.printable import one_line

__all__ = ["Layout"]

_LIST = b"__keys__"
_COUNTS = (b"__len__", b"num-samples", b"num_samples", b"nSamples", b"total_number", b"length")
_CLASSES = (b"__classes__", b"classes", b"class_names")
_NUMBERED = re.compile(rb"\D*(\d+)\D*")
_META_LINE = re.compile(rb"\s+\([\d, ]+\)\s+\d+\s*$")  # "name.png (height,width,channels) level"
_LOOKED_AT = 16  # values that tell the form
_TO_DO = "read it with the code that wrote it, and give write_lmdb (key, image, target) triples"


class Layout:
    """Where the samples of a database stand.

    Attributes:
        keys: (key, key of the label or None) of each sample.
        databases: names of those that hold the samples and the labels.
        form: of the samples' values.
    """

    def __init__(self, environment: OldEnvironment, name: bytes | None) -> None:
        self.environment, self.path = environment, environment.path
        self.databases = (name, name)
        self.keys: list[tuple[bytes, bytes | None]] = []
        self.form, self.how = "", ""
        self.classes: list[str] | None = None
        self.has_numbers = False
        self.problems: list[tuple[str, str]] = []
        self.notes: list[str] = []

    @classmethod
    def find(cls, environment: OldEnvironment, database: str | None) -> Layout:
        """Find the samples.

        Raises:
            DatabaseError: there are none, or nobody can tell which they are.
        """
        names = environment.names()
        if {schema.RECORDS, schema.INDEX} <= set(names):
            raise schema.DatabaseError(
                f"{environment.path} was written by write_lmdb: there is nothing to convert"
            )
        layout = cls(environment, _chosen(environment, names, database))
        pair = None if database is not None else _pair_of(names)
        if pair and environment.size(None) == len(names):
            layout._of_two_databases(*pair)
        else:
            if database is None and names and layout.databases[0] is None:
                layout.notes.append(f"the named databases {_listed(names)} were not converted")
            layout._of_one_database(set(names) if layout.databases[0] is None else set())
        layout._find_form()
        return layout

    def describe(self, bgr: bool | None) -> str:
        """Return what a report says first: the kind of database, and how it was read."""
        kind = self.how or ("a database of Caffe" if self.form == "datum" else "one value per key")
        text = f"read as {kind}: {_counted(len(self.keys), 'record')}, {FORMS[self.form]}"
        if self.form == "datum":
            order = "RGB" if bgr is False else "BGR, stored as RGB"
            text += f"; pixels without encoding are taken as {order}"
        elif self.form in ("pickle", "msgpack", "npy"):
            text += f"; pixels in arrays are taken as {'BGR, stored as RGB' if bgr else 'RGB'}"
        elif self.keys and self.keys[0][1] is None:
            text += "; without labels, so that all targets are None"
        return text

    # ---- keys ----

    def _of_one_database(self, names: set[bytes]) -> None:
        name = self.databases[0]
        flags = self.environment.flags(name)
        if flags.get("dupsort"):
            raise schema.DatabaseError(
                f"{self.path} keeps several values under one key (dupsort): {_TO_DO}"
            )
        self.has_numbers = bool(flags.get("integerkey"))
        keys = [k for k in self.environment.keys(self.environment.database(name)) if k not in names]
        if not keys:
            raise schema.DatabaseError(
                f"{self.path} is an empty LMDB database: there is nothing to convert"
            )
        counts = self._take_beside(keys)
        if (listed := self.environment.get(_LIST, name)) is not None:
            self._of_list(listed, keys)
        elif pairs := pairs_of(keys) or guessed_pairs(keys):
            self._of_pairs(pairs, keys)
        elif found := self._of_meta_info():
            self.keys, self.how = found, "a database of BasicSR (meta_info.txt)"
        else:
            if twins := twins_of(keys):
                raise schema.DatabaseError(
                    f"{self.path} holds two pictures under each name ({_listed(twins)}), such as "
                    "an image and its mask: read it with the code that wrote it, and give "
                    'write_lmdb samples of fields={"image": "image", "mask": "png"}'
                )
            if all(key.isdigit() for key in keys):
                keys.sort(key=int)
            self.keys = [(key, None) for key in keys]
        self.problems += [
            (
                key.decode(),
                f"says {_counted(said, 'record')}, but there are {len(self.keys)}",
            )
            for key, said in counts.items()
            if said != len(self.keys)
        ]

    def _take_beside(self, keys: list[bytes]) -> dict[bytes, int]:
        """Remove from the keys what is no sample; return the numbers of samples that are said."""
        counts = {}
        for key in (*_COUNTS, *_CLASSES):
            value = self.environment.get(key, self.databases[0])
            try:
                found = None if value is None else plain_target(read_plain(value))
            except (ValueError, ImportError):  # a sample of that name
                continue
            if key in _COUNTS and type(found) is int:
                counts[key] = found
            elif key in _CLASSES and isinstance(found, list) and _are_texts(found):
                self.classes = found
            else:
                continue
            keys.remove(key)
        return counts

    def _of_list(self, value: bytes, keys: list[bytes]) -> None:
        if form_of(value) == "pyarrow":
            _refuse_arrow(self.path)
        try:
            listed = read_plain(value)
        except ValueError as error:
            raise schema.DatabaseError(f"{self.path}: the entry __keys__: {error}") from None
        if hasattr(listed, "tolist"):
            listed = listed.tolist()
        if isinstance(listed, dict) and all(isinstance(one, list) for one in listed.values()):
            listed = [key for one in listed.values() for key in one]  # of videos and their frames
        if not isinstance(listed, (list, tuple, dict)):
            raise schema.DatabaseError(
                f"{self.path}: __keys__ holds a {type(listed).__name__}, expected a list"
            )
        found = [_key_of(key) for key in listed]
        if odd := [key for key, made in zip(listed, found, strict=True) if made is None]:
            shown = f"{odd[0]:#x}" if isinstance(odd[0], int) else str(odd[0])
            raise schema.DatabaseError(
                f"{self.path}: __keys__ lists {shown[:60]!r}, which cannot be a key"
            )
        self.keys = [(key, None) for key in found if key is not None]
        self.how = "a database of folder2lmdb (__keys__)"
        self._note_left(set(keys) - {_LIST, *found})

    def _of_pairs(self, pairs: list[tuple[bytes, bytes]], keys: list[bytes]) -> None:
        numbers = [_NUMBERED.fullmatch(image) for image, _ in pairs]
        if all(numbers):
            pairs = sorted(pairs, key=lambda pair: int(_NUMBERED.fullmatch(pair[0])[1]))
        self.keys = list(pairs)
        there = set(keys)
        whole = next(pair for pair in pairs if there.issuperset(pair))
        self.how = f"images and labels under keys of their own ({_listed(whole)})"
        self._note_left(there - {key for pair in pairs for key in pair})
        self._note_text(whole[1])

    def _of_two_databases(self, images: bytes, labels: bytes) -> None:
        self.databases = (images, labels)
        for name in self.databases:
            flags = self.environment.flags(name)
            if flags.get("dupsort") or flags.get("integerkey"):
                raise schema.DatabaseError(
                    f"{self.path}: the database {_listed([name])} has keys of a special kind "
                    f"(dupsort, integerkey): {_TO_DO}"
                )
        keys, others = (
            [*self.environment.keys(self.environment.database(n))] for n in (images, labels)
        )
        self.keys = [(key, key) for key in keys]
        self.how = f"images and labels in databases of their own ({_listed([images, labels])})"
        if not keys:
            raise schema.DatabaseError(f"{self.path}: the database {_listed([images])} is empty")
        if alone := sorted(set(others) - set(keys)):
            self.problems.append((_listed(alone), "a label without an image"))
        self._note_text(keys[0])

    def _of_meta_info(self) -> list[tuple[bytes, bytes | None]]:
        """Return the keys that meta_info.txt lists, beside the file; none without it."""
        try:
            lines = self.path.with_name("meta_info.txt").read_bytes().splitlines()
        except OSError:
            return []
        names = [_META_LINE.sub(b"", line) for line in lines if line.strip()]
        return [(name.rpartition(b".")[0] or name, None) for name in names]

    def _note_left(self, left: set[bytes]) -> None:
        if left:
            what = "1 other entry was" if len(left) == 1 else f"{len(left)} other entries were"
            self.notes.append(f"{what} not converted: {_listed(sorted(left))}")

    def _note_text(self, key: bytes) -> None:
        value = self.environment.get(key, self.databases[1])
        if value and value[:1] != b"\x80":
            self.notes.append(
                "labels are kept as text; where they are numbers, target_transform=int reads them"
            )

    # ---- values ----

    def _find_form(self) -> None:
        if not self.keys:
            raise schema.DatabaseError(f"{self.path} lists no record: there is nothing to convert")
        values = {}
        for number in spread(len(self.keys), _LOOKED_AT):
            key = self.keys[number][0]
            if (value := self.environment.get(key, self.databases[0])) is not None:
                values[key] = value
        found = [form for value in values.values() if (form := form_of(value))]
        if "pyarrow" in found:
            _refuse_arrow(self.path)
        if not found:
            shown = "; ".join(
                f"{one_line(schema.decode_key(key[:40]))}: {shown_bytes(value)}"
                for key, value in [*values.items()][:3]
            )
            raise schema.DatabaseError(
                f"{self.path}: its values are of no form that is known "
                f"({', '.join(FORMS.values())}). Seen: {shown or 'no value at all'}. {_TO_DO}"
            )
        self.form = max(found, key=found.count)


def _refuse_arrow(path: Path) -> None:
    raise schema.DatabaseError(
        f"{path} was written with pyarrow.serialize, which pyarrow no longer has, and no other "
        "library reads: in an environment with pip install 'pyarrow<12', " + _TO_DO
    )


def _chosen(
    environment: OldEnvironment, names: Sequence[bytes], database: str | None
) -> bytes | None:
    """Return the name of the database to take; None for the main one."""
    path = environment.path
    if database is not None:
        name = schema.encode_key(database)
        if name not in names:
            raise schema.DatabaseError(
                f"{path} holds no database {database!r}, but {_listed(names) or 'no named one'}"
            )
        return name
    others = environment.size(None) - len(names)
    if others or not names or _pair_of(names):
        return None
    if len(names) == 1:
        return names[0]
    raise schema.DatabaseError(
        f"{path} holds several databases: {_listed(names)}. Say which: database= (--database NAME)"
    )


def _pair_of(names: Sequence[bytes]) -> tuple[bytes, bytes] | None:
    pairs = pairs_of(names)
    return pairs[0] if len(names) == 2 and len(pairs) == 1 else None


def _key_of(listed: Any) -> bytes | None:
    if isinstance(listed, bytes):
        return listed or None
    if isinstance(listed, int) and listed.bit_length() > 1024:  # longer than any key
        return None
    if isinstance(listed, (str, int)) and not isinstance(listed, bool):
        return schema.encode_key(str(listed)) if str(listed) else None
    return None


def _are_texts(found: list[Any]) -> bool:
    return all(isinstance(name, str) for name in found)


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _listed(names: Sequence[bytes]) -> str:
    shown = [one_line(schema.decode_key(name[:60])) for name in names[:5]]
    return ", ".join(shown) + ", ..." * (len(names) > 5)
