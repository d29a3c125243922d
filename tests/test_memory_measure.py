import functools
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from dlhelpers.memory import measure_peak, mib

pytestmark = pytest.mark.usefixtures("little_to_collect")

WRAPPED = 8  # bytes: under a dispatch mode a Python number stays a float64 tensor for an operator

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


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        *((name, "adamw fused") for name in MODELS),
        *(("mlp", other) for other in ("sgd", "momentum", "adamw")),
        ("conv net", "sgd"),
    ],
)
def test_the_peak_is_the_allocators_record_to_the_byte(name, optimizer):
    step, stepper, before = training(MODELS[name], optimizer)
    independent, found = before + allocated_above_the_start(step), []
    for _ in range(2):
        stepper.zero_grad()
        report = measure_peak(step)
        found.append(report.peak_bytes)
        assert report.measured
    assert found[0] == found[1]
    # the plain AdamW divides by a Python number at its peak
    assert found[0] - independent in ({0, WRAPPED} if optimizer == "adamw" else {0})


def without_gradients(make, mode):
    model, x = make()
    model.eval()

    def run():
        with mode():
            return model(x)

    return run, [*model.parameters(), *model.buffers(), x]


def through_autograd_grad():
    model, x = mlp()
    parameters = list(model.parameters())
    return lambda: torch.autograd.grad(model(x).sum(), parameters), [*parameters, x]


def twice_differentiated():
    w = torch.randn(2000, requires_grad=True)

    def run():
        (first,) = torch.autograd.grad((w * w * w).sum(), w, create_graph=True)
        return torch.autograd.grad((first * first).sum(), w)

    return run, [w]


def freed_in_the_middle():
    x = torch.randn(10_000)

    def run():
        large = x.repeat(3)
        part = large[:10].clone()
        del large
        return part.repeat(500)

    return run, [x]


def resized():
    def run():
        x = torch.zeros(10)
        for size in (5000, 20_000, 5, 30_000):
            x.resize_(size)
        return x

    return run, []


def written_into_an_argument():
    x = torch.randn(10_000)
    return lambda: torch.exp(x, out=torch.empty(0)), [x]


def with_autocast():
    model, x = mlp()

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).sum()

    return run, [*model.parameters(), x]


def a_model_made_inside():
    return lambda: nn.Linear(50, 50)(torch.zeros(10, 50)).sum().backward(), []


CODE = {
    "conv net, no_grad": lambda: without_gradients(conv_net, torch.no_grad),
    "conv net, inference_mode": lambda: without_gradients(conv_net, torch.inference_mode),
    "lstm, inference_mode": lambda: without_gradients(MODELS["lstm"], torch.inference_mode),
    "encoder, no_grad": lambda: without_gradients(MODELS["encoder"], torch.no_grad),
    "autograd.grad": through_autograd_grad,
    "create_graph": twice_differentiated,
    "freed in the middle": freed_in_the_middle,
    "resized": resized,
    "out=": written_into_an_argument,
    "autocast": with_autocast,
    "a model made inside": a_model_made_inside,
}


@pytest.mark.parametrize("name", CODE)
def test_so_it_is_for_code_that_trains_nothing(name):
    run, there = CODE[name]()
    run()
    independent = nbytes_of(*there) + allocated_above_the_start(run)
    assert measure_peak(run).peak_bytes == measure_peak(run).peak_bytes == independent


FLAT = {
    "linear": lambda width: nn.Linear(width, width),
    "relu": lambda width: nn.ReLU(),
    "linear, silu_": lambda width: nn.Sequential(nn.Linear(width, width), nn.SiLU(inplace=True)),
    "dropout": lambda width: nn.Dropout(),
    "norm": nn.LayerNorm,
    "tanh": lambda width: nn.Tanh(),
}
IMAGES = {
    "conv": lambda width: nn.Conv2d(width, width, 3, padding=1),
    "depthwise": lambda width: nn.Conv2d(width, width, 5, padding=2, groups=width),
    "norm": nn.BatchNorm2d,
    "conv, relu_": lambda width: nn.Sequential(nn.Conv2d(width, width, 1), nn.ReLU(inplace=True)),
    "gelu": lambda width: nn.GELU(),
    "pool": lambda width: nn.AvgPool2d(3, stride=1, padding=1),
}


def names_of(layers):
    return st.lists(st.sampled_from(list(layers)), min_size=1, max_size=6)


def assert_exact_in_training(first, layers, x):
    model = nn.Sequential(first, *layers)

    def run():
        model.zero_grad()
        model(x).sum().backward()

    before = nbytes_of(*model.parameters(), *model.buffers(), x)
    run()
    model.zero_grad()
    independent = before + allocated_above_the_start(run)
    model.zero_grad()
    assert measure_peak(run).peak_bytes == independent


