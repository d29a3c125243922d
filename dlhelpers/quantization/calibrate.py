"""Which range of values is worth its integers?

A wide range clips nothing and has coarse steps; a narrow one clips the rare large values and
rounds the many small ones finely. Each calibrator sees the tensor batch by batch, keeps a few
numbers or a histogram, and says a range:

================  ================================================================================
min-max           the least and the greatest value: clips nothing
moving average    m <- m + c (batch's - m) of both ends (c = 0.01): a rare outlier fades
percentile        the ends that leave a share of the values outside
MSE               the range with the least squared error of clipping and rounding together
entropy           |x| <= T with the least KL(P || Q), P the clipped distribution, Q its 128 levels
================  ================================================================================

Sources: Migacz, GTC 2017, S7310 (entropy); Wu et al. 2020, arXiv:2004.09602, section 3.3.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from torch import Tensor

from dlhelpers.quantization.entropy import LEVELS, kl_threshold, onnxruntime_range
from dlhelpers.quantization.histogram import Histogram

__all__ = ["CALIBRATORS", "Calibrator", "split_error"]

Method = Literal["min-max", "moving average", "percentile", "mse", "entropy"]
CALIBRATORS: tuple[str, ...] = ("min-max", "moving average", "percentile", "mse", "entropy")


class Calibrator:
    """The range of one tensor, over batches of any number, in bounded memory.

    Args:
        method: one of ``CALIBRATORS``.
        bins: of the histogram of percentile, MSE and entropy.
        symmetric: the range is [-T, T]; entropy is symmetric on data of one sign or of both.
        percentile: of the values that lie inside, in percent.
        momentum: of the moving average, the weight of the new batch.
        bits: of the grid whose error MSE minimises.
        like: ``onnxruntime`` for the rules and the bins of ONNX Runtime's calibrators (entropy on
            both signs together; no range, a symmetric one neither, reaches beyond what was seen).

    Raises:
        ValueError: an unknown method, or an option out of range.

    >>> import torch
    >>> calibrator = Calibrator("percentile", percentile=99.0)
    >>> calibrator.observe(torch.linspace(0, 1, 100_001))
    >>> [round(end, 2) for end in calibrator.range()]
    [0.0, 0.99]
    """

    def __init__(
        self,
        method: Method = "min-max",
        *,
        bins: int = 2048,
        symmetric: bool = False,
        percentile: float = 99.999,
        momentum: float = 0.01,
        bits: int = 8,
        like: Literal["onnxruntime"] | None = None,
    ) -> None:
        if method not in CALIBRATORS:
            raise ValueError(f"method={method!r} is not one of {', '.join(CALIBRATORS)}")
        if not 2 <= bits <= 16:
            raise ValueError(f"bits must lie between 2 and 16, got {bits}")
        least = LEVELS if like else 2 * LEVELS
        if bins < least:
            raise ValueError(f"bins must be {least} or more, such as 2048, got {bins}")
        if not 50 < percentile <= 100:
            raise ValueError(f"percentile must lie above 50 and up to 100, got {percentile}")
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum must lie above 0 and up to 1, got {momentum}")
        if like not in (None, "onnxruntime"):
            raise ValueError(f'like must be "onnxruntime" or None, got {like!r}')
        self.method, self.symmetric, self.like = method, symmetric, like
        self.percentile, self.momentum, self.bits = percentile, momentum, bits
        self.histogram = Histogram(
            bins,
            absolute=(method == "percentile" and symmetric) or (method == "entropy" and not like),
            grow="append" if like else "merge",
        )
        self._low, self._high = math.inf, -math.inf
        self._average: tuple[float, float] | None = None

    def observe(self, x: Tensor) -> None:
        """Look at one more batch.

        Args:
            x: values of any shape and floating type; an empty one is passed over.

        Raises:
            ValueError: a value is not finite.
        """
        values = x.detach().float().cpu().flatten().numpy()
        if not values.size:
            return
        low, high = float(values.min()), float(values.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(
                f"a value to calibrate on is not finite ({low} to {high}): look for the first "
                "layer whose output is not"
            )
        self._low, self._high = min(self._low, low), max(self._high, high)
        if self.method == "moving average":
            old = self._average or (low, high)
            self._average = tuple(
                a + self.momentum * (b - a) for a, b in zip(old, (low, high), strict=True)
            )
        if self.method in ("percentile", "mse", "entropy"):
            self.histogram.add(values)

    @property
    def has_seen(self) -> bool:
        """Whether a value was observed."""
        return self._low <= self._high

    def range(self) -> tuple[float, float]:
        """Return (low, high) in the values' unit.

        Raises:
            ValueError: nothing was observed.
        """
        if not self.has_seen:
            raise ValueError("nothing was observed: give a batch to observe() first")
        low, high = {
            "min-max": lambda: (self._low, self._high),
            "moving average": lambda: self._average,
            "percentile": self._by_percentile,
            "mse": self._by_mse,
            "entropy": self._by_entropy,
        }[self.method]()
        # bins have width: no end lies outside of what was seen
        low, high = max(low, self._low), min(high, self._high)
        if self.symmetric and not self.like:
            largest = max(-low, high)
            return -largest, largest
        return low, high

    def _by_percentile(self) -> tuple[float, float]:
        counts, edges = self.histogram.full_counts, self.histogram.edges
        share = np.cumsum(counts / counts.sum())
        inside = self.percentile / 100
        place = _edge if self.like else _crossing
        if self.symmetric:
            t = place(share, edges, inside)
            return -t, t
        tail = (100 - self.percentile) / 200
        if self.like:
            return place(share, edges, tail), place(share, edges, 1 - tail)
        # data of one sign have one tail: nothing is cut off at 0
        if self._low >= 0:
            return self._low, place(share, edges, inside)
        if self._high <= 0:
            return place(share, edges, 1 - inside), self._high
        return place(share, edges, tail), place(share, edges, 1 - tail)

    def _by_mse(self) -> tuple[float, float]:
        low, high = min(self._low, 0.0), max(self._high, 0.0)
        if low == high:
            return low, high
        best = None
        # shrink both ends, then each by itself: the tails need not be alike
        for _ in range(3):
            center = best or (low, high)
            candidates = [center]
            for step in np.linspace(0.02, 1, 50 if best is None else 25):
                candidates += (
                    [(low * step, high * step)]
                    if best is None
                    else [
                        (low * step, center[1]),
                        (center[0], high * step),
                    ]
                )
            best = min(candidates, key=lambda ends: sum(self._split(ends)))
        return best

    def _split(self, ends: tuple[float, float]) -> tuple[float, float]:
        low, high = ends
        if self.symmetric:
            low, high = -max(-low, high), max(-low, high)
        return split_error(self.histogram, low, high, bits=self.bits)

    def _by_entropy(self) -> tuple[float, float]:
        if self.like:
            return onnxruntime_range(self.histogram.counts, self.histogram.edges)
        t = kl_threshold(self.histogram.full_counts, repair=True) * self.histogram.edges[1]
        return -t, t


def _edge(share: np.ndarray, edges: np.ndarray, wanted: float) -> float:
    """Return the left edge of the bin in which the cumulated share reaches the wanted one."""
    return float(edges[np.searchsorted(share, wanted)])


def _crossing(share: np.ndarray, edges: np.ndarray, wanted: float) -> float:
    """Return where the cumulated share reaches the wanted one, inside of a bin too."""
    i = min(int(np.searchsorted(share, wanted)), len(share) - 1)
    below = share[i - 1] if i else 0.0
    part = (wanted - below) / (share[i] - below) if share[i] > below else 1.0
    return float(edges[i] + min(max(part, 0.0), 1.0) * (edges[i + 1] - edges[i]))


def split_error(
    histogram: Histogram, low: float, high: float, *, bits: int = 8
) -> tuple[float, float]:
    """Return the mean squared error of a grid over [low, high], of clipping and of rounding.

    Each bin's values stand at its middle for clipping; rounding costs S^2 / 12 for a value inside
    the range, where a value is no grid point by itself (exact zeros cost nothing).

    Args:
        histogram: of the values.
        low, high: the range; 0 is taken in.
        bits: of the grid.

    Source: Widrow 1956, doi:10.1109/TCT.1956.1086334 (S^2 / 12).

    >>> histogram = Histogram(512)
    >>> histogram.add(np.linspace(-1, 1, 10_001))
    >>> clipping, rounding = split_error(histogram, -1, 1)
    >>> clipping < 1e-6 and abs(rounding / ((2 / 255) ** 2 / 12) - 1) < 0.01
    True
    """
    low, high = min(low, 0.0), max(high, 0.0)
    counts, edges = histogram.counts, histogram.edges
    middles = (edges[:-1] + edges[1:]) / 2
    total = counts.sum() + histogram.zeros
    beyond = np.where(middles > high, middles - high, np.where(middles < low, low - middles, 0.0))
    step = (high - low) / (2**bits - 1)
    clipping = float((counts * beyond**2).sum() / total)
    rounding = float(counts[beyond == 0].sum() / total) * step**2 / 12
    return clipping, rounding
