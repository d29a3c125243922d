"""Rules of shape, dtype and range: what the loss demands of its arguments, whatever made them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .calls import LossCall
from .catalog import Hit
from .ctc import ctc_hits
from .values import Values

__all__ = ["class_axis", "form_hits"]

_BINARY = ("binary_cross_entropy", "binary_cross_entropy_with_logits")
_SAME_DTYPE = ("binary_cross_entropy", "huber_loss")
_BROADCASTING = (
    "mse_loss",
    "l1_loss",
    "smooth_l1_loss",
    "huber_loss",
    "kl_div",
    "poisson_nll_loss",
    "gaussian_nll_loss",
    "hinge_embedding_loss",
    "multilabel_soft_margin_loss",
)
_PLUS_MINUS = (
    "soft_margin_loss",
    "hinge_embedding_loss",
    "cosine_embedding_loss",
    "margin_ranking_loss",
)
_MEAN_IS_NAN = ("mean", "batchmean")


def class_axis(name: str, ndim: int) -> int | None:
    """Return the axis that holds the classes for this loss; None where it has none."""
    if name in ("cross_entropy", "nll_loss"):
        return 1 if ndim > 1 else 0
    if name in ("ctc_loss", "multi_margin_loss", "multilabel_margin_loss"):
        return ndim - 1
    if name == "multilabel_soft_margin_loss":
        return ndim - 1
    return None


def form_hits(call: LossCall, prediction: Values, target: Values) -> Iterator[Hit]:
    """Yield the broken rules of shape, dtype and range of one call."""
    for role, value in (("prediction", call.prediction), ("target", call.target)):
        if not isinstance(value, Tensor):
            yield _error("not-a-tensor", f"the {role} is {_say(value)}")
    if not isinstance(call.prediction, Tensor) or not isinstance(call.target, Tensor):
        return
    if not prediction.readable or not target.readable:
        what = "prediction" if not prediction.readable else "target"
        yield Hit("values-not-readable", "suspicion", f"the {what}'s values: {_kind(call)}", "rule")
    swapped = list(_swapped(call, prediction, target))
    yield from swapped
    if swapped:
        if call.name in _BINARY:
            yield from _outside(call, target, "loss = loss_function(prediction, target)")
        return
    if not (call.prediction.is_floating_point() or call.prediction.is_complex()):
        yield _error("integer-prediction", f"the prediction is {call.prediction.dtype}")
    yield from _finite(call, prediction, target)
    if call.name in ("cross_entropy", "nll_loss"):
        yield from _class_targets(call, target)
    elif call.name == "multi_margin_loss":
        yield from _margin_targets(call, target)
    elif call.name == "multilabel_margin_loss":
        yield from _multilabel_margin_targets(call, target)
    elif call.name == "ctc_loss":
        yield from ctc_hits(call)
    if call.name in (*_BINARY, "multilabel_soft_margin_loss"):
        yield from _binary_targets(call, target)
    if call.name in _BROADCASTING:
        yield from _broadcast(call)
    if call.name in _PLUS_MINUS:
        yield from _plus_minus(call, target)
    if call.name == "kl_div":
        yield from _kl_targets(call, target)
    if call.name in _SAME_DTYPE:
        yield from _dtypes(call)
    if call.name == "poisson_nll_loss":
        yield from _counts(call, prediction, target)
    if call.name == "gaussian_nll_loss":
        yield from _variance(call)


def _error(name: str, what: str) -> Hit:
    return Hit(name, "error", what, "rule")


def _suspect(name: str, what: str) -> Hit:
    return Hit(name, "suspicion", what, "rule")


def _say(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) < 40 else ''}".strip()


def _kind(call: LossCall) -> str:
    tensor = call.prediction
    return f"{tensor.layout}, {tensor.device.type}, {tensor.dtype}, {type(tensor).__name__}"


def _shape(tensor: Tensor) -> str:
    return "(" + ", ".join(map(str, tensor.shape)) + ("," if tensor.ndim == 1 else "") + ")"


def _swapped(call: LossCall, prediction: Values, target: Values) -> Iterator[Hit]:
    x, y = call.prediction, call.target
    if call.name in ("cross_entropy", "nll_loss", "multi_margin_loss"):
        if not x.is_floating_point() and y.is_floating_point() and y.ndim >= x.ndim:
            what = f"prediction {_shape(x)} {x.dtype}, target {_shape(y)} {y.dtype}"
            yield _error("swapped-arguments", what)
            return
        if x.shape == y.shape and y.requires_grad and not x.requires_grad:
            what = "the target carries a gradient, the prediction does not"
            yield _error("swapped-arguments", what)
    elif call.name in _BINARY and not target.is_empty and not prediction.is_empty:
        hard, soft = prediction.distinct <= {0.0, 1.0}, target.distinct <= {0.0, 1.0}
        if not hard or soft:
            return
        if y.requires_grad and not x.requires_grad:
            what = "the prediction is only 0s and 1s, the target is not and carries a gradient"
            yield _error("swapped-arguments", what)
        elif not x.requires_grad and not x.is_floating_point():
            yield _error("swapped-arguments", f"the prediction is {x.dtype} 0s and 1s")
        elif not x.requires_grad and len(prediction.distinct) == 2:
            what = "the prediction is only 0s and 1s, the target is not"
            yield Hit("swapped-arguments", "suspicion", what, "values")
    elif call.name == "kl_div" and not call.options.get("log_target"):
        for axis in range(x.ndim):
            rows = prediction.sums_to_one(axis)
            if rows and target.sums_to_one(axis, log=True):
                what = f"{rows} rows of the prediction sum to 1; the target holds logarithms"
                severity = "error" if rows > 1 else "suspicion"
                yield Hit("swapped-arguments", severity, what, "values")
                return


def _finite(call: LossCall, prediction: Values, target: Values) -> Iterator[Hit]:
    if call.prediction.numel() == 0 or call.target.numel() == 0:
        nan = call.reduction in _MEAN_IS_NAN
        what = f"prediction {_shape(call.prediction)}, target {_shape(call.target)}"
        if nan:
            yield _error("empty-batch", what)
        else:
            total = "an empty tensor" if call.reduction == "none" else "0"
            why = f"The loss of an empty batch is {total}: this step learns nothing."
            yield Hit("empty-batch", "suspicion", what, "rule", why=why)
    elif prediction.has_nan:
        yield _error("not-finite", "the prediction holds nan")
    elif target.has_nan and call.reduction != "none":
        yield _error("not-finite", "the target holds nan")


def _class_targets(call: LossCall, target: Values) -> Iterator[Hit]:
    x, y = call.prediction, call.target
    if x.ndim == 0:
        yield _error("target-shape", "the prediction is a scalar: there is no class axis")
        return
    axis = class_axis(call.name, x.ndim)
    classes = x.shape[axis]
    if classes == 1:
        yield _error("one-logit", f"prediction {_shape(x)}: one class")
    if y.is_floating_point():
        if call.name == "cross_entropy" and x.shape == y.shape and x.ndim > 0:
            yield from _soft_targets(y, target, axis)
        else:
            yield _error("class-index-dtype", f"target {_shape(y)} {y.dtype}")
        return
    expected = (*x.shape[:axis], *x.shape[axis + 1 :])
    if y.shape == x.shape and y.ndim > 1 and classes > 1:
        yield _error("integer-one-hot", f"target {_shape(y)} {y.dtype}")
        return
    if y.dtype not in (torch.int64, torch.uint8):
        yield _error("class-index-dtype", f"target {y.dtype}")
    if y.shape != expected:
        yield _class_shape(x, y, expected)
        return
    if x.ndim > 2 and y.shape == x.shape[:-1] and x.shape[1] == x.shape[-1]:
        what = f"prediction {_shape(x)}, target {_shape(y)}: axis 1 and the last are equal"
        yield _suspect("class-axis-ambiguous", what)
    ignored = call.options.get("ignore_index", -100)
    if target.is_empty:
        return
    kept = y[y != ignored] if isinstance(ignored, int) else y
    if kept.numel() == 0:
        if call.reduction == "mean":
            what = f"all {y.numel()} targets equal ignore_index={ignored}"
            yield _error("all-targets-ignored", what)
        return
    yield from _index_range(Values(kept), classes, 0)


def _class_shape(x: Tensor, y: Tensor, expected: tuple[int, ...]) -> Hit:
    shapes = f"prediction {_shape(x)}, target {_shape(y)}"
    if x.ndim > 2 and y.shape == x.shape[:-1]:
        return _error("class-axis-last", f"{shapes}: the classes stand last")
    extra = [axis for axis in range(y.ndim) if y.shape[axis] == 1]
    if any((*y.shape[:axis], *y.shape[axis + 1 :]) == expected for axis in extra):
        return _error("target-has-class-axis", f"{shapes}; wanted {expected}")
    return _error("target-shape", f"{shapes}; wanted {expected}")


def _index_range(target: Values, classes: int, least: int) -> Iterator[Hit]:
    if target.is_empty or target.within(least, classes - 1):
        return
    what = f"class indices from {target.low:g} to {target.high:g}, {classes} classes"
    yield _error("class-index-out-of-range", what)


def _soft_targets(y: Tensor, target: Values, axis: int) -> Iterator[Hit]:
    if target.is_empty or target.has_nan or y.numel() == 0:
        return
    if not target.within(0, 1, 1e-4):
        what = f"target values from {target.low:.4g} to {target.high:.4g}"
        yield _suspect("soft-targets-not-normalised", what)
    elif y.shape[axis] > 1 and not target.sums_to_one(axis):
        sums = y.detach().double().sum(dim=axis)
        if bool(((sums - 1).abs() > 1e-2).any()):
            what = f"target rows sum to {sums.min().item():.4g} to {sums.max().item():.4g}"
            yield _suspect("soft-targets-not-normalised", what)


def _margin_targets(call: LossCall, target: Values) -> Iterator[Hit]:
    x, y = call.prediction, call.target
    if y.dtype != torch.int64:
        yield _error("class-index-dtype", f"target {y.dtype}; this loss takes int64 alone")
    if x.ndim and tuple(y.shape) != tuple(x.shape[:-1]) and y.numel() != 1:
        yield _error("target-shape", f"prediction {_shape(x)}, target {_shape(y)}")
    elif x.ndim and y.dtype == torch.int64:
        yield from _index_range(target, x.shape[-1], 0)


def _multilabel_margin_targets(call: LossCall, target: Values) -> Iterator[Hit]:
    x, y = call.prediction, call.target
    if y.dtype != torch.int64:
        yield _error("class-index-dtype", f"target {y.dtype}; this loss takes int64 alone")
    if x.shape != y.shape:
        yield _error("target-shape", f"prediction {_shape(x)}, target {_shape(y)}")
        return
    if y.dtype == torch.int64 and x.ndim:
        yield from _index_range(target, x.shape[-1], -1)
        if x.shape[-1] > 2 and not target.is_empty and target.distinct <= {0, 1}:
            yield _suspect("multi-hot-into-multilabel-margin", "targets are only 0s and 1s")


def _binary_targets(call: LossCall, target: Values) -> Iterator[Hit]:
    x, y = call.prediction, call.target
    if call.name in _BINARY:
        if not y.is_floating_point():
            yield _error("integer-target", f"target {y.dtype}")
        if x.shape != y.shape:
            yield _error("target-shape", f"prediction {_shape(x)}, target {_shape(y)}")
    yield from _outside(call, target)


def _outside(call: LossCall, target: Values, remedy: str = "") -> Iterator[Hit]:
    if target.is_empty or target.has_nan or target.within(0, 1):
        return
    far = not target.within(0, 1.5) or call.name == "binary_cross_entropy"  # 1.2: noisy labels
    what = f"target values from {target.low:g} to {target.high:g}"
    severity = "error" if far else "suspicion"
    remedy = remedy or _into_0_1(target)
    yield Hit("target-outside-0-1", severity, what, "rule", remedy=remedy)


def _into_0_1(target: Values) -> str:
    if target.distinct <= {-1.0, 1.0}:
        return "target = (target > 0).float()  # -1 and +1 become 0 and 1"
    if target.low >= 0 and target.high == 255:
        return "target = target / 255"
    if target.low >= 0 and all(value == int(value) for value in target.distinct):
        return "loss = F.cross_entropy(logits, target.long())  # class indices"
    if target.within(0, 1.5):
        return "target = target.clamp(0, 1)"
    return "loss = F.mse_loss(prediction, target)  # targets that are no probabilities"


def _broadcast(call: LossCall) -> Iterator[Hit]:
    x, y = call.prediction, call.target
    if x.shape == y.shape:
        return
    shapes = f"prediction {_shape(x)}, target {_shape(y)}"
    try:
        joint = torch.broadcast_shapes(x.shape, y.shape)
    except RuntimeError:
        yield _error("target-shape", f"{shapes}: they cannot be broadcast")
        return
    if math.prod(joint) == x.numel() and y.numel() in (1, x.numel()):
        return  # one to one, or one number for all
    crossed = math.prod(joint) > max(x.numel(), y.numel())
    if crossed and x.ndim != y.ndim:  # axes of 1 on both sides are written on purpose
        yield _error("broadcast-target", f"{shapes} are broadcast to {tuple(joint)}")
    else:
        yield _suspect("broadcast-target", f"{shapes} are broadcast to {tuple(joint)}")


def _plus_minus(call: LossCall, target: Values) -> Iterator[Hit]:
    if call.name == "soft_margin_loss" and call.prediction.shape != call.target.shape:
        shapes = f"prediction {_shape(call.prediction)}, target {_shape(call.target)}"
        yield _error("target-shape", shapes)
    if target.is_empty or target.has_nan or target.distinct <= {-1.0, 1.0}:
        return
    seen = ", ".join(f"{value:g}" for value in sorted(target.distinct)[:5])
    yield _error("targets-not-plus-minus-one", f"target values {seen}")


def _kl_targets(call: LossCall, target: Values) -> Iterator[Hit]:
    y = call.target
    if call.reduction == "mean":
        yield _suspect("kl-div-mean-reduction", "reduction='mean', the default")
    if not y.is_floating_point():
        yield _error("integer-target", f"target {y.dtype}")
        return
    if target.is_empty or target.has_nan:
        return
    axes = range(y.ndim)
    rows = max((target.sums_to_one(axis, log=True) for axis in axes), default=0)
    if not call.options.get("log_target"):
        if target.low < -1e-6:
            what = f"target values from {target.low:.4g} to {target.high:.4g}"
            if rows:
                yield _error("log-target-not-declared", f"{what}; {rows} rows are logarithms")
            else:
                yield _error("target-not-probabilities", what)
        elif target.high > 1 + 1e-3:
            what = f"target values up to {target.high:.4g}"
            yield _suspect("target-not-probabilities", what)
        elif y.ndim > 1 and (most := min(_largest_sum(y, axis) for axis in axes)) > 1.01:
            what = f"along no axis do they sum to 1: up to {most:.4g}"
            yield _suspect("target-not-probabilities", what)
    elif not rows:
        rows = max((target.sums_to_one(axis) for axis in axes), default=0)
        if rows:
            severity = "error" if rows > 1 else "suspicion"
            what = f"{rows} rows of targets sum to 1 and log_target=True"
            yield Hit("log-target-declared", severity, what, "values")


def _largest_sum(y: Tensor, axis: int) -> float:
    return y.detach().float().sum(dim=axis).max().item()


def _dtypes(call: LossCall) -> Iterator[Hit]:
    x, y = call.prediction, call.target
    if not y.is_floating_point() and call.name == "huber_loss":
        yield _error("integer-target", f"target {y.dtype}")
    floating = y.is_floating_point() and x.is_floating_point()
    device = "cpu" if x.device.type == "meta" else x.device.type  # no autocast on meta
    if floating and x.dtype != y.dtype and not torch.is_autocast_enabled(device):
        yield _error("target-dtype", f"prediction {x.dtype}, target {y.dtype}")


def _counts(call: LossCall, prediction: Values, target: Values) -> Iterator[Hit]:
    if not target.is_empty and target.low < 0:
        yield _error("negative-counts", f"target values from {target.low:.4g}")
    if not call.options.get("log_input", True) and not prediction.is_empty and prediction.low < 0:
        yield _error("negative-rate", f"rates from {prediction.low:.4g}")


def _variance(call: LossCall) -> Iterator[Hit]:
    var = call.options.get("var")
    low = Values(var).low if isinstance(var, Tensor) else var
    if isinstance(low, (int, float)) and low < 0:
        yield _error("negative-variance", f"variances from {low:.4g}")
