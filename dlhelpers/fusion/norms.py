"""Which modules are a BatchNorm in eval mode, and what else do they do?

Torch's and torchvision's are one and nothing else. Others put more into one forward: timm's
``BatchNormAct2d`` an activation, DETR's ``FrozenBatchNorm2d`` the arithmetic itself. Their trace is
read as algebra: as long as what happens to the input x is y = s x + t per channel, with s and t
made of the module's own tensors, it is the norm, and what follows is the rest.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.operator_schemas import normalize_function
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from dlhelpers.fusion.folding import scale_and_shift
from dlhelpers.fusion.tracing import (
    as_module,
    has_hooks,
    is_batch_norm,
    is_layer,
    reads_values,
    tensor_at,
    traces,
)

__all__ = ["Norm", "arguments_of", "norms_of"]

_PLAIN = {_BatchNorm.forward, nn.SyncBatchNorm.forward}
_ROOTS = {"sqrt", "rsqrt", "pow"}  # of a variance, by which a norm divides


@dataclass(frozen=True)
class Norm:
    """A module that is a BatchNorm, alone or with more behind it.

    Attributes:
        values: what :func:`~dlhelpers.fusion.folding.fold_after` reads of a BatchNorm.
        rest: what stands in the module's place once the norm is folded.
        spatial: the input's dimensions past [N, C]; None where it works with any.
        why: why the norm cannot be told from what else the module does; empty where it can.
    """

    values: Any
    rest: nn.Module
    spatial: int | None = None
    why: str = ""

    @property
    def is_alone(self) -> bool:
        """Whether nothing is left of the module without its norm."""
        return isinstance(self.rest, nn.Identity)


def norms_of(model: nn.Module) -> dict[int, Norm]:
    """Return id of a module -> what of it is a BatchNorm, of every module that is or holds one."""
    found: dict[int, Norm] = {}
    for module in model.modules():
        frozen = type(module).forward.__module__ == "torchvision.ops.misc"
        if is_batch_norm(module) and (frozen or type(module).forward in _PLAIN):
            if "forward" in vars(module):
                found[id(module)] = _unknown(module, "a forward of its own")
            else:
                found[id(module)] = Norm(module, _in_its_place(module))
        elif is_batch_norm(module):
            found[id(module)] = _split(module)
        elif _may_be_one(module):
            norm = _split(module)
            if not norm.why:
                found[id(module)] = norm
    return found


def _may_be_one(module: nn.Module) -> bool:
    """Whether its own tensors could be a norm's: two or more, all of one value per channel."""
    kind = type(module)
    if kind.__module__.startswith(("torch.nn", "torch.ao")) or is_layer(module):
        return False
    if isinstance(module, fx.GraphModule) or kind.forward is nn.Module.forward:
        return False
    own = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
    sizes = {t.numel() for t in own if t.is_floating_point() and t.dim()}
    wide = any(max(t.shape) != t.numel() for t in own if t.dim())
    return len(sizes) == 1 and len(own) > 1 and not wide


def _in_its_place(module: nn.Module) -> nn.Identity:
    """Return an identity with the module's attributes that are no tensors, which models read."""
    identity = nn.Identity()
    for name, value in vars(module).items():
        if not name.startswith("_") and name != "training":
            vars(identity)[name] = value
    return identity.train(module.training)


def _unknown(module: nn.Module, why: str) -> Norm:
    return Norm(module, nn.Identity(), why=f"{type(module).__name__} has {why}")


def _split(module: nn.Module) -> Norm:
    own = "a forward of its own"
    if "forward" in vars(module):
        return _unknown(module, own)
    graphs = traces(module, buffers=True)
    if not graphs:
        return _unknown(module, f"{own}, which torch.fx cannot trace")
    found = [_read(module, graph) for graph in graphs]
    for norm in found:
        if norm.why:
            return norm
    first = found[0]
    if any(not _is_same(first, norm) for norm in found[1:]):
        return _unknown(module, f"{own}, which its optional arguments change")
    if not first.is_alone:
        first.rest.train(module.training)
    return first


