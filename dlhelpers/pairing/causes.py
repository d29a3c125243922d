"""Why does torch refuse a call of one of its losses, or return nan, and what to write instead?

Read from the arguments (shapes, dtypes, devices, options) and not from torch's messages, which
change from release to release. Each rule returns (why, remedy), or None where it does not apply.
Source: https://pytorch.org/docs/stable/nn.functional.html#loss-functions
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .calls import LossCall
from .forms import class_axis
from .trace import head_of_tensor
from .values import Values, all_finite

__all__ = [
    "described",
    "missing",
    "refused_anyway",
    "why_no_distance",
    "why_not_finite",
    "why_refused",
]

Cause = tuple[str, str]

_NEEDED = {  # what has no default, and how `check` takes it
    "ctc_loss": (("input_lengths", "target_lengths"), "(targets, input_lengths, target_lengths)"),
    "gaussian_nll_loss": (("var",), "(target, var)"),
    "cosine_embedding_loss": (("input2", "target"), "(input2, target)"),
    "margin_ranking_loss": (("input2", "target"), "(input2, target)"),
}
_CLASS_LOSSES = ("cross_entropy", "nll_loss", "multi_margin_loss")


def described(call: LossCall) -> str:
    """Say what the tensors of a call are: ``prediction (8, 3) float32, weight (2,) float64``."""
    return ", ".join(
        f"{role} {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
        for role, tensor in _tensors(call)
    )


def _tensors(call: LossCall) -> Iterator[tuple[str, Tensor]]:
    roles = {"prediction": call.prediction, "target": call.target, **call.options}
    return ((role, value) for role, value in roles.items() if isinstance(value, Tensor))


def missing(call: LossCall) -> list[str]:
    """Return the names of arguments that the loss needs and did not get."""
    given = {*call.options, *(["target"] if call.target is not None else [])}
    return [name for name in _NEEDED.get(call.name, ((), ""))[0] if name not in given]


def why_refused(call: LossCall) -> Cause:
    """Return (why, remedy) of a call that raises; ("", "") where no rule knows the cause."""
    for rule in _REFUSALS:
        with contextlib.suppress(Exception):  # options of any type
            if (cause := rule(call)) is not None:
                return cause
    return "", ""


def refused_anyway(call: LossCall) -> Iterator[tuple[str, Cause]]:
    """Yield (what, cause) of options that are refused whatever the prediction is."""
    for rule, name in _OPTIONS.items():
        with contextlib.suppress(Exception):
            if (cause := rule(call)) is not None:
                yield f"{name}={call.options.get(name)!r:.40}", cause


def _missing(call: LossCall) -> Cause | None:
    if not (names := missing(call)):
        return None
    packed = _NEEDED[call.name][1]
    return (
        f"The loss also needs {' and '.join(names)}: pass {packed} as targets.",
        f"pairing.check(outputs, loss, {packed})",
    )


def _reduction(call: LossCall) -> Cause | None:
    names = ("none", "mean", "sum", *(("batchmean",) if call.name == "kl_div" else ()))
    if call.reduction in names:
        return None
    known = ", ".join(map(repr, names))
    return f"reduction is one of {known}, not {call.reduction!r}.", 'reduction="mean"'


def _label_smoothing(call: LossCall) -> Cause | None:
    amount = call.options.get("label_smoothing", 0.0)
    if isinstance(amount, (int, float)) and 0 <= amount <= 1:
        return None
    why = f"label_smoothing is a number from 0 to 1, not {amount!r}: it is spread over all classes."
    return why, "loss_function = nn.CrossEntropyLoss(label_smoothing=0.1)"


def _positive(call: LossCall) -> Cause | None:
    for loss, name in (("huber_loss", "delta"), ("smooth_l1_loss", "beta")):
        value = call.options.get(name, 1.0)
        if call.name == loss and not value > 0:
            why = f"{name} is where the squared error becomes linear, a distance, not {value!r}."
            return why, f"{name}=1.0"
    return None


def _devices(call: LossCall) -> Cause | None:
    lengths = ("input_lengths", "target_lengths")  # these may stay on the CPU
    for role, tensor in _tensors(call):
        elsewhere = tensor.device != getattr(call.prediction, "device", tensor.device)
        if elsewhere and tensor.ndim and role not in lengths:
            why = f"The {role} is on {tensor.device}, the prediction on {call.prediction.device}."
            if role == "target" or call.options.get(role) is not tensor:
                return why, "target = target.to(prediction.device)"
            return why, f"loss_function = loss_function.to(prediction.device)  # moves its {role}"
    return None


def _tensor_options(call: LossCall) -> Cause | None:
    for name in ("weight", "pos_weight"):
        value = call.options.get(name)
        if value is not None and not isinstance(value, Tensor):
            why = f"{name} is a tensor, not {type(value).__name__}."
            return why, f"{name} = torch.tensor({value!r:.40})"
    var = call.options.get("var")
    if call.name == "gaussian_nll_loss" and not isinstance(var, (Tensor, float)):
        return f"var is a tensor or a float, not {type(var).__name__}.", "var = float(var)"
    return None


def _ignore_index(call: LossCall) -> Cause | None:
    y, ignored = call.target, call.options.get("ignore_index", -100)
    soft = call.name == "cross_entropy" and isinstance(y, Tensor) and y.is_floating_point()
    if not (soft and isinstance(ignored, int) and ignored >= 0):
        return None
    return (
        "ignore_index is compared with class indices. Floating targets are class probabilities: "
        "drop samples with a mask.",
        'loss = F.cross_entropy(logits, target, reduction="none")[keep].mean()',
    )


def _class_weight(call: LossCall) -> Cause | None:
    x, weight = call.prediction, call.options.get("weight")
    if call.name not in _CLASS_LOSSES or not isinstance(weight, Tensor) or not x.ndim:
        return None
    classes = x.shape[class_axis(call.name, x.ndim)]
    if tuple(weight.shape) != (classes,):
        why = f"The loss takes one weight per class, a tensor of shape ({classes},)."
        if weight.numel() == classes:
            return why, "weight = weight.flatten()"
        if x.ndim > 1 and weight.numel() == x.shape[0]:
            return (
                f"{why} One weight per sample multiplies the unreduced loss.",
                f'loss = (F.{call.name}(prediction, target, reduction="none") * weight).mean()',
            )
        return why, (
            f"counts = torch.bincount(labels, minlength={classes}).clamp(min=1)\n"
            f"weight = counts.sum() / ({classes} * counts)  # over the training set"
        )
    if weight.dtype != x.dtype:
        return "Class weights have the prediction's dtype.", _cast("weight", x)
    return None


def _cast(name: str, like: Tensor) -> str:
    if like.dtype == torch.float32:
        return f"{name} = {name}.float()"
    return f"{name} = {name}.to(prediction.dtype)"


def _broadcast_weight(call: LossCall) -> Cause | None:
    x = call.prediction
    for name in ("weight", "pos_weight"):
        weight = call.options.get(name)
        if call.name in _CLASS_LOSSES or not isinstance(weight, Tensor) or _fits(weight, x):
            continue
        many, classes = weight.numel(), x.shape[1] if x.ndim > 1 else 1
        why = f"{name} is broadcast to the prediction, from the last axis on. "
        if name == "pos_weight" and classes == 1:
            one = "One logit has one pos_weight: the negatives divided by the positives."
            return one, "pos_weight = (target == 0).sum() / (target == 1).sum()"
        if many == classes:
            slots = ", ".join([":", *["None"] * (x.ndim - 2)])
            code = f"{name} = {name}.flatten()" + (f"[{slots}]" if x.ndim > 2 else "")
            return f"{why}The {classes} classes are on axis 1.", code
        if name == "weight" and x.ndim and many == x.shape[0]:
            slots = ", ".join([":", *["None"] * (x.ndim - 1)])
            code = f"weight = weight.flatten()[{slots}]"
            return f"{why}One weight per sample is of shape (N, 1).", code
        return (
            f"{why}It has {many} {'number' if many == 1 else 'numbers'}, the prediction "
            f"{classes} {'class' if classes == 1 else 'classes'}.",
            f"{name} = negatives / positives  # of shape ({classes},), over the training set"
            if name == "pos_weight"
            else "weight = weight.expand_as(prediction)  # of a shape that allows it",
        )
    return None


def _fits(weight: Tensor, x: Tensor) -> bool:
    try:
        return torch.broadcast_shapes(weight.shape, x.shape) == x.shape
    except RuntimeError:
        return False


def _regression_weight(call: LossCall) -> Cause | None:
    weight = call.options.get("weight")
    if call.name not in ("mse_loss", "l1_loss", "huber_loss") or not isinstance(weight, Tensor):
        return None
    why = "This loss broadcasts no weight: it has the prediction's shape."
    return why, "weight = weight.expand_as(prediction)"


def _variance(call: LossCall) -> Cause | None:
    x, var = call.prediction, call.options.get("var")
    if call.name != "gaussian_nll_loss" or not isinstance(var, Tensor) or var.shape == x.shape:
        return None
    why = "The variance has the prediction's shape, or (N, 1) for one per sample."
    as_given = "view_as" if var.numel() == x.numel() else "expand_as"
    return why, f"var = var.{as_given}(prediction)"


def _pairs(call: LossCall) -> Cause | None:
    if call.name not in ("cosine_embedding_loss", "margin_ranking_loss"):
        return None
    x, other, y = call.prediction, call.options.get("input2"), call.target
    if not isinstance(other, Tensor) or not isinstance(y, Tensor):
        return "The loss compares two tensors under a target of -1 and +1.", ""
    if call.name == "cosine_embedding_loss":
        if x.ndim and other.ndim and x.shape[-1] != other.shape[-1]:
            why = f"Embeddings of {x.shape[-1]} and of {other.shape[-1]} numbers have no cosine."
            return why, f"second = nn.Linear({other.shape[-1]}, {x.shape[-1]})(second)"
        why = "Pairs (N, D) take one target per pair, a tensor of shape (N,)."
        return why, "target = target.squeeze(1)"
    why = "Both scores and the target are of one shape, (N,) or (N, 1)."
    names = {"first": x, "second": other, "target": y}
    least = min(tensor.ndim for tensor in names.values())
    wide = [name for name, tensor in names.items() if tensor.ndim > least]
    narrow = "\n".join(f"{name} = {name}.squeeze(-1)" for name in wide)
    return why, narrow or "assert first.shape == second.shape == target.shape"


def _ctc(call: LossCall) -> Cause | None:
    if call.name != "ctc_loss":
        return None
    x, y = call.prediction, call.target
    for name in ("input_lengths", "target_lengths"):
        lengths = call.options.get(name)
        if isinstance(lengths, Tensor) and lengths.is_floating_point():
            return "Lengths are whole numbers.", f"{name} = {name}.long()"
    blank = call.options.get("blank", 0)
    if not 0 <= blank < x.shape[-1]:
        why = f"The blank is one of the {x.shape[-1]} classes, 0 to {x.shape[-1] - 1}."
        return why, f"nn.CTCLoss(blank=0)  # or blank={x.shape[-1] - 1}, the last class"
    if y.ndim not in (1, 2):
        why = "Targets are padded, (N, S), or concatenated, (sum of the target lengths,)."
        return why, "targets = targets.reshape(len(target_lengths), -1)"
    sizes = torch.as_tensor(call.options["target_lengths"]).reshape(-1).tolist()
    if y.ndim == 1 and sum(sizes) != y.numel():
        return (
            f"Concatenated targets hold sum(target_lengths) = {sum(sizes)} symbols, "
            f"not {y.numel()}.",
            "targets = torch.cat(transcripts)\n"
            "target_lengths = torch.tensor([len(row) for row in transcripts])",
        )
    if y.ndim == 2 and max(sizes, default=0) > y.shape[1]:
        why = f"A target length is {max(sizes)}, the padded rows hold {y.shape[1]} symbols."
        code = "targets = nn.utils.rnn.pad_sequence(transcripts, batch_first=True)\n"
        return why, code + "target_lengths = torch.tensor([len(row) for row in transcripts])"
    if y.ndim == 2 and x.ndim == 3 and y.shape[0] != x.shape[1]:
        why = f"log_probs (T, N, C) hold {x.shape[1]} samples, the targets (N, S) {y.shape[0]}."
        return why, "log_probs = log_probs.transpose(0, 1)  # where they are (N, T, C)"
    if y.dtype not in (torch.int64, torch.int32):
        return "Symbols are int64 class indices.", "targets = targets.long()"
    return None


def _dtypes(call: LossCall) -> Cause | None:
    x, y = call.prediction, call.target
    both = isinstance(x, Tensor) and isinstance(y, Tensor)
    if both and x.is_floating_point() and y.is_floating_point() and x.dtype != y.dtype:
        return "This loss takes prediction and target of one dtype.", _cast("target", x)
    if both and x.dtype in (torch.float16, torch.bfloat16):
        why = "Not every loss is implemented for 16 bits, and few are exact in them."
        return why, "prediction = prediction.float()"
    return None


_OPTIONS = {
    _reduction: "reduction",
    _label_smoothing: "label_smoothing",
    _ignore_index: "ignore_index",
}
_REFUSALS = (
    _missing,
    _reduction,
    _label_smoothing,
    _positive,
    _devices,
    _tensor_options,
    _ignore_index,
    _class_weight,
    _regression_weight,
    _broadcast_weight,
    _variance,
    _pairs,
    _ctc,
    _dtypes,
)


def why_no_distance(embeddings: Sequence[Tensor]) -> Cause:
    """Return (why, remedy) of embeddings that cannot be compared; ("", "") where they can be."""
    first, *others = embeddings
    for other in others:
        if first.ndim and other.ndim and other.shape[-1] != first.shape[-1]:
            have, want = other.shape[-1], first.shape[-1]
            why = f"Embeddings of {want} and of {have} numbers have no distance."
            return why, f"embedding = nn.Linear({have}, {want})(embedding)  # to {want} numbers"
    return "", ""


def why_not_finite(call: LossCall) -> Cause:
    """Return (why, remedy) of a call whose value is nan or inf; ("", "") for an unknown cause."""
    for role, tensor in _tensors(call):
        if not all_finite(tensor):
            return _from_input(call, role, Values(tensor))
    if call.name in ("cross_entropy", "nll_loss") and call.options.get("weight") is not None:
        return (
            "The mean divides by the sum of the weights of the targets in the batch, which is 0: "
            "every class that is present weighs nothing.",
            "weight = weight.clamp(min=1e-3)  # or leave such samples out of the batch",
        )
    if call.name == "ctc_loss":
        why = "No path gives some transcript: it needs more frames, or a symbol has no chance."
        return why, "loss_function = nn.CTCLoss(zero_infinity=True)  # leaves such samples out"
    exp_of = {"poisson_nll_loss": call.prediction, "kl_div": call.target}.get(call.name)
    on = call.options.get("log_input", True) or call.options.get("log_target")
    if isinstance(exp_of, Tensor) and on and exp_of.is_floating_point():
        limit = math.log(torch.finfo(exp_of.dtype).max)
        if (high := Values(exp_of).high) > limit:
            return f"exp({high:.4g}) overflows.", "log_rate = log_rate.clamp(max=20)"
    if call.prediction.dtype == torch.float16:
        why = "float16 ends at 65,504: the sum over the batch overflows."
        return why, "loss = loss_function(prediction.float(), target.float())"
    return "", ""


def _from_mask(call: LossCall, why: str) -> Cause:
    """Say how -inf among scores or log-probabilities, mostly a masked class, reaches the loss."""
    x, y = call.prediction.detach(), call.target
    off = x == -math.inf
    soft = isinstance(y, Tensor) and y.shape == x.shape and y.is_floating_point()
    finite = "scores = scores.masked_fill(mask, -1e4)  # finite, and e**-1e4 is 0"
    if call.name == "cross_entropy" and bool(off.all(class_axis(call.name, x.ndim)).any()):
        why += " Every class of some sample is masked out: its log_softmax is nan."
        keep = "keep = ~mask.all(dim=1)\n"
        return why, f"{keep}loss = F.cross_entropy(scores[keep], target[keep])"
    if soft and not call.options.get("log_target"):
        if bool((off & (y > 0)).any()):
            why += " Some target gives a masked class a probability above 0."
            return why, f"target = target.masked_fill(mask, 0)\n{finite}"
        return f"{why} A target of 0 is multiplied by it, and 0 times -inf is nan.", finite
    masked = call.name != "ctc_loss" and head_of_tensor(call.prediction).kind == "log_softmax"
    if call.name == "cross_entropy" or masked:
        if isinstance(y, Tensor) and _is_of_target(call, off):
            why += " A class that is masked out is the target of some sample."
            return why, "mask[torch.arange(len(target)), target] = False  # before masked_fill"
        if call.options.get("label_smoothing", 0.0) > 0:
            why += " Label smoothing gives every class a share of the target, a masked one too."
            return why, "loss = F.cross_entropy(scores, target)  # without label smoothing"
        return why, finite
    dim = -1 if call.name == "ctc_loss" else 1
    return f"{why} log(0) is -inf.", f"log_probs = F.log_softmax(logits, dim={dim})"


def _is_of_target(call: LossCall, off: Tensor) -> bool:
    """Whether the target of some sample that counts is a class whose score is -inf."""
    axis, y = class_axis(call.name, off.ndim), call.target.long()
    counts = y != call.options.get("ignore_index", -100)
    picked = off.gather(axis, y.where(counts, 0).unsqueeze(axis)).squeeze(axis)
    return bool((picked & counts).any())


def _from_input(call: LossCall, role: str, values: Values) -> Cause:
    infinite = "-inf" if values.low == -math.inf else "inf"
    why = f"The {role} holds {'nan' if values.has_nan else infinite}."
    masks = call.name in ("cross_entropy", "nll_loss", "kl_div", "ctc_loss")
    if masks and role == "prediction" and infinite == "-inf" and not values.has_nan:
        return _from_mask(call, why)
    return why, f"assert {role}.isfinite().all()"
