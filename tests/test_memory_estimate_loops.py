"""What the usual loop holds, micro-batches, inference and sparse gradients, against the record."""

import dataclasses
import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from dlhelpers.memory import accumulate, estimate, measure_peak

pytestmark = pytest.mark.usefixtures("little_to_collect")

EXACT = 1e-3
sgd = functools.partial(torch.optim.SGD, lr=1e-3)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "scratch"
    monkeypatch.setattr("dlhelpers.memory.scratch.cache_dir", lambda: folder)


def recorded(step, held):
    """torch.profiler's own record of a step, and the tensors that were there before."""
    from torch._C._profiler import _EventType

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    events, todo = [], list(record.profiler.kineto_results.experimental_event_tree())
    while todo:
        event = todo.pop()
        todo += event.children
        if event.tag == _EventType.Allocation:
            events.append((event.start_time_ns, event.extra_fields.alloc_size))
    level = top = 0
    for _, nbytes in sorted(events):
        level += nbytes
        top = max(top, level)
    return top + sum(tensor.nbytes for tensor in held)


def without_gradients(model):
    for parameter in model.parameters():
        parameter.grad = None


def peak_of(code, model):
    without_gradients(model)
    return measure_peak(code).peak_bytes


# ---- what is held ----


class Language(nn.Module):
    """Its outputs are the largest tensors, and cross-entropy does not save them."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(900, 32), nn.Linear(32, 900)

    def forward(self, ids):
        return self.head(self.embed(ids).relu()).transpose(1, 2)


@dataclasses.dataclass
class Output:
    loss: torch.Tensor
    logits: torch.Tensor
    hidden: tuple


class LossInside(Language):
    def forward(self, ids, targets):
        hidden = self.embed(ids)
        logits = self.head(hidden.relu()).transpose(1, 2)
        return Output(F.cross_entropy(logits, targets), logits, (hidden,))


class Unused(nn.Module):
    """The second output, whose graph lives as long as it does, is not in the loss."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(3, 16, 3)
        self.second = nn.Sequential(nn.Conv2d(16, 32, 3), nn.Tanh(), nn.Conv2d(32, 32, 3))

    def forward(self, x):
        y = self.body(x).relu()
        return {"main": y.mean((2, 3)), "second": self.second(y)}


class Saved(nn.Module):
    """Its output is a view of what ReLU keeps: holding it costs nothing."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 256)

    def forward(self, x):
        return self.layer(x).relu().view(-1, 16, 16)


class Early(nn.Module):
    """The peak is in the forward pass, where the former outputs are alive in a loop."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x):
        with torch.no_grad():
            x = (x[:, :, None] * torch.ones(150)).exp().sum(2)
        return (self.layer(x)[:, :, None] * torch.ones(40)).flatten(1)


def ids():
    return torch.arange(8 * 24).view(8, 24)


def image():
    return torch.zeros(8, 3, 24, 24)


# model, inputs, targets, loss
PROGRAMS = {
    "language": (Language, lambda: (ids(),), ids, F.cross_entropy),
    "loss inside": (LossInside, lambda: (ids(), ids()), None, lambda out, _: out.loss),
    "unused output": (
        Unused,
        lambda: (image(),),
        lambda: torch.zeros(8, dtype=torch.long),
        lambda out, y: F.cross_entropy(out["main"], y),
    ),
    "view of what is saved": (
        Saved,
        lambda: (torch.zeros(64, 64),),
        lambda: torch.zeros(64, 16, 16),
        F.mse_loss,
    ),
    "reconstruction": (
        lambda: nn.Sequential(nn.Linear(64, 16), nn.Sigmoid(), nn.Linear(16, 64), nn.Sigmoid()),
        lambda: (torch.zeros(512, 64),),
        lambda: torch.zeros(512, 64),
        F.binary_cross_entropy,
    ),
    "in place": (
        Saved,
        lambda: (torch.zeros(64, 64),),
        lambda: torch.zeros(64, 16, 16),
        lambda out, y: (out - y).mul_(2).mean(),
    ),
    "peak in forward": (
        Early,
        lambda: (torch.zeros(64, 64),),
        lambda: torch.zeros(64, 1),
        lambda out, y: (out - y).mean(),
    ),
}


def slow(*values):
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def programs(*fast):
    """All programs, those not named as slow ones."""
    names = [*fast, *slow(*(name for name in PROGRAMS if name not in fast))]
    return pytest.mark.parametrize("program", names, indirect=True)


