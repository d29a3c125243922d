"""How does a profiler of Python code say what it found? One face for all of them."""

from __future__ import annotations

import html
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dlhelpers.arguments import whole_number
from dlhelpers.tables import duration, html_table, text_table

__all__ = ["CodeReport", "Row", "Table", "Unseen", "place_of", "unseen"]

By = Literal["own", "total"]


@dataclass
class Unseen:
    """Processor time that was used meanwhile and that the profiler of one thread does not see.

    Attributes:
        threads_s: of other threads of this process, in seconds.
        processes_s: of child processes, such as a loader's workers, in seconds.
        wall_s: how long it was watched.
    """

    threads_s: float = 0.0
    processes_s: float = 0.0
    wall_s: float = 0.0

    def __str__(self) -> str:
        least = max(0.01 * self.wall_s, 0.010)
        parts = [
            f"{duration(seconds)} of processor time in {where}"
            for seconds, where in (
                (self.threads_s, "other threads"),
                (self.processes_s, "worker processes"),
            )
            if seconds >= least
        ]
        return f"Not seen: {', '.join(parts)}." if parts else ""


@contextmanager
def unseen() -> Iterator[Unseen]:
    """Measure what other threads and child processes use inside the ``with`` block.

    Processes that are alive at the end are counted on Linux only, from ``/proc``.
    """
    found = Unseen()
    before = {pid: _used_by(pid) for pid in _children()}
    ended = _ended_children()
    process, thread, wall = time.process_time(), time.thread_time(), time.perf_counter()
    try:
        yield found
    finally:
        own = time.thread_time() - thread
        found.wall_s = time.perf_counter() - wall
        found.threads_s = max(0.0, time.process_time() - process - own)
        alive = sum(_used_by(pid) - before.get(pid, 0.0) for pid in _children())
        gone = _ended_children() - ended  # with all that they used before as well
        gone -= sum(used for pid, used in before.items() if gone and not _is_alive(pid))
        found.processes_s = max(0.0, alive + gone)


def _children() -> set[int]:
    """Return the processes that this one started; of other means than multiprocessing on Linux."""
    found = {child.pid for child in multiprocessing.active_children() if child.pid}
    for task in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):  # of a thread that has just ended
            found |= set(map(int, task.read_text().split()))
    return found


def _used_by(pid: int) -> float:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0.0
    fields = text.rpartition(")")[2].split()  # the name in parentheses may hold spaces
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def _ended_children() -> float:
    times = os.times()
    return times.children_user + times.children_system


@dataclass(frozen=True)
class Row:
    """One function, or one line.

    Attributes:
        name: of the function, or the line's text.
        place: ``folder/file.py:12``, ``In[3]:2`` for a cell, or empty for what is built in.
        calls: how often; None where the profiler does not count.
        own_s: seconds in it and in nothing that it calls.
        total_s: seconds in it and in all that it calls.
    """

    name: str
    place: str
    calls: int | None
    own_s: float
    total_s: float


class Table(list[Row]):
    """Rows that print and display themselves, with their share of the time that was profiled."""

    wall_s: float = 0.0

    def _text(self) -> tuple[list[str], list[list[str]]]:
        head = ["function", "place", "calls", "own ms", "own", "total ms"]
        whole = self.wall_s or sum(row.own_s for row in self) or 1.0
        return head, [
            [
                row.name if len(row.name) <= 60 else row.name[:57] + "...",
                row.place,
                "" if row.calls is None else f"{row.calls:,}",
                f"{1000 * row.own_s:,.2f}",
                f"{row.own_s / whole:.1%}",
                f"{1000 * row.total_s:,.2f}",
            ]
            for row in self
        ]

    def __str__(self) -> str:
        return text_table(*self._text(), names=2)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(*self._text(), names=2)


@dataclass(frozen=True, repr=False)
class CodeReport:
    """What a profiler of Python code found; shows itself as a table and what it could not see.

    Attributes:
        profiler: its name.
        sees: in a sentence, whose time it tells and where it stops.
        rows: functions or lines, the longest own time first.
        wall_s: time from start to end, under the profiler.
        not_seen: processor time of others meanwhile.
    """

    profiler: str
    sees: str
    rows: tuple[Row, ...] = field(repr=False)
    wall_s: float
    not_seen: Unseen

    def table(self, top: int = 20, by: By = "own") -> Table:
        """Return the longest rows.

        Args:
            top: how many.
            by: ``own`` time, which adds up over all rows (of lines it does not: each holds what
                it calls), or ``total`` time, which never does.

        Raises:
            ValueError: another ``by``, or top below 1.
        """
        if by not in ("own", "total"):
            raise ValueError(f"by must be 'own' or 'total', got {by!r}")
        top = whole_number("top", top, 1)
        table = Table(sorted(self.rows, key=lambda row: -getattr(row, f"{by}_s"))[:top])
        table.wall_s = self.wall_s
        return table

    def find(self, part: str) -> Row | None:
        """Return the first row whose name holds ``part``, in order of own time; None without."""
        return next((row for row in self.rows if part in row.name), None)

    def __str__(self) -> str:
        lines = [f"{self.profiler}, {duration(self.wall_s)}", str(self.table(10)), self.sees]
        return "\n".join([*lines, *[str(self.not_seen)] * bool(str(self.not_seen))])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        foot = f"{self.profiler}, {duration(self.wall_s)}. {self.sees} {self.not_seen}"
        return f"{self.table(10)._repr_html_()}<p>{html.escape(foot)}</p>"


def place_of(file: str, line: int) -> str:
    """Return a short place: from the folder of packages on, else the last two parts; or a cell.

    >>> place_of("/usr/lib/python3/site-packages/torch/nn/functional.py", 7)
    'torch/nn/functional.py:7'
    >>> place_of("/home/me/course/train.py", 12)
    'course/train.py:12'
    >>> place_of("~", 0)
    ''
    """
    if not file or file == "~" or (file.startswith("<") and "ipython" not in file):
        return ""
    cell = _cell_name(file)
    if cell:
        return f"{cell}:{line}"
    name = file.replace(os.sep, "/")
    for folder in ("site-packages/", f"/python{sys.version_info[0]}.{sys.version_info[1]}/"):
        if folder in name:
            return f"{name.rpartition(folder)[2]}:{line}"
    return f"{'/'.join(name.split('/')[-2:])}:{line}"


def _cell_name(file: str) -> str:
    """Return ``In[3]`` for the file name that a notebook's kernel gives to cell 3."""
    module = sys.modules.get("IPython")
    shell = module.get_ipython() if module is not None else None
    if shell is None:
        return "cell" if "ipykernel_" in file else ""
    known = getattr(shell.compile, "format_code_name", lambda name: None)(file)
    return known[1] if known else "cell" if "ipykernel_" in file else ""
