"""What did a tutorial write into its LMDB database, and in which order?

Tutorials and other programs lay their databases out in a few ways:

    folder2lmdb         a list of keys under ``__keys__``, their number under ``__len__``; each
                        value is a pickle of (image, label)
    text recognition    ``image-000000001`` and ``label-000000001``, ``num-samples``
    Caffe               each value is a Datum
    LSUN, BasicSR       each value is an image, nothing else; BasicSR lists them in meta_info.txt

All come down to two questions: which keys hold samples, with the labels beside them or elsewhere;
and in which form the values are (:mod:`dlhelpers.lmdb_io.old_values`). Nothing that is stored is
run. LMDB trusts its file, so a child process walks over it first.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

from dlhelpers.extras import need
from dlhelpers.lmdb_io import schema
from dlhelpers.lmdb_io.environments import open_environment
from dlhelpers.lmdb_io.identity import Stamp, place_of
from dlhelpers.lmdb_io.old_files import OldEnvironment, open_old_file
from dlhelpers.lmdb_io.old_layouts import Layout
from dlhelpers.lmdb_io.old_samples import sample_of
from dlhelpers.lmdb_io.old_values import form_of, plain_target, printable_text
from dlhelpers.lmdb_io.sources import Loaded, Source
from dlhelpers.lmdb_io.unpickling import unpickle
from dlhelpers.lmdb_io.writing import WriteReport, write_lmdb
from dlhelpers.printable import one_line, printable

__all__ = ["OldDatabase", "convert_lmdb", "open_old"]


def convert_lmdb(
    old: str | os.PathLike[str],
    new: str | os.PathLike[str],
    *,
    database: str | None = None,
    bgr: bool | None = None,
    **options: Any,
) -> WriteReport:
    """Convert an LMDB database that a tutorial, Caffe or another program wrote.

    Args:
        old: a file, or a folder with ``data.mdb``; is opened for reading only, without a lock.
        new: as ``path`` of write_lmdb.
        database: name of the one to take, where the file holds several.
        bgr: whether stored pixels are blue first, as OpenCV reads them; None takes those of Caffe
            so, and NumPy arrays as RGB. Encoded images are kept as they are.
        options: of write_lmdb.

    Returns:
        A WriteReport; its first note says as what kind of database it was read.

    Raises:
        DatabaseError: old is damaged, empty, written by write_lmdb already, or of no known kind.
        FileNotFoundError: there is no such file.
        ImportError: its values are msgpack, and that package is not installed.
        others: as write_lmdb.
    """
    return write_lmdb(open_old(old, database=database, bgr=bgr), new, **options)


def open_old(
    path: str | os.PathLike[str], *, database: str | None = None, bgr: bool | None = None
) -> OldDatabase:
    """Return the records of an old database as a source for write_lmdb.

    Args, errors: as :func:`convert_lmdb`.
    """
    if bgr not in (None, True, False):
        raise ValueError(f"bgr must be True, False, or None for what is usual, got {bgr!r}")
    need("lmdb", "reading an old database")
    file = _file_of(Path(path).expanduser().resolve())
    return OldDatabase(file, Layout.find(open_old_file(file), database), bgr)


class _Task(NamedTuple):
    number: int
    key: bytes
    label: bytes | None  # key of the label, where that stands by itself


class OldDatabase(Source):
    """The records of an old database, in its own order.

    Attributes:
        path: the file.
        form: that of its values, one of ``old_values.FORMS``.
    """

    kind = "old database"

    def __init__(self, path: Path, layout: Layout, bgr: bool | None) -> None:
        stat = os.stat(path)
        self.path, self.form, self._bgr = path, layout.form, bgr
        self._databases, self._has_numbers = layout.databases, layout.has_numbers
        self.items = [_Task(n, *keys) for n, keys in enumerate(layout.keys)]
        self.count, self.classes = len(self.items), layout.classes
        self.problems = tuple(layout.problems)
        self.place, self._time = place_of(stat.st_ino), stat.st_mtime_ns
        self.notes = (layout.describe(bgr), *layout.notes)
        self._environment: Any = None

    def load(self, task: Any) -> Loaded:
        """Read one sample; runs in workers."""
        value = self._get(task.key)
        if value is None:
            raise ValueError("the database has no such entry, though it is listed")
        image, target = sample_of(value, self.form, self._bgr)
        if task.label is not None:
            if target is not None:
                raise ValueError(f"its value holds a label, and {task.label[:60]!r} another")
            target = _label_of(self._get(task.label, is_label=True))
        return Loaded(self.name(task), target, image, self._stamp(task, len(value)))

    def name(self, task: Any) -> str:
        """Return the key as text."""
        if self._has_numbers:
            return str(int.from_bytes(task.key, sys.byteorder))
        return schema.decode_key(task.key)

    key = name

    def stamp(self, task: Any) -> Stamp:
        """Return key, label where it stands by itself, size of the value, and the file's time."""
        return self._stamp(task, self._opened().length(task.key, self._databases[0]))

    def _stamp(self, task: Any, size: int) -> Stamp:
        label = b"" if task.label is None else self._get(task.label, is_label=True) or b""
        return Stamp(b"%s|%s" % (task.key, label), size, self._time)

    def _get(self, key: bytes, is_label: bool = False) -> bytes | None:
        return self._opened().get(key, self._databases[is_label])

    def _opened(self) -> OldEnvironment:
        if self._environment is None or self._environment.pid != os.getpid():
            self._environment = open_environment(self.path, OldEnvironment)
        return self._environment

    def __getstate__(self) -> dict[str, Any]:
        names = ("path", "form", "_bgr", "_databases", "_has_numbers", "_time")
        return {name: getattr(self, name) for name in names} | {"_environment": None}


def _label_of(value: bytes | None) -> Any:
    if value is None:
        raise ValueError("the database has no label for it")
    if printable_text(value) is None and form_of(value) == "image":
        raise ValueError(
            "its label is an image, and an image cannot be a target: read it with the code that "
            'wrote it, and give write_lmdb samples of fields={"image": "image", "mask": "png"}'
        )
    # no text begins like a pickle of protocol 2 or later
    return plain_target(unpickle(value) if value[:1] == b"\x80" else value)


def _file_of(path: Path) -> Path:
    file = path / "data.mdb" if path.is_dir() else path
    if file.exists():
        with open(file, "rb"):  # says at once what may not be read
            return file
    if path.is_dir():
        inside = sorted(found.parent.name for found in path.glob("*/data.mdb"))[:5]
        which = f"one of {', '.join(map(one_line, inside))}" if inside else "that of a database"
        raise FileNotFoundError(
            printable(f"{path} is a folder without data.mdb: give {which}, or a file")
        )
    raise FileNotFoundError(printable(f"{path} does not exist: give an LMDB file or its folder"))
