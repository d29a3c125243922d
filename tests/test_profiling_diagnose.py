"""Each of ten planted bottlenecks is told apart, the right one first; a tuned loop has none."""

import dataclasses
import gc
import random
from types import SimpleNamespace

import numpy as np
import planted_bottlenecks as planted
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from dlhelpers.course import claims
from dlhelpers.findings import Findings
from dlhelpers.profiling import diagnosing, loaders, trials
from dlhelpers.profiling.diagnosing import diagnose, observe, rank
from dlhelpers.profiling.loaders import LoaderCosts, loader_costs
from dlhelpers.profiling.program_lines import ProgramLines
from dlhelpers.profiling.rules_cuda import CUDA_RULES
from dlhelpers.profiling.seen import Seen
from dlhelpers.profiling.trace import MODEL, Event, Trace, in_order
from dlhelpers.profiling.trials import folding_gain, trial
from dlhelpers.profiling.watching import ModelCalls, graph_counter, watch

BACK = "autograd::engine::evaluate_function: "
LOADER = "enumerate(DataLoader)#_SingleProcessDataLoaderIter.__next__"


def step_of(loading=0, model=40, backward=40, optimizer=4, outside=(), gpu=(), start=0):
    """Events of one step, one part after the other; all times are milliseconds."""
    events, now = [], start

    def add(name, ms, kind="operator", **more):
        nonlocal now
        if ms:
            events.append(Event(name, 1e3 * now, 1e3 * (now + ms), 1, kind, **more))
            now += ms

    add(LOADER, loading, "mark")
    for name, ms in outside:
        add(name, ms)
    add(MODEL, model, "mark")
    add(BACK + "A", backward)
    add("Optimizer.step#SGD.step", optimizer, "mark")
    for name, first, last, kind in gpu:
        events.append(Event(name, 1e3 * (start + first), 1e3 * (start + last), 7, kind))
    return events, now


def seen(steps=3, allocated=(), **parts):
    """What a recorded trace of equal steps says."""
    events, ends, now = [], [], 0
    for _ in range(steps):
        of_step, end = step_of(start=now, **parts.get("step", {}))
        events += of_step
        ends.append((1e3 * now, 1e3 * end))
        now = end
    facts = {name: value for name, value in parts.items() if name != "step"}
    return Seen(Trace(in_order(events), tuple(ends), 1, allocated), ends[0][1] / 1e3, **facts)


def costs(**given):
    facts = {
        "workers": 0, "batch": 10, "sample_ms": 10.0, "decoding": 0.0, "repeats": False,
        "copy_ms": 0.0, "collate_ms": 0.0, "plain_collate_ms": 0.0,
    }  # fmt: skip
    return LoaderCosts(**facts | given)


def calls(rows=16, count=3, training=True, makes_graph=True, model=None):
    model = model or nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    x = torch.zeros(rows, 3, 4, 4)
    return ModelCalls(model.train(training), training, count, rows, makes_graph, False, (x,))


def names(findings):
    return [finding.name for finding in findings]


def twice_as_fast(before, after):
    """A trial whose remedy always halves the time."""
    return 2.0


