"""Which threshold does the entropy method choose? The one whose histogram is told apart least.

For each number i of bins kept, P is what was seen, with all that lies beyond in the last bin, and Q
what 128 levels make of it:

    KL(P || Q) = sum P log(P / Q) = H(P, Q) - H(P)

The cross-entropy H(P, Q) alone is another objective, as P and with it H(P) change with i.

Source: Migacz, GTC 2017, S7310, slide "Entropy calibration - pseudocode".
"""

from __future__ import annotations

import math

import numpy as np

__all__ = ["LEVELS", "distributions", "kl_threshold", "onnxruntime_range"]

LEVELS = 128
_MOST_CLIPPED = 0.01


def distributions(counts: np.ndarray, i: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the slide's P and Q for i kept bins, as counts.

    P takes everything beyond into its last bin. Q is made of the bins as they were, without that:
    merged into 128 levels, each level's count spread evenly over its bins that are not empty.

    Args:
        counts: of |x|, bins of equal width from 0.
        i: 128 at least, and at most all bins.

    Returns:
        Two float64 arrays [i]; not divided by their sums.
    """
    counts = np.asarray(counts, dtype=np.float64)
    kept = counts[:i]
    p = kept.copy()
    p[-1] += counts[i:].sum()
    starts = np.arange(LEVELS) * i // LEVELS
    filled = kept > 0
    sums = np.add.reduceat(kept, starts)
    sizes = np.add.reduceat(filled.astype(np.float64), starts)
    level = np.divide(sums, sizes, out=np.zeros(LEVELS), where=sizes > 0)
    q = np.where(filled, np.repeat(level, np.diff(np.append(starts, i))), 0.0)
    return p, q


def kl_threshold(counts: np.ndarray, *, repair: bool = False, cross_entropy: bool = False) -> float:
    """Return the threshold of the slide's algorithm, in bins of the histogram of |x|.

    The i from 128 to all bins with the least KL(P || Q) wins, and the threshold is the middle of
    the bin behind it, (i + 0.5).

    Args:
        counts: of |x|, 128 bins or more, of equal width from 0.
        repair: mend two traps. The zeros behind a ReLU fill the first bin, are exact in any grid,
            and pull the threshold down: the second bin's count is taken for it. And where few bins
            are filled, P and Q agree on a single one of them: no more than 1 % is clipped.
        cross_entropy: minimise H(P, Q) instead, which is what the method is not.

    Raises:
        ValueError: fewer than 128 bins.
    """
    counts = np.asarray(counts, dtype=np.float64).copy()
    if len(counts) < LEVELS:
        raise ValueError(f"the slide's algorithm needs {LEVELS} bins at least, got {len(counts)}")
    if repair:
        counts[0] = counts[1]
    if not counts.any():
        return len(counts) - 0.5
    best, found = math.inf, len(counts)
    beyond = counts.sum() - np.cumsum(counts)
    for i in range(LEVELS, len(counts) + 1):
        if repair and beyond[i - 1] > _MOST_CLIPPED * counts.sum():
            continue
        p, q = distributions(counts, i)
        if not q.any():
            continue
        p, q = p / p.sum(), q / q.sum()
        there = p > 0
        p = p[there]
        with np.errstate(divide="ignore"):
            divergence = -float(np.sum(p * np.log(q[there])))
        if not cross_entropy:
            divergence += float(np.sum(p * np.log(p)))
        if divergence < best:
            best, found = divergence, i
    return min(found + 0.5, float(len(counts)))


def onnxruntime_range(counts: np.ndarray, edges: np.ndarray) -> tuple[float, float]:
    """Return the range by ONNX Runtime's rules, on a histogram of both signs around 0."""
    n, zero = len(counts), len(counts) // 2
    best, found = math.inf, (edges[0], edges[-1])
    for i in range(LEVELS // 2, zero + 1):
        start, end = zero - i, min(zero + i + 1, n)
        window = counts[start:end]
        p = window.copy()
        p[0] += counts[:start].sum()
        p[-1] += counts[end:].sum()
        filled = (p != 0).astype(np.int64)
        size = len(window) // LEVELS  # the rest is counted in the last level, and not spread
        starts = np.arange(LEVELS) * size
        sums = np.add.reduceat(window, starts)
        sizes = filled[: LEVELS * size].reshape(LEVELS, size).sum(1)
        level = np.divide(sums, sizes, out=np.zeros(LEVELS), where=sizes > 0).astype(np.int64)
        q = np.zeros(len(window), dtype=np.int64)
        q[: LEVELS * size] = np.repeat(level, size)
        divergence = _smoothed_divergence(p, q)
        if divergence < best:
            best, found = divergence, (edges[start], edges[end])
    return found


def _smoothed_divergence(p: np.ndarray, q: np.ndarray) -> float:
    """Return KL(P || Q) in float32, a little of each full bin's count given to the empty ones."""
    smooth = []
    for counts in (p, q):
        empty = counts == 0
        if empty.all():
            return math.inf
        share = 1e-4 * empty.sum() / (~empty).sum()
        values = counts.astype(np.float32)
        values += (1e-4 * empty - share * ~empty).astype(np.float32)
        smooth.append(values / values.sum())
    p, q = smooth
    return float(np.sum(p * np.log(p / q)))
