"""What interval do paired log-ratios support, and when may one look at them?

The estimate is the median of the Walsh averages (l_i + l_j) / 2 of the log-ratios, the interval
cuts the k smallest and the k largest of them off, where k inverts the signed-rank test.

Sources: Hodges & Lehmann 1963, doi:10.1214/aoms/1177704172; Jennison & Turnbull 1989,
J. R. Statist. Soc. B 51(3), 305-361.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np

__all__ = [
    "HINT",
    "Interval",
    "is_typical",
    "min_pairs",
    "pair_interval",
    "plan_looks",
    "signed_rank_interval",
    "total_interval",
]

HINT = 0.4  # error probability of an interval of totals that merely hints
WARM_SHARE = 0.5  # of the time, after which calls need no more warming up
_NEAR = 0.1  # of a flat distribution, 1/4 lies within a quarter of the middle half's width
_LOOKS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)  # shares of the measuring time at which to look


@dataclass(frozen=True)
class Interval:
    """A ratio and its confidence interval; 0 and infinity where there is none."""

    value: float
    low: float
    high: float


def plan_looks(rounds: float, alpha: float, warm: float = 0) -> list[tuple[float, float]]:
    """Return (share of the time, error probability) of each look; the probabilities add up.

    Args:
        rounds: how many fit into the time.
        alpha: the error probability of all looks together.
        warm: rounds that warm up: before them, or half of the time, there is no look.
    """
    *early, last = _LOOKS
    need = min_pairs(alpha / 2 / len(early))
    early = [
        share
        for share in early
        if share * rounds >= need and (share * rounds >= warm or share >= WARM_SHARE)
    ]
    if not early:
        return [(last, alpha)]
    return [*((share, alpha / 2 / len(early)) for share in early), (last, alpha / 2)]


def min_pairs(alpha: float) -> int:
    """Return how many pairs a two-sided interval of level 1 - alpha needs at least."""
    return math.ceil(math.log2(2 / alpha))


def signed_rank_interval(logs: np.ndarray, alpha: float) -> Interval:
    """Hodges-Lehmann estimate of the ratio and the interval of level 1 - alpha."""
    first, second = _pairs(len(logs))
    means = (logs[first] + logs[second]) / 2
    middle = (len(means) - 1) // 2, len(means) // 2
    rank = _signed_rank_quantile(len(logs), alpha)
    wanted = [*middle, rank, len(means) - 1 - rank] if rank >= 0 else [*middle]
    means.partition(wanted)  # a full sort would cost ten times as much
    value = math.exp((means[middle[0]] + means[middle[1]]) / 2)
    if rank < 0:
        return Interval(value, 0.0, math.inf)
    return Interval(value, math.exp(means[rank]), math.exp(means[-1 - rank]))


def pair_interval(baseline: np.ndarray, candidate: np.ndarray, alpha: float) -> Interval:
    """Return the interval of level 1 - alpha of the ratio of a typical pair of times.

    Where no pair is typical, and the totals hint at another ratio, it holds that of the totals too.
    """
    logs = np.log(baseline) - np.log(candidate)
    interval = signed_rank_interval(logs, alpha)
    if is_typical(logs, interval.value):
        return interval
    hint = total_interval(baseline, candidate, HINT)
    if hint.low <= interval.high and interval.low <= hint.high:
        return interval
    total = total_interval(baseline, candidate, alpha)
    if math.isinf(total.high):  # too few pairs for it
        return interval
    low, high = min(interval.low, total.low), max(interval.high, total.high)
    return Interval(interval.value, low, high)


def is_typical(logs: np.ndarray, ratio: float) -> bool:
    """Whether many log-ratios lie near that of ``ratio``, rather than on both sides of a gap."""
    low, high = np.quantile(logs, (0.25, 0.75))
    near = np.abs(logs - math.log(ratio)) <= (high - low) / 4 + 1e-9
    return bool(np.mean(near) >= _NEAR)


def total_interval(baseline: np.ndarray, candidate: np.ndarray, alpha: float) -> Interval:
    """Ratio of the sums of paired times, and its interval of level 1 - alpha.

    The interval holds every ratio r for which |sum d| <= c sqrt(sum d^2), where d = baseline -
    r candidate and c^2 = 2 log(2 / alpha). If the sign of each d is a fair coin, a sum beyond that
    has probability alpha at most, however heavy the tails are (Hoeffding 1963,
    doi:10.1080/01621459.1963.10500830). It is Fieller's quadratic in r; infinite where a few
    calls of the candidate make up its total.
    """
    total, other = baseline.sum(), candidate.sum()
    level = 2 * math.log(2 / alpha)
    square = other**2 - level * (candidate @ candidate)
    mixed = total * other - level * (baseline @ candidate)
    rest = total**2 - level * (baseline @ baseline)
    if square <= 0:
        return Interval(total / other, 0.0, math.inf)
    half = math.sqrt(max(0.0, mixed**2 - square * rest))
    return Interval(total / other, max(0.0, (mixed - half) / square), (mixed + half) / square)


@lru_cache(maxsize=1)
def _pairs(n: int) -> tuple[np.ndarray, np.ndarray]:
    return np.triu_indices(n)


@lru_cache(maxsize=256)
def _signed_rank_quantile(n: int, alpha: float) -> int:
    """Return the largest k with P(W <= k) <= alpha / 2 for n pairs, -1 where there is none."""
    if n > 60:  # normal approximation, rounded to the safe side
        mean, variance = n * (n + 1) / 4, n * (n + 1) * (2 * n + 1) / 24
        return math.floor(mean + NormalDist().inv_cdf(alpha / 2) * math.sqrt(variance) - 0.5)
    ways = np.ones(1)  # ways[w]: how many subsets of the ranks 1..n sum to w
    for rank in range(1, n + 1):
        longer = np.zeros(len(ways) + rank)
        longer[: len(ways)] += ways
        longer[rank:] += ways
        ways = longer
    cumulative = np.cumsum(ways) / 2.0**n
    return int(np.searchsorted(cumulative, alpha / 2, side="right")) - 1