@pytest.fixture
def program(request):
    make, inputs, targets, loss = PROGRAMS[request.param]
    torch.manual_seed(0)
    return make(), inputs(), None if targets is None else targets(), loss


def loop_over(batches, model, optimizer, loss):
    for *inputs, targets in batches:
        optimizer.zero_grad()
        outputs = model(*inputs)
        value = loss(outputs, targets)
        value.backward()
        optimizer.step()


@programs("language", "loss inside")
@pytest.mark.parametrize(
    "make", [torch.optim.AdamW, pytest.param(sgd, marks=pytest.mark.slow)], ids=["adamw", "sgd"]
)
def test_outputs_are_held_as_long_as_the_loop_holds_them(program, make):
    model, inputs, targets, loss = program
    optimizer = make(model.parameters())

    def nested():
        optimizer.zero_grad()
        loss(model(*inputs), targets).backward()
        optimizer.step()

    one = functools.partial(loop_over, [(*inputs, targets)], model, optimizer, loss)
    three = functools.partial(loop_over, [(*inputs, targets)] * 3, model, optimizer, loss)
    nested()
    own = None if targets is None else lambda outputs: loss(outputs, targets)
    assert estimate(model, inputs, optimizer, loss=own) == estimate(
        model, inputs, optimizer, loss=own, hold_outputs="loop"
    )
    for held, code in {"loop": three, "step": one, "loss": nested}.items():
        predicted = estimate(model, inputs, optimizer, loss=own, hold_outputs=held)
        assert predicted.peak_bytes == pytest.approx(peak_of(code, model), rel=EXACT), held
        assert not predicted.notes


def test_the_loops_differ_where_the_outputs_are_large_and_the_report_says_which_it_is():
    model, y = Language(), ids()
    loop, step, loss = (
        estimate(model, ids(), sgd, loss=lambda z: F.cross_entropy(z, y), hold_outputs=held)
        for held in ("loop", "step", "loss")
    )
    logits = 8 * 24 * 900 * 4
    assert loop.peak_bytes == step.peak_bytes == loss.peak_bytes + logits
    assert "held until the next ones replace them" in loop.loop
    assert "until the step ends" in str(step)
    assert "not held once the loss is computed" in loss._repr_html_()
    assert loop.notes == ()
    assert measure_peak(lambda: model(y)).loop == ""


def test_the_profilers_own_record_agrees():
    model, x, y = Language(), ids(), ids()
    optimizer = torch.optim.AdamW(model.parameters())
    step = functools.partial(loop_over, [(x, y)], model, optimizer, F.cross_entropy)
    step()
    without_gradients(model)
    state = [t for s in optimizer.state.values() for t in s.values()]
    truth = recorded(step, [*model.parameters(), *state, x, y])
    predicted = estimate(model, x, optimizer, loss=lambda z: F.cross_entropy(z, y))
    assert predicted.peak_bytes == pytest.approx(truth, rel=EXACT)


# ---- micro-batches ----


@programs("in place", "loss inside")
@pytest.mark.parametrize("held", ["loop", pytest.param("loss", marks=pytest.mark.slow)])
def test_accumulation_is_predicted_as_accumulate_does_it(program, held):
    model, inputs, targets, loss = program
    optimizer = torch.optim.AdamW(model.parameters())
    batch = inputs if targets is None else (*inputs, targets)

    def loop():
        for micro in accumulate(optimizer, batch, steps=4):
            outputs = model(*micro.batch[: len(inputs)])
            value = loss(outputs, micro.batch[-1])
            micro.backward(value)

    def nested():
        for micro in accumulate(optimizer, batch, steps=4):
            micro.backward(loss(model(*micro.batch[: len(inputs)]), micro.batch[-1]))

    nested()
    own = None
    if targets is not None:
        own = lambda outputs: loss(outputs, targets[: len(targets) // 4])  # noqa: E731
    predicted = estimate(model, inputs, optimizer, loss=own, steps=4, hold_outputs=held)
    truth = peak_of(loop if held == "loop" else nested, model)
    assert predicted.peak_bytes == pytest.approx(truth, rel=0.01)
    assert "a step of 4 micro-batches" in predicted.loop


def test_gradients_are_alive_in_the_second_micro_batch_alone():
    model = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 10))
    whole, two, four = (
        estimate(model, torch.zeros(n, 512), None, steps=steps)
        for n, steps in ((8, 1), (16, 2), (32, 4))
    )
    forward = [i for i, phase in enumerate(two.phases) if phase == "forward"]
    assert whole.timeline["gradients"][0] == two.timeline["gradients"][0] == 0
    assert two.timeline["gradients"][forward[-1]] == sum(p.nbytes for p in model.parameters())
    assert len(two.phases) == len(four.phases)  # a third finds what the second found


