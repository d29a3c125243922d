"""Rules of the activation: does the loss want what the last layer gives?

What the trace shows is an error; what only the numbers show is an error where at least two rows
sum to 1 (or their exponentials do), a suspicion otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from .calls import LossCall
from .catalog import Hit
from .doubled import doubled_hits, named, scaled_hits
from .forms import class_axis
from .reach import class_floor, span
from .trace import Head, head_of_tensor, is_of_cosines, is_of_logarithms
from .values import Values

__all__ = ["activation_hits"]

_SCORES = {  # losses that want raw scores, and the ending of their findings' names
    "cross_entropy": "cross-entropy",
    "binary_cross_entropy_with_logits": "bce-with-logits",
    "multilabel_soft_margin_loss": "bce-with-logits",
    "multi_margin_loss": "margin-loss",
    "multilabel_margin_loss": "margin-loss",
    "soft_margin_loss": "margin-loss",
}
_LOG_PROBS = {"nll_loss": "nll", "kl_div": "kl-div", "ctc_loss": "ctc"}
_REGRESSION = ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss")
_WRONG_FOR_SCORES = {
    "cross-entropy": ("softmax", "sigmoid", "tanh", "relu"),
    "bce-with-logits": ("softmax", "sigmoid", "tanh", "relu", "log-softmax"),
    "margin-loss": ("softmax", "sigmoid"),
}


def activation_hits(
    call: LossCall, head: Head, prediction: Values, target: Values
) -> Iterator[Hit]:
    """Yield the mis-pairings of one call; ``prediction`` may be unreadable."""
    if call.name in _SCORES:
        yield from _raw_scores(call, head, prediction, target)
    elif call.name in _LOG_PROBS:
        yield from _log_probabilities(call, head, prediction, target)
    elif call.name == "binary_cross_entropy":
        yield from _probabilities(call, head, prediction, target)
    elif call.name in _REGRESSION:
        yield from _regression(call, head, prediction, target)
    elif call.name == "poisson_nll_loss":
        kinds = ("exp", "softplus", "relu", "sigmoid", "softmax")
        if call.options.get("log_input", True) and head.kind in kinds:
            what = f"{head.kind} shown by {head.source}, and log_input=True"
            yield _traced("positive-head-into-log-rate", what, head)
        elif not call.options.get("log_input", True):
            yield from _floor_of_positive("rate", head)
    elif call.name == "gaussian_nll_loss" and isinstance(call.options.get("var"), Tensor):
        yield from _floor_of_positive("variance", head_of_tensor(call.options["var"]))


def _traced(name: str, what: str, head: Head, severity: str = "error") -> Hit:
    return Hit(name, severity, what, "trace", head.where)


def _by_values(name: str, what: str, rows: int) -> Hit:
    return Hit(name, "error" if rows > 1 else "suspicion", what, "values")


def _shown(head: Head) -> str:
    along = "" if head.axis is None else f" along axis {head.axis}"
    return f"{head.kind}{along} shown by {head.source}"


def _floor_of_positive(role: str, head: Head) -> Iterator[Hit]:
    """A rate or variance that is made positive twice: exp, softplus of what is positive."""
    low = span(head)[0] if head.kind in ("exp", "softplus") and head.before else 0.0
    if low > 0.1:
        what = f"{named(head)} shown by {head.source}: the {role} cannot fall below {low:.3g}"
        last = "raw.exp()" if head.kind == "exp" else "F.softplus(raw)"
        name = "var" if role == "variance" else role
        remedy = f"{name} = {last}  # raw: the last linear layer's output"
        yield Hit("positive-head-twice", "suspicion", what, "trace", head.where, remedy=remedy)


def _ndim(call: LossCall) -> int | None:
    """Dimensions of the prediction, guessed from the target where only the model is known."""
    if isinstance(call.prediction, Tensor):
        return call.prediction.ndim
    if not isinstance(call.target, Tensor):
        return None
    indices = call.name in ("cross_entropy", "nll_loss", "multi_margin_loss")
    return call.target.ndim + (indices and not call.target.is_floating_point())


def _axes(call: LossCall, head: Head) -> tuple[int | None, int | None]:
    """Return the class axis and the traced softmax's axis, both counted from 0."""
    ndim = _ndim(call)
    if ndim is None:
        return None, None
    axis = head.axis
    return class_axis(call.name, ndim), axis + ndim if axis is not None and axis < 0 else axis


