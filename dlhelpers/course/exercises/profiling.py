"""Exercises of notebook 08: own time, Amdahl's law, no Python loop, an idle GPU, workers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dlhelpers.course.exercises import Case, Exercise
from dlhelpers.course.exercises.watching import Operators, has_loop, unchanged, unseen

__all__ = ["EXERCISES"]

Call = tuple[str, float, float]  # name, start, end


def own_times(calls: Sequence[Call]) -> dict[str, float]:
    """Return name -> time in its calls and in none that they made."""
    own: dict[str, float] = {}
    stack: list[Call] = []
    for name, start, end in calls:
        while stack and stack[-1][2] <= start:
            stack.pop()
        if stack:
            own[stack[-1][0]] -= end - start
        own[name] = own.get(name, 0.0) + end - start
        stack.append((name, start, end))
    return own


def _owns(calls: Sequence[Call], wanted: Mapping[str, float]) -> Callable[[Any], bool]:
    return lambda f: dict(f(list(calls))) == wanted


def time_after(parts: Mapping[str, float], factors: Mapping[str, float]) -> float:
    """Return the time of all parts, with the speedup of some of them."""
    return sum(ms / factors.get(name, 1.0) for name, ms in parts.items())


def _takes(
    parts: Mapping[str, float], factors: Mapping[str, float], wanted: float
) -> Callable[[Any], bool]:
    return lambda f: math.isclose(f(dict(parts), dict(factors)), wanted, abs_tol=1e-9)


def batch(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return [N, C, H, W] between mean and std, from uint8 [N, H, W, C], without a loop."""
    return ((images / 255 - mean) / std).permute(0, 3, 1, 2)


def _batch_of(n: int, h: int, w: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, h, w, 3), generator=generator, dtype=torch.uint8)
    return images, torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.5])


def _is_batch(n: int, h: int, w: int) -> Callable[[Any], bool]:
    def test(f: Any) -> bool:
        images, mean, std = _batch_of(n, h, w)
        kept = images.clone()
        found = f(images, mean.clone(), std.clone())
        wanted = torch.empty(n, 3, h, w, dtype=torch.float64)
        for c in range(3):  # by hand, one channel at a time
            wanted[:, c] = (kept[..., c].double() / 255 - mean[c].double()) / std[c].double()
        is_right = found.shape == wanted.shape and torch.allclose(found.double(), wanted, atol=1e-5)
        return is_right and torch.equal(images, kept)

    return test


def _does_not_grow(f: Any) -> bool:
    seen: list[list[str]] = [[], []]
    for names, n in zip(seen, (2, 32), strict=True):
        with Operators(names.append):
            f(*_batch_of(n, 4, 5))
    return len(seen[0]) == len(seen[1])


def idle_share(kernels: Sequence[tuple[float, float]], start: float, end: float) -> float:
    """Return the share of [start, end] in which no kernel runs; they may overlap."""
    busy, reached = 0.0, start
    for first, last in sorted(kernels):
        first, last = max(first, reached), min(last, end)
        if last > first:
            busy, reached = busy + last - first, last
    return 1 - busy / (end - start)


def _idles(
    kernels: Sequence[tuple[float, float]], start: float, end: float, wanted: float
) -> Callable[[Any], bool]:
    return lambda f: math.isclose(f(list(kernels), start, end), wanted, abs_tol=1e-9)


def step_with_workers(load_ms: float, compute_ms: float, workers: int, cores: int) -> float:
    """Return the time of a step if workers load batches while it computes on a core of its own."""
    busy = min(workers, cores - 1)
    if busy < 1:
        return load_ms + compute_ms
    return max(compute_ms, load_ms / busy)


def _steps(wanted: float, *arguments: float) -> Callable[[Any], bool]:
    return lambda f: math.isclose(f(*arguments), wanted, abs_tol=1e-9)


