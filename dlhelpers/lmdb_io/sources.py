"""Where do images come from, in which order, and how is the same source known again?

Every source gives small tasks in a fixed order; a task is loaded where there is time for it, in
this process or in a worker. The identity of an item is what must be unchanged so that a
conversion may go on behind it: size and time of a file, the bytes of an item that was handed over.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dlhelpers.lmdb_io.plain import is_plain_folder
from dlhelpers.lmdb_io.schema import encode_key

__all__ = ["Loaded", "Source", "SourceError", "open_source"]

_EXTENSIONS = (
    ".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp",
)  # fmt: skip


class SourceError(ValueError):
    """Something in the source cannot be stored; the message names it and how to go on."""


class Loaded(NamedTuple):
    """One item of a source: key, target, image (bytes or pixels), and its identity."""

    key: str
    target: Any
    image: Any
    identity: bytes


class Source:
    """Items in a fixed order.

    Attributes:
        kind: ``folder``, ``dataset`` or ``iterable``.
        count: number of items, None where it is not known beforehand.
        classes: names of the classes, None without.
        problems: (what, why) that was wrong before any image was looked at.
        ignored: files that are no images by their name.
        restarts: whether :meth:`tasks` can be called twice.
        hides: whether an item's identity says nothing of its content.
    """

    kind: str
    count: int | None
    classes: list[str] | None = None
    problems: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    restarts = True
    hides = False

    def tasks(self) -> Iterator[Any]:
        """Yield one picklable task for each item, in order."""
        raise NotImplementedError

    def load(self, task: Any) -> Loaded:
        """Read the item of a task; runs in workers."""
        raise NotImplementedError

    def name(self, task: Any) -> str:
        """Return what a message calls the item."""
        raise NotImplementedError

    def identity(self, task: Any) -> bytes:
        """Return the identity, also of an item that cannot be loaded."""
        raise NotImplementedError


def open_source(source: Any) -> Source:
    """Return the items of an image folder, a map-style dataset or an iterable of triples.

    Raises:
        TypeError: it is none of them.
        FileNotFoundError, NotADirectoryError: there is no such folder.
    """
    if isinstance(source, (str, os.PathLike)):
        return _Folder.scan(Path(source).expanduser())
    if is_plain_folder(source):
        return _Folder.of_image_folder(source)  # its files, instead of what it decodes of them
    if isinstance(source, (list, tuple)):
        return _Triples(source)
    if not isinstance(source, (bytes, bytearray, Mapping)):
        if hasattr(source, "__getitem__") and hasattr(source, "__len__"):
            return _Dataset(source)
        if isinstance(source, Iterable):
            return _Triples(source)
    raise TypeError(
        "source must be an image folder, a map-style dataset of (image, target), or an iterable "
        f"of (key, bytes, target), got {type(source).__name__}"
    )


class _Folder(Source):
    kind = "folder"

    def __init__(
        self, samples: Sequence[tuple[str, str, int]], classes: list[str], **facts: Any
    ) -> None:
        self._samples = samples  # (path, key, target)
        self.count, self.classes = len(samples), classes
        self.__dict__.update(facts)

    @classmethod
    def scan(cls, root: Path) -> _Folder:
        """Find the images in the order of torchvision's ImageFolder."""
        if not root.exists():
            raise FileNotFoundError(f"{root} does not exist: give a folder of class folders")
        if not root.is_dir():
            raise NotADirectoryError(
                f"{root} is a file, expected a folder with one folder of images for each class"
            )
        classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
        if not classes:
            raise SourceError(
                f"{root} holds no class folders: expected {root.name}/CLASS/IMAGE.jpg; for images "
                "without classes give an iterable of (key, bytes, target)"
            )
        samples: list[tuple[str, str, int]] = []
        problems, ignored = [], []

        def unreadable(error: OSError) -> None:
            problems.append((str(error.filename), f"cannot be listed: {error.strerror}"))

        for target, name in enumerate(classes):
            before = len(samples)
            top = os.path.join(root, name)
            found = os.walk(top, followlinks=True, onerror=unreadable)
            for folder, _, files in sorted(found):
                inside = folder[len(top) :].replace(os.sep, "/")
                for file in sorted(files):
                    key = f"{name}{inside}/{file}"
                    if file.lower().endswith(_EXTENSIONS):
                        samples.append((os.path.join(folder, file), key, target))
                    else:
                        ignored.append(key)
            if len(samples) == before:
                problems.append((f"{name}/", "the class folder holds no image"))
        loose = [e.name for e in os.scandir(root) if e.is_file()]
        return cls(
            samples,
            classes,
            problems=tuple(problems),
            ignored=tuple(sorted([*ignored, *loose])),
        )

    @classmethod
    def of_image_folder(cls, dataset: Any) -> _Folder:
        root = str(dataset.root)
        keys = (os.path.relpath(path, root).replace(os.sep, "/") for path, _ in dataset.samples)
        samples = [
            (path, key, target) for (path, target), key in zip(dataset.samples, keys, strict=True)
        ]
        return cls(samples, list(dataset.classes))

    def tasks(self) -> Iterator[Any]:
        return iter(self._samples)

    def load(self, task: Any) -> Loaded:
        path, key, target = task
        file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        try:
            stat = os.fstat(file)
            data = os.read(file, stat.st_size)
            while len(data) < stat.st_size and (more := os.read(file, stat.st_size - len(data))):
                data += more  # one read gives at most 2 GiB
        finally:
            os.close(file)
        return Loaded(key, target, data, _file_identity(key, target, stat))

    def name(self, task: Any) -> str:
        return task[1]

    def identity(self, task: Any) -> bytes:
        path, key, target = task
        try:
            return _file_identity(key, target, os.stat(path))
        except OSError:
            return b"gone"

    def __getstate__(self) -> dict[str, Any]:
        return {"_samples": ()}  # a worker gets its tasks one by one


