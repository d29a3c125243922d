"""Which layer feeds which BatchNorm, and nothing else? Read from traces of a model's parts.

A model is traced as a whole where torch.fx can follow its Python; else its children are, each by
itself, down to what cannot be followed. A module may be called many times: what counts is every
place where it is called, in every trace.
"""

from __future__ import annotations

import copy
import dis
import inspect
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from types import CodeType

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

__all__ = [
    "Calls",
    "caller_of",
    "calls_of",
    "is_batch_norm",
    "is_layer",
    "replace_module",
    "traces",
]


def is_batch_norm(module: nn.Module) -> bool:
    """Whether it is one of torch's BatchNorms, a subclass, or torchvision's frozen one."""
    return isinstance(module, _BatchNorm) or type(module).__name__ == "FrozenBatchNorm2d"


def is_layer(module: nn.Module) -> bool:
    """Whether it is a convolution or a linear layer."""
    return isinstance(module, _ConvNd | nn.Linear)


class _Tracer(fx.Tracer):
    """Stop at layers and BatchNorms, also where they are subclasses of somebody's own."""

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        """Whether a call of it is one node."""
        return (
            is_layer(module)
            or is_batch_norm(module)
            or super().is_leaf_module(module, qualified_name)
        )


def traces(module: nn.Module) -> list[fx.Graph]:
    """Return graphs of a module's calls, none where torch.fx cannot follow its Python.

    One for each choice of optional arguments that are given or not, since a proxy in a trace is
    never None: the first with all of them given. Of more than four all, one or none are tried.
    """
    optional = {
        name: parameter.default
        for name, parameter in inspect.signature(module.forward).parameters.items()
        if parameter.default is not parameter.empty
    }
    counts = range(len(optional) + 1) if len(optional) <= 4 else (0, 1, len(optional))
    with _as_it_was(module):
        try:
            return [
                _Tracer().trace(module, {name: optional[name] for name in names} or None)
                for count in counts
                for names in combinations(optional, count)
            ]
        except Exception:  # whatever Python cannot do with a proxy
            return []


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Take the hooks off, which want no proxies, and undo what a forward did to the model."""
    states = [(m, {k: copy.copy(v) for k, v in vars(m).items()}) for m in model.modules()]
    buffers = [(buffer, buffer.clone(), buffer._version) for buffer in model.buffers()]
    for module, _ in states:
        for key in ("_forward_hooks", "_forward_pre_hooks"):
            vars(module)[key].clear()
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


@dataclass
class Calls:
    """Where each module is called.

    Attributes:
        sites: id of a module -> (node of the call, module whose graph holds it), one for each.
        opaque: id of a module -> name of the module that may call it and cannot be traced.
        reads: ids of modules whose tensors are read past their forward.
        graphs: (module, its graph), of all that could be traced.
    """

    sites: dict[int, list[tuple[fx.Node, nn.Module]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    opaque: dict[int, str] = field(default_factory=dict)
    reads: set[int] = field(default_factory=set)
    graphs: list[tuple[nn.Module, fx.Graph]] = field(default_factory=list)

    def makers(self, module: nn.Module) -> list[nn.Module | None]:
        """Return what made the input of each call, where a module did."""
        found = self.sites[id(module)]
        return [_module_of(_maker(_first(node), root), root) for node, root in found]

    def users(self, module: nn.Module) -> list[list[nn.Module | None]]:
        """Return what uses the output of each call; None for what is no module."""
        found = self.sites[id(module)]
        return [[_module_of(user, root) for user in _users(node, root)] for node, root in found]

    def hooked_between(self, first: nn.Module, second: nn.Module) -> str:
        """Return the name of a module with hooks that holds one of two calls alone, else empty."""
        for call, root in self.sites[id(first)]:
            for other, other_root in self.sites[id(second)]:
                if other_root is root:
                    for name in sorted(_holders(call) ^ _holders(other)):
                        holder = root.get_submodule(name)
                        if holder not in (first, second) and has_hooks(holder):
                            return name
        return ""

    def between(self, bn: nn.Module) -> str:
        """Say what stands between a BatchNorm and the layers before it."""
        node, root = self.sites[id(bn)][0]
        return _said(_first(node), root, "the input")

    def behind(self, bn: nn.Module) -> str:
        """Say what uses a BatchNorm's output first."""
        node, root = self.sites[id(bn)][0]
        return _said(next(iter(node.users), None), root, "nothing")


