"""Real exercise of notebook 06: a network whose BatchNorms refuse, rewritten until they fold."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dlhelpers.course.exercises.real.tasks import Reached, RefusedError, Task, given
from dlhelpers.fusion import fuse_conv_bn

__all__ = ["TASK"]

_WITHIN = 1e-4
Subject = tuple[nn.Module, Tensor]  # a model in eval mode, its input


class _Twice(nn.Module):
    """One convolution, called twice, each time before a BatchNorm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.first, self.second = nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.conv(self.first(self.conv(x)).relu()))


class _Skip(nn.Module):
    """The output of a convolution goes to a BatchNorm and past it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y).relu() + y


class _Halved(nn.Conv2d):
    """A convolution that computes its weight in a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight / 2, self.bias)


class _Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = _Halved(8, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu()


class _Pooled(nn.Module):
    """A pooling layer comes between a convolution and its BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool, self.bn = nn.Conv2d(8, 8, 3), nn.AvgPool2d(2), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.pool(self.conv(x))).relu()


def _lived_in(kind: type[nn.Module]) -> Callable[[], Subject]:
    """Return a function that makes a model whose BatchNorms have seen data."""

    def make() -> Subject:
        generator = torch.Generator().manual_seed(0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = kind()
        for bn in _norms(model):
            for tensor in (bn.weight, bn.bias, bn.running_mean, bn.running_var):
                tensor.data = torch.rand(tensor.shape, generator=generator) + 0.5
        return model.eval(), torch.randn(2, 8, 12, 12, generator=generator)

    return make


def rewritten(model: nn.Module) -> nn.Module:
    """Return a copy of one of the four offered models in which each BatchNorm can be folded."""

    class Twice(_Twice):
        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.again(self.first(self.conv(x)).relu()))

    class Skip(_Skip):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x)).relu() + self.again(x)

    class Pooled(_Pooled):
        def forward(self, x: Tensor) -> Tensor:
            return self.pool(self.bn(self.conv(x))).relu()

    new = copy.deepcopy(model)
    if isinstance(new, _Own):  # what its forward does can be done once, to the weight
        new.conv = nn.Conv2d(8, 8, 3)
        new.conv.load_state_dict(model.conv.state_dict())
        new.conv.weight.data /= 2
    else:
        new.again = copy.deepcopy(new.conv)  # each call has a convolution of its own
        new.__class__ = {_Twice: Twice, _Skip: Skip, _Pooled: Pooled}[type(model)]
    return new.eval()


def _norms(model: nn.Module) -> list[nn.Module]:
    return [one for one in model.modules() if isinstance(one, nn.modules.batchnorm._BatchNorm)]


def _measure(make: Callable[[], Any], answer: Callable[..., Any]) -> Reached:
    model, x = make()
    model.eval()
    with torch.no_grad():
        wanted = model(x)
    _, before = fuse_conv_bn(model, x)
    if before.folded == before.found:
        raise RefusedError("nothing refuses in this model: take one whose report has a reason why")
    norms = len(_norms(model))
    new = given(answer, copy.deepcopy(model))
    if not isinstance(new, nn.Module):
        raise RefusedError(f"the answer must be a module, got {type(new).__name__}")
    with torch.no_grad():
        found = new.eval()(x)
    if found.shape != wanted.shape or _error(found, wanted) > _WITHIN:
        error = _error(found, wanted) if found.shape == wanted.shape else float("inf")
        raise RefusedError(
            f"the rewritten model gives other outputs (relative error {error:.1e}, allowed "
            f"{_WITHIN:g}): compare each layer's output with the old model's"
        )
    if (there := len(_norms(new))) < norms:
        raise RefusedError(
            f"the rewritten model has {there} BatchNorm layers of {norms}: leave the folding to "
            "fuse_conv_bn, and change what it complains about"
        )
    fused, report = fuse_conv_bn(new, x)
    with torch.no_grad():
        if _error(fused(x), wanted) > _WITHIN:
            raise RefusedError("the folded model gives other outputs than the old one")
    why = next((f"{row.name}: {row.why}" for row in report.rows if row.why), "")
    return Reached(
        100 * report.folded / report.found,
        f"% of {report.found} BatchNorm{'s' * (report.found > 1)} folded, with the same outputs",
        passed=report.folded == report.found,
        advice=why and f"remove the reason of {why}",
    )


def _error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


TASK = Task(
    id="06",
    goal="every BatchNorm folded by fuse_conv_bn, with the same outputs",
    offered={
        "twice": _lived_in(_Twice),
        "skip": _lived_in(_Skip),
        "own": _lived_in(_Own),
        "pooled": _lived_in(_Pooled),
    },
    own="(model, input), with a BatchNorm that fuse_conv_bn does not fold",
    measure=_measure,
    rubric=(
        "why folding the model as it was would have changed an output, and which one",
        "which rewriting keeps every output, and why it does so exactly",
        "what the rewriting costs in weights or multiply-adds, or why it costs nothing",
    ),
    explanation="The convolution's output had a second reader, so changing its weights for the "
    "BatchNorm would have changed what that reader got. A second convolution with the same "
    "weights gives that reader its input, and leaves the first one to the BatchNorm alone. The "
    "outputs are the same to within rounding; the price is a convolution that is computed and "
    "stored twice.",
    solution=rewritten,
)
