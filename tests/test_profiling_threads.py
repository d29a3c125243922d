"""Profiling beside other threads: they see nothing of it, and what was patched is put back."""

import sys
import threading

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _BaseDataLoaderIter

from dlhelpers.fusion import fuse_conv_bn
from dlhelpers.memory import estimate
from dlhelpers.patching import PATCHING, Tracer, patched
from dlhelpers.profiling import diagnose, profile_torch
from dlhelpers.profiling.following import follow
from dlhelpers.profiling.loader_marks import loaders_marked
from dlhelpers.profiling.repeats import Repeat
from dlhelpers.profiling.step_trials import confirmed, without_anomaly
from dlhelpers.profiling.watching import watch
from dlhelpers.shufflenet import layer_costs

PATCHED = {
    (nn.Module, "__call__"): nn.Module.__call__,
    (nn.Module, "__getattr__"): nn.Module.__getattr__,
    (DataLoader, "__iter__"): DataLoader.__iter__,
    (_BaseDataLoaderIter, "__next__"): _BaseDataLoaderIter.__next__,
    (torch.Tensor, "tolist"): torch.Tensor.tolist,
    (torch.Tensor, "numpy"): torch.Tensor.numpy,
    (torch, "set_anomaly_enabled"): torch.set_anomaly_enabled,
}


def all_is_as_it_was():
    return all(getattr(owner, name) is own for (owner, name), own in PATCHED.items())


@pytest.fixture(autouse=True)
def _hasty():
    torch.manual_seed(0)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)
    assert all_is_as_it_was()


def in_another_thread(run):
    """Run a function in a thread of its own and return what it returns."""
    made = []
    thread = threading.Thread(target=lambda: made.append(run()))
    thread.start()
    thread.join(60)
    return made[0]


def model_of():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()


class Beside:
    """A thread that serves a model and reads batches, until the block ends."""

    def __init__(self):
        self.model, self.x = model_of(), torch.randn(2, 3, 8, 8)
        with torch.no_grad():
            self.wanted = self.model(self.x)
        self.faults, self.runs = [], 0
        self._stops = threading.Event()
        self._thread = threading.Thread(target=self._serve)

    def _serve(self):
        trained = torch.nn.Linear(4, 4)
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.0)
        while not self._stops.is_set():
            try:
                with torch.no_grad():
                    served = self.model(self.x)
                batches = [b.tolist() for b in DataLoader(torch.arange(6), batch_size=3)]
                trained(self.x.view(-1, 4)[:2]).sum().backward()
                optimizer.step()
                if not torch.equal(served, self.wanted) or batches != [[0, 1, 2], [3, 4, 5]]:
                    self.faults.append("another number")
            except Exception as fault:
                self.faults.append(repr(fault))
            self.runs += 1

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stops.set()
        self._thread.join()


