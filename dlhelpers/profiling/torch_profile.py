"""Where does the time of a training step go? torch's record, read as phases and operators.

torch's own summary knows operators; the page that showed how long a step waits for its data went
with the TensorBoard plugin (pytorch/kineto#857, #1009), and what it reported for loaders with
workers was 0 (pytorch/kineto#610). Here the wait is the time inside the loader's ``__next__``,
with and without workers, and that in which an epoch begins or its workers end.
"""

from __future__ import annotations

import gzip
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any

from dlhelpers.arguments import need_callable, whole_number
from dlhelpers.files import write_whole
from dlhelpers.profiling.code_report import Unseen, unseen
from dlhelpers.profiling.loader_marks import loaders_marked
from dlhelpers.profiling.operators import Operator, find_operators
from dlhelpers.profiling.outside import outside_of_models
from dlhelpers.profiling.phases import find_phases, phase_spans
from dlhelpers.profiling.trace import STEP, Trace, read_trace
from dlhelpers.progress import bar
from dlhelpers.recording import need_no_recording, recording
from dlhelpers.tables import duration, html_table, text_table

__all__ = ["Operators", "TorchReport", "profile_torch"]

NEXT = {
    "data loading": "The step waits for its batch: profiling.diagnose(step) says whether for "
    "decoding, transforms or the collate, and tries workers. Notebooks 02 and 03.",
    "copies": "Tensors are converted or moved: convert once, in the loader. Notebook 03.",
    "forward": "Look at the operators below: many short ones are a loop in Python, few long ones "
    "are the network itself. Notebooks 05, 06 and 07.",
    "backward": "The gradients: freeze what is not trained, or make the network smaller. "
    "Notebooks 04 and 05.",
    "optimizer": "Updates of many small parameters: foreach=True, or fused=True. Notebook 04.",
    "waiting for the GPU": "The CPU waits: look for .item(), .cpu() and print in the step.",
}
_NEXT_IN_PYTHON = (
    "the rest is Python between them, or what it calls. profiling.sample(step) names the function, "
    "profiling.diagnose(step) the line. Notebook 08."
)


class Operators(list[Operator]):
    """Rows of operators that print and display themselves."""

    def _rows(self) -> tuple[list[str], list[list[str]]]:
        shaped = any(row.shapes for row in self)
        on_gpu = any(row.gpu_ms for row in self)
        head = ["operator", *["shapes"] * shaped, "calls", "own ms", "total ms"]
        has_flops = any(row.flops for row in self)
        head += [*["GPU ms"] * on_gpu, "MiB", *["MFLOP"] * has_flops]
        rows = [
            [
                row.name,
                *[" ".join("x".join(map(str, s)) for s in row.shapes if s)[:40]] * shaped,
                f"{row.calls:,.6g}",
                f"{row.own_ms:.3f}",
                f"{row.total_ms:.3f}",
                *[f"{row.gpu_ms:.3f}"] * on_gpu,
                f"{row.nbytes / 2**20:.2f}" if row.nbytes else "",
                *[f"{row.flops / 1e6:,.1f}" if row.flops else ""] * has_flops,
            ]
            for row in self
        ]
        return head, rows

    def __str__(self) -> str:
        return text_table(*self._rows(), names=1 + any(row.shapes for row in self))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(*self._rows(), names=1 + any(row.shapes for row in self))


