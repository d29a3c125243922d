"""What happens when the loss is called? Once, and without a trace.

One of torch's own losses gets detached tensors, on the CPU wherever they live: a kernel that
asserts spoils a process on CUDA. A loss of the reader's own runs on a deep copy, with copies of
its arguments; random states are put back. What raises, and a value that is nan or inf, is a hit.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .calls import LOSSES, Inside, LossCall, calls_inside
from .catalog import Hit
from .causes import described, missing, refused_anyway, why_no_distance, why_not_finite, why_refused
from .places import place_of
from .probe import restored
from .values import Values, all_finite

__all__ = [
    "call_own",
    "explains",
    "not_finite",
    "option_hits",
    "own_hits",
    "refused",
    "said",
    "trial_hits",
]

_EXPLAINED = {  # errors that say why torch raises, or why the value is nan
    "all-targets-ignored",
    "blank-in-targets",
    "class-axis-last",
    "class-index-dtype",
    "class-index-out-of-range",
    "ctc-input-too-short",
    "ctc-lengths",
    "empty-batch",
    "integer-one-hot",
    "integer-prediction",
    "integer-target",
    "log-target-not-declared",
    "negative-rate",
    "negative-variance",
    "not-a-tensor",
    "not-finite",
    "swapped-arguments",
    "target-dtype",
    "target-has-class-axis",
    "target-not-probabilities",
    "target-shape",
}
_OF_PROBABILITIES = {"logits-into-bce", "target-outside-0-1"}  # BCELoss alone raises


def option_hits(call: LossCall) -> Iterator[Hit]:
    """Yield the options that torch refuses, where there is no prediction to call the loss with."""
    for what, (why, remedy) in refused_anyway(call):
        yield Hit("loss-raised", "error", what, "rule", why=why, remedy=remedy)


def trial_hits(call: LossCall, known: list[Hit]) -> Iterator[Hit]:
    """Call one of torch's losses once and yield what it raises, or its nan.

    Args:
        call: what the loss is called with; its tensors are detached.
        known: what other rules found in this call; what they explain is not said twice.
    """
    if missing(call):
        yield refused(call, TypeError(f"{call.name}() has no {' and no '.join(missing(call))}"))
        return
    if not _is_safe(call, known):
        return
    error: Exception | None = None
    value: object = None
    with torch.no_grad(), torch._C.DisableTorchFunction(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        device = getattr(call.prediction, "device", torch.device("cpu"))
        arguments = {name: _plain(value, device) for name, value in call.arguments.items()}
        try:
            value = LOSSES[call.name](**arguments)
        except Exception as raised:  # whatever torch raises is the finding
            error = raised
    if error is not None and not explains(call, known):
        if device.type == "cpu" or "not implemented for" not in str(error):
            yield refused(call, error)
    elif error is None:
        yield from not_finite(call, value, known)


def explains(call: LossCall, known: list[Hit]) -> bool:
    """Whether an error among ``known`` says already why the call raises or gives nan."""
    names = {hit.name for hit in known if hit.severity == "error"}
    probabilities = _OF_PROBABILITIES if call.name == "binary_cross_entropy" else set()
    return bool(names & (_EXPLAINED | probabilities))


def refused(call: LossCall, error: Exception, where: str = "") -> Hit:
    """Word what torch raised, with the cause where it is known."""
    why, remedy = why_refused(call)
    why = why or "torch does not take these arguments."
    remedy = remedy or "loss_value = loss(outputs, targets)  # raises this: fix the arguments"
    what = f"{said(error)} ({described(call)})"
    return Hit("loss-raised", "error", what, "rule", where, why, remedy)


def not_finite(call: LossCall, value: object, known: list[Hit], where: str = "") -> Iterator[Hit]:
    """Yield a hit where the value of a call holds nan or inf and nothing known says why."""
    if all_finite(value) or explains(call, known):
        return
    unreduced = call.reduction == "none"
    inputs = (call.prediction, call.target)
    if unreduced and not all(map(all_finite, inputs)):  # left out by a mask afterwards
        return
    why, remedy = why_not_finite(call)
    severity = "suspicion" if unreduced else "error"
    what = f"the loss is {_value(value)} ({described(call)})"
    yield Hit("loss-not-finite", severity, what, "rule", where, why, remedy)


def said(error: BaseException) -> str:
    """Return type and message of an error, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _value(value: Tensor) -> str:
    if value.numel() == 1:
        return f"{value.item():g}"
    return f"nan or inf in {int((~value.isfinite()).sum())} of {value.numel()} elements"


def _is_safe(call: LossCall, known: list[Hit]) -> bool:
    """Whether the tensors hold numbers, and CTC, which checks no symbol, stays inside of them."""
    for tensor in call.arguments.values():
        if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
            odd = tensor.is_quantized or tensor.is_complex()
            if not odd and not Values(tensor).readable:
                return False
    if call.name != "ctc_loss":
        return True
    x, y = call.prediction, call.target
    odd = isinstance(y, Tensor) and y.is_floating_point()  # taken all the same, and seen by no rule
    if odd and not Values(y).within(0, x.shape[-1] - 1 if x.ndim else 0):
        return False
    return not any(hit.name in ("class-index-out-of-range", "ctc-lengths") for hit in known)


