"""Is this one faster than that one, on this machine, beyond its noise?

Both callables run in pairs, in an order drawn anew for each pair, so that whatever slows the
machine slows both. Pair i gives the ratio r_i = baseline time / candidate time, and

    speedup = exp(median over i <= j of (log r_i + log r_j) / 2)        (Hodges-Lehmann)

with the confidence interval that inverts Wilcoxon's signed-rank test. The drawn order makes the
sign of log r_i a fair coin when both do the same work, whatever the noise and however long it
lasts, which is all that the test asks for.

The data are looked at several times, to stop as soon as the answer is settled. The error
probability 1 - confidence is divided over the looks (half of it kept for the last one), so that
all the intervals together cover with the stated confidence and stopping early costs no extra
false outcomes: Bonferroni's bound on the repeated confidence intervals of Jennison & Turnbull.

Times need not be steady at first. No look stops before each function was called 200 times or half
of the budget is spent; then the log ratios are tested for one change point, and the pairs before
it are left out. A warm-up may have more than one stage, so the next stop waits for 200 further
calls or the end of the budget. A ratio that still changes at the end gives *undecided: still
warming up*. What no method sees is a change that would come after the measuring has ended.

The speedup answers for the typical call. The ratio of the total times answers for throughput; it
is shown beside the speedup where rare long calls make the two disagree. Where times have levels
far apart no call is typical: there the interval holds both ratios.

Sources: Hodges & Lehmann 1963, doi:10.1214/aoms/1177704172 (estimate and interval);
Jennison & Turnbull 1989, J. R. Statist. Soc. B 51(3), 305-361 (repeated confidence intervals);
Pettitt 1979, doi:10.2307/2346729 (one change point);
Kalibera & Jones 2013, doi:10.1145/2491894.2464160 (ratios of times, with intervals).
"""

from dlhelpers.measure.comparing import compare, compare_many
from dlhelpers.measure.comparison import Comparison, Comparisons, Outcome
from dlhelpers.measure.estimates import Estimate, estimate_difference, estimate_mean

__all__ = [
    "Comparison",
    "Comparisons",
    "Estimate",
    "Outcome",
    "compare",
    "compare_many",
    "estimate_difference",
    "estimate_mean",
]
