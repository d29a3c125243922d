"""Measure callables against each other until the answer is settled or the budget is spent."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np

from dlhelpers.arguments import need_callable, need_seconds
from dlhelpers.measure.comparison import Comparison, Comparisons, Outcome, intra_op_threads
from dlhelpers.measure.intervals import HINT, Interval, total_interval
from dlhelpers.measure.paired import Found, Race

__all__ = ["compare", "compare_many"]


def compare(
    baseline: Callable[[], Any],
    candidate: Callable[[], Any],
    *,
    budget_s: float = 2.0,
    overtime: float = 0.0,
    confidence: float = 0.95,
    negligible: float = 0.03,
    threshold: float | tuple[float, ...] | None = None,
    setup: Callable[[], Any] | None = None,
    cache: Literal["warm", "cold"] = "warm",
) -> Comparison:
    """Measure how many times faster ``candidate`` is than ``baseline``.

    Calls both without arguments, in pairs of random order, until the answer is settled or the
    budget is spent. Keeps the caller's thread count and random state. Once CUDA is initialised
    in this process, CUDA events time the calls and each sample ends with a synchronisation.

    Nothing is settled before each was called 200 times or half of the budget is spent. Where the
    ratio changed once, as when something warms up, what was measured before is left out, and
    nothing is settled before 200 further calls or the end of the budget. Where it still changes at
    the end, or changed so late that less was measured after than before, the outcome is
    ``undecided`` and ``still_changing`` is set. A change that would come later than the measuring
    ends cannot be seen: what takes more calls than that to warm up is warmed up beforehand, or
    given a larger budget.

    Args:
        baseline, candidate: callables without arguments, which do their work when they are
            called; their results are dropped.
        budget_s: seconds at most but for ``overtime``, warm-up and calibration included (the call
            in flight ends). Each is called once at least; where that spends the budget, it is not
            called again, and these calls are what is reported.
        overtime: share of ``budget_s`` that may be added where fewer pairs than an interval needs
            fit into it, as on a slow machine; measuring ends with the last pair that is needed.
        confidence: of the interval, over all the looks together.
        negligible: speedups within [1/(1+negligible), 1+negligible] count as no difference.
        threshold: a speedup to decide on, or several, as for the two ends of a band: measuring
            goes on until the interval clears it.
        setup: runs untimed before every single call.
        cache: ``cold`` streams a buffer larger than the last-level cache before every single
            call, ``warm`` leaves the caches as the last call left them.

    Returns:
        A Comparison; its ``outcome`` is ``undecided`` where the budget did not suffice.

    Raises:
        TypeError: a callable is none, or only begins its work, as a generator function does or
            one that returns an iterator, an awaitable or a future.
        ValueError: an option is out of range. What the callables raise passes through.

    Source: see the module's docstring.

    >>> result = compare(lambda: sum(range(20_000)), lambda: sum(range(2_000)), budget_s=1.0)
    >>> result.outcome
    'faster'
    """
    return compare_many(
        {"baseline": baseline, "candidate": candidate},
        baseline="baseline",
        budget_s=budget_s,
        overtime=overtime,
        confidence=confidence,
        negligible=negligible,
        threshold=threshold,
        setup=setup,
        cache=cache,
    )["candidate"]


def compare_many(
    functions: Mapping[str, Callable[[], Any]],
    *,
    baseline: str,
    budget_s: float = 2.0,
    overtime: float = 0.0,
    confidence: float = 0.95,
    negligible: float = 0.03,
    threshold: float | tuple[float, ...] | None = None,
    setup: Callable[[], Any] | None = None,
    cache: Literal["warm", "cold"] = "warm",
) -> Comparisons:
    """Measure several callables against one of them, by the rules of :func:`compare`.

    Each round runs the baseline and every candidate that is not settled yet once, in random
    order. The confidence holds for each row by itself, not for all rows together.

    Args:
        functions: name -> callable without arguments; two at least.
        baseline: the name of the one that the others are compared with.
        budget_s: seconds at most **for each candidate**.
        overtime, confidence, negligible, threshold, setup, cache: as in :func:`compare`.

    Returns:
        Comparisons: name -> Comparison for every name but the baseline's.

    Raises:
        TypeError, ValueError: as :func:`compare`; or ``baseline`` is not among ``functions``.
    """
    _validate(functions, baseline, setup)
    bounds = () if threshold is None else tuple(np.atleast_1d(threshold).tolist())
    _validate_options(budget_s, overtime, confidence, negligible, bounds, cache)
    with _garbage_collector_off():
        race = Race(
            functions,
            baseline,
            budget_s * (len(functions) - 1),
            overtime,
            setup,
            cache,
            negligible,
        )
        race.run(1 - confidence, lambda f: _is_settled(f, confidence, negligible, bounds))
    rows = {}
    for name, found in race.found.items():
        interval = found.interval
        if found.still_changing:  # no interval tells of a ratio that changes
            interval = Interval(interval.value, 0.0, math.inf)
        total = total_interval(found.baseline_s, found.candidate_s, 1 - confidence)
        rows[name] = Comparison(
            speedup=interval.value,
            low=interval.low,
            high=interval.high,
            outcome=_outcome(interval, negligible),
            pairs=len(found.baseline_s),
            baseline_s=float(np.median(found.baseline_s)),
            candidate_s=float(np.median(found.candidate_s)),
            confidence=confidence,
            negligible=negligible,
            threshold=threshold,
            ratios=tuple((found.baseline_s / found.candidate_s).tolist()),
            device="cuda" if race.timer.cuda else "cpu",
            threads=intra_op_threads(),
            elapsed_s=race.elapsed_s,
            is_first=race.is_first,
            dropped=found.dropped,
            still_changing=found.still_changing,
            total_ratio=total.value,
            total_low=total.low,
            total_high=total.high,
        )
    return Comparisons(baseline, rows)


def _outcome(interval: Interval, negligible: float) -> Outcome:
    band = 1 + negligible
    if interval.low > band:
        return "faster"
    if interval.high < 1 / band:
        return "slower"
    return "no difference" if 1 / band <= interval.low <= interval.high <= band else "undecided"


def _is_settled(
    found: Found, confidence: float, negligible: float, bounds: tuple[float, ...]
) -> bool:
    interval = found.interval
    outcome = _outcome(interval, negligible)
    if outcome == "undecided" or any(interval.low < b <= interval.high for b in bounds):
        return False
    # a few long calls are too few to tell whether all calls together say otherwise: go on
    hint = total_interval(found.baseline_s, found.candidate_s, alpha=HINT)
    total = total_interval(found.baseline_s, found.candidate_s, 1 - confidence)
    is_hinted = hint.low > interval.high or hint.high < interval.low
    is_open = total.low <= interval.high and interval.low <= total.high
    return not (is_hinted and is_open and _outcome(hint, 0) != outcome)


def _validate(
    functions: Mapping[str, Callable[[], Any]],
    baseline: str,
    setup: Callable[[], Any] | None,
) -> None:
    if not isinstance(functions, Mapping):
        raise TypeError(
            f'functions must map names to callables, as in {{"old": f, "new": g}}, '
            f"got {type(functions).__name__}"
        )
    if setup is not None:
        need_callable(setup, "setup")
    for name, function in functions.items():
        need_callable(function, name)
    if baseline not in functions or len(functions) < 2:
        raise ValueError(
            f"baseline {baseline!r} must be one of two callables or more, got {list(functions)}"
        )


def _validate_options(
    budget_s: float,
    overtime: float,
    confidence: float,
    negligible: float,
    bounds: tuple[float, ...],
    cache: str,
) -> None:
    need_seconds("budget_s", budget_s)
    if not (isinstance(overtime, (int, float)) and math.isfinite(overtime) and overtime >= 0):
        raise ValueError(
            f"overtime must be a share of the budget, 0 or more, such as 2.0, got {overtime!r}"
        )
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, such as 0.95, got {confidence}")
    if not 0 < negligible < 1:
        raise ValueError(f"negligible must lie between 0 and 1, such as 0.03, got {negligible}")
    for bound in bounds:
        if not (math.isfinite(bound) and bound > 0):
            raise ValueError(f"threshold must be a positive speedup, such as 1.05, got {bound}")
    if cache not in ("warm", "cold"):
        raise ValueError(f'cache must be "warm" or "cold", got {cache!r}')


@contextmanager
def _garbage_collector_off() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
