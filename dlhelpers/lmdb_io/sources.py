"""Where do images come from, in which order, and how is the same source known again?

Every source gives small tasks in a fixed order; a task is loaded where there is time for it, in
this process or in a worker. The stamp of an item tells whether it is the one that was there before:
size and time of a file, the content of an item that was handed over.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from dlhelpers.lmdb_io.identity import Stamp
from dlhelpers.lmdb_io.schema import VERSION
from dlhelpers.printable import printable

__all__ = ["Forwarded", "Loaded", "Source", "SourceError"]

_FACTS = (  # of a source, which no worker needs
    "items", "kind", "count", "classes", "problems", "ignored", "restarts", "lists", "hides",
    "in_thread", "place", "notes", "root", "identity", "copies", "settings", "version", "refused",
    "paths",
)  # fmt: skip


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


class Forwarded(Source):
    """All that another source gives; those made of it change a part."""

    def __init__(self, inner: Source) -> None:
        self._inner = inner
        self.__dict__.update({n: getattr(inner, n) for n in _FACTS if hasattr(inner, n)})

    def tasks(self) -> Iterator[Any]:
        """Yield the source's own."""
        return self._inner.tasks()

    def part(self, own: range) -> Iterator[Any]:
        """Yield the source's own."""
        return self._inner.part(own)

    def load(self, task: Any) -> Loaded:
        """Return the source's own."""
        return self._inner.load(task)

    def copy(self, task: Any) -> tuple[bytes, bytes, bytes]:
        """Return the source's own."""
        return self._inner.copy(task)

    def name(self, task: Any) -> str:
        """Return the source's own."""
        return self._inner.name(task)

    def key(self, task: Any) -> str:
        """Return the source's own."""
        return self._inner.key(task)

    def stamp(self, task: Any) -> Stamp:
        """Return the source's own."""
        return self._inner.stamp(task)

    def probes(self) -> list[Any]:
        """Return the source's own."""
        return self._inner.probes()

    def content(self, task: Any) -> bytes:
        """Return the source's own."""
        return self._inner.content(task)

    def __getstate__(self) -> dict[str, Any]:
        # a worker gets its tasks one by one
        return {name: value for name, value in self.__dict__.items() if name not in _FACTS}
