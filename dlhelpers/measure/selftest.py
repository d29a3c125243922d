"""Does `compare` keep its promises on this machine, loaded and quiet?

Every trial compares two callables whose work is known: n and (1 - d) n multiplications of the
same small matrices, so that the true speedup is 1 / (1 - d). A second process that keeps one
core busy for random stretches is the load. A false outcome is `faster` or `slower` where the
work is equal, or `faster` where the difference lies inside the negligible band. The last trials
have times that are not steady, on a simulated clock; there no `faster` or `slower` is true.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from dlhelpers.measure.comparing import compare
from dlhelpers.measure.comparison import Comparison
from dlhelpers.measure.simulated import Times, simulated_pairs
from dlhelpers.progress import bar

__all__ = ["PLAN", "Trial", "TrialResult", "busy_neighbour", "run", "workload"]

_LOAD = """
import os, random, sys, time
parent = os.getppid()
while os.getppid() == parent:
    until = time.perf_counter() + random.uniform(0.05, 0.5)
    while time.perf_counter() < until:
        pass
    time.sleep(random.uniform(0.05, 0.5))
"""


@dataclass(frozen=True)
class Trial:
    """Repeated comparisons of one known difference.

    Attributes:
        less_work: share of the work that the candidate is spared, 0 for the thing against itself.
        budget_s: seconds for each comparison.
        loaded: whether a second process loads a core on and off meanwhile.
        runs: comparisons of the full selftest.
        promise: the share of ``faster`` promised: at least this much, or at most where
            ``at_most``.
        at_most: the promise is an upper bound, on false outcomes.
        times: how the times of the same work are not steady, on a simulated clock; None for real
            work, timed by the machine's clock.
    """

    less_work: float
    budget_s: float
    loaded: bool
    runs: int
    promise: float
    at_most: bool
    times: Times | None = None

    def __str__(self) -> str:
        if self.times:
            return f"{self.times} (simulated), {self.budget_s:g} s"
        work = f"{self.less_work:.0%} less work" if self.less_work else "same work (A/A)"
        return f"{work}, {'loaded' if self.loaded else 'quiet'}, {self.budget_s:g} s"


PLAN = (
    Trial(0.00, 1.0, loaded=True, runs=200, promise=0.05, at_most=True),
    Trial(0.00, 1.0, loaded=False, runs=50, promise=0.05, at_most=True),
    Trial(0.02, 2.0, loaded=True, runs=100, promise=0.05, at_most=True),
    Trial(0.05, 2.0, loaded=False, runs=50, promise=0.9, at_most=False),
    Trial(0.10, 2.0, loaded=True, runs=50, promise=0.9, at_most=False),
    Trial(0.20, 2.0, loaded=True, runs=50, promise=0.9, at_most=False),
    Trial(0.00, 2.0, loaded=False, runs=200, promise=0.05, at_most=True, times="warm-up"),
    Trial(0.00, 2.0, loaded=False, runs=200, promise=0.05, at_most=True, times="two-stage warm-up"),
    Trial(0.00, 2.0, loaded=False, runs=200, promise=0.05, at_most=True, times="drift"),
    Trial(0.00, 2.0, loaded=False, runs=200, promise=0.05, at_most=True, times="bimodal"),
)


@dataclass(frozen=True)
class TrialResult:
    """Counts over the comparisons of one trial.

    Attributes:
        trial: what was tried.
        runs: number of comparisons.
        outcomes: outcome -> count.
        covered: how often the interval held the true speedup.
        seconds: mean seconds of a comparison.
    """

    trial: Trial
    runs: int
    outcomes: dict[str, int]
    covered: int
    seconds: float

    @property
    def rate(self) -> float:
        """Share of ``faster``; of ``faster`` or ``slower`` where the work is the same."""
        wrong_way = self.outcomes["slower"] if self.trial.less_work == 0 else 0
        return (self.outcomes["faster"] + wrong_way) / self.runs

    @property
    def kept(self) -> bool:
        """Whether the promise was kept."""
        if self.trial.at_most:
            return self.rate <= self.trial.promise
        return self.rate >= self.trial.promise

    HEADER = (
        f"{'trial':<37} {'runs':>5} {'faster':>7} {'slower':>7} {'no diff.':>8} {'undecided':>9}"
        f" {'rate':>6} {'promised':>9} {'covered':>8} {'s each':>7}"
    )

    def __str__(self) -> str:
        sign = "<=" if self.trial.at_most else ">="
        counts = self.outcomes
        return (
            f"{self.trial!s:<37} {self.runs:>5} {counts['faster']:>7} {counts['slower']:>7}"
            f" {counts['no difference']:>8} {counts['undecided']:>9} {self.rate:>6.1%}"
            f" {sign + format(self.trial.promise, '.0%'):>9} {self.covered / self.runs:>8.1%}"
            f" {self.seconds:>7.2f}{'' if self.kept else '  NOT KEPT'}"
        )


def run(
    *,
    runs: int | None = None,
    plan: tuple[Trial, ...] = PLAN,
    compare: Callable[..., Comparison] = compare,
    progress: bool | None = None,
) -> Iterator[TrialResult]:
    """Yield the result of each trial of the plan as it ends.

    Args:
        runs: comparisons for each trial; None takes each trial's own number (about ten minutes
            at most in all).
        plan: the trials.
        compare: the comparison under test.
        progress: a bar on long runs; None draws it in a terminal only.
    """
    for trial in plan:
        truth = 1 / (1 - trial.less_work)
        rows = []
        with ExitStack() as stack:
            if trial.loaded:
                stack.enter_context(busy_neighbour())
            if trial.times:
                pairs = stack.enter_context(simulated_pairs(trial.times))
            else:
                pairs = partial(tuple, _real_pair(trial.less_work))
            count = range(runs or trial.runs)
            for _ in bar(count, progress=progress, desc=str(trial), leave=False):
                rows.append(compare(*pairs(), budget_s=trial.budget_s))
        outcomes = ("faster", "slower", "no difference", "undecided")
        yield TrialResult(
            trial,
            runs=len(rows),
            outcomes={name: sum(row.outcome == name for row in rows) for name in outcomes},
            covered=sum(row.low <= truth <= row.high for row in rows),
            seconds=sum(row.elapsed_s for row in rows) / len(rows),
        )


def _real_pair(less_work: float) -> tuple[Callable[[], Any], Callable[[], Any]]:
    baseline = workload(1.0)
    return baseline, workload(1 - less_work) if less_work else baseline


def workload(share: float, *, multiplications: int = 200) -> Callable[[], Any]:
    """Return a callable that does ``share`` of a fixed number of 64 x 64 multiplications.

    All of them multiply one matrix: two copies at other addresses differ by up to a percent.
    """
    matrix = _matrix()
    count = round(share * multiplications)

    def multiply() -> None:
        for _ in range(count):
            matrix @ matrix

    return multiply


@cache
def _matrix() -> Any:
    import torch

    return torch.full((64, 64), 1 / 64)


@contextmanager
def busy_neighbour() -> Iterator[subprocess.Popen]:
    """Load one core on and off with a second process, which ends with the block."""
    process = subprocess.Popen([sys.executable, "-c", _LOAD])
    try:
        yield process
    finally:
        process.kill()
        process.wait()
