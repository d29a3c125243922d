"""What of a BatchNorm that is no module, but a call of F.batch_norm on tensors of a module?

Its owner's forward has to change, so the owner becomes a torch.fx GraphModule without that call.
"""

from __future__ import annotations

from types import SimpleNamespace

from torch import fx, nn

from dlhelpers.fusion.affine import arguments_of, calls_batch_norm
from dlhelpers.fusion.calls import Calls, calls_of, made_by, used_by
from dlhelpers.fusion.folding import fold_after
from dlhelpers.fusion.norms import Norm
from dlhelpers.fusion.refusing import why_not_axis, why_not_layer
from dlhelpers.fusion.report import FusionRow
from dlhelpers.fusion.tracing import (
    as_module,
    caller_of,
    has_hooks,
    is_layer,
    replace_module,
    tensor_at,
    traces,
)

__all__ = ["fold_functional"]


def fold_functional(
    model: nn.Module, norms: dict[int, Norm], dims: dict[int, set[int]]
) -> tuple[nn.Module, dict[str, FusionRow]]:
    """Fold calls of ``F.batch_norm`` in eval mode into the layer before; return model and rows.

    Args:
        model: changed in place, but for its own forward.
        norms: id of a module that is a BatchNorm itself, whose calls are not looked at.
        dims: id of a layer -> dimensions of its outputs on the example.
    """
    rows: dict[str, FusionRow] = {}
    owners = {
        id(caller_of(node, root))
        for root, graph in calls_of(model, norms).graphs
        for node in graph.nodes
        if calls_batch_norm(node)
    }
    # from the inside out: an owner's graph holds the calls of all that is inside of it
    for name, owner in reversed(list(model.named_modules())):
        if id(owner) in norms or is_layer(owner):  # a layer's own are for its weights
            continue
        if id(owner) not in owners and "batch_norm" not in _names_of(owner):
            continue
        graphs, calls = traces(owner, norms), calls_of(model, norms)
        if why := calls.opaque.get(id(owner), "") or _why_not_owner(owner, len(graphs)):
            row = f"{name}: F.batch_norm".removeprefix(": ")
            rows[row] = FusionRow(row, "function", why=why)
            continue
        graph, is_changed = graphs[0], False
        for number, node in enumerate(_own_calls(owner, graph)):
            row = f"{name}: F.batch_norm {number}".removeprefix(": ")
            layer, why = _fold(owner, graph, node, calls, dims)
            into = f"{name}.{layer}".lstrip(".") if layer else ""
            rows[row] = FusionRow(row, "function", into=into, why=why)
            is_changed |= bool(layer)
        if is_changed:
            new = as_module(owner, graph)
            if owner is model:
                model = new
            replace_module(model, owner, new)
    return model, rows


def _why_not_owner(owner: nn.Module, graphs: int) -> str:
    if has_hooks(owner):
        return "its module has hooks"
    if not graphs:
        return "its module cannot be traced"
    if graphs > 1:
        return "a trace of its module keeps one branch, or one choice of optional arguments"
    return ""


def _names_of(module: nn.Module) -> tuple[str, ...]:
    code = getattr(type(module).forward, "__code__", None)
    own = not type(module).__module__.startswith(("torch.nn", "torchvision.ops"))
    return code.co_names if code is not None and own else ()


def _own_calls(owner: nn.Module, graph: fx.Graph) -> list[fx.Node]:
    """Return the calls of F.batch_norm in a module's forward, without those of its children's."""
    return [
        node for node in graph.nodes if calls_batch_norm(node) and caller_of(node, owner) is owner
    ]


def _fold(
    owner: nn.Module, graph: fx.Graph, node: fx.Node, calls: Calls, dims: dict[int, set[int]]
) -> tuple[str, str]:
    given = arguments_of(node)
    before = made_by(given["input"], owner)
    if given.get("training"):
        return "", "it is called with training=True"
    if before.op != "call_module" or not is_layer(owner.get_submodule(str(before.target))):
        return "", f"its input comes from {_said(before, owner)}"
    tensors = {
        key: tensor_at(owner, given.get(key))
        for key in ("running_mean", "running_var", "weight", "bias")
    }
    for key, tensor in tensors.items():
        if tensor is None and given.get(key) is not None:
            return "", f"its {key} is computed"
    layer = owner.get_submodule(str(before.target))
    bn = SimpleNamespace(**tensors, eps=given.get("eps", 1e-5))
    where = f"behind {before.target}"
    norm = Norm(bn, nn.Identity())
    if why := why_not_layer(layer, calls) or why_not_axis(layer, norm, dims, where):
        return "", why
    for call, root in calls.sites[id(layer)]:  # everywhere in the model
        users = list(used_by(call, root))
        if len(users) != 1 or not calls_batch_norm(users[0]):
            return "", f"the output of {before.target} is used elsewhere, too"
        if tensor_at(root, arguments_of(users[0])["running_mean"]) is not tensors["running_mean"]:
            return "", f"another batch_norm follows {before.target}, too"
    new = fold_after(layer, bn)
    layer.weight, layer.bias = new.weight, new.bias
    node.replace_all_uses_with(given["input"])
    graph.erase_node(node)
    for unused in [n for n in graph.nodes if n.op == "get_attr" and not n.users]:
        graph.erase_node(unused)
    return str(before.target), ""


def _said(node: fx.Node, root: nn.Module) -> str:
    if node.op == "call_module":
        return type(root.get_submodule(str(node.target))).__name__
    if node.op == "placeholder":
        return "outside of its module"
    return getattr(node.target, "__name__", str(node.target))
