"""What lies inside a Subset, a ConcatDataset or a database, however they are nested?

Each item is read where it lies: the bytes of its file or record, its key and its class, instead of
what the wrapper would decode of it.
"""

from __future__ import annotations

import hashlib
import operator
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from dlhelpers.lmdb_io.identity import Stamp, spread
from dlhelpers.lmdb_io.plain import is_plain_folder
from dlhelpers.lmdb_io.sources import Loaded, Source, SourceError

__all__ = ["PROBES", "RecordSource", "inner_datasets", "is_plain_database", "look_through"]

PROBES = 1024  # items of a dataset that are loaded to know it again


def look_through(
    source: Any,
    open_plain: Callable[[Any], Source],
    open_database: Callable[[Any], Source] | None = None,
) -> Source | None:
    """Return the items of a database or of wrapped datasets; None where nothing would be gained.

    Args:
        source: a dataset.
        open_plain: opens what is no wrapper.
        open_database: opens a database; None for its records as they are.
    """
    open_database = open_database or RecordSource
    if is_plain_database(source):
        return open_database(source)
    if not _wrapped(source) or not any(map(_is_plain, inner_datasets(source))):
        return None
    inner: list[Any] = []
    order = _flatten(source, inner)
    opened: dict[int, Source] = {}
    for number in np.unique(order[:, 0]).tolist():
        dataset = inner[number]
        opener = open_database if is_plain_database(dataset) else open_plain
        opened[number] = opener(dataset)
    return _Selected(opened, order)


def inner_datasets(source: Any) -> list[Any]:
    """Return the datasets inside wrappers; one that is no wrapper by itself."""
    wrapped = _wrapped(source)
    if not wrapped:
        return [source]
    return [inner for dataset in wrapped for inner in inner_datasets(dataset)]


def _wrapped(source: Any) -> list[Any]:
    """Return what a wrapper of torch holds; nothing of one that reads in a way of its own."""
    torch_data = sys.modules.get("torch.utils.data")
    for kind in (torch_data.Subset, torch_data.ConcatDataset) if torch_data else ():
        if _reads_as(kind, source):
            return [source.dataset] if kind is torch_data.Subset else list(source.datasets)
    return []


def _reads_as(kind: type, source: Any) -> bool:
    """Whether it is of this class, or of one that reads items in no way of its own."""
    return isinstance(source, kind) and all(
        getattr(type(source), name, None) is getattr(kind, name, None)
        for name in ("__getitem__", "__getitems__", "__len__", "record")
    )


def _flatten(source: Any, inner: list[Any]) -> np.ndarray:
    """Return [N, 2], which dataset and which item of it each item is; appends to the datasets."""
    # what holds nothing to be read where it lies stays as it is: it may have no length
    wrapped = _wrapped(source) if any(map(_is_plain, inner_datasets(source))) else []
    if not wrapped:
        number = next((n for n, known in enumerate(inner) if known is source), len(inner))
        inner += [source] * (number == len(inner))
        items = np.arange(len(source))
        return np.stack([np.full_like(items, number), items], axis=1)
    order = np.concatenate([_flatten(dataset, inner) for dataset in wrapped])
    if not hasattr(source, "indices"):
        return order
    try:
        return order[_numbers(source.indices)]
    except IndexError as error:
        raise SourceError(f"a Subset has an index that is out of range: {error}") from None


def _numbers(indices: Any) -> np.ndarray:
    """Return the indices of a Subset, which are no mask: True would be item 1."""
    indices = indices.tolist() if hasattr(indices, "tolist") else list(indices)
    try:
        if not any(isinstance(index, (bool, np.bool_)) for index in indices):
            return np.fromiter(map(operator.index, indices), np.int64, len(indices))
    except (TypeError, OverflowError):
        pass
    found = (i for i in indices if isinstance(i, (bool, np.bool_)) or not hasattr(i, "__index__"))
    if (odd := next(found, None)) is None:
        odd = max(indices, key=abs)  # of more than 64 bits
    raise SourceError(
        f"a Subset has the index {odd!r}, expected whole numbers: of a mask give "
        "numpy.flatnonzero(mask)"
    )


def _is_plain(source: Any) -> bool:
    return is_plain_folder(source) or is_plain_database(source)