def test_what_cannot_be_split_is_said():
    model, x = nn.Linear(8, 2), torch.zeros(6, 8)
    y = torch.zeros(6, dtype=torch.long)
    for steps, inputs in ((7, x), (2, (x, torch.zeros(5)))):
        with pytest.raises(ValueError, match=f"steps={steps} splits dimension 0"):
            estimate(model, inputs, sgd, steps=steps)
    with pytest.raises(ValueError, match="steps must be a whole number, 1 or more, got 0"):
        estimate(model, x, sgd, steps=0)
    with pytest.raises(ValueError, match="leave it out with training=False"):
        estimate(model, x, None, steps=2, training=False)
    with pytest.raises(ValueError, match=r"hold_outputs must be one of .*'step'.* got 'always'"):
        estimate(model, x, sgd, hold_outputs="always")
    with pytest.raises(ValueError, match="batch_size") as caught:
        estimate(model, x, sgd, steps=2, loss=lambda z: F.cross_entropy(z, y))
    assert "targets[:len(outputs)]" in "".join(caught.value.__notes__)


def test_a_distributed_model_is_refused_by_name():
    class Wrapped(nn.parallel.DistributedDataParallel):
        def __init__(self):
            nn.Module.__init__(self)
            self.module = nn.Linear(8, 2)

    with pytest.raises(ValueError, match=r"give model\.module; the buckets take"):
        estimate(Wrapped(), torch.zeros(4, 8), sgd)


# ---- inference ----


@programs("peak in forward")
@pytest.mark.parametrize(
    ("mode", "without"), [("train", torch.no_grad), ("eval", torch.inference_mode)]
)
def test_a_forward_pass_without_gradients_is_predicted(program, mode, without):
    model, inputs, _, _ = program
    getattr(model, mode)()

    def passes(count):
        with without():
            for _ in range(count):
                outputs = model(*inputs)
        return outputs

    for held, count in (("loss", 1), ("loop", 2)):
        predicted = estimate(model, inputs, None, training=False, hold_outputs=held)
        truth = peak_of(functools.partial(passes, count), model)
        assert predicted.peak_bytes == pytest.approx(truth, rel=EXACT), held
        assert f"{mode} mode without gradients" in predicted.loop
        assert set(predicted.phases) == {"forward"}


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (lambda: nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), (8, 40, 64)),
        (lambda: nn.LSTM(32, 64), (20, 8, 32)),
        pytest.param(lambda: nn.GRU(32, 64), (20, 8, 32), marks=pytest.mark.slow),
        (lambda: nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)), (8, 3, 30, 30)),
    ],
    ids=["transformer", "lstm", "gru", "convolution"],
)
def test_so_it_is_for_layers_with_a_kernel_of_their_own_for_inference(layer, size):
    model, x = layer().eval(), torch.zeros(size)

    def run():
        with torch.no_grad():
            return model(x)

    run()
    predicted = estimate(model, x, None, training=False)
    assert predicted.peak_bytes == pytest.approx(peak_of(run, model), rel=0.01)


def test_inference_takes_no_notice_of_the_optimizer_and_runs_a_loss_if_it_is_given():
    model, x, y = Language(), ids(), ids()
    alone = estimate(model, x, None, training=False)
    assert alone == estimate(model, x, torch.optim.AdamW, training=False)
    assert estimate(model, x, None).peak_bytes > alone.peak_bytes
    value = estimate(model, x, None, training=False, loss=lambda z: F.cross_entropy(z, y))
    assert value.peak_bytes > alone.peak_bytes
    with pytest.raises(ValueError, match="called no operator"):
        estimate(nn.Identity(), x, None, training=False)


# ---- gradients that are not dense ----


class Looks(nn.Module):
    def __init__(self, rows):
        super().__init__()
        self.embed = nn.Embedding(rows, 16)

    def forward(self, x):
        return F.embedding(x, self.embed.weight, sparse=True)


SPARSE = {
    "embedding": lambda rows: nn.Embedding(rows, 16, sparse=True),
    "bag": lambda rows: nn.EmbeddingBag(rows, 16, sparse=True),
    "functional": Looks,
}
SPARSE_OPTIMIZERS = {
    "sgd": sgd,
    "adagrad": torch.optim.Adagrad,
    "sparse adam": torch.optim.SparseAdam,
    "none": None,
}


