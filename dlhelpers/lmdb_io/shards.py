"""Do the files of a folder make one dataset?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dlhelpers.lmdb_io.schema import DatabaseError

__all__ = ["check_shards", "part", "shard_files"]


def part(count: int, rank: int, world: int) -> range:
    """Return the positions that one of ``world`` ranks converts: its contiguous share.

    >>> [list(part(7, rank, 3)) for rank in range(3)]
    [[0, 1], [2, 3], [4, 5, 6]]
    """
    return range(count * rank // world, count * (rank + 1) // world)


def shard_files(path: Path) -> list[Path]:
    """Return the files of a folder of shards in order, or the one file itself.

    Raises:
        DatabaseError: the folder holds no shards.
    """
    if not path.is_dir():
        return [path]
    found = sorted(path.glob("shard-*-of-*.lmdb"))
    if not found:
        raise DatabaseError(
            f"{path} is a folder without shards (shard-00000-of-00002.lmdb, ...): give a file "
            "that write_lmdb has written, or a folder that write_lmdb(..., shard=) has"
        )
    return found


def check_shards(path: Path, metas: Sequence[dict[str, Any]]) -> None:
    """Look whether the shards of a folder are all there and of one source.

    Raises:
        DatabaseError: they are not; names what is missing or differs.
    """
    if not path.is_dir():
        return
    there = [tuple(meta["shard"] or (0, 1)) for meta in metas]
    world = there[0][1]
    missing = sorted(set(range(world)) - {rank for rank, _ in there})
    if missing or any(w != world for _, w in there) or len(there) != world:
        raise DatabaseError(
            f"{path} holds the shards {there} as (rank, world), missing are the ranks {missing}: "
            "wait until every rank has finished, or write them again"
        )
    for name in ("classes", "settings", "total"):
        if len({repr(meta[name]) for meta in metas}) > 1:
            raise DatabaseError(
                f"{path}: the shards differ in their {name}: write them from one source"
            )