def _is_same(a: Norm, b: Norm) -> bool:
    pairs = ((a.values.weight, b.values.weight), (a.values.bias, b.values.bias))
    same = all(one.shape == two.shape and torch.equal(one, two) for one, two in pairs)
    return same and a.spatial == b.spatial and a.is_alone and b.is_alone


class _NoNormError(Exception):
    """Raised where a node is no affine function, per channel, of the input."""


@dataclass(frozen=True)
class _Affine:
    """s x + t with s and t of [1], or [C] along dimension 1 of a tensor of spatial + 2 ones."""

    scale: Tensor
    shift: Tensor
    spatial: int | None = None
    is_norm: bool = False  # by statistics, not just any affine function


def _read(module: nn.Module, graph: fx.Graph) -> Norm:
    """Follow a trace from its input for as long as the values are affine."""
    own = "a forward of its own"
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    if not inputs:
        return _unknown(module, own)
    x = end = inputs[0]
    consts = _constants(module, graph)
    value = best = _Affine(torch.ones(1).double(), torch.zeros(1).double())
    is_named = "batchnorm" in type(module).__name__.lower()  # its statistics are in s and t
    node, why = x, "which is no batch_norm of its input"
    while True:
        users = [user for user in node.users if reads_values(user)]
        if len(users) != 1:
            if not best.is_norm:
                why = f"which uses {'its input' if node is x else node.name} more than once"
            break
        if users[0].op == "output":
            break
        try:
            value = _step(users[0], node, value, consts)
        except _NoNormError as problem:
            if not best.is_norm and str(problem):
                why = str(problem)
            break
        node = users[0]
        if value.is_norm or (is_named and value.scale.numel() > 1):
            value = replace(value, is_norm=True)
            best, end = value, node
    if not best.is_norm:
        return _unknown(module, f"{own}, {why}")
    count = best.scale.numel() if best.scale.numel() > 1 else best.shift.numel()
    values = SimpleNamespace(
        running_mean=torch.zeros_like(best.scale).expand(count),
        running_var=torch.ones_like(best.scale).expand(count),
        weight=best.scale.expand(count),
        bias=best.shift.expand(count),
        eps=0.0,
    )
    return Norm(values, _rest(module, graph, x, end), best.spatial)


def _constants(module: nn.Module, graph: fx.Graph) -> dict[fx.Node, Any]:
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


def _step(node: fx.Node, before: fx.Node, x: _Affine, consts: dict[fx.Node, Any]) -> _Affine:
    """Return the value of a node that uses the affine one before it."""
    if node.target is F.batch_norm:
        return _batch_normed(node, before, x, consts)
    name = _name(node)
    name = _SWAPPED.get(name, _LONG.get(name, name))
    if node.op not in ("call_function", "call_method") or node.kwargs:
        raise _NoNormError
    if name == "addcmul" and len(node.args) == 3:
        added, *factors = node.args
        if before in factors:
            other = factors[1 - factors.index(before)]
            return _sum(_product(x, _const(other, consts)), _const(added, consts))
    if name in ("neg", "negative") and len(node.args) == 1:
        return _product(x, (torch.tensor([-1.0]).double(), None, False))
    if name not in ("add", "sub", "rsub", "mul", "div") or len(node.args) != 2:
        raise _NoNormError
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
    raise _NoNormError


_Const = tuple[Tensor, int | None, bool]  # [1] or [C]; spatial; whether statistics made it


