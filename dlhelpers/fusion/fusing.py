"""Which BatchNorms can go, in any model? Fold those, say of the others why not, prove it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dlhelpers.arguments import model_inputs
from dlhelpers.fusion.calls import calls_of
from dlhelpers.fusion.exported import fold_exported
from dlhelpers.fusion.folding import fold_after, fold_before
from dlhelpers.fusion.functional import fold_functional
from dlhelpers.fusion.norms import norms_of
from dlhelpers.fusion.own import fold_by_own_methods
from dlhelpers.fusion.proving import FusionError, Inputs, Plan, run, verified
from dlhelpers.fusion.refusing import partner
from dlhelpers.fusion.report import FusionReport, FusionRow
from dlhelpers.fusion.tracing import is_batch_norm, is_layer, replace_module
from dlhelpers.models import copied, in_eval_, need_model
from dlhelpers.untouched import untouched

__all__ = ["FusionError", "fuse_conv_bn"]


def fuse_conv_bn(
    model: nn.Module, example_inputs: Any = None, *, verify: bool = True
) -> tuple[nn.Module, FusionReport]:
    """Return a copy in eval mode with every BatchNorm folded that the algebra allows.

    Folded are BatchNorms behind a convolution or linear layer that feeds nothing else, and before
    one that pads with no zeros; in their place stands an ``nn.Identity``, or what else their module
    does: an activation, as in timm's ``BatchNormAct2d``. Dropout in eval mode and reads of a shape
    between the two forbid nothing. Graphs of torch.export are folded as well. Parts that torch.fx
    cannot trace are entered child by child, and their source tells what they do to layers past a
    call of their parent: what may be used elsewhere stays. Known re-parametrisations among a
    class's methods (RepVGG's ``switch_to_deploy()``, ``reparameterize()``, ``fuse()``) are tried
    on a copy, and used where they fold BatchNorms. Of all that stays the report says why. Flags
    that the caller sets on the model are taken as they are: after changing one, fuse again.

    Args:
        model: any; left as it is.
        example_inputs: a tensor; a tuple of positional arguments, or a mapping of keyword ones; a
            mapping that is itself the only argument goes into a tuple of one. Needed to verify,
            and for linear layers, where BatchNorm may be over another axis.
        verify: runs both models on the example, four times in a row and in float64 too, and
            compares all outputs.

    Raises:
        FusionError: outputs differ beyond rounding; nothing wrong is returned. Where the model does
            not run in float64, eight times as much is allowed as a change of its weights and
            inputs by one unit in the last place does.
        TypeError: not a module, or a compiled or scripted one.
        ValueError: lazy parameters have no shape yet.

    Cost: some traces, with an example one run and, with verify, eleven more, two to four of them in
    float64.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    >>> fused, report = fuse_conv_bn(model, torch.zeros(1, 3, 8, 8))
    >>> report.folded, [type(layer).__name__ for layer in fused]
    (1, ['Conv2d', 'Identity', 'ReLU'])
    """
    need_model(model, "fuse", but=("wrapped", "scripted", "meta"))
    inputs = None if example_inputs is None else model_inputs(example_inputs)
    copies: dict[int, Any] = {}
    made = copied(model, copies)
    elsewhere = untouched(model, inputs, copies=copies)
    with torch.inference_mode(False), torch.random.fork_rng(), elsewhere:
        try:
            return _fused(made, inputs, verify, by_own=True)
        except _OwnMethodError as problem:
            fused, report = _fused(made, inputs, verify, by_own=False)
            return fused, replace(report, notes=(*report.notes, str(problem)))


class _OwnMethodError(FusionError):
    """A model that its own methods have folded is another one."""


def _fused(
    model: nn.Module, inputs: Inputs | None, verify: bool, by_own: bool
) -> tuple[nn.Module, FusionReport]:
    fused, plan = _fold_all(model, inputs, by_own)
    saved = _nbytes(model) - _nbytes(fused)
    report = FusionReport(tuple(plan.rows.values()), bytes_saved=saved, notes=tuple(plan.notes))
    if verify and inputs is not None and plan.is_changed:
        try:
            report = verified(
                model, fused, inputs, report, plan, lambda m, x: _fold_all(m, x, by_own)[0]
            )
        except FusionError as problem:
            if not plan.called:
                raise
            called = ", ".join(plan.called)
            raise _OwnMethodError(f"{called}: not used, since with it {problem}") from problem
    return fused, report


def _nbytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _fold_all(model: nn.Module, inputs: Inputs | None, by_own: bool) -> tuple[nn.Module, Plan]:
    fused = in_eval_(copied(model))
    read = _read_by_eval(model)
    plain = _rows_of(fused)
    plan = Plan(dict(plain))
    rows = plan.rows
    if by_own:
        fused, folded, plan.notes = fold_by_own_methods(fused)
        plan.called = sorted(set(folded.values()))
        for name, called in folded.items():
            rows[name] = replace(rows[name], into=called)
    dims = _dimensions(fused, inputs) if inputs is not None else {}
    rows |= fold_exported(fused)
    fused, functions = fold_functional(fused, norms_of(fused), dims)
    rows |= functions
    by_function = {row.into for row in functions.values()}
    norms = norms_of(fused)
    found = {name: m for name, m in fused.named_modules() if id(m) in norms}
    for name in [name for name in rows if rows[name] is plain.get(name) and name not in found]:
        del rows[name]  # no more than the owner of a function's tensors
    names = {id(module): name for name, module in fused.named_modules()}
    calls = calls_of(fused, norms)  # looks through the Identity where a BatchNorm was
    goes_on = True
    while goes_on:
        goes_on = False
        for name, bn in found.items():
            rows.setdefault(name, FusionRow(name, type(bn).__name__))
            if rows[name].into:
                continue
            norm = norms[id(bn)]
            layer, before, why = partner(bn, norm, calls, dims, names)
            if name in read:
                why = f"train() or eval() of the model reads its {read[name]}"
            rows[name] = replace(rows[name], why=why)
            if layer is None or why:
                continue
            fold = (fold_before, norm.values, layer) if before else (fold_after, layer, norm.values)
            new = fold[0](*fold[1:])
            if why := _why_not_finite(new, layer, norm.values):
                rows[name] = replace(rows[name], why=why)
                continue
            layer.weight, layer.bias = new.weight, new.bias
            replace_module(fused, bn, norm.rest)
            into = names[id(layer)]
            rows[name] = replace(rows[name], into=into, why="")
            if not norm.is_alone:
                plan.compared.pop(into, None)
                plan.compared[name] = plan.places[into] = name
            elif not before:
                plan.compared[into] = name
            elif into not in by_function and into not in plan.places:
                plan.compared.setdefault(into, into)
            goes_on = True
    return fused, plan


def _rows_of(model: nn.Module) -> dict[str, FusionRow]:
    norms = norms_of(model)
    return {
        name: FusionRow(name, type(module).__name__)
        for name, module in model.named_modules()
        if id(module) in norms
    }


def _read_by_eval(model: nn.Module) -> dict[str, str]:
    """Return name of a BatchNorm -> its tensor that the model's own train() or eval() reads."""
    own = (getattr(type(m), name) for m in model.modules() for name in ("train", "eval"))
    if {nn.Module.train, nn.Module.eval}.issuperset(own):
        return {}
    read: dict[str, str] = {}
    spied = copied(model)
    for name, module in spied.named_modules():
        if is_batch_norm(module):

            def spy(self: Any, key: str, name: str = name) -> Any:
                if key in self._parameters or key in self._buffers:
                    read[name] = key
                return nn.Module.__getattr__(self, key)

            module.__class__ = type(type(module).__name__, (type(module),), {"__getattr__": spy})
    spied.train().eval()
    return read


def _why_not_finite(new: nn.Module, layer: nn.Module, bn: Any) -> str:
    if _is_finite(new.parameters()) or not _is_finite(layer.parameters()):
        return ""
    tensors = {key: getattr(bn, key) for key in ("weight", "bias", "running_mean", "running_var")}
    for key, tensor in tensors.items():
        if tensor is not None and not _is_finite([tensor]):
            return f"its {key} holds NaN or infinity"
    return f"the folded weights do not fit into {layer.weight.dtype}"


def _is_finite(tensors: Iterable[Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def _dimensions(model: nn.Module, inputs: Inputs) -> dict[int, set[int]]:
    """Return module's id -> dimensions of its outputs on the example; the model is not run."""
    dims: dict[int, set[int]] = {}
    runs = copied(model)  # a run may change a model's buffers
    for ours, theirs in zip(model.modules(), runs.modules(), strict=True):
        if is_layer(ours) or is_batch_norm(ours):

            def note(module: nn.Module, args: Any, output: Any, key: int = id(ours)) -> None:
                if isinstance(output, Tensor):
                    dims.setdefault(key, set()).add(output.dim())

            theirs.register_forward_hook(note)
    run(runs, inputs)
    return dims
