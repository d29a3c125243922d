"""Which Python functions take the time? cProfile, which sees every call of one thread.

From Python 3.15 on its name is ``profiling.tracing`` (PEP 799).
"""

from __future__ import annotations

import importlib
import pstats
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dlhelpers.arguments import need_callable
from dlhelpers.files import write_whole
from dlhelpers.profiling.code_report import CodeReport, Row, place_of, unseen

if TYPE_CHECKING:
    from dlhelpers.profiling.flame import Flame

__all__ = ["PythonReport", "profile_python"]

SEES = (
    "cProfile records every call of the thread that called fn. It stops at C: a built-in such as "
    "torch.conv2d is one number, and so is all of backward; on CUDA it times launches."
)


@dataclass(frozen=True, repr=False)
class PythonReport(CodeReport):
    """What cProfile found.

    Attributes:
        stats: the same as ``pstats.Stats``.
    """

    stats: pstats.Stats = field(repr=False, compare=False)

    def flame(self, height: int = 500) -> Flame:
        """Return snakeviz's interactive view: an icicle that a click zooms into.

        Args:
            height: of its frame in a notebook, in pixels.
        """
        from dlhelpers.profiling.flame import Flame

        return Flame(self.stats, height)

    def save(self, path: str | Path) -> Path:
        """Write a ``.prof`` file that ``snakeviz`` and ``pstats`` open; whole, or not at all.

        Raises:
            ValueError: the path has another suffix.
            FileNotFoundError: there is no such folder.
        """
        return write_whole(path, (".prof",), self.stats.dump_stats)


def profile_python(fn: Callable[[], Any]) -> PythonReport:
    """Run ``fn`` once under cProfile; return what each function took.

    Raises:
        TypeError: fn cannot be called.
        RuntimeError: another profiler of Python is at work in this thread.

    An error of fn's is passed on, and the profiler is off then.

    >>> report = profile_python(lambda: sorted(range(1000), key=lambda number: -number))
    >>> report.find("sorted").calls
    1
    """
    need_callable(fn)
    profile = tracing_module().Profile()
    with unseen() as not_seen:
        begin = time.perf_counter()
        start(profile)
        try:
            fn()
        finally:
            profile.disable()
        wall = time.perf_counter() - begin
    stats = pstats.Stats(profile)
    rows = [
        Row(name, place_of(file, line), calls, own, total)
        for (file, line, name), (_, calls, own, total, _) in stats.stats.items()
        if "'disable' of '_lsprof.Profiler'" not in name
    ]
    rows.sort(key=lambda row: (-row.own_s, row.name))
    return PythonReport("cProfile", SEES, tuple(rows), wall, not_seen, stats)


def tracing_module() -> ModuleType:
    """Return ``profiling.tracing`` where Python has it, else ``cProfile``."""
    return importlib.import_module(
        "profiling.tracing" if sys.version_info >= (3, 15) else "cProfile"
    )


def start(profile: Any) -> None:
    """Switch a profile on.

    Raises:
        RuntimeError: another profiler is at work.
    """
    try:
        if sys.version_info < (3, 12) and sys.getprofile() is not None:
            raise ValueError
        profile.enable()
    except ValueError:
        raise RuntimeError(
            "another profiler of Python is at work in this thread (cProfile, %prun, a debugger): "
            "Python has room for one, so end it first"
        ) from None
