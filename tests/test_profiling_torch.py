"""Phases are exclusive and add up; operators' own times do; both follow torch's own events."""

import json
import time

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, Dataset

from dlhelpers.profiling import trace
from dlhelpers.profiling.code_report import Unseen
from dlhelpers.profiling.operators import find_operators, own_times
from dlhelpers.profiling.phases import PHASES, find_phases, phase_spans
from dlhelpers.profiling.torch_profile import TorchReport, profile_torch, record_steps
from dlhelpers.profiling.trace import Event, Trace, union_us

BACK = "autograd::engine::evaluate_function: "


def record(*events, steps=((0.0, 100.0),), allocated=()):
    made = [event if isinstance(event, Event) else Event(*event) for event in events]
    return Trace(trace.in_order(made), steps, 1, allocated)


def mark(name, start, end, thread=1):
    return Event(name, start, end, thread, "mark")


# ---- arithmetic ----

times = st.integers(0, 60)
spans = st.lists(st.tuples(times, times).map(lambda t: (min(t), max(t))), max_size=8)


@settings(deadline=None)
@given(spans, times, times)
def test_the_union_counts_each_moment_once(found, start, end):
    wanted = sum(any(first <= t + 0.5 <= last for first, last in found) for t in range(start, end))
    assert union_us(found, start, end) == wanted


@st.composite
def nested(draw, low=0, high=100, depth=0):
    """Spans of one thread: inside each other or apart, as calls are."""
    found, now = [], low
    while now < high and draw(st.booleans()):
        start = draw(st.integers(now, high))
        end = draw(st.integers(start, high))
        if end > start:
            kind = draw(st.sampled_from(["op", "data loading", "optimizer", "copies", "back"]))
            found.append((start, end, kind))
            if depth < 3:
                found += draw(nested(start, end - 1, depth + 1))  # never as long
        now = end + 1
    return found


@settings(deadline=None, max_examples=200)
@given(nested())
def test_each_moment_belongs_to_the_innermost_label(found):
    backs = [s for s in found if s[2] == "back"]
    assume(not any(a != b and a[0] <= b[0] and b[1] <= a[1] for a in backs for b in backs))
    events = []
    for start, end, kind in found:
        if kind == "op":
            events.append(Event("aten::mul", start, end))
        elif kind == "back":
            events.append(Event(BACK + "MulBackward0", start, end))
        else:
            events.append(mark(kind, start, end))
    got = record(*events)
    for low in range(100):
        moment = low + 0.5
        around = [s for s in found if s[0] < moment < s[1] and s[2] != "op"]
        # copies count where the step asks for them, not the loader, the optimizer or autograd
        outer = max(around, key=lambda s: s[1] - s[0], default=None)
        around = [s for s in around if s is outer or s[2] != "copies"]
        label = min(around, key=lambda s: s[1] - s[0], default=None)
        here = next(s for s in phase_spans(got) if s.start_us < moment < s.end_us)
        wanted = "forward" if label is None else label[2]
        if here.phase == "backward" and wanted != "back":  # between two functions of autograd's
            before = max(s[1] for s in found if s[2] == "back" and s[1] < moment)
            after = min(s[0] for s in found if s[2] == "back" and s[0] > moment)
            assert not [s for s in found if before <= s[0] < after and s[2] != "back"]
            assert not [s for s in found if before < s[1] <= after and s[2] != "back"]
        else:
            assert here.phase == {"back": "backward"}.get(wanted, wanted)


@settings(deadline=None, max_examples=100)
@given(nested())
def test_the_phases_add_up_to_the_steps(found):
    events = [Event("aten::mul", s, e) if k == "op" else mark(k, s, e) for s, e, k in found]
    got = record(*events, steps=((0.0, 40.0), (55.0, 100.0)))
    assert sum(find_phases(got).values()) == pytest.approx(85 / 1e3 / 2)
    covered = phase_spans(got)
    assert sum(s.end_us - s.start_us for s in covered) == pytest.approx(85)