def is_plain_database(source: Any) -> bool:
    """Whether it is an LMDBDataset that gives its records without a transform."""
    module = sys.modules.get("dlhelpers.lmdb_io.dataset")
    return (
        module is not None
        and _reads_as(module.LMDBDataset, source)
        and source.transform is None
        and source.target_transform is None
    )


class RecordSource(Source):
    """The records of an LMDBDataset as they are stored; a task is an index."""

    kind = "database"

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self.count, self.classes = len(dataset), dataset.classes
        self.items = range(self.count)
        self._version = hashlib.blake2b(dataset.identity, digest_size=16).hexdigest().encode()

    def load(self, task: Any) -> Loaded:
        """Return a record as it is stored."""
        key, target, image = self._dataset.record(task)
        return Loaded(key, target, bytes(image), self.stamp(task))

    def name(self, task: Any) -> str:
        """Return "record", its index and the database."""
        return f"record {task} of {self._dataset.path}"

    def key(self, task: Any) -> str:
        """Return the key of a record."""
        return self._dataset.samples[task][0]

    def stamp(self, task: Any) -> Stamp:
        """Return the version of the database and the index."""
        return Stamp(b"%s|%d" % (self._version, task), 0)


class _Selected(Source):
    """Some items of several sources; a task is (number of the source, its task, key)."""

    def __init__(self, parts: dict[int, Source], order: np.ndarray) -> None:
        self._parts, self._order = parts, order  # [N, 2], number of the part and of its item
        self.count = len(order)
        self.hides = any(part.hides for part in parts.values())
        self.in_thread = all(part.in_thread for part in parts.values())
        kinds = {part.kind for part in parts.values()}
        self.kind = kinds.pop() if len(kinds) == 1 else "dataset"
        self.place = next((part.place for part in parts.values() if part.place), ())
        self._keys, again = self._unique_keys()
        classes = [part.classes for part in parts.values()]
        notes = [note for part in parts.values() for note in part.notes]
        if classes and all(found == classes[0] for found in classes):
            self.classes = classes[0]
        elif classes:
            notes.append(
                "no class names are stored, since the parts of the source have others; a list of "
                "the paths of databases matches their classes by name"
            )
        if again:
            what = "1 key is" if again == 1 else f"{again} keys are"
            notes.append(f"{what} taken already: an ending such as #2 tells the images apart")
        self.notes = tuple(notes)

    def tasks(self) -> Iterator[Any]:
        for position, (number, item) in enumerate(self._order):
            task = self._parts[int(number)].items[item]
            yield int(number), task, self._keys.get(position)

    def load(self, task: Any) -> Loaded:
        number, inner, key = task
        loaded = self._parts[number].load(inner)
        return loaded._replace(key=key or loaded.key, stamp=self._stamp(number, loaded.stamp, key))

    def name(self, task: Any) -> str:
        return task[2] or self._parts[task[0]].name(task[1])

    def stamp(self, task: Any) -> Stamp:
        number, inner, key = task
        return self._stamp(number, self._parts[number].stamp(inner), key)

    def probes(self) -> list[Any]:
        hidden = [task for task in self.tasks() if self._parts[task[0]].hides]
        return [hidden[number] for number in spread(len(hidden), PROBES)]

    def content(self, task: Any) -> bytes:
        return self._parts[task[0]].content(task[1])

    def _stamp(self, number: int, stamp: Stamp, key: str | None) -> Stamp:
        return stamp._replace(name=b"%d|%s|%s" % (number, stamp.name, repr(key).encode()))

    def _unique_keys(self) -> tuple[dict[int, str], int]:
        """Return keys by position, where they are not what the source says, and how many of them
        were taken."""
        if len(self._parts) == 1 and len(np.unique(self._order[:, 1])) == self.count:
            return {}, 0
        taken: set[str] = set()
        keys, again = {}, 0
        for position, (number, item) in enumerate(self._order):
            part = self._parts[int(number)]
            # an item without a name is called by its number in all of the source
            own = str(position) if part.hides else part.key(part.items[item])
            key, copies = own, 1
            while key in taken:
                copies += 1
                key = f"{own}#{copies}"
            taken.add(key)
            again += copies > 1
            if copies > 1 or part.hides:
                keys[position] = key
        return keys, again

    def __getstate__(self) -> dict[str, Any]:
        return {"_parts": self._parts}  # a worker gets its tasks one by one
