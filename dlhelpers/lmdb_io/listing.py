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
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dlhelpers.files import write_whole
from dlhelpers.lmdb_io.folders import Walk
from dlhelpers.lmdb_io.identity import Stamp, Whole
from dlhelpers.lmdb_io.schema import decode_key, encode_key, pack_meta
from dlhelpers.lmdb_io.sources import Loaded, SourceError, _file_stamp, _Folder, _place, open_source
from dlhelpers.printable import one_line, printable
from dlhelpers.progress import bar

__all__ = ["Listing", "ListingReport", "is_listing", "write_listing"]

_KIND = b"dlhelpers-listing "
_MAGIC = _KIND + b"1\n"
_BLOCK = 1024
_ROW = np.dtype([("size", "<i8"), ("time", "<i8"), ("target", "<u4"), ("end", "<u4")])
_PLACE = np.dtype([("begin", "<u8"), ("crc", "<u4")])
_END = struct.Struct("<QQI6s")


@dataclass(frozen=True)
class ListingReport:
    """What a scan found.

    Attributes:
        path: the listing.
        count: images.
        classes: their class folders.
        image_bytes: what the images take.
        problems: (what, why) that is wrong before any image is read.
        ignored: number of files that are no images by their name.
        seconds: that the scan took.
    """

    path: Path
    count: int
    classes: int
    image_bytes: int
    problems: tuple[tuple[str, str], ...]
    ignored: int
    seconds: float

    def __str__(self) -> str:
        lines = [
            f"{self.count} image{'s' * (self.count != 1)} of {self.classes} "
            f"class{'es' * (self.classes != 1)}, {self.image_bytes / 1e6:.1f} MB, listed in "
            f"{one_line(str(self.path))} ({self.seconds:.1f} s)"
        ]
        if self.ignored:
            one = self.ignored == 1
            lines.append(
                f"{self.ignored} {'file is no image' if one else 'files are no images'} by name"
            )
        lines += [f"{one_line(what)}: {one_line(why)}" for what, why in self.problems[:20]]
        return printable("\n".join(lines))


def write_listing(
    source: Any, path: str | os.PathLike[str], *, progress: bool | None = None
) -> ListingReport:
    """Scan an image folder once, for all ranks that convert it.

    Args:
        source: a folder with one folder per class, or an ImageFolder without a transform.
        path: the listing; appears whole, or not at all. It is small, and read by every rank.
        progress: a bar; None draws it in a terminal only.

    Raises:
        SourceError, FileNotFoundError, NotADirectoryError, TypeError: the source is none, or
            holds no images.
        FileExistsError: path holds something that is no listing.

    >>> write_listing("photos", "photos.listing")                          # doctest: +SKIP
    >>> write_lmdb("photos.listing", "photos", shard=(rank, world))        # doctest: +SKIP
    """
    start = time.perf_counter()
    path = Path(path).expanduser()
    if path.exists() and not is_listing(path):
        raise FileExistsError(
            printable(f"{path} exists and is no listing: remove it or give another path")
        )
    if isinstance(source, (str, os.PathLike)):
        root = Path(source).expanduser().absolute()
        found: Any = Walk(root)
        images: Iterable[tuple[str, str, int]] = found
    else:
        found = open_source(source)
        if type(found) is not _Folder:
            raise TypeError(
                "source must be an image folder, or an ImageFolder that reads its files as they "
                f"are, got {type(source).__name__}"
            )
        root, images = Path(source.root).absolute(), found.items
    header: dict[str, Any] = {}

    def write(partial: str) -> None:
        with open(partial, "xb") as file, bar(progress=progress, desc="list", unit="img") as shown:
            header.update(_write(file, root, images, found, shown))

    write_whole(path, (), write)
    return ListingReport(
        path,
        header["count"],
        len(header["classes"]),
        header["image_bytes"],
        tuple(map(tuple, header["problems"])),
        len(header["ignored"]),
        time.perf_counter() - start,
    )


