"""Which activation made this tensor? Read from the graph that autograd keeps.

The walk starts at ``tensor.grad_fn`` and goes back through nodes that only move, copy or cast
values (view, reshape, transpose, squeeze, slice, index, cat, to, clone) until one changes them:
``SoftmaxBackward0`` says softmax, ``AddmmBackward0`` says a linear layer, ``MulBackward0`` says
arithmetic, and then nothing is claimed. What stands in front of an activation is read the same
way, through scaling by a constant, masks and dropout as well. Node names and their ``_saved_*``
sizes and axes are plain numbers, a constant factor is read as it was saved: no saved tensor is
unpacked, so hooks on saved tensors are never run.
Source: https://pytorch.org/docs/stable/notes/autograd.html
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from .values import Values

__all__ = [
    "OF_VALUES",
    "UNKNOWN",
    "Head",
    "activation_of",
    "head_of_tensor",
    "is_of_cosines",
    "is_of_logarithms",
]


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
        before: the activation whose values this one was applied to; None for a linear layer,
            arithmetic, or nothing seen. An ``other`` that only scales has one as well, and an
            ``unknown`` whose numbers show it.
        scale: constant that this activation's values were multiplied by before the next step.
        is_sure: False where the range of the numbers alone was seen.
        is_moved: whether an unknown constant was added to these values.
    """

    kind: str
    axis: int | None = None
    source: str = ""
    where: str = ""
    before: Head | None = None
    scale: float = 1.0
    is_sure: bool = True
    is_moved: bool = False

    @property
    def is_known(self) -> bool:
        """Whether anything at all was seen."""
        return self.kind != "unknown"


UNKNOWN = Head("unknown")
OF_VALUES = "its numbers: "

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
    "Linear": "linear",
    "Convolution": "linear",
    "MkldnnConvolution": "linear",
    "NativeBatchNorm": "linear",
    "NativeLayerNorm": "linear",
}
# Layers where an operand is a parameter; else they mix values, of which nothing is known.
_PRODUCTS = ("Addmm", "Mm", "Addbmm", "Baddbmm", "Bmm", "Mv", "Addmv", "Dot")
_OF_WEIGHTS = ("T", "Transpose", "Permute", "ToCopy", "Expand", "WeightNormInterface", "Unsqueeze")
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
_LOGARITHMS = ("LogSoftmax", "LogSigmoid", "Log", "Log1P", "Logsumexp", "Logcumsumexp")
_FINITE = ("softmax", "sigmoid", "tanh")  # their means and sums are in a range as well
_SCALES = ("Mul", "Div", "Neg", "NativeDropout")
# Activations after which a second one is looked at: their values' range is known.
_BOUNDED = (*_FINITE, "log_softmax", "log_sigmoid", "relu", "exp", "softplus")
_AxisMap = Callable[[int], int | None]  # axis before the step -> axis after it


def head_of_tensor(tensor: Tensor) -> Head:
    """Return the activation that the graph of ``tensor`` shows; UNKNOWN without a graph."""
    node = getattr(tensor, "grad_fn", None)
    if node is None:
        return UNKNOWN
    return _walk(node, tuple(tensor.shape), [], 0)


def is_of_logarithms(tensor: Tensor) -> bool:
    """Whether arithmetic made ``tensor`` out of logarithms of probabilities: focal, weighted."""
    seen, waiting = set(), [getattr(tensor, "grad_fn", None)]
    while waiting and len(seen) < 100:
        node = waiting.pop(0)
        if node is None or node in seen:
            continue
        seen.add(node)
        stem = node.name().split("Backward")[0]
        if stem in _LOGARITHMS:
            return True
        if _KINDS.get(stem) != "linear" and stem not in _PRODUCTS:
            waiting.extend(operand for operand, _ in node.next_functions)
    return False


