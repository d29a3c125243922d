"""What does a module do to its input, channel by channel, as long as it is y = s x + t?

A trace is read as algebra in float64: what does not depend on the input is computed, sums and
products with it change s and t, and a call of F.batch_norm is one of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.operator_schemas import normalize_function
from torch.nn import functional as F

from dlhelpers.fusion.folding import scale_and_shift
from dlhelpers.fusion.tracing import reads_values, tensor_at

__all__ = [
    "Affine",
    "NotAffineError",
    "arguments_of",
    "calls_batch_norm",
    "constants_of",
    "reads",
    "step",
]

_ROOTS = {"sqrt", "rsqrt", "pow"}  # of a variance, by which a norm divides


class NotAffineError(Exception):
    """Raised where a node is no affine function, per channel, of the input."""


@dataclass(frozen=True)
class Affine:
    """s x + t with s and t of [1], or [C] along dimension 1 of a tensor of spatial + 2 ones."""

    scale: Tensor
    shift: Tensor
    spatial: int | None = None
    is_norm: bool = False  # by statistics, not just any affine function
    is_cast: bool = False  # to another type than the input's


def constants_of(module: nn.Module, graph: fx.Graph) -> dict[fx.Node, Any]:
    """Compute, in float64, what does not depend on the input; what roots hold is marked."""
    env: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            tensor = tensor_at(module, node)
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                env[node] = tensor.detach().double()
            elif tensor is not None:
                env[node] = tensor
        elif node.op in ("call_function", "call_method"):
            if _name(node) == "getattr" and node.args[1:] == ("dtype",):
                env[node] = torch.float64  # of the input: what is cast to it is not rounded
            elif _name(node) in ("to", "type_as") and node.args[0] in env:
                env[node] = env[node.args[0]]
            elif node.all_input_nodes and all(one in env for one in node.all_input_nodes):
                try:
                    env[node] = _computed(node, env)
                except Exception:  # what does not run is no constant
                    continue
    return env


def _computed(node: fx.Node, env: dict[fx.Node, Any]) -> Any:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
    with torch.no_grad():
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)


def _name(node: fx.Node) -> str:
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return target.strip("_") if target.startswith("__") else target.rstrip("_")


_SWAPPED = {"radd": "add", "rmul": "mul", "iadd": "add", "imul": "mul", "isub": "sub"}
_LONG = {"multiply": "mul", "subtract": "sub", "divide": "div", "truediv": "div", "itruediv": "div"}


def step(node: fx.Node, before: fx.Node, x: Affine, consts: dict[fx.Node, Any]) -> Affine:
    """Return the value of a node that uses the affine one before it."""
    if calls_batch_norm(node):
        return _batch_normed(node, before, x, consts)
    name = _name(node)
    name = _SWAPPED.get(name, _LONG.get(name, name))
    if node.op not in ("call_function", "call_method") or node.kwargs:
        raise NotAffineError
    if name in _CASTS:
        return replace(x, is_cast=not _is_cast_back(node, name))
    if name == "addcmul" and len(node.args) == 3:
        added, *factors = node.args
        if before in factors:
            other = factors[1 - factors.index(before)]
            return _sum(_product(x, _const(other, consts)), _const(added, consts))
    if name in ("neg", "negative") and len(node.args) == 1:
        return _product(x, (torch.tensor([-1.0]).double(), None, False))
    if name not in ("add", "sub", "rsub", "mul", "div") or len(node.args) != 2:
        raise NotAffineError
    first, second = node.args
    other = _const(second if first is before else first, consts)
    if name == "add":
        return _sum(x, other)
    if name == "mul":
        return _product(x, other)
    if name == "div" and first is before:
        return _product(x, (1 / other[0], *other[1:]))
    if name == "sub":
        minus = torch.tensor([-1.0]).double(), None, False
        if first is before:
            return _sum(x, (-other[0], *other[1:]))
        return _sum(_product(x, minus), other)
    raise NotAffineError


_CASTS = {"float", "double", "half", "bfloat16", "to", "type_as"}


def _is_cast_back(node: fx.Node, name: str) -> bool:
    """Whether a value becomes one of the input's type."""
    given = node.args[1] if len(node.args) == 2 and name in ("to", "type_as") else None
    if name == "to" and getattr(given, "target", None) is getattr and given.args[1] == "dtype":
        given = given.args[0]
    return isinstance(given, fx.Node) and given.op == "placeholder"


