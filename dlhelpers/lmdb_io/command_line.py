"""``python -m dlhelpers lmdb``: databases from the command line."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

__all__ = ["add_actions"]


def add_actions(parser: argparse.ArgumentParser) -> None:
    """Add write, convert, merge, list, verify and info to the parser of ``lmdb``."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    write = actions.add_parser("write", help="convert an image folder into a database")
    write.add_argument(
        "source", metavar="SRC", help="a folder with one folder for each class, or a listing of one"
    )
    write.add_argument("path", metavar="DST", help="the file; appears whole or not at all")
    write.add_argument(
        "--append", action="store_true", help="add the images to the database DST, in one step"
    )
    write.add_argument("--root", metavar="DIR", help="where the images of a listing are here")
    write.add_argument(
        "--ray",
        nargs="?",
        const="",
        type=_address,
        metavar="ADDRESS",
        help="write --shards N as tasks of Ray, on this machine or on the cluster at ADDRESS",
    )
    _add_encoding(write)
    _add_writing(write)
    write.set_defaults(run=_write)

    convert = actions.add_parser("convert", help="convert an LMDB database of another program")
    convert.add_argument("source", metavar="OLD", help="a file, or a folder with data.mdb")
    convert.add_argument("path", metavar="NEW", help="the file; appears whole or not at all")
    convert.add_argument("--database", metavar="NAME", help="which, where OLD holds several")
    convert.add_argument(
        "--bgr",
        action=argparse.BooleanOptionalAction,
        help="whether stored pixels are blue first (those of Caffe are, arrays are not)",
    )
    _add_encoding(convert)
    _add_writing(convert)
    convert.set_defaults(run=_convert)

    merge = actions.add_parser(
        "merge", help="copy databases into one, or one into another number of shards"
    )
    merge.add_argument(
        "paths",
        metavar="PATH",
        nargs="+",
        help="databases (files or folders of shards), then the destination, which must be new",
    )
    _add_writing(merge)
    merge.set_defaults(run=_merge)

    listing = actions.add_parser("list", help="scan an image folder once, for all ranks of `write`")
    listing.add_argument("source", metavar="SRC", help="a folder with one folder for each class")
    listing.add_argument("path", metavar="LISTING", help="the file; appears whole or not at all")
    listing.add_argument(
        "--threads",
        type=int,
        default=0,
        help="threads that read file sizes; useful on network mounts (%(default)s)",
    )
    listing.add_argument("--quiet", action="store_true", help="show no bar")
    listing.set_defaults(run=_list)

    verify = actions.add_parser("verify", help="compare every record with its checksum")
    verify.add_argument("path", metavar="PATH", help="a file, or a folder of shards")
    verify.add_argument("--quiet", action="store_true", help="show no bar")
    verify.set_defaults(run=_verify)

    info = actions.add_parser("info", help="what a database holds and how it was made")
    info.add_argument("path", metavar="PATH", help="a file, or a folder of shards")
    info.set_defaults(run=_info)


def _address(text: str) -> str:
    """Return the address of a cluster; a path would be the SRC that stands behind --ray."""
    if text and not re.fullmatch(r"auto|local|(ray://)?[^/]+:\d+", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no address such as 10.0.0.1:6379 or auto; to start Ray on this machine, "
            "write --ray after SRC and DST"
        )
    return text


def _add_encoding(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--encode", choices=("jpeg", "png", "webp", "raw"), help="store this format"
    )
    parser.add_argument(
        "--resize", type=_size, metavar="SIDE|HxW", help="the shorter side in pixels, or both"
    )
    parser.add_argument("--quality", type=int, help="of JPEG and WebP (90)")


def _add_writing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, default=0, help="processes that load (%(default)s)")
    parser.add_argument("--resume", action="store_true", help="resume an interrupted run")
    parser.add_argument("--skip-errors", action="store_true", help="list what cannot be stored")
    parser.add_argument(
        "--shard",
        metavar="RANK/WORLD|torchrun",
        help="write one part into the folder DST; torchrun reads RANK and WORLD_SIZE, under Slurm "
        "give $SLURM_PROCID/$SLURM_NTASKS",
    )
    parser.add_argument(
        "--shards",
        type=int,
        metavar="N",
        help="write N shards; with --shard every WORLD-th of them",
    )
    parser.add_argument(
        "--no-lock", action="store_true", help="for a mount without locks, and one writer alone"
    )
    parser.add_argument("--quiet", action="store_true", help="show no bar")


