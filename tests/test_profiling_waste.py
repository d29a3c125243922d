"""Waste that a line of code ends is found where it is, and nowhere else."""

import copy
import gc
import itertools
import weakref
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from dlhelpers.profiling.diagnosing import rank
from dlhelpers.profiling.kept import what_is_kept
from dlhelpers.profiling.loader_trials import LoaderTrials
from dlhelpers.profiling.optimizer_trials import optimizers_raced
from dlhelpers.profiling.seen import Seen
from dlhelpers.profiling.step_trials import confirmed, without_anomaly
from dlhelpers.profiling.trace import MODEL, Event, Trace
from dlhelpers.profiling.trials import is_double, trial
from dlhelpers.profiling.watching import ModelCalls, watch

X, Y = torch.randn(8, 4), torch.randint(0, 3, (8,))
BACK = "autograd::engine::evaluate_function: A"


def network(*extra):
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), *extra, nn.Linear(6, 3))


def training(model, optimizer=None, x=X):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.01)

    def step():
        optimizer.zero_grad()
        F.cross_entropy(model(x), Y).backward()
        optimizer.step()

    return step


def watched(step, steps=2):
    with watch() as seen:
        run = seen.step(step)
        run()
        seen.begin_anew()
        for _ in range(steps):
            run()
    return seen


def seen_of(**facts):
    """A step of 100 ms: 40 of a model, 40 of backward, 20 of the optimizer."""
    ends = [(1e5 * n, 1e5 * (n + 1)) for n in range(3)]
    events = []
    for start, _ in ends:
        events += [
            Event(MODEL, start, start + 4e4, 1, "mark"),
            Event(BACK, start + 4e4, start + 8e4),
            Event("Optimizer.step#SGD.step", start + 8e4, start + 1e5, 1, "mark"),
        ]
    return Seen(Trace(tuple(events), tuple(ends)), 100.0, **facts)


def outcome(facts, factor):
    """Return what is found where each remedy makes what it is tried on ``factor`` times as fast."""
    return {found.name: found for found in rank(facts, 0.05, lambda before, after: factor)}


# ---- anomaly detection ----


def with_detection(step):
    with torch.autograd.detect_anomaly(check_nan=False):
        step()


def with_set_detection(step):
    with torch.autograd.set_detect_anomaly(True):
        step()


@pytest.fixture
def _mode_kept():
    yield
    torch.autograd.set_detect_anomaly(False)


def switched_on(step):
    torch.autograd.set_detect_anomaly(True)
    step()


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.usefixtures("_mode_kept")
@pytest.mark.parametrize("run", [with_detection, with_set_detection, switched_on])
def test_anomaly_detection_is_seen_however_it_is_switched_on(run):
    modes = []
    step = lambda: run(lambda: modes.append(torch.is_anomaly_enabled()))  # noqa: E731
    assert watched(step).anomaly
    after = torch.is_anomaly_enabled()
    modes.clear()
    without_anomaly(step)()
    assert modes == [False]
    assert torch.is_anomaly_enabled() == after
    step()
    assert modes == [False, True]


def test_anomaly_detection_is_a_finding_by_what_it_costs():
    facts = seen_of(anomaly=True, step=lambda: None)
    assert outcome(facts, 4.0)["anomaly-detection"].saves_ms == pytest.approx(75)
    assert outcome(facts, 1.02) == {}
    assert facts.tried == ["torch.autograd.set_detect_anomaly(False)"]
    assert not watched(training(network())).anomaly


# ---- float64 ----


class Mapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.LSTM(4, 5)
        self.seen = []

    def forward(self, given):
        self.seen.append((given["x"][0].dtype, self.inner.weight_hh_l0.dtype))
        return self.inner(given["x"][0])[0]


def test_a_model_in_float64_is_tried_in_float32_on_a_copy():
    model = Mapped().double()
    model.seen = seen = []
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    calls = ModelCalls(model, True, 3, 3, True, args=({"x": [x]},))
    assert is_double(calls)
    seen_by_copy = trial(calls, dtype=torch.float32)
    seen_by_copy()
    assert model.seen == seen == []
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    facts = seen_of(calls=[calls])
    found = outcome(facts, 2.0)["double-precision"]
    assert found.saves_ms == pytest.approx(40)  # half of the model's, forward and backward
    assert "if the precision of float32 is enough" in found.remedy
    assert outcome(facts, 1.0) == {}