def _plain(value: object, device: torch.device) -> object:
    """Detach a tensor and take it to the CPU; under autocast in float32, as its losses are."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    if device.type == "cpu":
        return value
    autocast = torch.is_autocast_enabled(device.type) and value.is_floating_point()
    return value.cpu().float() if autocast else value.cpu()


def call_own(loss: Callable[..., Any], pairs: tuple[tuple, ...]) -> Inside:
    """Call a loss of the reader's own with the first arguments that it takes.

    Args:
        loss: a deep copy of it is called; itself where it has none. What it reaches is put back.
        pairs: (outputs, targets): as the model gives them first, then as plain tensors; a tuple
            of targets is given whole, then apart, and None also left out.

    Returns:
        What happened in the first call that raised nothing, else in the most telling one.
    """
    best: Inside | None = None
    first: Exception | None = None
    tries = list(_tries(pairs))
    fitting = [arguments for arguments in tries if _takes(loss, arguments)]
    for arguments in fitting or tries[:1]:
        copied, note = _deep_copy(loss)
        with restored(copied):
            inside = calls_inside(copied, *map(_cloned, arguments))
        inside.notes += [note] if note else []
        if inside.error is None:
            inside.notes += _changed(arguments, pairs[0], first)
            return inside
        first = first or inside.error
        legible = all(isinstance(call.prediction, Tensor) for call in inside.calls)
        inside.calls = inside.calls if legible else []
        if best is None or (inside.calls and not best.calls):
            best = inside
    return best


def _changed(arguments: tuple, given: tuple, error: Exception | None) -> list[str]:
    """Say with what a loss was called that raises for what it was given."""
    outputs, targets = given
    parts = (targets, *targets) if type(targets) is tuple else (targets,)
    how = []
    if arguments[0] is not outputs:
        is_array = isinstance(outputs, list) or hasattr(outputs, "__array__")
        how.append("the outputs as a tensor" if is_array else "the first tensor of the outputs")
    if not all(any(x is part for part in parts) for x in arguments[1:]):
        many = type(targets) is tuple
        how.append("the targets as tensors" if many else "the targets as a tensor")
    if error is None or not how:
        return []
    return [f"as given, the loss raises {said(error)}; it was called with {' and '.join(how)}"]


def own_hits(loss: object, inside: Inside, known: list[Hit]) -> Iterator[Hit]:
    """Yield what a loss of the reader's own raised, or its nan.

    Args:
        loss: for the names of its arguments.
        inside: what happened in its call.
        known: what other rules found in the torch losses that it called.
    """
    if (error := inside.error) is not None:
        where = place_of(error)
        if inside.raised is not None and isinstance(inside.raised.prediction, Tensor):
            if not explains(inside.raised, known):
                yield refused(inside.raised, error, where)
            return
        why = remedy = ""
        names = _names(loss)
        if isinstance(error, TypeError) and not where and names:
            rest = names[1] if len(names) == 2 else f"({', '.join(names[1:])})"
            why = f"The loss takes ({', '.join(names)}): pass {rest} as targets."
            remedy = f"pairing.check(outputs, loss, ({', '.join(names[1:])}))"
        what = said(error)
        tensors = [value for value in inside.arguments if isinstance(value, Tensor)]
        if not why and not where and tensors:  # torch's own, of which the table knows nothing
            what += f" (arguments {', '.join(str(tuple(x.shape)) for x in tensors)})"
            why, remedy = why_no_distance(tensors)
        yield Hit("loss-raised", "error", what, "rule", where, why, remedy)
        return
    value = _loss_in(inside.value)
    if all_finite(value):
        return
    if inside.not_finite is not None:
        yield from not_finite(inside.not_finite, value, known)
    elif not any(hit.name == "not-finite" for hit in known):
        severity = "error" if value.numel() == 1 else "suspicion"
        yield Hit("loss-not-finite", severity, f"the loss is {_value(value)}", "rule")


def _loss_in(value: Any) -> Any:
    """Return the loss in what was returned: the first of a tuple, the ``loss`` of a mapping."""
    if isinstance(value, Mapping):
        value = value.get("loss")
    elif isinstance(value, (tuple, list)) and value:
        value = value[0]
    return torch.tensor(value) if isinstance(value, float) else value


def _tries(pairs: tuple[tuple, ...]) -> Iterator[tuple]:
    seen: list[tuple] = []
    for outputs, targets in pairs:
        apart = [(outputs, *targets)] if type(targets) is tuple else []
        alone = [(outputs,)] if targets is None else []
        for arguments in [(outputs, targets), *apart, *alone]:
            if not any(_same(arguments, other) for other in seen):
                seen.append(arguments)
                yield arguments


def _same(one: object, other: object) -> bool:
    if type(one) is tuple and type(other) is tuple:
        return len(one) == len(other) and all(map(_same, one, other))
    return one is other


def _called(loss: object) -> object:
    return loss.forward if isinstance(loss, nn.Module) else loss


def _takes(loss: object, arguments: tuple) -> bool:
    """Whether the signature allows these arguments; True where it cannot be read."""
    try:
        signature = inspect.signature(_called(loss))
    except (TypeError, ValueError):
        return True
    try:
        signature.bind(*arguments)
    except TypeError:
        return False
    return True


def _names(loss: object) -> list[str]:
    try:
        return list(inspect.signature(_called(loss)).parameters)
    except (TypeError, ValueError):
        return []


def _deep_copy(loss: Any) -> tuple[Any, str]:
    """Return a copy and ""; the loss itself and a note where it holds what cannot be copied."""
    try:
        return copy.deepcopy(loss), ""
    except Exception as error:  # each class has its own way to refuse
        note = f"the loss itself was called, as it cannot be deep-copied ({said(error)[:80]}); "
        return loss, note + "its attributes and tensors were put back"


def _cloned(value: Any) -> Any:
    """Copy the tensors in plain containers, graph included: a loss may write into its arguments."""
    if isinstance(value, Tensor):
        try:
            with torch.enable_grad():
                return value.clone()
        except Exception:  # wrappers that refuse
            return value
    if type(value) in (tuple, list):
        return type(value)(map(_cloned, value))
    if type(value) is dict:
        return {key: _cloned(part) for key, part in value.items()}
    return value
