"""A model that keeps what its forward made keeps nothing of a run on tensors without data."""

import copy
import functools
import gc
import random
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensor

from dlhelpers.memory import estimate
from dlhelpers.roofline import Roofline
from dlhelpers.shufflenet import audit, layer_costs
from dlhelpers.untouched import untouched

X = torch.rand(4, 8)
PEAKS = Roofline(10.0, {"fp32": 100.0}, 1)
RUNS = {
    "layer_costs": lambda model, x: layer_costs(model, x, peaks=PEAKS),
    "audit": lambda model, x: audit(model, x, peaks=PEAKS),
    "estimate": lambda model, x: estimate(model, x, torch.optim.SGD, loss=torch.sum),
    "estimate of inference": lambda model, x: estimate(model, x, None, training=False),
}
KEPT = {}
GRID = None


@functools.lru_cache
def table(n):
    return torch.arange(n).float()


class Keeps(nn.Module):
    """Multiplies by 0 to 7, and keeps those somewhere."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(8, 8)
        self.start()

    def start(self):
        """Make what is kept in."""

    def forward(self, x):
        return self.layer(x) * self.grid(x)

    def grid(self, x):
        raise NotImplementedError


class Attribute(Keeps):
    """YOLO's anchors."""

    def grid(self, x):
        if getattr(self, "shape", None) != x.shape:
            self.anchors, self.shape = torch.arange(8).float(), x.shape
        return self.anchors


class Buffer(Keeps):
    """A rotary table."""

    def start(self):
        self.register_buffer("cos", None, persistent=False)

    def grid(self, x):
        if self.cos is None:
            self.cos = torch.arange(8).float()
        return self.cos


class NewBuffer(Keeps):
    def grid(self, x):
        if not hasattr(self, "cos"):
            self.register_buffer("cos", torch.arange(8).float(), persistent=False)
        return self.cos


class InList(Keeps):
    def start(self):
        self.seen = []

    def grid(self, x):
        self.seen.append(torch.arange(8).float() + 0 * x)
        return sum(self.seen) / len(self.seen)


class InDict(Keeps):
    def start(self):
        self.by_shape = {"nested": [{}]}

    def grid(self, x):
        return self.by_shape["nested"][0].setdefault(x.shape, torch.arange(8).float())


class InObject(Keeps):
    def start(self):
        self.box = types.SimpleNamespace(grids=[], one=torch.ones(8))

    def grid(self, x):
        self.box.grids.append(torch.arange(8).float())
        return self.box.grids[0] * self.box.one


class InClass(Keeps):
    kept = None

    def grid(self, x):
        if InClass.kept is None:
            InClass.kept = torch.arange(8).float()
        return InClass.kept


class InGlobal(Keeps):
    def grid(self, x):
        global GRID
        if GRID is None:
            GRID = torch.arange(8).float()
        return GRID * KEPT.setdefault("one", torch.ones(8))


class InCache(Keeps):
    def grid(self, x):
        return table(8)


class InProperty(Keeps):
    @functools.cached_property
    def cos(self):
        return torch.arange(8).float()

    def grid(self, x):
        return self.cos


class BehindLock(Keeps):
    """What nobody can copy is of the model as well."""

    def start(self):
        self.lock, self.local, self.numpy = threading.Lock(), threading.local(), np

    def grid(self, x):
        with self.lock:
            if not hasattr(self.local, "grid"):
                self.local.grid = torch.arange(8).float()
        return self.local.grid


class Deletes(Keeps):
    def start(self):
        self.first, self.later = torch.arange(8).float(), None

    def grid(self, x):
        if self.later is None:
            self.later = self.first
            del self.first
        return self.later


def hooked():
    """Features are collected by a hook; the same dictionary is used in the next call."""
    model, features = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), {}
    model[0].register_forward_hook(lambda layer, given, out: features.setdefault("x", out.detach()))
    model[1].register_forward_pre_hook(lambda layer, given: (features["x"] + given[0],))
    return model


def patched():
    """A forward that was put into the place of another, and calls the original model."""
    model, kept = nn.Linear(8, 8), None
    own = model.forward

    def forward(x):
        nonlocal kept
        if kept is None:
            kept = torch.arange(8).float()
        model.last = own(x) * kept
        return model.last

    model.forward = forward
    return model


KEEPERS = [*Keeps.__subclasses__(), hooked, patched]


def forget():
    global GRID
    GRID = InClass.kept = None
    KEPT.clear()
    table.cache_clear()


@pytest.fixture(autouse=True)
def _no_trials(monkeypatch, tmp_path):
    """An estimate tries no operator, and nothing is kept of one."""
    monkeypatch.setattr("dlhelpers.memory.scratch.cache_dir", lambda: tmp_path)
    monkeypatch.setattr("dlhelpers.memory.scratch._TRIALS_S", 0.0)


@pytest.fixture(autouse=True)
def _forgotten():
    forget()
    yield
    forget()


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("make", KEEPERS)
def test_a_model_that_keeps_tensors_of_its_forward_is_as_it_was(make, run):
    torch.manual_seed(0)
    wanted = make()(X)
    forget()
    torch.manual_seed(0)
    model = make()
    RUNS[run](model, X)
    assert all(parameter.grad is None for parameter in model.parameters())
    RUNS[run](model, X)
    found = model(X)
    assert not isinstance(found, FakeTensor)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("run", RUNS)
