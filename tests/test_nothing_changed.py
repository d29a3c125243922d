"""No public function changes a model that it is given, nor a copy of it, nor torch's classes."""

import contextlib
import copy
import dataclasses
import importlib
import inspect
import pkgutil
import random
from collections import OrderedDict
from types import MappingProxyType

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import module as nn_module
from torch.nn.utils import parametrizations, parametrize

import dlhelpers
from dlhelpers import memory, models, pairing, profiling, untouched
from dlhelpers.classes import own_classes
from dlhelpers.fusion import fold_after, fold_before, fuse_conv_bn, reparameterize
from dlhelpers.quantization import (
    quantize_aware,
    quantize_dynamic,
    quantize_static,
    sensitivity,
    simulate,
)
from dlhelpers.roofline import Roofline
from dlhelpers.shufflenet import audit, layer_costs

X, TARGETS = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
PEAKS = Roofline(10.0, {"fp32": 100.0}, 1)
ENDS = {"budget_s": 0.01, "progress": False}


class Body(nn.Module):
    """Layers that share a weight, BatchNorms in train mode, hooks; a head gives three classes."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.again = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.again.weight = self.conv.weight
        self.blocks = nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()), nn.Dropout(0.1))
        self.head = nn.Linear(3, 3)
        self.features, self.numbers = [], np.ones(3)
        self.conv.register_forward_hook(self._keep)
        self.bn.register_forward_pre_hook(lambda module, given: None)
        self.head.register_full_backward_hook(lambda module, given, found: None)
        self.head.weight.grad = torch.ones(3, 3)
        self.head.bias.requires_grad_(False)

    def _keep(self, module, given, output):
        self.features.append(output)

    def forward(self, x):
        y = self.again(F.relu(self.bn(self.conv(x))))
        return self.head(self.blocks(y).mean((2, 3)))


class Caches(Body):
    """Keeps what forward made: anchors, a rotary table, a list, a dictionary, a counter."""

    def __init__(self):
        super().__init__()
        self.register_buffer("cos", None, persistent=False)
        self.by_size, self.rows, self.shape, self.calls = {"kept": torch.ones(1)}, [], None, 0

    def forward(self, x):
        self.calls += 1
        if self.shape != x.shape[2:]:
            self.shape, self.anchors = x.shape[2:], torch.arange(x.shape[3]).float()
        if self.cos is None:
            self.cos = torch.arange(3).float().cos()
        y = super().forward(x + 0 * self.anchors) * self.cos
        self.rows.append(y)
        self.by_size[tuple(x.shape)] = y
        if not hasattr(self, "late"):
            self.register_buffer("late", torch.zeros(3))
        return y + self.late


class Twice(nn.Module):
    """A user's own parametrization."""

    def forward(self, weight):
        return 2 * weight


class Parametrized(Body):
    def __init__(self):
        super().__init__()
        parametrizations.weight_norm(self.blocks[0][0])
        parametrizations.spectral_norm(self.head)
        parametrize.register_parametrization(self.bn, "weight", Twice())


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.bn = nn.LSTM(24, 6, 2, batch_first=True, dropout=0.1), nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        steps, _ = self.lstm(x.flatten(1, 2).transpose(1, 2).expand(-1, -1, 24))
        return self.head(self.bn(steps[:, -1]))


class Breaks(Caches):
    """Raises at its second call, when it has kept things."""

    def forward(self, x):
        y = super().forward(x)
        if self.calls % 2 == 0:
            raise ArithmeticError("the second call")
        return y


MODELS = {kind.__name__: kind for kind in (Caches, Parametrized, Recurrent, Breaks)}


# name -> what calls it; a function that refuses such a model leaves it alone as well
def run_a_copy_of(model):
    with torch.random.fork_rng(), untouched.shared_untouched(model):
        models.copied(model)(X)


