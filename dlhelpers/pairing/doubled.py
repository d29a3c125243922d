"""Rules of the activation in front of the last one: ``log_softmax(softmax(z))``, and its kin.

``nll_loss(log_softmax(a))`` is ``cross_entropy(a)``, and ``binary_cross_entropy(sigmoid(a))`` is
``binary_cross_entropy_with_logits(a)``: what must not stand before the second must not stand
before the first. Whether it hurts is computed from the range of ``a``: an activation scaled up
on purpose (``10 * tanh(z / 10)``) leaves the loss free to fall.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from .calls import LossCall
from .catalog import Hit
from .reach import binary_floors, class_floor, span
from .trace import OF_VALUES, Head
from .values import Values

__all__ = ["doubled_hits", "named", "scaled_hits"]

_NEGLIGIBLE = 0.1  # a floor below this share of the loss of a blind guess
_NO_CLASS_SCORES = ("softmax", "sigmoid", "tanh", "relu")
_NO_LOGITS = (*_NO_CLASS_SCORES, "log_softmax", "log_of_softmax", "log_sigmoid", "softplus", "exp")


def doubled_hits(call: LossCall, head: Head, axis: int | None, target: Values) -> Iterator[Hit]:
    """Yield the finding where ``head`` fits the loss and what it was applied to does not.

    Args:
        call: a loss of log-probabilities or probabilities; its prediction may be unknown.
        head: ``log_softmax``, ``softmax`` or ``sigmoid``, with the activation before it.
        axis: of the classes, None where it is not known.
        target: values that the loss is compared with.
    """
    inner = head.before
    if inner is None:
        return
    if "softmax" in head.kind:
        kind, judged = "softmax", _class_scores(call, inner, axis, target)
    elif head.kind == "sigmoid":
        kind, judged = "sigmoid", _logits(call, inner, target)
    else:
        return
    if judged is not None:
        severity, limit = judged
        last = "log(softmax)" if head.kind == "log_of_softmax" else head.kind
        what = f"{named(inner)} before {last}, shown by {head.source}: {limit}"
        evidence = "values" if inner.source.startswith(OF_VALUES) else "trace"
        yield Hit(f"activation-before-{kind}", severity, what, evidence, head.where)


def scaled_hits(
    call: LossCall, head: Head, ending: str, axis: int | None, target: Values
) -> Iterator[Hit]:
    """Yield the finding where a constant multiple of an activation goes into a loss of scores."""
    inner = head.before
    if head.kind != "other" or inner is None or inner.is_moved:
        return
    if ending == "cross-entropy":
        judged = _class_scores(call, inner, axis, target)
    elif ending == "bce-with-logits" and inner.kind in (*_NO_CLASS_SCORES, "log_softmax"):
        judged = _logits(call, inner, target)
    else:
        return
    if judged is not None:
        severity, limit = judged
        what = f"{named(inner)} shown by {head.source}: {limit}"
        name = f"{inner.kind.replace('_', '-')}-into-{ending}"
        yield Hit(name, severity, what, "trace", head.where)


def named(head: Head) -> str:
    """Name an activation and the constant that its values are multiplied by."""
    inner = "" if head.before is None else named(head.before)
    if inner:
        inner = f" of {inner}" if head.before.scale == 1 else f" of ({inner})"
    if head.source.startswith(OF_VALUES):
        inner = f" (shown by {head.source})"
    factor = "" if math.isclose(head.scale, 1) else f" times {head.scale:.3g}"
    return f"{head.kind}{inner}{factor}" + (" plus a constant" if head.is_moved else "")


def _class_scores(
    call: LossCall, inner: Head, axis: int | None, target: Values
) -> tuple[str, str] | None:
    """Judge an activation whose values are taken for the scores of classes."""
    if inner.kind not in _NO_CLASS_SCORES:
        return None
    known = axis is not None and isinstance(call.prediction, Tensor)
    classes = call.prediction.shape[axis] if known else None
    low, high = span(inner, classes)
    width = high - low
    if math.isinf(width):  # differences alone count, so any probability is reached
        if inner.scale < 0:  # minus a distance: the scores of a prototypical network
            return None
        plain = math.isclose(inner.scale, 1, rel_tol=1e-6)
        return "error" if plain else "suspicion", "no score can be negative"
    if inner.is_moved and not _is_within_width(call.prediction, axis, width):
        return None  # what was added is no number but a tensor
    if call.name == "kl_div" and _is_within(call, target, axis, width):
        return None
    scores = f"the scores lie in [{low:.3g}, {high:.3g}]"
    if inner.is_moved:
        scores = f"the scores of a sample are at most {width:.3g} apart"
    if classes is not None and classes > 1:
        floor = class_floor(width, classes)
        scores += f", so cross entropy over {classes} classes cannot fall below {floor:.3g}"
    share = class_floor(width, classes or 2) / math.log(max(classes or 2, 2))
    severity = _severity(inner, share)
    return None if severity is None else (severity, scores)


def _is_within_width(rows: object, axis: int | None, width: float) -> bool:
    if not isinstance(rows, Tensor) or axis is None or Values(rows).is_empty:
        return False
    rows = rows.detach().double()
    return bool((rows.amax(axis) - rows.amin(axis)).max() <= width + 1e-4)


def _is_within(call: LossCall, target: Values, axis: int | None, width: float) -> bool:
    """Whether the log-probabilities of every target row lie at most ``width`` apart."""
    if target.is_empty or target.has_nan or axis is None or not -1 < axis < call.target.ndim:
        return False
    rows = call.target.detach().double()
    rows = rows if call.options.get("log_target") else rows.log()
    return bool((rows.amax(axis) - rows.amin(axis)).max() <= width + 1e-6)


def _logits(call: LossCall, inner: Head, target: Values) -> tuple[str, str] | None:
    """Judge an activation whose values are taken for logits of independent labels."""
    if inner.kind not in _NO_LOGITS:
        return None
    low, high = span(inner)
    if inner.is_moved:  # from the logits that were seen: not further apart than the width
        if Values(call.prediction).is_empty:
            return None
        seen = call.prediction.detach().double().logit()
        low, high = seen.max().item() - (high - low), seen.min().item() + (high - low)
        if not low <= seen.min().item() <= seen.max().item() <= high:
            return None  # what was added is no number but a tensor
    zero, one = binary_floors(low, high)
    least, most = 1 - math.exp(-zero), math.exp(-one)
    if not target.is_empty and not target.distinct <= {0.0, 1.0} and target.within(least, most):
        return None
    floors = f"{one:.3g} for a target of 1 and {zero:.3g} for a target of 0"
    if f"{one:.3g}" == f"{zero:.3g}":
        floors = f"{one:.3g}"
    limit = (
        f"the probability lies in [{least:.3g}, {most:.3g}], so the loss cannot fall below {floors}"
    )
    severity = _severity(inner, max(zero, one) / math.log(2))
    if severity == "error" and inner.kind in ("softplus", "exp"):
        severity = "suspicion"
    return None if severity is None else (severity, limit)


def _severity(inner: Head, share: float) -> str | None:
    if share < _NEGLIGIBLE:
        return None
    plain = abs(inner.scale) <= 1 + 1e-6 or inner.kind == "relu"
    return "error" if plain and inner.is_sure else "suspicion"
