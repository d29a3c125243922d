"""Real exercise of notebook 05: a block that is faster with the same number of multiply-adds."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dlhelpers import measure
from dlhelpers.course.exercises.real.tasks import (
    Reached,
    RefusedError,
    Task,
    given,
    speedup_reached,
)
from dlhelpers.shufflenet import layer_costs

__all__ = ["TASK"]

_GOAL = 1.2
_BAND = 0.06
Subject = tuple[nn.Module, Tensor]  # a block, its input


def grouped() -> Subject:
    """Return four 1x1 convolutions in eight groups."""
    layers = [nn.Sequential(nn.Conv2d(256, 256, 1, groups=8), nn.ReLU()) for _ in range(4)]
    return nn.Sequential(*layers), torch.ones(4, 256, 28, 28)


class _Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv2d(32, 2, 3, padding=1) for _ in range(16))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x).relu() for branch in self.branches], dim=1)


def fragmented() -> Subject:
    """Return sixteen narrow branches of one 3x3 convolution each."""
    return _Branches(), torch.ones(4, 32, 28, 28)


def elementwise() -> Subject:
    """Return a 1x1 convolution between many operators that work on single elements."""
    layers = [nn.Sequential(nn.Hardswish(), nn.BatchNorm2d(32), nn.Sigmoid()) for _ in range(3)]
    return nn.Sequential(nn.Conv2d(32, 32, 1), *layers), torch.ones(4, 32, 56, 56)


def unequal() -> Subject:
    """Return two 1x1 convolutions from few channels to many and back."""
    wide = nn.Sequential(nn.Conv2d(8, 512, 1), nn.ReLU(), nn.Conv2d(512, 8, 1))
    return wide, torch.ones(4, 8, 56, 56)


def redesigned(block: nn.Module, x: Tensor) -> nn.Module:
    """Return dense 1x1 convolutions, c1 -> m -> m -> c2, with the block's multiply-adds.

    They do m^2 + m (c1 + c2) per pixel; m is the root of that equation.
    """
    c1, c2, pixels = x.shape[1], block(x).shape[1], x.numel() // x.shape[1]
    per_pixel = layer_costs(block, x).multiply_adds / pixels
    half = (c1 + c2) / 2
    m = max(1, round(math.sqrt(half * half + per_pixel) - half))
    return nn.Sequential(
        nn.Conv2d(c1, m, 1), nn.Conv2d(m, m, 1), nn.ReLU(inplace=True), nn.Conv2d(m, c2, 1)
    )


def _is_affine(block: nn.Module, x: Tensor) -> bool:
    """Whether a block in eval mode is a linear map and a shift: f(x) + f(-x) = 2 f(0)."""
    zero = block(torch.zeros_like(x))
    return torch.allclose(block(x) + block(-x), 2 * zero, rtol=1e-3, atol=1e-4)


def _measure(make: Callable[[], Any], answer: Callable[..., Any]) -> Reached:
    with torch.no_grad():
        block, x = make()
        block.eval()
        x = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        new = given(answer, copy.deepcopy(block), x.clone())
        if not isinstance(new, nn.Module):
            raise RefusedError(f"the answer must be a module, got {type(new).__name__}")
        new.eval()
        wanted, found = block(x), new(x)
        if found.shape != wanted.shape:
            raise RefusedError(
                f"the new block gives {list(found.shape)}, the old one {list(wanted.shape)}"
            )
        if torch.allclose(found, new(-x), rtol=1e-4):
            raise RefusedError("the new block's output does not depend on its input")
        old_count, count = (layer_costs(one, x).multiply_adds for one in (block, new))
        if abs(count / old_count - 1) > _BAND:
            raise RefusedError(
                f"{count:,} multiply-adds, {count / old_count:.2f} times the {old_count:,} of the "
                f"old block: stay within {_BAND:.0%}, for instance by another number of channels"
            )
        if _is_affine(new, x) and not _is_affine(block, x):
            raise RefusedError(
                "the new block has no activation left, so that all of it is one linear layer: keep "
                "at least one activation"
            )
        compared = measure.compare(lambda: block(x), lambda: new(x), threshold=_GOAL, budget_s=4)
        if layer_costs(new, x).multiply_adds != count:
            raise RefusedError("the new block does other work in later calls")
    advice = (
        "audit(new, x) names what still breaks a guideline, and layer_costs(new, x) shows which "
        "layer moves the most bytes"
    )
    return speedup_reached(compared, _GOAL, advice)


TASK = Task(
    id="05",
    goal="at least 1.2 times as fast with the same multiply-adds",
    offered={
        "grouped": grouped,
        "fragmented": fragmented,
        "elementwise": elementwise,
        "unequal": unequal,
    },
    own="(block, input), with channels in the input's dimension 1",
    measure=_measure,
    rubric=(
        "which guideline the old block breaks, in terms of bytes, calls or small products",
        "what the new block does instead, and why its number of multiply-adds is the same",
        "a counted figure (elements moved, calls) that fits the measured speedup, or what would "
        "have shown the explanation to be wrong",
    ),
    explanation="The old block spends its time on reading and writing wide tensors for few "
    "products, or on many small calls, which guidelines G1 to G4 describe. Dense convolutions of "
    "equal width do the same number of multiply-adds on fewer elements and in fewer calls. "
    "layer_costs shows fewer bytes for the new block; had it shown the same bytes and calls, the "
    "speedup would need another explanation.",
    solution=redesigned,
)
