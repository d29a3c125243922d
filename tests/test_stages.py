"""The pipeline's arithmetic is that of an event-by-event simulation; threads keep its rules."""

import heapq
import math
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlhelpers.stages import predict_stages, run_stages


def simulated(times, batches, depth):
    """Events on a heap: a stage takes a batch, works, waits for room, hands it on. Brute force."""
    count = len(times)
    waiting = [[] for _ in times]  # queues in front of each stage
    holding = [None] * count  # (batch, finished?)
    done, now, source, events = {}, 0.0, 0, []
    while len(done) < batches * count or events:
        moved = True
        while moved:  # whatever can happen at this moment
            moved = False
            for i in reversed(range(count)):
                if holding[i] and holding[i][1]:
                    if i == count - 1:
                        holding[i], moved = None, True
                    elif len(waiting[i + 1]) < depth:
                        waiting[i + 1].append(holding[i][0])
                        holding[i], moved = None, True
                if holding[i] is None:
                    batch = None
                    if i and waiting[i]:
                        batch = waiting[i].pop(0)
                    elif not i and source < batches:
                        batch, source = source, source + 1
                    if batch is not None:
                        holding[i], moved = (batch, False), True
                        end = now + times[i][batch]
                        done[i, batch] = (now, end)
                        heapq.heappush(events, (end, i))
        if not events:
            break
        now, i = heapq.heappop(events)
        holding[i] = (holding[i][0], True)
    return done


lengths = st.lists(st.integers(0, 9), min_size=6, max_size=6)


@settings(max_examples=300, deadline=None)
@given(times=st.lists(lengths, min_size=1, max_size=4), depth=st.integers(1, 4))
def test_the_prediction_is_that_of_an_event_simulation(times, depth):
    line = predict_stages({f"stage {i}": t for i, t in enumerate(times)}, batches=6, depth=depth)
    wanted = simulated(times, 6, depth)
    for span in line.spans:
        start, end = wanted[line.stages.index(span.stage), span.batch]
        assert (span.start_s, span.end_s) == (start, end)


def test_without_a_queue_everything_is_one_after_the_other():
    line = predict_stages({"a": 2.0, "b": 3.0, "c": 0.5}, batches=4, depth=0)
    assert line.total_s == 4 * 5.5
    assert line.batches_per_s == pytest.approx(1 / 5.5)


@pytest.mark.parametrize("times", [(1.0, 4.0), (4.0, 1.0), (2.0, 2.0), (1.0, 5.0, 3.0)])
def test_throughput_is_that_of_the_slowest_stage(times):
    line = predict_stages({str(i): t for i, t in enumerate(times)}, batches=200, depth=2)
    assert line.batches_per_s == pytest.approx(1 / max(times))
    if len(set(times)) > 1:
        assert line.bottleneck == str(times.index(max(times)))
    assert line.busy_share(line.bottleneck) == pytest.approx(1.0)


def test_the_last_stage_waits_for_its_share_of_the_time():
    line = predict_stages({"prepare": 4.0, "train": 1.0}, batches=400, depth=2)
    assert line.busy_share("train") == pytest.approx(0.25, abs=0.01)
    assert len(line.spans) == 2 * 400


def test_the_bottleneck_is_the_stage_with_most_work_also_where_nobody_waits():
    for batches, depth in ((1, 2), (4, 2), (12, 12)):
        line = predict_stages({"prepare": 1, "train": 3}, batches=batches, depth=depth)
        assert line.bottleneck == "train"


def test_numbers_of_numpy_and_stages_that_take_no_time_are_stages_as_well():
    line = predict_stages({"a": np.float32(0.5), "b": np.int64(1), "c": np.ones(3)}, batches=3)
    assert line.total_s == 0.5 + 3 + 1
    nothing = predict_stages({"a": 0.0}, batches=3)
    assert (nothing.batches_per_s, nothing.busy_share("a")) == (math.inf, 1.0)
    with pytest.raises(ValueError, match="there is no stage 'b'"):
        nothing.busy_share("b")


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_an_exit_in_a_stage_ends_all_of_them(error):
    def leaves():
        raise error

    for depth in (0, 1):
        with pytest.raises(error):
            run_stages({"a": 0.001, "b": leaves, "c": 0.001}, depth=depth)


def test_threads_do_every_batch_once_in_order_in_every_stage():
    seen = {"a": [], "b": [], "c": []}
    counters = {name: iter(range(30)) for name in seen}
    work = {name: lambda n=name: seen[n].append(next(counters[n])) for name in seen}
    for depth in (0, 1, 3):
        for name in seen:
            seen[name].clear()
            counters[name] = iter(range(30))
        line = run_stages(work, batches=30, depth=depth)
        assert all(order == list(range(30)) for order in seen.values())
        ends = {(s.stage, s.batch): s.end_s for s in line.spans}
        starts = {(s.stage, s.batch): s.start_s for s in line.spans}
        for k in range(30):
            assert ends["a", k] <= starts["b", k]
            assert ends["b", k] <= starts["c", k]


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_the_queue_holds_as_many_as_its_depth_and_no_more(depth):
    made, enough, ahead = [], threading.Event(), []
    most = depth + 2  # one in training, `depth` in the queue, one in hand

    def make():
        made.append(1)
        if len(made) >= most:
            enough.set()

    def train():
        if not ahead:  # while the first is trained on, as many are made as find room
            assert enough.wait(30)
            threading.Event().wait(0.05)  # one too many would come now
            ahead.append(len(made))

    run_stages({"make": make, "train": train}, batches=20, depth=depth)
    assert ahead == [most]


def test_nothing_is_begun_after_an_error():
    done = {"read": 0, "train": 0}

    def read():
        done["read"] += 1
        if done["read"] == 4:
            raise OSError("the disk is gone")

    def train():
        done["train"] += 1

    for depth in (0, 1, 8):
        done.update(read=0, train=0)
        with pytest.raises(OSError, match="disk"):
            run_stages({"read": read, "train": train}, batches=50, depth=depth)
        assert done["read"] == 4
        assert done["train"] <= 3


def test_what_a_stage_raises_arrives_and_no_thread_stays():
    def fails():
        raise OSError("the disk is gone")

    before = threading.active_count()
    for work in (
        {"read": fails, "train": lambda: None},
        {"read": lambda: None, "train": fails},
        {"read": lambda: None, "decode": fails, "train": lambda: None},
    ):
        with pytest.raises(OSError, match="disk"):
            run_stages(work, batches=10, depth=1)
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("stages", "options", "says"),
    [
        ({}, {}, "no stage"),
        ({"a": -1.0}, {}, "0 or more"),
        ({"a": float("nan")}, {}, "finite"),
        ({"a": float("inf")}, {}, "finite"),
        ({"a": None}, {}, "must take seconds"),
        ({"a": "fast"}, {}, "must take seconds"),
        ({"a": [1.0, 2.0]}, {"batches": 3}, "2 times for 3"),
        ({"a": 1.0}, {"batches": 0}, "batches must be"),
        ({"a": 1.0}, {"depth": -1}, "depth must be"),
    ],
)
def test_what_makes_no_pipeline_is_told(stages, options, says):
    for function in (predict_stages, run_stages):
        with pytest.raises(ValueError, match=says):
            function(stages, **options)
