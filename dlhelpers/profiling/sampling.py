"""Where is the program, looked at a thousand times a second? Two samplers.

``sample`` is pyinstrument, which follows the thread that calls it. ``sample_threads`` looks at the
stacks of all threads and gives each sample to the line at which that thread is, which samplers of
the processor's clock get wrong for threads (plasma-umass/scalene#428).
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from dlhelpers.arguments import need_callable
from dlhelpers.extras import need
from dlhelpers.files import write_whole
from dlhelpers.profiling.code_report import CodeReport, Row, Unseen, place_of, unseen

__all__ = [
    "Line",
    "Look",
    "SampleReport",
    "Stack",
    "attribute",
    "is_standard",
    "sample",
    "sample_threads",
]

Line = tuple[str, int, str]  # file, line, function
Stack = Sequence[Line]  # the outermost first

_SEES = (
    "pyinstrument looks at the thread that called fn {hz:,.0f} times a second; what is shorter "
    "than its interval is seen by chance, and calls are not counted."
)
_SEES_ALL = (
    "Looks at all threads of this process {hz:,.0f} times a second, at their lines; not at other "
    "processes, and not inside C. A thread that waits in threading, queue, selectors, sockets or "
    "pipes is left out; one that waits in a lock of its own, or for Python's (the GIL), counts."
)
_STANDARD = str(Path(threading.__file__).parent) + os.sep
_WAITING = {"threading.py", "queue.py", "selectors.py", "socket.py", "connection.py"}


@dataclass(frozen=True, repr=False)
class SampleReport(CodeReport):
    """What a sampler found: each look counts for the time since the look before it.

    Attributes:
        samples: how many were taken.
    """

    samples: int
    session: Any = field(repr=False, compare=False, default=None)

    def save(self, path: str | Path) -> Path:
        """Write pyinstrument's own page (``.html``) or tree (``.txt``); whole, or not at all.

        Raises:
            ValueError: another suffix, or a report of ``sample_threads``, which has no such page.
            FileNotFoundError: there is no such folder.
        """
        if self.session is None:
            raise ValueError("sample_threads keeps a table alone: print it, or take sample(fn)")
        from pyinstrument.renderers import ConsoleRenderer, HTMLRenderer

        renderer = HTMLRenderer() if str(path).endswith(".html") else ConsoleRenderer()
        text = renderer.render(self.session)
        return write_whole(
            path, (".html", ".txt"), lambda name: Path(name).write_text(text, "utf-8")
        )


def sample(fn: Callable[[], Any], *, interval_s: float = 0.001) -> SampleReport:
    """Run ``fn`` once under pyinstrument; return the functions in which it was seen.

    Args:
        fn: what to run; some hundreds of milliseconds or more, to be seen often enough.
        interval_s: seconds between two looks.

    Raises:
        TypeError: fn cannot be called.
        ValueError: interval_s is not above 0.
        ImportError: pyinstrument is not installed.
        RuntimeError: another profiler of Python is at work in this thread already.
    """
    need_callable(fn)
    _need_interval(interval_s)
    pyinstrument = need("pyinstrument", "sample")
    if sys.getprofile() is not None:
        raise RuntimeError("another profiler of Python is at work: stop it before sample")
    profiler = pyinstrument.Profiler(interval=interval_s, async_mode="disabled")
    with unseen() as not_seen:
        begin = time.perf_counter()
        profiler.start()
        try:
            fn()
        finally:
            profiler.stop()
        wall = time.perf_counter() - begin
    session = profiler.last_session
    rows = _functions(_below_sample(session.root_frame(trim_stem=False)))
    sees = _SEES.format(hz=1 / interval_s)
    return SampleReport("pyinstrument", sees, rows, wall, not_seen, session.sample_count, session)


def sample_threads(fn: Callable[[], Any], *, interval_s: float = 0.002) -> SampleReport:
    """Run ``fn`` once; return the lines at which each thread was seen meanwhile.

    Raises:
        TypeError: fn cannot be called.
        ValueError: interval_s is not above 0.

    Cost: the interpreter changes threads more often meanwhile, a few per cent.
    """
    need_callable(fn)
    _need_interval(interval_s)
    looks, wall, not_seen = take_stacks(fn, interval_s)
    left = Unseen(0.0, not_seen.processes_s, not_seen.wall_s)
    sees = _SEES_ALL.format(hz=1 / interval_s)
    return SampleReport("all threads", sees, attribute(looks), wall, left, len(looks))


class Look(NamedTuple):
    """What one look saw.

    Attributes:
        seconds: since the look before. C that holds the GIL lets no look through until it is
            over, so the look after it counts for all of it.
        stacks: thread's name -> its stack, the outermost line first; the caller's name is empty.
    """

    seconds: float
    stacks: Mapping[str, Stack]


def take_stacks(fn: Callable[[], Any], interval_s: float) -> tuple[list[Look], float, Unseen]:
    """Run ``fn``; return all looks, the seconds that it took, and what is unseen."""
    looks: list[Look] = []
    done = threading.Event()
    caller = threading.get_ident()

    def look() -> None:
        me = threading.get_ident()
        known: dict[tuple[int | None, str], str] = {}
        last = begin
        while not done.wait(interval_s):
            now = time.perf_counter()
            names = _names(threading.enumerate(), known)
            seen = {}
            for ident, frame in sys._current_frames().items():
                if ident != me:
                    name = "" if ident == caller else names.get(ident, f"thread {ident}")
                    # what called this function is no news
                    seen[name] = _stack(frame)[base if ident == caller else 0 :]
            looks.append(Look(now - last, seen))
            last = now

    looking = threading.Thread(target=look, name="sampler", daemon=True)
    interval = sys.getswitchinterval()
    base = len(_stack(sys._getframe()))
    with unseen() as not_seen:
        begin = time.perf_counter()
        try:
            sys.setswitchinterval(min(interval, 5e-4))
            looking.start()
            fn()
        finally:
            sys.setswitchinterval(interval)
            wall = time.perf_counter() - begin
            done.set()
            if looking.ident is not None:
                looking.join()
    return looks, wall, not_seen


def attribute(looks: Sequence[Look]) -> tuple[Row, ...]:
    """Give the time of each look at each thread to lines; return them, the longest own time first.

    Own is the innermost line's; total counts a line once a look, however often it stands on the
    stack. A thread that waits is left out.
    """
    own: dict[tuple[str, Line], float] = {}
    total: dict[tuple[str, Line], float] = {}
    for seconds, stacks in looks:
        for thread, stack in stacks.items():
            if not stack or _waits(stack):
                continue
            own[thread, stack[-1]] = own.get((thread, stack[-1]), 0.0) + seconds
            for line in set(stack):
                total[thread, line] = total.get((thread, line), 0.0) + seconds
    rows = [
        Row(
            f"{function} [{thread}]" if thread else function,
            place_of(file, number),
            None,
            own.get((thread, (file, number, function)), 0.0),
            seconds,
        )
        for (thread, (file, number, function)), seconds in total.items()
    ]
    return tuple(sorted(rows, key=lambda row: (-row.own_s, -row.total_s, row.place, row.name)))


def is_standard(file: str) -> bool:
    """Whether a file is of Python's own library, not of a package that is installed."""
    return file.startswith(_STANDARD) and "site-packages" not in file


