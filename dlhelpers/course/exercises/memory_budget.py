"""Exercise 04.5 of notebook 04: fit this model into the memory."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dlhelpers.course.exercises import Case, Exercise
from dlhelpers.memory import estimate, measure_peak

__all__ = ["LARGEST_BATCH"]


def largest_batch(model: nn.Module, sample: Tensor, limit_bytes: int) -> int:
    """Return the most samples whose step with SGD is estimated to stay within the limit.

    Double the number until it does not fit, then halve what lies between.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def fits(n: int) -> bool:
        batch = sample.new_empty(n, *sample.shape[1:], device="meta")
        return estimate(model, batch, optimizer).peak_bytes <= limit_bytes

    too_many = 1
    while fits(too_many):
        too_many *= 2
    fit = too_many // 2
    while too_many - fit > 1:
        middle = (fit + too_many) // 2
        fit, too_many = (middle, too_many) if fits(middle) else (fit, middle)
    return fit


def _shallow() -> tuple[nn.Module, Tensor]:
    """Its peak is at the end of backward up to 12 samples and more: a straight line."""
    with torch.random.fork_rng(devices=[]):
        return nn.Sequential(nn.Linear(32, 512), nn.ReLU(), nn.Linear(512, 10)), torch.zeros(1, 32)


def _deep() -> tuple[nn.Module, Tensor]:
    """Its peak is at the end of backward for few samples, at its beginning for many."""
    with torch.random.fork_rng(devices=[]):
        blocks = [block for _ in range(6) for block in (nn.Linear(32, 32), nn.Tanh())]
        return nn.Sequential(nn.Linear(2, 32), *blocks, nn.Linear(32, 10)), torch.zeros(1, 2)


def _of_images() -> tuple[nn.Module, Tensor]:
    """The batch itself is a good part of its peak."""
    with torch.random.fork_rng(devices=[]):
        layers = [nn.Flatten(), nn.Tanh(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10)]
        return nn.Sequential(*layers), torch.zeros(1, 1, 16, 16)


def _of_convolutions() -> tuple[nn.Module, Tensor]:
    """Its convolutions take buffers inside of kernels, which are no tensors."""
    with torch.random.fork_rng(devices=[]):
        layers = [nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.Conv2d(16, 16, 5, padding=2)]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4096, 10)), torch.zeros(1, 1, 16, 16)


def _estimated(model: nn.Module, sample: Tensor, n: int) -> int:
    batch = torch.empty(n, *sample.shape[1:], device="meta")
    return estimate(model, batch, torch.optim.SGD(model.parameters(), lr=0.1)).peak_bytes


def _measured(model: nn.Module, sample: Tensor, n: int) -> int:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch, targets = sample.repeat(n, *[1] * (sample.dim() - 1)), torch.zeros(n, dtype=torch.long)

    def step() -> None:
        nn.functional.cross_entropy(model(batch), targets).backward()
        optimizer.step()

    optimizer.zero_grad()
    return measure_peak(step).peak_bytes


def _fits_just(
    make: Callable[[], tuple[nn.Module, Tensor]], samples: int, spare: int
) -> Callable[[Any], bool]:
    """Give a limit, `spare` bytes more than the estimate for these samples."""

    def test(f: Any) -> bool:
        limit = _estimated(*make(), samples) + spare
        n = operator.index(f(*make(), limit))
        if not 0 <= n <= 4 * samples:
            return False
        return (not n or _estimated(*make(), n) <= limit) and limit < _estimated(*make(), n + 1)

    return test


def _fits_in_truth(f: Any) -> bool:
    limit = _estimated(*_of_images(), 40)
    n = operator.index(f(*_of_images(), limit))
    if not 1 <= n <= 160:
        return False
    own, one_more = (_measured(*_of_images(), samples) for samples in (n, n + 1))
    return own <= 1.01 * limit and one_more > 0.99 * limit


LARGEST_BATCH = Exercise(
    id="04.5",
    title="Fit this model into a budget",
    task="Write largest_batch(model, sample, limit_bytes): the most samples like `sample` "
    "[1, ...] whose step with SGD(model.parameters(), lr=0.1) is estimated to stay within "
    "limit_bytes.",
    cases=(
        Case(
            "not even one",
            "the limit is one byte below what a step with 1 sample needs: the answer is 0",
            _fits_just(_shallow, 1, -1),
        ),
        Case(
            "met exactly",
            "the limit is to the byte what a step with 8 samples needs: that is within it, and "
            "9 are not, so the answer is 8. Weights and gradients need their bytes only once, "
            "however many samples there are",
            _fits_just(_shallow, 8, 0),
        ),
        Case(
            "between powers of two",
            "11 samples fit with 100 bytes to spare, and 12 do not: doubling alone stops at 8",
            _fits_just(_shallow, 11, 100),
        ),
        Case(
            "the peak moves",
            "a deeper network, in which 50 samples fit and 51 do not: with few samples the "
            "peak is at the end of backward, with many at its beginning, so no straight line "
            "through 1 and 2 samples leads there",
            _fits_just(_deep, 50, 100),
        ),
        Case(
            "buffers inside of kernels",
            "a network of convolutions, in which 6 samples fit: what kernels take inside is part "
            "of the peak, so look at peak_bytes and not at tensor_bytes",
            _fits_just(_of_convolutions, 6, 100),
        ),
        Case(
            "a real step",
            "images of 16 x 16, 40 of which fit: a real step with your answer, run under "
            "measure_peak, is more than 1 % above the limit, or one more sample would have "
            "fitted. sample.expand(n, ...) shares the memory of one sample, a real batch does "
            "not: let estimate see torch.empty(n, *sample.shape[1:])",
            _fits_in_truth,
        ),
        Case(
            "hundreds of samples",
            "a limit for 300 samples came out wrong: no largest n may be built in. Double n until "
            "it no longer fits, however long that takes",
            _fits_just(_shallow, 300, 100),
        ),
    ),
    hints=(
        "Write fits(n) first: estimate(...).peak_bytes against the limit. A batch on device "
        '"meta" has a shape and no bytes of its own.',
        "Double n until it no longer fits. What do you know then of n and of n / 2?",
        "Keep two numbers, one that fits and one that does not, and try the middle, until they "
        "are neighbours. Which of the two is the answer? What if 1 does not fit?",
    ),
    solution=largest_batch,
    by_hand=("dlhelpers.course.exercises.*",),
)