def training_step():
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1)), torch.randn(16, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step():
        optimizer.zero_grad()
        outputs = model(x)
        sum(outputs[i].pow(2).sum() for i in range(16)).backward()
        optimizer.step()

    return step


def test_a_patch_is_seen_by_its_own_thread_alone():
    class Own:
        def name(self):
            return "old"

    class Heir(Own):
        pass

    with patched(Heir, "name", lambda old, self: f"new in place of {old(self)}"):
        assert Heir().name() == "new in place of old"
        assert in_another_thread(Heir().name) == "old"
        with patched(Heir, "name", lambda old, self: f"newest of {old(self)}"):
            assert Heir().name() == "newest of new in place of old"
    assert Heir().name() == "old"
    assert "name" not in vars(Heir)


def watched(step):
    with watch():
        step()


def marked(step):
    with loaders_marked():
        step()


def confirming(step):
    model = nn.Linear(2, 2)
    confirmed(step, [Repeat(model, {1: 0}, True, False, False, (torch.ones(1, 2),))])


def without_checks(step):
    without_anomaly(step)()


@pytest.mark.parametrize("run", [watched, marked, follow, confirming, without_checks])
def test_no_lock_is_held_while_a_step_runs(run):
    seen = []

    def step():
        seen.append((all_is_as_it_was(), in_another_thread(is_free)))

    def is_free():
        if is_free := PATCHING.acquire(blocking=False):
            PATCHING.release()
        return is_free

    run(step)
    assert set(seen) == {(False, True)}


CNN, IMAGE = model_of(), torch.randn(2, 3, 8, 8)
INSIDE = {
    "model": lambda: CNN(IMAGE),
    "fuse_conv_bn": lambda: fuse_conv_bn(CNN, IMAGE),
    "layer_costs": lambda: layer_costs(CNN, IMAGE),
    "symbolic_trace": lambda: torch.fx.symbolic_trace(CNN),
    "estimate": lambda: estimate(CNN, IMAGE, None, training=False),
}


@pytest.mark.parametrize("run", [diagnose, profile_torch], ids=lambda run: run.__name__)
def test_a_step_waits_for_a_thread_of_its_own(run):
    train, faults, went_on = training_step(), [], []

    def task():
        for name, inside in INSIDE.items():
            try:
                inside()
            except BaseException as fault:
                faults.append((name, fault))

    def step():
        train()
        if len(went_on) < 2:  # the others are as long as they were
            thread = threading.Thread(target=task, daemon=True)
            thread.start()
            thread.join(60)
            went_on.append(not thread.is_alive())

    run(step)
    assert went_on == [True, True]
    assert faults == []


@pytest.mark.parametrize("first", [0, 1])
def test_patches_of_two_threads_end_in_any_order(first):
    class Own:
        def name(self):
            return "old"

    name, seen = Own.name, []
    begun, ends = threading.Barrier(3), [threading.Event(), threading.Event()]

    def run(i):
        with patched(Own, "name", lambda old, self: f"{i} of {old(self)}"):
            begun.wait(60)
            ends[i].wait(60)
            seen.append((i, Own().name()))

    threads = [threading.Thread(target=run, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    begun.wait(60)
    assert Own().name() == "old"
    for i in (first, 1 - first):
        assert Own.name is not name
        ends[i].set()
        threads[i].join(60)
    assert seen == [(first, f"{first} of old"), (1 - first, f"{1 - first} of old")]
    assert Own.name is name


def test_a_patch_ends_while_somebody_elses_is_over_it():
    """As a plain torch.fx trace in another thread is, which puts back what it found."""

    class Own:
        def name(self):
            return "old"

    name = Own.name
    with patched(Own, "name", lambda old, self: "new"):
        found = Own.name
        Own.name = lambda self: f"theirs of {found(self)}"
        assert Own().name() == "theirs of new"
    assert Own().name() == "theirs of old"
    Own.name = found
    assert Own().name() == "old"
    assert Own.name is name


def test_a_trace_beside_it_hides_no_call_of_a_model():
    """torch.fx calls the function that was there when it was imported."""
    model, tracing, seen_all = nn.Linear(4, 4), threading.Event(), threading.Event()

    class Waits(nn.Module):
        def forward(self, x):
            tracing.set()
            seen_all.wait(60)
            return x + 1

    traced = []
    thread = threading.Thread(target=lambda: traced.append(Tracer().trace(Waits())))
    with watch() as seen:
        thread.start()
        tracing.wait(60)
        model(torch.ones(2, 4))
        seen_all.set()
        thread.join(60)
    assert [calls.count for calls in seen.calls.values()] == [1]
    assert [node.op for node in traced[0].nodes] == ["placeholder", "call_function", "output"]


@pytest.mark.parametrize("run", [diagnose, profile_torch, follow], ids=lambda run: run.__name__)
def test_another_thread_runs_its_model_undisturbed(run):
    with Beside() as other:
        run(training_step())
    assert other.runs > 1
    assert other.faults == []


def test_the_calls_of_another_thread_are_not_taken_for_the_steps():
    """It calls a model, reads numbers and makes an optimizer's step while a step is open."""
    model, other = nn.Linear(4, 4), nn.Linear(4, 4)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.0)

    def elsewhere():
        other(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        return [batch.tolist() for batch in DataLoader(torch.arange(4))]

    def step():
        outputs = model(torch.ones(8, 4))
        in_another_thread(elsewhere)
        return [outputs[i].exp() for i in range(8)]

    with watch() as seen:
        step()
    assert [calls.module for calls in seen.calls.values()] == [model]
    assert not seen.optimizers
    assert not seen.loaders
    flow = follow(step)
    assert set(flow.lines) == {(id(model), True)}
    assert flow.operators_at_once == follow(lambda: [t.exp() for t in model(torch.ones(8, 4))]
                                            ).operators_at_once  # fmt: skip


def test_a_diagnosis_beside_fusions_and_another_one_leaves_nothing_behind():
    faults, reports = [], []

    def diagnoses():
        for _ in range(2):
            follow(training_step())
            watched(training_step())

    def fuses():
        for _ in range(4):
            reports.append(fuse_conv_bn(model_of())[1].folded)

    def run(task):
        try:
            task()
        except Exception as fault:
            # two may watch at once, and say so
            faults.append(fault) if "diagnoses already" not in str(fault) else None

    tasks = [threading.Thread(target=run, args=(task,)) for task in (diagnoses, fuses) * 2]
    for task in tasks:
        task.start()
    for task in tasks:
        task.join()
    assert faults == []
    assert reports == [1] * 8
    assert all_is_as_it_was()
