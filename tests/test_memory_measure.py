import functools
import os
import sys
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from dlhelpers.memory import KINDS, measure_peak, mib

WRAPPED = 32  # bytes: under a dispatch mode a Python number becomes a tensor of its own

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": torch.optim.AdamW,
    "adamw fused": functools.partial(torch.optim.AdamW, fused=True),
}


def allocated_above_the_start(fn):
    """The independent record: the profiler's own events of memory, in order of time, summed."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = fn()
    del result
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    level = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        most = max(most, level)
    return most


def nbytes_of(*tensors):
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def state_of(optimizer):
    return [t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]


def conv_net():
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(*layers, nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(), nn.Flatten())
    return nn.Sequential(model, nn.Linear(16 * 49, 10)), torch.randn(4, 3, 32, 32)


def mlp():
    return nn.Sequential(nn.Linear(20, 300), nn.Tanh(), nn.Linear(300, 10)), torch.randn(16, 20)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.1)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x):
        return self.layers(x).mean(1)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(16, 24, batch_first=True)

    def forward(self, x):
        return self.lstm(x)[0][:, -1]


class Shared(nn.Module):
    """One layer called many times, its weight also the head's."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(32, 32), nn.Linear(32, 32, bias=False)
        self.head.weight = self.layer.weight

    def forward(self, x):
        for _ in range(5):
            x = torch.relu(self.layer(x))
        return self.head(x)


class Recomputed(nn.Module):
    def __init__(self, use_reentrant):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(32, 128), nn.Tanh(), nn.Linear(128, 32), nn.Tanh())
        self.use_reentrant = use_reentrant

    def forward(self, x):
        return checkpoint(self.body, x.requires_grad_(), use_reentrant=self.use_reentrant)


