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
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dlhelpers.fusion.affine import Affine, NotAffineError, constants_of, reads, step
from dlhelpers.fusion.tracing import (
    as_module,
    has_hooks,
    is_batch_norm,
    is_layer,
    reads_values,
    traces,
)

__all__ = ["Norm", "norms_of"]

_STATISTICS = {"running_mean", "running_var"}
_PLAIN = {_BatchNorm.forward, nn.SyncBatchNorm.forward}


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
                found[id(module)] = Norm(module, _with_attributes(nn.Identity(), module))
        elif is_batch_norm(module):
            found[id(module)] = _split(module)
        elif _may_be_one(module):
            norm = _split(module)
            if not norm.why or module._buffers.keys() >= _STATISTICS:
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


def _with_attributes(rest: nn.Module, module: nn.Module) -> nn.Module:
    """Give what stands in a module's place its attributes that are no tensors: models read them."""
    for name, value in vars(module).items():
        if not name.startswith("_") and name not in vars(rest):
            vars(rest)[name] = value
    return rest.train(module.training)


def _unknown(module: nn.Module, why: str) -> Norm:
    return Norm(module, nn.Identity(), why=f"{type(module).__name__} has {why}")


def _split(module: nn.Module) -> Norm:
    own = "a forward of its own"
    if "forward" in vars(module):
        return _unknown(module, own)
    norm = _split_for(module, None)
    if not norm.why:
        return norm
    each = {dimensions: _split_for(module, dimensions) for dimensions in (4, 3, 5)}
    works = {dimensions: one for dimensions, one in each.items() if not one.why}
    if not works:
        return norm
    free = [replace(one, spatial=None) for one in works.values()]
    if works.keys() == each.keys() and all(_is_same(free[0], one) for one in free[1:]):
        return free[0]
    dimensions = next(iter(works))
    return replace(works[dimensions], spatial=dimensions - 2)


def _split_for(module: nn.Module, dimensions: int | None) -> Norm:
    """Return the norm for inputs of that many dimensions; None where it does not ask for them."""
    own = "a forward of its own"
    graphs = traces(module, buffers=True, dimensions=dimensions)
    if not graphs:
        return _unknown(module, f"{own}, which torch.fx cannot trace")
    found = [_read(module, graph) for graph in graphs]
    first = max(found, key=lambda norm: norm.spatial is not None)
    if all(norm.why for norm in found):
        return first
    if not all(_is_same(first, norm) for norm in found if norm is not first):
        return _unknown(module, f"{own}, which its arguments or inputs change")
    return first


def _is_same(a: Norm, b: Norm) -> bool:
    if a.why or b.why:
        return False
    pairs = ((a.values.weight, b.values.weight), (a.values.bias, b.values.bias))
    same = all(one.shape == two.shape and torch.allclose(one, two, 1e-12) for one, two in pairs)
    return same and b.spatial in (a.spatial, None) and a.is_alone and b.is_alone


def _read(module: nn.Module, graph: fx.Graph) -> Norm:
    """Follow a trace from its input for as long as the values are affine."""
    own = "a forward of its own"
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    if not inputs:
        return _unknown(module, own)
    x = end = inputs[0]
    consts = constants_of(module, graph)
    value = best = Affine(torch.ones(1).double(), torch.zeros(1).double())
    is_named = "batchnorm" in type(module).__name__.lower()  # its statistics are in s and t
    node, why = x, "in which no batch_norm of its input is recognised"
    while True:
        users = [user for user in node.users if reads(user, node)]
        if len(users) != 1:
            if not best.is_norm:
                why = f"which uses {'its input' if node is x else node.name} more than once"
            break
        if users[0].op == "output":
            break
        try:
            value = step(users[0], node, value, consts)
        except NotAffineError as problem:
            if not best.is_norm and str(problem):
                why = str(problem)
            break
        node = users[0]
        if value.is_norm or (is_named and value.scale.numel() > 1):
            value = replace(value, is_norm=True)
            if not value.is_cast:
                best, end = value, node
    if not best.is_norm or end is x:
        why = "which casts its input to another type" if value.is_cast else why
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


def _rest(module: nn.Module, graph: fx.Graph, x: fx.Node, end: fx.Node) -> nn.Module:
    """Return a module of what follows the norm, with the attributes that are no tensors."""
    made_of_x = {x}
    for node in graph.nodes:
        if any(one in made_of_x and reads(node, one) for one in node.all_input_nodes):
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
    return _with_attributes(as_module(module, graph), module)


def _chain(module: nn.Module, inner: OrderedDict[str, nn.Module]) -> nn.Module:
    left = OrderedDict(
        (name, one) for name, one in inner.items() if type(one) is not nn.Identity or has_hooks(one)
    )
    return _with_attributes(nn.Sequential(left) if left else nn.Identity(), module)