SLOW = {"step": {"loading": 100}}  # 100 of 184 ms
RECORDED = {
    "slow-decoding": seen(**SLOW, cores=4, costs=costs(workers=1, decoding=0.9)),
    "no-workers": seen(
        step={"loading": 60}, cores=4,
        costs=costs(sample_ms=6.0, decoding=0.6, workers_ms=20.0, tried=4),
    ),
    "python-loop": seen(
        step={"outside": [("aten::sub", 2), ("aten::div", 2)] * 16},
        lines=ProgramLines("a.py:1", "a.py:2", 0.4),
    ),
    "slow-collate": seen(
        **SLOW, cores=4,
        costs=costs(sample_ms=1.0, collate_ms=90.0, plain_collate_ms=1.0, workers_ms=30.0, tried=4),
    ),
    "item-every-step": seen(step={"outside": [("aten::_local_scalar_dense", 1)] * 40}),
    "batch-of-one": seen(calls=[calls(rows=1)]),
    "repeated-transforms": seen(
        **SLOW, cores=2, costs=costs(repeats=True, decoding=0.1, workers_ms=50.0, tried=2)
    ),
    "evaluation-without-no-grad": seen(
        step={"backward": 0, "optimizer": 0}, calls=[calls(training=False)]
    ),
    "loss-tensors-kept": seen(graph_nodes=(10, 22, 34, 46)),
    "batchnorm-unfused": seen(
        step={"backward": 0, "optimizer": 0}, calls=[calls(training=False, makes_graph=False)]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RECORDED)
def test_a_recorded_bottleneck_is_named_first(name):
    found = rank(RECORDED[name], 0.05, twice_as_fast)
    assert names(found)[0] == name
    first = found[0]
    assert first.what
    assert first.why
    assert first.remedy
    assert first.notebook in {lesson.stem for lesson in claims.lessons()}
    assert first.gain in str(first)


def test_all_ten_of_the_live_loops_are_recorded_as_well():
    assert set(RECORDED) == set(planted.PLANTED)


def test_a_step_without_waste_has_no_finding_and_says_what_it_does():
    found = rank(seen(calls=[calls()], graph_nodes=(5, 5, 5), cores=4), 0.05, twice_as_fast)
    assert found == []
    assert "backward 48%" in str(found)
    assert "nothing found" in str(found)


def in_python(ms, share=1.0):
    """Steps in which this many milliseconds pass under a label, in no operator and no model."""
    lines = ProgramLines("me/a.py:1", "me/a.py:2", share)
    facts = seen(lines=lines, calls=[calls()], graph_nodes=(5, 5))
    shift, events, ends = 0.0, [], []
    for start, end in facts.trace.steps:
        of_step = [e for e in facts.trace.events if start <= e.start_us < end]
        moved = 1e3 * ms + shift
        events += [
            dataclasses.replace(e, start_us=e.start_us + moved, end_us=e.end_us + moved)
            for e in of_step
        ]
        ends.append((start + shift, end + moved))
        shift = moved
    trace = Trace(in_order(events), tuple(ends), 1)
    return dataclasses.replace(facts, trace=trace, step_ms=84.0 + ms)


def test_what_no_operator_does_is_named_with_its_line():
    [found] = rank(in_python(60), 0.05, twice_as_fast)
    assert (found.name, found.where) == ("python-in-step", "me/a.py:2")
    assert found.saves_ms == pytest.approx(60)
    assert rank(in_python(60, share=0.1), 0.05, twice_as_fast) == []  # the record's own time
    little = rank(in_python(10), 0.05, twice_as_fast)
    assert little == []
    assert "10 ms of it is Python outside models and operators, most of it at me/a.py:2" in str(
        little
    )


def test_a_step_without_a_model_of_torchs_is_not_judged():
    assert rank(dataclasses.replace(in_python(60), calls=()), 0.05, twice_as_fast) == []


def test_operators_that_do_nothing_are_no_loop():
    nothing = seen(step={"outside": [("aten::to", 1)] * 40}, lines=ProgramLines("", "", 1.0))
    assert nothing.outside.commonest[1] == 0


def test_python_between_the_calls_of_a_short_step_is_no_finding():
    facts = dataclasses.replace(in_python(84), step_ms=0.5)
    assert rank(facts, 0.05, twice_as_fast) == []


def test_a_teacher_whose_graph_nobody_needs_is_told():
    def found(held=(), **given):
        student, teacher = calls(), dataclasses.replace(calls(training=False), **given)
        own = [*student.module.parameters(), *held]
        facts = seen(calls=[student, teacher], trained=frozenset(map(id, own)))
        return names(rank(facts, 0.05, lambda before, after: 1.0))

    assert found() == ["evaluation-without-no-grad"]
    assert found(needs_input_grad=True) == []  # as of a perceptual loss
    assert found(makes_graph=False) == []
    tuned = calls(training=False)  # its BatchNorms stand still while it is trained
    assert found(tuned.module.parameters(), module=tuned.module) == []
    frozen = nn.Conv2d(3, 4, 1).requires_grad_(False)
    assert found(module=frozen) == []


def watched(step):
    with watch() as seen:
        step()
    return seen


def test_the_parameters_that_are_trained_are_those_of_optimizers_that_step():
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    stale = torch.optim.SGD(other.parameters(), lr=0.1)
    optimizer = torch.optim.Adam(model.parameters())
    assert watched(optimizer.step).trained == {id(p) for p in model.parameters()}
    assert watched(lambda: None).trained == set()
    del stale


def test_gradients_that_flow_through_a_model_are_seen_wherever_they_enter():
    made, net = torch.ones(1, 2, requires_grad=True), nn.Linear(2, 2).eval()

    class Critic(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(2, 2)

        def forward(self, given):
            return self.net(given["x"])

    critic = Critic().eval()
    seen = watched(lambda: (net(made), net(made.detach()), critic({"x": made})))
    assert [calls.needs_input_grad for calls in seen.calls.values()] == [True, True]
    [calls] = watched(lambda: net(made.detach())).calls.values()
    assert not calls.needs_input_grad


def test_a_trial_is_not_seen_by_the_programs_hooks():
    model, widths = nn.Sequential(nn.Linear(4, 4)), []
    for module in model.modules():
        module.register_forward_hook(lambda module, inputs, output: widths.append(len(output)))
        module.register_forward_pre_hook(lambda module, inputs: widths.append(len(inputs[0])))
    call = ModelCalls(model, True, 3, 1, True, args=(torch.zeros(1, 4),))
    trial(call, 16)()
    assert widths == []
    assert len(model._forward_hooks) == 1  # on the model itself they stay
    folded = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    folded.register_forward_hook(lambda module, inputs, output: widths.append(len(output)))
    call = ModelCalls(folded, False, 3, 1, False, args=(torch.zeros(1, 3, 4, 4),))
    assert folding_gain(call, lambda one, other: (one(), other(), 1.5)[2]) == 1.5
    assert widths == []
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    call = ModelCalls(normed, True, 3, 1, True, args=(torch.zeros(1, 4),))
    assert trial(call, 16) is not None


def test_folding_is_tried_on_models_of_several_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))

        def forward(self, x, y):
            return self.net(x) + self.net(y)

    x = torch.zeros(1, 3, 4, 4)
    call = ModelCalls(Two().eval(), False, 3, 1, False, args=(x, x))
    assert folding_gain(call, lambda one, other: 1.5) == 1.5


