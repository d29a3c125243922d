import gc
import itertools
import math
import random
import subprocess
import sys

import numpy as np
import psutil
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlhelpers import measure
from dlhelpers.measure import compare, compare_many, estimate_difference, estimate_mean, paired
from dlhelpers.measure.intervals import (
    _signed_rank_quantile,
    min_pairs,
    plan_looks,
    signed_rank_interval,
)
from dlhelpers.measure.selftest import Trial, busy_neighbour, run, workload


class FakeClock:
    """Time passes only where a callable lets it pass."""

    def __init__(self, seed=0):
        self.now = 0.0
        self.random = random.Random(seed)
        self.calls = 0

    def __call__(self):
        return self.now

    def work(self, seconds, noise=0.0):
        def call():
            self.calls += 1
            self.now += seconds * math.exp(self.random.gauss(0, noise))

        return call


@pytest.fixture
def clock(monkeypatch):
    fake = FakeClock()
    seeds = itertools.count()
    make = random.Random
    monkeypatch.setattr(paired, "_clock", fake)
    monkeypatch.setattr(paired.random, "Random", lambda *a: make(*(a or (next(seeds),))))
    return fake


@pytest.mark.parametrize("n", range(1, 11))
def test_quantile_equals_enumeration_of_all_signs(n):
    ranks = np.arange(1, n + 1)
    sums = sorted(int(np.dot(signs, ranks)) for signs in itertools.product([0, 1], repeat=n))
    for alpha in (0.5, 0.1, 0.05, 0.01):
        allowed = [k for k in sums if np.mean([s <= k for s in sums]) <= alpha / 2]
        # any k between two attainable sums has the same tail as the lower one
        expected = max(allowed) if allowed else -1
        assert _signed_rank_quantile(n, alpha) == expected


@pytest.mark.parametrize("n", [61, 100, 400])
def test_normal_approximation_is_on_the_safe_side_and_close(n):
    ways = np.ones(1)
    for rank in range(1, n + 1):
        longer = np.zeros(len(ways) + rank)
        longer[: len(ways)] += ways / 2
        longer[rank:] += ways / 2
        ways = longer
    tail = np.cumsum(ways)
    for alpha in (0.05, 0.025, 0.00625):
        k = _signed_rank_quantile(n, alpha)
        assert 0.85 * alpha / 2 < tail[k] <= alpha / 2 * 1.02


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(-1, 1).map(lambda x: round(x, 6)), min_size=8, max_size=14, unique=True),
    st.floats(-1, 1),
)
def test_interval_inverts_scipys_signed_rank_test(logs, shift):
    logs = np.array(logs) + np.linspace(0, 1e-4, len(logs))  # no ties
    interval = signed_rank_interval(logs, 0.05)
    distance = np.abs(logs - shift)
    if min(distance) < 1e-9 or len(np.unique(distance.round(9))) < len(logs):
        return  # the exact test is not defined on ties
    p = scipy.stats.wilcoxon(logs - shift, method="exact").pvalue
    inside = interval.low <= math.exp(shift) <= interval.high
    walsh = [(a + b) / 2 for i, a in enumerate(logs) for b in logs[i:]]
    assert interval.value == pytest.approx(math.exp(np.median(walsh)))
    if min(abs(w - shift) for w in walsh) > 1e-9:
        assert inside == (p > 0.05)


def test_the_looks_share_the_error_probability():
    for rounds in (1, 10, 100, 1000):
        looks = plan_looks(rounds, 0.05)
        assert math.isclose(sum(alpha for _, alpha in looks), 0.05)
        assert looks[-1][0] == 1.0
        early = looks[:-1]
        assert all(share * rounds >= min_pairs(alpha) for share, alpha in early)


def test_known_ratio_without_noise_is_exact(clock):
    result = compare(clock.work(0.003), clock.work(0.002))
    assert result.speedup == pytest.approx(1.5)
    assert result.outcome == "faster"
    assert (result.baseline_s, result.candidate_s) == (
        pytest.approx(0.003),
        pytest.approx(0.002),
    )
    assert compare(clock.work(0.002), clock.work(0.003)).outcome == "slower"
    assert compare(clock.work(0.002), clock.work(0.002)).outcome == "no difference"


def test_stopping_early_keeps_the_coverage(clock):
    # a band so narrow that every early look could end the run: uncorrected looks cover < 90 %
    truth, runs = 1.002, 400
    rows = [
        compare(
            clock.work(0.002, 0.02), clock.work(0.002 / truth, 0.02), negligible=1e-3, budget_s=0.5
        )
        for _ in range(runs)
    ]
    covered = sum(row.low <= truth <= row.high for row in rows) / runs
    assert covered >= 0.95 - 2.5 * math.sqrt(0.05 * 0.95 / runs)
    assert len({row.pairs for row in rows}) > 1  # some did stop early