def sparse_step(model, x, optimizer):
    outputs = model(x)
    value = outputs.mean()
    value.backward()
    if optimizer is not None:
        optimizer.step()


@pytest.mark.parametrize(  # more rows than are used, and fewer
    "rows", [900, pytest.param(200, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", ["sgd", "adagrad", *slow("sparse adam", "none")])
@pytest.mark.parametrize("kind", SPARSE)
def test_sparse_gradients_are_counted(kind, name, rows):
    model, x = SPARSE[kind](rows), (torch.arange(600) % rows).view(60, 10)
    make = SPARSE_OPTIMIZERS[name]
    optimizer = None if make is None else make(model.parameters())
    step = functools.partial(sparse_step, model, x, optimizer)
    step()
    without_gradients(model)
    state = [t for s in (optimizer.state.values() if optimizer else ()) for t in s.values()]
    held = [*model.parameters(), x, *(t for t in state if isinstance(t, torch.Tensor))]
    truth = recorded(step, held)
    without_gradients(model)
    assert measure_peak(step).peak_bytes == pytest.approx(truth, rel=EXACT)
    report = estimate(model, x, optimizer, loss=torch.mean, hold_outputs="step")
    assert report.peak_bytes == pytest.approx(truth, rel=5e-3)
    assert report.at_end["gradients"] >= 600 * 16 * 4
    assert bool(report.notes) == (name in ("adagrad", "sparse adam"))


@pytest.mark.parametrize("make", [torch.optim.Adagrad, torch.optim.SparseAdam])
def test_rows_that_repeat_take_no_more_than_is_counted_and_a_note_says_so(make):
    model, x = nn.Embedding(900, 16, sparse=True), torch.zeros(600, dtype=torch.long)
    optimizer = make(model.parameters())
    step = functools.partial(sparse_step, model, x, optimizer)
    step()
    report = estimate(model, x, optimizer, loss=torch.mean)
    assert peak_of(step, model) < report.peak_bytes
    assert any("taken to be all different" in note for note in report.notes)


def test_a_sparse_gradient_grows_with_each_micro_batch():
    model, x = nn.Embedding(900, 16, sparse=True), torch.arange(600).view(60, 10)
    optimizer = sgd(model.parameters())

    def steps():
        for part in x.tensor_split(4):
            outputs = model(part)
            value = outputs.mean()
            value.backward()
        optimizer.step()

    report = estimate(model, x, optimizer, loss=torch.mean, steps=4)
    assert report.peak_bytes == pytest.approx(peak_of(steps, model), rel=5e-3)
    assert report.at_end["gradients"] >= model.weight.grad._values().nbytes == 600 * 16 * 4


def test_momentum_of_a_sparse_gradient_has_no_bound_and_a_note_says_so():
    model, x = nn.Embedding(900, 16, sparse=True), torch.arange(600)
    optimizer = sgd(model.parameters(), momentum=0.9)
    report = estimate(model, x, optimizer, loss=torch.mean)
    assert any("may grow by the gradient's rows with each step" in note for note in report.notes)
    assert report.at_end["optimizer state"] >= 2 * 600 * 16 * 4


def test_a_sparse_input_is_counted_and_a_compressed_one_refused():
    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(32, 32)

        def forward(self, x, edges):
            return torch.sparse.mm(edges, self.layer(x)).relu()

    places = torch.stack([torch.arange(4000) % 300, torch.arange(4000) % 299])
    edges = torch.sparse_coo_tensor(
        places, torch.ones(4000), (300, 300), check_invariants=True
    ).coalesce()
    model, x = Graph(), torch.zeros(300, 32)
    optimizer = sgd(model.parameters())
    step = functools.partial(
        loop_over, [(x, edges, None)], model, optimizer, lambda out, _: out.mean()
    )
    report = estimate(model, (x, edges), optimizer, loss=torch.mean)
    assert report.at_peak["inputs"] == x.nbytes + 4000 * (8 + 8 + 4)
    assert report.peak_bytes == pytest.approx(peak_of(step, model), rel=0.01)
    with pytest.raises(ValueError, match=r"torch.sparse_csr has no stand-in .* to_sparse_coo"):
        estimate(model, (x, edges.to_sparse_csr()), optimizer, loss=torch.mean)
