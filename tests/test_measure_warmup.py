"""Times that are not steady: warm-up, drift and rare long calls."""

import itertools
import math
import random

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from dlhelpers.measure import compare, compare_many, paired
from dlhelpers.measure.changes import _scan, find_change, is_changing
from dlhelpers.measure.intervals import (
    is_typical,
    min_pairs,
    plan_looks,
    signed_rank_interval,
    total_interval,
)
from dlhelpers.measure.selftest import PLAN, run


class Clock:
    """Only the callables that it makes move it."""

    def __init__(self):
        self.now = 0.0
        self.random = random.Random(0)

    def __call__(self):
        return self.now

    def timed(self, milliseconds, noise=0.0):
        """A callable whose k-th call, from 0, takes ``milliseconds(k)``."""
        count = itertools.count()

        def call():
            call.calls = next(count) + 1
            factor = math.exp(self.random.gauss(0, noise))
            self.now += 1e-3 * milliseconds(call.calls - 1) * factor

        call.calls = 0
        return call

    def steady(self, milliseconds=1.0, noise=0.0):
        return self.timed(lambda k: milliseconds, noise)

    def warming(self, calls, slower, noise=0.0, steady=1.0):
        return self.timed(lambda k: steady * (slower if k < calls else 1), noise)


@pytest.fixture
def clock(monkeypatch):
    fake, seeds, make = Clock(), itertools.count(), random.Random
    monkeypatch.setattr(paired, "_clock", fake)
    monkeypatch.setattr(paired.random, "Random", lambda *a: make(*(a or (next(seeds),))))
    return fake


def false(result):
    return result.outcome in ("faster", "slower")


@pytest.mark.parametrize(("calls", "slower"), [(40, 20), (150, 5), (7, 50), (100, 1.5), (190, 3)])
@pytest.mark.parametrize("swapped", [False, True])
def test_a_warm_up_is_left_out(clock, calls, slower, swapped):
    pair = clock.warming(calls, slower), clock.steady()
    result = compare(*reversed(pair)) if swapped else compare(*pair)
    assert (result.outcome, result.still_changing) == ("no difference", False)
    assert result.speedup == pytest.approx(1)
    assert result.baseline_s == result.candidate_s == pytest.approx(1e-3)
    assert len(result.ratios) == result.pairs
    assert f"without {result.dropped} from before a change" in str(result) or not result.dropped


@pytest.mark.parametrize("confidence", [0.95, 0.999])
@pytest.mark.parametrize("threshold", [None, 1.05, 10.0])
def test_neither_confidence_nor_threshold_brings_the_warm_up_back(clock, confidence, threshold):
    pair = clock.warming(40, 20), clock.steady()
    result = compare(*pair, confidence=confidence, threshold=threshold)
    assert result.outcome == "no difference"


def test_a_real_difference_is_found_after_the_warm_up(clock):
    result = compare(clock.warming(60, 10, 0.03), clock.steady(0.5, 0.03))
    assert result.outcome == "faster"
    assert result.low <= 2 <= result.high < 2.2
    assert result.dropped > 20


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_both_may_warm_up(clock, noise):
    for first, second in ((40, 90), (90, 40), (60, 60)):
        pair = clock.warming(first, 8, noise), clock.warming(second, 5, noise)
        assert not false(compare(*pair))


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(
    "stages",
    [
        [(40, 20), (100, 5)],
        [(30, 20), (80, 5)],
        [(10, 20), (60, 8), (60, 3)],
        [(60, 8), (150, 2)],
        [(5, 100), (100, 4)],
        [(20, 30), (50, 3), (50, 1.5)],
        [(100, 0.2), (60, 8)],
    ],
    ids=str,
)
def test_a_warm_up_in_stages_is_left_out(clock, stages, swapped):
    ends = list(itertools.accumulate(calls for calls, _ in stages))

    def milliseconds(k):
        return next((ms for end, (_, ms) in zip(ends, stages, strict=True) if k < end), 1.0)

    pair = clock.timed(milliseconds, 0.03), clock.steady(1.0, 0.03)
    result = compare(*reversed(pair)) if swapped else compare(*pair)
    assert result.outcome == "no difference"
    assert result.speedup == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize("decay", [50, 100, 150])
