"""Where does the ratio of two times change, and does it still change at the end?

Whatever warms up (a compiler, a cache, an allocator) makes the ratio of one part of a run differ
from that of the rest. The first t of n log-ratios are compared with those after them by the
Mann-Whitney statistic, for every t, and the largest is taken:

    z_t = (AUC_t - 1/2) sqrt(12 t (n - t) / (n + 1))])

where AUC_t is the share of pairs (one from before, one from after) in which the earlier ratio is
the larger one. Where the order means nothing, the largest of all |z_t| exceeds the limit here once
in two hundred series. A change of which the last few samples alone tell cannot reach the limit;
it is asked for separately, and stops no more than the verdict.

Sources: Pettitt 1979, J. R. Statist. Soc. C 28(2), 126-135, doi:10.2307/2346729 (one change
point by ranks); Mann & Whitney 1947, doi:10.1214/aoms/1177730491.
"""

from __future__ import annotations

import math

import numpy as np

from dlhelpers.measure.intervals import Interval

__all__ = ["find_change", "is_changing"]

_LIMIT = 3.7
# of |AUC - 1/2|, which is 1/2 where all pairs agree:
_STEP = 0.4  # a warm-up is not come back to; noise that lasts from call to call is
_APART = 0.45  # of 3 samples at the end and more
_SEPARATE = 0.49  # of 5 samples at the end and more
_EFFECT = 0.05  # a change by that part of the effect leaves the outcome as it is


def find_change(logs: np.ndarray, negligible: float, least: int) -> int:
    """Return how many log-ratios come before the one change that they show; 0 without a change.

    Args:
        logs: [n], in order of measurement.
        negligible: a change by less than half of this band is none.
        least: how many must remain; a later change is left to :func:`is_changing`.
    """
    if len(logs) < least + 3:
        return 0
    lead, z = np.abs(_scan(logs, _grain(negligible)))
    at = int(z.argmax()) + 1
    is_step = z[at - 1] >= _LIMIT and lead[at - 1] >= _STEP
    is_found = is_step and _shift(logs, at) >= math.log1p(negligible) / 2
    return at if is_found and len(logs) - at >= least else 0


def is_changing(
    logs: np.ndarray, interval: Interval, negligible: float, *, again: bool = False
) -> bool:
    """Whether the ratio at the end is another than the one that the interval tells of.

    Args:
        logs: [n], those that the interval rests on, in order of measurement.
        interval: of their ratio.
        negligible: as in :func:`find_change`.
        again: there was a change before these; a change by a small part of the effect, which is
            let pass otherwise, is one more.
    """
    n = len(logs)
    if n < 4:
        return False
    lead, z = np.abs(_scan(logs, _grain(negligible)))
    candidates = set()
    at = int(z.argmax()) + 1
    if z[at - 1] >= _LIMIT:
        candidates.add(at)
    for at in range(n // 2 + 1, n - 2):  # the last 3 to n / 2
        is_separate = lead[at - 1] >= _SEPARATE and n - at >= 5
        if is_separate or (lead[at - 1] >= _APART and _shift(logs, at) >= _reach(logs[:at])):
            candidates.add(at)
    candidates.update(n - m for m in (1, 2) if _is_far(logs[:-m], logs[-m:]))
    for at in candidates:
        level = float(np.median(logs[at:]))
        least = max(math.log1p(negligible) / 2, 0.0 if again else _EFFECT * abs(level))
        if _shift(logs, at) >= least and not interval.low <= math.exp(level) <= interval.high:
            return True
    return False


def _grain(negligible: float) -> float:
    """Return the step to which log-ratios are rounded: a clock's own resolution is no trend."""
    return math.log1p(negligible) / 20


def _scan(logs: np.ndarray, grain: float) -> np.ndarray:
    """Return AUC - 1/2 of the first t log-ratios against the rest, and z, for t = 1 to n - 1."""
    n = len(logs)
    _, place, counts = np.unique(np.round(logs / grain), return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]  # equal ones share their mean rank
    t = np.arange(1, n)
    lead = (np.cumsum(ranks)[:-1] - t * (n + 1) / 2) / (t * (n - t))
    return np.stack([lead, lead * np.sqrt(12 * t * (n - t) / (n + 1))])


def _shift(logs: np.ndarray, at: int) -> float:
    return abs(np.median(logs[at:]) - np.median(logs[:at]))


def _is_far(rest: np.ndarray, last: np.ndarray) -> bool:
    """Whether one or two samples lie farther beyond the rest than 90 % of those are apart."""
    reach = _reach(rest)
    return bool(last.min() > rest.max() + reach or last.max() < rest.min() - reach)


def _reach(logs: np.ndarray) -> float:
    low, high = np.quantile(logs, (0.05, 0.95))
    return high - low