@settings(deadline=None, max_examples=100)
@given(nested())
def test_own_times_add_up_to_the_time_that_is_covered(found):
    events = trace.in_order([Event(kind, s, e) for s, e, kind in found])
    own, outermost = own_times(events)
    assert sum(own) == union_us([(e.start_us, e.end_us) for e in events], 0, 100)
    for event, alone in zip(events, outermost, strict=True):
        around = [
            e
            for e in events
            if e is not event and e.name == event.name
            and e.start_us <= event.start_us and event.end_us <= e.end_us
            and (e.us > event.us or events.index(e) < events.index(event))
        ]  # fmt: skip
        assert alone == (not around)


# ---- what torch's events mean ----


def test_a_training_step_is_cut_at_torchs_own_labels():
    got = record(
        mark("enumerate(DataLoader)#_SingleProcessDataLoaderIter.__next__", 0, 30),
        Event("aten::stack", 5, 25),
        Event("aten::to", 32, 36),
        mark("Optimizer.zero_grad#SGD.zero_grad", 36, 40),
        Event("aten::conv2d", 40, 60),
        Event("aten::copy_", 45, 50),  # the convolution's own
        Event(BACK + "ConvolutionBackward0", 62, 80),
        Event("aten::copy_", 65, 70),
        Event(BACK + "torch::autograd::AccumulateGrad", 81, 84),
        mark("Optimizer.step#SGD.step", 90, 98),
    )
    ms = {name: value * 1e3 for name, value in find_phases(got).items()}
    assert ms == pytest.approx(
        {
            "data loading": 30,
            "copies": 4,
            "forward": 2 + 22 + 6 + 2,
            "backward": 22,
            "optimizer": 12,
        }
    )
    assert list(ms) == [name for name in PHASES if name in ms]


def test_autograd_in_a_thread_of_its_own_is_backward_and_its_gaps_too():
    got = record(
        Event("aten::conv2d", 0, 10),
        Event(BACK + "A", 30, 40, 7),
        Event(BACK + "B", 50, 90, 7),
        mark("Optimizer.step#SGD.step", 95, 100),
    )
    assert find_phases(got)["backward"] * 1e3 == pytest.approx(60)


def test_a_step_or_an_operator_between_two_functions_ends_backward():
    functions = Event(BACK + "A", 10, 20), Event(BACK + "B", 60, 70)
    assert find_phases(record(*functions))["backward"] * 1e3 == pytest.approx(60)
    between = record(*functions, Event("aten::mul", 30, 40))
    assert find_phases(between)["backward"] * 1e3 == pytest.approx(20)
    two_steps = record(*functions, steps=((0.0, 50.0), (50.0, 100.0)))
    assert find_phases(two_steps)["backward"] * 1e3 == pytest.approx(20 / 2)


def test_an_optimizer_that_steps_inside_backward_counts_as_optimizer():
    got = record(Event(BACK + "A", 10, 50), mark("Optimizer.step#SGD.step", 20, 30))
    assert find_phases(got)["backward"] * 1e3 == pytest.approx(30)


def test_waiting_for_the_gpu_is_told_apart_from_the_copy_around_it():
    got = record(Event("aten::to", 0, 50), Event("cudaStreamSynchronize", 10, 40, 1, "runtime"))
    found = find_phases(got)
    assert found["copies"] * 1e3 == pytest.approx(20)
    assert found["waiting for the GPU"] * 1e3 == pytest.approx(30)


def test_the_gpu_is_busy_while_at_least_one_stream_works():
    got = record(
        Event("conv", 0, 40, 7, "kernel"),
        Event("Memcpy HtoD (Pinned -> Device)", 30, 50, 8, "copy"),
        Event("gemm", 90, 130, 7, "kernel"),
    )
    assert got.gpu_busy_us == 60