class Views(nn.Module):
    """Views, in-place operators, a resize, and a tensor that dies in the middle."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x):
        y = self.layer(x)
        y = y.add_(1).view(8, 4, 64).transpose(1, 2)
        large = torch.zeros(4096)
        del large
        small = torch.zeros(4)
        small.resize_(1024)
        return (y * 2).flatten(1)


MODELS = {
    "conv net": conv_net,
    "mlp": mlp,
    "encoder": lambda: (Encoder(), torch.randn(3, 7, 32)),
    "lstm": lambda: (Recurrent(), torch.randn(4, 9, 16)),
    "shared": lambda: (Shared(), torch.randn(6, 32)),
    "checkpoint": lambda: (Recomputed(False), torch.randn(6, 32)),
    "reentrant checkpoint": lambda: (Recomputed(True), torch.randn(6, 32)),
    "views": lambda: (Views(), torch.randn(32, 64)),
}


def training(make, optimizer="adamw"):
    torch.manual_seed(0)
    model, x = make()
    labels = torch.zeros(len(model(x)), dtype=torch.long)
    stepper = OPTIMIZERS[optimizer](model.parameters())

    def step():
        stepper.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        stepper.step()

    step()
    stepper.zero_grad()
    there = [*model.parameters(), *model.buffers(), *state_of(stepper), x, labels]
    return step, stepper, nbytes_of(*there, *([] if x.grad is None else [x.grad]))


@pytest.mark.parametrize("name", MODELS)
def test_the_peak_is_the_allocators_record_to_the_byte(name):
    step, stepper, before = training(MODELS[name])
    independent, found = before + allocated_above_the_start(step), []
    for _ in range(2):
        stepper.zero_grad()
        report = measure_peak(step)
        found.append(report.peak_bytes)
        assert report.measured
    assert found[0] == found[1] == pytest.approx(independent, abs=WRAPPED)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizers_step_too(optimizer):
    step, stepper, before = training(mlp, optimizer)
    independent = before + allocated_above_the_start(step)
    stepper.zero_grad()
    assert measure_peak(step).peak_bytes == pytest.approx(independent, abs=WRAPPED)


layers = st.lists(
    st.sampled_from(["linear", "relu", "linear, silu_", "dropout", "norm", "tanh"]),
    min_size=1,
    max_size=8,
)


@settings(max_examples=25, deadline=None)
@given(layers, st.integers(1, 33), st.integers(1, 64))
def test_any_chain_of_layers_too(names, batch, width):
    make = {
        "linear": lambda: nn.Linear(width, width),
        "relu": nn.ReLU,
        "linear, silu_": lambda: nn.Sequential(nn.Linear(width, width), nn.SiLU(inplace=True)),
        "dropout": nn.Dropout,
        "norm": lambda: nn.LayerNorm(width),
        "tanh": nn.Tanh,
    }
    model = nn.Sequential(nn.Linear(width, width), *(make[name]() for name in names))
    x = torch.randn(batch, width)

    def run():
        model.zero_grad()
        model(x).square().sum().backward()

    before = nbytes_of(*model.parameters(), x)
    independent = before + allocated_above_the_start(run)
    model.zero_grad()
    assert measure_peak(run).peak_bytes == pytest.approx(independent, abs=WRAPPED)


def test_every_kind_is_what_one_counts_by_hand():
    n, i, h, o = 16, 20, 300, 10
    model, x = mlp()
    labels = torch.zeros(n, dtype=torch.long)
    stepper = torch.optim.AdamW(model.parameters(), fused=True)

    def step():
        stepper.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        stepper.step()

    step()
    stepper.zero_grad()
    report = measure_peak(step)
    parameters = 4 * (i * h + h + h * o + o)
    steps = 4 * 4  # a number for each parameter tensor
    assert report.at_peak["parameters"] == parameters
    assert report.at_peak["optimizer state"] == 2 * parameters + steps
    assert report.at_peak["inputs"] == 4 * n * i + 8 * n
    assert report.at_end == {
        "parameters": parameters,
        "optimizer state": 2 * parameters + steps,
        "inputs": 4 * n * i + 8 * n,
        "gradients": parameters,
        "activations": 0,
        "temporaries": 0,
        "kernel buffers": 0,
    }
    most = max(report.timeline["activations"])
    # tanh's output, the logarithms of the softmax, the total weight of the loss, its gradient
    assert most == 4 * (n * h + n * o + 1 + 1)
    assert sum(report.at_peak.values()) == report.peak_bytes
    totals = [sum(at) for at in zip(*report.timeline.values(), strict=True)]
    assert (max(totals), len(totals)) == (report.peak_bytes, len(report.phases))


def test_tensor_bytes_leave_out_what_kernels_take():
    step, _, _ = training(conv_net)
    report = measure_peak(step)
    lines = [report.timeline[kind] for kind in KINDS if kind != "kernel buffers"]
    assert report.tensor_bytes == max(sum(at) for at in zip(*lines, strict=True))
    assert report.tensor_bytes <= report.peak_bytes


def test_what_was_there_before_and_what_is_left_is_counted():
    kept, unused = torch.zeros(1000), torch.zeros(5000)
    report = measure_peak(lambda: kept.clone())
    assert report.peak_bytes == 8000
    assert report.at_end["inputs"] == report.at_end["temporaries"] == 4000
    assert unused.numel() == 5000
    model = nn.Linear(10, 10)
    with torch.no_grad():
        assert measure_peak(lambda: model(kept[:10])).at_end["activations"] == 0
    graph = measure_peak(lambda: (model(kept[:10]) ** 2).sum())
    assert graph.at_end["activations"] > 0


def test_the_place_of_the_peak_is_told():
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 4096), nn.ReLU()))
    x = torch.zeros(4, 8)

    def run():
        small = x + 1
        return model(small).sum()  # the peak

    report = measure_peak(run)
    assert report.line == "return model(small).sum()  # the peak"
    assert report.code == ("test_memory_measure.py", run.__code__.co_firstlineno + 2)
    assert (report.phase, report.module, report.op) == ("forward", "1.1", "relu")
    backward = measure_peak(lambda: model(x).sum().backward())
    assert (backward.phase, backward.module) == ("backward", "1.0")
    assert set(backward.phases) == {"forward", "backward"}
    assert "in the backward pass, module 1.0" in str(backward)
    assert "peak" in backward._repr_html_()


def test_the_optimizers_step_is_a_phase_of_its_own():
    step, _, _ = training(mlp)
    report = measure_peak(step)
    assert report.phase == "step"
    assert "in the optimizer's step" in str(report)
    order = list(dict.fromkeys(report.phases))
    assert order[-3:] == ["forward", "backward", "step"]


def everything_that_hooks():
    from torch.nn.modules import module as modules
    from torch.optim import optimizer as optimizers
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    return (
        len(modules._global_forward_hooks),
        len(modules._global_forward_pre_hooks),
        len(optimizers._global_optimizer_pre_hooks),
        len(optimizers._global_optimizer_post_hooks),
        len(_get_current_dispatch_mode_stack()),
        torch._C._autograd._profiler_enabled(),
        threading.active_count(),
    )


class OddError(Exception):
    pass


@pytest.mark.parametrize("kind", [None, OddError, KeyboardInterrupt])
def test_nothing_is_left_behind_whatever_happens_inside(kind):
    model, x = mlp()
    before = everything_that_hooks()

    def run():
        model(x).sum().backward()
        if kind:
            raise kind("inside")

    if kind is None:
        measure_peak(run)
    else:
        with pytest.raises(kind, match="inside"):
            measure_peak(run)
    assert everything_that_hooks() == before
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())
    assert measure_peak(lambda: model(x)).peak_bytes > 0


def test_autograd_works_inside_as_outside():
    model, x = conv_net()
    model(x).sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    measure_peak(lambda: model(x).sum().backward())
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)

    def twice():
        w = torch.ones(3, requires_grad=True)
        (first,) = torch.autograd.grad((w**3).sum(), w, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), w)
        assert torch.equal(second, torch.full((3,), 6.0))

    measure_peak(twice)


def test_an_overwritten_tensor_still_stops_backward():
    x = torch.ones(3, requires_grad=True)

    def run():
        y = x.sigmoid()
        y.mul_(2)
        y.sum().backward()

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        measure_peak(run)


def test_stderr_is_passed_on_but_for_the_profilers_lines(capfd):
    before = torch.zeros(1000)

    def run():
        nonlocal before
        os.write(2, b"straight to the descriptor\n")
        print("progress 10%\r", file=sys.stderr, end="", flush=True)
        before = None  # freed, though never seen being made: what the profiler complains about
        return torch.ones(3) + 1

    measure_peak(run)
    said = capfd.readouterr().err
    assert sorted(said.replace("\r", "\n").splitlines()) == [
        "progress 10%",
        "straight to the descriptor",
    ]


def test_one_run_at_a_time():
    model, x = mlp()
    with profile(activities=[ProfilerActivity.CPU]) as outer:
        model(x)
        with pytest.raises(RuntimeError, match="profiler is at work already"):
            measure_peak(lambda: model(x))
    assert any(event.key == "aten::linear" for event in outer.key_averages())
    errors = []

    def from_another_thread():
        try:
            measure_peak(lambda: model(x))
        except RuntimeError as error:
            errors.append(str(error))

    def run():
        thread = threading.Thread(target=from_another_thread)
        thread.start()
        thread.join()
        return model(x)

    measure_peak(run)
    assert len(errors) == 1
    assert "in another thread" in errors[0]


def test_modules_that_work_in_another_thread_do_not_disturb():
    model, x = mlp()
    other = nn.Sequential(nn.Linear(3, 3))

    def run():
        thread = threading.Thread(target=lambda: other(torch.zeros(2, 3)))
        thread.start()
        thread.join()
        return model(x)

    assert measure_peak(run).phases


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((3,), TypeError, "fn must be a function without arguments, got int"),
        ((lambda: 3,), ValueError, "called no operator of torch"),
        ((lambda: torch.zeros(3), "meta"), ValueError, "'meta' has no record of its memory here"),
        pytest.param(
            (lambda: torch.zeros(3), "cuda"),
            ValueError,
            "'cuda' has no record",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_what_cannot_be_measured_is_said(arguments, kind, message):
    with pytest.raises(kind, match=message):
        measure_peak(*arguments)


def test_functions_of_every_form_are_looked_into():
    model, x = mlp()

    class Trainer:
        def __init__(self):
            self.model = model

        def run(self, x):
            return self.model(x)

    parameters = nbytes_of(*model.parameters())
    for fn in (functools.partial(Trainer().run, x), functools.partial(model, x), lambda: model(x)):
        assert measure_peak(fn).at_peak["parameters"] == parameters


def test_mib_is_two_to_the_twenty():
    assert mib(1 << 20) == "1.0 MiB"
    assert mib(1536 << 20) == "1,536.0 MiB"
