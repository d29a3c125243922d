"""Rounds of interleaved samples in random order, warmed up and calibrated, within a budget."""

from __future__ import annotations

import itertools
import math
import random
import sys
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from dlhelpers.measure.intervals import Interval, min_pairs, plan_looks, signed_rank_interval

__all__ = ["Race", "Timer"]

_SAMPLE_S = 1e-3  # one sample lasts this long at least: 10,000 times the timer's resolution
_MIN_PAIRS = 30  # shorter samples where a budget or a costly setup would not allow so many
_MAX_PAIRS = 1000  # longer budgets make samples longer, not more
_clock = time.perf_counter  # tests put a fake clock here


class Race:
    """Rounds of interleaved samples, and the looks at them."""

    def __init__(
        self,
        functions: Mapping[str, Callable[[], Any]],
        baseline: str,
        budget_s: float,
        overtime: float,
        setup: Callable[[], Any] | None,
        cache: str,
    ) -> None:
        self._start = _clock()
        self.functions, self.baseline = functions, baseline
        self.timer = timer = Timer(setup, cache)
        self.deadline = self._start + budget_s
        self.latest = self.deadline + overtime * budget_s
        self.samples: dict[str, list[float]] = {name: [] for name in functions}
        self.intervals: dict[str, Interval] = {}
        self.is_first = False  # whether the only pair are the first calls
        self.running = [name for name in functions if name != baseline]
        self.rng = random.Random()  # its own: neither reads nor moves the caller's random state
        share_s = budget_s / len(functions)
        looks = {name: _calibrate(timer, function, share_s) for name, function in functions.items()}
        self.numbers = {name: look.number for name, look in looks.items()}
        self._firsts = {name: look.first_s for name, look in looks.items()}
        self._call_s = sum(look.call_s for look in looks.values())  # of one call of each
        most, least = max(self.numbers.values()), min(self.numbers.values())
        if most <= 4 * least:  # equal repeats leave no difference but the work itself
            self.numbers = dict.fromkeys(self.numbers, most)

    def run(self, alpha: float, is_settled: Callable[[Interval], bool]) -> None:
        """Measure until every candidate is settled or the budget is spent.

        Past the budget, rounds are added only up to those that an interval needs at the last look.
        That number is fixed before the first round that it is asked of, and fewer give no interval:
        the confidence stays. Where not even one more call of each fits, the first calls are the
        only pair.
        """
        begin = _clock()
        if begin + self._call_s > self.latest:
            self.is_first = True
            for name, seconds in self._firsts.items():
                self.samples[name].append(max(seconds, 1e-9))
            for name in self.running:
                self.intervals[name] = signed_rank_interval(self.log_ratios(name), alpha)
            return
        self._round()
        round_s = _clock() - begin
        measuring_s = self.deadline - begin
        looks = plan_looks(measuring_s / max(round_s, 1e-9), alpha)
        need = min_pairs(looks[-1][1])
        for share, alpha_look in looks:
            until = begin + share * measuring_s
            while _clock() + round_s <= (self.latest if self.rounds < need else until):
                self._round()
                round_s = (_clock() - begin) / self.rounds
            for name in tuple(self.running):
                self.intervals[name] = signed_rank_interval(self.log_ratios(name), alpha_look)
                if is_settled(self.intervals[name]):
                    self.running.remove(name)
            if not self.running:
                return

    @property
    def rounds(self) -> int:
        """Rounds so far; the baseline runs in each."""
        return len(self.samples[self.baseline])

    def _round(self) -> None:
        order = [self.baseline, *self.running]
        self.rng.shuffle(order)
        for name in order:
            number = self.numbers[name]
            seconds = self.timer.sample(self.functions[name], number)
            self.samples[name].append(max(seconds, 1e-9) / number)

    def log_ratios(self, name: str) -> np.ndarray:
        """Return log(baseline time / this candidate's time), one for each round it ran in."""
        # a settled candidate stops running: its samples belong to the first rounds
        own = self.samples[name]
        return np.log(self.samples[self.baseline][: len(own)]) - np.log(own)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start, warm-up included."""
        return _clock() - self._start

    def seconds(self, name: str) -> float:
        """Median seconds of one call."""
        return median(self.samples[name])


class Timer:
    """Times a number of calls, in seconds, on the CPU's clock or on CUDA's."""

    def __init__(self, setup: Callable[[], Any] | None, cache: str) -> None:
        torch = sys.modules.get("torch")  # a caller without torch does not pay for its import
        self.cuda = torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized()
        if self.cuda:
            self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self.cold = cache == "cold"
        self.before_each = [setup] if setup else []
        if self.cold:
            self.before_each.append(_cache_sweeper())

    def sample(self, function: Callable[[], Any], number: int) -> float:
        """Return the seconds that ``number`` calls took, preparations not counted."""
        if not self.before_each:
            return self._time(function, number)
        seconds = 0.0
        for _ in range(number):
            for prepare in self.before_each:
                prepare()
            seconds += self._time(function, 1)
        return seconds

    def _time(self, function: Callable[[], Any], number: int) -> float:
        repeats = itertools.repeat(None, number)
        if self.cuda:
            begin, end = self.events
            begin.record()
            for _ in repeats:
                function()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) / 1e3
        started = _clock()
        for _ in repeats:
            function()
        return _clock() - started


def _cache_sweeper() -> Callable[[], Any]:
    from dlhelpers.machine import last_level_cache_bytes

    buffer = np.zeros(2 * last_level_cache_bytes() // 8)
    return lambda: np.add(buffer, 1.0, out=buffer)


class _Look(NamedTuple):
    """What warming up has told of a function.

    Attributes:
        number: calls that make a sample.
        first_s: what the first call took.
        call_s: the least that a call took, with what is prepared before it.
    """

    number: int
    first_s: float
    call_s: float


def _calibrate(timer: Timer, function: Callable[[], Any], share_s: float) -> _Look:
    """Warm up for a twentieth of the function's share."""
    begin = before = _clock()
    first = None
    fastest = fastest_with_setup = math.inf
    for call in itertools.count():
        seconds = timer.sample(function, 1)
        first = seconds if first is None else first
        fastest = min(fastest, seconds)
        now = _clock()
        fastest_with_setup, before = min(fastest_with_setup, now - before), now
        if now - begin > share_s / 20 and (call > 0 or now - begin > share_s / 4):
            break
    if timer.cold:
        return _Look(1, first, fastest_with_setup)
    sample_s = max(_SAMPLE_S, share_s / _MAX_PAIRS)
    wanted = sample_s / max(fastest, 1e-9)
    affordable = share_s / _MIN_PAIRS / max(fastest_with_setup, 1e-9)
    return _Look(max(1, round(min(wanted, affordable))), first, fastest_with_setup)
