"""What is known about a step before anything is concluded? Facts alone; the rules read them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dlhelpers.findings import Finding
from dlhelpers.profiling.loaders import LoaderCosts
from dlhelpers.profiling.phases import PHASES, Span, find_phases, phase_spans
from dlhelpers.profiling.trace import MODEL, Event, Trace, union_us
from dlhelpers.profiling.watching import Loader, ModelCalls

__all__ = ["Bottleneck", "Seen", "Speedup", "Trial"]

Trial = Callable[[], Any] | None  # None where it cannot be run
Speedup = Callable[[Trial, Trial], float]  # how many times as fast the second one is


@dataclass(frozen=True)
class Bottleneck(Finding):
    """A finding about time or memory, with what its remedy is expected to bring.

    Attributes:
        saves_ms: of a step, by measurement; what a remedy would save at most where ``at_most``.
        speedup: time of a step before / after, by Amdahl's law from ``saves_ms``.
        saves_bytes: of memory: a step, or its peak.
        notebook: of the course, that treats it.
        at_most: whether the gain is a bound, because no remedy could be tried.
        besides: what the remedy brings beside time and bytes, in words.
    """

    saves_ms: float = 0.0
    speedup: float = 1.0
    saves_bytes: int = 0
    notebook: str = ""
    at_most: bool = False
    besides: str = ""

    @property
    def gain(self) -> str:
        """What to expect, in words."""
        parts = []
        if self.saves_ms > 0:
            bound = " at most" if self.at_most else ""
            parts.append(
                f"{self.saves_ms:.3g} ms a step{bound}: {self.speedup:.2f} times as fast{bound}"
            )
        if self.saves_bytes >= 2**16:
            parts.append(f"{self.saves_bytes / 2**20:.3g} MiB less memory")
        return "; ".join(parts) or self.besides

    def details(self) -> list[tuple[str, str]]:
        """Return what a finding says, the gain and the notebook as well."""
        return [*super().details(), ("gain", self.gain), ("more", self.notebook)]


@dataclass(frozen=True)
class Seen:
    """Facts about one step of a program.

    Attributes:
        trace: of the recorded steps.
        step_ms: a step without the profiler.
        loader: that gave the batches, None where no DataLoader of torch's did.
        costs: of its parts, None without a loader or where loading takes next to no time.
        calls: of models, over all recorded steps.
        graph_nodes: nodes of autograd's graphs that are alive after each of some steps.
        hot_line: the program's own line on or below which most samples fell, as ``file.py:12``.
        hot_share: share of all samples in which that line itself was at work, 0 to 1.
        decoding_share: share of all samples in which the step itself, not its loader, decoded.
        cores: that this process may use.
    """

    trace: Trace
    step_ms: float
    loader: Loader | None = None
    costs: LoaderCosts | None = None
    calls: Sequence[ModelCalls] = ()
    graph_nodes: Sequence[int] = ()
    hot_line: str = ""
    hot_share: float = 0.0
    decoding_share: float = 0.0
    cores: int = 1

    @cached_property
    def shares(self) -> dict[str, float]:
        """Phase -> its share of the steps, 0 to 1; those that do not occur are there as 0."""
        found = find_phases(self.trace)
        whole = sum(found.values()) or 1.0
        return {name: found.get(name, 0.0) / whole for name in PHASES}

    def ms(self, *phases: str) -> float:
        """Return milliseconds of a step in these phases, on the clock without the profiler."""
        return self.step_ms * sum(self.shares[name] for name in phases)

    @property
    def model_ms(self) -> float:
        """Milliseconds of a step in its models, forward and backward."""
        return max(0.0, self.ms("forward", "copies", "backward") - self.outside.ms)

    @property
    def gpu_idle_ms(self) -> float:
        """Milliseconds of a step in which the GPU does nothing."""
        return self.step_ms * (1 - self.trace.gpu_busy_us / self.trace.wall_us)

    @property
    def steps(self) -> int:
        """How many were recorded."""
        return len(self.trace.steps)

    @property
    def samples(self) -> float:
        """How many samples go through models in a step; 0 where none was seen."""
        return max((calls.rows * calls.count / self.steps for calls in self.calls), default=0.0)

    @property
    def has_backward(self) -> bool:
        """Whether the steps compute gradients."""
        return self.shares["backward"] > 0

    @cached_property
    def outside(self) -> Outside:
        """What the step does by itself: in the forward phase, and in no model."""
        return _outside(self.trace, self.step_ms)

    @property
    def kept_nodes(self) -> int:
        """Nodes of graphs that each step leaves behind, if every one of them does; else 0."""
        pairs = zip(self.graph_nodes, self.graph_nodes[1:], strict=False)
        return max(0, min((later - former for former, later in pairs), default=0))

    @property
    def kept_bytes(self) -> int:
        """Bytes that each recorded step allocates and does not free; the median over the steps."""
        nets = sorted(
            sum(nbytes for when, nbytes in self.trace.allocated if start <= when <= end)
            for start, end in self.trace.steps
        )
        return max(0, nets[len(nets) // 2])

    def finding(
        self, name: str, *, saves_ms: float = 0.0, severity: str = "suspicion", **told: object
    ) -> Bottleneck:
        """Make a finding whose speedup follows from what is saved."""
        left = self.step_ms - min(saves_ms, 0.99 * self.step_ms)
        return Bottleneck(name, severity, saves_ms=saves_ms, speedup=self.step_ms / left, **told)  # type: ignore[arg-type]


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


def _outside(trace: Trace, step_ms: float) -> Outside:
    events = trace.on()
    models = [(e.start_us, e.end_us) for e in events if e.kind == "mark" and e.name == MODEL]
    spans = [s for s in phase_spans(trace) if s.phase in ("forward", "copies")]
    own = sum(
        s.end_us - s.start_us - union_us(models, s.start_us, s.end_us) for s in spans
    )  # spans do not overlap
    inside = _lies_inside(spans, models)
    operators = [e for e in events if e.kind == "operator" and inside(e)]
    tops, reached = [], float("-inf")
    for event in operators:
        if event.start_us >= reached:
            tops.append(event)
            reached = event.end_us
    counts: dict[str, int] = {}
    for event in tops:
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
