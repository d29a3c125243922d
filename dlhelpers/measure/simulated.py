"""Callables whose times are known exactly: only they move the clock that times them.

What a machine does to a timing on top is the other trials' question; here the times themselves
are not steady: they warm up, drift, or have two levels.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from dlhelpers.measure import paired

__all__ = ["Times", "simulated_pairs"]

Times = Literal["warm-up", "two-stage warm-up", "drift", "bimodal"]
_Call = Callable[[], Any]
_Milliseconds = Callable[[int], float]  # of a call, by its number


@contextmanager
def simulated_pairs(times: Times, seed: int = 0) -> Iterator[Callable[[], tuple[_Call, _Call]]]:
    """Give a function that makes (baseline, candidate), and a clock that these alone move.

    Args:
        times: ``warm-up``: the first 10 to 150 calls of the baseline take up to 20 times as
            long as the others, 0.8 s in all; the others take as long as the candidate's.
            ``two-stage warm-up``: the first 10 to 40 calls take 8 to 20 times as long, the next
            60 to 120 take 2 to 5 times as long, 1.4 s in all at most.
            ``drift``: the baseline's times grow from half of the candidate's to a multiple of
            them, so that no one ratio is true. ``bimodal``: each call of either takes a short or
            a long time, by chance.
        seed: of all that is drawn.
    """
    now = 0.0
    rng = random.Random(seed)

    def timed(milliseconds: _Milliseconds) -> _Call:
        count = itertools.count()

        def call() -> None:
            nonlocal now
            now += 1e-3 * milliseconds(next(count)) * math.exp(rng.gauss(0, 0.03))

        return call

    clock, paired._clock = paired._clock, lambda: now
    try:
        yield lambda: tuple(map(timed, _MAKERS[times](rng)))
    finally:
        paired._clock = clock


def _steady(_: int) -> float:
    return 1.0


def _warms_up(rng: random.Random) -> tuple[_Milliseconds, _Milliseconds]:
    calls = rng.randint(10, 150)
    slower = rng.uniform(1.5, min(20.0, 800 / calls))  # what takes longer than the budget is unseen
    return lambda k: slower if k < calls else 1.0, _steady


def _warms_up_twice(rng: random.Random) -> tuple[_Milliseconds, _Milliseconds]:
    first, second = rng.randint(10, 40), rng.randint(60, 120)
    slowest, slower = rng.uniform(8, 20), rng.uniform(2, 5)
    return lambda k: slowest if k < first else slower if k < first + second else 1.0, _steady


def _drifts(rng: random.Random) -> tuple[_Milliseconds, _Milliseconds]:
    doubled = rng.randint(50, 400)
    return lambda k: 0.5 * (1 + k / doubled), _steady


def _is_bimodal(rng: random.Random) -> tuple[_Milliseconds, _Milliseconds]:
    short, share = rng.uniform(0.2, 0.8), rng.uniform(0.3, 0.7)

    def either(_: int) -> float:
        return short if rng.random() < share else 1.5

    return either, either


_MAKERS = {
    "warm-up": _warms_up,
    "two-stage warm-up": _warms_up_twice,
    "drift": _drifts,
    "bimodal": _is_bimodal,
}
