"""Where do images come from, in which order, and how is the same source known again?

Every source gives small tasks in a fixed order; a task is loaded where there is time for it, in
this process or in a worker. The stamp of an item tells whether it is the one that was there before:
size and time of a file, the content of an item that was handed over.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from dlhelpers.lmdb_io.checksums import crc32
from dlhelpers.lmdb_io.folders import Walk
from dlhelpers.lmdb_io.identity import Stamp, place_of, spread
from dlhelpers.lmdb_io.plain import is_plain_folder
from dlhelpers.lmdb_io.schema import VERSION, encode_key, encode_target
from dlhelpers.printable import printable

__all__ = [
    "PROBES",
    "DatasetSource",
    "FolderSource",
    "Loaded",
    "Source",
    "SourceError",
    "TripleSource",
    "file_stamp",
    "folder_place",
    "need_outside",
    "open_source",
]

PROBES = 1024  # items of a dataset that are loaded to know it again


class SourceError(ValueError):
    """Something in the source cannot be stored; the message names it and how to go on."""

    def __str__(self) -> str:
        return printable(super().__str__())


class Loaded(NamedTuple):
    """One item of a source: key, target, image (bytes or pixels), and its stamp."""

    key: str
    target: Any
    image: Any
    stamp: Stamp


class Source:
    """Items in a fixed order.

    Attributes:
        items: the tasks, where they are known beforehand.
        kind: ``folder``, ``database``, ``dataset`` or ``iterable``.
        count: number of items, None where it is not known beforehand.
        classes: names of the classes, None without.
        problems: (what, why) that was wrong before any image was looked at.
        ignored: files that are no images by their name.
        restarts: whether :meth:`tasks` can be called twice.
        lists: whether :meth:`stamp` needs no item to be loaded.
        hides: whether an item's stamp says nothing of its content.
        in_thread: whether items may be loaded in another thread, since no code of others does it.
        place: where modification times can be compared; empty where there are none.
        notes: what a report says of the source.
        root: of an image folder; None of all else.
        identity: of the whole source, where it is known without a look at each item.
        copies: whether :meth:`copy` gives records as they are stored.
        settings: of the conversion that its records come from, where they are copied.
        version: of the schema that records need, whatever they hold.
        refused: (what, why) of an item that is known to be left out.
        paths: of the databases that are read.
    """

    kind: str
    items: Sequence[Any]
    count: int | None
    classes: list[str] | None = None
    problems: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    restarts = True
    lists = True
    hides = False
    in_thread = False
    place: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    root: Path | None = None
    identity: Mapping[str, Any] | None = None
    copies = False
    settings: Mapping[str, Any] = MappingProxyType({})
    version = VERSION
    refused: tuple[str, str] | None = None
    paths: frozenset[Path] = frozenset()

    def tasks(self) -> Iterator[Any]:
        """Yield one picklable task for each item, in order."""
        return iter(self.items)

    def part(self, own: range) -> Iterator[Any]:
        """Yield the tasks of some positions, as :meth:`tasks` does."""
        return itertools.islice(self.tasks(), own.start, own.stop)

    def load(self, task: Any) -> Loaded:
        """Read the item of a task; runs in workers."""
        raise NotImplementedError

    def copy(self, task: Any) -> tuple[bytes, bytes, bytes]:
        """Return key, target and image as they are stored; runs in workers."""
        raise NotImplementedError

    def name(self, task: Any) -> str:
        """Return what a message calls the item."""
        raise NotImplementedError

    def key(self, task: Any) -> str:
        """Return the key that :meth:`load` would give, where it is known before."""
        raise NotImplementedError

    def stamp(self, task: Any) -> Stamp:
        """Return the stamp, also of an item that cannot be loaded."""
        raise NotImplementedError

    def probes(self) -> list[Any]:
        """Return the tasks whose :meth:`content` is looked at, none where stamps say all."""
        return []

    def content(self, task: Any) -> bytes:
        """Load an item that is known by its content alone, and return a digest; never fails."""
        raise NotImplementedError


def open_source(source: Any) -> Source:
    """Return the items of an image folder, a database, a map-style dataset or an iterable of
    triples; of wrapped datasets those inside.

    Raises:
        TypeError: it is none of them.
        FileNotFoundError, NotADirectoryError: there is no such folder.
    """
    from dlhelpers.lmdb_io.wrappers import look_through

    if isinstance(source, Source):
        return source
    if isinstance(source, (str, os.PathLike)):
        from dlhelpers.lmdb_io.listing import Listing, is_listing
        from dlhelpers.lmdb_io.merging import Databases, is_database

        path = Path(source).expanduser()
        if is_database(path):
            return Databases([path])
        return Listing(path) if is_listing(path) else FolderSource.scan(path)
    if isinstance(source, (list, tuple)):
        if source and all(isinstance(path, (str, os.PathLike)) for path in source):
            from dlhelpers.lmdb_io.merging import open_databases

            return open_databases([Path(path).expanduser() for path in source])
        return TripleSource(source)
    if (found := look_through(source, _open_dataset)) is not None:
        return found
    if not isinstance(source, (bytes, bytearray, Mapping)):
        if hasattr(source, "__getitem__") and hasattr(source, "__len__"):
            return _open_dataset(source)
        if isinstance(source, Iterable):
            return TripleSource(source)
    raise TypeError(
        "source must be an image folder, a map-style dataset of (image, target), or an iterable "
        f"of (key, bytes, target), got {type(source).__name__}"
    )


def _open_dataset(source: Any) -> Source:
    if is_plain_folder(source):
        return FolderSource.of_image_folder(source)  # its files, instead of what it decodes of them
    return DatasetSource(source)


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


def need_outside(path: Path, root: Path) -> None:
    """Raise where a folder of shards would lie in the image folder that it is made from.

    Raises:
        ValueError: it would become one of its classes.
    """
    root = root.expanduser().resolve()
    if path == root or root in path.parents:
        raise ValueError(
            printable(
                f"{path} lies in the image folder {root} and would become a class of it: give a "
                "folder outside of it"
            )
        )


def folder_place(root: str | Path) -> tuple[str, ...]:
    """Return where the modification times of a folder's files can be compared."""
    try:
        return place_of(os.stat(root).st_ino)
    except OSError:  # a list of files from elsewhere
        return place_of(0)[:1]


