"""How are a tensor's values spread, seen batch by batch, in bounded memory?

Bins of equal width w over [-t, t]. A batch that reaches beyond t is not a reason to see the old
ones again: bins are either merged in pairs until it fits, w doubling (the number of bins stays), or
appended at both ends at the same width, as ONNX Runtime does (the number grows, up to a bound).
"""

from __future__ import annotations

from typing import Literal

import numpy as np

__all__ = ["Histogram"]

_MOST_BINS = 1 << 20


class Histogram:
    """Counts over bins of equal width around 0.

    Args:
        bins: at the start; an even number.
        absolute: of |x|, over [0, t]; with ``append`` over [min|x|, t] of the first batch, below
            which nothing is counted afterwards.
        grow: ``merge`` doubles the width, ``append`` keeps it up to 2^20 bins, then merges.

    Attributes:
        counts: int64 [B].
        edges: float64 [B + 1]; float32 for |x| with ``append``, whose new ends are summed up.
        zeros: values that are exactly 0 and counted in no bin; with ``merge`` alone.

    >>> histogram = Histogram(8)
    >>> histogram.add(np.array([-1.0, 0.0, 0.5, 4.0]))
    >>> histogram.add(np.array([16.0]))
    >>> histogram.counts.tolist(), histogram.edges[[0, -1]].tolist(), histogram.zeros
    ([0, 0, 0, 1, 2, 0, 0, 1], [-16.0, 16.0], 1)
    """

    def __init__(
        self,
        bins: int = 2048,
        *,
        absolute: bool = False,
        grow: Literal["merge", "append"] = "merge",
    ) -> None:
        if bins < 2 or bins % 2:
            raise ValueError(f"bins must be an even number, 2 or more, got {bins}")
        self.absolute, self.grow = absolute, grow
        self.counts = np.zeros(bins, dtype=np.int64)
        self.edges = np.zeros(bins + 1)
        self.zeros = 0

    def add(self, values: np.ndarray) -> None:
        """Count a batch's values, finite and one at least."""
        values = np.abs(values) if self.absolute else values
        if self.grow == "merge":
            nonzero = values[values != 0]
            self.zeros += values.size - nonzero.size
            values = nonzero
        largest = float(np.abs(values).max()) if values.size else 0.0
        if largest > self.edges[-1]:
            self._widen(largest, values)
        if not self.edges[-1]:  # nothing but zeros so far
            self.counts[len(self.counts) // 2] += values.size
            return
        if self.absolute and self.grow == "append":
            self.counts += np.histogram(values, self.edges)[0]
            self.edges = self.edges.astype(np.float32)
        else:
            ends = (self.edges[0], self.edges[-1])
            self.counts += np.histogram(values, len(self.counts), range=ends)[0]

    @property
    def full_counts(self) -> np.ndarray:
        """The counts with the exact zeros in the bin that starts at 0, int64 [B]."""
        counts = self.counts.copy()
        counts[0 if self.absolute else len(counts) // 2] += self.zeros
        return counts

    def _widen(self, largest: float, values: np.ndarray) -> None:
        bins = len(self.counts)
        if not self.edges[-1]:
            self._lay(0.0 if self.absolute else -largest, largest, bins)
            if self.absolute and self.grow == "append":
                self.edges = np.histogram_bin_edges(values, bins).astype(np.float32)
            return
        if self.grow == "append" and self._append(largest):
            return
        while self.edges[-1] < largest:
            pairs = self.counts.reshape(-1, 2).sum(1)
            pad = (0, bins // 2) if self.absolute else (bins // 4, bins // 2 - bins // 4)
            if not self.absolute and bins // 2 % 2:  # pairs would straddle 0
                raise ValueError(f"bins must be a multiple of 4 to be merged, got {bins}")
            self.counts = np.pad(pairs, pad)
            width = self.edges[1] - self.edges[0]
            start = self.edges[0] if self.absolute else 2 * self.edges[0]
            self._lay(start, start + 2 * bins * width, bins)

    def _append(self, largest: float) -> bool:
        old, bins = self.edges[-1], len(self.counts)
        width = self.edges[1] - self.edges[0]
        more = int((largest - old) // width + 1)
        sides = 1 if self.absolute else 2
        if bins + sides * more > _MOST_BINS:
            return False
        if self.absolute:
            new = np.arange(old + width, np.float32(largest) + width, width)
            self.edges = np.hstack((self.edges, new))
            self.counts = np.pad(self.counts, (0, len(new)))
            return True
        self.counts = np.pad(self.counts, more)
        self._lay(-old - more * width, old + more * width, len(self.counts))
        return True

    def _lay(self, start: float, end: float, bins: int) -> None:
        self.edges = np.linspace(start, end, bins + 1)
