"""Which layer feeds which BatchNorm, and nothing else? Read from traces of a model's parts.

A model is traced as a whole where torch.fx can follow its Python; else its children are, each by
itself, down to what cannot be followed. A module may be called many times: what counts is every
place where it is called, in every trace.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterator
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from dlhelpers.fusion.reaching import reached_by
from dlhelpers.fusion.tracing import has_hooks, is_batch_norm, is_layer, reads_values, traces

__all__ = ["Calls", "calls_of", "made_by", "used_by"]

_SAME = {
    getattr(nn, name).forward
    for name in (
        *("Dropout", "Dropout1d", "Dropout2d", "Dropout3d"),
        *("AlphaDropout", "FeatureAlphaDropout"),
    )
}
# name of a function of torch's or torchvision's -> place of `training` among its arguments
_DROPS = {
    **dict.fromkeys(("dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout"), 2),
    **dict.fromkeys(("alpha_dropout", "feature_alpha_dropout"), 2),
    **{"stochastic_depth": 3, "drop_block2d": 5, "drop_block3d": 5},
}


@dataclass
class Calls:
    """Where each module is called.

    Attributes:
        sites: id of a module -> (node of the call, module whose graph holds it), one for each.
        opaque: id of a module -> why not all of its calls are known.
        reads: ids of modules whose tensors are read past their forward.
        looks: ids of modules of whose tensors no more is read than shape, type or device.
        graphs: (module, its graph), of all that could be traced.
    """

    sites: dict[int, list[tuple[fx.Node, nn.Module]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    opaque: dict[int, str] = field(default_factory=dict)
    reads: set[int] = field(default_factory=set)
    looks: set[int] = field(default_factory=set)
    graphs: list[tuple[nn.Module, fx.Graph]] = field(default_factory=list)

    def makers(self, module: nn.Module) -> list[nn.Module | None]:
        """Return what made the input of each call, where a module did."""
        found = self.sites[id(module)]
        return [_module_of(made_by(_first(node), root), root) for node, root in found]

    def users(self, module: nn.Module) -> list[list[nn.Module | None]]:
        """Return what uses the output of each call; None for what is no module."""
        found = self.sites[id(module)]
        return [[_module_of(user, root) for user in used_by(node, root)] for node, root in found]

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
        return _said(made_by(_first(node), root), root, "the input")

    def behind(self, bn: nn.Module) -> str:
        """Say what uses a BatchNorm's output first."""
        node, root = self.sites[id(bn)][0]
        return _said(next(used_by(node, root), None), root, "nothing")


def _said(node: fx.Node | None, root: nn.Module, otherwise: str) -> str:
    module = _module_of(node, root)
    if module is not None:
        return type(module).__name__
    if node is None or node.op == "placeholder":
        return otherwise
    return "the output" if node.op == "output" else getattr(node.target, "__name__", node.target)


def _holders(node: fx.Node) -> set[str]:
    return {name for name, _ in (node.meta.get("nn_module_stack") or {}).values()}


def _first(node: fx.Node | None) -> fx.Node | None:
    inputs = node.all_input_nodes if node is not None else ()
    return inputs[0] if inputs else None


def made_by(node: fx.Node | None, root: nn.Module) -> fx.Node | None:
    """Return what made a value, past what gives on its input as it is."""
    while node is not None and _passes_on(node, root):
        node = _first(node)
    return node


def used_by(node: fx.Node, root: nn.Module) -> Iterator[fx.Node]:
    """Give the users of a node's values, past what gives them on as they are."""
    for user in node.users:
        if _passes_on(user, root):
            yield from used_by(user, root)
        elif reads_values(user):
            yield user


def _passes_on(node: fx.Node, root: nn.Module) -> bool:
    """Whether in eval mode its output is its input, as an identity's or a dropout's is."""
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        if has_hooks(module) or "forward" in vars(module):
            return False
        is_dropout = type(module).forward in _SAME and not module.training
        return is_dropout or type(module).forward is nn.Identity.forward
    if node.op == "call_method":
        return node.target in ("contiguous", "clone")
    if node.target is torch.clone:
        return True
    return node.op == "call_function" and _is_dropout_off(node)


