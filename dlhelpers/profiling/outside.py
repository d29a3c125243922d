"""What does a step do outside its loader, models, backward and optimizer?"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dlhelpers.profiling.phases import Span, phase_spans
from dlhelpers.profiling.trace import MODEL, Event, Trace, union_us

__all__ = ["Outside", "outside_of_models"]

_NOTHING = {"aten::to", "aten::detach"}  # unless they call what does the work


@dataclass(frozen=True)
class Outside:
    """What a step does outside the loader, the models, backward and the optimizer.

    Attributes:
        ms: how long, on the clock without the profiler.
        in_operators: share of it inside torch's operators; the rest is Python's.
        operators: outermost operators a step.
        commonest: (name, calls a step) of the most frequent of these.
        items: numbers a step that are taken out of tensors (``.item()``, ``float``, ``if``).
    """

    ms: float
    in_operators: float
    operators: float
    commonest: tuple[str, float]
    items: float


def outside_of_models(trace: Trace, step_ms: float) -> Outside:
    """Sum what lies outside; a trace without marks of models has all of forward outside."""
    events = trace.on()
    models = [(e.start_us, e.end_us) for e in events if e.kind == "mark" and e.name == MODEL]
    spans = [s for s in phase_spans(trace) if s.phase in ("forward", "copies")]
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
    counts: dict[str, int] = {}
    for number, event in enumerate(tops):
        if event.name not in _NOTHING or number in parents:
            counts[event.name] = counts.get(event.name, 0) + 1
    name = max(counts, key=counts.__getitem__, default="")
    n = len(trace.steps)
    in_operators = sum(event.us for event in tops)
    return Outside(
        ms=step_ms * own / trace.wall_us if trace.wall_us else 0.0,
        in_operators=min(1.0, in_operators / own) if own else 0.0,
        operators=len(tops) / n,
        commonest=(name, counts.get(name, 0) / n),
        items=sum(event.name == "aten::_local_scalar_dense" for event in operators) / n,
    )


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
