"""What did torch's profiler record? Plain events of the steps, apart from the profiler's objects.

Times are microseconds since the first step began. What lies outside every step is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch.autograd import DeviceType

__all__ = ["BACKWARD", "MODEL", "STEP", "Event", "Trace", "read_trace", "union_us"]

STEP = "dlhelpers::step"  # marks one call of the function that is profiled
BACKWARD = "autograd::engine::evaluate_function"  # begins the name of a node that runs
MODEL = "dlhelpers::model"  # marks one call of a module from outside any other module

Kind = Literal["mark", "operator", "runtime", "kernel", "copy"]


@dataclass(frozen=True)
class Event:
    """One entry of the record.

    Attributes:
        name: as torch names it, such as ``aten::conv2d``.
        start_us, end_us: when.
        thread: of the CPU, or the GPU's stream.
        kind: ``mark`` (a label of the DataLoader, the optimizer or the user), ``operator``,
            ``runtime`` (a call of CUDA's, on the CPU's side), ``kernel`` or ``copy`` (on the GPU).
        id: number by which a kernel finds the operator that launched it.
        shapes: of the operator's inputs.
        flops: floating-point operations of the operator, by torch's formulas; 0 where it has none.
        sequence: number that an operator shares with the node of autograd's graph that it makes,
            and with this node's run in backward; -1 for none.
    """

    name: str
    start_us: float
    end_us: float
    thread: int = 1
    kind: Kind = "operator"
    id: int = 0
    shapes: tuple[tuple[int, ...], ...] = ()
    flops: int = 0
    sequence: int = -1

    @property
    def us(self) -> float:
        """How long it took, in microseconds."""
        return self.end_us - self.start_us

    @property
    def on_gpu(self) -> bool:
        """Whether it ran on the GPU, not on the CPU."""
        return self.kind in ("kernel", "copy")


@dataclass(frozen=True)
class Trace:
    """The record of some steps.

    Attributes:
        events: in order of start, a longer one before those inside it.
        steps: (start, end) of each call of the step, in microseconds.
        thread: the one that called the step.
        allocated: (when in microseconds, bytes) of each allocation, and of each free, below 0.
    """

    events: tuple[Event, ...]
    steps: tuple[tuple[float, float], ...]
    thread: int = 1
    allocated: tuple[tuple[float, int], ...] = ()

    @property
    def wall_us(self) -> float:
        """Time of all steps together."""
        return sum(end - start for start, end in self.steps)

    @property
    def gpu(self) -> tuple[Event, ...]:
        """What ran on the GPU."""
        return tuple(event for event in self.events if event.on_gpu)

    @property
    def gpu_busy_us(self) -> float:
        """Time within the steps in which at least one kernel or copy ran; None of it twice."""
        gpu = [(event.start_us, event.end_us) for event in self.gpu]
        return sum(union_us(gpu, start, end) for start, end in self.steps)

    def on(self, thread: int | None = None) -> tuple[Event, ...]:
        """Return the CPU's events of one thread, by default of the one that called the step."""
        wanted = self.thread if thread is None else thread
        return tuple(e for e in self.events if not e.on_gpu and e.thread == wanted)

    def count(self, name: str) -> float:
        """Return how many events of this name a step has, on average over the steps."""
        return sum(event.name == name for event in self.events) / max(1, len(self.steps))


def union_us(spans: Iterable[tuple[float, float]], start: float, end: float) -> float:
    """Return how much of [start, end] is covered by at least one span.

    >>> union_us([(0, 4), (2, 6), (8, 20)], 1, 10)
    7
    """
    covered, reached = 0, start
    for first, last in sorted(spans):
        first, last = max(first, reached), min(last, end)
        if last > first:
            covered, reached = covered + last - first, last
    return covered


def read_trace(session: Any, keep: int | None = None) -> Trace:
    """Read the record of a ``torch.profiler.profile`` that has ended.

    Args:
        session: the profile.
        keep: how many steps to keep, from the first; None for all.

    Raises:
        ValueError: no step was recorded.
    """
    results = session.profiler.kineto_results
    named = [(event.name(), event) for event in results.events() if not _is_hidden(event)]
    marks = [event for name, event in named if name == STEP and not _is_on_gpu(event)]
    if not marks:
        raise ValueError(
            "the profiler recorded no step: it was stopped before the first one that it was to keep"
        )
    zero = min(mark.start_ns() for mark in marks)
    steps = sorted(((m.start_ns() - zero) / 1e3, (m.end_ns() - zero) / 1e3) for m in marks)
    steps = steps[:keep]
    last = steps[-1][1]
    events, allocated = [], []
    for name, event in named:
        start, end = (event.start_ns() - zero) / 1e3, (event.end_ns() - zero) / 1e3
        if end < 0 or start > last or name == STEP:
            continue
        if name == "[memory]":
            allocated.append((start, event.nbytes()))
        elif not name.startswith(("ProfilerStep", "[")):
            events.append(_event(name, event, start, end))
    return Trace(
        in_order(events), tuple(steps), marks[0].start_thread_id(), tuple(sorted(allocated))
    )


def in_order(events: Sequence[Event]) -> tuple[Event, ...]:
    """Sort by start, a longer event before those that begin with it."""
    return tuple(sorted(events, key=lambda event: (event.start_us, -event.end_us)))


def _event(name: str, event: Any, start: float, end: float) -> Event:
    if _is_on_gpu(event):
        kind: Kind = "copy" if name.startswith(("Memcpy", "Memset")) else "kernel"
        return Event(
            name, start, end, event.device_resource_id(), kind, event.linked_correlation_id()
        )
    kind = "operator"
    if name.startswith(("cuda", "cuLaunch", "hip")):
        kind = "runtime"
    elif event.is_user_annotation() or name.startswith(("enumerate(", "Optimizer.")):
        kind = "mark"
    shapes = tuple(tuple(s) for s in event.shapes() if s and isinstance(s[0], int))
    return Event(
        name, start, end, event.start_thread_id(), kind, event.correlation_id(), shapes,
        event.flops(), event.sequence_nr(),
    )  # fmt: skip


def _is_on_gpu(event: Any) -> bool:
    return event.device_type() != DeviceType.CPU


def _is_hidden(event: Any) -> bool:
    return bool(getattr(event, "is_hidden_event", bool)())