def test_one_sample_is_no_finding_if_more_bring_nothing():
    facts = seen(step={"optimizer": 40}, calls=[calls(rows=1)])
    assert rank(facts, 0.05, lambda before, after: 1.0) == []


def test_a_remedy_that_does_not_help_is_no_finding():
    for name in ("batch-of-one", "batchnorm-unfused"):
        assert rank(RECORDED[name], 0.05, lambda before, after: 1.0) == []


class Uncopied(nn.Linear):
    def __deepcopy__(self, memo):
        raise TypeError("a handle of the system's cannot be copied")


@pytest.mark.parametrize("count", [3, 48])
def test_a_model_that_cannot_be_copied_is_not_tried(count):
    call = calls(rows=1, count=count, model=Uncopied(4, 4))
    assert rank(seen(calls=[call]), 0.05, twice_as_fast) == []


@pytest.fixture
def slow_model(monkeypatch):
    """Return a model whose every sample takes three seconds of a fake clock."""
    now, rows = [0.0], []

    class Slow(nn.Linear):
        def forward(self, x):
            rows.append(len(x))
            now[0] += 3.0 * len(x)
            return super().forward(x)

    for module in (trials, diagnosing):
        monkeypatch.setattr(module, "perf_counter", lambda: now[0])
    model = Slow(4, 4)
    model.rows = rows
    return model


@pytest.mark.parametrize(("step_ms", "looked_at"), [(1.0, 100), (50.0, 5), (1000.0, 3), (3e4, 1)])
def test_long_steps_are_looked_at_less_often(monkeypatch, step_ms, looked_at):
    runs = []

    def take_stacks(run, interval_s):
        before = len(runs)
        run()
        looks.append(len(runs) - before)
        return [], None, None

    looks = []
    monkeypatch.setattr(diagnosing, "perf_counter", lambda: step_ms * len(runs) / 1000)
    report = SimpleNamespace(plain_ms=[step_ms], shares={}, trace=None)
    monkeypatch.setattr(diagnosing, "record_steps", lambda *args, **options: report)
    monkeypatch.setattr(diagnosing, "take_stacks", take_stacks)
    observe(lambda: runs.append(1), 5)
    assert looks == [looked_at]


