"""How does a scan of an image folder become a listing?"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dlhelpers.arguments import whole_number
from dlhelpers.files import write_whole
from dlhelpers.lmdb_io.checksums import crc32
from dlhelpers.lmdb_io.folder_source import FolderSource, file_stamp, folder_place
from dlhelpers.lmdb_io.folders import Walk
from dlhelpers.lmdb_io.identity import Stamp, Whole
from dlhelpers.lmdb_io.listing import END, MAGIC, PLACE, ROW, is_listing
from dlhelpers.lmdb_io.opening import open_source
from dlhelpers.lmdb_io.schema import encode_key, pack_meta
from dlhelpers.lmdb_io.sources import SourceError
from dlhelpers.printable import one_line, printable
from dlhelpers.progress import bar

__all__ = ["ListingReport", "write_listing"]

_BLOCK = 1024  # images


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
    source: Any,
    path: str | os.PathLike[str],
    *,
    threads: int = 0,
    progress: bool | None = None,
) -> ListingReport:
    """Scan an image folder once, for all ranks that convert it.

    Args:
        source: a folder with one folder per class, or an ImageFolder without a transform.
        path: the listing; appears whole, or not at all. It is small, and read by every rank.
        threads: that look at files at the same time; pays where each look goes over a network.
        progress: a bar; None draws it in a terminal only.

    Raises:
        SourceError, FileNotFoundError, NotADirectoryError, TypeError: the source is none, or
            holds no images.
        ValueError: threads is out of range.
        FileExistsError: path holds something that is no listing.

    >>> write_listing("photos", "photos.listing")                          # doctest: +SKIP
    >>> write_lmdb("photos.listing", "shards", shard=(rank, world))        # doctest: +SKIP
    """
    start = time.perf_counter()
    threads = whole_number("threads", threads, 0, 1024)
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
        if type(found) is not FolderSource:
            raise TypeError(
                "source must be an image folder, or an ImageFolder that reads its files as they "
                f"are, got {type(source).__name__}"
            )
        root, images = Path(source.root).absolute(), found.items
    header: dict[str, Any] = {}

    def write(partial: str) -> None:
        with ExitStack() as held:
            file = held.enter_context(open(partial, "xb"))
            shown = held.enter_context(bar(progress=progress, desc="list", unit="img"))
            look: Any = map
            if threads:
                look = held.enter_context(ThreadPoolExecutor(threads)).map
            header.update(_write(file, root, images, found, look, shown))

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
    file: BinaryIO, root: Path, images: Iterable[Any], found: Any, look: Any, shown: Any
) -> dict[str, Any]:
    """Write a listing; ``found`` knows the classes, and after the last image the problems."""
    file.write(MAGIC)
    whole, places, count, image_bytes = Whole(), [], 0, 0
    images = iter(images)
    while block := list(islice(images, _BLOCK)):
        rows, names, end = np.empty(len(block), ROW), [], 0
        for number, (stamp, (_, key, target)) in enumerate(
            zip(look(_stamp, block), block, strict=True)
        ):
            whole.add(stamp)
            names.append(encode_key(key))
            end += len(names[-1])
            rows[number] = stamp.size, stamp.time, target, end
        data = rows.tobytes() + b"".join(names)
        places.append((file.tell(), crc32(data)))
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
        "identity": whole.identity([], folder_place(root)),
    }
    table, begin = np.array(places, PLACE).tobytes(), file.tell()
    file.write(table)
    file.write(pack_meta(header))
    file.write(END.pack(begin, begin + len(table), crc32(table), b"DLHEND"))
    file.flush()
    os.fsync(file.fileno())
    return header


def _stamp(image: tuple[str, str, int]) -> Stamp:
    path, key, target = image
    try:
        return file_stamp(key, target, os.stat(path))
    except OSError:  # a link to nothing, or removed meanwhile: it will be named when it is read
        return file_stamp(key, target, None)
