"""What does a step do outside its loader, models, backward and optimizer?

What it does there again and again is a loop. All that follows from a loop goes away with it:

    its operators + the Python before each of them + the nodes of autograd's graph that they make

An operator and its node share a sequence number in torch's record.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import sqrt
from statistics import median

from dlhelpers.profiling.phases import Span, phase_spans
from dlhelpers.profiling.trace import BACKWARD, MODEL, Event, Trace, union_us

__all__ = ["Outside", "outside_of_models"]

_NOTHING = {"aten::to", "aten::detach"}  # unless they call what does the work
_OF_LOOPS = {"aten::unbind", "aten::stack", "aten::cat"}  # take its samples apart, or together
_DENSER = 1.005  # than the step on average: a part with more events is slowed down more
_LEAST_TURNS = 8  # of a loop over operators
_ITEMS = {"aten::item", "aten::is_nonzero", "aten::_local_scalar_dense"}
_VIEWS = {"aten::select", "aten::slice", "aten::squeeze", "aten::view", "aten::unbind"}
_OF_ONE_TURN = _OF_LOOPS | _VIEWS | {"aten::add", "aten::add_"}  # one call needs none of them
_ALIKE = 0.1  # by which the events of two equal steps may differ
_OFTEN = 0.1  # of the calls that most operators have: what a loop does in some of its turns


@dataclass(frozen=True)
class Outside:
    """What a step does outside the loader, the models, backward and the optimizer.

    Attributes:
        ms: how long, on the clock without the profiler.
        in_operators: share of it inside torch's operators; the rest is Python's.
        operators: outermost operators a step.
        commonest: (name, calls a step) of the most frequent of these.
        items: numbers a step that are taken out of tensors (``.item()``, ``float``, ``if``).
        loop_ms: milliseconds of a step in operators that are called again and again, the Python
            before them, and the nodes that they made.
        loop_backward_ms: of these, in backward.
        turns: how often a step goes through the loop: the count that most of its operators have.
        working: share of a turn's operators that neither take a sample out nor add up.
        loop_gpu_ms: milliseconds of the GPU in the kernels that these operators launched.
        others_ms: milliseconds of the shortest step outside, in all that is no loop.
        updates_ms: the same in the optimizer.
        item_ms: milliseconds of a step in taking numbers out, with the views that feed this.
        item_loop_ms: the same with all that is repeated between two numbers.
    """

    ms: float
    in_operators: float
    operators: float
    commonest: tuple[str, float]
    items: float
    loop_ms: float = 0.0
    loop_backward_ms: float = 0.0
    turns: float = 0.0
    working: float = 1.0
    loop_gpu_ms: float = 0.0
    others_ms: float = 0.0
    updates_ms: float = 0.0
    item_ms: float = 0.0
    item_loop_ms: float = 0.0


def outside_of_models(trace: Trace, step_ms: float, least_ms: float = 0.0) -> Outside:
    """Sum what lies outside; a trace without marks of models has all of forward outside.

    Args:
        trace: of the recorded steps.
        step_ms: a step without the profiler.
        least_ms: the shortest one; by default ``step_ms``.
    """
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
    again = [count for count in counts.values() if count >= _LEAST_TURNS * n]
    least = max(_LEAST_TURNS * n, _OFTEN * median(again or [0]))
    often = {key for key, count in counts.items() if count >= least}
    often |= _OF_LOOPS if often else set()
    chosen = {number for number, event in enumerate(tops_that_work) if event.name in often}
    loop = [tops_that_work[number] for number in sorted(chosen)]
    edges = sorted([*(end for s in spans for end in (s.start_us, s.end_us)), *sum(models, ())])
    nodes = [e for e in trace.events if e.name.startswith(BACKWARD)]
    ahead = [(s.start_us, s.end_us) for s in spans]
    behind = [(s.start_us, s.end_us) for s in phases if s.phase == "backward"]
    running = [(e.start_us, e.end_us) for e in nodes]
    starts = [event.start_us for event in events]

    def without_profiler(part: set[int]) -> tuple[float, float, float]:
        """Return ms of a step in some operators, the share of backward, and ms of all others."""
        turns, others = _with_python_before(tops_that_work, edges, part)
        owned = _owned(nodes, events, [tops_that_work[number] for number in sorted(part)])
        parts, of_backward, besides = [], [], []
        for begin, end in trace.steps:
            # the Python that ends a stretch, such as freeing what the loop made, is the loop's in
            # part, and so are the gaps between nodes
            step = begin, end
            outside_us = _us_in(ahead, step) - union_us(models, begin, end)
            turns_us, of_nodes = _us_in(turns, step), _us_in(owned, step)
            forward_us = turns_us * outside_us / (turns_us + _us_in(others, step) or 1.0)
            gaps = _us_in(behind, step) / (_us_in(running, step) or 1.0)
            backward_us = of_nodes * max(1.0, gaps)
            part_us = min(forward_us + backward_us, end - begin)
            of_loop = _count(starts, [s for s in turns + owned if begin <= s[0] < end])
            parts.append((end - begin, part_us, _count(starts, [(begin, end)]), of_loop))
            of_backward.append(backward_us / (part_us or 1.0))
            besides.append(outside_us - forward_us)
        least = least_ms or step_ms
        plain_ms = _plain_ms(parts, step_ms, least)
        return plain_ms, median(of_backward or [0.0]), _rest_ms(besides, trace.steps, least)

    loop_ms, of_backward, others_ms = without_profiler(chosen)
    of_items, of_item_loop = _item_chains(tops_that_work, trace.steps)
    launched = {e.id for e in events if e.id and _covers(loop, e.start_us)}
    gpu_us = sum(e.us for e in trace.gpu if e.id in launched)
    updates = [(s.start_us, s.end_us) for s in phases if s.phase == "optimizer"]
    of_updates = [_us_in(updates, step) for step in trace.steps]
    return Outside(
        ms=ms,
        in_operators=min(1.0, in_operators / own) if own else 0.0,
        operators=len(tops) / n,
        commonest=(name, counts.get(name, 0) / n),
        items=sum(event.name == "aten::_local_scalar_dense" for event in operators) / n,
        loop_ms=loop_ms,
        turns=_turns(often, counts) / n,
        working=sum(e.name not in _OF_ONE_TURN for e in loop) / len(loop) if loop else 1.0,
        loop_backward_ms=loop_ms * of_backward,
        loop_gpu_ms=gpu_us / n / 1e3,
        others_ms=others_ms,
        updates_ms=_rest_ms(of_updates, trace.steps, least_ms or step_ms),
        item_ms=without_profiler(of_items)[0] if of_items else 0.0,
        item_loop_ms=without_profiler(of_item_loop)[0] if of_items else 0.0,
    )


def _item_chains(
    tops: Sequence[Event], steps: Sequence[tuple[float, float]]
) -> tuple[set[int], set[int]]:
    """Return which operators take numbers out, with the views before them; and with their loop.

    To the loop belongs what comes between two numbers in the same order again and again.
    """
    alone, whole = set(), set()
    for begin, end in steps:
        low = bisect_left(tops, begin, key=lambda event: event.start_us)
        high = bisect_left(tops, end, key=lambda event: event.start_us)
        items = [number for number in range(low, high) if tops[number].name in _ITEMS]
        alone |= set(items)
        for number in items:
            while number > low and tops[number - 1].name in _VIEWS:
                number -= 1
                alone.add(number)
        gaps = [range(a + 1, b) for a, b in pairwise(items)]
        kinds = Counter(tuple(tops[number].name for number in gap) for gap in gaps)
        again = [gap for gap in kinds if gap and kinds[gap] >= _LEAST_TURNS - 1]
        if not again:
            continue
        for gap in gaps:
            if tuple(tops[number].name for number in gap) in again:
                whole |= set(gap)
        names, longest = set(sum(again, ())), max(map(len, again))
        for edge, away in ((items[0], -1), (items[-1], 1)):  # the first turn and the last one
            for number in range(edge + away, edge + away * (longest + 1), away):
                if not low <= number < high or tops[number].name not in names:
                    break
                whole.add(number)
    return alone, alone | whole


def _plain_ms(
    parts: Sequence[tuple[float, float, int, int]], plain_ms: float, least_ms: float
) -> float:
    """Return how long a part of a step takes without the profiler, which takes time per event.

    How much that is for all events is known from steps that ran without it. A loop has most of
    them, and what a rest of large operators takes is hardly longer under the profiler. Where the
    loop has about as many events for its time, or more, its share of the time is right as it is.

    Other programs only make a step longer: of steps that are alike the shortest rest is compared
    with the shortest step.

    Args:
        parts: microseconds of each step, those of its part, events of the step, those of the part.
        plain_ms: a step without the profiler.
        least_ms: the shortest one.
    """
    if not parts:
        return 0.0
    usual = median(part[2] for part in parts)
    alike = [part for part in parts if abs(part[2] - usual) <= _ALIKE * usual] or parts
    wall_us = min(part[0] for part in alike)
    rest_us = max(0.0, min(wall - part for wall, part, _, _ in alike))
    events = int(median(part[2] for part in alike))
    rest = events - int(median(part[3] for part in alike))
    if not wall_us or not least_ms:
        return 0.0
    share_ms = least_ms * rest_us / wall_us
    left_ms = share_ms
    if events - rest > _DENSER * events * (1 - rest_us / wall_us):
        each_ms = max(0.0, wall_us / 1e3 - least_ms) / max(1, events)
        hindered = 0.5 * each_ms * rest  # large ones are hindered less
        left_ms = min(max(share_ms, rest_us / 1e3 - hindered), 2 * share_ms)
        left_ms = min(left_ms, least_ms - 0.7 * (least_ms - share_ms))
    return plain_ms * (1 - left_ms / least_ms)


def _rest_ms(
    rest_us: Sequence[float], steps: Sequence[tuple[float, float]], least_ms: float
) -> float:
    """Return how long what is no loop takes in the shortest step without the profiler.

    No longer than under it, and no less than its share of a step whose loop that slows down: the
    geometric mean of the two.
    """
    own = [max(us, 0.0) for us in rest_us]
    shares = (us / (end - begin or 1.0) for us, (begin, end) in zip(own, steps, strict=True))
    return sqrt(min(own, default=0.0) / 1e3 * least_ms * min(shares, default=0.0))


def _us_in(stretches: Sequence[tuple[float, float]], step: tuple[float, float]) -> float:
    return sum(b - a for a, b in stretches if step[0] <= a < step[1])


def _count(starts: Sequence[float], stretches: Sequence[tuple[float, float]]) -> int:
    return sum(bisect_left(starts, end) - bisect_left(starts, begin) for begin, end in stretches)


def _turns(often: set[str], counts: dict[str, int]) -> float:
    found = Counter(counts[name] for name in often - _OF_LOOPS)
    alike = [count for count, names in found.items() if 1 < names == max(found.values())]
    return max(alike) if alike else median(found.elements()) if found else 0.0


def _with_python_before(
    tops: Sequence[Event], edges: Sequence[float], chosen: set[int]
) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """Return stretches of the operators of a loop and of all others, with the gap before each."""
    turns, others, reached = [], [], float("-inf")
    for number, event in enumerate(tops):
        place = bisect_right(edges, event.start_us) - 1
        begin = max(reached, edges[place]) if place >= 0 else event.start_us
        stretch = min(begin, event.start_us), event.end_us
        (turns if number in chosen else others).append(stretch)
        reached = event.end_us
    return turns, others


def _owned(
    nodes: Sequence[Event], events: Sequence[Event], loop: Sequence[Event]
) -> list[tuple[float, float]]:
    """Return when the nodes run that the loop's operators made."""
    # operators that make no node bear the number of the next one that does: the last is its maker
    made = {e.sequence: e for e in events if e.sequence >= 0 and not _covers(nodes, e.start_us)}
    return [
        (e.start_us, e.end_us)
        for e in nodes
        if e.sequence in made and _covers(loop, made[e.sequence].start_us)
    ]


def _covers(spans: Sequence[Event], when: float) -> bool:
    """Return whether a moment lies in one of the events; they are in order, none overlaps."""
    place = bisect_right(spans, when, key=lambda event: event.start_us) - 1
    return place >= 0 and (when < spans[place].end_us or when == spans[place].start_us)


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
