"""Real exercise of notebook 04: the same gradients in a smaller peak of memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dlhelpers.course.exercises.real.tasks import Reached, RefusedError, Task, given
from dlhelpers.memory import checkpoint_blocks, measure_peak, mib

__all__ = ["TASK"]

_GOAL = 0.7
Subject = tuple[nn.Module, Callable[..., Tensor], Tensor, Tensor]  # model, loss, inputs, targets


def _draws(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def deep() -> Subject:
    """Return sixteen equal layers and a large batch."""
    blocks = [nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(16)]
    return nn.Sequential(*blocks), F.mse_loss, _draws(4096, 64), _draws(4096, 64)


def convolutions() -> Subject:
    """Return eight convolutions at full resolution."""
    widths = [3, *[8] * 8]
    blocks = [
        nn.Sequential(nn.Conv2d(c1, c2, 3, padding=1), nn.ReLU()) for c1, c2 in pairwise(widths)
    ]
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return model, F.mse_loss, _draws(16, 3, 64, 64), _draws(16, 8)


def normalised() -> Subject:
    """Return convolutions with BatchNorm, whose samples depend on each other."""
    blocks = [
        nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Tanh()) for _ in range(8)
    ]
    return nn.Sequential(*blocks), F.mse_loss, _draws(16, 8, 48, 48), _draws(16, 8, 48, 48)


def wide_loss() -> Subject:
    """Return one layer with very many outputs, whose loss needs the most."""
    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4000))
    return model, F.cross_entropy, _draws(1024, 32), torch.arange(1024) % 4000


def small_step(
    model: nn.Module, loss: Callable[..., Tensor], inputs: Tensor, targets: Tensor
) -> Tensor:
    """Go through parts of the batch, or through segments where BatchNorm needs the whole batch.

    Each part's loss is weighted by its share of the batch, so gradients add up to the whole's.
    """
    if any(isinstance(layer, nn.BatchNorm2d) for layer in model.modules()):
        whole = loss(checkpoint_blocks(model, 4)(inputs), targets)
        whole.backward()
        return whole.detach()
    total = torch.zeros(())
    for x, y in zip(inputs.chunk(8), targets.chunk(8), strict=True):
        part = loss(model(x), y) * len(x) / len(inputs)
        part.backward()
        total += part.detach()
    return total


def _plain(model: nn.Module, loss: Callable[..., Tensor], x: Tensor, y: Tensor) -> Tensor:
    whole = loss(model(x), y)
    whole.backward()
    return whole.detach()


def _measure(make: Callable[[], Any], answer: Callable[..., Any]) -> Reached:
    model, loss, inputs, targets = make()
    model.train()
    plain, tried, new = (copy.deepcopy(model) for _ in range(3))
    others = inputs.roll(1, 0)  # not the data that is measured, so nothing can be kept for it
    given(answer, tried, loss, others.clone(), targets.clone())  # blank answers measure nothing
    _same_gradients(tried, _after_plain(copy.deepcopy(model), loss, others, targets))
    before = measure_peak(lambda: _plain(plain, loss, inputs, targets))
    after = measure_peak(lambda: answer(new, loss, inputs, targets))
    _same_gradients(new, plain)
    largest = max(after.at_peak, key=lambda kind: after.at_peak[kind])
    share = after.peak_bytes / before.peak_bytes
    return Reached(
        100 * share,
        f"% of the plain step's peak, {mib(after.peak_bytes)} of {mib(before.peak_bytes)} "
        f"(goal: {_GOAL:.0%} or less)",
        passed=share <= _GOAL,
        advice=f"at the peak, in {after.phase}, most bytes are {largest}: what keeps them alive?",
    )


def _after_plain(model: nn.Module, *step: Any) -> nn.Module:
    _plain(model, *step)
    return model


def _same_gradients(found: nn.Module, wanted: nn.Module) -> None:
    largest = max(float(one.grad.abs().max()) for one in wanted.parameters())
    for (name, ours), theirs in zip(found.named_parameters(), wanted.parameters(), strict=True):
        if ours.grad is None:
            raise RefusedError(f"{name} has no gradient after the step")
        size = max(float(theirs.grad.abs().max()), largest / 100)  # sums may cancel to almost 0
        error = float((ours.grad - theirs.grad).abs().max()) / size
        if not error <= 1e-3:
            raise RefusedError(
                f"the gradient of {name} is another one (relative error {error:.1e}): do parts of "
                "the batch have their right weight, and does any layer look at the whole batch?"
            )


TASK = Task(
    id="04",
    goal="the same gradients in at most 70% of the plain step's peak",
    offered={
        "deep": deep,
        "convolutions": convolutions,
        "normalised": normalised,
        "wide loss": wide_loss,
    },
    own="(model, loss, inputs, targets)",
    measure=_measure,
    rubric=(
        "what was alive at the plain step's peak, and what kept it alive",
        "why the gradients are the same, BatchNorm and the loss's mean included",
        "what the saving costs: computing again, or more and smaller steps",
    ),
    explanation="At the plain step's peak most bytes are what autograd keeps of every layer for "
    "backward, and they grow with the batch. Going through an eighth of the batch at a time keeps "
    "an eighth of them, and the gradients add up to the same sum, as each part's loss is weighted "
    "by its share; with BatchNorm, whose statistics need the whole batch, computing segments again "
    "saves as well. The price is eight small passes instead of a large one, or a second forward "
    "pass.",
    solution=small_step,
)