@pytest.mark.parametrize("height", [0.3, 2, 20])
def test_a_warm_up_that_fades_makes_no_false_outcome(clock, decay, height):
    warming = clock.timed(lambda k: 1 + height * math.exp(-k / decay), 0.03)
    assert not false(compare(warming, clock.steady(1.0, 0.03)))


# half of the budget leaves room for 200 calls after a change at 20 calls, not at 120
@pytest.mark.parametrize(("calls", "share"), [(120, 1), (20, 0.5)])
def test_after_a_change_the_calls_are_counted_anew(clock, calls, share):
    result = compare(clock.warming(calls, 4, steady=1.5), clock.steady())
    assert (result.outcome, result.dropped > 0) == ("faster", True)
    assert result.speedup == pytest.approx(1.5)
    assert result.elapsed_s == pytest.approx(2 * share, abs=0.06)  # begun after calibration


def test_a_change_with_less_after_it_than_before_is_undecided(clock):
    growing = clock.timed(lambda k: 4 if k < 150 else 20)
    result = compare(growing, clock.steady())
    assert result.dropped > result.pairs > 20
    assert (result.outcome, result.still_changing) == ("undecided", True)
    for _ in range(20):
        first = clock.timed(lambda k: 20 if k < 40 else 5 if k < 140 else 1, 0.03)
        second = clock.timed(lambda k: 20 if k < 60 else 5 if k < 200 else 1, 0.03)
        assert not false(compare(first, second))


def test_levels_that_come_and_go_by_themselves_are_rarely_a_difference(clock):
    def regime():
        level = [1.0]

        def milliseconds(_):
            if clock.random.random() < 0.01:
                level[0] = 2.5 - level[0]
            return level[0]

        return clock.timed(milliseconds, 0.03)

    # what changes nothing from the first call to the stop is not seen to change
    assert sum(false(compare(regime(), regime())) for _ in range(40)) <= 6


@pytest.mark.parametrize("milliseconds", [0.02, 0.2, 1.0, 5.0])
def test_no_early_stop_before_200_calls_or_half_of_the_budget(clock, milliseconds):
    pair = clock.steady(milliseconds), clock.steady(milliseconds / 2)
    result = compare(*pair, budget_s=2)
    assert result.outcome == "faster"
    assert min(f.calls for f in pair) >= 200 or result.elapsed_s >= 0.99
    assert result.elapsed_s < 1.1


@settings(max_examples=60, deadline=None)
@given(
    calls=st.integers(1, 1000),
    slower=st.floats(1.5, 50),
    noise=st.sampled_from([0.0, 0.0, 0.02]),
    steady=st.sampled_from([0.05, 1.0, 1.0, 4.0]),
    swapped=st.booleans(),
)
def test_a_warm_up_that_ends_while_measured_is_no_difference(calls, slower, noise, steady, swapped):
    clock, before = Clock(), paired._clock
    paired._clock = clock
    try:
        warming = clock.warming(calls, slower, noise, steady)
        pair = warming, clock.steady(steady, noise)
        result = compare(*reversed(pair)) if swapped else compare(*pair)
    finally:
        paired._clock = before
    assert warming.calls <= calls + 1 or not false(result)  # a call makes no sample


