"""Which of these roads is the fastest here? Paired measurement against the best float32 road."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from functools import partial
from time import perf_counter
from typing import Any

from dlhelpers.measure import Comparison, compare_many
from dlhelpers.measure.intervals import min_pairs
from dlhelpers.quantization.batches import Batch
from dlhelpers.quantization.roads import Road

__all__ = ["fastest", "raced"]

_EQUAL = 0.03
_HOPELESS = 8.0
_LOOK_S = 2.0


def raced(
    roads: dict[str, Road], batch: Batch, budget_s: float
) -> tuple[dict[str, Comparison], str, dict[str, float]]:
    """Race the roads against the fastest float32 one.

    Returns:
        Each road's speed; the fastest float32 road's name; and how many times slower than that
        those are which were too slow to be raced, from a few looks.
    """
    calls = {name: partial(road.run, batch) for name, road in roads.items()}
    looks = {name: _looked_at(call) for name, call in calls.items()}
    floats = [name for name, road in roads.items() if road.precision == "float32"]
    baseline = min(floats, key=looks.__getitem__)
    close = [name for name in floats if looks[name] < 1.3 * looks[baseline]]
    if len(close) > 1:
        few = {name: calls[name] for name in close}
        race = compare_many(few, baseline=baseline, budget_s=_enough(budget_s, few, looks))
        baseline = max(close, key=lambda name: race[name].speedup if name in race else 1.0)
    slower = {name: look / looks[baseline] for name, look in looks.items()}
    slower = {name: times for name, times in slower.items() if times > _HOPELESS}
    calls = {name: call for name, call in calls.items() if name not in slower}
    if len(calls) == 1:
        return {}, baseline, slower
    speeds = dict(compare_many(calls, baseline=baseline, budget_s=_enough(budget_s, calls, looks)))
    return speeds, baseline, slower


def _enough(budget_s: float, calls: Collection[str], looks: dict[str, float]) -> float:
    """Return a budget for each candidate that lets slow calls have an interval, too."""
    rounds = 2 * (min_pairs(0.05) + 2)  # half of the budget goes into warming up and calibrating
    return max(budget_s, rounds * sum(looks[name] for name in calls) / (len(calls) - 1))


def _surely(speed: Comparison) -> float:
    """Return the interval's lower end, or a cautious guess where there were too few pairs."""
    return speed.low if math.isfinite(speed.high) else speed.speedup / 1.1


def _looked_at(call: Callable[[], Any]) -> float:
    """Return the least of a few times: a single one may hold a warm-up or another's work."""
    times: list[float] = []
    while len(times) < 5 and sum(times) < _LOOK_S:
        times.append(_timed(call))
    return min(times)


def _timed(call: Callable[[], Any]) -> float:
    start = perf_counter()
    call()
    return perf_counter() - start


def fastest(
    roads: dict[str, Road],
    speeds: dict[str, Comparison],
    baseline: str,
    batch: Batch,
    budget_s: float,
) -> str:
    """Return the fastest road; those near the top are raced once more against each other."""
    best = max(speeds, key=lambda name: speeds[name].speedup, default=baseline)
    if best == baseline or _surely(speeds[best]) < 1 + _EQUAL:
        clearly = [name for name in speeds if _surely(speeds[name]) > 1 / (1 + _EQUAL)]
        best = max(clearly, key=lambda name: speeds[name].speedup, default=baseline)
        if best == baseline or speeds[best].speedup < 1:
            return baseline
    near = [name for name in speeds if speeds[name].speedup > speeds[best].speedup / 1.2]
    if len(near) < 2:
        return best
    final = compare_many(
        {name: partial(roads[name].run, batch) for name in near},
        baseline=best,
        budget_s=_enough(2 * budget_s, near, {n: speeds[n].candidate_s for n in near}),
        negligible=0.01,
    )
    return max(near, key=lambda name: final[name].speedup if name in final else 1.0)
