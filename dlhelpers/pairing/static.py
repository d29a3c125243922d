"""Which activation does a model end with? Read from torch.fx or the module list, without a run.

torch.fx traces ``forward`` with stand-ins for tensors; where control flow hinders it, only the
order of nested ``nn.Sequential`` is believed.
Source: https://pytorch.org/docs/stable/fx.html
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dlhelpers.patching import Tracer

from .trace import UNKNOWN, Head, activation_of

__all__ = ["head_of_model", "softmax_without_dim"]

_FUNCTIONS = {
    F.softmax: "softmax",
    torch.softmax: "softmax",
    F.log_softmax: "log_softmax",
    torch.log_softmax: "log_softmax",
    torch.sigmoid: "sigmoid",
    F.sigmoid: "sigmoid",
    F.logsigmoid: "log_sigmoid",
    F.relu: "relu",
    torch.relu: "relu",
    torch.tanh: "tanh",
    F.tanh: "tanh",
    torch.exp: "exp",
    F.softplus: "softplus",
    F.relu6: "relu",
    F.hardsigmoid: "sigmoid",
    F.linear: "linear",
    torch.conv1d: "linear",
    torch.conv2d: "linear",
    torch.conv3d: "linear",
}
_METHODS = ("softmax", "log_softmax", "sigmoid", "relu", "tanh", "exp")
_MODULE_KINDS: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.Softmax, "softmax"),
    (nn.Softmax2d, "softmax"),
    (nn.LogSoftmax, "log_softmax"),
    (nn.Sigmoid, "sigmoid"),
    (nn.Hardsigmoid, "sigmoid"),
    (nn.LogSigmoid, "log_sigmoid"),
    (nn.ReLU, "relu"),
    (nn.ReLU6, "relu"),
    (nn.Tanh, "tanh"),
    (nn.Hardtanh, "tanh"),
    (nn.Softplus, "softplus"),
    (nn.Linear, "linear"),
    (nn.modules.conv._ConvNd, "linear"),
)
_KEEPS_MODULES = (nn.Identity, nn.Flatten, nn.Unflatten)
_DROPOUTS = nn.modules.dropout._DropoutNd
_KEEPS_METHODS = (
    "view",
    "reshape",
    "flatten",
    "squeeze",
    "unsqueeze",
    "contiguous",
    "clone",
    "float",
    "double",
    "half",
    "bfloat16",
    "to",
    "transpose",
    "permute",
    "t",
    "cpu",
    "cuda",
    "type",
    "movedim",
)
_KEEPS_FUNCTIONS = (torch.flatten, torch.squeeze, torch.unsqueeze, torch.reshape, torch.transpose)


def head_of_model(model: nn.Module) -> Head:
    """Return the last activation of a model that is not run: torch.fx first, then its list."""
    head = _head_by_fx(model)
    return head if head.is_known else _head_of_list(model)


def _head_by_fx(model: nn.Module) -> Head:
    try:
        graph = Tracer().trace(model)
    except Exception:  # control flow on values, kwargs only, compiled code: not traceable
        return UNKNOWN
    value = next(node for node in reversed(graph.nodes) if node.op == "output").args[0]
    return _head_of_node(_first(value), dict(model.named_modules()))


def _head_of_node(value: Any, modules: dict[str, nn.Module]) -> Head:
    moved = False
    while isinstance(value, torch.fx.Node):
        where = value.target if value.op == "call_module" else ""
        module = modules.get(value.target) if value.op == "call_module" else None
        if value.op == "call_module":
            kind, dim = _kind_of_module(module), getattr(module, "dim", None)
            keeps = isinstance(module, _KEEPS_MODULES)
        elif value.op == "call_function":
            kind, dim = _FUNCTIONS.get(value.target), _dim_of_call(value)
            keeps = value.target in _KEEPS_FUNCTIONS
        elif value.op == "call_method":
            kind = value.target if value.target in _METHODS else None
            dim = _dim_of_call(value)
            keeps = value.target in _KEEPS_METHODS
        else:
            return UNKNOWN
        inner = _first(value.args[0] if value.args else value.kwargs.get("input"))
        if kind is not None:
            known = isinstance(dim, int) and not moved and "softmax" in kind
            axis = dim if known else None
            before = activation_of(_head_of_node(inner, modules))
            return Head(kind, axis, "torch.fx", str(where), before)
        factor = _factor(value, module)
        if not keeps:
            before = None if factor is None else activation_of(_head_of_node(inner, modules))
            if before is not None:
                before = replace(before, scale=before.scale * factor)
            return Head("other", None, "torch.fx", str(where), before)
        moved = moved or value.target not in ("clone", "contiguous", "float", "to")
        value = inner
    return UNKNOWN


def _factor(node: Any, module: nn.Module | None) -> float | None:
    """Return the constant that a step multiplies by; 1 for dropout, None where it is another."""
    if isinstance(module, _DROPOUTS) or node.target in (F.dropout, torch.dropout):
        return 1.0
    if node.target in ("neg", torch.neg, operator.neg):
        return -1.0
    other = node.args[1] if len(node.args) == 2 else None
    if isinstance(other, bool) or not isinstance(other, (int, float)) or not other:
        return None
    if node.target in ("mul", torch.mul, operator.mul):
        return float(other)
    return 1 / other if node.target in ("div", torch.div, operator.truediv) else None


def _first(value: Any) -> Any:
    while isinstance(value, Sequence) and not isinstance(value, str) and value:
        value = value[0]
    if isinstance(value, dict) and value:
        return _first(next(iter(value.values())))
    return value


def _dim_of_call(node: Any) -> Any:
    return node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)


def _kind_of_module(module: nn.Module | None) -> str | None:
    if isinstance(module, (nn.Hardtanh, nn.ReLU6)):
        ends = (module.min_val, module.max_val)
        return {(-1.0, 1.0): "tanh", (0.0, 6.0): "relu"}.get(tuple(map(float, ends)), "other")
    return next((kind for type_, kind in _MODULE_KINDS if isinstance(module, type_)), None)


def _head_of_list(model: nn.Module) -> Head:
    """Follow the last children of (nested) Sequentials: their order is the order of execution."""
    steps = [
        (path, module)
        for path, module in _steps(model)
        if not isinstance(module, (*_KEEPS_MODULES, nn.Sequential))
    ]
    kind = _kind_of_module(steps[-1][1]) if steps else None
    if kind is None:
        return UNKNOWN
    path, module = steps.pop()
    while steps and isinstance(steps[-1][1], _DROPOUTS):
        steps.pop()
    inner = _kind_of_module(steps[-1][1]) if steps else None
    before = None if inner is None else activation_of(Head(inner, None, "the module list"))
    dim = getattr(module, "dim", None)
    return Head(kind, dim if isinstance(dim, int) else None, "the module list", path, before)


def _steps(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield what (nested) Sequentials run, in order, with the path of each."""
    if not isinstance(module, nn.Sequential):
        yield path, module
        return
    for name, child in module.named_children():
        yield from _steps(child, f"{path}.{name}" if path else name)


def softmax_without_dim(model: nn.Module) -> list[str]:
    """Return the paths of softmax modules whose ``dim`` was left to torch's old guess."""
    return [
        path or type(module).__name__
        for path, module in model.named_modules()
        if isinstance(module, (nn.Softmax, nn.LogSoftmax)) and getattr(module, "dim", 0) is None
    ]
