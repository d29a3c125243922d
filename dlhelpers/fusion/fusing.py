"""Which BatchNorms can go, in any model? Fold those, say of the others why not, prove it."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from dlhelpers.arguments import model_inputs
from dlhelpers.fakes import tensors_in
from dlhelpers.fusion.folding import fold_after, fold_before
from dlhelpers.fusion.functional import fold_functional
from dlhelpers.fusion.refusing import partner
from dlhelpers.fusion.report import FusionReport, FusionRow, said
from dlhelpers.fusion.tracing import calls_of, is_batch_norm, is_layer, replace_module

__all__ = ["FusionError", "fuse_conv_bn"]

_Inputs = tuple[tuple[Any, ...], dict[str, Any]]  # positional and keyword arguments

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
        example_inputs: a tensor; a tuple of positional arguments, or a mapping of keyword ones; a
            mapping that is itself the only argument stands in a tuple of one. Needed to verify,
            and for linear layers, where BatchNorm may be over another axis.
        verify: runs both models on the example, in float64 too, and compares all outputs.

    Raises:
        FusionError: outputs differ beyond rounding; nothing wrong is returned.
        TypeError: not a module, or a compiled or scripted one.
        ValueError: lazy parameters have no shape yet.

    Cost: some traces, with an example one run and, with verify, five more and copies in float64.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    >>> fused, report = fuse_conv_bn(model, torch.zeros(1, 3, 8, 8))
    >>> report.folded, [type(layer).__name__ for layer in fused]
    (1, ['Conv2d', 'Identity', 'ReLU'])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    _check(model)
    inputs = None if example_inputs is None else model_inputs(example_inputs)
    fused, plan = _fold_all(model, inputs)
    report = FusionReport(tuple(plan.rows.values()), bytes_saved=_nbytes(model) - _nbytes(fused))
    if verify and inputs is not None and plan.is_changed:
        report = _verified(model, fused, inputs, report, plan)
    return fused, report


def _check(model: nn.Module) -> None:
    for name, module in model.named_modules():
        which = f"{name or 'the model'} ({type(module).__name__})"
        if hasattr(module, "_orig_mod") and module is model:
            raise TypeError("a compiled model cannot be looked into: fuse it first, then compile")
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(f"{which} is TorchScript: fuse the module that it was made from")
        own = (*module._parameters.values(), *module._buffers.values())
        if any(isinstance(tensor, nn.parameter.UninitializedTensorMixin) for tensor in own):
            raise ValueError(f"{which} is lazy and has no shapes yet: run a batch, then fuse")


def _nbytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


@dataclass
class _Plan:
    """What was done: rows by name of the BatchNorm, and where the result can be compared."""

    rows: dict[str, FusionRow]
    compared: dict[str, str]  # layer in the copy -> module in the model whose output it gives now
    called: list[str] = field(default_factory=list)  # methods of the model's own

    @property
    def is_changed(self) -> bool:
        return bool(self.called) or any(row.into for row in self.rows.values())


def _fold_all(model: nn.Module, inputs: _Inputs | None) -> tuple[nn.Module, _Plan]:
    fused = copy.deepcopy(model).eval()
    found = {name: m for name, m in fused.named_modules() if is_batch_norm(m)}
    rows = {name: FusionRow(name, type(m).__name__) for name, m in found.items()}
    plan = _Plan(rows, {})
    _by_their_own(fused, found, plan)
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
            if not _is_finite(new) and _is_finite(layer):
                why = f"the folded weights do not fit into {layer.weight.dtype}"
                rows[name] = replace(rows[name], why=why)
                continue
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


def _is_finite(layer: nn.Module) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in layer.parameters())


def _by_their_own(fused: nn.Module, found: dict[str, nn.Module], plan: _Plan) -> None:
    """Let modules that can fold themselves do so."""
    rows = plan.rows
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
        called = f"{name}.{method.__name__}()".lstrip(".")
        try:
            method()
        except Exception as problem:
            raise FusionError(
                f"{called}, of {type(module).__name__} itself, raised {problem!r}; the model is "
                "as it was: mend that method, or rename it"
            ) from problem
        plan.called.append(called)
        left = {key for key, m in fused.named_modules() if is_batch_norm(m)}
        for key in inside - left:
            if not rows[key].into:
                rows[key] = replace(rows[key], into=called)
    for key in [key for key in found if rows[key].into]:
        del found[key]


def _dimensions(model: nn.Module, inputs: _Inputs) -> dict[int, set[int]]:
    """Return module's id -> dimensions of its outputs on the example; the model is not run."""
    dims: dict[int, set[int]] = {}
    runs = copy.deepcopy(model)  # a run may change a model's buffers
    for ours, theirs in zip(model.modules(), runs.modules(), strict=True):
        if is_layer(ours) or is_batch_norm(ours):

            def note(module: nn.Module, args: Any, output: Any, key: int = id(ours)) -> None:
                if isinstance(output, Tensor):
                    dims.setdefault(key, set()).add(output.dim())

            theirs.register_forward_hook(note)
    _run(runs, inputs)
    return dims


