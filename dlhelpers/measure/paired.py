"""Rounds of interleaved samples in random order, warmed up and calibrated, within a budget."""

from __future__ import annotations

import itertools
import math
import random
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from dlhelpers.measure.changes import find_change, is_changing
from dlhelpers.measure.intervals import (
    WARM_SHARE,
    Interval,
    min_pairs,
    pair_interval,
    plan_looks,
)
from dlhelpers.measure.unfinished import unfinished

__all__ = ["Found", "Race", "Timer"]

_SAMPLE_S = 1e-3  # one sample lasts this long at least: 10,000 times the timer's resolution
_MIN_PAIRS = 30  # shorter samples where a budget or a costly setup would not allow so many
_MAX_PAIRS = 1000  # longer budgets make samples longer, not more
_WARM_CALLS = 200  # of each function, before which no look may end the race
_clock = time.perf_counter  # tests put a fake clock here


class Found(NamedTuple):
    """What a look at one candidate finds.

    Attributes:
        interval: of the ratio, after the change point.
        baseline_s, candidate_s: [n] seconds of one call in each pair that the interval rests on.
        dropped: how many pairs came before the change point.
        calls: how often each function was called in those n pairs, the less of the two.
        still_changing: whether the ratio changes among those n pairs, or they are fewer than
            those that came before the change.
    """

    interval: Interval
    baseline_s: np.ndarray
    candidate_s: np.ndarray
    dropped: int
    calls: int
    still_changing: bool

    @property
    def is_warm(self) -> bool:
        """Whether enough was seen since a change to stop early: a warm-up may have two stages."""
        return not self.dropped or self.calls >= _WARM_CALLS


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
        negligible: float = 0.03,
    ) -> None:
        self._start = _clock()
        self.negligible = negligible
        self.functions, self.baseline = functions, baseline
        self.timer = timer = Timer(setup, cache)
        self.deadline = self._start + budget_s
        self.latest = self.deadline + overtime * budget_s
        self.samples: dict[str, list[float]] = {name: [] for name in functions}
        self._repeats: dict[str, list[int]] = {name: [] for name in functions}  # calls of each
        self.found: dict[str, Found] = {}
        self.is_first = False  # whether the only pair are the first calls
        self.running = [name for name in functions if name != baseline]
        self.rng = random.Random()  # its own: neither reads nor moves the caller's random state
        share_s = budget_s / len(functions)
        self._sample_s = max(_SAMPLE_S, share_s / _MAX_PAIRS)
        looks = {
            name: _calibrate(timer, name, function, share_s, self._sample_s)
            for name, function in functions.items()
        }
        self.numbers = {name: look.number for name, look in looks.items()}
        self.calls = {name: look.calls for name, look in looks.items()}
        self._firsts = {name: look.first_s for name, look in looks.items()}
        self._call_s = sum(look.call_s for look in looks.values())  # of one call of each
        self._repeat_alike()

    def run(self, alpha: float, is_settled: Callable[[Found], bool]) -> None:
        """Measure until every candidate is settled or the budget is spent.

        Nothing is settled before each function was called often enough to be warm or half of the
        time is over, nor where the ratio still changes; after a change the calls are counted anew,
        up to the end. The probabilities of all looks are fixed
        before the first, so what a look leaves out does not change the confidence.

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
                self.found[name] = self._look(name, alpha)
            return
        self._round()
        round_s = _clock() - begin
        measuring_s = self.deadline - begin
        warm = max(math.ceil((_WARM_CALLS - self.calls[n]) / self.numbers[n]) for n in self.calls)
        looks = plan_looks(measuring_s / max(round_s, 1e-9), alpha, 1 + warm)
        need = min_pairs(looks[-1][1])
        for share, alpha_look in looks:
            until = begin + share * measuring_s
            while _clock() + round_s <= (self.latest if self.rounds < need else until):
                self._round()
                self._refit()
                round_s = (_clock() - begin) / self.rounds
            if share < WARM_SHARE and min(self.calls.values()) < _WARM_CALLS:
                continue
            for name in tuple(self.running):
                found = self.found[name] = self._look(name, alpha_look)
                if found.is_warm and is_settled(found) and not found.still_changing:
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
            self._repeats[name].append(number)
            self.calls[name] += number

    def _repeat_alike(self) -> None:
        most, least = max(self.numbers.values()), min(self.numbers.values())
        if most <= 4 * least:  # equal repeats leave no difference but the work itself
            self.numbers = dict.fromkeys(self.numbers, most)

    def _refit(self) -> None:
        """Repeat calls more or less often where they have become far shorter or longer."""
        if self.timer.before_each:
            return
        for name in [self.baseline, *self.running]:
            recent = self.samples[name][-5:]
            is_short = len(recent) == 5 and max(recent) * self.numbers[name] < self._sample_s / 5
            is_long = self.numbers[name] > 1 and (
                min(recent[-2:]) * self.numbers[name] > 10 * self._sample_s
            )
            if is_short or is_long:
                self.numbers[name] = max(1, round(self._sample_s / median(recent[-2:])))
                self._repeat_alike()

    def _look(self, name: str, alpha: float) -> Found:
        # a settled candidate stops running: its samples belong to the first rounds
        own = np.array(self.samples[name])
        times = np.array([self.samples[self.baseline][: len(own)], own])
        if (block := -(-len(own) // (2 * _MAX_PAIRS))) > 1:  # n pairs have n^2 / 2 averages
            whole = times[:, : len(own) // block * block]
            times = whole.reshape(2, -1, block).mean(axis=2)
        logs = np.log(times[0]) - np.log(times[1])
        start = find_change(logs, self.negligible, least=min_pairs(alpha))
        interval = pair_interval(*times[:, start:], alpha)
        changing = is_changing(logs[start:], interval, self.negligible, again=start > 0)
        since = slice(start * block, len(own))
        calls = min(sum(self._repeats[n][since]) for n in (self.baseline, name))
        return Found(interval, *times[:, start:], start, calls, changing or 2 * start > len(logs))

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start, warm-up included."""
        return _clock() - self._start


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
        calls: how often it was called.
        first_s: what the first call took.
        call_s: the least that a call took, with what is prepared before it.
    """

    number: int
    calls: int
    first_s: float
    call_s: float


def _calibrate(
    timer: Timer, name: str, function: Callable[[], Any], share_s: float, sample_s: float
) -> _Look:
    """Warm up for a twentieth of the function's share."""
    begin = _clock()
    results: list[Any] = []
    first = fastest = timer.sample(lambda: results.append(function()), 1)
    if kind := unfinished(results[0]):
        with warnings.catch_warnings():  # Python's own, where nobody else holds a coroutine
            warnings.simplefilter("ignore", RuntimeWarning)
            results.clear()
        raise TypeError(
            f"{name} returned {'an' if kind[0] in 'aeiouAEIOU' else 'a'} {kind}, so that its work "
            "is not done by the call: use up, await or wait for what it returns, as in "
            "lambda: list(...), or return nothing where making it is all there is to time"
        )
    results.clear()
    before = _clock()
    fastest_with_setup = before - begin
    calls = 1
    while before - begin <= share_s / (20 if calls > 1 else 4):
        fastest = min(fastest, timer.sample(function, 1))
        now = _clock()
        fastest_with_setup, before = min(fastest_with_setup, now - before), now
        calls += 1
    if timer.cold:
        return _Look(1, calls, first, fastest_with_setup)
    wanted = sample_s / max(fastest, 1e-9)
    affordable = share_s / _MIN_PAIRS / max(fastest_with_setup, 1e-9)
    number = max(1, round(min(wanted, affordable)))
    return _Look(number, calls, first, fastest_with_setup)
