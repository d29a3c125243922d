"""Which stage of a pipeline do the others wait for, and what would a faster one be worth?

Stages that work at the same time on different batches take, for each batch,

    1 / throughput = max(t_1, ..., t_n)        instead of        t_1 + ... + t_n

one after the other. Between two stages stands a queue of ``depth`` batches; a stage that finds it
empty, or full, waits. :func:`predict_stages` computes who waits for whom, :func:`run_stages` does
it with threads and measures.

Source: Buzacott & Shanthikumar 1993, Stochastic Models of Manufacturing Systems, chapter 4
(flow lines with blocking after service).
"""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from time import perf_counter, sleep

from dlhelpers.arguments import whole_number

__all__ = ["Span", "Timeline", "predict_stages", "run_stages"]


@dataclass(frozen=True)
class Span:
    """One stage at work on one batch.

    Attributes:
        stage, batch: which.
        start_s, end_s: seconds since the first stage began.
    """

    stage: str
    batch: int
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Timeline:
    """Who worked when.

    Attributes:
        stages: names, in order.
        spans: of all batches, in order of stages and batches.
    """

    stages: tuple[str, ...]
    spans: tuple[Span, ...]

    @property
    def total_s(self) -> float:
        """Seconds from the first start to the last end."""
        return max(span.end_s for span in self.spans)

    @property
    def batches_per_s(self) -> float:
        """Throughput once the first batch has arrived, the filling of the pipeline not counted."""
        ends = [span.end_s for span in self.spans if span.stage == self.stages[-1]]
        took = ends[-1] - ends[0] if len(ends) > 1 else self.total_s
        return max(1, len(ends) - 1) / took if took else math.inf

    def busy_share(self, stage: str) -> float:
        """Return which share of its time, first start to last end, a stage works; else it waits."""
        spans = self._of(stage)
        whole = spans[-1].end_s - spans[0].start_s
        return self._work_s(stage) / whole if whole else 1.0

    @property
    def bottleneck(self) -> str:
        """The stage that works longest on all batches together."""
        return max(self.stages, key=self._work_s)

    def _of(self, stage: str) -> list[Span]:
        if stage not in self.stages:
            raise ValueError(f"there is no stage {stage!r}; there are {', '.join(self.stages)}")
        return [span for span in self.spans if span.stage == stage]

    def _work_s(self, stage: str) -> float:
        return sum(span.end_s - span.start_s for span in self._of(stage))


def predict_stages(
    times_s: Mapping[str, float | Sequence[float]], *, batches: int = 12, depth: int = 2
) -> Timeline:
    """Compute who works when, if each stage takes the given time for a batch.

    Args:
        times_s: stage -> seconds for a batch, or for each batch.
        batches: number of them.
        depth: batches that fit into the queue between two stages; 0 for no overlap at all, one
            batch through all stages before the next begins.

    Raises:
        ValueError: no stage, a time below 0, too few times, or a depth below 0.

    >>> predict_stages({"prepare": 2.0, "train": 3.0}, batches=4, depth=2).total_s
    14.0
    >>> predict_stages({"prepare": 2.0, "train": 3.0}, batches=4, depth=0).total_s
    20.0
    """
    _need(times_s, batches, depth)
    times = {name: _each(name, value, batches) for name, value in times_s.items()}
    names = list(times)
    starts = {name: [0.0] * batches for name in names}
    left = {name: [0.0] * batches for name in names}  # when it has handed the batch on
    for k in range(batches):
        for place, name in enumerate(names):
            arrives = left[names[place - 1]][k] if place else 0.0
            free = left[name if depth else names[-1]][k - 1] if k else 0.0
            starts[name][k] = start = max(arrives, free)
            left[name][k] = start + times[name][k]
            if depth and k >= depth and name != names[-1]:  # the queue has room when one is taken
                left[name][k] = max(left[name][k], starts[names[place + 1]][k - depth])
    spans = (
        Span(name, k, starts[name][k], starts[name][k] + times[name][k])
        for name in names
        for k in range(batches)
    )
    return Timeline(tuple(names), tuple(spans))


def run_stages(
    work: Mapping[str, float | Sequence[float] | Callable[[], object]],
    *,
    batches: int = 12,
    depth: int = 2,
) -> Timeline:
    """Run the stages in threads of their own, with real queues between them, and measure.

    Args:
        work: stage -> what it does for a batch: a callable, or seconds (for a batch, or for each)
            that it waits, as a program waits for a GPU or a disk.
        batches, depth: as in :func:`predict_stages`.

    Raises:
        ValueError: as in :func:`predict_stages`.
        Exception: whatever a stage raises.
    """
    _need(work, batches, depth)
    steps = {name: _step(name, what, batches) for name, what in work.items()}
    spans: dict[str, list[Span]] = {name: [] for name in steps}
    begin = perf_counter()

    def one(name: str, k: int) -> None:
        start = perf_counter() - begin
        steps[name](k)
        spans[name].append(Span(name, k, start, perf_counter() - begin))

    if depth:
        _in_threads(list(steps), one, batches, depth)
    else:
        for k in range(batches):
            for name in steps:
                one(name, k)
    return Timeline(tuple(steps), tuple(span for name in steps for span in spans[name]))


def _in_threads(
    names: Sequence[str], one: Callable[[str, int], None], batches: int, depth: int
) -> None:
    queues: list[queue.Queue[bool]] = [queue.Queue(depth) for _ in names[1:]]
    errors: list[BaseException] = []

    def stage(place: int) -> None:
        for k in range(batches):
            going = queues[place - 1].get() if place else True
            try:
                if going and not errors:
                    one(names[place], k)
            except BaseException as error:  # the stage's own, SystemExit as well
                errors.append(error)
            if place < len(queues):  # also after an error, so that nobody waits for ever
                queues[place].put(not errors)

    places = range(len(names))
    threads = [threading.Thread(target=stage, args=(place,), daemon=True) for place in places]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def _step(name: str, what: object, batches: int) -> Callable[[int], object]:
    if callable(what):
        return lambda k: what()
    times = _each(name, what, batches)
    return lambda k: sleep(times[k])


def _need(stages: Mapping[str, object], batches: int, depth: int) -> None:
    if not stages:
        raise ValueError("there is no stage: give a dict such as {'prepare': 0.01, 'train': 0.02}")
    whole_number("batches", batches, 1)
    whole_number("depth", depth, 0)


def _each(name: str, times: object, batches: int) -> list[float]:
    try:
        one = isinstance(times, Real) or not hasattr(times, "__len__")
        found = [float(times)] * batches if one else [*map(float, times)]
    except (TypeError, ValueError):
        raise ValueError(
            f"stage {name!r} must take seconds, or a list of seconds, got {times!r}"
        ) from None
    if len(found) != batches:
        raise ValueError(f"stage {name!r} has {len(found)} times for {batches} batches")
    if any(not 0 <= time < math.inf for time in found):
        raise ValueError(f"stage {name!r} must take finite seconds, 0 or more, got {times!r}")
    return found
