"""Which layer feeds which BatchNorm, and nothing else? Read from traces of a model's parts.

A model is traced as a whole where torch.fx can follow its Python; else its children are, each by
itself, down to what cannot be followed. A module may be called many times: what counts is every
place where it is called, in every trace.
"""

from __future__ import annotations

import dis
import inspect
import sys
from collections.abc import Container, Iterator
from itertools import combinations, product
from operator import attrgetter
from types import CodeType, TracebackType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from dlhelpers.fusion.states import Asks, State, as_it_was, is_same_state, names_read, set_state
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


class _Input(fx.Proxy):
    """A proxy of a tensor whose number of dimensions is known."""

    def dim(self) -> int:
        """Return the number of dimensions."""
        return self.tracer.dimensions

    ndimension = dim
    ndim = property(dim)


_PLAIN = (bool, int, float, str)
_MOST_TRACES, _MOST_BRANCHES, _MOST_STATES = 64, 16, 12


class _Tracer(Tracer):
    """Stop at layers and BatchNorms, also where they are subclasses of somebody's own.

    The inputs have ``dimensions``, if given. Where Python asks whether a value is true, the answer
    is that of ``path``, and false past its end; ``taken`` has the answers that were given,
    ``asked_in`` the code that asked last.
    """

    def __init__(
        self,
        leaves: Container[int] = (),
        buffers: bool = False,
        dimensions: int | None = None,
        path: tuple[bool, ...] = (),
    ) -> None:
        super().__init__()
        self.proxy_buffer_attributes = buffers
        self.leaves, self.dimensions, self.path = leaves, dimensions, path
        self.taken: list[bool] = []
        self.is_lost = False
        self.asked_in: CodeType | None = None
        self.read: set[int] = set()  # ids of tensors
        self.inside: set[int] = set()  # ids of modules

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Return the graph; its last node's ``meta["read"]`` has the ids of the tensors read."""
        self.inside = {id(module) for module in root.modules()}
        graph = super().trace(root, concrete_args)
        graph.output_node().meta["read"] = self.read
        return graph

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return what stands for a node's value."""
        is_input = node.op == "placeholder" and self.dimensions is not None
        return _Input(node, self) if is_input else super().proxy(node)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Call the layers of a slice such as ``self.features[:4]``, which has no name itself."""
        if isinstance(m, nn.Sequential) and id(m) not in self.inside:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

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
        """Say which branch this trace takes."""
        if len(self.taken) == _MOST_BRANCHES:  # it may be a loop
            self.is_lost = True
            return super().to_bool(obj)  # which raises
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_globals.get("__name__", "") == fx.proxy.__name__:
            frame = frame.f_back
        self.asked_in = frame.f_code
        self.taken.append(len(self.taken) < len(self.path) and self.path[len(self.taken)])
        return self.taken[-1]

    def iter(self, obj: fx.Proxy) -> Iterator[fx.Proxy]:
        """Give up, even where the model's own code catches the error."""
        self.is_lost = True
        return super().iter(obj)

    def is_refused(self, problem: Exception) -> bool:
        """Whether the model's own code raised this, in the branch that it has just taken."""
        last: TracebackType | None = problem.__traceback__
        while last is not None and last.tb_next is not None:
            last = last.tb_next
        if last is None or isinstance(problem, TypeError):  # a proxy may be of the wrong type
            return False
        code = last.tb_frame.f_code
        return code is self.asked_in and code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def traces(
    module: nn.Module,
    leaves: Container[int] = (),
    *,
    buffers: bool = False,
    dimensions: int | None = None,
    why: list[str] | None = None,
) -> list[fx.Graph]:
    """Return graphs of a module's calls, none where torch.fx cannot follow its Python.

    One for each choice of optional arguments that are given or not, since a proxy in a trace is
    never None; of more than four all, one or none are tried. Where Python branches on a value, both
    ways are followed, but for one that raises, and calls are traced again in each state that a call
    leaves and a later one reads. Where there would be too many, none is returned.

    Args:
        module: any; left as it is.
        leaves: ids of modules whose calls are one node, besides layers and BatchNorms.
        buffers: whether what is computed of buffers alone is in the graph.
        dimensions: of the inputs, for code that asks for them.
        why: is given the reason where states of the module forbid it.
    """
    if "forward" in vars(module):  # torch.fx would trace the class's
        return []
    optional = {
        name: parameter.default
        for name, parameter in inspect.signature(module.forward).parameters.items()
        if parameter.default is not parameter.empty
    }
    choices = _choices(optional)
    read: set[str] | None = set()
    states: list[State] = [{}]  # that calls begin in: the model's, and those that a call leaves
    todo: list[tuple[State, dict[str, Any], tuple[bool, ...]]] = [({}, one, ()) for one in choices]
    graphs: list[fx.Graph] = []
    changed, asks = "", Asks()
    while todo:
        is_lost = len(graphs) + len(todo) > _MOST_TRACES or len(states) > _MOST_STATES
        begin, given, path = todo.pop(0)
        tracer = _Tracer(leaves, buffers, dimensions, path)
        try:
            if not is_lost:
                with as_it_was(module) as left, asks:
                    set_state(begin)
                    graphs.append(tracer.trace(module, given or None))
        except Exception as problem:  # whatever Python cannot do with a proxy
            is_lost = not tracer.is_refused(problem)
        if is_lost or tracer.is_lost:
            if why is not None and changed:
                why.append(f"changes {changed}, which later calls of it read")
            return []
        taken = tuple(tracer.taken)
        todo += [(begin, given, (*taken[:i], True)) for i in range(len(path), len(taken))]
        if left and not read:
            read = names_read(module)
        new = {
            key: value
            for key, value in left.items()
            if _is_read(*key, read, asks.asked) or (not begin and isinstance(value, _PLAIN))
        }
        if not any(is_same_state(new, {k: v for k, v in s.items() if k in new}) for s in states):
            changed = next(name for _, name in new)
            states.append(left)
            todo += [(left, one, ()) for one in choices]
    return graphs


def _is_read(owner: nn.Module, name: str, read: set[str] | None, is_asked: bool) -> bool:
    """Whether what a call has changed may decide what later ones do."""
    return (read is None or name in read) and (is_asked or name not in owner._buffers)


def _choices(optional: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the values that optional arguments are traced with; others are proxies."""
    if len(optional) > 4:
        groups = [
            names for count in (0, 1, len(optional)) for names in combinations(optional, count)
        ]
        return [{name: optional[name] for name in names} for names in groups]
    each = [
        [{name: default}, {name: not default} if isinstance(default, bool) else {}]
        for name, default in optional.items()
    ]
    return [{k: v for one in parts for k, v in one.items()} for parts in product(*each)][::-1]


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