def _const(value: Any, consts: dict[fx.Node, Any]) -> _Const:
    is_node = isinstance(value, fx.Node)
    if is_node and value not in consts:
        raise _NoNormError
    by_statistics = is_node and _is_made_by_a_root(value)
    value = consts[value] if is_node else value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return torch.tensor([float(value)]).double(), None, False
    if not isinstance(value, Tensor):
        raise _NoNormError
    if value.numel() == 1:
        return value.double().flatten(), None, by_statistics
    # the channels' dimension is 1, so that all others are 1 and those behind it are spatial
    wide = [i for i, size in enumerate(value.shape) if size != 1]
    if len(wide) != 1 or wide[0] > 1:
        raise _NoNormError
    spatial = value.dim() - 1 - wide[0]
    if value.dim() > 1 and wide[0] == 0 and spatial == 0:
        raise _NoNormError
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


def _agreed(x: _Affine, spatial: int | None) -> int | None:
    if None not in (x.spatial, spatial) and x.spatial != spatial:
        raise _NoNormError
    return x.spatial if spatial is None else spatial


def _product(x: _Affine, other: _Const) -> _Affine:
    by, spatial, by_statistics = other
    spatial = _agreed(x, spatial)
    return _Affine(x.scale * by, x.shift * by, spatial, x.is_norm or by_statistics)


def _sum(x: _Affine, other: _Const) -> _Affine:
    added, spatial, _ = other
    return _Affine(x.scale, x.shift + added, _agreed(x, spatial), x.is_norm)


def _batch_normed(node: fx.Node, before: fx.Node, x: _Affine, consts: Any) -> _Affine:
    given = arguments_of(node)
    if given["input"] is not before:
        raise _NoNormError("whose batch_norm has another input")
    if given.get("training"):
        raise _NoNormError("which uses the batch's statistics")
    keys = ("running_mean", "running_var", "weight", "bias")
    for key in keys:
        if isinstance(given.get(key), fx.Node) and given[key] not in consts:
            raise _NoNormError(f"whose {key} is computed of the input")
    values = {key: consts.get(given.get(key)) for key in keys}
    eps = given.get("eps", 1e-5)
    scale, shift = scale_and_shift(SimpleNamespace(**values, eps=consts.get(eps, eps)))
    return _Affine(x.scale * scale, x.shift * scale + shift, x.spatial, True)


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of a call of F.batch_norm by their names."""
    normalized = normalize_function(
        F.batch_norm, node.args, node.kwargs, normalize_to_only_use_kwargs=True
    )
    return dict(normalized.kwargs)


def _rest(module: nn.Module, graph: fx.Graph, x: fx.Node, end: fx.Node) -> nn.Module:
    """Return a module of what follows the norm, with the attributes that are no tensors."""
    made_of_x = {x}
    for node in graph.nodes:
        if not made_of_x.isdisjoint(node.all_input_nodes):
            made_of_x.add(node)
    gone, node = set(), end
    while node is not x:  # sizes and types of what goes are those of the input
        before = next(one for one in node.all_input_nodes if one in made_of_x)
        node.replace_all_uses_with(x)
        gone.add(node)
        node = before
    for node in reversed(graph.nodes):
        if not node.users and node.op != "output" and (node in gone or node not in made_of_x):
            graph.erase_node(node)
    inner: OrderedDict[str, nn.Module] = OrderedDict()
    node = x
    while True:
        users = [user for user in node.users if reads_values(user)]
        if len(users) != 1:
            break
        node = users[0]
        if node.op == "output":
            if node.args[0] is not x and not inner:
                break
            return _chain(module, inner)
        name = str(node.target)
        alone = node.op == "call_module" and len(node.args) == 1 and not node.kwargs
        if not alone or "." in name or name in inner:
            break
        inner[name] = module.get_submodule(name)
    return as_module(module, graph)


def _chain(module: nn.Module, inner: OrderedDict[str, nn.Module]) -> nn.Module:
    left = OrderedDict(
        (name, one) for name, one in inner.items() if type(one) is not nn.Identity or has_hooks(one)
    )
    identity = _in_its_place(module)
    if not left:
        return identity
    rest = nn.Sequential(left)
    vars(rest).update({k: v for k, v in vars(identity).items() if k not in vars(rest)})
    return rest
