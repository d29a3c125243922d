"""What is known about a step before anything is concluded? Facts alone; the rules read them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

from dlhelpers.findings import Finding
from dlhelpers.profiling.dataflow import Dataflow
from dlhelpers.profiling.loaders import LoaderCosts
from dlhelpers.profiling.outside import Outside, outside_of_models
from dlhelpers.profiling.phases import PHASES, find_phases
from dlhelpers.profiling.program_lines import ProgramLines
from dlhelpers.profiling.repeats import Repeat
from dlhelpers.profiling.sampling import Line
from dlhelpers.profiling.trace import Trace
from dlhelpers.profiling.watching import Loader, ModelCalls
from dlhelpers.tables import duration, figures

__all__ = ["Bottleneck", "Seen", "Speedup", "Trial"]

Trial = Callable[[], Any] | None  # None where it cannot be run
Speedup = Callable[[Trial, Trial], float]  # how many times as fast the second one is

_MOST_SPEEDUP = 100.0  # what is left of a step is not known better than to a hundredth of it


@dataclass(frozen=True)
class Bottleneck(Finding):
    """A finding about time or memory, with what its remedy is expected to bring.

    Attributes:
        saves_ms: of a step; measured with the remedy, or where ``is_estimated`` all that goes away
            with the cause, a call in place of the many left out.
        speedup: time of a step before / after, by Amdahl's law from ``saves_ms``; 100 where next to
            nothing is left.
        saves_bytes: of memory: a step, or its peak.
        notebook: of the course, that treats it.
        is_estimated: whether the gain was not measured on the step itself. Where no remedy could
            be tried it is a sum over what was recorded, which sees neither caches nor the kernel
            that does the work instead. It is told as "about", and only what was tried is promised.
        is_of_part: whether the remedy was tried on the part that it replaces, a model or a loop,
            and the step's gain follows from that by Amdahl's law.
        besides: what the remedy brings beside time and bytes, in words.
    """

    saves_ms: float = 0.0
    speedup: float = 1.0
    saves_bytes: int = 0
    notebook: str = ""
    is_estimated: bool = False
    is_of_part: bool = False
    besides: str = ""

    @property
    def gain(self) -> str:
        """What to expect, in words."""
        parts = []
        if self.saves_ms > 0:
            about = "about " * self.is_estimated
            tried = ", tried on this part alone" if self.is_of_part else ", not tried"
            faster = f"{about}{self.speedup:.2f} times as fast"
            if self.speedup > 0.999 * _MOST_SPEEDUP:
                faster = "next to nothing of it is left"
            parts.append(
                f"{about}{duration(self.saves_ms / 1e3)} a step: {faster}" + tried * bool(about)
            )
        if self.saves_bytes >= 2**16:
            parts.append(f"{figures(self.saves_bytes / 2**20)} MiB less memory")
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
        trained: ids of the parameters of the optimizers that made a step.
        graph_nodes: nodes of autograd's graphs that are alive after each of some steps.
        lines: of the program, where the step was seen.
        cores: that this process may use.
        flow: which of the calls and operators need each other; None where that was not looked at.
        tried: remedies that were tried and brought nothing, as code.
        step: the program's own, to try remedies on; None where there is none.
        starts, fetches, ends: iterators that a step makes of the loader, batches that it takes,
            and epochs that it ends.
        optimizers: those that made a step, each with the ids of its parameters that had a dense
            gradient, or None where it had another kind as well.
        anomaly: whether autograd's anomaly detection was on.
        repeats: calls of models that repeat another one.
        tensors: bytes of the tensors that are alive after each of some steps.
        kept_where: what holds those that are new, in words.
        least_ms: the shortest step without the profiler; 0 where only ``step_ms`` is known.
        thread_ms: of the processor, that the thread of a step takes for it, at least; 0 where that
            is not known.
    """

    trace: Trace
    step_ms: float
    loader: Loader | None = None
    costs: LoaderCosts | None = None
    calls: Sequence[ModelCalls] = ()
    trained: frozenset[int] = frozenset()
    graph_nodes: Sequence[int] = ()
    lines: ProgramLines = field(default_factory=ProgramLines)
    cores: int = 1
    flow: Dataflow | None = None
    tried: list[str] = field(default_factory=list)
    step: Trial = None
    starts: float = 0.0
    fetches: float = 0.0
    ends: float = 0.0
    optimizers: Sequence[tuple[Any, frozenset[int] | None]] = ()
    anomaly: bool = False
    repeats: Sequence[Repeat] = ()
    tensors: Sequence[int] = ()
    kept_where: str = ""
    least_ms: float = 0.0
    thread_ms: float = 0.0

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
        elsewhere = self.outside.ms + self.outside.loop_backward_ms
        return max(0.0, self.ms("forward", "copies", "backward") - elsewhere)

    def calls_ms(self, calls: ModelCalls) -> float:
        """Return milliseconds of a step in one of its models, by its share of forward."""
        whole = sum(each.seconds for each in self.calls)
        return self.model_ms * (calls.seconds / whole if whole else 1.0)

    @property
    def loop_ms(self) -> float:
        """Milliseconds of a step that go away with what it repeats outside models.

        Operators, the Python before them and their part of backward, but for one turn of many; on a
        GPU no more than the kernels of the loop and the time that the GPU waits.
        """
        turns = min(self.outside.turns, self.loop_at_once)
        return self._repeated_ms(self.outside.loop_ms, turns)

    @property
    def items_ms(self) -> float:
        """Milliseconds of a step that go away where one number is taken out in place of many."""
        return self._repeated_ms(self.outside.item_ms, self.outside.items)

    @property
    def item_loop_ms(self) -> float:
        """The same with what comes again and again between two of these numbers."""
        return self._repeated_ms(self.outside.item_loop_ms, self.outside.items)

    def _repeated_ms(self, of_step_ms: float, turns: float) -> float:
        found = of_step_ms * (1 - 1 / max(1.0, turns))
        at_most = self.outside.loop_gpu_ms + self.gpu_idle_ms
        return min(found, at_most) if self.trace.gpu else found

    @property
    def loop_line(self) -> Line:
        """The program's line where most operators are called again and again outside models."""
        line, known = self.lines.outside_line, self.flow.loops if self.flow else {}
        return line if line in known or not known else max(known, key=lambda at: known[at].count)

    @property
    def loop_at_once(self) -> float:
        """Turns of the loop at this line that need no other of them; infinite where not known."""
        found = self.flow.loops.get(self.loop_line) if self.flow else None
        return found.at_once if found else float("inf")

    @property
    def gpu_idle_ms(self) -> float:
        """Milliseconds of a step in which the GPU does nothing."""
        return self.step_ms * (1 - self.trace.gpu_busy_us / self.trace.wall_us)

    @property
    def shortest_ms(self) -> float:
        """Milliseconds of the shortest step, or of the processor where its thread took less."""
        least = self.least_ms or self.step_ms
        return min(least, self.thread_ms or least)

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
        return outside_of_models(self.trace, self.step_ms, self.least_ms)

    @property
    def python_ms(self) -> float:
        """Milliseconds of a step in Python, or C of its, outside models and torch's operators."""
        recorded = self.outside.ms * (1 - self.outside.in_operators)  # and what recording takes
        return min(recorded, self.at_most_outside_ms)

    @property
    def at_most_outside_ms(self) -> float:
        """What of a step can be saved outside models: what was seen there, and no GPU hides."""
        seen = self.step_ms * self.lines.outside_share
        return min(seen, self.gpu_idle_ms) if self.trace.gpu else seen

    @property
    def kept_nodes(self) -> int:
        """Nodes of graphs that each step leaves behind, if every one of them does; else 0."""
        return _growth(self.graph_nodes)

    @property
    def kept_tensor_bytes(self) -> int:
        """Bytes of tensors that each step leaves behind, if every one of them does; else 0."""
        return _growth(self.tensors)

    @property
    def kept_bytes(self) -> int:
        """Bytes that each recorded step allocates and does not free; the median over the steps."""
        nets = sorted(
            sum(nbytes for when, nbytes in self.trace.allocated if start <= when <= end)
            for start, end in self.trace.steps
        )
        return max(0, nets[len(nets) // 2])

    def note_failure(self, remedy: str, error: Exception) -> None:
        """Note that the program raised while a remedy was tried."""
        why = f"{type(error).__name__}: {error}".removesuffix(": ")
        self.tried.append(f"{remedy} ({why})")

    def finding(
        self, name: str, *, saves_ms: float = 0.0, severity: str = "suspicion", **told: object
    ) -> Bottleneck:
        """Make a finding whose speedup follows from what is saved."""
        told["is_estimated"] = bool(told.get("is_estimated") or told.get("is_of_part"))
        left = max(self.step_ms - saves_ms, self.step_ms / _MOST_SPEEDUP)
        return Bottleneck(name, severity, saves_ms=saves_ms, speedup=self.step_ms / left, **told)  # type: ignore[arg-type]


def _growth(counts: Sequence[int]) -> int:
    """Return by how much each count exceeds the one before, at least; 0 where one does not."""
    grown = (later - former for former, later in pairwise(counts))
    return max(0, min(grown, default=0))