def _other_axis(call: LossCall, values: Values, axis: int | None, log: bool) -> tuple[int, int]:
    """Return (axis, rows) of an axis other than the classes' that is normalised, or (-1, 0)."""
    if axis is None or not isinstance(call.prediction, Tensor):
        return (-1, 0)
    for other in range(call.prediction.ndim):
        if other != axis and (rows := values.sums_to_one(other, log=log)):
            return other, rows
    return (-1, 0)


def _raw_scores(call: LossCall, head: Head, values: Values, target: Values) -> Iterator[Hit]:
    ending = _SCORES[call.name]
    axis, traced_axis = _axes(call, head)
    kind = head.kind.replace("log_of_softmax", "log_softmax").replace("_", "-")
    if kind == "log-softmax" and ending == "cross-entropy":
        yield from doubled_hits(call, head, axis, target)
        yield from _log_softmax_into_cross_entropy(call, head, values, axis, traced_axis)
        return
    if "softmax" in kind and _is_other(axis, traced_axis) and call.name == "cross_entropy":
        yield _traced("softmax-over-wrong-axis", _shown(head), head)
        return
    if kind in _WRONG_FOR_SCORES[ending]:
        name, what = f"{kind}-into-{ending}", _shown(head)
        if kind == "softmax" and traced_axis is None and ending == "cross-entropy":
            other, rows = _other_axis(call, values, axis, log=False)
            if rows > 1 and not values.sums_to_one(axis, within=4):
                name, what = "softmax-over-wrong-axis", f"{what}; axis {other} sums to 1"
        yield _traced(name, what, head)
        return
    if ending == "cross-entropy" and head.kind == "other" and is_of_cosines(call.prediction):
        floor = class_floor(2.0, call.prediction.shape[axis])
        what = f"cosines shown by {head.source}: the loss cannot fall below {floor:.3g}"
        yield _traced("cosine-without-temperature", what, head, "suspicion")
        return
    scaled = list(scaled_hits(call, head, ending, axis, target))
    yield from scaled
    if scaled:
        return
    yield from _scores_by_values(call, head, values, axis, ending)


def _is_other(axis: int | None, traced_axis: int | None) -> bool:
    return axis is not None and traced_axis is not None and axis != traced_axis


def _log_softmax_into_cross_entropy(
    call: LossCall, head: Head, values: Values, axis: int | None, traced_axis: int | None
) -> Iterator[Hit]:
    other, rows = _other_axis(call, values, axis, log=True)
    own = values.sums_to_one(axis, log=True, within=4) if axis is not None else 0
    if _is_other(axis, traced_axis) or (traced_axis is None and rows > 1 and not own):
        seen = _shown(head) if other < 0 else f"{_shown(head)}; axis {other} is normalised"
        yield _traced("softmax-over-wrong-axis", seen, head)
    else:
        what = f"{_shown(head)}: wasted"
        yield _traced("log-softmax-into-cross-entropy", what, head, "suspicion")


def _scores_by_values(
    call: LossCall, head: Head, values: Values, axis: int | None, ending: str
) -> Iterator[Hit]:
    if values.is_empty or values.has_nan or not isinstance(call.prediction, Tensor):
        return
    axes = [axis] if axis is not None else list(range(call.prediction.ndim))[::-1]
    for place in axes:
        if rows := values.sums_to_one(place):
            what = f"{rows} rows along axis {place} all sum to 1"
            yield _by_values(f"softmax-into-{ending}", what, rows)
            return
        rows = values.sums_to_one(place, log=True)
        if rows and ending == "cross-entropy":
            what = f"exponentials of {rows} rows along axis {place} sum to 1: wasted"
            yield Hit("log-softmax-into-cross-entropy", "suspicion", what, "values")
            return
        if rows and ending == "bce-with-logits":
            what = f"exponentials of {rows} rows along axis {place} sum to 1"
            yield _by_values("log-softmax-into-bce-with-logits", what, rows)
            return
    for log in (False, True) if ending == "cross-entropy" else (False,):
        other, rows = _other_axis(call, values, axis, log=log)
        if rows and not values.sums_to_one(axis, log=log, within=4):
            what = f"{rows} rows along axis {other} sum to 1, axis {axis} holds the classes"
            yield _by_values("softmax-over-wrong-axis", what, rows)
            return
    if head.kind == "linear":
        return
    if values.within(0, 1) and values.high > values.low:
        what = f"all values lie in [0, 1]: {values.low:.4g} to {values.high:.4g}"
        yield Hit(f"sigmoid-into-{ending}", "suspicion", what, "values")
    elif values.low == 0 and not head.is_known and "relu" in _WRONG_FOR_SCORES[ending]:
        what = f"no value is negative and some are exactly 0 (up to {values.high:.4g})"
        yield Hit(f"relu-into-{ending}", "suspicion", what, "values")