@pytest.mark.parametrize(
    ("first_s", "then_s", "called", "recorded"),
    [
        (0.1, 0.1, 1, 5),
        (60.0, 0.1, 2, 5),  # something is made ready in the first call
        (2.0, 2.0, 2, 4),
        (60.0, 60.0, 2, 1),
    ],
)
def test_slow_steps_are_recorded_less_often(monkeypatch, first_s, then_s, called, recorded):
    now, runs, asked = [0.0], [], []

    def step():
        runs.append(1)
        now[0] += first_s if len(runs) == 1 else then_s

    def record(fn, steps, warmup, **options):
        asked.append((len(runs), steps, warmup))
        return SimpleNamespace(plain_ms=[1000 * then_s], shares={}, trace=None)

    monkeypatch.setattr(diagnosing, "perf_counter", lambda: now[0])
    monkeypatch.setattr(diagnosing, "record_steps", record)
    monkeypatch.setattr(diagnosing, "take_stacks", lambda run, interval_s: ([], None, None))
    observe(step, 5)
    assert asked == [(called, recorded, 2 - called)]
    assert len(runs) - called == (4 if then_s < 2 else 2)  # graphs are counted


def test_a_batch_that_would_take_a_minute_is_not_tried(slow_model):
    call = calls(rows=1, model=slow_model)
    assert trial(call, 16) is None
    assert slow_model.rows == [1]
    assert trial(call, 2) is not None
    assert slow_model.rows == [1, 1, 2]


def test_a_remedy_for_slow_calls_is_not_raced(slow_model):
    x = torch.zeros(2, 4)
    assert diagnosing._speedup(lambda: slow_model(x), lambda: slow_model(x[:1])) == 1.0
    assert slow_model.rows == [2]


def test_trials_of_a_model_leave_the_random_state_alone():
    model = nn.Sequential(nn.Dropout(), nn.Linear(4, 4))
    before = torch.get_rng_state()
    rank(seen(calls=[calls(rows=1, model=model)]), 0.05, lambda one, many: (one(), 2.0)[1])
    assert torch.equal(torch.get_rng_state(), before)


def test_the_gain_is_amdahls():
    [found, *_] = rank(RECORDED["slow-collate"], 0.05, twice_as_fast)
    assert found.saves_ms == pytest.approx(89)
    assert found.speedup == pytest.approx(184 / (184 - 89))
    assert found.is_estimated  # there is no step to try it on
    [found] = rank(RECORDED["slow-decoding"], 0.05, twice_as_fast)
    assert found.saves_ms == pytest.approx(90)
    assert found.is_estimated


def test_workers_save_what_they_hide_and_no_more_than_the_cores_allow():
    def saved(**given):
        parts = {"sample_ms": 6.0, "workers_ms": 20.0, "tried": 4} | given
        cores = parts.pop("cores", 8)
        found = rank(seen(step={"loading": 60}, cores=cores, costs=costs(**parts)), 0.01, max)
        return next((f.saves_ms for f in found if f.name == "no-workers"), 0.0)

    assert saved() == pytest.approx(60)  # 84 ms of computing hide a batch each 20
    assert saved(workers_ms=100.0) == pytest.approx(144 - 100)  # they are the slower ones
    assert saved(sample_ms=16.0, cores=2) == pytest.approx(144 - (160 + 84) / 2)  # two cores
    assert saved(workers=2) == 0
    assert saved(ready_ms=10.0) == pytest.approx(50)  # each batch has to be fetched
    assert saved(workers_ms=None) == 0  # they failed


def test_workers_that_fail_are_not_recommended():
    facts = costs(sample_ms=6.0, decoding=0.2, copy_ms=6.0, repeats=True, workers_ms=None, tried=4)
    [found] = rank(seen(step={"loading": 60}, cores=4, costs=facts), 0.05, max)
    assert found.name == "slow-loading"
    assert "4 workers were tried and failed" in found.what