LEAVE_ALONE = {
    "fusion.fuse_conv_bn": lambda model: fuse_conv_bn(model, X),
    "memory.checkpoint_blocks": lambda model: memory.checkpoint_blocks(model, 1),
    "memory.checkpoint_plan": memory.checkpoint_plan,
    "memory.estimate": lambda model: memory.estimate(model, X, torch.optim.AdamW),
    "models.copied": models.copied,
    "models.need_model": lambda model: models.need_model(model, "run"),
    "untouched.shared_untouched": lambda model: run_a_copy_of(model),
    "models.need_module": lambda model: models.need_module(model, "run"),
    "models.plain_copy": models.plain_copy,
    "models.unwrapped": models.unwrapped,
    "pairing.check": lambda model: pairing.check(model, nn.CrossEntropyLoss(), TARGETS, X),
    "quantization.quantize_aware": lambda model: quantize_aware(model).eval()(X).sum().backward(),
    "quantization.quantize_dynamic": lambda model: quantize_dynamic(model),
    "quantization.quantize_static": lambda model: quantize_static(
        model, [X], engine="eager", **ENDS
    ),
    "quantization.sensitivity": lambda model: sensitivity(model, [X], progress=False),
    "quantization.simulate": lambda model: simulate(model, [X]),
    "shufflenet.audit": lambda model: audit(model, X, peaks=PEAKS),
    "shufflenet.layer_costs": lambda model: layer_costs(model, X),
}
LAYERS = {  # those that take layers, which are called with layers below
    "fusion.fold_after": lambda: (fold_after, nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4).eval()),
    "fusion.fold_before": lambda: (fold_before, nn.BatchNorm2d(3).eval(), nn.Conv2d(3, 4, 1)),
    "fusion.reparameterize": lambda: (
        reparameterize,
        nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).eval(),
    ),
}
CHANGE = {  # what each changes in a model that is given
    "classes.own_classes": "the class of each parametrized module becomes its own",
    "memory.accumulate": "gradients and buffers, as the training step that it is part of",
    "models.in_eval_": "the mode",
    "models.uncompiled_": "compiled parts are replaced by the modules that were compiled",
    "quantization.AwareModel": "nothing: quantize_aware makes it of a copy",
}
# one of Python's; a number of records
ANOTHER_MODULE = {"extras.install_hint", "extras.need", "lmdb_io.WindowSampler"}
NAMES = {"model", "module", "layer", "bn", "block", "model_or_outputs", "models"}


def test_every_public_function_that_takes_a_model_is_listed():
    found = set()
    for part in pkgutil.iter_modules(dlhelpers.__path__):
        if part.name.startswith("_") or part.name == "course":
            continue
        public = importlib.import_module(f"dlhelpers.{part.name}")
        for name in getattr(public, "__all__", ()):
            value = getattr(public, name)
            if not callable(value) or not getattr(value, "__module__", "").startswith("dlhelpers"):
                continue
            if dataclasses.is_dataclass(value) or issubclass_of(value, Exception):
                continue
            parameters = inspect.signature(value).parameters
            if any(
                given in NAMES or "nn.Module" in str(parameter.annotation)
                for given, parameter in parameters.items()
            ):
                found.add(f"{part.name}.{name}")
    assert found - ANOTHER_MODULE == {*LEAVE_ALONE, *LAYERS, *CHANGE}


def issubclass_of(value, kind):
    return isinstance(value, type) and issubclass(value, kind)


_MISSING = object()
_PLAIN = (str, bytes, int, float, complex, bool, type(None), torch.Size, torch.dtype)
_STOP = (type, type(len), type(lambda: 0), torch.device, type(importlib))


def picture(value, place="model", seen=None, found=None):
    """Return place -> (object, what it holds), of everything that a model consists of."""
    seen, found = {} if seen is None else seen, {} if found is None else found
    if id(value) in seen and not isinstance(value, _PLAIN):
        found[place] = (value, None)
        return found
    seen[id(value)] = value
    if isinstance(value, torch.Tensor):
        held = (value.detach().clone(), value.requires_grad, value.is_leaf, value.data_ptr())
        found[place] = (value, held)
        if value.is_leaf:
            picture(value.grad, f"{place}.grad", seen, found)
    elif isinstance(value, np.ndarray):
        found[place] = (value, value.tolist())
    elif isinstance(value, (dict, MappingProxyType)):
        found[place] = (value, [*value])
        for key, inner in value.items():
            picture(inner, f"{place}[{key!r}]", seen, found)
    elif isinstance(value, (list, tuple, set)):
        found[place] = (value, len(value))
        for number, inner in enumerate(value):
            picture(inner, f"{place}[{number}]", seen, found)
    elif isinstance(value, (*_PLAIN, *_STOP)):
        found[place] = (value, None)
    else:
        found[place] = (value, type(value))
        cls = type(value)
        if isinstance(value, nn.Module) and not cls.__module__.startswith("torch.nn.modules"):
            for name, inner in vars(cls).items():
                if name != "__slotnames__":  # where Python's copy keeps what it found
                    found[f"{place}.__class__.{name}"] = (inner, None)
        for name, inner in getattr(value, "__dict__", {}).items():
            picture(inner, f"{place}.{name}", seen, found)
    return found