def _is_dropout_off(node: fx.Node) -> bool:
    """Whether it calls a dropout function with ``training=False``."""
    place = _DROPS.get(getattr(node.target, "__name__", ""))
    where = getattr(node.target, "__module__", None) or "torch"  # a builtin's has none
    if place is None or where.partition(".")[0] not in ("torch", "torchvision"):
        return False
    given = node.args[place] if len(node.args) > place else node.kwargs.get("training", True)
    return given is False


def _module_of(node: fx.Node | None, root: nn.Module) -> nn.Module | None:
    if node is None or node.op != "call_module":
        return None
    return root.get_submodule(str(node.target))


def calls_of(model: nn.Module, leaves: Container[int] = ()) -> Calls:
    """Trace a model, part by part where the whole cannot be; the model is left as it is.

    Args:
        model: any.
        leaves: ids of modules whose calls are one node, besides layers and BatchNorms.
    """
    calls = Calls()
    for root, graph in _Parts(calls, leaves).of(model, ""):
        calls.graphs.append((root, graph))
        for module in root.modules():
            for buffer in module._buffers.values():
                if id(buffer) in graph.output_node().meta["read"]:
                    calls.looks.add(id(module))
        for node in graph.nodes:
            if node.op == "call_module":
                calls.sites[id(root.get_submodule(str(node.target)))].append((node, root))
            elif node.op == "get_attr":
                owner = id(root.get_submodule(str(node.target).rpartition(".")[0]))
                calls.looks.add(owner)
                if any(reads_values(user) for user in node.users):
                    calls.reads.add(owner)
    return calls


@dataclass
class _Parts:
    """The largest parts of a model that torch.fx can follow."""

    calls: Calls
    leaves: Container[int]
    done: set[int] = field(default_factory=set)

    def of(self, module: nn.Module, name: str) -> Iterator[tuple[nn.Module, fx.Graph]]:
        """Give (part, one of its graphs), in the order of the model's modules."""
        if id(module) in self.done:
            return
        self.done.add(id(module))
        if self._is_one_node(module):
            return  # called by what could not be traced
        if type(module).forward is nn.Module.forward and "forward" not in vars(module):
            yield from self._children(module, name)  # a list of modules
            return
        if next(module.children(), None) is None:
            return
        states: list[str] = []
        if graphs := traces(module, self.leaves, why=states):
            yield from ((module, graph) for graph in graphs)
            called = {
                id(module.get_submodule(str(node.target)))
                for graph in graphs
                for node in graph.nodes
                if node.op == "call_module"
            }
            yield from self._uncalled(module, name, called)
            return
        who = name or type(module).__name__
        cannot = states[0] if states else "cannot be traced"
        reach = reached_by(module)
        for inner in filter(self._is_one_node, reach.called):
            self.calls.opaque.setdefault(id(inner), f"{who} calls it, and {cannot}")
        for inner in reach.unknown:
            why = f"{who} may reach it past its parent, and {cannot}"
            self.calls.opaque.setdefault(id(inner), why)
        for inner in reach.read:
            why = f"{who} reads its tensors, and {cannot}"
            self.calls.opaque.setdefault(id(inner), why)
        yield from self._children(module, name)

    def _is_one_node(self, module: nn.Module) -> bool:
        return is_layer(module) or is_batch_norm(module) or id(module) in self.leaves

    def _children(self, module: nn.Module, name: str) -> Iterator[tuple[nn.Module, fx.Graph]]:
        for child_name, child in module.named_children():
            yield from self.of(child, f"{name}.{child_name}".lstrip("."))

    def _uncalled(
        self, module: nn.Module, name: str, called: set[int]
    ) -> Iterator[tuple[nn.Module, fx.Graph]]:
        """Trace what this forward leaves out, such as the heads that only train mode uses."""
        for child_name, child in module.named_children():
            full = f"{name}.{child_name}".lstrip(".")
            if id(child) in called:
                continue
            if any(id(inner) in called for inner in child.modules()):
                yield from self._uncalled(child, full, called)
            else:
                yield from self.of(child, full)