def test_what_the_model_kept_before_stays_the_same_object(run):
    model = InDict()
    model(X)
    kept = model.by_shape["nested"][0][X.shape]
    RUNS[run](model, torch.rand(3, 8))
    assert [*model.by_shape["nested"][0].values()] == [kept]
    assert model.by_shape["nested"][0][X.shape] is kept


class Stops(Keeps):
    """Raises in the middle, when everything is kept."""

    def start(self):
        self.seen = []

    def grid(self, x):
        global GRID
        GRID = self.last = torch.arange(8).float()
        InClass.kept = KEPT["x"] = table(8)
        self.seen.append(x)
        torch.manual_seed(3)
        random.random()
        np.random.rand()
        raise KeyError("in the middle")


@pytest.mark.parametrize("run", RUNS)
def test_so_it_is_when_the_forward_raises_and_streams_go_on(run):
    model = Stops()
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    with pytest.raises(KeyError, match="in the middle"):
        RUNS[run](model, X)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]
    assert (GRID, InClass.kept, KEPT, model.seen) == (None, None, {}, [])
    assert not hasattr(model, "last")
    assert not isinstance(table(8), FakeTensor)


class Dialogue(nn.Module):
    """A cache of keys and values comes in as an argument, and grows."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x, cache):
        cache.keys.append(self.layer(x))
        return torch.cat(cache.keys)


class Cache:
    def __init__(self):
        self.keys = []


@pytest.mark.parametrize("run", RUNS)
def test_an_input_that_grows_does_not(run):
    cache = Cache()
    RUNS[run](Dialogue(), (X, cache))
    assert cache.keys == []


def test_no_parameter_is_changed_and_all_are_the_same_objects():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout())
    tensors = [*model.parameters(), *model.buffers()]
    values = copy.deepcopy(tensors)
    for run in RUNS.values():
        run(model, X)
    now = [*model.parameters(), *model.buffers()]
    assert all(one is other for one, other in zip(now, tensors, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(now, values, strict=True))


def test_no_tensor_without_data_outlives_the_counting():
    model = Attribute()
    gc.collect()
    before = sum(type(one) is FakeTensor for one in gc.get_objects())
    layer_costs(model, X)
    gc.collect()
    assert sum(type(one) is FakeTensor for one in gc.get_objects()) <= before


class Attention(nn.Module):
    """A projection of a transposed tensor, as nn.MultiheadAttention has it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 24)

    def forward(self, x):
        return self.layer(x.transpose(0, 1))


def test_the_operators_are_those_of_the_model_that_runs():
    model, x = Attention(), torch.rand(2, 3, 8)
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func._schema.name.removeprefix("aten::"))
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Watch():
        model(x)
    counted = [layer.operator for layer in layer_costs(model, x, policy="all").layers]
    assert "mm" in counted
    assert set(counted) <= set(seen)


def made_in_inference_mode():
    with torch.inference_mode():
        return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))


def packed():
    layers = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *args, **options: None)
        return torch.ao.quantization.quantize_dynamic(layers)


def with_a_file():
    layer = nn.Linear(8, 8)
    layer.log, layer.numbers = open(__file__), (i for i in range(3))  # noqa: SIM115
    return layer


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("make", [made_in_inference_mode, packed, with_a_file])
def test_what_cannot_be_copied_or_has_no_graph_is_run_as_well(make, run):
    model = make().eval()
    with torch.inference_mode():
        wanted = model(X)
    RUNS[run](model, X) if run != "estimate" else RUNS["estimate of inference"](model, X)
    with torch.inference_mode():
        assert torch.equal(model(X), wanted)


def infers(model, x):
    return estimate(model, x, None, training=False)


def trains(model, x):
    return estimate(model, x, None, loss=lambda y: y.sum())


class InThreads(nn.Module):
    """Computes its head in another thread, as ``by`` runs it."""

    def __init__(self, by, head):
        super().__init__()
        self.body, self.head, self.by = nn.Linear(4, 4), head, by

    def forward(self, x):
        return self.by(self.head, self.body(x))


def by_thread(head, x):
    made = []
    thread = threading.Thread(target=lambda: made.append(head(x)))
    thread.start()
    thread.join()
    return made[0]


def by_pool(head, x):
    with ThreadPoolExecutor(2) as pool:
        return sum(pool.map(head, [x, x]))


def unawaited(head, x):
    by_thread(head, x)
    return x


@pytest.mark.parametrize("head", [nn.Linear(4, 2), torch.relu], ids=["module", "function"])
@pytest.mark.parametrize("by", [by_thread, by_pool, unawaited])
@pytest.mark.parametrize("run", [layer_costs, audit, infers, trains])
def test_a_model_that_computes_in_its_own_threads_is_named(run, by, head):
    with pytest.raises(ValueError, match=r"in a thread of its own.*in one thread"):
        run(InThreads(by, head), torch.zeros(3, 4))


@pytest.mark.parametrize("run", [layer_costs, audit, infers, trains])
def test_a_thread_that_computes_nothing_is_no_matter(run):
    def beside(head, x):
        by_thread(lambda size: 2 * size[0], x.shape)
        return head(x)

    run(InThreads(beside, nn.Linear(4, 2)), torch.zeros(3, 4))


def test_threads_that_a_run_starts_are_still_known_to_python():
    """A pool leads to Thread, and its functions to the list of all threads."""
    model, goes = nn.Linear(4, 2), threading.Event()
    model.pool = ThreadPoolExecutor(1)
    other = threading.Thread(target=goes.wait)
    with untouched(model, without_data=True):
        other.start()
    assert other in threading.enumerate()
    goes.set()
    other.join()
