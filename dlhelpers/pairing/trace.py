"""Which activation made this tensor? Read from the graph, from torch.fx or from the module list.

The walk starts at ``tensor.grad_fn`` and goes back through nodes that only move, copy or cast
values (view, reshape, transpose, squeeze, slice, index, cat, to, clone) until one changes them:
``SoftmaxBackward0`` says softmax, ``AddmmBackward0`` says a linear layer, ``MulBackward0`` says
arithmetic, and then nothing is claimed. Node names and their ``_saved_*`` sizes and axes are
plain numbers: no saved tensor is unpacked, so hooks on saved tensors are never run.
Source: https://pytorch.org/docs/stable/notes/autograd.html
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["UNKNOWN", "Head", "head_of_model", "head_of_tensor", "softmax_without_dim"]


@dataclass(frozen=True)
class Head:
    """The last operation that changed the values of a prediction.

    Attributes:
        kind: ``softmax``, ``log_softmax``, ``log_of_softmax``, ``sigmoid``, ``log_sigmoid``,
            ``relu``, ``tanh``, ``exp``, ``softplus``, ``linear``, ``other`` (arithmetic, so
            nothing can be said) or ``unknown`` (no graph).
        axis: for the softmaxes the axis in the prediction's own numbering, None where a step
            between hid it.
        source: how it is known, for the reader.
        where: path of the module, where there is one.
    """

    kind: str
    axis: int | None = None
    source: str = ""
    where: str = ""

    @property
    def is_known(self) -> bool:
        """Whether anything at all was seen."""
        return self.kind != "unknown"


UNKNOWN = Head("unknown")

_KINDS = {
    "Softmax": "softmax",
    "LogSoftmax": "log_softmax",
    "Sigmoid": "sigmoid",
    "Hardsigmoid": "sigmoid",
    "LogSigmoid": "log_sigmoid",
    "Relu": "relu",
    "Threshold": "relu",
    "Tanh": "tanh",
    "Exp": "exp",
    "Softplus": "softplus",
    "Addmm": "linear",
    "Mm": "linear",
    "Addbmm": "linear",
    "Baddbmm": "linear",
    "Bmm": "linear",
    "Mv": "linear",
    "Dot": "linear",
    "Linear": "linear",
    "Convolution": "linear",
    "MkldnnConvolution": "linear",
    "NativeBatchNorm": "linear",
    "NativeLayerNorm": "linear",
}
# Nothing can be said past these, and nothing is known about the values either.
_OPAQUE = (
    "CompiledFunction",
    "CopySlices",
    "IndexPut",
    "AccumulateGrad",
    "CheckpointFunction",
    "CopyBackwards",
    "AsStrided",
)
_SAME_SHAPE = ("ToCopy", "Clone", "Alias", "Contiguous", "Detach", "Flip", "Roll", "ViewAs")
_RESHAPES = ("View", "UnsafeView", "ReshapeAlias", "Reshape", "Expand", "Squeeze")
_PICKS = ("Index", "IndexSelect", "Gather", "MaskedSelect", "Take", "TakeAlongDim")
_SPLITS = ("Split", "SplitWithSizes", "Unbind", "Chunk", "PackPaddedSequence")
_JOINS = ("Cat", "Stack")
_CLAMPS = ("Clamp", "ClampMin", "ClampMax", "Hardtanh")
_SURVIVES_CLAMP = ("softmax", "sigmoid", "log_softmax", "log_of_softmax", "log_sigmoid")
_OF_LOG_AND_EXP = {
    ("Log", "softmax"): "log_of_softmax",
    ("Log", "sigmoid"): "log_sigmoid",
    ("Exp", "log_softmax"): "softmax",
    ("Exp", "log_sigmoid"): "sigmoid",
}
_AxisMap = Callable[[int], int | None]  # axis before the step -> axis after it


def head_of_tensor(tensor: Tensor) -> Head:
    """Return the activation that the graph of ``tensor`` shows; UNKNOWN without a graph."""
    node = getattr(tensor, "grad_fn", None)
    if node is None:
        return UNKNOWN
    return _walk(node, tuple(tensor.shape), [], 0)


def _walk(
    node: Any, shape: tuple[int, ...] | None, path: list[_AxisMap | None], depth: int
) -> Head:
    while node is not None and depth < 100:
        depth += 1
        name = node.name()
        stem = name.split("Backward")[0]
        source = f"its grad_fn ({name})"
        kind = _KINDS.get(stem)
        if stem in _CLAMPS:
            return _head_of_clamp(node, stem, shape, path, depth)
        if stem in ("Log", "Exp"):
            inner = _walk(_next(node), shape, path, depth)
            seen = _OF_LOG_AND_EXP.get((stem, inner.kind), "exp" if stem == "Exp" else "other")
            return Head(seen, inner.axis if "softmax" in seen else None, source)
        if stem == "Threshold" and getattr(node, "_saved_threshold", 0) != 0:
            kind = "other"
        if kind is not None:
            return Head(kind, _follow(node, shape, path) if "softmax" in kind else None, source)
        if stem in _JOINS:
            return _head_of_parts(node, stem, shape, path, depth)
        if stem.startswith("torch::autograd::") or any(part in name for part in _OPAQUE):
            return UNKNOWN
        step = _step(node, stem, shape)
        if step is None:
            return Head("other", None, source)
        shape, axis_map = step
        path = [*path, axis_map]
        node = _next(node)
    return UNKNOWN


def _head_of_clamp(node: Any, stem: str, shape: Any, path: list, depth: int) -> Head:
    """A clamp against log(0) keeps a softmax a softmax; a clamp at 0 is itself a ReLU."""
    low, high = _bounds(node, stem)
    inner = _walk(_next(node), shape, path, depth)
    if low <= 1e-2 and high >= 0.99 and inner.kind in _SURVIVES_CLAMP:
        return inner
    kind = {(-1, 1): "tanh", (0, 1): "sigmoid"}.get((low, high))
    if kind is None:
        kind = "relu" if low == 0 and high > 1 else "other"
    return Head(kind, None, f"its grad_fn ({node.name()})")


def _bounds(node: Any, stem: str) -> tuple[float, float]:
    end = "_val" if stem == "Hardtanh" else ""
    low, high = (getattr(node, f"_saved_{side}{end}", None) for side in ("min", "max"))
    low = -math.inf if low is None or isinstance(low, Tensor) else float(low)
    high = math.inf if high is None or isinstance(high, Tensor) else float(high)
    return low, high


def _next(node: Any) -> Any:
    return node.next_functions[0][0] if node.next_functions else None


def _head_of_parts(node: Any, stem: str, shape: Any, path: list, depth: int) -> Head:
    """All the parts of a cat or stack must show the same activation."""
    dim = _axis(getattr(node, "_saved_dim", None), len(shape) if shape else 0)
    if stem == "Stack" and shape is not None and dim is not None:
        shape = shape[:dim] + shape[dim + 1 :]
        path = [*path, lambda axis: axis + (axis >= dim)]
    else:  # along the softmax's own axis the rows no longer sum to 1: left to the values
        path = [*path, lambda axis: None if axis == dim else axis]
    heads = [_walk(branch, shape, path, depth) for branch, _ in node.next_functions[:64]]
    if not heads or any(head.kind != heads[0].kind for head in heads):
        return UNKNOWN
    same = all(head.axis == heads[0].axis for head in heads)
    return heads[0] if same else replace(heads[0], axis=None)


def _step(node: Any, stem: str, shape: tuple[int, ...] | None) -> tuple | None:
    """Go through one node that keeps values: its input's shape and how axes move; else None."""
    sizes = getattr(node, "_saved_self_sym_sizes", None)
    before = tuple(int(size) for size in sizes) if sizes is not None else None
    dim = getattr(node, "_saved_dim", None)
    if stem in _SAME_SHAPE:
        return shape, lambda axis: axis
    if stem in _RESHAPES:
        after = shape
        if before is None or after is None:
            return before, None
        return before, lambda axis: _same_block(before, after, axis)
    if stem == "Unsqueeze":
        place = _axis(dim, len(shape)) if shape is not None else None
        if place is None:
            return None, None
        return shape[:place] + shape[place + 1 :], lambda axis: axis + (axis >= place)
    if stem == "Select" and before is not None:
        place = _axis(dim, len(before))
        return before, lambda axis: None if axis == place else axis - (axis > place)
    if stem == "Slice" and before is not None:
        whole = shape is not None and before == shape
        place = _axis(dim, len(before))
        return before, lambda axis: axis if whole or axis != place else None
    if stem in ("Transpose", "T"):
        if shape is None:
            return None, None
        first = _axis(getattr(node, "_saved_dim0", 0), len(shape))
        second = _axis(getattr(node, "_saved_dim1", len(shape) - 1), len(shape))
        moved = list(shape)
        moved[first], moved[second] = moved[second], moved[first]
        return tuple(moved), lambda axis: {first: second, second: first}.get(axis, axis)
    if stem == "Permute":
        order = [_axis(place, len(node._saved_dims)) for place in node._saved_dims]
        old = None if shape is None else tuple(shape[order.index(i)] for i in range(len(order)))
        return old, lambda axis: order.index(axis)
    if stem in _PICKS or stem in _SPLITS:
        return before, None
    return None


def _axis(value: Any, ndim: int) -> int | None:
    """Read an axis as autograd keeps it: -1 may stand there as 2**64 - 1."""
    if value is None:
        return None
    value = int(value)
    value = value - 2**64 if value >= 2**63 else value
    return value + ndim if value < 0 else value


def _same_block(before: tuple[int, ...], after: tuple[int, ...], axis: int) -> int | None:
    """Return the axis of ``after`` that holds exactly the elements of ``axis`` of ``before``."""
    stride = math.prod(before[axis + 1 :])
    for place, size in enumerate(after):
        if size == before[axis] and size > 1 and math.prod(after[place + 1 :]) == stride:
            return place
    return None


def _follow(node: Any, shape: tuple[int, ...] | None, path: list[_AxisMap | None]) -> int | None:
    """Carry the softmax's own axis forward through the steps between it and the prediction."""
    if shape is None:
        return None
    axis = _axis(getattr(node, "_saved_dim", None), len(shape))
    for axis_map in reversed(path):
        if axis is None or axis_map is None:
            return None
        axis = axis_map(axis)
    return axis


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
        graph = torch.fx.Tracer().trace(model)
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
