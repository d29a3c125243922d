"""How are the items of a dataset, or of an iterable of triples, read and known again?"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from dlhelpers.lmdb_io.checksums import crc32
from dlhelpers.lmdb_io.identity import Stamp, spread
from dlhelpers.lmdb_io.schema import encode_key, encode_target
from dlhelpers.lmdb_io.sources import Loaded, Source
from dlhelpers.lmdb_io.wrappers import PROBES, inner_datasets

__all__ = ["DatasetSource", "TripleSource"]


class DatasetSource(Source):
    """The items of a map-style dataset; a task is an index."""

    kind = "dataset"
    hides = True

    def __init__(self, dataset: Any) -> None:
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
