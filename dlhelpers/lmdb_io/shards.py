"""Do the files of a folder make one dataset?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dlhelpers.lmdb_io.identity import odd_shards
from dlhelpers.lmdb_io.schema import DatabaseError

__all__ = ["check_shards", "part", "shard_files", "shard_name"]


def part(count: int, rank: int, world: int) -> range:
    """Return the positions that one of ``world`` ranks converts: its contiguous share.

    >>> [list(part(7, rank, 3)) for rank in range(3)]
    [[0, 1], [2, 3], [4, 5, 6]]
    """
    return range(count * rank // world, count * (rank + 1) // world)


def shard_name(rank: int, world: int) -> str:
    """Return the file name of a shard.

    >>> shard_name(0, 2)
    'shard-00000-of-00002.lmdb'
    """
    return f"shard-{rank:05d}-of-{world:05d}.lmdb"


def shard_files(path: Path) -> list[Path]:
    """Return the files of a folder of shards in order, or the one file itself.

    Raises:
        DatabaseError: the folder holds no shards.
    """
    if not path.is_dir():
        return [path]
    found = sorted(path.glob("shard-*-of-*.lmdb"))
    if found:
        return found
    if (path / "data.mdb").exists():
        raise DatabaseError(
            f"{path} is a database of LMDB in a folder (data.mdb), as lmdb.open writes it without "
            f"subdir=False. If write_lmdb has written it, give {path / 'data.mdb'}; otherwise "
            "convert_lmdb (python -m dlhelpers lmdb convert) reads "
            "many such, write_lmdb its source"
        )
    if next(path.glob(".shard-*.part"), None):
        raise DatabaseError(
            f"{path} holds no finished shard yet: a conversion is under way or was interrupted; "
            "wait for it, or start every rank again with resume=True (--resume)"
        )
    raise DatabaseError(
        f"{path} is a folder without shards (shard-00000-of-00002.lmdb, ...): give a file "
        "that write_lmdb has written, or a folder that write_lmdb(..., shard=) has"
    )


def check_shards(path: Path, files: Sequence[Path], metas: Sequence[dict[str, Any]]) -> None:
    """Look whether the shards of a folder are all there and of one conversion.

    Args:
        path: the folder; a file is whole by itself.
        files: as :func:`shard_files` gives them.
        metas: their meta entries.

    Raises:
        DatabaseError: they are not; names what is missing or differs, and what to do.
    """
    if not path.is_dir():
        return
    worlds = sorted({file.stem.rpartition("-of-")[2] for file in files})
    if len(worlds) > 1:
        raise DatabaseError(
            f"{path} holds shards of conversions into different numbers of shards "
            f"({', '.join(f'shard-*-of-{world}.lmdb' for world in worlds)}): keep those of one"
        )
    for file, meta in zip(files, metas, strict=True):
        if meta["shard"] is None or file.name != shard_name(*meta["shard"]):
            rank, world = meta["shard"] or (0, 1)
            what = f"shard {rank} of {world}" if meta["shard"] else "a whole database, no shard"
            raise DatabaseError(
                f"{file} was renamed or copied, it holds {what}: give it its name back, and write "
                "the shard of this name again"
            )
    world = metas[0]["shard"][1]
    missing = sorted(set(range(world)) - {meta["shard"][0] for meta in metas})
    if missing:
        shown = ", ".join(map(str, missing[:20])) + (", ..." if len(missing) > 20 else "")
        raise DatabaseError(
            f"{path} holds {len(files)} of {world} shards, missing are the ranks [{shown}]: "
            f"wait until they have finished, or run them again: {_again(missing, world)}"
        )
    newest = max(range(world), key=lambda n: files[n].stat().st_mtime_ns)
    what, odd = odd_shards(metas, newest)
    if odd:
        names = ", ".join(files[number].name for number in odd[:5]) + ", ..." * (len(odd) > 5)
        one = len(odd) == 1
        raise DatabaseError(
            f"{path}: the shards differ in {what}: {names} {'is' if one else 'are'} of "
            f"another conversion than {files[newest].name}, the newest. Run "
            f"{'rank' if one else 'the ranks'} {', '.join(map(str, odd[:20]))} again, with the "
            f"source and settings of the newest: {_again(odd, world)}"
        )


def _again(ranks: Sequence[int], world: int) -> str:
    return f"write_lmdb(..., shard=({ranks[0]}, {world})), or --shard {ranks[0]}/{world}"