def _write(options: argparse.Namespace) -> int:
    from dlhelpers import lmdb_io

    source = options.source
    if options.root is not None:
        source = lmdb_io.Listing(source, options.root)
    encoding = _encoding(options)
    if options.ray is None:
        report = lmdb_io.write_lmdb(
            source, options.path, append=options.append, **encoding, **_writing(options)
        )
    else:
        report = _on_ray(source, options, encoding)
    print(report)
    return 0


def _on_ray(source: Any, options: argparse.Namespace, encoding: dict[str, Any]) -> Any:
    from dlhelpers.lmdb_io import on_ray

    if options.shards is None or options.shard is not None or options.append:
        raise ValueError(
            "--ray writes all shards of a folder: give their number, --shards 64, and neither "
            "--shard nor --append"
        )
    writing = _writing(options)
    del writing["shard"], writing["resume"]  # it writes all, and goes on by itself
    return on_ray.write(
        source,
        options.path,
        address=options.ray or None,
        cpus_per_task=1 + max(options.workers, 0),
        **encoding,
        **writing,
    )


def _convert(options: argparse.Namespace) -> int:
    from dlhelpers import lmdb_io

    report = lmdb_io.convert_lmdb(
        options.source,
        options.path,
        database=options.database,
        bgr=options.bgr,
        **_encoding(options),
        **_writing(options),
    )
    print(report)
    return 0


def _merge(options: argparse.Namespace) -> int:
    from dlhelpers import lmdb_io

    *sources, path = options.paths
    if not sources:
        raise ValueError(f"merge needs a database and a destination, got {path!r} alone")
    starts = options.shard is None and not options.resume  # neither one of several nor again
    if os.path.isfile(path) or (starts and next(Path(path).glob("shard-*-of-*.lmdb"), None)):
        raise ValueError(
            f"{path} exists, and merge would replace it: name a new destination after the "
            "databases. To add records to it: lmdb write SRC DST --append"
        )
    print(lmdb_io.write_lmdb(sources, path, **_writing(options)))
    return 0


def _encoding(options: argparse.Namespace) -> dict[str, Any]:
    return {"encode": options.encode, "resize": options.resize, "quality": options.quality}


def _writing(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "workers": options.workers,
        "resume": options.resume,
        "on_error": "skip" if options.skip_errors else "raise",
        "shard": _shard(options.shard),
        "shards": options.shards,
        "lock": not options.no_lock,
        "progress": False if options.quiet else None,
    }


def _list(options: argparse.Namespace) -> int:
    from dlhelpers import lmdb_io

    progress = False if options.quiet else None
    report = lmdb_io.write_listing(
        options.source, options.path, threads=options.threads, progress=progress
    )
    print(report)
    return 0


def _verify(options: argparse.Namespace) -> int:
    from dlhelpers import lmdb_io

    print(lmdb_io.verify_lmdb(options.path, progress=False if options.quiet else None))
    return 0


def _info(options: argparse.Namespace) -> int:
    from dlhelpers import lmdb_io

    print(lmdb_io.info_lmdb(options.path))
    return 0


def _size(text: str) -> int | tuple[int, int]:
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise argparse.ArgumentTypeError(
            f"expected SIDE or HEIGHTxWIDTH, such as 256x192, got {text!r}"
        )
    return int(sides[0]) if len(sides) == 1 else (int(sides[0]), int(sides[1]))


def _shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    if text == "torchrun":
        missing = [name for name in ("RANK", "WORLD_SIZE") if name not in os.environ]
        if missing:
            raise ValueError(
                f"--shard torchrun needs {' and '.join(missing)} in the environment: start it as "
                "torchrun --nproc-per-node 2 -m dlhelpers lmdb write SRC DST --shard torchrun"
            )
        text = f"{os.environ['RANK']}/{os.environ['WORLD_SIZE']}"
    rank, separator, world = text.partition("/")
    if not (separator and rank.isdigit() and world.isdigit()):
        raise ValueError(f"--shard must be RANK/WORLD, such as 0/2, or torchrun, got {text!r}")
    return int(rank), int(world)
