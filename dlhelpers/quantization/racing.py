"""Which of these backends is the fastest here? Paired measurement against the best float one."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from functools import partial
from time import perf_counter
from typing import Any

from torch import Tensor

from dlhelpers.measure import Comparison, compare_many
from dlhelpers.measure.intervals import min_pairs
from dlhelpers.quantization.backends import Backend
from dlhelpers.quantization.batches import Batch, batch_size, first_samples
from dlhelpers.tables import duration
from dlhelpers.trees import tensors_in

__all__ = ["Pace", "fastest", "raced"]

_EQUAL = 0.03
_HOPELESS = 8.0
_LOOK_S = 2.0
_MOST_S = 20.0  # of racing, for each backend whose calls are slow


class Pace:
    """The first calls of the backends, in turn, so that a hopeless one is not made again.

    Where a type has no fast kernel one call may take a thousand times as long as float32.
    """

    def __init__(self) -> None:
        self._best: Backend | None = None
        self._best_s = math.inf
        self.is_hopeless = False  # of the last backend: it will hardly win

    def outputs(
        self, backend: Backend, batches: list[Batch], example: Batch | None = None
    ) -> tuple[list[list[Tensor]], str]:
        """Run a backend on the batches.

        Args:
            backend: that was built.
            batches: of any sizes.
            example: of the size that counts, as in others something may be compiled first; by
                default the first of the batches. Where none has that size, one more call is timed.

        Returns:
            The outputs' tensors for each batch, of those that it was run on; and why it was not
            run on the rest and should not be raced, empty where it should.
        """
        example = batches[0] if example is None else example
        if why := self._from_one_sample(backend, example):
            return [], why
        found: list[list[Tensor]] = []
        counts = [_sizes(batch) == _sizes(example) for batch in batches]
        best_s = math.inf if any(counts) else _timed(partial(backend.run, example))
        for batch, is_timed in zip(batches, counts, strict=True):
            seconds = _timed(lambda batch=batch: found.append(backend.run(batch)))
            best_s = min(best_s, seconds) if is_timed else best_s
            if is_timed and best_s > max(_LOOK_S, _HOPELESS * self._best_s):
                told = self._told(best_s / self._best_s)
                return found, f"one call took {duration(best_s)}, {told}"
        self.is_hopeless = best_s > _HOPELESS * self._best_s
        if best_s < self._best_s:
            self._best, self._best_s = backend, best_s
        return found, ""

    def _from_one_sample(self, backend: Backend, batch: Batch) -> str:
        """Return why a whole batch should not be tried: one of its samples took that long."""
        size = batch_size(batch)
        if self._best is None or not backend.takes_any_batch or size in (None, 1):
            return ""
        one = first_samples(batch, 1)
        try:
            usual_s = min(_timed(partial(self._best.run, one)) for _ in range(2))
            sample_s = _timed(partial(backend.run, one))
            if sample_s < _LOOK_S / 4:  # something may have been made ready in the first call
                sample_s = min(sample_s, _timed(partial(backend.run, one)))
        except Exception:  # a model of one batch size: the whole batch tells
            return ""
        if size * sample_s < _LOOK_S or sample_s < _HOPELESS * usual_s:
            return ""
        return f"one sample took {duration(sample_s)}, {self._told(sample_s / usual_s)}"

    def _told(self, times: float) -> str:
        return f"{times:.0f} times as long as {self._best.name}: not raced"


def raced(
    backends: dict[str, Backend], batch: Batch, budget_s: float, own: str = "float32"
) -> tuple[dict[str, Comparison], str, dict[str, float]]:
    """Race the backends against the fastest one of the model's own type.

    Returns:
        Each backend's speed; the name of the fastest one of that type; and how many times slower
        than that those are which were too slow to be raced, from a few looks.
    """
    calls = {name: partial(backend.run, batch) for name, backend in backends.items()}
    looks = {name: _looked_at(call) for name, call in calls.items()}
    floats = [name for name, backend in backends.items() if backend.precision == own]
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
    needed = rounds * sum(looks[name] for name in calls) / (len(calls) - 1)
    return max(budget_s, min(needed, _MOST_S))


def _surely(speed: Comparison) -> float:
    """Return the interval's lower end, or a cautious guess where there were too few pairs."""
    return speed.low if math.isfinite(speed.high) else speed.speedup / 1.1


def _looked_at(call: Callable[[], Any]) -> float:
    """Return the least of a few times: a single one may hold a warm-up or another's work."""
    times: list[float] = []
    while len(times) < 5 and sum(times) < _LOOK_S:
        times.append(_timed(call))
    return min(times)


def _sizes(batch: Batch) -> list[Any]:
    return [tensor.shape for tensor in tensors_in(batch)]


def _timed(call: Callable[[], Any]) -> float:
    start = perf_counter()
    call()
    return perf_counter() - start


def fastest(
    backends: dict[str, Backend],
    speeds: dict[str, Comparison],
    baseline: str,
    batch: Batch,
    budget_s: float,
) -> str:
    """Return the fastest backend; those near the top are raced once more against each other."""
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
        {name: partial(backends[name].run, batch) for name in near},
        baseline=best,
        budget_s=_enough(2 * budget_s, near, {n: speeds[n].candidate_s for n in near}),
        negligible=0.01,
    )
    return max(near, key=lambda name: final[name].speedup if name in final else 1.0)