def _run(model: nn.Module, inputs: _Inputs) -> Any:
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        args, kwargs = _copied(inputs)
        return model(*args, **kwargs)


def _copied(inputs: Any, dtype: torch.dtype | None = None) -> Any:
    """Copy every tensor of the inputs, those of floating point in another dtype if given."""

    def copied(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.detach().to(dtype if x.is_floating_point() else None, copy=True)

    return tree_map(copied, inputs)


@dataclass(frozen=True)
class _Errors:
    """How far the fused model is from the model, in its own type and in float64."""

    own: float | None
    exact: float | None = None
    layers: dict[str, float] = field(default_factory=dict)  # each against float64
    worst_exact: float | None = None  # of the layers, both in float64
    control: float = 0.0  # of the model against itself on inputs that rounding has changed
    no_float64: str = ""  # why


def _verified(
    model: nn.Module,
    fused: nn.Module,
    inputs: _Inputs,
    report: FusionReport,
    plan: _Plan,
) -> FusionReport:
    errors, notes = _judged(_errors(model, fused, inputs, plan))
    return replace(
        report,
        max_rel_error=errors.own,
        algebra_error=errors.exact,
        notes=(*report.notes, *notes),
        rows=tuple(replace(row, error=errors.layers.get(row.into)) for row in report.rows),
    )


def _errors(model: nn.Module, fused: nn.Module, inputs: _Inputs, plan: _Plan) -> _Errors:
    """Run both models, in float64 too; a run may change a model's buffers, so copies run."""
    wanted = _run(copy.deepcopy(model).eval(), inputs)
    runs = copy.deepcopy(fused)
    with _outputs(runs, plan.compared) as ours:
        own = _difference(wanted, _run(runs, inputs))
    try:
        exact, doubled = copy.deepcopy(model).eval().double(), _copied(inputs, torch.float64)
        folded, _ = _fold_all(exact, doubled)
        with _outputs(exact, plan.compared.values()) as truth:
            wanted = _run(exact, doubled)
    except (RuntimeError, TypeError, ValueError) as problem:
        return _Errors(own, no_float64=str(problem).partition("\n")[0] or repr(problem))
    with _outputs(folded, plan.compared) as by_algebra:
        found = _run(folded, doubled)
    exactly = _layer_errors(plan, truth, by_algebra)
    errors = _Errors(
        own=own,
        exact=_difference(wanted, found),
        layers=_layer_errors(plan, truth, ours),
        worst_exact=max(exactly.values(), default=None),
    )
    if _is_mistake(errors.exact) and not _is_mistake(errors.worst_exact):
        again = (_run(exact, _changed(doubled, seed)) for seed in range(4))
        errors = replace(errors, control=max(_difference(wanted, one) or 0.0 for one in again))
    return errors


def _is_mistake(difference: float | None) -> bool:
    return difference is not None and not difference <= _ALGEBRA


def _changed(inputs: Any, seed: int) -> Any:
    """Change the inputs by what rounding in float64 may add up to."""
    generator = torch.Generator().manual_seed(seed)

    def changed(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        noise = torch.rand(x.shape, generator=generator, dtype=x.dtype).to(x.device)
        return x * (1 + 1e-13 * (noise - 0.5))

    return tree_map(changed, inputs)


def _judged(errors: _Errors) -> tuple[_Errors, list[str]]:
    """Return what to report, and notes on it.

    Raises:
        FusionError: it is no rounding.
    """
    notes = []
    if errors.no_float64:
        notes.append(f"the model does not run in float64: {errors.no_float64}")
    elif errors.exact is None and errors.worst_exact is not None:
        errors = replace(errors, exact=errors.worst_exact, own=max(errors.layers.values()))
        notes.append(
            "the outputs hold no number on this example, such as a detection: what was compared "
            "are the outputs of the folded layers"
        )
    elif _is_mistake(errors.exact) and errors.layers and _is_mistake(errors.control):
        errors = replace(errors, exact=errors.worst_exact, own=max(errors.layers.values()))
        notes.append(
            "the outputs are sorted or selected: the model's own differ as much when its input "
            "changes by 1e-13. What was compared are the outputs of the folded layers"
        )
    if _is_mistake(errors.exact):
        raise FusionError(
            f"in float64 the fused model's outputs differ {said(errors.exact)}, which is no "
            "rounding: this model is not returned. A forward that chooses by type, hooks, modules "
            "kept outside of torch's registry or weights read elsewhere can do that"
        )
    if errors.exact is None and errors.own is not None and not errors.own < _WITHOUT_FLOAT64:
        raise FusionError(
            f"the fused model's outputs differ {said(errors.own)}, and the model does not run in "
            "float64 to tell whether that is rounding: it is not returned"
        )
    if errors.own is None:
        notes.append(
            "NOT VERIFIED: the outputs hold no number on this example; give one that yields some"
        )
    elif errors.exact is not None and errors.own > _SELECTS:
        notes.append(
            "in float64 the outputs agree; in the model's own type rounding changes them by that "
            "much, as where something is sorted or selected by it"
        )
    return errors, notes


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
