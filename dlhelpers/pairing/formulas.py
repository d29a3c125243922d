"""What does a loss of the reader's own want, probabilities or logits? Its values say so.

A loss that compares outputs with labels of 0 and 1 is played again (:class:`~.tape.Tape`) for
outputs of which the answer is known. One of probabilities (Dice, Tversky, Jaccard, focal) is
perfect where they equal the labels, and past them it is better than perfect, not a number, or
flat. One of logits is not perfect there: it falls until the logits are large, and stays.
Source: Milletari et al. 2016 (Dice), Salehi et al. 2017 (Tversky), Lin et al. 2017 (focal).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .catalog import Hit
from .reach import span
from .tape import Tape
from .trace import Head
from .values import Values

__all__ = ["Wish", "wish_hits", "wish_of"]

_LARGE = 8.0  # a logit whose sigmoid is nearly 1; that of twice as much is not yet 1 in float32
_SHARE = 0.1  # of the way from a blind guess to the best answer that must be out of reach
_SCORES = ("linear", "relu", "tanh", "softplus", "exp", "log_softmax", "log_sigmoid")


@dataclass(frozen=True)
class Wish:
    """What a loss wants, and the values that show it.

    Attributes:
        kind: ``probabilities`` or ``logits``.
        loss: the loss as a function of outputs.
        labels: the outputs that are right as probabilities: 0 and 1, in the outputs' shape.
        shown: what was tried, for the reader.
        is_clamped: the loss cuts its argument off at 0 and 1 by itself.
    """

    kind: str
    loss: Callable[[Tensor], float | None]
    labels: Tensor
    shown: str
    is_clamped: bool = False


def wish_of(tape: Tape, outputs: Tensor, target: Tensor) -> Wish | None:
    """Return what the loss wants, or None where its values do not prove it.

    Args:
        tape: the recorded call.
        outputs: the tensor among the call's arguments that is varied, [N, ...], floating.
        target: labels of 0 and 1 in the outputs' shape, or class indices without its class axis.
    """
    labels = _labels(outputs, target)
    if labels is None:
        return None

    def loss(x: Tensor) -> float | None:
        return tape.value([(outputs, x.to(outputs.dtype))])

    return _of_probabilities(loss, labels) or _of_logits(loss, labels)


def wish_hits(wish: Wish, head: Head, outputs: Tensor) -> Iterator[Hit]:
    """Yield what does not fit between outputs and a loss whose wish is known."""
    values = Values(outputs)
    if values.is_empty or values.has_nan:
        return
    seen = f"{head.kind} shown by {head.source}"
    if wish.kind == "probabilities":
        span_ = f"outputs from {values.low:.4g} to {values.high:.4g}"
        if not values.within(0, 1):
            few = wish.is_clamped and values.share_outside(0, 1) < _SHARE
            severity = "suspicion" if few else "error"
            what = f"{span_}; {wish.shown}"
            yield Hit("logits-into-own-loss", severity, what, "rule", head.where)
        elif head.kind in _SCORES and not wish.is_clamped:
            what = f"{seen}; {wish.shown}"
            yield Hit("logits-into-own-loss", "error", what, "trace", head.where)
        return
    yield from _out_of_reach(wish, head, values, outputs)


def _out_of_reach(wish: Wish, head: Head, values: Values, outputs: Tensor) -> Iterator[Hit]:
    if head.kind in ("softmax", "sigmoid", "tanh", "relu"):
        seen, evidence, severity = f"{head.kind} shown by {head.source}", "trace", "error"
        low, high = span(head)
    elif any(values.sums_to_one(axis) > 1 for axis in range(outputs.ndim)):
        seen, evidence, severity = "rows that sum to 1", "values", "error"
        low, high = 0.0, 1.0
    elif head.kind != "linear" and values.within(0, 1) and values.high > values.low:
        seen, evidence, severity = "all outputs lie in [0, 1]", "values", "suspicion"
        low, high = 0.0, 1.0
    else:
        return
    limits = f"outputs in [{low:.3g}, {high:.3g}]"
    low, high = max(low, -_LARGE), min(high, _LARGE)
    reached = wish.loss(low + (high - low) * wish.labels)
    blind, best = wish.loss(0 * wish.labels), wish.loss(_LARGE * (2 * wish.labels - 1))
    if reached is None or reached - best < _SHARE * (blind - best):
        return
    what = f"{seen}; the best loss of {limits} is {reached:.3g}, of large logits {best:.3g}"
    yield Hit("activation-into-own-loss", severity, what, evidence, head.where)


def _labels(outputs: Tensor, target: Tensor) -> Tensor | None:
    """Return the right probabilities, in the shape of the outputs; None where none are known."""
    if not outputs.is_floating_point() or outputs.numel() == 0 or not Values(target).readable:
        return None
    y = target.detach()
    hard = bool(((y == 0) | (y == 1)).all())
    ones = tuple(size for size in outputs.shape if size != 1)
    if hard and y.shape == outputs.shape:
        labels = y
    elif hard and 1 in outputs.shape and tuple(size for size in y.shape if size != 1) == ones:
        labels = y.reshape(outputs.shape)
    elif outputs.ndim > 1 and not y.is_floating_point() and y.dtype != torch.bool:
        y = y.squeeze(1) if y.ndim == outputs.ndim and y.shape[1] == 1 else y
        classes = outputs.shape[1]
        if y.shape != (outputs.shape[0], *outputs.shape[2:]) or classes < 2:
            return None
        if not 0 <= int(y.min()) <= int(y.max()) < classes:
            return None
        labels = F.one_hot(y.long(), classes).movedim(-1, 1)
    else:
        return None
    labels = labels.double()
    return labels if 0 < labels.mean() < 1 else None


def _of_probabilities(loss: Callable[[Tensor], float | None], labels: Tensor) -> Wish | None:
    perfect, best = loss(labels), labels
    if perfect is None or not math.isfinite(perfect):  # log(0)
        best = labels.clamp(1e-6, 1 - 1e-6)
        perfect = loss(best)
    if perfect is None or min(abs(perfect), abs(perfect + 1)) > 0.02:
        return None
    noise = torch.rand(labels.shape, generator=torch.Generator().manual_seed(0)).to(labels)
    between = [loss(best + share * (0.1 + 0.8 * noise - best)) for share in (0.5, 1.0)]
    wrong = loss(1 - best)
    if any(value is None or not math.isfinite(value) for value in (*between, wrong)):
        return None
    if not perfect + 0.02 < between[0] < between[1] < wrong + 1e-6:
        return None
    if _alike(loss((best + noise) / 2), (perfect + loss(noise)) / 2):
        return None  # a linear loss: NLL of log-probabilities, a critic's score
    past = [("3 times the labels", 3 * labels), ("-2 and 2", 4 * labels - 2)]
    said = f"the loss is {perfect:.3g} where outputs equal the labels"
    for name, outputs in past:
        value = loss(outputs)
        if value is None:
            return None
        if not math.isfinite(value) or value < perfect - 0.05:
            shown = f"{said} and {value:.3g} for {name}"
            if value < perfect:
                shown += ", so it rewards outputs outside [0, 1]"
            return Wish("probabilities", loss, labels, shown)
    for name, formula in _OVERLAPS.items():
        if any(_is_formula(loss, formula, labels, dims) for dims in _dims_of(labels)):
            shown = f"on values in [0, 1] it is the {name} loss, and {said}"
            return Wish("probabilities", loss, labels, shown)
    outside = 4 * noise - 1.5
    if _alike(loss(outside), loss(outside.clamp(0, 1))):
        shown = f"{said}, and flat outside [0, 1]: no gradient"
        return Wish("probabilities", loss, labels, shown, is_clamped=True)
    return None


_OVERLAPS = {  # (p, t, sum) -> numerator and denominator of a score that is 1 at best
    "Dice": lambda p, t, sum_: (2 * sum_(p * t), sum_(p) + sum_(t)),
    "squared Dice": lambda p, t, sum_: (2 * sum_(p * t), sum_(p * p) + sum_(t * t)),
    "Jaccard": lambda p, t, sum_: (sum_(p * t), sum_(p) + sum_(t) - sum_(p * t)),
}


def _dims_of(labels: Tensor) -> Iterator[list[int]]:
    """Yield the axes over which an overlap may be taken: all, of a sample, of a channel."""
    every = list(range(labels.ndim))
    yield every
    if labels.ndim > 1:
        yield every[1:]
    if labels.ndim > 2:
        yield every[2:]
        yield [0, *every[2:]]


def _is_formula(
    loss: Callable[[Tensor], float | None], formula: Callable, labels: Tensor, dims: list[int]
) -> bool:
    """Whether the loss is 1 - score or -score at two places, with a smoothing term of 0 or 1."""
    generator = torch.Generator().manual_seed(1)
    places = [torch.rand(labels.shape, generator=generator).to(labels) for _ in range(2)]
    found = [loss(p) for p in places]
    pairs = [formula(p, labels, lambda x: x.sum(dims)) for p in places]
    for smooth in (0.0, 1.0):
        scores = [((up + smooth) / (down + smooth)).mean().item() for up, down in pairs]
        for base in (0.0, 1.0):
            if all(abs(f - (base - score)) < 1e-3 for f, score in zip(found, scores, strict=True)):
                return True
    return False


def _of_logits(loss: Callable[[Tensor], float | None], labels: Tensor) -> Wish | None:
    signs = 2 * labels - 1
    tried = [loss(x) for x in (_LARGE * signs, 2 * _LARGE * signs, 0 * signs, labels, -signs)]
    if any(value is None or not math.isfinite(value) for value in tried):
        return None
    best, more, blind, bounded, wrong = tried
    drop = blind - best
    if drop <= 1e-3 or abs(more - best) > 0.01 * drop or wrong < blind:
        return None
    if bounded - best < _SHARE * drop:
        return None
    shown = f"the loss is {bounded:.3g} where outputs equal the labels, {best:.3g} for large logits"
    return Wish("logits", loss, labels, shown)


def _alike(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return False
    return math.isclose(one, other, rel_tol=1e-4, abs_tol=1e-6) or (
        math.isnan(one) and math.isnan(other)
    )
