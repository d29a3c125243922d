"""Which BatchNorms can go, in any model? Fold those, say of the others why not, prove it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves, tree_map

from dlhelpers.fusion.folding import fold_after, fold_before, why_not_before
from dlhelpers.fusion.functional import fold_functional
from dlhelpers.fusion.report import FusionReport, FusionRow
from dlhelpers.fusion.tracing import Calls, calls_of, is_batch_norm, is_layer

__all__ = ["FusionError", "fuse_conv_bn"]

_ALGEBRA = 1e-6  # relative, in float64: far above its rounding, far below any mistake
_WITHOUT_FLOAT64 = 1e-2
_SELECTS = 1e-2  # more than rounding adds up to, but for a choice that it changes


class FusionError(RuntimeError):
    """The fused model's outputs are not the model's: nothing was returned."""


def fuse_conv_bn(
    model: nn.Module, example_inputs: Any = None, *, verify: bool = True
) -> tuple[nn.Module, FusionReport]:
    """Return a copy in eval mode with every BatchNorm folded that the algebra allows.

    Folded are BatchNorms behind a convolution or linear layer that feeds nothing else, and before
    one that pads with no zeros; in their place stands an ``nn.Identity``. Parts that torch.fx
    cannot trace are entered child by child. Modules with a ``reparameterize()`` or ``fuse()`` of
    their own (RepVGG's) are folded by it. Of all that stays the report says why.

    Args:
        model: any; left as it is.
        example_inputs: a tensor, or a tuple of positional arguments. Needed to verify, and for
            linear layers, where BatchNorm may be over another axis.
        verify: runs both models on the example, in float64 too, and compares all outputs.

    Raises:
        FusionError: outputs differ beyond rounding; nothing wrong is returned.
        TypeError: not a module, or a compiled one.

    Cost: some traces and, with verify, four runs and two copies in float64.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    >>> fused, report = fuse_conv_bn(model, torch.zeros(1, 3, 8, 8))
    >>> report.folded, [type(layer).__name__ for layer in fused]
    (1, ['Conv2d', 'Identity', 'ReLU'])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if hasattr(model, "_orig_mod"):
        raise TypeError("a compiled model cannot be looked into: fuse it first, then compile")
    inputs = None
    if example_inputs is not None:
        inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    fused, plan = _fold_all(model, inputs)
    report = FusionReport(tuple(plan.rows.values()), bytes_saved=_nbytes(model) - _nbytes(fused))
    if plan.notes:
        report = replace(report, notes=tuple(plan.notes))
    if verify and inputs is not None and report.folded:
        report = _verified(model, fused, inputs, report, plan)
    return fused, report


def _nbytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


@dataclass
class _Plan:
    """What was done: rows by name of the BatchNorm, and where its output can be found."""

    rows: dict[str, FusionRow]
    compared: dict[str, tuple[str, str]]  # BatchNorm -> (module in the model, module in the copy)
    notes: list[str]


def _fold_all(model: nn.Module, inputs: tuple[Any, ...] | None) -> tuple[nn.Module, _Plan]:
    fused = copy.deepcopy(model).eval()
    found = {name: m for name, m in fused.named_modules() if is_batch_norm(m)}
    rows = {name: FusionRow(name, type(m).__name__) for name, m in found.items()}
    plan = _Plan(rows, {}, [])
    _by_their_own(fused, found, plan)
    fused, functions = fold_functional(fused)
    rows |= functions
    dims = _dimensions(fused, inputs) if inputs is not None else {}
    names = {id(module): name for name, module in fused.named_modules()}
    while True:
        calls = calls_of(fused)
        done = False
        for name, bn in found.items():
            if rows[name].into:
                continue
            layer, before, why = _partner(bn, calls, dims, names)
            rows[name] = replace(rows[name], why=why)
            if layer is None or why:
                continue
            new = fold_before(bn, layer) if before else fold_after(layer, bn)
            layer.weight, layer.bias = new.weight, new.bias
            into = names[id(layer)]
            plan.compared[name] = (into, into) if before else (name, into)
            rows[name] = replace(rows[name], into=into, why="")
            _replace(fused, bn, nn.Identity())
            done = True
            break_chain = any(
                bn in makers for makers in (calls.makers(other) for other in found.values())
            )
            if break_chain or before:
                break  # the trace shows what is gone: look again
        if not done:
            return fused, plan


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


def _by_their_own(fused: nn.Module, found: dict[str, nn.Module], plan: _Plan) -> None:
    """Let modules that can fold themselves do so."""
    for name, module in list(fused.named_modules()):
        method = getattr(module, "reparameterize", None) or getattr(module, "fuse", None)
        inside = {key for key in found if key.startswith(f"{name}." if name else "")}
        if not inside or not callable(method) or module.__module__.startswith("torch."):
            continue
        if any(
            p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
            for p in inspect.signature(method).parameters.values()
        ):
            continue
        method()
        left = {key for key, m in fused.named_modules() if is_batch_norm(m)}
        for key in inside - left:
            if not plan.rows[key].into:
                plan.rows[key] = replace(plan.rows[key], into=f"{name}.{method.__name__}()")
    for key in [key for key in found if plan.rows[key].into]:
        del found[key]


def _dimensions(model: nn.Module, inputs: tuple[Any, ...]) -> dict[int, set[int]]:
    """Return module's id -> dimensions of its outputs on the example."""
    dims: dict[int, set[int]] = {}

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            dims.setdefault(id(module), set()).add(output.dim())

    watched = [m for m in model.modules() if is_layer(m) or is_batch_norm(m)]
    hooks = [module.register_forward_hook(note) for module in watched]
    try:
        _run(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return dims


def _partner(
    bn: nn.Module, calls: Calls, dims: dict[int, set[int]], names: dict[int, str]
) -> tuple[nn.Module | None, bool, str]:
    """Return the layer to fold into, whether it comes after the BatchNorm, and why not."""
    if why := _why_not_batch_norm(bn, calls):
        return None, False, why
    makers = calls.makers(bn)
    first = makers[0]
    if first is not None and is_layer(first):
        return first, False, _why_not_behind(first, bn, calls, dims, names)
    users = calls.users(bn)
    layer = users[0][0] if users[0] else None
    stands = f"its input comes from {calls.between(bn)}"
    if layer is None or not is_layer(layer):
        return None, False, f"{stands}, and its output goes to {calls.behind(bn)}"
    return layer, True, _why_not_in_front(bn, layer, calls, dims, stands)


def _why_not_batch_norm(bn: nn.Module, calls: Calls) -> str:
    forwards = {_BatchNorm.forward, nn.SyncBatchNorm.forward}
    frozen = type(bn).__name__ == "FrozenBatchNorm2d"
    if bn.running_mean is None or bn.running_var is None:
        return "it keeps no running statistics, so it uses the batch's"
    if isinstance(bn.running_mean, nn.parameter.UninitializedTensorMixin):
        return "it is lazy and has not seen a batch yet"
    if bn.training and not frozen:
        return "it stays in train mode, where it uses the batch's statistics"
    if not frozen and type(bn).forward not in forwards:
        return f"{type(bn).__name__} has a forward of its own"
    return _why_not_any(bn, calls)


def _why_not_any(module: nn.Module, calls: Calls) -> str:
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        return f"{type(module).__name__} has hooks (weight_norm and spectral_norm are some)"
    if parametrize.is_parametrized(module):
        return f"{type(module).__name__} is parametrized"
    if id(module) in calls.reads:
        return f"tensors of {type(module).__name__} are read elsewhere"
    if id(module) in calls.opaque:
        return f"{calls.opaque[id(module)]} calls it, and cannot be traced"
    if not calls.sites[id(module)]:
        return "it is never called"
    return ""


def _why_not_layer(layer: nn.Module, calls: Calls) -> str:
    plain = [base for base in type(layer).__mro__ if base.__module__.startswith("torch.nn.modules")]
    if type(layer).forward is not plain[0].forward:
        return f"{type(layer).__name__} has a forward of its own"
    if not layer.weight.is_floating_point():
        return f"weights of {layer.weight.dtype}"
    return _why_not_any(layer, calls)


def _why_not_behind(
    layer: nn.Module, bn: nn.Module, calls: Calls, dims: Any, names: dict[int, str]
) -> str:
    if why := _why_not_layer(layer, calls):
        return why
    name = names.get(id(layer), "the layer")
    if any(maker is not layer for maker in calls.makers(bn)):
        return f"it is called behind {name} and elsewhere"
    for users in calls.users(layer):
        if len(users) > 1:
            return f"the output of {name} is used elsewhere, too"
        if users != [bn]:
            return f"{name} is called again without it"
    return _why_not_axis(layer, bn, dims, f"behind {name}")


def _why_not_in_front(bn: nn.Module, layer: nn.Module, calls: Calls, dims: Any, stands: str) -> str:
    if why := _why_not_layer(layer, calls) or why_not_before(layer):
        return f"{stands}; behind it {why}"
    if any(users != [layer] for users in calls.users(bn)):
        return f"{stands}; its output is used elsewhere, too"
    if any(maker is not bn for maker in calls.makers(layer)):
        return f"{stands}; the layer behind it is called without it"
    return _why_not_axis(layer, bn, dims, "in front of a layer")


def _why_not_axis(layer: nn.Module, bn: nn.Module, dims: Any, where: str) -> str:
    spatial = len(layer.kernel_size) if isinstance(layer, _ConvNd) else 0
    seen = dims.get(id(layer))
    if seen is None and not spatial:
        return f"{where} one needs example_inputs, to know that outputs are [N, C]"
    if seen is not None and seen != {spatial + 2}:
        return f"its channels are dimension 1 of tensors of {sorted(seen)} dimensions"
    channels = len(bn.running_mean)
    ours = {getattr(layer, "out_channels", getattr(layer, "out_features", 0))}
    ours.add(getattr(layer, "in_channels", getattr(layer, "in_features", 0)))
    return "" if channels in ours else f"it has {channels} channels, the layer others"


# ---- proof ----


def _run(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        return model(*copy.deepcopy(inputs))


def _verified(
    model: nn.Module,
    fused: nn.Module,
    inputs: tuple[Any, ...],
    report: FusionReport,
    plan: _Plan,
) -> FusionReport:
    original = copy.deepcopy(model).eval()
    error = _difference(_run(original, inputs), _run(fused, inputs))
    notes = list(report.notes)
    algebra, rows = None, report.rows
    try:
        exact = original.double()
        doubled = tree_map(
            lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, inputs
        )
        with _outputs(exact, {a for a, _ in plan.compared.values()}) as truth:
            wanted = _run(exact, doubled)
    except (RuntimeError, TypeError, ValueError) as problem:
        notes.append(f"the model does not run in float64: {str(problem).partition(chr(10))[0]}")
    else:
        folded, _ = _fold_all(exact, doubled)
        layers = {b for _, b in plan.compared.values()}
        with _outputs(folded, layers) as by_algebra:
            algebra = _difference(wanted, _run(folded, doubled))
        with _outputs(fused, layers) as ours:
            _run(fused, inputs)
        rows = tuple(_with_error(row, plan, truth, ours) for row in report.rows)
        errors = [_with_error(row, plan, truth, by_algebra).error for row in report.rows]
        known = [found for found in errors if found is not None]
        is_empty = not any(isinstance(x, Tensor) and x.numel() for x in tree_leaves(wanted))
        if known and max(known) < _ALGEBRA and (is_empty or algebra > _ALGEBRA):
            algebra, error = max(known), max(r.error for r in rows if r.error is not None)
            notes.append(
                "the outputs hold no number on this example, such as a detection: what was "
                "compared are the outputs of the folded layers"
                if is_empty
                else "the outputs are sorted or selected by values that rounding changes: what was "
                "compared instead are the outputs of the folded layers"
            )
        if error > _SELECTS and algebra < _ALGEBRA:
            notes.append(
                "in the model's own type rounding changes what is sorted or selected; in float64 "
                "the outputs agree"
            )
    if algebra is not None and algebra > _ALGEBRA:
        raise FusionError(
            f"in float64 the fused model's outputs differ by {algebra:.1e} of the largest, which "
            "is no rounding: this model is not returned; please report it"
        )
    if algebra is None and not error < _WITHOUT_FLOAT64:
        raise FusionError(
            f"the fused model's outputs differ by {error:.1e} of the largest, and the model does "
            "not run in float64 to tell whether that is rounding: it is not returned"
        )
    return replace(
        report, max_rel_error=error, algebra_error=algebra, notes=tuple(notes), rows=rows
    )


def _difference(wanted: Any, found: Any) -> float:
    """Return the largest difference of all tensors, each relative to its largest value."""
    worst = 0.0
    pairs = zip(tree_leaves(wanted), tree_leaves(found), strict=True)
    for a, b in pairs:
        if not isinstance(a, Tensor):
            continue
        if a.shape != b.shape:
            return float("inf")
        if a.numel() and a.is_floating_point():
            a, b = a.double(), b.double()
            scale = a.abs().max().item() or 1.0
            worst = max(worst, (a - b).abs().max().item() / scale)
    return worst


@contextmanager
def _outputs(model: nn.Module, names: set[str]) -> Iterator[dict[str, list[Tensor]]]:
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    hooks = []
    for name in names:

        def keep(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
            found[name].append(output)

        hooks.append(model.get_submodule(name).register_forward_hook(keep))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _with_error(row: FusionRow, plan: _Plan, truth: Any, ours: Any) -> FusionRow:
    if row.name not in plan.compared:
        return row
    theirs, own = plan.compared[row.name]
    if not truth[theirs] or len(truth[theirs]) != len(ours[own]):
        return row
    return replace(row, error=_difference(truth[theirs], ours[own]))