@pytest.mark.parametrize(
    "milliseconds",
    [
        lambda k: 0.01 * (k + 1),
        lambda k: 0.5 + 0.005 * k,
        lambda k: 4 / (1 + 0.01 * k),
        lambda k: 0.2 * 1.004**k,
        lambda k: 1 + 3 * (k // 100 % 2),
    ],
    ids=["from nothing", "linear", "falling", "exponential", "back and forth"],
)
def test_a_ratio_that_changes_to_the_end_is_undecided(clock, milliseconds):
    result = compare(clock.timed(milliseconds), clock.steady())
    assert (result.outcome, result.still_changing) == ("undecided", True)
    assert (result.low, result.high) == (0.0, math.inf)
    assert str(result).startswith("undecided: still warming up")
    assert "the ratio was still changing when the budget ended" in result.advice
    assert "too few" not in str(result)
    assert "still warming up" in result._repr_html_()


def test_a_machine_that_slows_both_down_changes_no_ratio(clock):
    def both():
        clock.now += 1e-3 * (1 + clock.now)

    result = compare(both, both)
    assert (result.outcome, result.still_changing, result.dropped) == ("no difference", False, 0)


def test_a_candidate_that_warms_up_holds_no_other_up(clock):
    rows = compare_many(
        {
            "base": clock.steady(),
            "half": clock.steady(0.5),
            "warms": clock.warming(80, 10),
            "grows": clock.timed(lambda k: 0.01 * (k + 1)),
        },
        baseline="base",
    )
    assert [rows[name].outcome for name in rows] == ["faster", "no difference", "undecided"]
    assert (rows["warms"].dropped > 0, rows["half"].dropped) == (True, 0)
    assert rows["grows"].still_changing


def test_a_setup_does_not_hide_the_warm_up(clock):
    def setup():
        clock.now += 1e-3

    assert compare(clock.warming(40, 10), clock.steady(), setup=setup).outcome == "no difference"


def test_calls_that_become_far_shorter_are_repeated_until_the_clock_can_tell(clock):
    calls = clock.timed(lambda k: 20 if k < 5 else 0.002)
    result = compare(calls, clock.steady(0.002))
    assert result.outcome == "no difference"
    assert calls.calls / len(result.ratios) > 50
    assert result.pairs <= 2000  # their averages are n^2 / 2


@pytest.mark.parametrize("noise", ["normal", "heavy tails", "alternating", "load comes and goes"])
def test_steady_times_show_no_change(noise):
    rng = np.random.default_rng(0)
    found = changing = 0
    for _ in range(300):
        n = int(rng.integers(10, 300))
        logs = {
            "normal": rng.normal(0, 0.1, n),
            "heavy tails": 0.02 * rng.standard_t(1.5, n),
            "alternating": 0.5 * (-1.0) ** np.arange(n) + rng.normal(0, 0.01, n),
            "load comes and goes": rng.normal(0, 0.3, n) * (np.arange(n) // 15 % 2 + 0.03),
        }[noise]
        found += find_change(logs, 0.03, 9) > 0
        changing += is_changing(logs, signed_rank_interval(logs, 0.025), 0.03)
    assert found <= 3
    assert changing <= 12


def test_the_scan_is_scipys_mann_whitney_statistic():
    logs = np.random.default_rng(0).normal(0, 1, 30)
    lead, z = _scan(logs, 1e-9)
    for t in (1, 7, 15, 29):
        u = scipy.stats.mannwhitneyu(logs[:t], logs[t:], method="asymptotic", use_continuity=False)
        assert lead[t - 1] == pytest.approx(u.statistic / (t * (30 - t)) - 0.5)
        assert 2 * scipy.stats.norm.sf(abs(z[t - 1])) == pytest.approx(u.pvalue)


def test_looks_before_the_functions_are_warm_spend_nothing():
    assert plan_looks(1000, 0.05, warm=300)[0][0] == 0.5
    assert plan_looks(1000, 0.05, warm=100)[0][0] == 1 / 8
    for warm in (0, 100, 1e6):
        looks = plan_looks(1000, 0.05, warm)
        assert math.isclose(sum(alpha for _, alpha in looks), 0.05)
        assert all(share * 1000 >= min_pairs(alpha) for share, alpha in looks)


def test_the_interval_keeps_its_coverage_though_a_change_may_be_cut_off(clock):
    truth = 1 / 0.97
    rows = [
        compare(clock.steady(2, 0.1), clock.steady(2 / truth, 0.1), budget_s=1) for _ in range(200)
    ]
    covered = sum(row.low <= truth <= row.high for row in rows) / len(rows)
    assert covered >= 0.95 - 2.5 * math.sqrt(0.05 * 0.95 / len(rows))
    assert sum(row.still_changing for row in rows) <= 4


def every(n, long, short):
    return lambda k: long if k % n == n - 1 else short


@pytest.mark.parametrize(
    ("milliseconds", "other", "outcome", "truth"),
    [
        (every(50, 50, 0.5), 1.0, "slower", 1.49),
        (every(10, 20, 2), 3.0, "slower", 3.8 / 3),
        (every(40, 100, 1), 1.0, "no difference", 3.475),
        (every(30, 40, 1.2), 1.0, "faster", 2.4933),
    ],
)
@pytest.mark.parametrize("swapped", [False, True])
def test_rare_long_calls_are_told_beside_the_typical_call(
    clock, milliseconds, other, outcome, truth, swapped
):
    pair = clock.timed(milliseconds), clock.steady(other)
    opposite = {"faster": "slower", "slower": "faster"}
    if swapped:
        pair, truth, outcome = pair[::-1], 1 / truth, opposite.get(outcome, outcome)
    result = compare(*pair)
    assert result.outcome == outcome
    assert result.total_ratio == pytest.approx(truth, rel=0.3)
    assert result.total_low <= truth <= result.total_high
    assert "typical call: " in str(result)
    assert "all calls together (throughput): " in str(result)
    assert "throughput" in result._repr_html_()


@pytest.mark.parametrize("period", [[0.2, 1.8], [0.2, 0.2, 2.6], [0.5, 1.5, 1.0], [0.9, 1.1]])
def test_times_in_turn_are_no_difference_from_their_mean(clock, period):
    result = compare(clock.timed(lambda k: period[k % len(period)]), clock.steady())
    assert not false(result)
    assert result.total_ratio == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize(
    ("period", "other"),
    [([1, 3], 2), ([1, 2], 1.5), ([2, 8], 5), ([1, 3, 3], 7 / 3), ([1, 1, 4, 4], 2.5)],
)
@pytest.mark.parametrize("swapped", [False, True])
def test_levels_far_apart_have_no_typical_call(clock, period, other, swapped):
    pair = clock.timed(lambda k: period[k % len(period)], 0.03), clock.steady(other, 0.03)
    result = compare(*reversed(pair)) if swapped else compare(*pair)
    assert result.outcome == "undecided"
    assert result.low <= 1 <= result.high
    assert "no call is typical" in result.throughput
    assert "some calls" not in str(result)


@pytest.mark.parametrize("other", [1.0, 4.0])
def test_levels_far_apart_hide_no_clear_difference(clock, other):
    result = compare(clock.timed(lambda k: 1 + 2 * (k % 2), 0.03), clock.steady(other, 0.03))
    assert result.outcome == ("faster" if other < 1.7 else "slower")
    assert result.low <= 2 / other <= result.high


def test_one_level_is_typical_whatever_its_shape():
    rng = np.random.default_rng(0)
    for logs in (
        rng.normal(0, 0.1, 50),
        rng.uniform(-1, 1, 50),
        rng.standard_t(1.5, 50),
        rng.exponential(1, 50),
        np.zeros(50),
        np.repeat([0.0, 2.0], [80, 20]),
    ):
        assert is_typical(logs, signed_rank_interval(logs, 0.05).value)
    two = rng.normal(0, 0.1, 50) + np.arange(50) % 2
    assert not is_typical(two, signed_rank_interval(two, 0.05).value)


def test_like_tails_on_both_sides_are_no_disagreement(clock):
    def hit(k):
        return 1.0 if clock.random.random() < 0.95 else clock.random.uniform(2, 30)

    rows = [compare(clock.timed(hit), clock.timed(hit), budget_s=1) for _ in range(60)]
    assert sum(bool(row.throughput) for row in rows) <= 2
    assert not any(map(false, rows))
    quiet = [compare(clock.steady(1, 0.05), clock.steady(1, 0.05)) for _ in range(20)]
    assert not any(row.throughput for row in quiet)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.3, 3))
