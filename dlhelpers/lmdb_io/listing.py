"""How do all ranks share one scan of an image folder?

A listing is a file that holds what a scan finds: names, sizes and modification times. Each rank
reads its own part of it, and compares a file with it when that file is converted:

    dlhelpers-listing 1\n
    blocks     of 1024 images each (the header's ``block``): their rows, then their names
    table      of each block where it begins (uint64) and its CRC-32 (uint32)
    header     CRC-32 and JSON, as in a database's meta entry: root, classes, identity, ...
    end        where the table and the header begin (uint64), CRC-32 of the table (uint32), DLHEND

A row is size (int64), modification time in ns (int64), class (uint32), and where its name ends
among the names of its block (uint32). Names are relative to the root and are bytes, as the file
system has them. Numbers are little-endian.
"""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dlhelpers.lmdb_io.checksums import crc32
from dlhelpers.lmdb_io.folder_source import FolderSource, file_stamp, folder_place
from dlhelpers.lmdb_io.identity import Stamp
from dlhelpers.lmdb_io.schema import decode_key
from dlhelpers.lmdb_io.sources import Loaded, SourceError
from dlhelpers.printable import one_line, printable

__all__ = ["END", "KIND", "MAGIC", "PLACE", "ROW", "Listing", "is_listing"]

KIND = b"dlhelpers-listing "
MAGIC = KIND + b"1\n"
ROW = np.dtype([("size", "<i8"), ("time", "<i8"), ("target", "<u4"), ("end", "<u4")])
PLACE = np.dtype([("begin", "<u8"), ("crc", "<u4")])
END = struct.Struct("<QQI6s")


def is_listing(path: Path) -> bool:
    """Whether a file begins as a listing does; False where there is no such file."""
    try:
        with open(path, "rb") as file:
            return file.read(len(KIND)) == KIND
    except OSError:
        return False


