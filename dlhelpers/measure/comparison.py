"""Compare callables: the outcome, its interval and how it is shown."""

from __future__ import annotations

import gc
import html
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from dlhelpers.arguments import need_seconds
from dlhelpers.measure.intervals import Interval, min_pairs
from dlhelpers.measure.paired import Race
from dlhelpers.tables import duration, figures

__all__ = ["Comparison", "Comparisons", "Outcome", "compare", "compare_many", "single_pair"]

Outcome = Literal["faster", "slower", "no difference", "undecided"]


@dataclass(frozen=True)
class Comparison:
    """What paired measurements of two callables support.

    Attributes:
        speedup: baseline time / candidate time; 1.25 means that the candidate needs 1/1.25 of
            the time.
        low, high: confidence interval of ``speedup``; 0 and infinity when the budget allowed too
            few pairs for any interval.
        outcome: ``faster`` or ``slower`` where the whole interval lies beyond the negligible
            band [1/(1+negligible), 1+negligible], ``no difference`` where it lies within,
            ``undecided`` otherwise.
        pairs: number of measured pairs.
        baseline_s, candidate_s: median time of one call, in seconds.
        confidence, negligible, threshold: as asked for.
        ratios: the paired ratios, in order of measurement.
        device: ``cpu``, or ``cuda`` when CUDA was in use and its events timed the calls.
        threads: torch's intra-op threads, left as the caller had set them; None without torch.
        elapsed_s: seconds used, warm-up and calibration included.
        is_first: one call of each took so long that the budget had no room for another: the only
            pair are the first calls, in which something may be made ready.
    """

    speedup: float
    low: float
    high: float
    outcome: Outcome
    pairs: int
    baseline_s: float
    candidate_s: float
    confidence: float
    negligible: float
    threshold: float | None
    ratios: tuple[float, ...]
    device: str
    threads: int | None
    elapsed_s: float
    is_first: bool = False

    def __str__(self) -> str:
        facts = [
            f"{self.outcome} · speedup {_told(self.speedup, self.low, self.high)}"
            f" at {self.confidence:.3g} confidence",
            f"{duration(self.baseline_s)} -> {duration(self.candidate_s)} a call",
            f"{_pairs(self.pairs)} in {duration(self.elapsed_s, 2)}",
            self.device + (f", {self.threads} threads" if self.threads else ""),
        ]
        return " · ".join(facts) + (f"\n{self.advice}" if self.advice else "")

    __repr__ = __str__

    @property
    def advice(self) -> str:
        """How to get an interval when the budget was too small for one, else empty."""
        if math.isfinite(self.high):
            return ""
        need = min_pairs(1 - self.confidence)
        # half of the budget may go into warming up, calibrating and an unfinished pair
        budget = 2 * (need + 1) * self.elapsed_s / self.pairs
        if self.is_first:
            return (
                "one call of each spent the budget: these are the first calls, warm-up included; "
                f"call both once beforehand, or give budget_s={_round_up(budget)} or more"
            )
        return (
            f"{_pairs(self.pairs)} cannot give an interval, {need} are needed: "
            f"give budget_s={_round_up(budget)} or more"
        )

    def _repr_html_(self) -> str:
        from dlhelpers.drawing import strip_svg

        line = html.escape(str(self)).replace("\n", "<br>")
        if not math.isfinite(self.high):
            return f"<div>{line}</div>"
        strip = strip_svg(
            self.ratios,
            self.low,
            self.high,
            negligible=self.negligible,
            estimate=self.speedup,
            threshold=self.threshold,
        )
        return f"<div>{line}<br>{strip}</div>"


class Comparisons(Mapping[str, Comparison]):
    """Comparisons of several candidates against one baseline, by name; displays as a table."""

    def __init__(self, baseline: str, rows: Mapping[str, Comparison]) -> None:
        self.baseline = baseline
        self._rows = dict(rows)

    def __getitem__(self, name: str) -> Comparison:
        return self._rows[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        width = max((len(name) for name in self._rows), default=0)
        lines = [f"against {self.baseline}:"]
        lines += [f"  {name:<{width}}  {row}" for name, row in self._rows.items()]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td style='text-align:left'>{html.escape(name)}</td>"
            f"<td style='text-align:left'>{row._repr_html_()}</td></tr>"
            for name, row in self._rows.items()
        )
        head = f"<tr><th></th><th>against {html.escape(self.baseline)}</th></tr>"
        return f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>"