EXERCISES = (
    Exercise(
        id="08.1",
        title="Own time",
        task="Write own_times(calls) -> {name: own time}: calls (name, start, end) of one thread, "
        "nested, in order of start; own time is a call's time less that of the calls it made.",
        cases=(
            Case(
                "one call",
                "a single call that calls nothing: its own time is end less start",
                _owns([("a", 2, 7)], {"a": 5}),
            ),
            Case(
                "a call inside",
                "a calls b: what b takes is b's, and is subtracted from a",
                _owns([("a", 0, 10), ("b", 2, 5)], {"a": 7, "b": 3}),
            ),
            Case(
                "three deep",
                "a calls b, b calls c: c is subtracted from b alone, for a it is in b already",
                _owns([("a", 0, 10), ("b", 1, 8), ("c", 2, 4)], {"a": 3, "b": 5, "c": 2}),
            ),
            Case(
                "the same name twice",
                "b is called twice: both calls are added up",
                _owns([("a", 0, 10), ("b", 1, 3), ("b", 5, 9)], {"a": 4, "b": 6}),
            ),
            Case(
                "calls that touch",
                "b ends at the moment when c begins: c is not inside b",
                _owns([("a", 0, 9), ("b", 1, 4), ("c", 4, 8)], {"a": 2, "b": 3, "c": 4}),
            ),
            Case(
                "a call of itself",
                "a calls a: the name's own times add up to the whole, counted once",
                _owns([("a", 0, 10), ("a", 2, 8), ("b", 3, 4)], {"a": 9, "b": 1}),
            ),
            unseen(
                _owns(
                    [
                        *(("run", 0, 50), ("load", 0, 20), ("read", 2, 9), ("load", 20, 30)),
                        *(("run", 31, 40), ("read", 60, 61)),
                    ],
                    {"run": 20, "load": 23, "read": 8},
                )
            ),
        ),
        hints=(
            "Keep a stack of the calls that are under way. Which ones have ended when one begins?",
            "Each call is subtracted from one other: the one on top of the stack.",
        ),
        solution=own_times,
        by_hand=("dlhelpers.*",),
    ),
    Exercise(
        id="08.2",
        title="Amdahl's law (predict, then write)",
        task="Write time_after(parts, factors): parts {name: ms of a step}, factors {name: how "
        "many times as fast}; the ms of the step afterwards.",
        cases=(
            Case(
                "one part",
                "100 ms that become 4 times as fast take 25 ms",
                _takes({"a": 100}, {"a": 4}, 25),
            ),
            Case(
                "the rest stays",
                "80 of 100 ms become 4 times as fast: the other 20 ms stay as they are",
                _takes({"a": 80, "b": 20}, {"a": 4, "b": 1}, 40),
            ),
            Case(
                "a part without a factor",
                "a part that factors does not name stays as it is",
                _takes({"a": 80, "b": 20}, {"a": 4}, 40),
            ),
            Case(
                "two factors",
                "each part is divided by its own factor, not by an average or a product",
                _takes({"a": 60, "b": 30, "c": 10}, {"a": 3, "b": 2}, 45),
            ),
            Case(
                "slower",
                "a factor of 0.5 means that the part takes twice as long",
                _takes({"a": 10, "b": 10}, {"b": 0.5}, 30),
            ),
            Case(
                "gone",
                "a factor of infinity means that the part takes no time at all",
                _takes({"a": 90, "b": 10}, {"a": math.inf}, 10),
            ),
            unseen(
                _takes({"x": 7, "y": 5, "z": 3}, {"z": 6, "x": 2}, 9),
                _takes({"load": 12.5}, {}, 12.5),
                _takes({"load": 9, "step": 4}, {"load": 1.5, "other": 7}, 10),
            ),
            unchanged(lambda: ({"a": 80.0, "b": 20.0}, {"a": 4.0})),
        ),
        hints=(
            "How long does each part take afterwards, by itself?",
            "ms / factor, over all parts; factors.get(name, 1) for those that stay.",
        ),
        solution=time_after,
        by_hand=("dlhelpers.*",),
    ),
    Exercise(
        id="08.3",
        title="No Python loop",
        task="Write batch(images, mean, std): uint8 [N, H, W, C] -> float32 [N, C, H, W], each "
        "channel (value / 255 - mean) / std, with the same number of operators for 32 images as "
        "for 2, and no loop in Python.",
        cases=(
            Case(
                "one image",
                "one image: values between 0 and 1 first, then mean and std; the channels come "
                "second in the result, and images stays as it was",
                _is_batch(1, 4, 5),
            ),
            Case(
                "three rows and three channels",
                "images of 3 x 3 pixels: mean and std belong to the channels, not to the columns",
                _is_batch(2, 3, 3),
            ),
            Case(
                "no loop",
                "32 images take more operators than 2, so there is a loop over images. The task "
                "wants the same number: write one expression for the whole batch",
                _does_not_grow,
            ),
            Case(
                "float32",
                "the values are right, but not float32, which the task asks for: NumPy computes in "
                "float64, twice the bytes; end in .float()",
                lambda f: f(*_batch_of(2, 4, 5)).dtype == torch.float32,
            ),
            Case(
                "no loop in Python",
                "torch has no more operators to run, but there is a loop in Python (for, while or "
                "a comprehension), over images or channels: the task wants none. mean and std are "
                "[C], as the last dimension of images, so one expression does all",
                lambda f: not has_loop(f),
            ),
        ),
        hints=(
            "The last dimension of images is the channels: [C] fits to it without reshaping.",
            "permute(0, 3, 1, 2) moves dimensions of the whole batch; it copies nothing.",
        ),
        solution=batch,
        by_hand=("dlhelpers.*",),
    ),
    Exercise(
        id="08.4",
        title="How long does the GPU idle?",
        task="Write idle_share(kernels, start, end): kernels (start, end) of several streams, in "
        "any order; the share of [start, end] in which none of them runs.",
        cases=(
            Case(
                "one kernel",
                "one kernel over a quarter of the window: idle for three quarters",
                _idles([(0, 25)], 0, 100, 0.75),
            ),
            Case(
                "a window that begins later",
                "the window is [100, 200]: its length is end less start",
                _idles([(120, 170)], 100, 200, 0.5),
            ),
            Case(
                "two streams at a time",
                "two kernels that overlap: a moment in which both run is busy once",
                _idles([(0, 50), (25, 75)], 0, 100, 0.25),
            ),
            Case(
                "one inside another, out of order",
                "a short kernel inside a long one adds nothing; kernels come in any order",
                _idles([(60, 70), (10, 20), (0, 50)], 0, 100, 0.4),
            ),
            Case(
                "past the ends",
                "kernels that begin before the window or end after it count inside it only",
                _idles([(-50, 10), (90, 300), (400, 500)], 0, 100, 0.8),
            ),
            Case(
                "between two marks",
                "kernels begin and end at any time, here at 0.5 and 2.25: a count of whole "
                "microseconds misses that. Compare starts and ends themselves",
                _idles([(0.5, 2.25)], 0, 4, 0.5625),
            ),
            unseen(
                _idles([(3, 9), (1, 4), (12, 13), (12, 12.5)], 2, 12.25, 3 / 10.25),
                _idles([], 5, 6, 1.0),
            ),
        ),
        hints=(
            "Sort by start. How far is the timeline covered when the next kernel begins?",
            "Clip each kernel to [covered so far, end]; what is left of it is new.",
        ),
        solution=idle_share,
        by_hand=("dlhelpers.*",),
    ),
    Exercise(
        id="08.5",
        title="What would workers bring? (predict, then write)",
        task="Write step_with_workers(load_ms, compute_ms, workers, cores): ms of a step. The step "
        "computes on one core; each further core can have a worker that loads batches meanwhile.",
        cases=(
            Case(
                "no workers",
                "workers 0: the step loads, then it computes",
                _steps(50, 30, 20, 0, 4),
            ),
            Case(
                "hidden",
                "one worker that loads in 10 ms while the step computes for 20: nobody waits",
                _steps(20, 10, 20, 1, 4),
            ),
            Case(
                "not hidden",
                "one worker that loads in 60 ms: the step waits for it, 60 ms in all",
                _steps(60, 60, 20, 1, 4),
            ),
            Case(
                "three workers",
                "three workers load three batches at a time: one comes every 60 / 3 ms, and the "
                "step does not compute faster",
                _steps(30, 60, 30, 3, 8),
            ),
            Case(
                "more workers than cores",
                "four workers on two cores: one core computes, so one worker at a time can load",
                _steps(60, 60, 20, 4, 2),
            ),
            Case(
                "one core",
                "on one core nothing happens at the same time, however many workers there are",
                _steps(80, 60, 20, 2, 1),
            ),
            unseen(
                _steps(45, 90, 20, 2, 8),
                _steps(15, 90, 8, 6, 16),
                _steps(30, 90, 8, 16, 4),
                _steps(77, 70, 7, 0, 1),
            ),
        ),
        hints=(
            "Two things happen at the same time. Which one does the step wait for?",
            "How many workers can be at work at the same time, beside the step itself?",
        ),
        solution=step_with_workers,
        by_hand=("dlhelpers.*",),
    ),
)