def _file_identity(key: str, target: int, stat: os.stat_result) -> bytes:
    return f"{key}|{target}|{stat.st_size}|{stat.st_mtime_ns}".encode("utf-8", "surrogateescape")


class _Dataset(Source):
    kind = "dataset"
    hides = True

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self.count = len(dataset)
        classes = getattr(dataset, "classes", None)
        if isinstance(classes, (list, tuple)) and all(isinstance(name, str) for name in classes):
            self.classes = list(classes)

    def tasks(self) -> Iterator[Any]:
        return iter(range(self.count))

    def load(self, task: Any) -> Loaded:
        item = self._dataset[task]
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise ValueError(f"a dataset must give (image, target), got {_shown(item)}")
        return Loaded(str(task), item[1], item[0], self.identity(task))

    def name(self, task: Any) -> str:
        return f"item {task}"

    def identity(self, task: Any) -> bytes:
        return b"%d" % task


class _Triples(Source):
    kind = "iterable"

    def __init__(self, items: Iterable[Any]) -> None:
        self._items = items
        self.count = len(items) if hasattr(items, "__len__") else None
        self.restarts = not isinstance(items, Iterator)

    def tasks(self) -> Iterator[Any]:
        return zip(itertools.count(), self._items, strict=False)

    def load(self, task: Any) -> Loaded:
        _, item = task
        if not isinstance(item, (tuple, list)) or len(item) != 3:
            raise ValueError(f"an item must be (key, bytes, target), got {_shown(item)}")
        key, image, target = item
        encode_key(key)
        return Loaded(key, target, image, _content_identity(key, image, target))

    def name(self, task: Any) -> str:
        number, item = task
        is_triple = isinstance(item, (tuple, list)) and len(item) == 3
        return f"item {number}" + (f", key {item[0]!r}" if is_triple else "")

    def identity(self, task: Any) -> bytes:
        try:
            return self.load(task).identity
        except ValueError:
            return b"no item"

    def __getstate__(self) -> dict[str, Any]:
        return {"_items": ()}


def _content_identity(key: str, image: Any, target: Any) -> bytes:
    import zlib

    if hasattr(image, "detach"):  # a tensor
        image = image.detach().cpu().numpy()
    # pixels of an array or PIL image; what is neither will be refused
    content = image.tobytes() if hasattr(image, "tobytes") else image
    if not isinstance(content, (bytes, bytearray, memoryview)):
        content = type(content).__name__.encode()
    return f"{key!r}|{zlib.crc32(content)}|{target!r}".encode()


def _shown(item: Any) -> str:
    inner = f" of {len(item)}" if hasattr(item, "__len__") else ""
    return f"{type(item).__name__}{inner}: {str(item)[:60]}"
