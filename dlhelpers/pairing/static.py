"""Which activation does a model end with? Read from torch.fx or the module list, without a run.

torch.fx traces ``forward`` with stand-ins for tensors; where control flow hinders it, only the
order of nested ``nn.Sequential`` is believed.
Source: https://pytorch.org/docs/stable/fx.html
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dlhelpers.patching import Tracer

from .trace import UNKNOWN, Head

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
    value = _first(value)
    modules = dict(model.named_modules())
    moved = False
    while isinstance(value, torch.fx.Node):
        where = value.target if value.op == "call_module" else ""
        if value.op == "call_module":
            module = modules.get(value.target)
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
        if kind is not None:
            known = isinstance(dim, int) and not moved and "softmax" in kind
            return Head(kind, dim if known else None, "torch.fx", str(where))
        if not keeps:
            return Head("other", None, "torch.fx", str(where))
        moved = moved or value.target not in ("clone", "contiguous", "float", "to")
        value = _first(value.args[0] if value.args else None)
    return UNKNOWN


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
    """Follow the last child of (nested) Sequentials: their order is the order of execution."""
    module, path = model, ""
    while isinstance(module, nn.Sequential) and len(module):
        children = [
            (name, child)
            for name, child in module.named_children()
            if not isinstance(child, _KEEPS_MODULES)
        ]
        if not children:
            return UNKNOWN
        name, module = children[-1]
        path = f"{path}.{name}" if path else name
    kind = _kind_of_module(module)
    if kind is None:
        return UNKNOWN
    dim = getattr(module, "dim", None)
    return Head(kind, dim if isinstance(dim, int) else None, "the module list", path)


def softmax_without_dim(model: nn.Module) -> list[str]:
    """Return the paths of softmax modules whose ``dim`` was left to torch's old guess."""
    return [
        path or type(module).__name__
        for path, module in model.named_modules()
        if isinstance(module, (nn.Softmax, nn.LogSoftmax)) and getattr(module, "dim", 0) is None
    ]
