"""How sure is a mean over a few seeds? Student's t interval, paired where pairs exist.

mean ± t(n - 1) s / sqrt(n), with s the standard deviation of the n repetitions.

Source: Student 1908, doi:10.1093/biomet/6.1.1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

__all__ = ["Estimate", "estimate_difference", "estimate_mean"]


@dataclass(frozen=True)
class Estimate:
    """A mean over independent repetitions (seeds, say) with its confidence interval.

    Attributes:
        value, low, high: mean and interval, in ``unit``.
        n: number of repetitions.
        unit: as it follows the number, such as ``percentage points``.
    """

    value: float
    low: float
    high: float
    n: int
    unit: str = ""

    def __str__(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]{unit}, n = {self.n}"


def estimate_mean(
    samples: Sequence[float], *, confidence: float = 0.95, unit: str = ""
) -> Estimate:
    """Return the mean of independent repetitions with Student's t interval.

    Args:
        samples: one number for each repetition (seed); two at least, all finite.
        confidence: of the interval.
        unit: of the samples.

    Raises:
        ValueError: fewer than two samples, or one that is not finite.

    >>> print(estimate_mean([80.0, 82.0, 84.0], unit="%"))
    82 [77, 87] %, n = 3
    """
    values = [float(value) for value in samples]
    if len(values) < 2 or not all(map(math.isfinite, values)):
        raise ValueError(
            f"an interval needs two finite samples at least, got {values}: run more seeds, "
            "and record a run that diverged as the accuracy that it reached"
        )
    from scipy.stats import t

    half = t.ppf((1 + confidence) / 2, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    mean = fmean(values)
    return Estimate(mean, mean - half, mean + half, len(values), unit)


def estimate_difference(
    baseline: Sequence[float],
    candidate: Sequence[float],
    *,
    confidence: float = 0.95,
    unit: str = "",
) -> Estimate:
    """Return the mean of ``candidate - baseline``, paired seed by seed, with its t interval.

    Args:
        baseline, candidate: one number for each seed, the same seeds in the same order.
        confidence, unit: as in :func:`estimate_mean`.

    Raises:
        ValueError: the lengths differ, or as in :func:`estimate_mean`.

    >>> print(estimate_difference([90.0, 91.0, 92.0], [80.0, 82.0, 81.0], unit="points"))
    -10 [-12.5, -7.52] points, n = 3
    """
    if len(baseline) != len(candidate):
        raise ValueError(
            f"baseline has {len(baseline)} samples and candidate {len(candidate)}: "
            "run both with the same seeds, in the same order"
        )
    differences = [b - a for a, b in zip(baseline, candidate, strict=True)]
    return estimate_mean(differences, confidence=confidence, unit=unit)