def test_copies_outside_the_model_are_not_taken_from_its_time():
    facts = seen(step={"outside": [("aten::to", 60)], "model": 40, "backward": 30})
    assert facts.ms("copies") == pytest.approx(60)
    assert facts.outside.ms == pytest.approx(60)
    assert facts.model_ms == pytest.approx(70)


def test_the_loader_that_is_waited_for_longest_is_looked_at():
    few, many = torch.zeros(8, 2), torch.ones(8, 2)
    with watch() as noted:
        next(iter(DataLoader(few, 4)))
        next(iter(DataLoader(many, 4, num_workers=1)))
    assert set(noted.waited_s) == {id(few), id(many)}
    noted.waited_s.update({id(few): 2.0, id(many): 1.0})
    assert noted.slowest.dataset is few  # not the one with more workers
    noted.begin_anew()
    assert noted.slowest is None


def test_a_loader_that_ends_early_says_what_to_do():
    batches = iter(DataLoader(torch.zeros(15, 2), 1))  # enough for what is recorded, not for all
    with pytest.raises(ValueError, match="let train_step begin it anew"):
        diagnose(lambda: next(batches), steps=3)


def test_batches_that_workers_give_at_once_are_counted_over_whole_rounds():
    """Two workers in step: two batches each 10 ms, so one comes every 5."""
    times = iter([0.0, 0.0, 0.010, 0.010, 0.020, *[0.020, 0.020] * 4])
    with watch() as noted:
        next(iter(DataLoader(torch.zeros(64, 2), 4)))
    [loader] = noted.loaders.values()
    between, ready = loaders.workers_ms(loader, 2, lambda: next(times))
    assert between == pytest.approx(5)
    assert ready == 0


def test_a_sample_that_is_only_fetched_is_no_transform():
    stored = {"repeats": True, "sample_ms": 6.0, "copy_ms": 6.0}
    found = rank(seen(step={"loading": 60}, cores=1, costs=costs(**stored)), 0.05, max)
    assert names(found) == ["slow-loading"]


def test_what_is_waited_for_is_all_that_can_be_saved():
    """Workers hide most of a slow collate: what is left of the wait bounds the gain."""
    slow = costs(workers=2, sample_ms=0.1, collate_ms=500.0, plain_collate_ms=1.0)
    [found] = rank(seen(step={"loading": 20}, cores=4, costs=slow), 0.05, twice_as_fast)
    assert found.saves_ms == pytest.approx(20)


def test_a_kept_loss_is_told_only_if_every_step_keeps_one():
    for nodes in ((10, 10, 10, 10), (10, 22, 22, 34), (40, 20, 60)):
        assert rank(seen(graph_nodes=nodes), 0.05, twice_as_fast) == []


def test_kept_bytes_are_those_of_the_median_step():
    kept = seen(allocated=((1e4, 500), (2e4, -100), (1e5, 400), (1.8e5, 400)))
    assert kept.kept_bytes == 400


# ---- CUDA, from records in torch's format ----


def on_gpu(*gpu, **parts):
    return seen(step={"gpu": gpu, **parts})


def rules_of_cuda(facts, speedup=twice_as_fast):
    return [finding.name for rule in CUDA_RULES for finding in rule(facts, 4.0, speedup)]


@pytest.fixture
def ampere(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a: (8, 0))


def test_the_rules_of_cuda_are_silent_without_cuda():
    assert rules_of_cuda(seen(calls=[calls()])) == []


@pytest.mark.usefixtures("ampere")
def test_an_idle_gpu_is_told_and_a_busy_one_not():
    assert rules_of_cuda(on_gpu(("conv", 0, 20, "kernel"))) == ["gpu-waits"]
    assert rules_of_cuda(on_gpu(("conv", 0, 80, "kernel"))) == []


@pytest.mark.usefixtures("ampere")
def test_python_that_a_gpu_hides_is_no_finding():
    facts = in_python(60)
    busy = [Event("conv", s, e, 7, "kernel") for s, e in facts.trace.steps]
    trace = dataclasses.replace(facts.trace, events=in_order([*facts.trace.events, *busy]))
    hidden = dataclasses.replace(facts, trace=trace)
    assert hidden.gpu_idle_ms == pytest.approx(0)
    assert rank(hidden, 0.05, lambda before, after: 1.0) == []