def test_bursts_of_load_make_no_false_outcome(clock):
    def bursty(seconds):
        def call():  # slow for half of the time, in stretches of 0.2 s, one call in ten hit hard
            slow = 2.0 if int(clock.now / 0.2) % 2 else 1.0
            hit = 5.0 if clock.random.random() < 0.1 else 1.0
            clock.now += seconds * slow * hit

        return call

    rows = [compare(bursty(0.002), bursty(0.002), budget_s=1) for _ in range(100)]
    assert sum(row.outcome in ("faster", "slower") for row in rows) <= 5
    rows = [compare(bursty(0.002), bursty(0.0018), budget_s=2) for _ in range(30)]
    assert sum(row.outcome == "faster" for row in rows) >= 27


def test_being_second_in_a_pair_favours_nobody(clock):
    def position_dependent():
        clock.calls += 1
        clock.now += 0.002 * (1.2 if clock.calls % 2 else 1.0)

    rows = [compare(position_dependent, position_dependent, budget_s=1) for _ in range(50)]
    assert sum(row.outcome in ("faster", "slower") for row in rows) <= 2


def test_a_steady_drift_makes_no_difference(clock):
    def slower_and_slower():
        clock.calls += 1
        clock.now += 0.001 * (1 + clock.calls / 300)

    assert compare(slower_and_slower, slower_and_slower).outcome == "no difference"


@pytest.mark.parametrize("seconds", [1e-5, 1e-4, 0.003, 0.1, 0.9])
def test_the_budget_holds_and_a_sample_is_long(clock, seconds):
    result = compare(clock.work(seconds, 0.3), clock.work(seconds, 0.3), budget_s=2, threshold=1.0)
    # overrun: at most one round of two calls, plus warming up where two calls fill the budget
    assert result.elapsed_s <= 2 + 4 * seconds * 2
    if seconds < 1e-3:
        assert clock.calls / (2 * result.pairs) * seconds > 2e-4


def test_too_few_pairs_say_which_budget_would_do(clock):
    def pair():
        return clock.work(0.3), clock.work(0.2)

    result = compare(*pair(), budget_s=1)
    assert (result.low, result.high, result.outcome) == (0.0, math.inf, "undecided")
    budget = float(str(result).split("budget_s=")[1].split()[0])
    assert compare(*pair(), budget_s=budget).outcome == "faster"


@pytest.mark.parametrize("budget_s", [2.0, 70.0])
def test_one_call_of_each_that_spends_the_budget_is_the_last(clock, budget_s):
    result = compare(clock.work(30.0), clock.work(20.0), budget_s=budget_s)
    assert (clock.calls, clock.now, result.elapsed_s) == (2, 50.0, 50.0)
    assert (result.baseline_s, result.candidate_s, result.pairs) == (30.0, 20.0, 1)
    assert result.speedup == pytest.approx(1.5)
    assert (result.low, result.high, result.outcome) == (0.0, math.inf, "undecided")
    assert result.is_first
    assert "one call of each spent the budget" in str(result)
    rows = compare_many(
        {name: clock.work(9.0) for name in "abc"}, baseline="a", budget_s=budget_s / 10
    )
    assert clock.calls == 2 + 3
    assert all(row.is_first for row in rows.values())


def test_a_first_call_that_is_slow_spends_the_budget_and_no_more(clock):
    def compiled():
        clock.now += 30.0 if clock.calls == 0 else 0.001
        clock.calls += 1

    result = compare(compiled, clock.work(0.001), budget_s=2)
    assert clock.now < 30.2
    assert (result.outcome, result.is_first) == ("undecided", True)
    warm = compare(compiled, clock.work(0.001), budget_s=2)
    assert (warm.outcome, warm.is_first) == ("no difference", False)


def test_overtime_ends_with_the_pairs_that_an_interval_needs(clock):
    def pair():
        return clock.work(0.3, 0.1), clock.work(0.2, 0.1)

    result = compare(*pair(), budget_s=1, overtime=9)
    assert (result.pairs, result.outcome) == (min_pairs(0.05), "faster")
    assert 1 < result.elapsed_s < 6
    work = clock.work(0.3, 0.1)
    rows = compare_many(
        {"a": work, "b": work, "c": clock.work(0.2, 0.1)}, baseline="a", budget_s=1, overtime=9
    )
    assert rows["c"].pairs == rows["b"].pairs == min_pairs(0.05)
    spent = compare(*pair(), budget_s=1, overtime=0.5)  # not enough: no interval
    assert 1 < spent.elapsed_s <= 2
    assert (spent.low, spent.high) == (0.0, math.inf)


