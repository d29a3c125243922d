"""Which of the shards of a source does one process write, and which are whole already?"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dlhelpers.lmdb_io import schema
from dlhelpers.lmdb_io.comparing import identity_of, is_same_part
from dlhelpers.lmdb_io.converting import Conversion
from dlhelpers.lmdb_io.environments import open_environment
from dlhelpers.lmdb_io.identity import is_same_version
from dlhelpers.lmdb_io.sharing import Seen, survey
from dlhelpers.lmdb_io.sources import Source, SourceError

__all__ = ["Totals", "own_shards", "write_shards"]


@dataclass
class Totals:
    """What the shards of one process hold together.

    Attributes:
        count, image_bytes, resumed_from: as of one shard, added up.
        skipped: (what, why) of all that was left out.
        shards: number of shards.
        whole: of these, the ones that were whole already.
    """

    count: int = 0
    image_bytes: int = 0
    resumed_from: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    shards: int = 0
    whole: int = 0

    def notes(self, world: int) -> tuple[str, ...]:
        """Return what a report says of the shards."""
        lines = [f"{self.shards} of {world} shard{'s' * (world != 1)}"]
        if self.whole:
            lines.append(f"{self.whole} of them already complete")
        return (", ".join(lines),)


def own_shards(shards: int, shard: tuple[int, int] | None) -> range:
    """Return the numbers of the shards that one of several writers writes.

    >>> list(own_shards(5, (1, 2))), list(own_shards(3, None))
    ([1, 3], [0, 1, 2])
    """
    rank, world = shard or (0, 1)
    return range(rank, shards, world)


def write_shards(
    source: Source,
    numbers: Sequence[int],
    world: int,
    begin: Callable[[tuple[int, int], Seen | None], Conversion],
    write: Callable[[Conversion], None],
    resume: bool,
) -> Totals:
    """Write shards one after the other; the source is looked at once for all of them, but for an
    iterable without a length, which is gone through for each.

    Args:
        source: of all shards.
        numbers: of the shards to write, of ``world``.
        begin: makes the conversion of (number, world) and what is known of it.
        write: runs it.
        resume: leaves those as they are that are whole and of this source and these settings.

    Raises:
        SourceError: the source is an iterator, or holds nothing.
    """
    if len(numbers) > 1 and not source.restarts:
        raise SourceError(
            f"the source is an iterator that gives its items only once, and {len(numbers)} shards "
            "are to be written from it: give a list or a dataset"
        )
    if source.count == 0:
        raise SourceError("the source holds no image that could be stored")
    totals, seen = Totals(), {}
    if numbers and (source.lists or (source.count is not None and len(numbers) > 1)):
        seen = survey(source, begin((numbers[0], world), None).workers, world, numbers)
    identity = next(iter(seen.values())).identity if seen else None
    for number in numbers:
        conversion = begin((number, world), seen.get(number))
        totals.shards += 1
        if resume and conversion.target.exists():
            if identity is None:
                identity = identity_of(source, None, conversion.workers, world)
            if _take_whole(conversion, identity, totals):
                continue
        write(conversion)
        totals.count += conversion.count
        totals.image_bytes += conversion.image_bytes
        totals.resumed_from += conversion.resumed_from
        totals.skipped += conversion.skipped
    return totals


def _take_whole(conversion: Conversion, identity: dict[str, Any], totals: Totals) -> bool:
    """Whether a shard is whole and of this conversion; adds what it holds to the totals."""
    environment = open_environment(conversion.target)
    meta = schema.unpack_meta(environment.get_entry(schema.META), conversion.target)
    mine = conversion.facts() | {"identity": identity}
    if meta["shard"] != mine["shard"] or not is_same_version(mine, meta):
        return False
    if conversion.source.place:  # equal names and sizes on another machine may hold other contents
        tasks, times, contents = [*conversion.share.tasks()], meta["times"], meta["contents"]
        if not is_same_part(conversion.loader, tasks, times, contents, conversion.workers):
            return False
    listed = [tuple(json.loads(v)) for _, v in environment.items(environment.skipped)]
    skipped = listed[: len(listed) - len(conversion.source.problems)]
    if skipped:  # what could not be stored then, such as for a fault of the network, may be now
        return False
    totals.count += meta["count"]
    totals.image_bytes += meta["image_bytes"]
    totals.resumed_from += meta["count"]
    totals.skipped += skipped
    totals.whole += 1
    return True