def _said(node: fx.Node | None, root: nn.Module, otherwise: str) -> str:
    module = _module_of(node, root)
    if module is not None:
        return type(module).__name__
    if node is None or node.op == "placeholder":
        return otherwise
    return "the output" if node.op == "output" else getattr(node.target, "__name__", node.target)


def _holders(node: fx.Node) -> set[str]:
    return {name for name, _ in (node.meta.get("nn_module_stack") or {}).values()}


def _first(node: fx.Node) -> fx.Node | None:
    inputs = node.all_input_nodes
    return inputs[0] if inputs else None


def _maker(node: fx.Node | None, root: nn.Module) -> fx.Node | None:
    """Look through identities, such as stand where a BatchNorm was."""
    while _is_plain_identity(_module_of(node, root)):
        node = _first(node)
    return node


def _is_plain_identity(module: nn.Module | None) -> bool:
    return isinstance(module, nn.Identity) and not has_hooks(module)


def _users(node: fx.Node, root: nn.Module) -> Iterator[fx.Node]:
    for user in node.users:
        if _is_plain_identity(_module_of(user, root)):
            yield from _users(user, root)
        else:
            yield user


def _module_of(node: fx.Node | None, root: nn.Module) -> nn.Module | None:
    if node is None or node.op != "call_module":
        return None
    return root.get_submodule(str(node.target))


def calls_of(model: nn.Module) -> Calls:
    """Trace a model, part by part where the whole cannot be; the model is left as it is."""
    calls, done = Calls(), set()
    for root, graph in _graphs(model, "", calls, done):
        calls.graphs.append((root, graph))
        for node in graph.nodes:
            if node.op == "call_module":
                calls.sites[id(root.get_submodule(str(node.target)))].append((node, root))
            elif node.op == "get_attr":
                owner = str(node.target).rpartition(".")[0]
                calls.reads.add(id(root.get_submodule(owner)))
    return calls


def _graphs(
    module: nn.Module, name: str, calls: Calls, done: set[int]
) -> Iterator[tuple[nn.Module, fx.Graph]]:
    if id(module) in done:
        return
    done.add(id(module))
    if is_layer(module) or is_batch_norm(module):
        return  # called by what could not be traced
    if type(module).forward is not nn.Module.forward and next(module.children(), None) is not None:
        graphs = traces(module)
        if graphs:
            yield from ((module, graph) for graph in graphs)
            called = {
                id(module.get_submodule(str(node.target)))
                for graph in graphs
                for node in graph.nodes
                if node.op == "call_module"
            }
            yield from _uncalled(module, name, calls, done, called)
            return
    has_forward = type(module).forward is not nn.Module.forward
    names = _names_in_code(type(module))
    for child_name, child in module.named_children():
        if has_forward:
            who = name or type(module).__name__
            calls.opaque.setdefault(id(child), who)
            for inner_name, inner in child.named_modules():
                # may be reached past its parent: by name, or as an element of a list
                element = f"{child_name}[]" if inner_name.isdecimal() else None
                if not {inner_name.rpartition(".")[2], element}.isdisjoint(names):
                    calls.opaque.setdefault(id(inner), who)
        yield from _graphs(child, f"{name}.{child_name}".lstrip("."), calls, done)


def _uncalled(
    module: nn.Module, name: str, calls: Calls, done: set[int], called: set[int]
) -> Iterator[tuple[nn.Module, fx.Graph]]:
    """Trace what this forward leaves out, such as the heads that only train mode uses."""
    for child_name, child in module.named_children():
        full = f"{name}.{child_name}".lstrip(".")
        if id(child) in called:
            continue
        if any(id(inner) in called for inner in child.modules()):
            yield from _uncalled(child, full, calls, done, called)
        else:
            yield from _graphs(child, full, calls, done)


def _names_in_code(cls: type) -> set[str]:
    """Return all names in a class's own code, and ``name[]`` of what is not just called there."""
    names: set[str] = set()
    for base in cls.__mro__:
        if base is nn.Module:
            break
        for key, value in vars(base).items():
            code = getattr(getattr(value, "__func__", value), "__code__", None)
            if code is not None:
                names |= _names_in(code, with_elements=key != "__init__")
    return names


def _names_in(code: CodeType, with_elements: bool) -> set[str]:
    names = set(code.co_names)
    if with_elements:  # a call's attribute is loaded with a place for self
        names |= {
            f"{step.argval}[]"
            for step in dis.get_instructions(code)
            if step.opname == "LOAD_ATTR" and "NULL" not in step.argrepr
        }
    for inner in code.co_consts:  # lambdas and generator expressions
        if isinstance(inner, CodeType):
            names |= _names_in(inner, with_elements)
    return names