class DatasetSource(Source):
    """The items of a map-style dataset; a task is an index."""

    kind = "dataset"
    hides = True

    def __init__(self, dataset: Any) -> None:
        from dlhelpers.lmdb_io.wrappers import inner_datasets

        self._dataset = dataset
        self.count = len(dataset)
        self.items = range(self.count)
        found = [getattr(inner, "classes", None) for inner in inner_datasets(dataset)]
        classes = found[0] if all(other == found[0] for other in found) else None
        if isinstance(classes, (list, tuple)) and all(isinstance(name, str) for name in classes):
            self.classes = list(classes)
        if any(hasattr(inner, "samples") for inner in inner_datasets(dataset)):
            self.notes = (
                "keys are item numbers, since the dataset transforms or reads images in a way of "
                "its own",
            )

    def load(self, task: Any) -> Loaded:
        """Read an item: (image, target)."""
        item = self._dataset[task]
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise ValueError(
                f"a dataset must give (image, target), got {_shown(item)}: name the fields of "
                'other samples, as in fields={"image": "jpeg", "mask": "png"}'
            )
        return Loaded(str(task), item[1], item[0], self.stamp(task))

    def name(self, task: Any) -> str:
        """Return "item" and its index."""
        return f"item {task}"

    def stamp(self, task: Any) -> Stamp:
        """Return the index; what is there, only loading can tell."""
        return Stamp(b"%d" % task, 0)

    def probes(self) -> list[Any]:
        """Return some of the indices, evenly spread."""
        return spread(self.count, PROBES)

    def content(self, task: Any) -> bytes:
        """Return a digest of an item, or of why it cannot be loaded."""
        try:
            _, target, image, _ = self.load(task)
            return b"%d|%s" % (_checksum(image), encode_target(target))
        except Exception as error:  # the dataset's own code
            return type(error).__name__.encode()


class TripleSource(Source):
    """An iterable of (key, bytes, target); a task is (number, item)."""

    kind = "iterable"
    lists = False

    def __init__(self, items: Iterable[Any]) -> None:
        self._items = items
        self.count = len(items) if hasattr(items, "__len__") else None
        self.restarts = not isinstance(items, Iterator)

    def tasks(self) -> Iterator[Any]:
        """Yield (number, item) in order; an iterator gives them once."""
        return zip(itertools.count(), self._items, strict=False)

    def part(self, own: range) -> Iterator[Any]:
        """Yield (number, item) of some positions; of a list, no others are looked at."""
        if isinstance(self._items, (list, tuple)):
            return zip(own, self._items[own.start : own.stop], strict=True)
        return super().part(own)

    def load(self, task: Any) -> Loaded:
        """Return the item of a task, which is there already."""
        _, item = task
        if not isinstance(item, (tuple, list)) or len(item) != 3:
            raise ValueError(f"an item must be (key, bytes, target), got {_shown(item)}")
        key, image, target = item
        encode_key(key)
        return Loaded(key, target, image, Stamp(f"{key!r}|{target!r}".encode(), _checksum(image)))

    def name(self, task: Any) -> str:
        """Return the number of an item, and its key where it has one."""
        number, item = task
        is_triple = isinstance(item, (tuple, list)) and len(item) == 3
        return f"item {number}" + (f", key {item[0]!r}" if is_triple else "")

    def stamp(self, task: Any) -> Stamp:
        """Return key, target and checksum of an item."""
        try:
            return self.load(task).stamp
        except Exception:  # whatever a tensor or a target of others raises
            return Stamp(b"no item", -1)

    def __getstate__(self) -> dict[str, Any]:
        return {"_items": ()}


def _checksum(image: Any) -> int:
    """Return the CRC-32 of encoded bytes, or of the pixels of an array, tensor or PIL image."""
    if hasattr(image, "detach"):  # a tensor
        image = image.detach().cpu().numpy()
    # what is neither will be refused
    content = image.tobytes() if hasattr(image, "tobytes") else image
    if not isinstance(content, (bytes, bytearray, memoryview)):
        content = type(content).__name__.encode()
    return crc32(content)


def _shown(item: Any) -> str:
    inner = f" of {len(item)}" if hasattr(item, "__len__") else ""
    return f"{type(item).__name__}{inner}: {str(item)[:60]}"