def test_rounds_that_become_slow_end_with_the_pairs_of_the_last_look(clock):
    def slower():
        clock.now += 0.003 if clock.calls < 24 else 0.5
        clock.calls += 1

    result = compare(slower, slower, budget_s=1, overtime=9)  # the first round plans early looks
    assert result.pairs == min_pairs(0.025)
    assert result.high < math.inf


@pytest.mark.parametrize("seconds", [1e-4, 0.003, 0.03])
def test_where_the_pairs_suffice_there_is_no_overtime(clock, seconds):
    work = clock.work(seconds, 0.3)
    result = compare(work, work, budget_s=2, overtime=9, threshold=1.0)
    assert result.elapsed_s <= 2 + 8 * seconds


def test_a_threshold_is_measured_until_it_is_cleared(clock):
    def pair():
        return clock.work(0.002, 0.05), clock.work(0.002 / 1.08, 0.05)

    plain = compare(*pair(), budget_s=20)
    decided = compare(*pair(), budget_s=20, threshold=1.07)
    assert plain.outcome == decided.outcome == "faster"
    assert decided.low > 1.07
    assert decided.pairs > plain.pairs
    band = compare(*pair(), budget_s=20, threshold=(1 / 1.07, 1.07))  # either end may be near
    swapped = compare(*pair()[::-1], budget_s=20, threshold=(1 / 1.07, 1.07))
    assert band.low > 1.07
    assert swapped.high < 1 / 1.07


@pytest.mark.parametrize(("ratio", "same"), [(2.0, True), (3.9, True), (8.0, False)])
def test_calls_of_like_length_are_repeated_equally_often(clock, ratio, same):
    counts = {"base": 0, "other": 0}

    def counted(name, seconds):
        call = clock.work(seconds)

        def count():
            counts[name] += 1
            call()

        return count

    functions = {name: counted(name, s) for name, s in (("base", 4e-6 * ratio), ("other", 4e-6))}
    race = paired.Race(functions, "base", 1.0, 0.0, None, "warm")
    counts.update(base=0, other=0)
    race._round()
    assert (counts["base"] == counts["other"]) == same


def test_the_first_call_is_not_the_only_one_that_the_calibration_knows(clock):
    left = [0.01]  # what warms up: longer than a twentieth of the share

    def call():
        clock.now += left.pop() if left else 1e-5

    race = paired.Race({"base": call, "other": clock.work(1e-5)}, "base", 0.2, 0.0, None, "warm")
    assert race.numbers["base"] == race.numbers["other"] == 100  # to a sample of 1 ms


def test_setup_runs_untimed_before_every_call(clock):
    prepared = []

    def setup():
        clock.now += 0.005
        prepared.append(True)

    def call():
        assert prepared.pop()
        clock.now += 0.002

    result = compare(call, call, setup=setup)
    assert result.baseline_s == pytest.approx(0.002)
    assert not prepared


def test_a_costly_setup_leaves_pairs_within_the_budget(clock):
    def setup():
        clock.now += 0.002

    result = compare(clock.work(1e-6), clock.work(1e-6), setup=setup, budget_s=1, threshold=1.0)
    assert result.elapsed_s <= 1.2
    assert result.pairs >= 10


