"""What does a step do outside its loader, models, backward and optimizer?

What it does there again and again is a loop. All that follows from a loop goes away with it:

    its operators + the Python before each of them + the nodes of autograd's graph that they make

An operator and its node share a sequence number in torch's record. The profiler takes some time for
each event; what all events of the steps took beyond steps without it is taken off in equal parts.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dlhelpers.profiling.phases import Span, phase_spans
from dlhelpers.profiling.trace import BACKWARD, MODEL, Event, Trace, union_us

__all__ = ["Outside", "outside_of_models"]

_NOTHING = {"aten::to", "aten::detach"}  # unless they call what does the work
_OFTEN = 0.1  # of the calls of the commonest operator: what a loop does in some of its turns


@dataclass(frozen=True)
class Outside:
    """What a step does outside the loader, the models, backward and the optimizer.

    Attributes:
        ms: how long, on the clock without the profiler.
        in_operators: share of it inside torch's operators; the rest is Python's.
        operators: outermost operators a step.
        commonest: (name, calls a step) of the most frequent of these.
        items: numbers a step that are taken out of tensors (``.item()``, ``float``, ``if``).
        loop_ms: of ``ms``, in operators that are called again and again and the Python before them.
        loop_backward_ms: milliseconds of backward in the nodes that these operators made.
        loop_gpu_ms: milliseconds of the GPU in the kernels that these operators launched.
    """

    ms: float
    in_operators: float
    operators: float
    commonest: tuple[str, float]
    items: float
    loop_ms: float = 0.0
    loop_backward_ms: float = 0.0
    loop_gpu_ms: float = 0.0


def outside_of_models(trace: Trace, step_ms: float) -> Outside:
    """Sum what lies outside; a trace without marks of models has all of forward outside."""
    events = trace.on()
    models = [(e.start_us, e.end_us) for e in events if e.kind == "mark" and e.name == MODEL]
    phases = phase_spans(trace)
    spans = [s for s in phases if s.phase in ("forward", "copies")]
    own = sum(
        s.end_us - s.start_us - union_us(models, s.start_us, s.end_us) for s in spans
    )  # spans do not overlap
    inside = _lies_inside(spans, models)
    operators = [e for e in events if e.kind == "operator" and inside(e)]
    tops, parents, reached = [], set(), float("-inf")
    for event in operators:
        if event.start_us >= reached:
            tops.append(event)
            reached = event.end_us
        else:
            parents.add(len(tops) - 1)
    tops_that_work = [
        event
        for number, event in enumerate(tops)
        if event.name not in _NOTHING or number in parents
    ]
    counts: dict[str, int] = {}
    for event in tops_that_work:
        counts[event.name] = counts.get(event.name, 0) + 1
    name = max(counts, key=counts.__getitem__, default="")
    n = len(trace.steps)
    in_operators = sum(event.us for event in tops)
    ms = step_ms * own / trace.wall_us if trace.wall_us else 0.0
    often = {key for key, count in counts.items() if count >= max(4 * n, _OFTEN * counts[name])}
    loop = [event for event in tops_that_work if event.name in often]
    clock = _Clock(trace, events, step_ms)
    edges = sorted([*(end for s in spans for end in (s.start_us, s.end_us)), *sum(models, ())])
    loop_us, all_us = _with_python_before(loop, edges, tops_that_work, clock)
    # the Python that ends a stretch, such as the end of what the loop made, belongs to it in part
    loop_us += loop_us / all_us * max(0.0, clock.whole(spans, models) - all_us) if all_us else 0.0
    back_us = _backward_us(trace, events, loop, [s for s in phases if s.phase == "backward"], clock)
    launched = {e.id for e in events if e.id and _covers(loop, e.start_us)}
    gpu_us = sum(e.us for e in trace.gpu if e.id in launched)
    return Outside(
        ms=ms,
        in_operators=min(1.0, in_operators / own) if own else 0.0,
        operators=len(tops) / n,
        commonest=(name, counts.get(name, 0) / n),
        items=sum(event.name == "aten::_local_scalar_dense" for event in operators) / n,
        loop_ms=loop_us / n / 1e3,
        loop_backward_ms=back_us / n / 1e3,
        loop_gpu_ms=gpu_us / n / 1e3,
    )


class _Clock:
    """Microseconds as they would be without the profiler, which takes its time for each event."""

    def __init__(self, trace: Trace, events: Sequence[Event], step_ms: float) -> None:
        self._starts = [event.start_us for event in events]
        plain_us = 1e3 * step_ms * len(trace.steps)
        self._faster = min(1.0, plain_us / trace.wall_us) if trace.wall_us else 1.0
        self._each_us = max(0.0, trace.wall_us - plain_us) / max(1, len(events))
        self._slower = max(1.0, plain_us / trace.wall_us) if trace.wall_us else 1.0

    def us(self, start: float, end: float) -> float:
        """Return how long it is from start to end."""
        count = bisect_left(self._starts, end) - bisect_left(self._starts, start)
        taken_off = end - start - self._each_us * count
        # many short events in a row cost less each than the average: half of it stays at least
        return self._slower * max(taken_off, 0.5 * self._faster * (end - start))

    def whole(self, spans: Sequence[Span], models: Sequence[tuple[float, float]]) -> float:
        """Return how long the spans are together, without the models."""
        whole = sum(self.us(s.start_us, s.end_us) for s in spans)
        starts = [span.start_us for span in spans]
        for start, end in models:
            first = max(0, bisect_right(starts, start) - 1)
            for span in spans[first : bisect_left(starts, end)]:
                low, high = max(start, span.start_us), min(end, span.end_us)
                whole -= self.us(low, high) if high > low else 0.0
        return whole


def _with_python_before(
    loop: Sequence[Event], edges: Sequence[float], tops: Sequence[Event], clock: _Clock
) -> tuple[float, float]:
    """Return the time of the loop's operators and of all, each with the gap that is before it."""
    wanted, reached, of_loop, of_all = set(map(id, loop)), float("-inf"), 0.0, 0.0
    for event in tops:
        place = bisect_right(edges, event.start_us) - 1
        begin = max(reached, edges[place]) if place >= 0 else event.start_us
        took = clock.us(min(begin, event.start_us), event.end_us)
        of_all += took
        of_loop += took if id(event) in wanted else 0.0
        reached = event.end_us
    return of_loop, of_all