def _log_probabilities(call: LossCall, head: Head, values: Values, target: Values) -> Iterator[Hit]:
    ending = _LOG_PROBS[call.name]
    axis, traced_axis = _axes(call, head)
    if axis is None:
        axis = _axis_of_distribution(call, target)
    if head.kind in ("log_softmax", "log_of_softmax"):
        yield from doubled_hits(call, head, axis, target)
        if _is_other(axis, traced_axis):
            yield _traced("softmax-over-wrong-axis", _shown(head), head)
        elif traced_axis is None and axis is not None and not values.is_empty:
            other, rows = _other_axis(call, values, axis, log=True)
            if rows > 1 and not values.sums_to_one(axis, log=True, within=4):
                what = f"{_shown(head)}; axis {other} is normalised, axis {axis} is not"
                yield _traced("softmax-over-wrong-axis", what, head)
        if head.kind == "log_of_softmax":
            underflow = not values.is_empty and values.low == -float("inf")
            what = _shown(head) + (": it underflowed to -inf" if underflow else "")
            yield _traced("log-of-softmax", what, head, "suspicion")
        return
    if head.kind in ("softmax", "sigmoid"):
        yield _traced(f"{head.kind}-into-{ending}", _shown(head), head)
        return
    if head.kind in ("linear", "relu", "tanh"):
        yield _traced(f"logits-into-{ending}", _shown(head), head)
        return
    if values.is_empty or values.has_nan or not isinstance(call.prediction, Tensor):
        return
    negated = head.before is not None and head.before.scale < 0
    if negated or head.kind != "other" or not is_of_logarithms(call.prediction):
        yield from _log_probs_by_values(call, values, axis, ending)


def _axis_of_distribution(call: LossCall, target: Values) -> int | None:
    """Return the only axis along which KL targets are distributions, or None."""
    if call.name != "kl_div" or not isinstance(call.target, Tensor):
        return None
    log = bool(call.options.get("log_target"))
    axes = [axis for axis in range(call.target.ndim) if target.sums_to_one(axis, log=log)]
    return axes[0] if len(axes) == 1 else None


def _log_probs_by_values(
    call: LossCall, values: Values, axis: int | None, ending: str
) -> Iterator[Hit]:
    places = range(call.prediction.ndim)[::-1] if axis is None else [axis]
    if any(values.sums_to_one(place, log=True, within=4) for place in places):
        return
    others = [place for place in range(call.prediction.ndim) if place not in places]
    for place in (*places, *others):
        if rows := values.sums_to_one(place):
            what = f"{rows} rows along axis {place} all sum to 1"
            yield _by_values(f"softmax-into-{ending}", what, rows)
            return
    for place in others:
        if rows := values.sums_to_one(place, log=True):
            what = f"exponentials of {rows} rows along axis {place} sum to 1, not of axis {axis}"
            yield _by_values("softmax-over-wrong-axis", what, rows)
            return
    span = f"{values.low:.4g} to {values.high:.4g}"
    if values.high > 1e-3:
        if values.within(0, 1) and ending == "nll":
            yield Hit("sigmoid-into-nll", "error", f"values from {span}", "rule")
        else:
            what = f"values from {span}: a log-probability is never positive"
            yield Hit(f"logits-into-{ending}", "error", what, "rule")
    else:
        what = f"values from {span}: their exponentials do not sum to 1"
        yield Hit(f"logits-into-{ending}", "suspicion", what, "values")


