"""Which lines take the time? line_profiler, which times each line of the functions it is given."""

from __future__ import annotations

import inspect
import linecache
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType
from typing import Any

from dlhelpers.arguments import need_callable
from dlhelpers.extras import need
from dlhelpers.files import write_whole
from dlhelpers.profiling.code_report import CodeReport, Row, place_of, unseen

__all__ = ["LinesReport", "profile_lines"]

SEES = (
    "line_profiler times each line of the functions that it was given, with all that the line "
    "calls: {functions}. It pays for every line that runs, so short lines look longer."
)
_NESTED = (
    " A line that calls its own function again counts once for each level, so some show "
    "more than the whole time; cProfile tells such functions right."
)


@dataclass(frozen=True, repr=False)
class LinesReport(CodeReport):
    """What line_profiler found; a line's own time holds all that it calls."""

    stats: Any = field(repr=False, compare=False)

    def save(self, path: str | Path) -> Path:
        """Write an ``.lprof`` file, which ``python -m line_profiler`` shows; whole, or not at all.

        Raises:
            ValueError: the path has another suffix.
            FileNotFoundError: there is no such folder.
        """
        return write_whole(path, (".lprof",), self.stats.to_file)


def profile_lines(fn: Callable[[], Any], *functions: Callable[..., Any]) -> LinesReport:
    """Run ``fn`` once; return what each line of some functions took.

    Args:
        fn: what to run.
        functions: whose lines are timed, methods too; by default ``fn`` and the functions of its
            own file that it names.

    Raises:
        TypeError: fn cannot be called, or a function is not written in Python.
        ImportError: line_profiler is not installed.

    An error of fn's is passed on, and the profiler is off then.
    """
    need_callable(fn)
    line_profiler = need("line_profiler", "profile_lines")
    watched = [_plain(function) for function in functions] or named_by(fn)
    profile = line_profiler.LineProfiler(*watched)
    with unseen() as not_seen:
        begin = time.perf_counter()
        profile.enable_by_count()
        try:
            fn()
        finally:
            profile.disable_by_count()
        wall = time.perf_counter() - begin
    stats = profile.get_stats()
    rows = [
        Row(
            linecache.getline(file, line).strip() or name,
            place_of(file, line),
            hits,
            ticks * stats.unit,
            ticks * stats.unit,
        )
        for (file, _, name), lines in stats.timings.items()
        for line, hits, ticks in lines
    ]
    rows.sort(key=lambda row: (-row.own_s, row.place))
    names = ", ".join(dict.fromkeys(function.__qualname__ for function in watched))
    sees = SEES.format(functions=names)
    if any(row.own_s > 1.05 * wall for row in rows):
        sees += _NESTED
    return LinesReport("line_profiler", sees, tuple(rows), wall, not_seen, stats)


def _plain(function: Any) -> FunctionType:
    """Return the function that is written in Python inside a method, a partial or a wrapper."""
    inner = inspect.unwrap(function)
    inner = getattr(inner, "func", inner)  # functools.partial
    inner = getattr(inner, "__func__", inner)  # a method
    if not isinstance(inner, FunctionType):
        inner = type(inner).__call__
    if not isinstance(inner, FunctionType):
        raise TypeError(f"{function!r} is not written in Python, so it has no lines to time")
    return inner


def named_by(fn: Callable[[], Any]) -> list[FunctionType]:
    """Return fn and the functions of its own file that its code names, and theirs in turn.

    Raises:
        TypeError: fn is not written in Python.
    """
    function = _plain(fn)
    found: list[FunctionType] = []
    todo: list[Any] = [function]
    while todo:
        one = todo.pop(0)
        if not isinstance(one, FunctionType) or one in found:
            continue
        if one.__globals__ is not function.__globals__:
            continue
        found.append(one)
        named = set(one.__code__.co_names)
        todo += [value for name, value in one.__globals__.items() if name in named]
        for cell in one.__closure__ or ():
            with suppress(ValueError):  # a name that has no value yet
                todo.append(cell.cell_contents)
    return found