def test_the_interval_of_totals_is_where_the_signed_sum_is_small(seed, ratio):
    rng = np.random.default_rng(seed)
    b, c = ratio * rng.pareto(2, 60) + ratio, rng.pareto(2, 60) + 1
    found = total_interval(b, c, 0.05)
    assert found.value == pytest.approx(b.sum() / c.sum())
    limit = math.sqrt(2 * math.log(2 / 0.05))
    if c.sum() <= limit * math.sqrt(c @ c):  # no ratio is too large
        assert (found.low, found.high) == (0.0, math.inf)
        return
    for r in np.linspace(0.05, 10, 100) * ratio:
        d = b - r * c
        is_small = abs(d.sum()) <= limit * math.sqrt(d @ d)
        if min(abs(r - found.low), abs(r - found.high)) > 1e-9:
            assert is_small == (found.low <= r <= found.high)


def test_the_selftest_has_trials_whose_times_are_not_steady():
    plan = tuple(trial for trial in PLAN if trial.times)
    assert {trial.times for trial in plan} == {
        "warm-up",
        "two-stage warm-up",
        "drift",
        "bimodal",
    }
    before = paired._clock
    results = list(run(runs=30, plan=plan, progress=False))
    assert all(result.kept for result in results), "\n".join(map(str, results))
    assert paired._clock is before
