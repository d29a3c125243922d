"""``python -m dlhelpers report``: the ledger as a page.

Exit status: 0 done; 1 a notebook did not run to its end; 2 a file could not be read or written;
130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dlhelpers.course import ledger as ledgers
from dlhelpers.course.report.cells import Cell, cells_of_claims
from dlhelpers.course.report.document import machine_line
from dlhelpers.course.report.machines import compare, differences
from dlhelpers.course.report.page import render
from dlhelpers.course.report.running import NotebookRun, run_notebooks
from dlhelpers.files import write_whole

__all__ = ["main"]

_SHOWN = 10  # differences that the terminal shows; the page has all


def main(argv: Sequence[str]) -> int:
    """Render, compare or fill a ledger; return the exit status."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.compare and (options.run or options.ledger):
        parser.error("--compare takes ledgers as they are: leave --run and --ledger out")
    if options.compare and len(options.compare) < 2:
        parser.error("--compare needs two ledgers at least")
    try:
        if options.compare:
            _compare(options)
            return 0
        return _report(options)
    except FileNotFoundError as error:
        print(f"{parser.prog}: {_missing(error)}", file=sys.stderr)
    except (OSError, ImportError, ledgers.LedgerError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("stopped; the ledger keeps what was settled by then", file=sys.stderr)
        return 130
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dlhelpers report",
        description="Render the ledger of this machine as one HTML page; with --run, fill a "
        "fresh ledger first by running the notebooks; with --compare, put machines side by side.",
    )
    parser.add_argument("--run", action="store_true", help="run the notebooks first")
    parser.add_argument(
        "--notebooks", metavar="DIR", default="notebooks", help="their folder (%(default)s)"
    )
    parser.add_argument(
        "--ledger",
        metavar="FILE",
        help="the ledger (with --run: ledger.json here; else the user's own, which the "
        "environment variable DLHELPERS_LEDGER names)",
    )
    parser.add_argument(
        "--output", metavar="FILE", default="report.html", help="the page (%(default)s)"
    )
    parser.add_argument(
        "--compare", metavar="LEDGER", nargs="+", help="two ledgers or more, side by side"
    )
    return parser


def _report(options: argparse.Namespace) -> int:
    failed: tuple[NotebookRun, ...] = ()
    if options.run:
        path = Path(options.ledger or "ledger.json")
        summary = run_notebooks(options.notebooks, ledger=path)
        print(summary)
        failed = summary.failed
    else:
        path = Path(options.ledger) if options.ledger else ledgers.default_path()
    ledger = ledgers.read(path)
    folder, cells = _links(options)
    _write(options.output, render(ledger, notebooks=folder, failed=failed, cells=cells))
    print(f"{len(ledger['rows'])} verdicts in {path}, on {machine_line(ledger)}")
    return 1 if failed else 0


def _compare(options: argparse.Namespace) -> None:
    found = [ledgers.read(path) for path in options.compare]
    folder, cells = _links(options)
    _write(options.output, compare(found, notebooks=folder, cells=cells))
    apart = differences(found)
    conditions = "condition differs" if len(apart) == 1 else "conditions differ"
    print(f"{len(apart)} {conditions} beyond both intervals{', by at least:' if apart else ''}")
    for line in apart[:_SHOWN]:
        print(f"  {line}")
    if len(apart) > _SHOWN:
        print(f"  and {len(apart) - _SHOWN} more in {options.output}")


def _links(options: argparse.Namespace) -> tuple[str, dict[str, Cell]]:
    """Return the folder of the notebooks as seen from the page, and the cells in it."""
    folder = _seen_from(Path(options.output).absolute().parent, Path(options.notebooks))
    return folder, cells_of_claims(options.notebooks)


def _seen_from(page: Path, notebooks: Path) -> str:
    try:
        return Path(os.path.relpath(notebooks.absolute(), page)).as_posix()
    except ValueError:  # another drive of Windows
        return notebooks.absolute().as_uri()


def _write(path: str, page: str) -> None:
    def write(name: str) -> None:
        Path(name).write_text(page, encoding="utf-8", errors="replace", newline="\n")

    write_whole(path, (), write)
    print(f"wrote {path}")


def _missing(error: FileNotFoundError) -> str:
    if error.filename is None:  # said by run_notebooks
        return str(error)
    return f"no file {error.filename}; `report --run` or running a notebook makes a ledger"
