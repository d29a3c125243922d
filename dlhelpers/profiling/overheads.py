"""What does looking cost? The same program under each profiler and without, in pairs."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from time import perf_counter
from typing import Any

from dlhelpers.arguments import need_callable, need_seconds
from dlhelpers.extras import install_hint
from dlhelpers.measure import Comparison, compare
from dlhelpers.measure.comparison import single_pair
from dlhelpers.profiling.python_profile import start, tracing_module
from dlhelpers.tables import html_table, text_table

__all__ = ["PROFILERS", "OverheadReport", "overhead"]


def _cprofile(fn: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> None:
        profile = tracing_module().Profile()
        start(profile)
        try:
            fn()
        finally:
            profile.disable()

    return run


def _profile(fn: Callable[[], Any]) -> Callable[[], Any]:
    module = importlib.import_module("profile")
    return lambda: module.Profile().runcall(fn)


def _line_profiler(fn: Callable[[], Any]) -> Callable[[], Any]:
    from dlhelpers.profiling.line_profile import named_by, profile_lines

    importlib.import_module("line_profiler")
    watched = named_by(fn)
    return lambda: profile_lines(fn, *watched)


def _pyinstrument(fn: Callable[[], Any]) -> Callable[[], Any]:
    profiler = importlib.import_module("pyinstrument").Profiler

    def run() -> None:
        session = profiler(interval=0.001, async_mode="disabled")
        session.start()
        try:
            fn()
        finally:
            session.stop()

    return run


def _stacks(fn: Callable[[], Any]) -> Callable[[], Any]:
    from dlhelpers.profiling.sampling import take_stacks

    return lambda: take_stacks(fn, 0.002)


def _torch(fn: Callable[[], Any]) -> Callable[[], Any]:
    from torch.profiler import ProfilerActivity

    from dlhelpers.recording import recording

    def run() -> None:
        with recording("overhead", activities=[ProfilerActivity.CPU]):
            fn()

    return run


PROFILERS: dict[str, Callable[[Callable[[], Any]], Callable[[], Any]]] = {
    "cProfile": _cprofile,
    "profile": _profile,
    "line_profiler": _line_profiler,
    "pyinstrument": _pyinstrument,
    "sample_threads": _stacks,
    "torch.profiler": _torch,
}


class OverheadReport(Mapping[str, Comparison]):
    """Profiler -> comparison whose speedup is the time with it / the time without.

    Attributes:
        missing: profilers that are not here -> what to do about it.
    """

    def __init__(self, rows: Mapping[str, Comparison], missing: Mapping[str, str]) -> None:
        self._rows, self.missing = dict(rows), dict(missing)

    def __getitem__(self, name: str) -> Comparison:
        return self._rows[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def _table(self) -> tuple[list[str], list[list[str]]]:
        rows = [
            [name, f"{row.speedup:.2f}", f"[{row.low:.2f}, {row.high:.2f}]"]
            for name, row in self.items()
        ]
        rows += [[name, "-", why] for name, why in self.missing.items()]
        rows += [[name, "", row.advice] for name, row in self.items() if row.advice]
        return ["profiler", "times as long", "interval"], rows

    def __str__(self) -> str:
        return text_table(*self._table(), names=1)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(*self._table(), names=1)


def overhead(
    fn: Callable[[], Any],
    *,
    profilers: Sequence[str] = tuple(PROFILERS),
    budget_s: float = 2.0,
    run_s: float = 0.05,
) -> OverheadReport:
    """Measure how many times as long ``fn`` takes under each profiler.

    Args:
        fn: what to run; repeated inside one session of a profiler until it takes about ``run_s``
            without, so that starting the profiler is a small part; fewer times under a profiler
            that is so slow that an interval would not fit into the budget.
        profilers: which of ``PROFILERS``.
        budget_s: seconds for each of them. One run under each is made in any case; where it spends
            the budget, it is the only one, and its row is undecided.
        run_s: seconds of a run.

    Raises:
        TypeError: fn cannot be called.
        ValueError: an unknown profiler, or a budget that is not positive.
    """
    need_callable(fn)
    need_seconds("budget_s", budget_s)
    unknown = [name for name in profilers if name not in PROFILERS]
    if unknown:
        raise ValueError(f"there is no profiler {unknown[0]!r}; there are {', '.join(PROFILERS)}")
    plain_s = _seconds(fn)
    if plain_s < budget_s:  # something may have been made ready in the first run
        plain_s = _seconds(fn)
    repeats = max(1, math.ceil(run_s / plain_s))

    rows, missing = {}, {}
    for name in profilers:
        try:
            under = PROFILERS[name](fn)
        except ImportError:
            missing[name] = (
                "left with Python 3.17" if name == "profile" else install_hint("pyinstrument")
            )
            continue
        except TypeError as error:  # lines of what is not written in Python
            missing[name] = str(error)
            continue
        once = _seconds(under)
        if once <= budget_s < plain_s:  # the first run made something ready: look again
            plain_s = _seconds(fn)
            repeats = max(1, math.ceil(run_s / plain_s))
        if once + plain_s > budget_s:
            rows[name] = single_pair(once, plain_s)
            continue
        plain = _repeated(fn, max(1, min(repeats, int(budget_s / 20 / once))))
        rows[name] = compare(PROFILERS[name](plain), plain, budget_s=budget_s)
    return OverheadReport(rows, missing)


def _seconds(fn: Callable[[], Any]) -> float:
    begin = perf_counter()
    fn()
    return max(perf_counter() - begin, 1e-7)


def _repeated(fn: Callable[[], Any], times: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(times):
            fn()

    run.__wrapped__ = fn  # type: ignore[attr-defined]  # whose lines line_profiler looks at
    return run