def _probabilities(call: LossCall, head: Head, values: Values, target: Values) -> Iterator[Hit]:
    if head.kind in ("linear", "relu", "tanh", "log_softmax", "log_sigmoid", "softplus"):
        yield _traced("logits-into-bce", _shown(head), head)
        return
    yield from doubled_hits(call, head, _softmax_axis(call, head), target)
    if not values.is_empty and not values.has_nan and not values.within(0, 1, 0):
        what = f"values from {values.low:.4g} to {values.high:.4g}"
        yield Hit("logits-into-bce", "error", what, "rule")
    elif not isinstance(call.prediction, Tensor):
        if head.kind == "softmax":
            yield _traced("softmax-into-bce", _shown(head), head, "suspicion")
    else:
        for axis in range(call.prediction.ndim)[::-1]:
            rows = values.sums_to_one(axis)
            if not rows or (rows < 2 and head.kind != "softmax"):
                continue
            certain = head.kind == "softmax" or rows > 1
            several = _holds_several(call, axis, target)
            seen = _shown(head) if head.kind == "softmax" else "no activation seen"
            what = f"{rows} rows along axis {axis} sum to 1 ({seen})"
            if several:
                what += "; target rows do not"
            severity = "error" if several and certain else "suspicion"
            evidence = "trace" if head.kind == "softmax" else "values"
            yield Hit("softmax-into-bce", severity, what, evidence, head.where)
            return


def _softmax_axis(call: LossCall, head: Head) -> int | None:
    """Return the axis that the softmax ran over, which BCELoss itself does not name."""
    return _axes(call, head)[1] if "softmax" in head.kind else None


def _holds_several(call: LossCall, axis: int, target: Values) -> bool:
    """Whether some target row holds more than one true label: no softmax can reach it."""
    y = call.target
    if target.is_empty or y.shape != call.prediction.shape or target.has_nan:
        return False
    return bool((y.detach().double().sum(dim=axis) > 1.5).any())


def _regression(call: LossCall, head: Head, values: Values, target: Values) -> Iterator[Hit]:
    if target.is_empty or target.has_nan:
        return
    one_hot_axis = _one_hot_axis(call, target)
    if one_hot_axis is not None:
        rows = values.sums_to_one(one_hot_axis) if not values.is_empty else 0
        if head.kind == "softmax" and (rows or values.is_empty):
            what = f"{_shown(head)}; the targets are one-hot"
            yield _traced("softmax-into-regression", what, head, "suspicion")
            return
        if rows:
            what = f"{rows} rows sum to 1, as the one-hot targets do"
            yield Hit("softmax-into-regression", "suspicion", what, "values")
            return
    axis = _softmax_axis(call, head)
    known = axis is not None and isinstance(call.prediction, Tensor)
    low, high = span(head, call.prediction.shape[axis] if known else None)
    slack = 0.01 * (target.high - target.low) or 1e-6 * abs(target.high)
    if target.low < low - slack or target.high > high + slack:
        share = target.share_outside(low - slack, high + slack)
        seen = f"targets from {target.low:.4g} to {target.high:.4g}"
        what = f"{named(head)} shown by {head.source}; {seen}, {share:.1%} of them out of reach"
        severity = "error" if share >= 0.1 else "suspicion"
        yield _traced("head-cannot-reach-targets", what, head, severity)
    elif not head.is_known and values.low == 0 < values.high and target.low < -slack:
        what = f"no prediction is negative, some are exactly 0; targets from {target.low:.4g}"
        yield Hit("head-cannot-reach-targets", "suspicion", what, "values")


def _one_hot_axis(call: LossCall, target: Values) -> int | None:
    y = call.target
    if not isinstance(y, Tensor) or not target.distinct <= {0, 1} or y.ndim < 2:
        return None
    for axis in range(y.ndim)[::-1] if y.ndim > 2 else (1,):
        if y.shape[axis] > 1 and bool((y.detach().sum(dim=axis) == 1).all()):
            return axis
    return None