def _write(
    file: BinaryIO, root: Path, images: Iterable[Any], found: Any, shown: Any
) -> dict[str, Any]:
    """Write a listing; ``found`` knows the classes, and after the last image the problems."""
    file.write(_MAGIC)
    whole, places, count, image_bytes = Whole(), [], 0, 0
    images = iter(images)
    while block := list(islice(images, _BLOCK)):
        rows, names, end = np.empty(len(block), _ROW), [], 0
        for number, (path, key, target) in enumerate(block):
            stamp = _stamp(path, key, target)
            whole.add(stamp)
            names.append(encode_key(key))
            end += len(names[-1])
            rows[number] = stamp.size, stamp.time, target, end
        data = rows.tobytes() + b"".join(names)
        places.append((file.tell(), zlib.crc32(data)))
        file.write(data)
        count += len(block)
        image_bytes += int(rows["size"].clip(min=0).sum())
        shown.update(len(block))
    if not count:
        raise SourceError(f"{root} holds no image, so that there is nothing to list")
    header = {
        "root": str(root),
        "count": count,
        "block": _BLOCK,
        "image_bytes": image_bytes,
        "classes": found.classes,
        "problems": list(found.problems),
        "ignored": sorted(found.ignored),
        "identity": whole.identity([], _place(root)),
    }
    table, begin = np.array(places, _PLACE).tobytes(), file.tell()
    file.write(table)
    file.write(pack_meta(header))
    file.write(_END.pack(begin, begin + len(table), zlib.crc32(table), b"DLHEND"))
    file.flush()
    os.fsync(file.fileno())
    return header


def _stamp(path: str, key: str, target: int) -> Stamp:
    try:
        return _file_stamp(key, target, os.stat(path))
    except OSError:  # a link to nothing, or removed meanwhile: it will be named when it is read
        return _file_stamp(key, target, None)


def is_listing(path: Path) -> bool:
    """Whether a file begins as a listing does; False where there is no such file."""
    try:
        with open(path, "rb") as file:
            return file.read(len(_KIND)) == _KIND
    except OSError:
        return False


class Listing(_Folder):
    """The images of a listing, as a source for ``write_lmdb``.

    A file that is no longer as it was listed is refused by name, or skipped: its size differs, or
    its modification time. Times are compared in the folder that was listed, wherever it is mounted,
    and not in a copy of it. All shards of one listing belong together, and so do those of another
    scan that found the same names, sizes and times.

    Args:
        path: of a file that :func:`write_listing` wrote.
        root: the image folder, where it is not at the path that was listed.

    Raises:
        SourceError: the listing is damaged, or of a later version.
        FileNotFoundError: there is no such listing, or no such root.
    """

    def __init__(
        self, path: str | os.PathLike[str], root: str | os.PathLike[str] | None = None
    ) -> None:
        self.path = Path(path).expanduser()
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
        here, listed = _place(self.root), tuple(header["identity"]["place"])
        is_at_its_path = str(self.root) == header["root"] and here[0] == listed[0]
        self._times = is_at_its_path or here[1:] == listed[1:]
        if not self._times:
            self.notes = (
                f"{one_line(str(self.root))} is not the folder that was listed: names and sizes "
                "of its files are compared with the listing, modification times are not",
            )

    def _read_header(self) -> dict[str, Any]:
        file = self._file
        begun = file.readline(64)
        if not begun.startswith(_KIND):
            raise SourceError(f"{self.path} is no listing: write one with write_listing")
        if begun != _MAGIC:
            raise SourceError(
                f"{self.path} is a listing of version {begun[len(_KIND) :].strip()[:20]!r}, this "
                "package reads version 1: list the folder again"
            )
        try:
            size = file.seek(-_END.size, os.SEEK_END)
            begin, middle, crc, end = _END.unpack(file.read(_END.size))
            if end != b"DLHEND" or not len(_MAGIC) <= begin <= middle <= size:
                raise ValueError("its end is missing")
            file.seek(begin)
            table, text = file.read(middle - begin), file.read(size - middle)
            if zlib.crc32(table) != crc:
                raise ValueError("its table's checksum differs")
            self._places, self._begin = np.frombuffer(table, _PLACE), begin
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
        if zlib.crc32(data) != crc or len(data) != end - begin:
            first = number * self._block_size
            raise self._damaged(f"the checksum of images {first} to {first + count - 1} differs")
        rows, names = np.frombuffer(data, _ROW, count), data[count * _ROW.itemsize :]
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
        return _file_stamp(key, target, None)._replace(size=size, time=modified)

    def __getstate__(self) -> dict[str, Any]:
        return {"_times": self._times}  # a worker gets its tasks one by one


def _checked(text: bytes) -> dict[str, Any]:
    crc, _, data = text.partition(b" ")
    if int(crc or b"0", 16) != zlib.crc32(data):
        raise ValueError("its header's checksum differs")
    return json.loads(data)


def _shown(modified: int) -> str:
    seconds, rest = divmod(modified, 10**9)
    try:
        text = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))
    except (OverflowError, ValueError, OSError):  # a year that no calendar has
        return f"{modified} ns"
    return f"{text}.{rest:09d} UTC"