@dataclass(frozen=True, repr=False)
class TorchReport:
    """Where the time of the steps went; shows itself as one overview.

    Attributes:
        trace: the record.
        step_ms: each recorded step, by a clock of its own around the call.
        plain_ms: each of the steps before, which ran without the profiler; where there is a GPU,
            which steps wait for at the end alone, their mean.
        not_seen: processor time of other threads and of worker processes, which is in no phase.
        recorded_ms: a recorded step on average, the work that it leaves to a GPU with it.
    """

    trace: Trace = field(repr=False)
    step_ms: tuple[float, ...]
    plain_ms: tuple[float, ...]
    not_seen: Unseen
    recorded_ms: float = 0.0
    session: Any = field(repr=False, compare=False, default=None)

    @cached_property
    def phases(self) -> dict[str, float]:
        """Phase -> ms a step; exclusive, so they add up to the step."""
        return find_phases(self.trace)

    @cached_property
    def shares(self) -> dict[str, float]:
        """Phase -> its share of the step, 0 to 1."""
        whole = sum(self.phases.values()) or 1.0
        return {name: ms / whole for name, ms in self.phases.items()}

    @property
    def overhead(self) -> float:
        """How many times as long a step takes under the profiler as without."""
        took = self.recorded_ms if self.trace.gpu else statistics.median(self.step_ms)
        return took / statistics.median(self.plain_ms)

    @property
    def gpu_busy(self) -> float | None:
        """Share of the steps' time in which the GPU works; None where nothing ran on one."""
        if not self.trace.gpu:
            return None
        return self.trace.gpu_busy_us / self.trace.wall_us

    @property
    def what_to_do(self) -> str:
        """The largest phase, and where to go on."""
        name = max(self.shares, key=self.shares.__getitem__)
        told = f"The largest part is {name}, {self.shares[name]:.0%}. "
        covered = outside_of_models(self.trace, 1.0).in_operators  # without marks: of all forward
        if name == "forward" and covered < 0.5:
            return told + f"Operators are {covered:.0%} of it: {_NEXT_IN_PYTHON}"
        return told + NEXT[name]

    def operators(self, top: int = 20, by: str = "own", *, by_shape: bool = False) -> Operators:
        """Return the longest operators, each number for one step.

        Args:
            top: how many.
            by: ``own``, ``total`` or ``gpu`` time, ``calls``, ``nbytes`` or ``flops``.
            by_shape: a row for each shape of the inputs.

        Raises:
            ValueError: another ``by``, or top below 1.
        """
        keys = {"own": "own_ms", "total": "total_ms", "gpu": "gpu_ms"}
        keys |= {name: name for name in ("calls", "nbytes", "flops")}
        if by not in keys:
            raise ValueError(f"by must be one of {', '.join(keys)}, got {by!r}")
        top = whole_number("top", top, 1)
        rows = find_operators(self.trace, by_shape=by_shape)
        return Operators(sorted(rows, key=lambda row: -getattr(row, keys[by]))[:top])

    def kernels(self, top: int = 20) -> Operators:
        """Return the GPU's kernels and copies that take longest; empty where none ran.

        Raises:
            ValueError: top is below 1.
        """
        top = whole_number("top", top, 1)
        sums: dict[str, list[float]] = {}
        for event in self.trace.gpu:
            found = sums.setdefault(event.name, [0.0, 0.0])
            found[0] += 1
            found[1] += event.us / 1e3
        n = len(self.trace.steps)
        rows = [
            Operator(name, (), calls / n, 0.0, 0.0, gpu_ms=ms / n)
            for name, (calls, ms) in sums.items()
        ]
        return Operators(sorted(rows, key=lambda row: -row.gpu_ms)[:top])

    def overview(self) -> Any:
        """Draw where the time goes: the phases of the CPU, and the GPU's busy and idle time."""
        from dlhelpers import drawing

        rows = {"CPU": self.phases}
        if self.gpu_busy is not None:
            busy = self.trace.gpu_busy_us / 1e3 / len(self.trace.steps)
            rows["GPU"] = {"busy": busy, "idle": sum(self.phases.values()) - busy}
        name = max(self.shares, key=self.shares.__getitem__)
        return drawing.shares(rows, title=f"The largest part of a step is {name}")

    def timeline(self, steps: int = 3) -> Any:
        """Draw the first steps: the phases of the calling thread, other threads, the GPU."""
        from dlhelpers import drawing

        steps = whole_number("steps", steps, 1)
        end = self.trace.steps[:steps][-1][1]
        lanes = {
            "calling thread": [
                (s.start_us / 1e3, s.end_us / 1e3, s.phase)
                for s in phase_spans(self.trace)
                if s.start_us < end
            ]
        }
        for event in self.trace.events:
            if event.start_us >= end or (not event.on_gpu and event.thread == self.trace.thread):
                continue
            lane = f"GPU, stream {event.thread}" if event.on_gpu else f"thread {event.thread}"
            kind = {"kernel": "kernels", "copy": "copies"}.get(event.kind, "operators")
            span = event.start_us / 1e3, event.end_us / 1e3, kind
            lanes.setdefault(lane, []).append(span)
        marks = [stop / 1e3 for _, stop in self.trace.steps[:steps]]
        return drawing.lanes(lanes, title="What each step does when", marks=marks)

    def save(self, path: str | Path) -> Path:
        """Write the record for https://ui.perfetto.dev; return the path.

        The file, ``.json`` or ``.json.gz``, appears whole or not at all.

        Raises:
            ValueError: another suffix, or a report that was not made by ``profile_torch``.
            FileNotFoundError: there is no such folder.
        """
        if self.session is None:
            raise ValueError("this report holds no record to save: make it by profile_torch")

        def write(name: str) -> None:
            record = self._record
            Path(name).write_bytes(gzip.compress(record) if name.endswith(".gz") else record)

        return write_whole(path, (".json", ".json.gz"), write)

    @cached_property
    def _record(self) -> bytes:
        """torch's own file of the record, which the session gives once."""
        with tempfile.TemporaryDirectory(prefix="dlhelpers-") as folder:
            file = Path(folder) / "trace.json"
            self.session.export_chrome_trace(str(file))
            return file.read_bytes()

    def __str__(self) -> str:
        step = statistics.mean(self.step_ms)
        lines = [
            f"{len(self.step_ms)} steps of {duration(step / 1e3)}; {self.overhead:.2f} times as "
            "long as without the profiler",
            *(f"  {n:<19} {ms:9.3f} ms  {self.shares[n]:6.1%}" for n, ms in self.phases.items()),
        ]
        if self.gpu_busy is not None:
            lines.append(f"  the GPU is busy for {self.gpu_busy:.1%} of the time")
        lines += [str(self.not_seen)] if str(self.not_seen) else []
        return "\n".join([*lines, str(self.operators(10)), self.what_to_do])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        import html

        from dlhelpers.drawing.style import picture

        step = statistics.mean(self.step_ms)
        head = (
            f"{len(self.step_ms)} steps of {duration(step / 1e3)} under the profiler, "
            f"{self.overhead:.2f} times as long as without. {self.not_seen}"
        )
        return (
            f"<p>{html.escape(head)}</p>{picture(self.overview())}"
            f"{self.operators(8)._repr_html_()}<p><b>What to do.</b> "
            f"{html.escape(self.what_to_do)}</p>"
        )


