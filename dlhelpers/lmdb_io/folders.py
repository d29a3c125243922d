"""Which files of an image folder are its images, in which order?"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from dlhelpers.printable import printable

__all__ = ["Walk"]

_EXTENSIONS = (
    ".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp",
)  # fmt: skip


class Walk:
    """The images of a folder in the order of torchvision's ImageFolder, one class at a time.

    Attributes:
        classes: names of the class folders, in order of their numbers.
        problems: (what, why) that was wrong on the way so far.
        ignored: files passed so far that are no images by their name.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such folder.
        SourceError: it holds no class folders.
    """

    def __init__(self, root: Path) -> None:
        from dlhelpers.lmdb_io.sources import SourceError

        if not root.exists():
            raise FileNotFoundError(
                printable(f"{root} does not exist: give a folder of class folders")
            )
        if not root.is_dir():
            raise NotADirectoryError(
                printable(f"{root} is a file, expected a folder of class folders")
            )
        self._root = root
        self.classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
        if not self.classes:
            raise SourceError(
                f"{root} holds no class folders: expected {root.name}/CLASS/IMAGE.jpg; for images "
                "without classes give an iterable of (key, bytes, target)"
            )
        self.problems: list[tuple[str, str]] = []
        self.ignored = [entry.name for entry in os.scandir(root) if entry.is_file()]

    def __iter__(self) -> Iterator[tuple[str, str, int]]:
        """Yield (path, key, target) of each image."""
        for target, name in enumerate(self.classes):
            count = 0
            for path, key in self._images(name):
                if key.lower().endswith(_EXTENSIONS):
                    count += 1
                    yield path, key, target
                else:
                    self.ignored.append(key)
            if not count:
                self.problems.append((f"{name}/", "the class folder holds no image"))

    def _images(self, name: str) -> Iterator[tuple[str, str]]:
        def unreadable(error: OSError) -> None:
            self.problems.append((str(error.filename), f"cannot be listed: {error.strerror}"))

        top = os.path.join(self._root, name)
        for folder, _, files in sorted(os.walk(top, followlinks=True, onerror=unreadable)):
            inside = folder[len(top) :].replace(os.sep, "/")
            for file in sorted(files):
                yield f"{folder}{os.sep}{file}", f"{name}{inside}/{file}"