class Listing(FolderSource):
    """The images of a listing, as a source for ``write_lmdb``.

    A file that is no longer as it was listed is refused by name, or skipped: its size differs, or
    its modification time. Times are compared in the folder that was listed, wherever it is mounted,
    and not in a copy of it. All shards of one listing belong together, and so do those of another
    scan that found the same names, sizes and times.

    Args:
        path: of a file that :func:`dlhelpers.lmdb_io.write_listing` wrote.
        root: the image folder, where it is not at the path that was listed.

    Raises:
        SourceError: the listing is damaged, or of a later version.
        FileNotFoundError: there is no such listing, or no such root.
    """

    def __init__(
        self, path: str | os.PathLike[str], root: str | os.PathLike[str] | None = None
    ) -> None:
        self.path = Path(path).expanduser()
        if self.path.exists() and not is_listing(self.path):
            raise SourceError(f"{self.path} is no listing: write one with write_listing")
        self._file = open(self.path, "rb")  # noqa: SIM115  one scan, though the path is replaced
        header = self._read_header()
        self.root = Path(header["root"] if root is None else root).expanduser().absolute()
        if not self.root.is_dir():
            raise FileNotFoundError(
                printable(
                    f"{self.path} lists {header['root']}, and {self.root} is no folder here: give "
                    'the place of these images, Listing(path, root="...") or --root'
                )
            )
        self.count, self.classes = header["count"], header["classes"]
        self._block_size = header["block"]
        self.problems = tuple((what, why) for what, why in header["problems"])
        self.ignored, self.identity = tuple(header["ignored"]), header["identity"]
        here, listed = folder_place(self.root), tuple(header["identity"]["place"])
        is_at_its_path = str(self.root) == header["root"] and here[0] == listed[0]
        # the roots of mounts have the same inodes
        is_at_another = here[1:] == listed[1:] and not os.path.ismount(self.root)
        self._times = is_at_its_path or is_at_another
        if not self._times:
            self.notes = (
                f"{one_line(str(self.root))} is not the folder that was listed: names and sizes "
                "of its files are compared with the listing, modification times are not",
            )

    def _read_header(self) -> dict[str, Any]:
        file = self._file
        begun = file.readline(64)
        if begun != MAGIC:
            raise SourceError(
                f"{self.path} is a listing of version {begun[len(KIND) :].strip()[:20]!r}, this "
                "package reads version 1: list the folder again"
            )
        try:
            size = file.seek(-END.size, os.SEEK_END)
            begin, middle, crc, end = END.unpack(file.read(END.size))
            if end != b"DLHEND" or not len(MAGIC) <= begin <= middle <= size:
                raise ValueError("its end is missing")
            file.seek(begin)
            table, text = file.read(middle - begin), file.read(size - middle)
            if crc32(table) != crc:
                raise ValueError("its table's checksum differs")
            self._places, self._begin = np.frombuffer(table, PLACE), begin
            return _checked(text)
        except (ValueError, OSError) as error:
            raise self._damaged(str(error)) from None

    def _damaged(self, why: str) -> SourceError:
        return SourceError(f"{self.path} is damaged ({why}): list the folder again, or copy it")

    def tasks(self) -> Iterator[Any]:
        """Yield (path, key, target, size, time) of each image."""
        return self.part(range(self.count))

    def part(self, own: range) -> Iterator[Any]:
        """Read the blocks of these positions alone."""
        size = self._block_size
        for number in range(own.start // size, -(-own.stop // size) if own else 0):
            first = number * size
            rows = slice(max(own.start - first, 0), own.stop - first)
            yield from self._block(number, min(size, self.count - first))[rows]

    def _block(self, number: int, count: int) -> list[tuple[str, str, int, int, int]]:
        """Return (path, key, target, size, time) of the images of a block."""
        begin, crc = self._places[number].tolist()
        last = number + 1 == len(self._places)
        end = self._begin if last else int(self._places[number + 1]["begin"])
        self._file.seek(begin)
        data = self._file.read(end - begin)
        if crc32(data) != crc or len(data) != end - begin:
            first = number * self._block_size
            raise self._damaged(f"the checksum of images {first} to {first + count - 1} differs")
        rows, names = np.frombuffer(data, ROW, count), data[count * ROW.itemsize :]
        found, before = [], 0
        for size, modified, target, after in rows.tolist():
            key = decode_key(names[before:after])
            found.append((os.path.join(self.root, key), key, target, size, modified))
            before = after
        return found

    def load(self, task: Any) -> Loaded:
        """Read a file, and compare it with what was listed."""
        *item, size, modified = task
        try:
            loaded = super().load(tuple(item))
        except FileNotFoundError:
            raise ValueError("listed, but no longer there: list the folder again") from None
        now, listed = loaded.stamp, Stamp(loaded.stamp.name, size, modified)
        what = ""
        if now.size != size:
            what = f"it has {now.size} bytes, listed were {size if size >= 0 else 'none'}"
        elif self._times and now.time != modified:
            what = f"modified at {_shown(now.time)}, listed was {_shown(modified)}"
        if what:
            raise ValueError(f"changed since it was listed ({what}): list the folder again")
        return loaded._replace(stamp=listed)

    def stamp(self, task: Any) -> Stamp:
        """Return the stamp as it was listed."""
        _, key, target, size, modified = task
        return file_stamp(key, target, None)._replace(size=size, time=modified)

    def __del__(self) -> None:
        if file := getattr(self, "_file", None):
            file.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return Listing, (self.path.absolute(), self.root)  # opened again where it is used


def _checked(text: bytes) -> dict[str, Any]:
    crc, _, data = text.partition(b" ")
    if int(crc or b"0", 16) != crc32(data):
        raise ValueError("its header's checksum differs")
    return json.loads(data)


def _shown(modified: int) -> str:
    seconds, rest = divmod(modified, 10**9)
    try:
        text = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))
    except (OverflowError, ValueError, OSError):  # a year that no calendar has
        return f"{modified} ns"
    return f"{text}.{rest:09d} UTC"
