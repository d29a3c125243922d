"""What is there to read in an image folder, and how is each of its files known again?"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dlhelpers.lmdb_io.folders import Walk
from dlhelpers.lmdb_io.identity import Stamp, place_of
from dlhelpers.lmdb_io.sources import Loaded, Source

__all__ = ["FolderSource", "file_stamp", "folder_place"]


class FolderSource(Source):
    """The files of an image folder; a task is (path, key, target)."""

    kind = "folder"
    in_thread = True

    def __init__(
        self, samples: Sequence[tuple[str, str, int]], classes: list[str], **facts: Any
    ) -> None:
        """Take samples as they are; ``facts`` are attributes of the source."""
        self.items = samples
        self.count, self.classes = len(samples), classes
        self.__dict__.update(facts)

    @classmethod
    def scan(cls, root: Path) -> FolderSource:
        """Find the images in the order of torchvision's ImageFolder."""
        walk = Walk(root)
        samples = list(walk)
        return cls(
            samples,
            walk.classes,
            place=folder_place(root),
            root=root,
            problems=tuple(walk.problems),
            ignored=tuple(sorted(walk.ignored)),
        )

    @classmethod
    def of_image_folder(cls, dataset: Any) -> FolderSource:
        """Take the samples of torchvision's ImageFolder."""
        root = str(dataset.root)
        keys = (os.path.relpath(path, root).replace(os.sep, "/") for path, _ in dataset.samples)
        samples = [
            (path, key, target) for (path, target), key in zip(dataset.samples, keys, strict=True)
        ]
        classes = [c if isinstance(c, str) else ", ".join(c) for c in dataset.classes]
        # ImageNet's classes are tuples of names
        return cls(samples, classes, place=folder_place(root), root=Path(root))

    def load(self, task: Any) -> Loaded:
        """Read the bytes of a file."""
        path, key, target = task
        file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        try:
            stat = os.fstat(file)
            data = os.read(file, stat.st_size)
            while len(data) < stat.st_size and (more := os.read(file, stat.st_size - len(data))):
                data += more  # one read gives at most 2 GiB
        finally:
            os.close(file)
        return Loaded(key, target, data, file_stamp(key, target, stat))

    def name(self, task: Any) -> str:
        """Return the path within the folder."""
        return task[1]

    key = name

    def stamp(self, task: Any) -> Stamp:
        """Return the stamp of a file as it is now."""
        path, key, target = task
        try:
            return file_stamp(key, target, os.stat(path))
        except OSError:
            return file_stamp(key, target, None)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # a worker gets its tasks one by one


def file_stamp(key: str, target: int, stat: os.stat_result | None) -> Stamp:
    """Return the stamp of an image file; ``stat`` is None where there is no such file."""
    size, time = (-1, 0) if stat is None else (stat.st_size, stat.st_mtime_ns)
    time = min(max(time, -(1 << 63)), (1 << 63) - 1)  # a listing holds 64 bits, until 2262
    return Stamp(f"{key}|{target}".encode("utf-8", "surrogateescape"), size, time)


def folder_place(root: str | Path) -> tuple[str, ...]:
    """Return where the modification times of a folder's files can be compared."""
    try:
        return place_of(os.stat(root).st_ino)
    except OSError:  # a list of files from elsewhere
        return place_of(0)[:1]
