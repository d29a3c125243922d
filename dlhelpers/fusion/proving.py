"""Is the fused model the model? Both run, in float64 too, where rounding is nothing."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from dlhelpers.fusion.report import FusionReport, FusionRow, said
from dlhelpers.models import copied, in_eval_
from dlhelpers.trees import map_leaves, tensors_in
from dlhelpers.untouched import untouched

__all__ = ["Errors", "FusionError", "Plan", "difference", "judged", "run", "verified"]

_ALGEBRA = 1e-6  # relative, in float64: far above its rounding, far below any mistake
_SELECTS = 1e-2  # more than rounding adds up to, but for a choice that it changes
_CALLS, _LATER = 4, 1e-4  # in a row; a relative difference of float32's that is looked into
_NUDGES, _TIMES = 10, 8  # runs whose weights are changed by a last place; allowed of the largest

Inputs = tuple[tuple[Any, ...], dict[str, Any]]  # positional and keyword arguments


class FusionError(RuntimeError):
    """The fused model's outputs are not the model's: nothing was returned."""


@dataclass
class Plan:
    """What was done: rows by name of the BatchNorm, and where the result can be compared.

    Attributes:
        rows: by name.
        compared: module in the copy -> module in the model whose output it gives now.
        places: layer in the copy -> the module behind it whose outputs are compared instead.
        called: methods of the model's own.
        notes: on methods that were not called.
    """

    rows: dict[str, FusionRow]
    compared: dict[str, str] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    called: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def is_changed(self) -> bool:
        """Whether anything was folded."""
        return bool(self.called) or any(row.into for row in self.rows.values())


def run(model: nn.Module, inputs: Inputs) -> Any:
    """Return the model's outputs of copies of the inputs; random numbers are the same each time."""
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

    return map_leaves(copied, inputs)


@dataclass(frozen=True)
class Errors:
    """How far the fused model is from the model, in its own type and in float64."""

    own: float | None
    exact: float | None = None
    layers: dict[str, float] = field(default_factory=dict)  # each against float64
    worst_exact: float | None = None  # of the layers, both in float64
    control: float = 0.0  # of the model against itself on inputs that rounding has changed
    no_float64: str = ""  # why
    allowed: float = 0.0  # of the own type, where there is no float64
    place: float = 0.0  # the last one of the outputs' type, relative


def verified(
    model: nn.Module,
    fused: nn.Module,
    inputs: Inputs,
    report: FusionReport,
    plan: Plan,
    fold: Callable[[nn.Module, Inputs], nn.Module],
) -> FusionReport:
    """Return the report with errors and notes.

    Args:
        model: the original one.
        fused: what became of it.
        inputs: of both.
        report: without errors.
        plan: of what was done.
        fold: does the same again with a model in float64.

    Raises:
        FusionError: the outputs differ beyond rounding.
    """
    errors, notes = judged(_errors(model, fused, inputs, plan, fold))
    return replace(
        report,
        max_rel_error=errors.own,
        algebra_error=errors.exact,
        notes=(*report.notes, *notes),
        rows=tuple(
            replace(row, error=errors.layers.get(plan.places.get(row.into, row.into)))
            for row in report.rows
        ),
    )


def _errors(model: nn.Module, fused: nn.Module, inputs: Inputs, plan: Plan, fold: Any) -> Errors:
    """Run both models, in float64 too; a run may change a model's buffers, so copies run."""
    truly, ours = _in_a_row(model, inputs), {name: [] for name in plan.compared}
    wanted = truly[0]
    try:
        found_in_a_row = _in_a_row(fused, inputs, ours)
    except Exception as problem:
        raise FusionError(
            f"the fused model raises {problem!r}, the model does not: it is not returned"
        ) from problem
    own = difference(wanted, found_in_a_row[0])
    bound = max(_LATER, _TIMES * (own or 0.0))
    suspects = _later_ones_apart(truly, found_in_a_row, bound)
    if suspects and not _later_ones_apart(truly, _in_a_row(model, inputs), bound):
        _check_later_calls(model, inputs, fold, suspects)
    try:
        exact, doubled = in_eval_(copied(model)).double(), _copied(inputs, torch.float64)
        folded = fold(exact, doubled)
        with _outputs(exact, plan.compared.values()) as truth:
            wanted_exactly = run(exact, doubled)
        with _outputs(folded, plan.compared) as by_algebra:
            found = run(folded, doubled)
    except Exception as problem:  # an assertion on the type, a kernel that is missing
        why = str(problem).partition("\n")[0] or repr(problem)
        allowed = 0.0 if own is None else _allowed(model, inputs, wanted)
        return Errors(own, no_float64=why, allowed=allowed)
    exactly = _layer_errors(plan, truth, by_algebra)
    errors = Errors(
        own=own,
        exact=difference(wanted_exactly, found),
        layers=_layer_errors(plan, truth, ours),
        worst_exact=max(exactly.values(), default=None),
        place=max((torch.finfo(t.dtype).eps for t in _floating(wanted)), default=0.0),
    )
    if _is_mistake(errors.exact) and not _is_mistake(errors.worst_exact):
        again = (run(exact, _changed(doubled, seed)) for seed in range(4))
        control = max(difference(wanted_exactly, one) or 0.0 for one in again)
        errors = replace(errors, control=control)
    return errors


