"""What of graphs that torch.export made, where layers and BatchNorms are operators, not modules?"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn

from dlhelpers.fusion.folding import fold_after
from dlhelpers.fusion.report import FusionRow
from dlhelpers.fusion.tracing import tensor_at

__all__ = ["fold_exported"]


def fold_exported(model: nn.Module) -> dict[str, FusionRow]:
    """Fold ATen's batch_norm into the convolution or linear operator before it, in place."""
    rows: dict[str, FusionRow] = {}
    for name, module in model.named_modules():
        if not isinstance(module, fx.GraphModule):
            continue
        is_changed = False
        for node in [n for n in module.graph.nodes if _kind(n) in _NORMS]:
            row = f"{name}.{node.name}".lstrip(".")
            into, why = _fold(module, node)
            rows[row] = FusionRow(row, _kind(node), into=f"{name}.{into}".strip("."), why=why)
            is_changed |= bool(into)
        if is_changed:
            for one in [n for n in module.graph.nodes if n.op == "get_attr" and not n.users]:
                _forget(module, one)  # such as num_batches_tracked
            module.graph.lint()
            module.recompile()
    return rows


_SAME = {"dropout", "dropout_", "feature_dropout", "alpha_dropout", "clone", "contiguous"}
_SHAPES = {"sym_size", "sym_numel", "sym_stride", "_assert_tensor_metadata"}
_NORMS = {"batch_norm", "_native_batch_norm_legit_no_training"}
_LAYERS = {"conv1d", "conv2d", "conv3d", "linear", "convolution"}
_LAYERS |= {"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}


def _kind(node: fx.Node | None) -> str:
    """Return the name of an operator of ATen's, without its overload."""
    target = getattr(node, "target", None)
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return ""
    return target._schema.name.removeprefix("aten::")


def _given(node: fx.Node) -> dict[str, Any]:
    """Return an operator's arguments by their names, defaults too."""
    arguments = node.target._schema.arguments
    given = {one.name: one.default_value for one in arguments if one.has_default_value()}
    given.update(zip((one.name for one in arguments), node.args, strict=False))
    return given | dict(node.kwargs)


def _fold(module: fx.GraphModule, node: fx.Node) -> tuple[str, str]:
    """Fold one call; return the name of the weight's owner, or why not."""
    norm = _given(node)
    if norm.get("training"):
        return "", "it is called with training=True"
    layer = norm["input"]
    while _is_same(layer):
        layer = layer.args[0]
    if _kind(layer) not in _LAYERS:
        source = "the input" if layer.op == "placeholder" else _kind(layer) or layer.op
        return (
            "",
            f"its input comes from {source}; in an exported graph a layer must come before it",
        )
    given = _given(layer)
    users = list(_users(layer))
    if users != [node]:
        return "", f"the output of {layer.name} is used elsewhere, too"
    bn = {key: norm.get(key) for key in ("weight", "bias", "running_mean", "running_var")}
    for one in (given["weight"], given.get("bias"), *bn.values()):
        if one is not None and tensor_at(module, one) is None:
            return "", f"{one} is computed"
    for one in (given["weight"], given.get("bias")):
        if one is not None and _uses(module, one) > 1:
            return "", f"{one.target} is used elsewhere, too"
    tensors = {key: tensor_at(module, one) for key, one in bn.items()}
    if why := _why_not_axis(layer, tensor_at(module, given["weight"])):
        return "", why
    stand_in = _stand_in(module, given, _kind(layer))
    new = fold_after(stand_in, SimpleNamespace(**tensors, eps=norm["eps"]))
    owner = _put(module, layer, given, new)
    for output in [node] if _kind(node) == "batch_norm" else list(node.users):
        output.replace_all_uses_with(norm["input"])
        if output is not node:
            module.graph.erase_node(output)
    module.graph.erase_node(node)
    for one in bn.values():
        if one is not None and not one.users:
            _forget(module, one)
    return owner, ""


def _is_same(node: fx.Node) -> bool:
    if _kind(node) not in _SAME:
        return False
    given = _given(node)
    return not given.get("train", False)


def _users(node: fx.Node) -> Iterator[fx.Node]:
    for user in node.users:
        if _is_same(user):
            yield from _users(user)
        elif _kind(user) not in _SHAPES:
            yield user


def _uses(module: fx.GraphModule, source: fx.Node) -> int:
    """Count the users of a tensor, under all its names."""
    tensor = tensor_at(module, source)
    same = (n for n in module.graph.nodes if n.op == "get_attr" and tensor_at(module, n) is tensor)
    return sum(len(node.users) for node in same)


def _why_not_axis(layer: fx.Node, weight: Tensor) -> str:
    value = layer.meta.get("val")
    if value is None:
        return f"the graph does not say what dimensions the output of {layer.name} has"
    wanted = weight.dim()  # [out, in] of a linear layer, and of a convolution [out, in, ...]
    return (
        ""
        if value.dim() == wanted
        else (f"its channels are dimension 1 of tensors of {[value.dim()]} dimensions")
    )


def _stand_in(module: fx.GraphModule, given: dict[str, Any], kind: str) -> nn.Module:
    """Return a layer with the operator's weights, of the class whose layout they have."""
    weight, bias = tensor_at(module, given["weight"]), tensor_at(module, given.get("bias"))
    groups = given.get("groups", 1)
    if kind == "linear":
        layer: nn.Module = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    else:
        d = weight.dim() - 2
        options = {"kernel_size": 1, "groups": groups, "device": "meta"}
        if "transpose" in kind or given.get("transposed"):
            make = getattr(nn, f"ConvTranspose{d}d")
            layer = make(weight.shape[0], weight.shape[1] * groups, **options)
        else:
            make = getattr(nn, f"Conv{d}d")
            layer = make(weight.shape[1] * groups, weight.shape[0], **options)
    layer.weight = nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)
    layer.bias = None
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=bias.requires_grad)
    return layer


def _put(module: fx.GraphModule, layer: fx.Node, given: dict[str, Any], new: Any) -> str:
    """Put the weights in; return their owner's name."""
    prefix, _, leaf = str(given["weight"].target).rpartition(".")
    owner = module.get_submodule(prefix)
    setattr(owner, leaf, new.weight)
    if given.get("bias") is not None:
        where, _, name = str(given["bias"].target).rpartition(".")
        setattr(module.get_submodule(where), name, new.bias)
        return prefix or leaf
    name = f"{leaf}_bias" if leaf != "weight" or hasattr(owner, "bias") else "bias"
    owner.register_parameter(name, new.bias)
    with module.graph.inserting_before(layer):
        bias = module.graph.get_attr(f"{prefix}.{name}".lstrip("."))
    bias.meta = dict(given["weight"].meta)
    bias.meta.pop("val", None)
    if "bias" in layer.kwargs or len(layer.args) < 2:
        layer.kwargs = {**layer.kwargs, "bias": bias}
    else:
        layer.args = (*layer.args[:2], bias, *layer.args[3:])
    return prefix or leaf


def _forget(module: fx.GraphModule, node: fx.Node) -> None:
    """Drop a tensor that nothing reads any more."""
    tensor, target = tensor_at(module, node), str(node.target)
    module.graph.erase_node(node)
    names = (n for n in module.graph.nodes if n.op == "get_attr")
    if not any(tensor_at(module, one) is tensor for one in names):
        prefix, _, leaf = target.rpartition(".")
        delattr(module.get_submodule(prefix), leaf)