def test_cuda_events_time_the_calls_and_are_waited_for(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")

        def synchronize(self):
            log.append("synchronize")

        def elapsed_time(self, end):
            assert log[-1] == "synchronize"  # before that there is no time to read
            return 2.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    timer = paired.Timer(None, "warm")
    assert timer.sample(lambda: log.append("call"), 3) == 0.002
    assert log == ["record", "call", "call", "call", "record", "synchronize"]


def test_cold_calls_are_single_and_see_a_swept_cache(monkeypatch):
    sweeps = []
    monkeypatch.setattr(paired, "_cache_sweeper", lambda: lambda: sweeps.append(True))
    calls = []
    compare(lambda: calls.append(1), lambda: calls.append(1), cache="cold", budget_s=0.02)
    assert len(sweeps) == len(calls)


def test_the_cache_sweeper_is_larger_than_the_last_level_cache():
    from dlhelpers.machine import last_level_cache_bytes

    assert paired._cache_sweeper()().nbytes > last_level_cache_bytes()


def test_many_share_the_baseline_and_settle_one_by_one(clock):
    rows = compare_many(
        {
            "base": clock.work(0.002, 0.01),
            "half": clock.work(0.001, 0.01),
            "close": clock.work(0.002 / 1.03, 0.01),
            "far": clock.work(0.00002, 0.01),
        },
        baseline="base",
    )
    assert list(rows) == ["half", "close", "far"]
    assert rows["half"].speedup == pytest.approx(2, rel=0.05)
    assert rows["far"].speedup == pytest.approx(100, rel=0.05)
    assert rows["close"].pairs > rows["half"].pairs
    assert "against base" in str(rows)
    assert "far" in rows._repr_html_()


def test_the_callers_state_is_left_alone():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    threads = torch.get_num_threads()
    result = compare(lambda: sum(range(100)), lambda: sum(range(100)), budget_s=0.05)
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected
    assert torch.get_num_threads() == threads == result.threads
    assert f"{threads} threads" in str(result)
    assert gc.isenabled()


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_errors_pass_through_and_the_garbage_collector_is_on_again(error):
    def fail():
        raise error

    with pytest.raises(error):
        compare(lambda: None, fail)
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget_s": 0}, "budget_s must be a positive"),
        ({"budget_s": math.nan}, "got nan"),
        ({"confidence": 95}, "such as 0.95, got 95"),
        ({"negligible": -1}, "such as 0.03, got -1"),
        ({"threshold": 0}, "such as 1.05, got 0"),
        ({"cache": "hot"}, "got 'hot'"),
        ({"budget_s": "2"}, "got '2'"),
        ({"overtime": -1}, "such as 2.0, got -1"),
        ({"overtime": math.inf}, "overtime must be a share of the budget"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        compare(lambda: None, lambda: None, **options)


def test_what_cannot_be_called_is_named():
    with pytest.raises(
        TypeError, match=r"candidate must be a function without arguments, got Tensor: write"
    ):
        compare(lambda: None, torch.zeros(1))
    with pytest.raises(ValueError, match="baseline 'x' must be one of two"):
        compare_many({"a": print, "b": print}, baseline="x")
    with pytest.raises(TypeError, match=r"setup must be a function .* got str"):
        compare(lambda: None, lambda: None, setup="x = 1")
    with pytest.raises(TypeError, match=r"functions must map names to callables.*got list"):
        compare_many([print], baseline="a")


def test_importing_measure_loads_no_torch():
    code = "import dlhelpers.measure, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_rich_display_draws_the_ratios(clock):
    html = compare(clock.work(0.002, 0.01), clock.work(0.001, 0.01))._repr_html_()
    assert "data:image/svg" in html
    assert "faster" in html


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=2, max_size=10))
def test_difference_equals_scipys_paired_t_interval(pairs):
    a, b = np.array(pairs).T
    if np.ptp(b - a) < 1e-6:
        return
    ours = estimate_difference(a, b, confidence=0.9)
    theirs = scipy.stats.ttest_rel(b, a).confidence_interval(0.9)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))


def test_an_estimate_needs_two_finite_samples():
    for bad in ([], [1.0], [1.0, math.nan]):
        with pytest.raises(ValueError, match="two finite samples"):
            estimate_mean(bad)
    with pytest.raises(ValueError, match="3 samples and candidate 2"):
        estimate_difference([1, 2, 3], [1, 2])


def test_the_selftests_work_is_what_it_says(monkeypatch):
    count = []
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda *a: count.append(1))
    workload(1.0)(), workload(0.9)()
    assert len(count) == 200 + 180


def test_the_neighbour_keeps_a_core_busy_and_leaves():
    with busy_neighbour() as process:
        assert process.poll() is None
    assert process.poll() is not None
    started, before = [], set(psutil.Process().children())
    trial = Trial(0.0, 0.01, loaded=True, runs=1, promise=0.05, at_most=True)

    def watching(baseline, candidate, *, budget_s):
        started.append(len(set(psutil.Process().children()) - before))
        return compare(baseline, candidate, budget_s=budget_s)

    list(run(plan=(trial,), compare=watching, progress=False))
    assert started == [1]


def test_the_selftest_counts_outcomes_and_coverage(clock):
    trial = Trial(0.1, 1.0, loaded=False, runs=3, promise=0.9, at_most=False)

    def exact(baseline, candidate, *, budget_s):
        return compare(clock.work(1e-3), clock.work(0.9e-3), budget_s=budget_s)

    def blind(baseline, candidate, *, budget_s):
        return compare(clock.work(1e-3), clock.work(1e-3), budget_s=budget_s)

    (good,) = run(plan=(trial,), compare=exact, progress=False)
    assert good.kept
    assert good.outcomes["faster"] == good.runs == 3
    (bad,) = run(plan=(trial,), compare=blind, progress=False)
    assert not bad.kept
    assert bad.covered == 0
    assert "NOT KEPT" in str(bad)


@pytest.mark.slow
@pytest.mark.alone
def test_the_promises_hold_on_this_machine():
    results = list(run(runs=20, progress=False))
    assert all(result.kept for result in results), "\n".join(map(str, results))


def test_public_names_are_few():
    assert len(measure.__all__) <= 8
