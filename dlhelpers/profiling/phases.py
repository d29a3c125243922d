"""Which phase of a training step takes the time? Each moment belongs to exactly one phase.

The DataLoader, the optimizer and autograd leave labels in torch's record; a moment of the thread
that called the step belongs to the innermost of these labels that covers it. What no label covers
is the forward pass, Python's time included, save copies that the step itself asks for and waiting
for the GPU. The shares are exclusive, so they add up to the time of the steps.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from dlhelpers.profiling.trace import BACKWARD, Event, Trace

__all__ = ["PHASES", "Span", "find_phases", "phase_spans"]

PHASES = ("data loading", "copies", "forward", "backward", "optimizer", "waiting for the GPU")
_COPIES = {"aten::to", "aten::_to_copy", "aten::copy_", "aten::contiguous", "aten::clone",
           "aten::pin_memory"}  # fmt: skip
_WAITS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize")


@dataclass(frozen=True)
class Span:
    """A stretch of one step that belongs to one phase.

    Attributes:
        start_us, end_us: when.
        phase: one of ``PHASES``.
    """

    start_us: float
    end_us: float
    phase: str


def find_phases(trace: Trace) -> dict[str, float]:
    """Return phase -> milliseconds a step, on average over the steps, in the order of ``PHASES``.

    Phases that do not occur are left out, ``forward`` excepted.
    """
    sums = dict.fromkeys(PHASES, 0.0)
    for span in phase_spans(trace):
        sums[span.phase] += span.end_us - span.start_us
    per_step = {name: us / 1e3 / len(trace.steps) for name, us in sums.items()}
    return {name: ms for name, ms in per_step.items() if ms > 0 or name == "forward"}


def phase_spans(trace: Trace) -> tuple[Span, ...]:
    """Return the phases in order of time; they cover each step without gap or overlap."""
    labelled = [*_labels(trace.on()), *_backward_spans(trace)]
    return tuple(span for start, end in trace.steps for span in _innermost(labelled, start, end))


def _labels(events: Sequence[Event]) -> list[Span]:
    """Return what the events of the calling thread say by themselves, all but backward."""
    found: list[Span] = []
    inside_until = float("-inf")  # end of the outermost operator so far
    for event in events:
        outermost = event.kind == "operator" and event.start_us >= inside_until
        if outermost:
            inside_until = event.end_us
        if phase := _phase_of(event, outermost):
            found.append(Span(event.start_us, event.end_us, phase))
    return found


def _phase_of(event: Event, outermost: bool) -> str:
    if event.kind == "mark":
        if event.name.startswith("enumerate(DataLoader)"):
            return "data loading"
        if event.name.startswith("Optimizer."):
            return "optimizer"
        return event.name if event.name in PHASES else ""
    if event.name in _WAITS:
        return "waiting for the GPU"
    return "copies" if outermost and event.name in _COPIES else ""


def _backward_spans(trace: Trace) -> list[Span]:
    """Join autograd's functions to stretches; whatever the calling thread does ends a stretch.

    On a GPU they run in a thread of their own, while the calling thread waits without an event.
    """
    merged: list[Span] = []
    own = [e for e in trace.on() if not e.name.startswith(BACKWARD)]
    own = [e for e in own if e.kind in ("operator", "mark")]
    starts = sorted([*(e.start_us for e in own), *(start for start, _ in trace.steps)])
    ends = sorted(e.end_us for e in own)
    for event in (e for e in trace.events if e.name.startswith(BACKWARD)):
        if merged:
            first, last = merged[-1].start_us, merged[-1].end_us
            begins = bisect_right(starts, event.start_us) - bisect_left(starts, last)
            stops = bisect_right(ends, event.start_us) - bisect_right(ends, last)
            if event.start_us <= last or (begins <= 0 and stops <= 0):
                merged[-1] = Span(first, max(last, event.end_us), "backward")
                continue
        merged.append(Span(event.start_us, event.end_us, "backward"))
    return merged


def _innermost(labels: Sequence[Span], start: float, end: float) -> list[Span]:
    """Cut [start, end] at the labels' ends; each piece goes to the shortest label around it."""
    inside = [
        Span(max(s.start_us, start), min(s.end_us, end), s.phase)
        for s in labels
        if s.start_us < end and s.end_us > start
    ]
    found: list[Span] = []
    stack: list[Span] = []
    now = start

    def give(until: float) -> None:
        nonlocal now
        while stack and stack[-1].end_us <= until:
            top = stack.pop()
            put(top.end_us, top.phase)
        put(until, stack[-1].phase if stack else "forward")

    def put(until: float, phase: str) -> None:
        nonlocal now
        if until <= now:
            return
        if found and found[-1].phase == phase and found[-1].end_us == now:
            found[-1] = Span(found[-1].start_us, until, phase)
        else:
            found.append(Span(now, until, phase))
        now = until

    for span in sorted(inside, key=lambda s: (s.start_us, -s.end_us)):
        give(span.start_us)
        if span.phase != "copies" or not stack:  # the loader's own copies are loading
            stack.append(span)
    give(end)
    return found