@settings(max_examples=8, deadline=None)
@given(names_of(FLAT), st.integers(1, 33), st.integers(1, 64))
def test_any_chain_of_layers_too(names, batch, width):
    layers = (FLAT[name](width) for name in names)
    assert_exact_in_training(nn.Linear(width, width), layers, torch.randn(batch, width))


@settings(max_examples=8, deadline=None)
@given(names_of(IMAGES), st.integers(1, 4), st.integers(2, 9), st.integers(4, 12))
def test_any_chain_of_convolutions_too(names, batch, width, side):
    layers = (IMAGES[name](width) for name in names)
    x = torch.randn(batch, 3, side, side)
    assert_exact_in_training(nn.Conv2d(3, width, 3, padding=1), layers, x)


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


def test_a_conv_nets_kinds_are_counted_by_hand_too():
    n, side, width = 4, 32, 8
    model = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
    x = torch.randn(n, 3, side, side)
    stepper = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step():
        stepper.zero_grad()
        model(x).sum().backward()
        stepper.step()

    step()
    stepper.zero_grad()
    report = measure_peak(step)
    weights = 4 * (width * 3 * 9 + width + 2 * width)
    image = 4 * n * width * side * side
    assert report.at_end["parameters"] == weights + 4 * 2 * width + 8  # BatchNorm's buffers
    assert report.at_end["gradients"] == report.at_end["optimizer state"] == weights
    assert report.at_end["inputs"] == 4 * n * 3 * side * side
    # outputs of convolution and ReLU, each channel's mean and deviation, the loss's gradient
    assert max(report.timeline["activations"]) == 2 * image + 4 * 2 * width + 4
    # forward, BatchNorm's own output; backward, what flows: never more than two images
    assert image <= max(report.timeline["temporaries"]) <= 2 * image + weights + 64


@pytest.mark.filterwarnings("ignore:TF32")  # said by the switch, whatever one switches
def test_tensor_bytes_leave_out_what_kernels_take():
    rows, width = 64, 256
    square = torch.randn(rows, width, dtype=torch.bfloat16)  # a kernel may convert and block it
    with torch.no_grad():
        report = measure_peak(lambda: square @ square.t())
        other = torch.randn(1, 3, 33, 33)
        layer = nn.Conv2d(3, 16, 5, stride=2, dilation=2)
        ways = []
        for enabled in (True, False):
            with torch.backends.mkldnn.flags(enabled=enabled):
                ways.append(measure_peak(lambda: layer(other)))
    assert report.tensor_bytes == 2 * (rows * width + rows * rows)
    sizes = (3 * 33 * 33, 16 * 3 * 25 + 16, 16 * 13 * 13)
    assert {way.tensor_bytes for way in ways} == {4 * sum(sizes)}
    assert ways[0].peak_bytes != ways[1].peak_bytes  # one unfolds, the other reorders
    assert all(way.peak_bytes - way.tensor_bytes == way.at_peak["kernel buffers"] for way in ways)


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
        torch._C._autograd._top_saved_tensors_default_hooks(True),
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
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
    assert "in another thread" in errors[0]


def test_a_measurement_inside_a_measurement_is_refused_and_harms_nothing():
    model, x = mlp()
    before = everything_that_hooks()
    with pytest.raises(RuntimeError, match="one run at a time, so stop it, or wait for it"):
        measure_peak(lambda: measure_peak(lambda: model(x)))
    assert everything_that_hooks() == before
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
    assert measure_peak(lambda: model(x)).phase == "forward"


def test_the_readers_own_hooks_stay_and_an_exception_is_the_one_that_was_raised():
    model, x = mlp()
    seen, error = [], OddError("mine")
    mine = [
        model.register_forward_hook(lambda *_: seen.append("forward")),
        model[0].weight.register_post_accumulate_grad_hook(lambda _: seen.append("gradient")),
    ]

    def run():
        model(x).sum().backward()
        raise error

    with pytest.raises(OddError) as caught:
        measure_peak(run)
    assert caught.value is error
    assert seen == ["forward", "gradient"]
    model(x).sum().backward()
    assert seen == ["forward", "gradient"] * 2
    for hook in mine:
        hook.remove()
    assert not model[0].weight._post_accumulate_grad_hooks


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
        (
            (lambda: torch.zeros(3), "meta"),
            ValueError,
            "'meta' has no record of its memory here: use 'cpu', or 'cuda'",
        ),
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
