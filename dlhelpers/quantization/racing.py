"""Which of these roads is the fastest here? Paired measurement against the best float32 road."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any

from dlhelpers.measure import Comparison, compare_many
from dlhelpers.quantization.batches import Batch
from dlhelpers.quantization.roads import Road

__all__ = ["fastest", "raced"]

_EQUAL = 0.03


def raced(
    roads: dict[str, Road], batch: Batch, budget_s: float
) -> tuple[dict[str, Comparison], str]:
    """Return each road's speed against the fastest float32 road, and that one's name."""
    calls = {name: partial(road.run, batch) for name, road in roads.items()}
    looks = {name: min(_timed(call) for _ in range(3)) for name, call in calls.items()}
    floats = [name for name, road in roads.items() if road.precision == "float32"]
    baseline = min(floats, key=looks.__getitem__)
    close = [name for name in floats if looks[name] < 1.3 * looks[baseline]]
    if len(close) > 1:
        raced = compare_many(
            {name: calls[name] for name in close}, baseline=baseline, budget_s=budget_s
        )
        baseline = max(close, key=lambda name: raced[name].speedup if name in raced else 1.0)
    if len(calls) == 1:
        return {}, baseline
    return dict(compare_many(calls, baseline=baseline, budget_s=budget_s)), baseline


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
    if best == baseline or speeds[best].low < 1 + _EQUAL:
        clearly = [name for name in speeds if speeds[name].low > 1 / (1 + _EQUAL)]
        best = max(clearly, key=lambda name: speeds[name].speedup, default=baseline)
        if best == baseline or speeds[best].speedup < 1:
            return baseline
    near = [name for name in speeds if speeds[name].speedup > speeds[best].speedup / 1.2]
    if len(near) < 2:
        return best
    final = compare_many(
        {name: partial(roads[name].run, batch) for name in near},
        baseline=best,
        budget_s=2 * budget_s,
        negligible=0.01,
    )
    return max(near, key=lambda name: final[name].speedup if name in final else 1.0)