def _backward_us(
    trace: Trace,
    events: Sequence[Event],
    loop: Sequence[Event],
    spans: Sequence[Span],
    clock: _Clock,
) -> float:
    """Return how long the nodes run that the loop's operators made, gaps in proportion."""
    # operators that make no node bear the number of the next one that does: the last is its maker
    made = {e.sequence: e for e in events if e.sequence >= 0 and not e.name.startswith(BACKWARD)}
    nodes = [e for e in trace.events if e.name.startswith(BACKWARD)]
    owned = [e for e in nodes if e.sequence in made and _covers(loop, made[e.sequence].start_us)]
    if not owned:
        return 0.0
    whole = sum(clock.us(s.start_us, s.end_us) for s in spans)
    inner = sum(clock.us(e.start_us, e.end_us) for e in nodes)
    return sum(clock.us(e.start_us, e.end_us) for e in owned) * max(1.0, whole / (inner or 1.0))


def _covers(spans: Sequence[Event], when: float) -> bool:
    """Return whether a moment lies in one of the events; they are in order, none overlaps."""
    place = bisect_right(spans, when, key=lambda event: event.start_us) - 1
    return place >= 0 and when <= spans[place].end_us


def _lies_inside(
    spans: Sequence[Span], models: Sequence[tuple[float, float]]
) -> Callable[[Event], bool]:
    """Return whether an event begins in one of the spans and in no model; both in order."""
    starts, begins = [span.start_us for span in spans], [start for start, _ in models]

    def inside(event: Event) -> bool:
        place = bisect_right(starts, event.start_us) - 1
        if place < 0 or event.start_us >= spans[place].end_us:
            return False
        model = bisect_right(begins, event.start_us) - 1
        return model < 0 or event.start_us >= models[model][1]

    return inside
