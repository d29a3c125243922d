"""A gain that a trial did not settle is none."""

import pytest

from dlhelpers.measure import paired
from dlhelpers.profiling import diagnosing


@pytest.fixture
def takes(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(paired, "_clock", lambda: now[0])
    monkeypatch.setattr(diagnosing, "perf_counter", lambda: now[0])

    def function(*seconds):
        turn = [0]

        def call():
            now[0] += seconds[turn[0] % len(seconds)]
            turn[0] += 1

        return call

    return function


def test_a_gain_is_that_of_the_comparison(takes):
    assert diagnosing._speedup(takes(0.02), takes(0.01)) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((0.01,), (0.01,)),
        ((0.0102,), (0.01,)),  # within the negligible band
        ((0.01,), (0.02,)),
        ((0.01, 0.03, 0.001, 0.05, 0.002), (0.008, 0.001, 0.04)),  # undecided
        ((9.0,), (1.0,)),  # too slow for a pair
    ],
)
def test_what_is_not_settled_is_no_gain(takes, before, after):
    assert diagnosing._speedup(takes(*before), takes(*after)) == 1.0


def test_what_cannot_be_run_is_no_gain(takes):
    assert diagnosing._speedup(None, takes(0.01)) == diagnosing._speedup(takes(0.01), None) == 1.0