def reads(user: fx.Node, node: fx.Node) -> bool:
    """Whether a node uses the values of another one, not just its shape and type."""
    is_model = user.target in ("type_as", "to") and user.args[0] is not node
    return reads_values(user) and not is_model


_Const = tuple[Tensor, int | None, bool]  # [1] or [C]; spatial; whether statistics made it


def _const(value: Any, consts: dict[fx.Node, Any]) -> _Const:
    is_node = isinstance(value, fx.Node)
    if is_node and value not in consts:
        raise NotAffineError
    by_statistics = is_node and _is_made_by_a_root(value)
    value = consts[value] if is_node else value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return torch.tensor([float(value)]).double(), None, False
    if not isinstance(value, Tensor):
        raise NotAffineError
    if value.numel() == 1:
        return value.double().flatten(), None, by_statistics
    # the channels' dimension is 1, so that all others are 1 and those behind it are spatial
    wide = [i for i, size in enumerate(value.shape) if size != 1]
    if len(wide) != 1 or wide[0] > 1:
        raise NotAffineError
    spatial = value.dim() - 1 - wide[0]
    if value.dim() > 1 and wide[0] == 0 and spatial == 0:
        raise NotAffineError
    return value.double().flatten(), spatial, by_statistics


def _is_made_by_a_root(node: fx.Node) -> bool:
    todo, seen = [node], set()
    while todo:
        one = todo.pop()
        if one not in seen:
            seen.add(one)
            if one.op != "get_attr" and _name(one) in _ROOTS:
                return True
            todo.extend(one.all_input_nodes)
    return False


def _agreed(x: Affine, spatial: int | None) -> int | None:
    if None not in (x.spatial, spatial) and x.spatial != spatial:
        raise NotAffineError
    return x.spatial if spatial is None else spatial


def _product(x: Affine, other: _Const) -> Affine:
    by, spatial, by_statistics = other
    spatial = _agreed(x, spatial)
    return Affine(x.scale * by, x.shift * by, spatial, x.is_norm or by_statistics, x.is_cast)


def _sum(x: Affine, other: _Const) -> Affine:
    added, spatial, _ = other
    return replace(x, shift=x.shift + added, spatial=_agreed(x, spatial))


def _batch_normed(node: fx.Node, before: fx.Node, x: Affine, consts: Any) -> Affine:
    given = arguments_of(node)
    if given["input"] is not before:
        raise NotAffineError("whose batch_norm has another input")
    if given.get("training"):
        raise NotAffineError("which uses the batch's statistics")
    keys = ("running_mean", "running_var", "weight", "bias")
    for key in keys:
        if isinstance(given.get(key), fx.Node) and given[key] not in consts:
            raise NotAffineError(f"whose {key} is computed of the input")
    values = {key: consts.get(given.get(key)) for key in keys}
    eps = given.get("eps", 1e-5)
    scale, shift = scale_and_shift(SimpleNamespace(**values, eps=consts.get(eps, eps)))
    return Affine(x.scale * scale, x.shift * scale + shift, x.spatial, True, x.is_cast)


_OF_TORCHS = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum")
_OF_TORCHS += ("eps", "cudnn_enabled")


def calls_batch_norm(node: fx.Node) -> bool:
    """Whether it calls ``F.batch_norm``, or the operator below it."""
    return node.target in (F.batch_norm, torch.batch_norm)


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of a call of batch_norm by their names."""
    if node.target is torch.batch_norm:
        return dict(zip(_OF_TORCHS, node.args, strict=False)) | dict(node.kwargs)
    normalized = normalize_function(
        F.batch_norm, node.args, node.kwargs, normalize_to_only_use_kwargs=True
    )
    return dict(normalized.kwargs)
