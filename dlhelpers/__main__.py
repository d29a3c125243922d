"""``python -m dlhelpers``: the package's command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

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
    from dlhelpers.lmdb_io.command_line import add_actions

    parser = argparse.ArgumentParser(
        prog="python -m dlhelpers", description="Deep learning, measured: the command line."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    data = commands.add_parser("data", help="make photographs to try things on")
    kinds = data.add_subparsers(dest="kind", required=True, metavar="KIND")
    photos = kinds.add_parser("photos", help="an image folder of crops of real photographs")
    photos.add_argument("directory", metavar="DIR", help="the folder to create")
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

    add_actions(commands.add_parser("lmdb", help="write, convert, merge or verify a database"))

    machine = commands.add_parser("machine", help="what this machine is")
    machine.description = "Print the processor, memory, builds, devices, and what is installed."
    machine.add_argument("--roofline", action="store_true", help="measure its peaks as well")
    machine.set_defaults(run=_machine)

    commands.add_parser("report", help="run the course; its verdicts as one page")
    return parser


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
