"""What is the bottleneck of this training loop, and what would it be worth to fix it?

Look first, then try: a few steps are recorded, rules point to what could be wasted, and its remedy
is run beside what is there, on copies. What it would save of a step is measured, or where no remedy
can be tried, the sum of all that goes away with the cause; with T ms a step and s of them saved, a
step becomes T / (T - s) times as fast (Amdahl 1967, doi:10.1145/1465482.1465560).
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable
from contextlib import suppress
from time import perf_counter, thread_time
from typing import Any

import torch
from torch import nn

from dlhelpers import machine
from dlhelpers.arguments import need_callable, whole_number
from dlhelpers.findings import Findings
from dlhelpers.profiling.dataflow import Dataflow
from dlhelpers.profiling.decoders import decoders_shown
from dlhelpers.profiling.following import cells_that_need, follow
from dlhelpers.profiling.kept import what_is_kept
from dlhelpers.profiling.loader_trials import RACED_MS
from dlhelpers.profiling.loaders import loader_costs
from dlhelpers.profiling.program_lines import program_lines
from dlhelpers.profiling.rules import LOOKED_FOR, NOT_LOOKED_FOR, RULES
from dlhelpers.profiling.rules_cuda import CUDA_RULES
from dlhelpers.profiling.sampling import take_stacks
from dlhelpers.profiling.seen import Bottleneck, Seen, Speedup
from dlhelpers.profiling.step_trials import confirmed
from dlhelpers.profiling.torch_profile import record_steps
from dlhelpers.profiling.watching import watch
from dlhelpers.recording import need_no_recording
from dlhelpers.tables import duration

__all__ = ["diagnose", "observe", "rank"]

# of two remedies that save about as much, the one that is simpler comes first
_PREFERRED = {"slow-collate": 1.2, "repeated-transforms": 1.1, "no-workers": 1.05}
_REMOVED = ("slow-collate", "repeated-transforms")
_STEPS_S = 8.0  # of steps to record, and as much without the profiler
_LOOK_MS = 3000.0  # of long steps, whose stacks one of them tells as well
_TRIED_S = 3.0  # for a remedy beside what is there
_FOLLOWED = 8  # steps: what happens in half of them is in one of these, 255 times of 256
_FOLLOWED_S, _FOLLOWED_STEPS = 1.0, 15.0  # seconds for them, and as long as so many steps take


def diagnose(
    train_step: Callable[[], Any],
    *,
    steps: int = 5,
    at_least: float = 0.05,
    progress: bool | None = None,
) -> Findings:
    """Name what a step of training, evaluation or inference wastes, the largest saving first.

    Of savings that differ little the simpler remedy comes first; what saves memory alone is last.
    The step runs about ``3 * steps + 9`` times, a short one more often, one of many seconds only
    nine times, so it trains on. Where something points to waste, its remedy is tried for a few
    seconds on copies of the model, and of what its optimizer updates. Where a remedy is compared
    with the whole step, that runs some dozens of times more, and computes what it always does. For
    remedies of a DataLoader the batches of these steps come from loaders of the same samples that
    are made for the trial: the program's own iterator stands still, and so do the random states.
    Code in place of a loop is run beside it once, on tensors of one more step. The DataLoader, the
    model and the optimizer are found while they run.

    Args:
        train_step: one step, which fetches its own batch, as in ``x, y = next(batches)``; from an
            iterator that does not end.
        steps: how many are recorded; more of them make short steps clearer.
        at_least: smallest share of a step that is worth a finding.
        progress: a bar on long runs; None draws it in a terminal only.

    Returns:
        Findings (``Bottleneck``) with evidence, remedy, place, expected gain and the notebook that
        treats it; empty, and saying so, where nothing above ``at_least`` was found.

    Raises:
        TypeError: train_step cannot be called.
        ValueError: steps is below 3, at_least is not between 0 and 1, or the loader ends early.
        RuntimeError: torch's profiler is at work already.

    >>> import torch
    >>> model, x = torch.nn.Linear(256, 256).eval(), torch.zeros(64, 256)
    >>> [finding.name for finding in diagnose(lambda: model(x))][0]
    'evaluation-without-no-grad'
    """
    need_callable(train_step, "train_step")
    steps = whole_number("steps", steps, 3)
    if not 0 < at_least < 1:
        raise ValueError(f"at_least must be a share between 0 and 1, got {at_least!r}")
    try:
        seen = observe(train_step, steps, progress=progress)
    except StopIteration:
        raise ValueError(
            "the loader ended before diagnose had seen enough: let train_step begin it anew, as in "
            "a generator with while True: yield from loader"
        ) from None
    return rank(seen, at_least)


def observe(train_step: Callable[[], Any], steps: int, *, progress: bool | None = None) -> Seen:
    """Run the step, watch it, and return what was seen."""
    need_no_recording("diagnose")
    with watch() as seen, decoders_shown():
        step = seen.step(train_step)
        step_s, calls = _warm_up(step)
        steps = min(steps, max(1, int(_STEPS_S / step_s)))
        left = 2 - calls  # of what warms up
        report = record_steps(step, steps, left, on_record=seen.begin_anew, progress=progress)
    repeats = confirmed(train_step, seen.repeats.found())
    # a step that makes an iterator takes far longer, and comes as often as it comes
    average = statistics.fmean if seen.starts else statistics.median
    step_ms = average(report.plain_ms)
    least = min(steps, max(1, int(_LOOK_MS / max(step_ms, 0.1))))
    looked_at = min(200, max(least, math.ceil(100 / max(step_ms, 0.1))))  # a tenth of a second
    looked_ms: list[float] = []
    thread_ms: list[float] = []

    def timed() -> None:
        begin, of_thread = perf_counter(), thread_time()
        train_step()
        thread_ms.append(1000 * (thread_time() - of_thread))
        looked_ms.append(1000 * (perf_counter() - begin))

    looks, _, _ = take_stacks(lambda: [timed() for _ in range(looked_at)], 0.001)
    kept = what_is_kept(train_step, 4 if step_s < _STEPS_S / 4 else 2)
    cores = machine.describe().cores
    loader = seen.slowest
    key = id(loader.dataset) if loader else 0
    waits = report.shares.get("data loading", 0.0)
    slow = step_ms > RACED_MS  # to try workers on it
    costs = None
    if loader is not None and waits > 0.02:
        with suppress(Exception):  # of a data set, or a sampler, that cannot be asked from here
            costs = loader_costs(loader, cores=cores, try_workers=slow)
    facts = Seen(
        trace=report.trace,
        step_ms=step_ms,
        loader=loader,
        costs=costs,
        calls=tuple(seen.calls.values()),
        trained=frozenset(seen.trained),
        graph_nodes=kept.nodes,
        lines=program_lines(looks),
        cores=cores,
        step=train_step,
        starts=seen.starts[key] / steps,
        fetches=seen.fetches[key] / steps,
        ends=seen.ends[key] / steps,
        optimizers=tuple(seen.optimizers.values()),
        anomaly=seen.anomaly,
        repeats=repeats,
        tensors=() if kept.is_bounded else kept.nbytes,
        kept_where=kept.where,
        least_ms=0.0 if seen.starts else min([*report.plain_ms, *looked_ms]),
        thread_ms=0.0 if seen.starts else min(thread_ms, default=0.0),
    )
    if not _may_loop(facts):
        return facts
    followed = min(_FOLLOWED, max(2, int(_STEPS_S / step_s)))
    flow = _follow(train_step, followed, _FOLLOWED_S + _FOLLOWED_STEPS * step_ms / 1e3)
    return dataclasses.replace(facts, flow=flow)


def _follow(train_step: Callable[[], Any], steps: int, seconds: float = float("inf")) -> Dataflow:
    """Follow a step; more of them where a cell's inputs might need its outputs in some, by chance.

    A decoder that is given the true words for half of the batches is such a program. After some
    seconds no other step is followed.
    """
    flow = follow(train_step)
    known = {id(call.cell) for call in flow.cells}
    needing = {id(call.cell) for call in flow.cells if call.needs_cell}
    if known - needing and steps > 1:
        needing |= cells_that_need(train_step, known - needing, steps - 1, seconds)
    cells = (
        dataclasses.replace(call, needs_cell=call.needs_cell or id(call.cell) in needing)
        for call in flow.cells
    )
    return dataclasses.replace(flow, cells=tuple(cells))


def _may_loop(seen: Seen) -> bool:
    """Whether anything comes so often that the order of its turns matters."""
    if seen.trace is None:
        return False
    one_by_one = any(c.rows == 1 and c.count >= 4 * seen.steps for c in seen.calls)
    has_cells = any(isinstance(m, nn.RNNCellBase) for c in seen.calls for m in c.module.modules())
    often = any(c.count >= 8 * seen.steps for c in seen.calls)
    repeats = max(seen.outside.commonest[1], seen.outside.items) >= 8
    return one_by_one or has_cells or often or repeats


def _warm_up(train_step: Callable[[], Any]) -> tuple[float, int]:
    """Return how many seconds a step takes, and how often it was called to find out."""
    begin = perf_counter()
    train_step()
    first_s = perf_counter() - begin
    if first_s < _STEPS_S / 8:
        return max(first_s, 1e-9), 1
    begin = perf_counter()  # something may have been made ready in the first call
    train_step()
    return min(first_s, max(perf_counter() - begin, 1e-9)), 2


def rank(seen: Seen, at_least: float, speedup: Speedup | None = None) -> Findings:
    """Apply all rules; return what they found, in the order that :func:`diagnose` promises."""
    tried = speedup or _speedup
    least_ms = at_least * seen.step_ms
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):  # trials of models draw, the program must not see that
        found = [f for rule in (*RULES, *CUDA_RULES) for f in rule(seen, least_ms, tried)]
    # work that need not be done is taken away before what is left of it is done elsewhere
    removed = sum(f.saves_ms for f in found if f.name in _REMOVED)
    folding = max((f.saves_ms for f in found if f.name == "batchnorm-unfused"), default=0.0)

    def weight(finding: Bottleneck) -> float:
        if finding.name == "evaluation-without-no-grad":  # it changes nothing else, so it is first
            return max(finding.saves_ms, 1.01 * folding)
        if finding.name == "no-workers" and removed >= finding.saves_ms:
            return min(f.saves_ms for f in found if f.name in _REMOVED)
        return finding.saves_ms * _PREFERRED.get(finding.name, 1.0)

    findings = Findings(sorted(found, key=weight, reverse=True))
    findings.scope = _scope(seen, at_least)
    return findings


def _scope(seen: Seen, at_least: float) -> str:
    shares = ", ".join(f"{name} {share:.0%}" for name, share in seen.shares.items() if share > 0)
    told = (
        f"nothing found that would save {at_least:.0%} of a step; looked for: "
        f"{', '.join(LOOKED_FOR)}; not for {NOT_LOOKED_FOR}; a step "
        f"takes {duration(seen.step_ms / 1e3)}: {shares}"
    )
    if seen.tried:
        told += f"; tried, no gain shown: {', '.join(dict.fromkeys(seen.tried))}"
    if seen.flow is not None and seen.flow.is_lost:
        told += "; which operators need each other could not be followed, so no loop was looked for"
    if seen.python_ms >= at_least * seen.step_ms:
        place = f", most of it at {seen.lines.outside}" * bool(seen.lines.outside)
        spent = duration(seen.python_ms / 1e3)
        told += f"; {spent} of it is Python outside models and operators{place}"
    return told


def _speedup(before: Callable[[], Any] | None, after: Callable[[], Any] | None) -> float:
    """Return how many times as fast ``after`` is; 1 where that is not settled, or cannot be run."""
    from dlhelpers.measure import compare

    if before is None or after is None:
        return 1.0
    begin = perf_counter()
    for call in (before, after):
        call()
        if perf_counter() - begin > _TRIED_S:  # one pair settles nothing, and more take too long
            return 1.0
    # an interval needs a dozen pairs, and more of them beside other programs
    budget_s = min(_TRIED_S, max(1.0, 24 * (perf_counter() - begin)))
    result = compare(_dropping(before), _dropping(after), budget_s=budget_s, overtime=1.0)
    return result.speedup if result.outcome == "faster" else 1.0


def _dropping(step: Callable[[], Any]) -> Callable[[], None]:
    """Return a callable that drops what ``step`` returns: an iterator too, which the step made."""

    def run() -> None:
        step()

    return run
