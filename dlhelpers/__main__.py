"""``python -m dlhelpers``: the package's command line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # what a terminal cannot show is no failure
            stream.reconfigure(errors="backslashreplace")
    if arguments[:1] == ["report"]:
        from dlhelpers.course import report  # has its own parser, and its own errors

        return report.main(arguments[1:])
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except (ValueError, OSError, ImportError) as error:
        print(f"python -m dlhelpers {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        print("; ".join(["stopped", *getattr(stopped, "__notes__", ())]), file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dlhelpers", description="Deep learning, measured: the command line."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    data = commands.add_parser("data", help="make photographs to try things on")
    kinds = data.add_subparsers(dest="kind", required=True, metavar="KIND")
    photos = kinds.add_parser("photos", help="an image folder of crops of real photographs")
    photos.add_argument("directory", metavar="DIR", help="where the image folder shall lie")
    photos.add_argument("--count", type=int, default=5000, help="number of crops (%(default)s)")
    photos.add_argument("--size", type=int, default=256, help="their side in pixels (%(default)s)")
    photos.add_argument("--quality", type=int, default=90, help="of the JPEGs (%(default)s)")
    photos.add_argument("--seed", type=int, default=0, help="same seed, same bytes (%(default)s)")
    photos.set_defaults(run=_photos)

    measure = commands.add_parser("measure", help="try the comparison that all timings rest on")
    actions = measure.add_subparsers(dest="action", required=True, metavar="ACTION")
    selftest = actions.add_parser(
        "selftest", help="false outcomes, power and coverage of `compare` on this machine"
    )
    selftest.add_argument(
        "--runs", type=int, help="comparisons for each row (default: the full numbers, minutes)"
    )
    selftest.set_defaults(run=_selftest)

    _add_lmdb(commands.add_parser("lmdb", help="write, verify or describe an image database"))

    machine = commands.add_parser("machine", help="what this machine is")
    machine.description = "Print the processor, memory, builds, devices, and what is installed."
    machine.add_argument("--roofline", action="store_true", help="measure its peaks as well")
    machine.set_defaults(run=_machine)

    commands.add_parser("report", help="run the course; its verdicts as one page")
    return parser


def _add_lmdb(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    write = actions.add_parser("write", help="convert an image folder into one LMDB file")
    write.add_argument(
        "source", metavar="SRC", help="a folder with one folder for each class, or a listing of one"
    )
    write.add_argument("path", metavar="DST", help="the file; appears whole or not at all")
    write.add_argument("--encode", choices=("jpeg", "png", "webp", "raw"), help="store this format")
    write.add_argument(
        "--resize", type=_size, metavar="SIDE|HxW", help="the shorter side in pixels, or both"
    )
    write.add_argument("--quality", type=int, help="of JPEG and WebP (90)")
    write.add_argument(
        "--append", action="store_true", help="add the images to the database DST, in one step"
    )
    write.add_argument(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="write --shards N as tasks of Ray, on this machine or on the cluster at ADDRESS",
    )
    write.add_argument("--root", metavar="DIR", help="where the images of a listing are here")
    _add_writing(write)
    write.set_defaults(run=_lmdb_write)

    merge = actions.add_parser(
        "merge", help="copy databases into one, or one into another number of shards"
    )
    merge.add_argument(
        "paths",
        metavar="PATH",
        nargs="+",
        help="databases, files or folders of shards, and at last where their records go",
    )
    _add_writing(merge)
    merge.set_defaults(run=_lmdb_merge)

    listing = actions.add_parser("list", help="scan an image folder once, for all ranks of `write`")
    listing.add_argument("source", metavar="SRC", help="a folder with one folder for each class")
    listing.add_argument("path", metavar="LISTING", help="the file; appears whole or not at all")
    listing.add_argument("--quiet", action="store_true", help="show no bar")
    listing.set_defaults(run=_lmdb_list)

    verify = actions.add_parser("verify", help="compare every record with its checksum")
    verify.add_argument("path", metavar="PATH", help="a file, or a folder of shards")
    verify.add_argument("--quiet", action="store_true", help="show no bar")
    verify.set_defaults(run=_lmdb_verify)

    info = actions.add_parser("info", help="what a database holds and how it was made")
    info.add_argument("path", metavar="PATH", help="a file, or a folder of shards")
    info.set_defaults(run=_lmdb_info)


def _add_writing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, default=0, help="processes that load (%(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    parser.add_argument("--skip-errors", action="store_true", help="list what cannot be stored")
    parser.add_argument(
        "--shard",
        metavar="RANK/WORLD|torchrun",
        help="write one part into the folder DST; torchrun reads RANK and WORLD_SIZE",
    )
    parser.add_argument(
        "--shards", type=int, metavar="N", help="write N shards; with --shard each WORLD-th of them"
    )
    parser.add_argument(
        "--no-lock", action="store_true", help="for a mount without locks, and one writer alone"
    )
    parser.add_argument("--quiet", action="store_true", help="show no bar")


def _lmdb_write(options: argparse.Namespace) -> int:
    from dlhelpers import lmdb_io

    source = options.source
    if options.root is not None:
        source = lmdb_io.Listing(source, options.root)
    write = _on_ray(options) if options.ray is not None else _here(options)
    report = write(
        source,
        options.path,
        workers=options.workers,
        encode=options.encode,
        resize=options.resize,
        quality=options.quality,
        on_error="skip" if options.skip_errors else "raise",
        shards=options.shards,
        lock=not options.no_lock,
        progress=False if options.quiet else None,
    )
    print(report)
    return 0


def _here(options: argparse.Namespace) -> Callable[..., object]:
    from dlhelpers import lmdb_io

    return partial(
        lmdb_io.write_lmdb,
        resume=options.resume,
        shard=_shard(options.shard),
        append=options.append,
    )


def _on_ray(options: argparse.Namespace) -> Callable[..., object]:
    from dlhelpers.lmdb_io import on_ray

    if options.shards is None or options.shard is not None or options.append:
        raise ValueError(
            "--ray writes all shards of a folder: give their number, --shards 64, and neither "
            "--shard nor --append"
        )
    return partial(
        on_ray.write, address=options.ray or None, cpus_per_task=1 + max(options.workers, 0)
    )


def _lmdb_merge(options: argparse.Namespace) -> int:
    from dlhelpers import lmdb_io

    *sources, path = options.paths
    if not sources:
        raise ValueError(f"merge needs a database and a destination, got {path!r} alone")
    report = lmdb_io.write_lmdb(
        sources,
        path,
        workers=options.workers,
        resume=options.resume,
        on_error="skip" if options.skip_errors else "raise",
        shard=_shard(options.shard),
        shards=options.shards,
        lock=not options.no_lock,
        progress=False if options.quiet else None,
    )
    print(report)
    return 0


def _lmdb_list(options: argparse.Namespace) -> int:
    from dlhelpers import lmdb_io

    progress = False if options.quiet else None
    print(lmdb_io.write_listing(options.source, options.path, progress=progress))
    return 0


def _lmdb_verify(options: argparse.Namespace) -> int:
    from dlhelpers import lmdb_io

    print(lmdb_io.verify_lmdb(options.path, progress=False if options.quiet else None))
    return 0


def _lmdb_info(options: argparse.Namespace) -> int:
    from dlhelpers import lmdb_io

    print(lmdb_io.info_lmdb(options.path))
    return 0


def _size(text: str) -> int | tuple[int, int]:
    sides = [int(side) for side in text.lower().split("x")]
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


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
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    rank, separator, world = text.partition("/")
    if not (separator and rank.isdigit() and world.isdigit()):
        raise ValueError(f"--shard must be RANK/WORLD, such as 0/2, or torchrun, got {text!r}")
    return int(rank), int(world)


def _photos(options: argparse.Namespace) -> int:
    from dlhelpers.course import data

    root = data.photos(
        options.directory,
        count=options.count,
        size=options.size,
        quality=options.quality,
        seed=options.seed,
    )
    print(f"{options.count} photographs in {root}")
    return 0


def _selftest(options: argparse.Namespace) -> int:
    from dlhelpers.measure import selftest

    if options.runs is not None and options.runs < 1:
        raise ValueError(f"--runs must be 1 or more, got {options.runs}")
    kept = True
    print(selftest.TrialResult.HEADER, flush=True)
    for result in selftest.run(runs=options.runs):
        print(result, flush=True)
        kept &= result.kept
    return 0 if kept else 1


def _machine(options: argparse.Namespace) -> int:
    from dlhelpers import machine

    print(machine.describe())
    if options.roofline:
        from dlhelpers.roofline import roofline

        print(roofline())
    return 0


if __name__ == "__main__":
    sys.exit(main())
