"""Real exercise of notebook 07: a good output on eight bits, with at most two layers in float."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dlhelpers.course.exercises.real.tasks import Reached, RefusedError, Task, given
from dlhelpers.quantization import CALIBRATORS, sensitivity, simulate, sqnr_db

__all__ = ["TASK"]

_GOAL_DB = 20.0
_BITS = 8
_FLOAT_LAYERS = 2
Subject = tuple[nn.Module, list[Tensor]]  # a model, batches for calibration and one more


def _network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [layer for _ in range(4) for layer in (nn.Linear(32, 32), nn.ReLU())]
        model = nn.Sequential(*layers, nn.Linear(32, 8))
        for layer in model[::2]:
            nn.init.kaiming_normal_(layer.weight)
    return model.eval()


def _batches(*shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator) for _ in range(4)]


def _spread(layer: nn.Module, following: nn.Module, factors: Tensor) -> None:
    """Scale outputs and take it back in the next layer: the function stays the same."""
    with torch.no_grad():
        layer.weight *= factors.view(-1, *[1] * (layer.weight.dim() - 1))
        layer.bias *= factors
        following.weight /= factors.view(1, -1, *[1] * (following.weight.dim() - 2))


def _but_one(factor: float) -> Tensor:
    return torch.ones(32).index_fill(0, torch.tensor(3), factor)


def outlier() -> Subject:
    """Return a network in which one channel is far larger than the others, in two places."""
    model = _network()
    for layer, following in ((0, 2), (2, 4)):
        _spread(model[layer], model[following], _but_one(200.0))
    return model, _batches(128, 32)


def channels() -> Subject:
    """Return a network whose channels differ in size, from small to large."""
    model = _network()
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    for layer, following in ((0, 2), (2, 4)):
        _spread(model[layer], model[following], torch.logspace(-1.5, 1.5, 32)[order])
    return model, _batches(128, 32)


def inputs() -> Subject:
    """Return a network one of whose inputs is in another unit."""
    model, data = _network(), _batches(128, 32)
    with torch.no_grad():
        model[0].weight[:, 0] /= 300
        for batch in data:
            batch[:, 0] *= 300
    _spread(model[2], model[4], _but_one(100.0))
    return model, data


def depthwise() -> Subject:
    """Return a depthwise convolution whose channels differ in size."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first, last = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(256, 8)
        by_channel, mix = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 16, 1)
    _spread(by_channel, mix, torch.logspace(-1.5, 1.5, 16))
    head = nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), last
    model = nn.Sequential(first, nn.ReLU(), by_channel, nn.ReLU(), mix, *head)
    return model.eval(), _batches(16, 3, 16, 16)


def choice(model: nn.Module, data: list[Tensor]) -> dict[str, Any]:
    """Return scales per channel, and in float the two layers that cost most by themselves."""
    ranking = sensitivity(model, data, progress=False)
    worst = [row.name for row in ranking.rows[:2]]
    return {"calibrator": "min-max", "per_channel": True, "left_float": worst}


def _measure(make: Callable[[], Any], answer: Callable[..., Any]) -> Reached:
    model, data = make()
    model.eval()
    *calibration, held_out = data
    if not calibration:
        raise RefusedError("two batches are needed at least: the last one is held out")
    chosen = given(answer, copy.deepcopy(model), list(calibration))
    _need_choice(chosen, model)
    found = _error_db(model, calibration, held_out, **chosen)
    return Reached(
        found,
        f"dB of signal to quantization noise on {_BITS} bits, {_in_float(chosen)} "
        f"(goal: {_GOAL_DB:g} or more)",
        passed=found >= _GOAL_DB,
        advice="the columns of sensitivity(model, data) say whether a layer suffers by its weights "
        "or by its input: scales per channel help the first kind, float the second",
    )


def _in_float(chosen: dict[str, Any]) -> str:
    number = len(chosen["left_float"])
    return f"{number} layer{'s' * (number != 1)} in float"


def _error_db(
    model: nn.Module,
    calibration: list[Tensor],
    held_out: Tensor,
    calibrator: str,
    per_channel: bool,
    left_float: list[str],
) -> float:
    rounded = simulate(
        model, calibration, bits=_BITS, calibrator=calibrator, per_channel=per_channel
    )
    for name in left_float:
        rounded.model.set_submodule(name, copy.deepcopy(model.get_submodule(name)))
    with torch.no_grad():
        return sqnr_db(model(held_out), rounded(held_out))


def _need_choice(chosen: Any, model: nn.Module) -> None:
    keys = {"calibrator", "per_channel", "left_float"}
    if not isinstance(chosen, dict) or set(chosen) != keys:
        raise RefusedError(f"the answer must be a dict with {', '.join(sorted(keys))}")
    if chosen["calibrator"] not in CALIBRATORS:
        known = ", ".join(CALIBRATORS)
        raise RefusedError(f"calibrator must be one of {known}, got {chosen['calibrator']!r}")
    if not isinstance(chosen["per_channel"], bool):
        raise RefusedError(f"per_channel must be True or False, got {chosen['per_channel']!r}")
    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
    ]
    named = chosen["left_float"]
    if not isinstance(named, list) or not set(named) <= set(layers):
        raise RefusedError(f"left_float must list layers of {', '.join(layers)}, got {named!r}")
    if len(named) > _FLOAT_LAYERS:
        raise RefusedError(f"left_float may name {_FLOAT_LAYERS} layers at most, got {named!r}")


TASK = Task(
    id="07",
    goal="at least 20 dB on eight bits, with at most two layers in float",
    offered={
        "outlier": outlier,
        "channels": channels,
        "inputs": inputs,
        "depthwise": depthwise,
    },
    own="(model, batches), with the last batch held out from calibration",
    measure=_measure,
    rubric=(
        "which layers lost most, and whether by their weights or by their inputs",
        "why one scale is too coarse there: what sets it, and what it leaves to the small values",
        "why these layers and no others may stay in float, and what that costs in speed",
    ),
    explanation="A few channels are much larger than the others, so that a single scale for the "
    "tensor is set by them and leaves only a few steps to the rest. Scales per channel cure this "
    "for the weights, where each output channel has its own, but the inputs of the layers that "
    "follow have one scale all the same. Left in float, these two layers get their inputs "
    "unrounded; all others stay on eight bits, and what is lost is the speed of two layers.",
    solution=choice,
)