def _waits(stack: Stack) -> bool:
    file = stack[-1][0]
    return is_standard(file) and Path(file).name in _WAITING


def _names(
    threads: Sequence[threading.Thread], known: dict[tuple[int | None, str], str]
) -> dict[int | None, str]:
    """Return ident -> name; of threads with one name, those that come later get a number.

    ``known`` is kept between looks, so that a thread keeps its name when another one ends.
    """
    begun = [thread for thread in threads if thread.ident is not None]  # others have no stack yet
    for thread in begun:
        if (thread.ident, thread.name) not in known:
            count = 1 + sum(name == thread.name for _, name in known)
            own = thread.name if count == 1 else f"{thread.name} ({count})"
            known[thread.ident, thread.name] = own
    return {thread.ident: known[thread.ident, thread.name] for thread in begun}


def _stack(frame: FrameType | None) -> list[Line]:
    lines: list[Line] = []
    while frame is not None:
        lines.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    return lines[::-1]


def _below_sample(frame: Any) -> Any:
    """Return the frame of :func:`sample` itself, whose callers are no news; else the root."""
    root = frame
    while frame is not None:
        if frame.function == "sample" and (frame.file_path or "").endswith("sampling.py"):
            return frame
        frame = max(frame.children, key=lambda child: child.time, default=None)
    return root


def _functions(root: Any) -> tuple[Row, ...]:
    """Sum pyinstrument's tree over functions; one inside itself counts once."""
    own: dict[Line, float] = {}
    total: dict[Line, float] = {}
    todo = [(child, frozenset()) for child in (root.children if root is not None else ())]
    while todo:
        frame, above = todo.pop()
        inside = above
        if not frame.is_synthetic:
            key = frame.file_path or "", frame.line_no or 0, frame.function
            children = [child for child in frame.children if not child.is_synthetic]
            alone = frame.time - sum(child.time for child in children)
            own[key] = own.get(key, 0.0) + max(0.0, alone)
            if key not in above:
                total[key] = total.get(key, 0.0) + frame.time
            inside = above | {key}
        todo += [(child, inside) for child in frame.children]
    rows = [Row(key[2], place_of(*key[:2]), None, own[key], total[key]) for key in own]
    return tuple(sorted(rows, key=lambda row: (-row.own_s, -row.total_s, row.name)))


def _need_interval(interval_s: float) -> None:
    if not 0 < interval_s < math.inf:
        raise ValueError(f"interval_s must be above 0 seconds, and finite, got {interval_s!r}")
