"""How small can the loss get behind an activation? The range of what it gives says so.

With scores in an interval of width w, the probability of the right one of C classes stays below
1 / (1 + (C-1) exp(-w)), so cross entropy stays above ln(1 + (C-1) exp(-w)); a sigmoid of scores in
[low, high] keeps binary cross entropy above ln(1 + exp(-high)) where the target is 1 and above
ln(1 + exp(low)) where it is 0.
"""

from __future__ import annotations

import math

from .trace import Head

__all__ = ["binary_floors", "class_floor", "span"]

_INF = math.inf
_LIMITS = {  # what an activation can give, of values without limits
    "relu": (0.0, _INF),
    "softplus": (0.0, _INF),
    "exp": (0.0, _INF),
    "sigmoid": (0.0, 1.0),
    "softmax": (0.0, 1.0),
    "tanh": (-1.0, 1.0),
    "log_softmax": (-_INF, 0.0),
    "log_of_softmax": (-_INF, 0.0),
    "log_sigmoid": (-_INF, 0.0),
}
_IMAGES = {  # increasing functions: the ends of a range go to the ends of its image
    "relu": lambda x: max(x, 0.0),
    "softplus": lambda x: _softplus(x),
    "exp": lambda x: math.exp(x) if x < 700 else _INF,
    "sigmoid": lambda x: math.exp(-_softplus(-x)),
    "tanh": math.tanh,
    "log_sigmoid": lambda x: -_softplus(-x),
}


def span(head: Head, classes: int | None = None) -> tuple[float, float]:
    """Return the least and the largest value that ``head`` can give, scaled as it says.

    Of an activation that was moved by an unknown constant, as if it were not.

    Args:
        head: activation, with the one in front of it where there is one.
        classes: size of a softmax's axis; None where it is not known.
    """
    low, high = _LIMITS.get(head.kind, (-_INF, _INF))
    moved = head.before is not None and head.before.is_moved  # an image of it may be anything
    if head.before is not None and head.kind in _IMAGES and not moved:
        low, high = map(_IMAGES[head.kind], span(head.before, classes))
    elif head.before is not None and head.kind == "softmax" and classes:
        first, last = span(head.before, classes)
        low, high = (math.exp(-class_floor(w, classes)) for w in (first - last, last - first))
    if head.scale < 0:
        low, high = high, low
    return low * head.scale, high * head.scale


def class_floor(width: float, classes: int) -> float:
    """Return the least cross entropy over ``classes`` scores in an interval of ``width``."""
    return _softplus(math.log(max(classes - 1, 1)) - width)


def binary_floors(low: float, high: float) -> tuple[float, float]:
    """Return the least binary cross entropy of scores in [low, high], for targets 0 and 1."""
    return _softplus(low), _softplus(-high)


def _softplus(x: float) -> float:
    if math.isinf(x):
        return max(x, 0.0)
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))