def is_of_cosines(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a product of two matrices of unit vectors, as they were saved."""
    node = getattr(tensor, "grad_fn", None)
    if node is None or node.name().split("Backward")[0] != "Mm" or tensor.numel() > 2**22:
        return False
    rows, columns = (_saved(node, name) for name in ("self", "mat2"))
    if rows is None or columns is None:
        return False
    lengths = (rows.float().norm(dim=1), columns.float().norm(dim=0))
    return all(bool(((length - 1).abs() < 1e-2).all()) for length in lengths)


def _saved(node: Any, name: str) -> Tensor | None:
    """Return a tensor that a node saved, without unpacking it; None where that cannot be."""
    try:
        saved = getattr(node, f"_raw_saved_{name}")
        tensor = saved.data if saved.unpack_hook is None else None
    except Exception:  # a graph that backward has freed, a torch without these names
        return None
    return tensor.detach() if isinstance(tensor, Tensor) else None


def _walk(
    node: Any, shape: tuple[int, ...] | None, path: list[_AxisMap | None], depth: int
) -> Head:
    while node is not None and depth < 100:
        depth += 1
        name = node.name()
        stem = name.split("Backward")[0]
        source = f"its grad_fn ({name})"
        kind = _KINDS.get(stem)
        if stem in _PRODUCTS:
            layer = any(_is_parameter(operand) for operand, _ in node.next_functions)
            return Head("linear" if layer else "other", None, source)
        if stem in _CLAMPS:
            return _head_of_clamp(node, stem, shape, path, depth)
        if stem in ("Log", "Exp"):
            inner = _walk(_next(node), shape, path, depth)
            seen = _OF_LOG_AND_EXP.get((stem, inner.kind))
            if seen is not None:
                return Head(seen, inner.axis, source, before=inner.before)
            seen = "exp" if stem == "Exp" else "other"
            return Head(seen, None, source, before=activation_of(inner) if seen == "exp" else None)
        if stem == "Threshold" and getattr(node, "_saved_threshold", 0) != 0:
            kind = "other"
        if kind is not None:
            axis = _follow(node, shape, path) if "softmax" in kind else None
            return Head(kind, axis, source, before=_before(node, kind, shape, depth))
        if stem in _SCALES:
            factor = _factor(node, stem)
            inner = (
                UNKNOWN if factor is None else activation_of(_walk(_next(node), shape, [], depth))
            )
            if inner is not None and inner.is_known:
                inner = replace(inner, scale=inner.scale * factor)
                return Head("other", None, source, before=inner)
            return Head("other", None, source)
        if stem in ("Add", "Sub", "Mean"):
            return Head("other", None, source, before=_mixed(node, stem, shape, depth))
        if stem in _JOINS:
            return _head_of_parts(node, stem, shape, path, depth)
        if "AccumulateGrad" in name:
            return Head("unknown", before=_of_values(getattr(node, "variable", None)))
        if stem.startswith("torch::autograd::") or any(part in name for part in _OPAQUE):
            return UNKNOWN
        step = _step(node, stem, shape)
        if step is None:
            return Head("other", None, source)
        shape, axis_map = step
        path = [*path, axis_map]
        node = _next(node)
    return UNKNOWN


def activation_of(head: Head) -> Head | None:
    """Return the activation that ``head`` is or only scales; None where it is neither."""
    if head.kind in ("other", "unknown"):
        return head.before
    return head if head.kind in _BOUNDED else None


def _before(node: Any, kind: str, shape: Any, depth: int) -> Head | None:
    """Return what stands in front of an activation; of a leaf what its numbers say."""
    if kind not in _BOUNDED or not node.next_functions:
        return None
    return activation_of(_walk(_next(node), shape, [], depth))


def _of_values(leaf: Tensor | None) -> Head | None:
    """Return the activation that the numbers of a leaf show: an output that came detached."""
    if leaf is None or isinstance(leaf, nn.Parameter):
        return None
    values = Values(leaf, 65_536)
    if not values.within(0, 1) or values.low == values.high:
        return None
    if any(values.sums_to_one(axis) > 1 for axis in range(leaf.ndim)):
        return Head("softmax", None, OF_VALUES + "rows sum to 1")
    return Head("sigmoid", None, OF_VALUES + "all lie in [0, 1]", is_sure=False)


def _factor(node: Any, stem: str) -> float | None:
    """Return the constant that a node multiplies by; 1 for a mask or dropout, None if unknown."""
    if stem in ("Neg", "NativeDropout"):
        return -1.0 if stem == "Neg" else 1.0
    sources = [operand for operand, _ in node.next_functions]
    if len(sources) != 2 or sources[0] is None or sources[1] is not None:
        return None
    other = _saved(node, "other")
    try:
        values = [] if other is None else other.reshape(-1)[:4096].unique().tolist()
    except Exception:  # wrapped tensors
        return None
    if len(values) == 1 and values[0]:
        return 1 / values[0] if stem == "Div" else values[0]
    return 1.0 if stem == "Mul" and len(values) == 2 and values[0] == 0 else None


def _mixed(node: Any, stem: str, shape: Any, depth: int) -> Head | None:
    """Return the activation whose values were averaged, added up or moved by a constant."""
    parts = [operand for operand, _ in node.next_functions]
    if parts[:1] in ([], [None]) or getattr(node, "_saved_alpha", 1) != 1:
        return None
    shape = None if stem == "Mean" else shape
    heads = [activation_of(_walk(part, shape, [], depth + 30)) for part in parts if part]
    if any(head is None or head.kind not in _FINITE for head in heads):
        return None
    first = heads[0]
    if len(heads) == 1:
        return first if stem == "Mean" else replace(first, is_sure=False, is_moved=True)
    same = all(head.kind == first.kind and head.scale * first.scale > 0 for head in heads)
    if stem != "Add" or not same or any(head.is_moved for head in heads):
        return None
    return replace(first, scale=sum(head.scale for head in heads), before=None)


def _is_parameter(node: Any) -> bool:
    """Whether a leaf of the graph, or a view or cast of one, comes out of this node."""
    for _ in range(8):
        if node is None or node.name().split("Backward")[0] not in _OF_WEIGHTS:
            break
        node = _next(node)
    return node is not None and "AccumulateGrad" in node.name()


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
    branches = node.next_functions[:64]  # joins of joins of joins would take 64 ** 3 walks
    heads = [_walk(branch, shape, path, depth + 30) for branch, _ in branches]
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