def profile_torch(
    fn: Callable[[], Any],
    steps: int = 5,
    *,
    warmup: int = 2,
    progress: bool | None = None,
) -> TorchReport:
    """Run a step several times under ``torch.profiler``; return where its time went.

    First come ``warmup`` steps that nobody times, then as many as ``steps`` without the profiler,
    then one that it warms up on, then those that are recorded. So ``fn`` is called
    ``warmup + 2 * steps + 1`` times.

    Args:
        fn: one training step, which fetches its own batch, as in ``x, y = next(batches)`` over
            ``batches = iter(loader)``. What another loader than torch's takes is counted as data
            loading inside ``with torch.profiler.record_function("data loading"):``; the names of
            all ``PHASES`` work so.
        steps: how many are recorded.
        warmup: how many run before.
        progress: a bar on long runs; None draws it in a terminal only.

    Returns:
        A report with phases that add up, operators, and on CUDA the GPU's share. Phases are of
        the thread that calls ``fn``: of worker processes and other threads it says how much
        processor time they used meanwhile.

    Raises:
        TypeError: fn cannot be called.
        ValueError: steps or warmup is off, or the loader ended before a step was recorded.
        RuntimeError: torch's profiler is at work already.

    >>> import torch
    >>> model, x = torch.nn.Linear(64, 64), torch.zeros(32, 64)
    >>> report = profile_torch(lambda: model(x).sum().backward(), steps=2, warmup=1)
    >>> sorted(report.phases)
    ['backward', 'forward']
    """
    need_callable(fn)
    steps = whole_number("steps", steps, 1)
    warmup = whole_number("warmup", warmup, 0)
    return record_steps(fn, steps, warmup, progress=progress)


def record_steps(
    fn: Callable[[], Any],
    steps: int,
    warmup: int,
    *,
    on_record: Callable[[], Any] | None = None,
    clock: Callable[[], float] = perf_counter,
    progress: bool | None = None,
) -> TorchReport:
    """Do what :func:`profile_torch` promises; ``on_record`` is called when recording begins."""
    import torch
    from torch.profiler import ProfilerActivity, schedule

    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]
    plain: list[float] = []
    recorded: list[float] = []
    total = warmup + 2 * steps + 1
    with bar(total=total, desc="steps", progress=progress, leave=False, delay=1) as shown:

        def timed() -> float:
            begin = clock()
            fn()
            took = clock() - begin
            shown.update()
            return 1000 * took

        def catch_up() -> None:
            if on_gpu:
                torch.cuda.synchronize()

        need_no_recording("profile_torch")
        try:
            for _ in range(warmup):
                timed()
            catch_up()
            begin = clock()
            plain += [timed() for _ in range(steps)]
            if on_gpu:  # a step returns before its kernels have run
                catch_up()
                plain = [1000 * (clock() - begin) / steps] * steps
            options = {"record_shapes": True, "profile_memory": True, "with_flops": True}
            options["schedule"] = schedule(wait=0, warmup=1, active=1, repeat=1)
            with recording("profile_torch", activities=activities, **options) as session:
                timed()
                catch_up()
                session.step()
                if on_record is not None:
                    on_record()
                with unseen() as not_seen, loaders_marked():
                    begin = clock()
                    _record(timed, steps, recorded)
                    catch_up()
                    recorded_s = clock() - begin
        except StopIteration:
            pass  # in a step before those that are recorded
    if not recorded:
        raise ValueError(
            f"the loader ended before a step was recorded: {total - steps} steps come before the "
            "first one that is; let fn begin the loader anew, or ask for fewer steps"
        )
    trace = read_trace(session, len(recorded))
    each_ms = 1000 * recorded_s / len(recorded)
    return TorchReport(trace, tuple(recorded), tuple(plain), not_seen, each_ms, session)


def _record(timed: Callable[[], float], steps: int, recorded: list[float]) -> None:
    from torch.profiler import record_function

    for _ in range(steps):
        try:
            with record_function(STEP):
                recorded.append(timed())
        except StopIteration:  # fewer steps then
            return
