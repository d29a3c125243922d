"""Which operators take the time of a step? Own times, which add up; calls, bytes, FLOPs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from dlhelpers.profiling.trace import Event, Trace

__all__ = ["Operator", "find_operators", "own_times"]


@dataclass(frozen=True)
class Operator:
    """One operator, or label, over all its calls; every number is for one step on average.

    Attributes:
        name: such as ``aten::conv2d``.
        shapes: of its inputs where the table was asked for them, else empty.
        calls: how often it was called.
        own_ms: time in it and in no operator that it called, on the CPU.
        total_ms: time in it, on the CPU; a call inside itself counts once.
        gpu_ms: time of the kernels that it launched itself.
        nbytes: bytes that it allocated itself, on whatever device, freed ones not subtracted.
        flops: floating-point operations, by torch's formulas; 0 where torch has none.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    calls: float
    own_ms: float
    total_ms: float
    gpu_ms: float = 0.0
    nbytes: float = 0.0
    flops: float = 0.0


def find_operators(trace: Trace, *, by_shape: bool = False) -> tuple[Operator, ...]:
    """Return the operators of the calling thread and of autograd's, the longest own time first.

    Args:
        trace: of some steps.
        by_shape: a row for each operator and shapes of its inputs, not for each operator.
    """
    sums: dict[tuple, list[float]] = defaultdict(lambda: [0.0] * 6)
    on_gpu: dict[int, float] = defaultdict(float)
    for event in trace.gpu:
        on_gpu[event.id] += event.us
    for thread in {e.thread for e in trace.events if not e.on_gpu}:
        events = trace.on(thread)
        owns, outermost = own_times(events)
        allocated = _allocated(events, trace) if thread == trace.thread else {}
        for place, (event, own) in enumerate(zip(events, owns, strict=True)):
            key = event.name, event.shapes if by_shape else ()
            found = sums[key]
            for i, value in enumerate((
                1, own, event.us if outermost[place] else 0.0,
                on_gpu.pop(event.id, 0.0) if event.kind == "operator" else 0.0,
                allocated.get(place, 0), event.flops,
            )):  # fmt: skip
                found[i] += value
    n = len(trace.steps)
    rows = (
        Operator(name, shapes, c / n, o / 1e3 / n, t / 1e3 / n, g / 1e3 / n, b / n, f / n)
        for (name, shapes), (c, o, t, g, b, f) in sums.items()
    )
    return tuple(sorted(rows, key=lambda row: (-row.own_ms - row.gpu_ms, row.name)))


def own_times(events: Sequence[Event]) -> tuple[list[float], list[bool]]:
    """Return for each event its microseconds outside its children, and whether it is outermost.

    Args:
        events: of one thread, nested, in order of start and a longer one first.

    Outermost is an event that lies inside no other one of its name.
    """
    own = [event.us for event in events]
    outermost = [True] * len(events)
    stack: list[int] = []
    for place, event in enumerate(events):
        while stack and events[stack[-1]].end_us <= event.start_us:
            stack.pop()
        if stack:
            own[stack[-1]] -= event.us
            outermost[place] = all(events[i].name != event.name for i in stack)
        stack.append(place)
    return own, outermost


def _allocated(events: Sequence[Event], trace: Trace) -> dict[int, int]:
    """Give the bytes of each allocation to the innermost event that was at work then."""
    found: dict[int, int] = defaultdict(int)
    stack: list[int] = []
    place = 0
    for when, nbytes in trace.allocated:
        while place < len(events) and events[place].start_us <= when:
            while stack and events[stack[-1]].end_us <= events[place].start_us:
                stack.pop()
            stack.append(place)
            place += 1
        while stack and events[stack[-1]].end_us < when:
            stack.pop()
        if stack and nbytes > 0:
            found[stack[-1]] += nbytes
    return found
