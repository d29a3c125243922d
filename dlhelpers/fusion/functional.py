"""What of a BatchNorm that is no module, but a call of F.batch_norm on tensors of a module?

Its owner's forward has to change, so the owner becomes a torch.fx GraphModule without that call.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import fx, nn
from torch.fx.operator_schemas import normalize_function
from torch.nn import functional as F

from dlhelpers.fusion.folding import fold_after
from dlhelpers.fusion.report import FusionRow
from dlhelpers.fusion.tracing import Tracer, is_layer

__all__ = ["fold_functional"]


def fold_functional(model: nn.Module) -> tuple[nn.Module, dict[str, FusionRow]]:
    """Fold calls of ``F.batch_norm`` in eval mode into the layer before; return model and rows."""
    rows: dict[str, FusionRow] = {}
    for name, owner in list(model.named_modules()):
        if "batch_norm" not in _names_of(owner):
            continue
        graph = _trace(owner)
        if graph is None or owner._forward_hooks or owner._forward_pre_hooks:
            rows[f"{name}: F.batch_norm"] = FusionRow(
                f"{name}: F.batch_norm", "function", why="its module cannot be traced, or has hooks"
            )
            continue
        changed = False
        for number, node in enumerate([n for n in graph.nodes if n.target is F.batch_norm]):
            row = f"{name}: F.batch_norm {number}".lstrip(": ")
            layer, why = _fold(owner, graph, node)
            into = f"{name}.{layer}".lstrip(".") if layer else ""
            rows[row] = FusionRow(row, "function", into=into, why=why)
            changed |= bool(layer)
        if changed:
            graph.lint()
            new = fx.GraphModule(owner, graph, type(owner).__name__)
            new.train(owner.training)
            model = _put(model, name, new)
    return model, rows


def _names_of(module: nn.Module) -> tuple[str, ...]:
    code = getattr(type(module).forward, "__code__", None)
    own = not type(module).__module__.startswith(("torch.nn", "torchvision.ops"))
    return code.co_names if code is not None and own else ()


def _trace(owner: nn.Module) -> fx.Graph | None:
    try:
        return Tracer().trace(owner)
    except Exception:  # whatever Python cannot do with a proxy
        return None


def _fold(owner: nn.Module, graph: fx.Graph, node: fx.Node) -> tuple[str, str]:
    normalized = normalize_function(
        F.batch_norm, node.args, node.kwargs, normalize_to_only_use_kwargs=True
    )
    given: dict[str, Any] = dict(normalized.kwargs)
    before = given["input"]
    if given.get("training"):
        return "", "it is called with training=True"
    if before.op != "call_module" or not is_layer(owner.get_submodule(str(before.target))):
        return "", "no layer stands before it"
    calls = [n for n in graph.nodes if n.op == "call_module" and n.target == before.target]
    layer = owner.get_submodule(str(before.target))
    if len(before.users) > 1 or len(calls) > 1:
        return "", f"the output of {before.target} is used elsewhere, too"
    if layer._forward_hooks or layer._forward_pre_hooks:
        return "", f"{before.target} has hooks"
    tensors = {}
    for key in ("running_mean", "running_var", "weight", "bias"):
        source = given.get(key)
        if source is not None and (not isinstance(source, fx.Node) or source.op != "get_attr"):
            return "", f"its {key} is computed"
        tensors[key] = None if source is None else _attribute(owner, str(source.target))
    new = fold_after(layer, SimpleNamespace(**tensors, eps=given.get("eps", 1e-5)))
    layer.weight, layer.bias = new.weight, new.bias
    node.replace_all_uses_with(before)
    graph.erase_node(node)
    for unused in [n for n in graph.nodes if n.op == "get_attr" and not n.users]:
        graph.erase_node(unused)
    return str(before.target), ""


def _attribute(owner: nn.Module, name: str) -> Any:
    found: Any = owner
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _put(model: nn.Module, name: str, new: nn.Module) -> nn.Module:
    if not name:
        return new
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, new)
    return model