@pytest.mark.usefixtures("ampere")
def test_a_gpu_that_waits_for_the_loader_is_the_loaders_finding():
    assert rules_of_cuda(on_gpu(("conv", 100, 180, "kernel"), loading=100)) == []


@pytest.mark.usefixtures("ampere")
@pytest.mark.parametrize(
    ("copies", "remedy"),
    [([("Memcpy DtoH (Device -> Pageable)", 50, 51, "copy")], ".item()"), ([], "non_blocking")],
)
def test_a_synchronisation_in_the_step_is_told_with_what_causes_it(copies, remedy):
    facts = on_gpu(("conv", 0, 50, "kernel"), *copies)
    steps = facts.trace.steps
    waits = [Event("cudaStreamSynchronize", s + 5e4, s + 7e4, 1, "runtime") for s, _ in steps]
    trace = Trace(in_order([*facts.trace.events, *waits]), steps)
    found = {f.name: f for f in rank(Seen(trace, facts.step_ms), 0.05, lambda *_: 1.0)}
    assert remedy in found["synchronisation"].remedy


@pytest.mark.usefixtures("ampere")
def test_copies_from_pageable_memory_are_told_and_pinned_ones_not():
    def copied(name):
        return rules_of_cuda(on_gpu((name, 0, 10, "copy"), ("conv", 10, 80, "kernel")))

    assert copied("Memcpy HtoD (Pageable -> Device)") == ["not-pinned"]
    assert copied("Memcpy HtoD (Pinned -> Device)") == []