def test_a_kernel_belongs_to_the_operator_that_launched_it_and_bytes_to_the_innermost():
    got = record(
        Event("aten::conv2d", 0, 50, id=1, flops=10),
        Event("aten::cudnn", 10, 40, id=2),
        Event("kernel", 60, 90, 7, "kernel", 2),
        allocated=((5.0, 100), (20.0, 7), (21.0, -7), (70.0, 1000)),
    )
    rows = {row.name: row for row in find_operators(got)}
    assert rows["aten::cudnn"].gpu_ms * 1e3 == pytest.approx(30)
    assert rows["aten::conv2d"].gpu_ms == 0
    assert rows["aten::conv2d"].nbytes == 100
    assert rows["aten::cudnn"].nbytes == 7
    assert rows["aten::conv2d"].own_ms * 1e3 == pytest.approx(20)
    assert rows["aten::conv2d"].flops == 10


def test_kernels_are_summed_by_name_the_longest_first():
    trace_ = record(
        Event("gemm", 0, 30, 7, "kernel"),
        Event("gemm", 40, 50, 8, "kernel"),
        Event("Memcpy HtoD (Pinned -> Device)", 50, 55, 7, "copy"),
        steps=((0.0, 50.0), (50.0, 100.0)),
    )
    report = TorchReport(trace_, (1.0,), (1.0,), Unseen())
    rows = [(row.name, row.calls, row.gpu_ms * 1e3) for row in report.kernels()]
    assert rows == [
        ("gemm", 1.0, pytest.approx(20)),
        ("Memcpy HtoD (Pinned -> Device)", 0.5, pytest.approx(2.5)),
    ]
    assert report.gpu_busy == pytest.approx(0.45)
    assert "GPU ms" in str(report.kernels())
    assert "busy for 45.0%" in str(report)
    with pytest.raises(ValueError, match="holds no record"):
        report.save("trace.json")


# ---- the real profiler ----


class Pictures(Dataset):
    def __len__(self):
        return 96

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return torch.rand(3, 24, 24, generator=generator), index % 10


def training_step(workers=0, batch=8, data=None):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 22 * 22, 10)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    batches = iter(DataLoader(data or Pictures(), batch, num_workers=workers))

    def step():
        images, labels = next(batches)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images.to(torch.float64).float()), labels).backward()
        optimizer.step()

    return step


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_all_phases_of_a_real_step_are_there_with_any_number_of_workers(workers):
    report = profile_torch(training_step(workers), steps=3, warmup=1)
    assert list(report.phases) == ["data loading", "copies", "forward", "backward", "optimizer"]
    assert len(report.trace.steps) == len(report.step_ms) == len(report.plain_ms) == 3
    assert sum(report.shares.values()) == pytest.approx(1)
    assert sum(report.phases.values()) == pytest.approx(report.trace.wall_us / 1e3 / 3)


class Sleepy(Dataset):
    def __len__(self):
        return 400

    def __getitem__(self, index):
        time.sleep(0.02)
        return torch.zeros(3, 24, 24), 0


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_slow_loader_is_most_of_the_step_with_any_number_of_workers(workers):
    """Eight samples sleep for 160 ms, or 80 with two workers; the step computes for a few."""
    report = profile_torch(training_step(workers, data=Sleepy()), steps=3)
    assert report.shares["data loading"] > 0.5
    clock = sum(report.step_ms) / len(report.step_ms)
    assert sum(report.phases.values()) == pytest.approx(clock, rel=0.05)
    assert "data loading" in report.what_to_do


def test_the_phases_follow_a_clock_that_is_read_around_the_step():
    """The recorded step lies inside the label, so its own clock can only show less."""
    report = profile_torch(training_step(), steps=4)
    assert sum(report.step_ms) <= sum(report.phases.values()) * 4