def differences(before, after):
    changed = list(before.keys() ^ after.keys())
    for place in before.keys() & after.keys():
        (one, held), (other, holds) = before[place], after[place]
        if isinstance(one, _PLAIN):
            same = type(one) is type(other) and (one == other or one != one)
        elif isinstance(one, torch.Tensor) and held is not None and holds is not None:
            same = one is other and torch.equal(held[0], holds[0]) and held[1:] == holds[1:]
        else:
            same = one is other and held == holds
        if not same:
            changed.append(place)
    return sorted(changed)


def surroundings():
    """Return what belongs to nobody's model: classes, hooks for all, streams, switches."""
    return {
        "nn.Module": dict(vars(nn.Module)),
        "layers": {kind: dict(vars(kind)) for kind in (nn.Linear, nn.Conv2d, nn.BatchNorm2d)},
        "Tensor": {**vars(torch.Tensor), "__slotnames__": None},
        "hooks": [
            dict(value)
            for name, value in sorted(vars(nn_module).items())
            if name.startswith("_global") and isinstance(value, OrderedDict)
        ],
        "torch": torch.get_rng_state().tolist(),
        "random": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
        "switches": (
            torch.is_grad_enabled(),
            torch.get_default_dtype(),
            torch.get_num_threads(),
            torch.backends.quantized.engine,
            torch.backends.mha.get_fastpath_enabled(),
            torch.is_autocast_enabled("cpu"),
        ),
    }


def assert_same(before, after, where):
    assert not (changed := differences(before, after)), f"{where}: {changed[:5]}"


@pytest.fixture(autouse=True)
def _no_trials(monkeypatch, tmp_path):
    """An estimate tries no operator, and nothing is kept of one."""
    monkeypatch.setattr("dlhelpers.memory.scratch.cache_dir", lambda: tmp_path)
    monkeypatch.setattr("dlhelpers.memory.scratch._TRIALS_S", 0.0)


def made(kind):
    torch.manual_seed(0)
    return MODELS[kind]().train()


def called(function, *given):
    with contextlib.suppress(Exception):  # a refusal, or what the model raises
        function(*given)


SLOW = {"quantization.quantize_static", "quantization.sensitivity"}
PAIRS = [
    pytest.param(
        name,
        kind,
        marks=pytest.mark.slow if name in SLOW and kind != "Caches" else (),
    )
    for name in LEAVE_ALONE
    for kind in MODELS
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_a_model_that_is_given_is_as_it_was(name, kind):
    model = made(kind)
    called(model, X)  # it has kept something already
    twin = own_classes(copy.deepcopy(made(kind)))
    before, twins, around = picture(model), picture(twin), surroundings()
    called(LEAVE_ALONE[name], model)
    assert_same(before, picture(model), "the model")
    called(LEAVE_ALONE[name], twin)
    assert_same(twins, picture(twin), "its copy, which never ran")
    assert_same(before, picture(model), "the model, after its copy")
    assert differing(around, surroundings()) == []


def differing(one, other):
    return [name for name in one if one[name] != other[name]]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LEAVE_ALONE)
def test_a_deep_copy_shares_a_class_and_is_as_it_was(name):
    model = made("Parametrized")
    twin = copy.deepcopy(model)
    wanted = [copy.deepcopy(one).eval()(X) for one in (model, twin)]
    before = picture(twin)
    if name not in SLOW:
        called(LEAVE_ALONE[name], model)
    assert_same(before, picture(twin), "the copy")
    assert torch.equal(twin.eval()(X), wanted[1])
    assert torch.equal(model.eval()(X), wanted[0])


@pytest.mark.parametrize("name", LAYERS)
def test_layers_that_are_folded_are_as_they_were(name):
    function, *layers = LAYERS[name]()
    before, around = picture(layers), surroundings()
    function(*layers)
    assert_same(before, picture(layers), "the layers")
    with contextlib.suppress(ValueError):
        function(*(layer.train() for layer in layers))
    assert differing(around, surroundings()) == []


WATCH = {
    "memory.measure_peak": memory.measure_peak,
    "profiling.diagnose": lambda fn: profiling.diagnose(fn, steps=3, progress=False),
    "profiling.profile_python": profiling.profile_python,
    "profiling.profile_torch": lambda fn: profiling.profile_torch(fn, steps=1, progress=False),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("breaks", [False, True], ids=["runs", "raises"])
@pytest.mark.parametrize("name", WATCH)
def test_what_watches_a_function_leaves_its_model_alone(name, breaks):
    model = made("Recurrent").eval()

    def run():
        with torch.inference_mode():
            model(X)
        if breaks:
            raise ArithmeticError

    run() if not breaks else None
    before, around = picture(model), surroundings()
    called(WATCH[name], run)
    assert_same(before, picture(model), "the model")
    assert differing(around, surroundings()) == []
