"""Which layer feeds which BatchNorm, and nothing else? Read from traces of a model's parts.

A model is traced as a whole where torch.fx can follow its Python; else its children are, each by
itself, down to what cannot be followed. A module may be called many times: what counts is every
place where it is called, in every trace.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

__all__ = ["Calls", "caller_of", "calls_of", "is_batch_norm", "is_layer", "replace_module", "trace"]


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


def trace(module: nn.Module) -> fx.Graph | None:
    """Return the graph of a module's calls; None where torch.fx cannot follow its Python."""
    try:
        return _Tracer().trace(module)
    except Exception:  # whatever Python cannot do with a proxy
        return None


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


def _first(node: fx.Node) -> fx.Node | None:
    inputs = node.all_input_nodes
    return inputs[0] if inputs else None


def _maker(node: fx.Node | None, root: nn.Module) -> fx.Node | None:
    """Look through identities, such as stand where a BatchNorm was."""
    while isinstance(_module_of(node, root), nn.Identity):
        node = _first(node)
    return node


def _users(node: fx.Node, root: nn.Module) -> Iterator[fx.Node]:
    for user in node.users:
        if isinstance(_module_of(user, root), nn.Identity):
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
        graph = trace(module)
        if graph is not None:
            yield module, graph
            called = {
                id(module.get_submodule(str(node.target)))
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
                if inner_name.rpartition(".")[2] in names:  # may be reached past its parent
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
    names: set[str] = set()
    for base in cls.__mro__:
        if base is nn.Module:
            break
        for value in vars(base).values():
            code = getattr(getattr(value, "__func__", value), "__code__", None)
            if code is not None:
                names.update(code.co_names)
    return names