def test_operators_are_torchs_own_table():
    """key_averages counts the same calls and the same FLOPs, over the same events."""
    report = profile_torch(training_step(), steps=2)
    wanted = {row.key: row for row in report.session.key_averages() if row.key.startswith("aten::")}
    rows = {row.name: row for row in report.operators(1000) if row.name.startswith("aten::")}
    assert set(rows) == set(wanted)
    for name, row in rows.items():
        assert row.calls * 2 == wanted[name].count, name
        assert row.flops * 2 == wanted[name].flops, name
        assert row.own_ms * 2e3 == pytest.approx(wanted[name].self_cpu_time_total, abs=2), name
        assert row.total_ms * 2e3 <= wanted[name].cpu_time_total + 2  # inside itself: once


def test_a_label_of_ones_own_is_a_phase():
    def step():
        with torch.profiler.record_function("data loading"):
            sum(range(1000))
        torch.ones(3).sum()

    assert profile_torch(step, steps=2).phases["data loading"] > 0


def test_a_fake_clock_gives_the_steps_times():
    ticks = iter(range(1000))
    report = record_steps(lambda: torch.ones(2).sum(), 3, 1, clock=lambda: next(ticks))
    assert report.step_ms == report.plain_ms == (1000.0, 1000.0, 1000.0)
    assert report.overhead == 1


def test_a_loader_that_ends_early_gives_fewer_steps_or_says_so():
    step = training_step(batch=8)  # twelve batches: 2 + 5 + 1 come before
    report = profile_torch(step, steps=5)
    assert len(report.step_ms) == len(report.trace.steps) == 4
    with pytest.raises(ValueError, match="the loader ended before a step was recorded"):
        profile_torch(training_step(), steps=20)


def test_an_error_of_the_step_is_the_callers_and_leaves_no_profiler_on():
    def step():
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        profile_torch(step)
    calls = []

    def fails_late():
        calls.append(1)
        torch.ones(2).sum()
        if len(calls) == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        profile_torch(fails_late, steps=3)
    assert not torch._C._autograd._profiler_enabled()
    profile_torch(lambda: torch.ones(2).sum(), steps=1)


def test_the_profiler_inside_the_profiler_says_what_to_do():
    with pytest.raises(RuntimeError, match="at work already"), torch.profiler.profile():
        profile_torch(lambda: torch.ones(2).sum())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps must be a whole number, 1 or more, got 0"),
        ({"warmup": -1}, "warmup must be a whole number, 0 or more, got -1"),
        ({"steps": 2.5}, "got 2.5"),
    ],
)
def test_arguments_that_are_off_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        profile_torch(lambda: None, **arguments)
    with pytest.raises(TypeError, match="fn must be a function"):
        profile_torch(torch.ones(2))


def test_the_record_is_saved_whole_for_perfetto(tmp_path):
    report = profile_torch(training_step(), steps=2)
    path = report.save(tmp_path / "trace.json")
    events = json.loads(path.read_text())["traceEvents"]
    assert any(event.get("name") == "aten::conv2d" for event in events)
    packed = report.save(tmp_path / "trace.json.gz")
    assert packed.read_bytes()[:2] == b"\x1f\x8b"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["trace.json", "trace.json.gz"]
    with pytest.raises(ValueError, match=r"\.json"):
        report.save(tmp_path / "trace.txt")
    with pytest.raises(FileNotFoundError, match="no folder"):
        report.save(tmp_path / "none" / "trace.json")


def test_the_report_shows_the_overview_the_operators_and_what_to_do():
    report = profile_torch(training_step(), steps=2)
    text, page = str(report), report._repr_html_()
    for part in (*report.phases, "aten::convolution_backward", report.what_to_do):
        assert part in text
    assert "<img" in page
    assert "What to do" in page
    assert report.timeline(2).axes
    with pytest.raises(ValueError, match="by must be one of"):
        report.operators(by="name")
    with pytest.raises(ValueError, match="top must be"):
        report.operators(0)