class OnGpu(nn.Module):
    """A model that says of itself that it lies on a GPU."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def parameters(self, recurse=True):
        return iter([SimpleNamespace(is_cuda=True, dtype=self.dtype)])


@pytest.mark.usefixtures("ampere")
@pytest.mark.parametrize(
    ("dtype", "autocast", "wanted"),
    [
        (torch.float32, False, ["full-precision"]),
        (torch.float32, True, []),
        (torch.bfloat16, False, []),
    ],
)
def test_float32_is_told_where_bfloat16_would_be_faster(dtype, autocast, wanted):
    facts = on_gpu(("conv", 0, 80, "kernel"))
    call = ModelCalls(OnGpu(dtype), True, 3, 16, True, autocast)
    found = dataclasses.replace(facts, calls=[call])
    assert rules_of_cuda(found) == wanted
    assert rules_of_cuda(found, lambda before, after: 1.0) == []


# ---- what a loader costs, by a fake clock ----


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Timed(Dataset):
    """Ten milliseconds a sample on a clock of its own."""

    def __init__(self, clock, random_part=False):
        self.clock, self.random_part = clock, random_part

    def __len__(self):
        return 40

    def __getitem__(self, index):
        self.clock.now += 0.010
        return torch.full((2,), index + (random.random() if self.random_part else 0))


def loader_of(dataset, **options):
    iterator = iter(DataLoader(dataset, batch_size=8, **options))
    with watch() as seen:
        next(iterator)
    [loader] = seen.loaders.values()
    return loader


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(loaders, "decoding_share", lambda fn: 0.0)
    monkeypatch.setattr(loaders, "workers_ms", lambda loader, tried, clock, share: (7.0, 0.5))
    return Clock()


def test_the_parts_of_a_batch_are_measured(clock):
    def collate(samples):
        clock.now += 0.025
        return default_collate(samples)

    found = loader_costs(loader_of(Timed(clock), collate_fn=collate), cores=2, clock=clock)
    assert found.sample_ms == pytest.approx(10)
    assert found.collate_ms == pytest.approx(25)
    assert found.plain_collate_ms == pytest.approx(0)
    assert found.batch_ms == pytest.approx(8 * 10 + 25)
    assert (found.batch, found.workers, found.tried, found.workers_ms) == (8, 0, 2, 7.0)
    assert found.ready_ms == 0.5
    assert found.repeats
    assert "test_profiling_diagnose.py" in found.collate_at


def test_slow_samples_are_made_a_few_times_and_the_batch_scaled(clock, monkeypatch):
    class Slow(Timed):
        def __getitem__(self, index):
            made.append(index)
            clock.now += 1.49
            return super().__getitem__(index)

    def collate(samples):
        clock.now += 0.001 * len(samples)
        return default_collate(samples)

    made, shares = [], []
    loader = loader_of(Slow(clock), collate_fn=collate)
    made.clear()

    def workers(loader, tried, clock, share):
        shares.append(share)
        return 7.0, 0.5

    monkeypatch.setattr(loaders, "workers_ms", workers)
    found = loader_costs(loader, cores=2, clock=clock)
    assert found.sample_ms == pytest.approx(1500)
    assert found.batch_ms == pytest.approx(8 * 1500 + 8)
    assert len(made) == 1 + 1 + 2 + 2  # files open, one look, does it repeat, what fits into 3 s
    assert shares == [pytest.approx(10 / (4 * 8 * 1.5))]


def test_workers_are_tried_on_a_share_of_each_batch():
    loader = loader_of(torch.arange(40.0))
    times = iter(range(100))
    whole = loaders.workers_ms(loader, 2, lambda: next(times))
    times = iter(range(100))
    quarter = loaders.workers_ms(loader, 2, lambda: next(times), share=0.3)
    assert quarter == tuple(4 * ms for ms in whole)  # 2 of 8 samples


def test_a_collate_that_gives_something_else_has_no_plain_one(clock):
    found = loader_costs(loader_of(Timed(clock), collate_fn=list), cores=1, clock=clock)
    assert found.plain_collate_ms is None
    assert found.tried == 0  # one core


def test_a_random_sample_does_not_repeat(clock):
    assert not loader_costs(loader_of(Timed(clock, True)), cores=1, clock=clock).repeats


def test_a_stream_is_measured_as_well(clock):
    class Stream(IterableDataset):
        def __iter__(self):
            for index in range(100):
                clock.now += 0.004
                yield index

    found = loader_costs(loader_of(Stream()), cores=4, clock=clock)
    assert found.sample_ms == pytest.approx(4)
    assert found.tried == 0  # each worker would give the whole stream


class Counting(IterableDataset):
    """It goes on where it was left."""

    def __init__(self, source=None):
        self.position, self.source, self.rest = 0, source, list(range(1000))
        self.draws, self.table = np.random.default_rng(0), torch.zeros(4)

    def __iter__(self):
        while True:
            self.position += 1
            yield self.rest.pop(0) + self.draws.random() + self.table[0]


def test_a_stream_that_counts_loses_nothing(clock):
    stream = Counting()
    loader = loader_of(stream)
    before = stream.position, len(stream.rest), stream.draws.bit_generator.state
    assert loader_costs(loader, cores=1, clock=clock).batch == 8
    assert (stream.position, len(stream.rest), stream.draws.bit_generator.state) == before


def test_a_stream_that_can_be_read_once_is_not_tried(clock):
    numbers = (number for number in range(100))
    loader = loader_of(Counting(numbers))
    assert loader_costs(loader, cores=1, clock=clock) is None
    assert next(numbers) == 0


def test_the_random_states_are_put_back(clock):
    generator = torch.Generator().manual_seed(3)
    loader = loader_of(Timed(clock, True), shuffle=True, generator=generator)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    own = generator.get_state().tolist()
    loader_costs(loader, cores=2, clock=clock)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert before == after
    assert generator.get_state().tolist() == own


def test_decoding_is_counted_once_however_deep_it_calls_itself():
    def work(n):
        return sum(range(n))

    source = "def decode(n): return work(n) + load(n)\ndef load(n): return work(n)"
    pillow = {"work": work}
    exec(compile(source, "/site-packages/PIL/ImageFile.py", "exec"), pillow)
    decode = pillow["decode"]
    assert loaders.decoding_share(lambda: [decode(10_000) for _ in range(20)]) > 0.9
    assert loaders.decoding_share(lambda: [work(10_000) for _ in range(20)]) == 0


# ---- what is seen while a step runs ----


def test_models_and_loaders_are_found_and_the_hooks_are_gone_afterwards():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    iterator = iter(DataLoader(torch.zeros(10, 2), 5))
    give = type(iterator).__next__
    with watch() as seen:
        model(next(iterator))
        model.eval()(next(iterator))
        nn.ReLU()(torch.zeros(1))  # without parameters: no model
    assert [(c.module, c.training, c.count, c.rows) for c in seen.calls.values()] == [
        (model, True, 1, 5),
        (model, False, 1, 5),
    ]
    assert type(iterator).__next__ is give
    with watch() as other:
        pass
    model(torch.zeros(1, 2))
    assert not other.calls


def test_one_watches_at_a_time():
    call = nn.Module.__call__
    with watch(), pytest.raises(RuntimeError, match="one runs at a time"), watch():
        pass
    assert nn.Module.__call__ is call
    with watch():
        pass


def test_a_model_that_raises_leaves_the_watch_in_order():
    model = nn.Linear(2, 2)
    with watch() as seen:
        with pytest.raises(RuntimeError):
            model(torch.zeros(1, 3))
        model(torch.zeros(4, 2))
    assert [c.rows for c in seen.calls.values()] == [4]


def test_nodes_of_graphs_are_those_that_living_tensors_hold():
    x = torch.ones(2, requires_grad=True)
    with graph_counter() as count:
        before = count()
        y = (x * 2).sum()  # Sum, Mul, AccumulateGrad
        assert count() == before + 3
        del y
        assert count() == before


def test_the_outside_of_a_step_is_what_no_model_does():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def step():
        x = torch.ones(8, 4)
        for _ in range(10):
            x = x + 1
        return model(x).sum().item()

    outside = observe(step, 3).outside
    assert outside.commonest == ("aten::add", 10)
    assert outside.items == 1
    assert 12 <= outside.operators <= 14  # ones, ten additions, sum, item


@pytest.mark.parametrize("set_aside", [False, True])
def test_graphs_that_are_kept_are_counted_whether_tensors_are_new_or_old(set_aside):
    x, kept = torch.ones(2, requires_grad=True), []
    total = (x * 2).sum()
    if set_aside:
        gc.freeze()  # as a program does before it forks
    try:
        with graph_counter() as count:
            begin = count()
            kept.append((x * 2).sum())
            first = count()
            assert first > begin
            kept.append((x * 2).sum())
            assert count() - first == 2  # the leaf is there already
            total += (x * 2).sum()  # the same tensor, with a longer graph
            if not set_aside:
                assert count() - first == 2 + 3
        assert bool(gc.get_freeze_count()) == set_aside
    finally:
        gc.unfreeze()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 2}, "steps must be a whole number, 3 or more, got 2"),
        ({"at_least": 5}, "at_least must be a share between 0 and 1, got 5"),
    ],
)
def test_arguments_that_are_off_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        diagnose(lambda: None, **arguments)
    with pytest.raises(TypeError, match="train_step must be a function"):
        diagnose(3)


def test_findings_of_time_are_shown_like_all_findings():
    found = rank(RECORDED["loss-tensors-kept"], 0.05, twice_as_fast)
    assert isinstance(found, Findings)
    assert found.errors == found
    assert "memory that does not grow" in found._repr_html_()
    assert "losses.append(loss.detach())" in str(found)


# ---- live ----


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", planted.PLANTED)
def test_a_planted_bottleneck_is_named_first(name):
    """Another program may take the machine meanwhile: then two more decide."""
    found = [diagnose(planted.PLANTED[name]())]
    if names(found[0])[:1] != [name]:
        found += [diagnose(planted.PLANTED[name]()) for _ in range(2)]
        assert [names(each)[:1] for each in found[1:]] == [[name]] * 2, "\n".join(map(str, found))


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.usefixtures("one_thread")
def test_a_model_that_is_called_sample_by_sample_is_a_loop():
    assert names(diagnose(planted.model_by_sample()))[0] == "python-loop"


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", planted.TUNED)
def test_a_tuned_loop_has_no_finding(name):
    found = diagnose(planted.TUNED[name]())
    assert found == [], str(found)