def test_other_types_are_left_as_they_are():
    model = nn.Sequential(nn.Linear(4, 4).double(), nn.Linear(4, 4).half(), nn.Embedding(3, 4))
    kinds = []

    class Look(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            kinds.append([p.dtype for p in self.model.parameters()])
            return x

    trial(ModelCalls(Look(), False, 1, 1, False, args=(X.double(),)), dtype=torch.float32)
    assert kinds == [[torch.float32] * 2 + [torch.float16] * 2 + [torch.float32]]
    assert not is_double(ModelCalls(network(), True, args=(X,)))


# ---- optimizers ----


def raced(make, model=None):
    model = model or network()
    optimizer = make(model.parameters())
    step = training(model, optimizer)
    noted = watched(step)
    facts = seen_of(step=step, optimizers=tuple(noted.optimizers.values()))
    return optimizer, model, list(optimizers_raced(facts)), facts


KINDS = {
    "SGD": "fused", "Adam": "fused", "AdamW": "fused", "Adagrad": "fused", "RMSprop": "foreach",
    "Adadelta": "foreach", "NAdam": "foreach", "RAdam": "foreach", "Adamax": "foreach",
    "ASGD": "foreach", "Rprop": "foreach",
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_updates_one_by_one_are_tried_all_at_once(kind):
    make = getattr(torch.optim, kind)
    optimizer, model, found, facts = raced(lambda parameters: make(parameters, lr=0.01))
    option, before, after, told = found[0]
    assert option == KINDS[kind]
    assert (told.name, told.tensors) == (kind, 4)
    alone, own = copy.deepcopy((model, optimizer))
    training(alone, own)()
    training(alone, own)()
    before()
    after()
    for weight, parameter in zip(alone.parameters(), model.parameters(), strict=True):
        assert torch.equal(weight, parameter)  # the program trains on as without the trial
    assert "step" not in vars(optimizer)
    found = outcome(facts, 1.15)["optimizer-by-tensor"]
    assert found.saves_ms == pytest.approx(15)
    assert f"{kind}(..., {KINDS[kind]}=True)" in found.remedy
    assert outcome(facts, 1.0) == {}


def test_a_scheduler_that_wraps_the_step_keeps_it():
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    torch.optim.lr_scheduler.StepLR(optimizer, 2)
    step = training(model, optimizer)
    wrapped = optimizer.step
    noted = watched(step)
    facts = seen_of(step=step, optimizers=tuple(noted.optimizers.values()))
    [(_, before, after, _), *_] = optimizers_raced(facts)
    before()
    after()
    assert optimizer.step is wrapped
    assert {int(state["step"]) for state in optimizer.state.values()} == {5}  # 3 were watched


def test_what_a_closure_computes_is_no_part_of_the_update():
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    closed = []

    def closure():
        closed.append(1)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), Y)
        loss.backward()
        return loss

    losses = []
    step = lambda: losses.append(optimizer.step(closure))  # noqa: E731
    noted = watched(step)
    facts = seen_of(step=step, optimizers=tuple(noted.optimizers.values()))
    told = outcome(facts, 1.1)["optimizer-by-tensor"]
    assert told.saves_ms == pytest.approx(10)  # by the updates alone, whatever the phase holds
    [(_, before, _, _), *_] = optimizers_raced(facts)
    before()
    assert None not in losses
    assert len(closed) == len(losses)


class OwnSGD(torch.optim.SGD):
    """An optimizer of the program's own."""


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adam(p, fused=True),
        lambda p: torch.optim.SGD(p, lr=0.1, foreach=True),
        lambda p: OwnSGD(p, lr=0.1),
        lambda p: torch.optim.SGD([next(iter(p))], lr=0.1),
    ],
    ids=["fused", "foreach", "own", "one tensor"],
)
def test_optimizers_that_have_such_updates_or_cannot_are_left_alone(make):
    assert raced(make)[2] == []


@pytest.mark.parametrize("option", ["differentiable", "capturable"])
def test_updates_that_are_a_part_of_a_graph_are_left_alone(option):
    parameters = list(network().parameters())
    optimizer = torch.optim.Adam(parameters, **{option: True})
    held = optimizer, frozenset(map(id, parameters))
    assert list(optimizers_raced(seen_of(step=lambda: None, optimizers=[held]))) == []