def _in_a_row(
    model: nn.Module, inputs: Inputs, first: dict[str, list[Tensor]] | None = None
) -> list[Any]:
    """Return what a copy's calls give, one after the other; what it reaches is put back.

    Args:
        model: left as it is.
        inputs: of each call.
        first: is given the outputs of these modules in the first call.
    """
    memo: dict[int, Any] = {}
    runs, outputs = in_eval_(copied(model, memo)), []
    with untouched(model, copies=memo):
        with _outputs(runs, first or ()) as seen:
            outputs.append(run(runs, inputs))
        if first is not None:
            first.update(seen)
        with contextlib.suppress(Exception):  # the model's own, or seen by the other one's length
            outputs += [run(runs, inputs) for _ in range(_CALLS - 1)]
    return outputs


def _later_ones_apart(wanted: list[Any], found: list[Any], most: float) -> dict[int, float]:
    """Return number of a call after the first -> difference, where it is more than ``most``."""
    if len(wanted) != len(found):
        return {min(len(wanted), len(found)) + 1: math.inf}
    pairs = enumerate(zip(wanted, found, strict=True), start=1)
    apart = {number: difference(*pair) or 0.0 for number, pair in pairs if number > 1}
    return {number: error for number, error in apart.items() if not error <= most}


def _check_later_calls(
    model: nn.Module, inputs: Inputs, fold: Any, suspects: dict[int, float]
) -> None:
    """Raise where later calls differ in float64 as well, or it does not run in float64."""
    with contextlib.suppress(Exception):
        exact, doubled = in_eval_(copied(model)).double(), _copied(inputs, torch.float64)
        folded = fold(copied(exact), doubled)
        truly = _in_a_row(exact, doubled)
        suspects = _later_ones_apart(truly, _in_a_row(folded, doubled), _ALGEBRA)
    for number, error in suspects.items():
        raise FusionError(
            f"of calls in a row, number {number} of the fused model's differs {said(error)}: what "
            "a call changes decides what later ones do. This model is not returned"
        )


def _floating(outputs: Any) -> list[Tensor]:
    return [t for t in tensors_in(outputs) if t.is_floating_point() or t.is_complex()]


def _allowed(model: nn.Module, inputs: Inputs, wanted: Any) -> float:
    """Return 8 times the most that weights and inputs do when they change by one last place."""
    worst = 0.0
    for seed in range(_NUDGES):
        generator = torch.Generator().manual_seed(seed)
        nudged = in_eval_(copied(model))
        with torch.no_grad():
            for tensor in (*nudged.parameters(), *nudged.buffers()):
                tensor.copy_(_nudged(tensor, generator))
        given = map_leaves(lambda x, g=generator: _nudged(x, g), inputs)
        worst = max(worst, difference(wanted, run(nudged, given)) or 0.0)
    return _TIMES * worst


def _nudged(x: Any, generator: torch.Generator) -> Any:
    """Change every number by one unit in its last place, up or down, zeros apart."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.is_sparse:
        return x
    whole = {8: torch.int64, 4: torch.int32, 2: torch.int16}.get(x.element_size())
    if whole is None:
        return x
    step = 2 * torch.randint(0, 2, x.shape, generator=generator, dtype=whole).to(x.device) - 1
    moved = (x.detach().contiguous().view(whole) + step).view(x.dtype)
    return torch.where((x == 0) | ~x.isfinite(), x.detach(), moved)


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

    return map_leaves(changed, inputs)


def judged(errors: Errors) -> tuple[Errors, list[str]]:
    """Return what to report, and notes on it.

    Raises:
        FusionError: it is no rounding.
    """
    notes = []
    if errors.no_float64:
        notes.append(
            f"it does not run in float64: {errors.no_float64}. Allowed are outputs that differ "
            f"{said(errors.allowed)}, {_TIMES} times as much as when weights and inputs change by "
            "one unit in the last place"
        )
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
    is_bounded = math.isfinite(errors.allowed) and errors.own is not None
    if errors.exact is None and is_bounded and not errors.own <= errors.allowed:
        raise FusionError(
            f"the fused model's outputs differ {said(errors.own)}; a change of weights and inputs "
            f"by one unit in the last place, {_TIMES} times over, does so {said(errors.allowed)}. "
            "The model does not run in float64 to tell more: it is not returned"
        )
    if errors.exact is None and errors.own is not None and not is_bounded:
        notes.append("NOT VERIFIED: rounding alone changes sizes, whole numbers or NaNs")
    if errors.own is None:
        notes.append(
            "NOT VERIFIED: the outputs hold no number on this example; give one that yields some"
        )
    elif errors.exact is not None and errors.own > max(_SELECTS, _TIMES * errors.place):
        notes.append(
            "in float64 the outputs agree; in the model's own type rounding changes them by that "
            "much, as where something is sorted or selected, or is a difference of large values"
        )
    return errors, notes


def difference(wanted: Any, found: Any) -> float | None:
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
    plan: Plan, truth: dict[str, list[Tensor]], ours: dict[str, list[Tensor]]
) -> dict[str, float]:
    """Return layer -> difference of its outputs, of those that the example reached."""
    found = {
        layer: difference(truth[theirs], ours[layer])
        for layer, theirs in plan.compared.items()
        if len(truth[theirs]) == len(ours[layer])
    }
    return {layer: error for layer, error in found.items() if error is not None}