def compare(
    baseline: Callable[[], Any],
    candidate: Callable[[], Any],
    *,
    budget_s: float = 2.0,
    overtime: float = 0.0,
    confidence: float = 0.95,
    negligible: float = 0.03,
    threshold: float | None = None,
    setup: Callable[[], Any] | None = None,
    cache: Literal["warm", "cold"] = "warm",
) -> Comparison:
    """Measure how many times faster ``candidate`` is than ``baseline``.

    Calls both without arguments, in pairs of random order, until the answer is settled or the
    budget is spent. Keeps the caller's thread count and random state. Once CUDA is initialised
    in this process, CUDA events time the calls and each sample ends with a synchronisation.

    Args:
        baseline, candidate: callables without arguments; their results are dropped.
        budget_s: seconds at most but for ``overtime``, warm-up and calibration included (the call
            in flight ends). Each is called once at least; where that spends the budget, it is not
            called again, and these calls are what is reported.
        overtime: share of ``budget_s`` that may be added where fewer pairs than an interval needs
            fit into it, as on a slow machine; measuring ends with the last pair that is needed.
        confidence: of the interval, over all the looks together.
        negligible: speedups within [1/(1+negligible), 1+negligible] count as no difference.
        threshold: a speedup to decide on: measuring goes on until the interval clears it.
        setup: runs untimed before every single call.
        cache: ``cold`` streams a buffer larger than the last-level cache before every single
            call, ``warm`` leaves the caches as the last call left them.

    Returns:
        A Comparison; its ``outcome`` is ``undecided`` where the budget did not suffice.

    Raises:
        TypeError: a callable is none.
        ValueError: an option is out of range. What the callables raise passes through.

    Source: see the module's docstring.

    >>> result = compare(lambda: sum(range(20_000)), lambda: sum(range(10_000)), budget_s=0.2)
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
    threshold: float | None = None,
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
    _validate_options(budget_s, overtime, confidence, negligible, threshold, cache)
    with _garbage_collector_off():
        race = Race(functions, baseline, budget_s * (len(functions) - 1), overtime, setup, cache)
        race.run(1 - confidence, lambda i: _is_settled(i, negligible, threshold))
    rows = {
        name: Comparison(
            speedup=interval.value,
            low=interval.low,
            high=interval.high,
            outcome=_outcome(interval, negligible),
            pairs=len(race.samples[name]),
            baseline_s=race.seconds(baseline),
            candidate_s=race.seconds(name),
            confidence=confidence,
            negligible=negligible,
            threshold=threshold,
            ratios=tuple(np.exp(race.log_ratios(name)).tolist()),
            device="cuda" if race.timer.cuda else "cpu",
            threads=_threads(),
            elapsed_s=race.elapsed_s,
            is_first=race.is_first,
        )
        for name, interval in race.intervals.items()
    }
    return Comparisons(baseline, rows)


def single_pair(baseline_s: float, candidate_s: float) -> Comparison:
    """Return what one call of each supports, where more of them would take too long: no interval.

    For callers that have timed both themselves, on the CPU.
    """
    ratio = baseline_s / candidate_s
    return Comparison(
        speedup=ratio,
        low=0.0,
        high=math.inf,
        outcome="undecided",
        pairs=1,
        baseline_s=baseline_s,
        candidate_s=candidate_s,
        confidence=0.95,
        negligible=0.03,
        threshold=None,
        ratios=(ratio,),
        device="cpu",
        threads=_threads(),
        elapsed_s=baseline_s + candidate_s,
        is_first=True,
    )


def _outcome(interval: Interval, negligible: float) -> Outcome:
    band = 1 + negligible
    if interval.low > band:
        return "faster"
    if interval.high < 1 / band:
        return "slower"
    return "no difference" if 1 / band <= interval.low <= interval.high <= band else "undecided"


def _is_settled(interval: Interval, negligible: float, threshold: float | None) -> bool:
    if _outcome(interval, negligible) == "undecided":
        return False
    return threshold is None or not interval.low < threshold <= interval.high


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
    if setup is not None and not callable(setup):
        raise TypeError(f"setup must be a callable without arguments or None, got {setup!r}")
    for name, function in functions.items():
        if not callable(function):
            raise TypeError(
                f"{name} must be a callable without arguments, got {type(function).__name__}: "
                "wrap the call, as in lambda: model(x)"
            )
    if baseline not in functions or len(functions) < 2:
        raise ValueError(
            f"baseline {baseline!r} must be one of two callables or more, got {list(functions)}"
        )


def _validate_options(
    budget_s: float,
    overtime: float,
    confidence: float,
    negligible: float,
    threshold: float | None,
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
    if threshold is not None and not (math.isfinite(threshold) and threshold > 0):
        raise ValueError(f"threshold must be a positive speedup, such as 1.05, got {threshold}")
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


def _threads() -> int | None:
    torch = sys.modules.get("torch")
    return None if torch is None else torch.get_num_threads()


def _told(value: float, low: float, high: float) -> str:
    return f"{figures(value)} [{figures(low)}, {figures(high)}]"


def _pairs(count: int) -> str:
    return f"{count:,} {'pair' if count == 1 else 'pairs'}"


def _round_up(seconds: float) -> float:
    scale = 10 ** math.floor(math.log10(seconds))
    return round(math.ceil(seconds / scale) * scale, 9)