def test_sparse_and_complex_gradients_are_left_alone():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.out = nn.Embedding(5, 4, sparse=True), nn.Linear(4, 3)

        def forward(self, x):
            return self.out(self.words(x.argmax(1)))

    assert raced(lambda p: torch.optim.SGD(p, lr=0.1), Words())[2] == []

    class Waves(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (nn.Parameter(torch.randn(4, 3) + 0j) for _ in range(2))

        def forward(self, x):
            return ((x + 0j) @ self.a * ((x + 0j) @ self.b)).abs()

    assert raced(lambda p: torch.optim.SGD(p, lr=0.1), Waves())[2] == []


# ---- a second forward on the same input ----


def accuracy(model, x=X):
    return (model(x).argmax(1) == Y).float().mean()


def after_the_update(model, train):
    train()
    model.eval()
    accuracy(model)
    model.train()


def before_it(model, train):
    with torch.no_grad():
        accuracy(model)
    train()


def of_a_view(model, train):
    train()
    with torch.inference_mode():
        accuracy(model, X.detach())


def of_a_copy(model, train):
    train()
    with torch.no_grad():
        accuracy(model, X.double().float())


def twice_more(model, train):
    train()
    accuracy(model)
    accuracy(model)


def repeats_of(step, steps=2):
    """Return what is found by looking on, and is confirmed."""
    return confirmed(step, watched(step, steps).repeats.found())


def with_cached_outputs(model, train):
    """The outputs are changed in place after the loss, as a metric may do."""
    z = model(X)
    F.cross_entropy(z, Y).backward()
    z.data.mul_(2)
    accuracy(model)


@pytest.mark.parametrize(
    ("run", "pairs", "updated"),
    [
        (after_the_update, {1: 0}, True),
        (before_it, {0: 1}, False),
        (of_a_view, {1: 0}, True),
        (of_a_copy, {1: 0}, True),
        (twice_more, {1: 0, 2: 0}, True),
        (with_cached_outputs, {1: 0}, False),
    ],
)
def test_a_second_forward_on_the_same_input_is_seen(run, pairs, updated):
    model = network()
    train = training(model)
    step = lambda: run(model, train)  # noqa: E731
    [repeat] = repeats_of(step)
    assert repeat.module is model
    assert repeat.pairs == pairs
    assert repeat.after_update == updated
    facts = seen_of(step=step, repeats=[repeat])
    told = outcome(facts, 1.25)["repeated-forward"]
    assert told.saves_ms == pytest.approx(25)
    assert told.gain.startswith("about")
    assert outcome(facts, 1.0) == {}


def program(is_first):
    """Return a step that notes what it computes, each on a batch of its own and another size."""
    torch.manual_seed(0)
    model, told, hooked = network(), [], []
    optimizer = torch.optim.Adam(model.parameters())
    model.register_forward_hook(lambda *given: hooked.append(1))

    def evaluate(x):
        with torch.no_grad():
            told.append(model(x).sum().item())

    def step():
        x = torch.full((len(told) % 5 + 8, 4), 0.1 * len(told)).sin()
        if is_first:
            evaluate(x)
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        told.append(loss.item())
        if not is_first:
            evaluate(x)

    return step, told, hooked


@pytest.mark.parametrize("is_first", [True, False], ids=["before", "after the update"])
def test_a_trial_of_one_forward_changes_nothing_that_the_program_computes(is_first):
    def several(before, after):
        for _ in range(3):
            before()
            after()
        return 1.25

    step, told, hooked = program(is_first)
    facts = seen_of(step=step, repeats=repeats_of(step))
    assert [f.name for f in rank(facts, 0.05, several)] == ["repeated-forward"]
    alone, expected, _ = program(is_first)
    while len(expected) < len(told):
        alone()
    assert told == expected
    assert len(hooked) == len(told)  # a copy calls no hook of the program


def test_in_an_epoch_each_batch_is_called_twice():
    model = network()

    def epoch():
        for _ in range(3):
            x = torch.randn(8, 4)
            training(model, x=x)()
            accuracy(model, x)

    [repeat] = repeats_of(epoch)
    assert repeat.pairs == {1: 0, 3: 2, 5: 4}


def adversarial(model, train):
    made = X * model[0].weight.sum()
    F.cross_entropy(model(made.detach()), Y).backward()
    F.cross_entropy(model(made), Y).backward()


def sharpness_aware(model, train):
    train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    train()


def other_input(model, train):
    train()
    accuracy(model, torch.randn(8, 4))


def changed_in_place(model, train):
    x = torch.randn(8, 4)
    F.cross_entropy(model(x), Y).backward()
    x.add_(1)
    accuracy(model, x)


def averaged_weights(model, train):
    train()
    own = [p.data.clone() for p in model.parameters()]
    for parameter in model.parameters():
        parameter.data.copy_(parameter.data / 2)
    accuracy(model)
    for parameter, old in zip(model.parameters(), own, strict=True):
        parameter.data.copy_(old)


def moved(model, train):
    """Trained where the first layer is moved to, as in adversarial training of an embedding."""
    with torch.no_grad():
        accuracy(model)
        model[0].weight.add_(0.5)
    F.cross_entropy(model(X), Y).backward()
    with torch.no_grad():
        model[0].weight.sub_(0.5)


def moved_through_data(model, train):
    train()
    model[0].weight.data.mul_(2)
    accuracy(model)
    model[0].weight.data.mul_(0.5)


def statistics_changed(model, train):
    model[1].running_mean.zero_()
    F.cross_entropy(model.eval()(X), Y).backward()
    model[1].running_mean.fill_(1)
    accuracy(model)


def recomputed(model, train):
    F.cross_entropy(checkpoint(model, X, use_reentrant=False), Y).backward()


def penalised(model, train):
    x = X.clone().requires_grad_()
    y = model(x)
    [slope] = torch.autograd.grad(y.sum(), x, create_graph=True)
    (y.mean() + slope.square().mean()).backward()


def inner_steps(model, train):
    with torch.no_grad():
        accuracy(model)
    for _ in range(3):
        train()


@pytest.mark.parametrize(
    "run",
    [adversarial, sharpness_aware, other_input, changed_in_place, averaged_weights, recomputed,
     penalised, inner_steps, lambda model, train: accuracy(model), moved, moved_through_data],
)  # fmt: skip
def test_calls_that_are_needed_are_no_repeats(run):
    model = network()
    train = training(model)
    assert repeats_of(lambda: run(model, train), 3) == ()


def test_other_running_statistics_make_another_model():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    assert repeats_of(lambda: statistics_changed(model, None)) == ()


class Switched(nn.Module):
    """Has a part that is switched off by a flag, as an adapter's."""

    def __init__(self):
        super().__init__()
        self.base, self.adapter, self.on = nn.Linear(4, 3), nn.Linear(4, 3), True

    def forward(self, x, **cache):
        return self.base(x) + self.adapter(x) if self.on else self.base(x)


def reference_first(model, train):
    model.on = False
    with torch.no_grad():
        model(X)
    model.on = True
    train()


def reference_after_the_update(model, train):
    train()
    model.on = False
    with torch.no_grad():
        model(X)
    model.on = True


def by_a_coin(model, train):
    """In some steps alone, and never in the recorded ones."""
    train()
    model.steps = getattr(model, "steps", 0) + 1
    model.on = model.steps < 5
    accuracy(model)
    model.on = True


def with_a_cache(model, train):
    cache = object()  # it may have changed since, and nobody can tell
    F.cross_entropy(model(X, cache=cache), Y).backward()
    with torch.no_grad():
        model(X, cache=cache)


@pytest.mark.parametrize(
    "run", [reference_first, reference_after_the_update, by_a_coin, with_a_cache]
)
def test_a_part_that_is_switched_off_makes_another_model(run):
    model = Switched()
    train = training(model)
    assert repeats_of(lambda: run(model, train)) == ()


def test_what_a_program_raises_while_a_repeat_is_confirmed_is_raised():
    model = network()
    train = training(model)
    step = lambda: after_the_update(model, train)  # noqa: E731
    found, call = watched(step).repeats.found(), nn.Module.__call__

    def fails():
        step()
        raise StopIteration

    with pytest.raises(StopIteration):
        confirmed(fails, found)
    assert nn.Module.__call__ is call


def test_an_output_that_is_kept_keeps_no_input():
    model, kept, gone = network(), [], []

    def step():
        x = torch.randn(8, 4)
        gone.append(weakref.ref(x))
        kept.append(model(x))
        kept[-1].sum().backward()

    watched(step, 4)
    gc.collect()
    assert [note() for note in gone[:-1]] == [None] * (len(gone) - 1)
    assert not kept[0]._backward_hooks


@pytest.mark.parametrize(
    ("extra", "evaluates"),
    [(nn.Dropout(), True), (nn.Dropout(), False), (nn.BatchNorm1d(6), True)],
)
def test_a_call_that_computes_something_else_is_no_repeat(extra, evaluates):
    model = network(extra)
    train = training(model)

    def step():
        model.train()
        train()
        model.train(not evaluates)
        accuracy(model)

    assert len(watched(step).repeats.found()) == 1
    assert repeats_of(step) == ()


# ---- what is kept ----


def test_tensors_that_each_step_keeps_are_weighed():
    model, kept = network(), [torch.zeros(1) for _ in range(50)]
    model[0].register_forward_hook(lambda module, given, output: kept.append(output.detach()))
    found = what_is_kept(training(model), 4)
    grown = [later - former for former, later in itertools.pairwise(found.nbytes)]
    assert grown == [8 * 6 * 4] * 3
    assert "8x6 of float32 in a list of 54" in found.where
    assert not found.is_bounded
    facts = seen_of(tensors=(0, 2**16, 2**17), kept_where=found.where)
    told = outcome(facts, 1.0)["tensors-kept"]
    assert told.saves_bytes == 2**16
    assert "8x6" in told.what
    assert "each of 2 steps" in told.what
    assert "as it should be where the growth ends with the epoch or at a limit" in told.why
    assert told.remedy.startswith("where it does not end")


def fill_dict(made):
    kept = dict.fromkeys(range(20))
    return kept, lambda: kept.update({len(kept): made()})


def fill_objects(made):
    kept = [Move(torch.zeros(1), 0.0) for _ in range(20)]
    return kept, lambda: kept.append(Move(made(), 1.0))


@dataclass
class Move:
    state: torch.Tensor
    reward: float


class Place(NamedTuple):
    state: torch.Tensor
    reward: float


class Slotted:
    __slots__ = ("state",)

    def __init__(self, state, reward):
        self.state = state


class Boxed:
    def __init__(self, state, reward):
        self.state, self.reward = {"image": state}, reward


@pytest.mark.parametrize("fill", [fill_dict, fill_objects])
def test_the_holder_that_is_named_is_the_program_s(fill):
    kept, step = fill(lambda: torch.randn(1000))
    found = what_is_kept(step, 4)
    assert f"in a {type(kept).__name__} of {len(kept)}" in found.where
    assert len(kept) == 24


@pytest.mark.parametrize(
    "kind",
    [lambda state, reward: state, lambda *pair: pair, lambda *pair: list(pair), Move, Place,
     Slotted, Boxed],
    ids=["tensor", "tuple", "list", "dataclass", "named tuple", "slots", "own"],
)  # fmt: skip
def test_a_buffer_with_a_limit_is_bounded_whatever_lies_in_it(kind):
    kept = deque(maxlen=100)
    assert what_is_kept(lambda: kept.append(kind(torch.randn(1000), 1.0)), 4).is_bounded


def test_what_lies_in_a_circle_is_not_kept():
    model = network()

    class Box:
        pass

    def step():
        box = Box()
        box.itself, box.made = box, model(X).detach()

    gc.disable()
    try:
        nbytes = what_is_kept(step, 4).nbytes
    finally:
        gc.enable()
    assert len(set(nbytes)) == 1


@pytest.mark.parametrize(
    "tensors",
    [(), (5,), (0, 2**16, 2**16, 2**17), (0, 100, 200, 300)],
    ids=["nothing", "one", "not in every step", "a metric's"],
)
def test_memory_that_does_not_grow_is_no_finding(tensors):
    assert outcome(seen_of(tensors=tensors), 1.0) == {}


def test_a_kept_graph_is_told_once():
    facts = seen_of(tensors=(0, 2**16, 2**17), graph_nodes=(1, 2, 3))
    assert set(outcome(facts, 1.0)) == {"loss-tensors-kept"}


# ---- nothing of these ----


def test_a_program_that_raises_under_a_remedy_is_not_told_of_it():
    def fails(before, after):
        raise StopIteration

    facts = seen_of(anomaly=True, step=lambda: None)
    assert rank(facts, 0.05, fails) == []
    assert facts.tried == ["torch.autograd.set_detect_anomaly(False) (StopIteration)"]

    def stops(before, after):
        raise RuntimeError("the loss is nan")

    assert (
        "set_detect_anomaly(False) (RuntimeError: the loss is nan)"
        in rank(facts, 0.05, stops).scope
    )


def test_what_a_program_raises_under_another_loader_is_told():
    def stops(before, after):
        raise RuntimeError("the loss is nan")

    batches = itertools.chain.from_iterable(itertools.repeat(DataLoader(range(8), 2)))
    step = lambda: next(batches)  # noqa: E731
    facts = seen_of(step=step, loader=watched(step).slowest, fetches=1.0)
    assert LoaderTrials(facts, stops).workers(0) is None
    assert facts.tried == ["another DataLoader under the step (RuntimeError: the loss is nan)"]


def test_parameters_that_cannot_be_looked_at_do_not_stop_the_program():
    class Strange(nn.Linear):
        def parameters(self, recurse=True):
            yield from super().parameters(recurse)
            raise NotImplementedError

    model = Strange(4, 3)
    step = lambda: (model(X), model(X))  # noqa: E731
    assert watched(step).repeats.found() == ()
