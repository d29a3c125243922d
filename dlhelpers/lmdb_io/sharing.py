"""Which items of a source does one rank convert, and what do all ranks know of the others'?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

from dlhelpers.lmdb_io.comparing import identity_of, is_same_part
from dlhelpers.lmdb_io.identity import Trace, Whole
from dlhelpers.lmdb_io.loading import Loader
from dlhelpers.lmdb_io.shards import part
from dlhelpers.lmdb_io.sources import Source, SourceError

__all__ = ["Seen", "Share", "survey"]


class Seen(NamedTuple):
    """What a look at a source has found.

    Attributes:
        identity: of the whole source.
        listed: digests of the items of one shard; None where they need no comparison.
    """

    identity: dict[str, Any]
    listed: Trace | None


def survey(source: Source, workers: int, world: int, numbers: Sequence[int]) -> dict[int, Seen]:
    """Look once at a source that knows its length, for some of its ``world`` shards.

    Args:
        source: to look at.
        workers: processes that load what has to be.
        world: number of shards.
        numbers: of those whose items are digested.
    """
    if source.identity is not None:
        return {number: Seen(dict(source.identity), None) for number in numbers}
    whole, traces = Whole(), {number: Trace() for number in numbers}
    tasks = source.tasks()
    for number in range(world):
        trace = traces.get(number)
        for task in islice(tasks, len(part(source.count, number, world))):
            stamp = source.stamp(task)
            whole.add(stamp)
            if trace is not None:
                trace.add(stamp)
    identity = identity_of(source, whole, workers, world)
    return {number: Seen(dict(identity), traces[number]) for number in numbers}


class Share:
    """The items of one shard; all of them without one."""

    def __init__(
        self, source: Source, shard: tuple[int, int] | None, seen: Seen | None = None
    ) -> None:
        self._source, self._shard, self._seen = source, shard, seen
        self._is_listed = source.lists or seen is not None
        self._whole: Whole | None = None
        self._identity: dict[str, Any] | None = None
        self._listed: Trace | None = None  # own items, as they were looked at

    @property
    def count(self) -> int | None:
        """Number of the items; None where the source does not know its own."""
        if self._source.count is None or self._shard is None:
            return self._source.count
        return len(part(self._source.count, *self._shard))

    def tasks(self) -> Iterator[Any]:
        """Return the tasks in order, those of a part or each ``world``-th of a source without
        length."""
        tasks = self._source.tasks()
        if self._shard is None:
            return tasks
        rank, world = self._shard
        if self._source.count is None:
            return self._watched(tasks, lambda number: number % world == rank)
        own = part(self._source.count, rank, world)
        if self._is_listed:
            return self._source.part(own)
        return self._watched(tasks, own.__contains__)

    def _watched(self, tasks: Iterator[Any], is_own: Callable[[int], bool]) -> Iterator[Any]:
        """Yield own tasks; those of the other ranks are looked at as they pass."""
        self._whole = Whole()
        for number, task in enumerate(tasks):
            self._whole.add(self._source.stamp(task))
            if is_own(number):
                yield task

    def look(self, workers: int) -> None:
        """Take down the identity of a source that can be listed, before any of it is read."""
        if self._shard is None or not self._is_listed:
            return
        rank, world = self._shard
        seen = self._seen or survey(self._source, workers, world, [rank])[rank]
        self._identity, self._listed, self._seen = *seen, None  # a second look is a new one

    def was_listed_as(self, trace: Trace) -> bool:
        """Whether what was converted is what was there when the source was looked at."""
        listed = self._listed
        return listed is None or (listed.items, listed.times) == (trace.items, trace.times)

    def look_again(self, loader: Loader, trace: Trace, workers: int) -> int:
        """Take the source as it is now, where it holds what was converted.

        Args:
            loader: of the conversion.
            trace: of what was converted.
            workers: processes that read.

        Returns:
            The digest of own modification times as they are now.

        Raises:
            SourceError: it holds something else.
        """
        self.look(workers)
        listed, contents = self._listed, trace.contents.hex()
        if (
            listed is None
            or listed.items != trace.items
            or not is_same_part(loader, [*self.tasks()], trace.times, contents, workers)
        ):
            raise SourceError(
                "the source changed while it was converted, so that this shard would hold two "
                "versions of it: run this rank again once the source stays as it is"
            )
        return listed.times

    def timed(self, marks: Mapping[int, int]) -> list[tuple[int, int]]:
        """Return (modification time, mark) of the items that a shard's meta entry tells."""
        if not marks:
            return []
        found = ((self._source.stamp(t).time, n) for n, t in enumerate(self.tasks()) if n in marks)
        return [(time, marks[number]) for time, number in found]

    def identity(self) -> dict[str, Any]:
        """Return the identity of the whole source, once all tasks were taken."""
        world = self._shard[1] if self._shard else 1
        return self._identity or identity_of(self._source, self._whole, 0, world)
