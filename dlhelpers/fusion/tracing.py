"""Which layer feeds which BatchNorm, and nothing else? Read from traces of a model's parts.

A model is traced as a whole where torch.fx can follow its Python; else its children are, each by
itself, down to what cannot be followed. A module may be called many times: what counts is every
place where it is called, in every trace.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Container, Iterator
from contextlib import contextmanager
from itertools import combinations
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from dlhelpers.patching import Tracer

__all__ = [
    "SHAPE_ATTRIBUTES",
    "as_module",
    "caller_of",
    "has_hooks",
    "is_batch_norm",
    "is_layer",
    "reads_values",
    "replace_module",
    "tensor_at",
    "traces",
]


def is_batch_norm(module: nn.Module) -> bool:
    """Whether it is one of torch's BatchNorms, a subclass, or torchvision's frozen one."""
    return isinstance(module, _BatchNorm) or type(module).__name__ == "FrozenBatchNorm2d"


def is_layer(module: nn.Module) -> bool:
    """Whether it is a convolution or a linear layer."""
    return isinstance(module, _ConvNd | nn.Linear)


class _Tracer(Tracer):
    """Stop at layers and BatchNorms, also where they are subclasses of somebody's own."""

    def __init__(
        self, leaves: Container[int] = (), buffers: bool = False, requires_grad: bool = False
    ) -> None:
        super().__init__()
        self.proxy_buffer_attributes = buffers
        self.leaves, self.requires_grad, self.is_asked = leaves, requires_grad, False
        self.read: set[int] = set()  # ids of tensors

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Return the graph; its last node's ``meta["read"]`` has the ids of the tensors read."""
        graph = super().trace(root, concrete_args)
        graph.output_node().meta["read"] = self.read
        return graph

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Note which tensors are read: buffers leave no node."""
        if isinstance(attr_val, Tensor):
            self.read.add(id(attr_val))
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        """Whether a call of it is one node."""
        return (
            is_layer(module)
            or is_batch_norm(module)
            or id(module) in self.leaves
            or super().is_leaf_module(module, qualified_name)
        )

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Say whether a value requires gradients, which is followed both ways; no more."""
        if obj.node.target is getattr and obj.node.args[1:] == ("requires_grad",):
            self.is_asked = True
            return self.requires_grad
        return super().to_bool(obj)


def traces(module: nn.Module, leaves: Container[int] = (), buffers: bool = False) -> list[fx.Graph]:
    """Return graphs of a module's calls, none where torch.fx cannot follow its Python.

    One for each choice of optional arguments that are given or not, since a proxy in a trace is
    never None: the first with all of them given. Of more than four all, one or none are tried.

    Args:
        module: any; left as it is.
        leaves: ids of modules whose calls are one node, besides layers and BatchNorms.
        buffers: whether what is computed of buffers alone is in the graph.
    """
    if "forward" in vars(module):  # torch.fx would trace the class's
        return []
    optional = {
        name: parameter.default
        for name, parameter in inspect.signature(module.forward).parameters.items()
        if parameter.default is not parameter.empty
    }
    counts = range(len(optional) + 1) if len(optional) <= 4 else (0, 1, len(optional))
    choices = [names for count in counts for names in combinations(optional, count)]
    graphs = []
    with _as_it_was(module):
        try:
            for names in choices:
                given = {name: optional[name] for name in names} or None
                tracer = _Tracer(leaves, buffers)
                graphs.append(tracer.trace(module, given))
                if tracer.is_asked:
                    graphs.append(_Tracer(leaves, buffers, requires_grad=True).trace(module, given))
        except Exception:  # whatever Python cannot do with a proxy
            return []
    return graphs


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Take off hooks and checks, which want no proxies; undo what a forward did to the model."""
    states = [(m, {k: _kept(v) for k, v in vars(m).items()}) for m in model.modules()]
    buffers = [(buffer, buffer.clone(), buffer._version) for buffer in model.buffers()]
    for module, _ in states:
        for key in ("_forward_hooks", "_forward_pre_hooks"):
            vars(module)[key].clear()
        if is_batch_norm(module):
            for key in ("_check_input_dim", "_check_non_zero_input_channels"):
                vars(module)[key] = lambda x: None
    try:
        yield
    finally:
        for module, state in states:
            for key, value in vars(module).items():
                if key.startswith("_tensor_constant"):  # the graph's
                    state.setdefault(key, value)
            vars(module).clear()
            vars(module).update(state)
        for buffer, value, version in buffers:
            if buffer._version != version:
                with torch.no_grad():
                    buffer.copy_(value)


def _kept(value: Any) -> Any:
    """Return a copy of what a forward may change; methods and what has no copy are themselves."""
    if callable(value):
        return value
    try:
        return copy.copy(value)
    except Exception:  # whatever an object's own copying does
        return value


def as_module(owner: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """Return a module that runs a graph, with what it needs of its owner's."""
    graph.lint()
    plain = fx.Graph()  # without the tracer, which its pickle would need
    plain.output(plain.graph_copy(graph, {}))
    return fx.GraphModule(owner, plain, type(owner).__name__).train(owner.training)


def tensor_at(root: nn.Module, source: Any) -> Tensor | None:
    """Return the tensor of a module that a node stands for; None where it is computed."""
    is_read = isinstance(source, fx.Node) and source.op == "get_attr"
    return attrgetter(str(source.target))(root) if is_read else None


SHAPE_ATTRIBUTES = {"shape", "ndim", "dtype", "device", "is_cuda", "layout", "requires_grad"}
_SHAPE_CALLS = {
    *("size", "dim", "ndimension", "numel", "is_floating_point"),
    *("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"),
    *("new_zeros", "new_ones", "new_empty", "new_full"),
}


def reads_values(node: fx.Node) -> bool:
    """Whether a node uses more of its input than its shape, type and device."""
    if node.target is getattr:
        return node.args[1] not in SHAPE_ATTRIBUTES
    if node.op == "call_method":
        return node.target not in _SHAPE_CALLS
    is_torchs = node.op == "call_function" and getattr(torch, _name(node), None) is node.target
    return not (is_torchs and _name(node) in _SHAPE_CALLS)


def _name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", "")


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody looks at, or changes, what goes through it."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def caller_of(node: fx.Node, root: nn.Module) -> nn.Module:
    """Return the module whose forward a node of root's graph was called in."""
    stack = node.meta.get("nn_module_stack")
    return root.get_submodule(next(reversed(stack.values()))[0]) if stack else root


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put one module in another's place, under all its names."""
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new
