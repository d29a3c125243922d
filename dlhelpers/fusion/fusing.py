"""Which BatchNorms can go, in any model? Fold those, say of the others why not, prove it."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from dlhelpers.fakes import tensors_in
from dlhelpers.fusion.folding import fold_after, fold_before
from dlhelpers.fusion.functional import fold_functional
from dlhelpers.fusion.refusing import partner
from dlhelpers.fusion.report import FusionReport, FusionRow, said
from dlhelpers.fusion.tracing import calls_of, is_batch_norm, is_layer, replace_module

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
    if verify and inputs is not None and report.folded:
        report = _verified(model, fused, inputs, report, plan)
    return fused, report


def _nbytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


@dataclass
class _Plan:
    """What was done: rows by name of the BatchNorm, and where the result can be compared."""

    rows: dict[str, FusionRow]
    compared: dict[str, str]  # layer in the copy -> module in the model whose output it gives now


def _fold_all(model: nn.Module, inputs: tuple[Any, ...] | None) -> tuple[nn.Module, _Plan]:
    fused = copy.deepcopy(model).eval()
    found = {name: m for name, m in fused.named_modules() if is_batch_norm(m)}
    rows = {name: FusionRow(name, type(m).__name__) for name, m in found.items()}
    plan = _Plan(rows, {})
    _by_their_own(fused, found, rows)
    dims = _dimensions(fused, inputs) if inputs is not None else {}
    fused, functions = fold_functional(fused, dims)
    rows |= functions
    by_function = {row.into for row in functions.values()}
    names = {id(module): name for name, module in fused.named_modules()}
    calls = calls_of(fused)  # looks through the Identity where a BatchNorm was
    goes_on = True
    while goes_on:
        goes_on = False
        for name, bn in found.items():
            if rows[name].into:
                continue
            layer, before, why = partner(bn, calls, dims, names)
            rows[name] = replace(rows[name], why=why)
            if layer is None or why:
                continue
            new = fold_before(bn, layer) if before else fold_after(layer, bn)
            layer.weight, layer.bias = new.weight, new.bias
            replace_module(fused, bn, nn.Identity())
            into = names[id(layer)]
            rows[name] = replace(rows[name], into=into, why="")
            if not before:
                plan.compared[into] = name
            elif into not in by_function:
                plan.compared.setdefault(into, into)
            goes_on = True
    return fused, plan


def _by_their_own(
    fused: nn.Module, found: dict[str, nn.Module], rows: dict[str, FusionRow]
) -> None:
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
            if not rows[key].into:
                into = f"{name}.{method.__name__}()".lstrip(".")
                rows[key] = replace(rows[key], into=into)
    for key in [key for key in found if rows[key].into]:
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
        with _outputs(exact, plan.compared.values()) as truth:
            wanted = _run(exact, doubled)
    except (RuntimeError, TypeError, ValueError) as problem:
        notes.append(f"the model does not run in float64: {str(problem).partition(chr(10))[0]}")
    else:
        folded, _ = _fold_all(exact, doubled)
        with _outputs(folded, plan.compared) as by_algebra:
            algebra = _difference(wanted, _run(folded, doubled))
        with _outputs(fused, plan.compared) as ours:
            _run(fused, inputs)
        exactly = _layer_errors(plan, truth, by_algebra)
        rounded = _layer_errors(plan, truth, ours)
        rows = tuple(replace(row, error=rounded.get(row.into)) for row in rows)
        is_empty = algebra is None
        worst = max(exactly.values(), default=None)
        if worst is not None and (is_empty or (worst < _ALGEBRA < algebra)):
            algebra, error = worst, max(rounded.values())
            notes.append(
                "the outputs hold no number on this example, such as a detection: what was "
                "compared are the outputs of the folded layers"
                if is_empty
                else "the outputs are sorted or selected by values that rounding changes: what was "
                "compared instead are the outputs of the folded layers"
            )
        elif error is not None and algebra is not None and error > _SELECTS and algebra < _ALGEBRA:
            notes.append(
                "in the model's own type rounding changes what is sorted or selected; in float64 "
                "the outputs agree"
            )
    if algebra is not None and algebra > _ALGEBRA:
        raise FusionError(
            f"in float64 the fused model's outputs differ {said(algebra)}, which is no rounding: "
            "this model is not returned; please report it"
        )
    if algebra is None and error is not None and not error < _WITHOUT_FLOAT64:
        raise FusionError(
            f"the fused model's outputs differ {said(error)}, and the model does not run in "
            "float64 to tell whether that is rounding: it is not returned"
        )
    if error is None:
        notes.append(
            "NOT VERIFIED: the outputs hold no number on this example; give one that yields some"
        )
    return replace(
        report, max_rel_error=error, algebra_error=algebra, notes=tuple(notes), rows=rows
    )


def _difference(wanted: Any, found: Any) -> float | None:
    """Return the largest difference of all tensors, each relative to its largest value.

    It is infinite where sizes, whole numbers or the places of NaNs differ; None where there is no
    number to compare.
    """
    ours, theirs = list(tensors_in(wanted)), list(tensors_in(found))
    if [tensor.shape for tensor in ours] != [tensor.shape for tensor in theirs]:
        return math.inf
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a.numel()]
    return max((_apart(a, b) for a, b in pairs), default=None)


def _apart(a: Tensor, b: Tensor) -> float:
    if not (a.is_floating_point() or a.is_complex()):
        return 0.0 if torch.equal(a, b) else math.inf
    wide = torch.complex128 if a.is_complex() else torch.float64
    a, b = a.to_dense().to(wide), b.to_dense().to(wide)
    differs = ~((a == b) | (a.isnan() & b.isnan()))
    if not differs.any():
        return 0.0
    finite = a[a.isfinite()].abs()
    scale = finite.max().item() if finite.numel() else 0.0
    worst = (a - b).abs()[differs].max().item()  # NaN if one of them is
    return worst / (scale or 1.0) if math.isfinite(worst) else math.inf


@contextmanager
def _outputs(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, list[Tensor]]]:
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    hooks = []
    for name in found:

        def keep(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
            found[name].append(output)

        hooks.append(model.get_submodule(name).register_forward_hook(keep))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _layer_errors(
    plan: _Plan, truth: dict[str, list[Tensor]], ours: dict[str, list[Tensor]]
) -> dict[str, float]:
    """Return layer -> difference of its outputs, of those that the example reached."""
    found = {
        layer: _difference(truth[theirs], ours[layer])
        for layer, theirs in plan.compared.items()
        if len(truth[theirs]) == len(ours[layer])
    }
    return {layer: error for layer, error in found.items() if error is not None}
