"""Fusing leaves alone what a forward writes to outside of the model, and other threads' counts."""

import contextvars
import functools
import random
import threading
import types

import numpy as np
import pytest
import torch
from test_fusion import conv, image, norm
from torch import nn

from dlhelpers.fusion import fuse_conv_bn
from dlhelpers.shufflenet import layer_costs

TABLES, SEEN = {}, []
LAST = None


class Holder:
    """An object that a module does not hold."""


HOLDER = Holder()


@functools.lru_cache
def ones(size, dtype):
    return torch.ones(size, dtype=dtype)


class Net(nn.Module):
    """A convolution and its norm; subclasses keep a tensor somewhere."""

    kept = None

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.calls, self.seen = conv(), norm(), 0, []

    def forward(self, x):
        return self.keep(self.norm(self.conv(x)))


class ADict(Net):
    def keep(self, y):
        if "ones" not in TABLES:
            TABLES["ones"] = torch.ones_like(y[:1])
        return y * TABLES["ones"]


class AList(Net):
    def keep(self, y):
        SEEN.append(y)
        return y


class AGlobal(Net):
    def keep(self, y):
        global LAST
        LAST = y
        return y


class AClass(Net):
    def keep(self, y):
        if AClass.kept is None:
            AClass.kept = torch.ones(4).to(y.dtype)
        return y * AClass.kept.view(-1, 1, 1)


class AnObject(Net):
    def keep(self, y):
        if not hasattr(HOLDER, "zero"):
            HOLDER.zero = torch.zeros(1).to(y)
        return y + HOLDER.zero


class ACache(Net):
    def keep(self, y):
        return y * ones(y.shape[3], y.dtype)


class AClosure(Net):
    def __init__(self):
        super().__init__()
        kept = {}

        def keep(y):
            kept["y"] = y
            return y

        self.keep, self.bank = keep, kept

    def forward(self, x):
        return self.keep(self.norm(self.conv(x)))


class Draws(Net):
    def keep(self, y):
        return y * (1 + 0 * random.random() + 0 * np.random.rand() + 0 * torch.rand(1).item())


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("kind", [ADict, AList, AGlobal, AClass, AnObject, ACache, AClosure, Draws])
def test_what_a_forward_keeps_outside_of_the_model_is_as_it_was(kind, verify):
    TABLES.clear(), SEEN.clear(), vars(HOLDER).clear(), ones.cache_clear()
    globals()["LAST"] = AClass.kept = None
    model, x = kind().eval(), image(4)
    streams = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    fuse_conv_bn(model, x, verify=verify)
    assert not [*TABLES, *SEEN, *vars(HOLDER)]
    assert LAST is AClass.kept is None
    assert not ones.cache_info().currsize
    assert not vars(model).get("bank")
    assert torch.equal(torch.get_rng_state(), streams[0])
    assert random.getstate() == streams[1]
    assert np.array_equal(np.random.get_state()[1], streams[2])
    found = model(x)
    assert (type(found), found.dtype) == (torch.Tensor, torch.float32)


class AnyList(list):
    """A list that does more when it is changed."""

    def clear(self):
        raise AssertionError("not to be called")


class AnyDict(dict):
    """A dictionary of the user's."""


class Slots:
    __slots__ = ("kept",)


LISTED, NAMED, SLOTTED, SETTINGS = AnyList(), AnyDict(), Slots(), types.ModuleType("settings")
CURRENT = contextvars.ContextVar("current", default=None)


def attribute_of_a_function(y):
    attribute_of_a_function.kept = y


def variable_of_a_module(y):
    SETTINGS.kept = y


def slot_of_an_object(y):
    SLOTTED.kept = y


def by_name(y):
    globals()["UNNAMED"] = y


@pytest.mark.parametrize("run", [fuse_conv_bn, layer_costs])
@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        (lambda y: LISTED.append(y), lambda: LISTED),
        (lambda y: NAMED.update(y=y), lambda: NAMED),
        (lambda y: CURRENT.set(y), CURRENT.get),
        (attribute_of_a_function, lambda: vars(attribute_of_a_function)),
        (variable_of_a_module, lambda: hasattr(SETTINGS, "kept")),
        (slot_of_an_object, lambda: hasattr(SLOTTED, "kept")),
        (by_name, lambda: "UNNAMED" in globals()),
    ],
    ids=["list", "dict", "context", "function", "module", "slot", "globals"],
)
def test_what_holds_a_tensor_in_another_way_is_as_it_was(keep, kept, run):
    class Keeps(Net):
        def keep(self, y):
            keep(y)
            return y

    run(Keeps().eval(), image(4))
    assert not kept()


class Counts(Net):
    def keep(self, y):
        self.calls += 1
        self.seen.append(self.calls)
        return y


@pytest.mark.parametrize("run", [fuse_conv_bn, layer_costs])
def test_another_thread_keeps_what_it_wrote_to_the_model(run):
    model = Counts().eval()
    entered = threading.Event()

    def serve(module, args):
        if threading.current_thread() is not threading.main_thread() or entered.is_set():
            return
        entered.set()  # in the middle of the run
        other = threading.Thread(target=lambda: [model(image(4)) for _ in range(3)])
        other.start(), other.join()

    hook = nn.modules.module.register_module_forward_pre_hook(serve)
    try:
        run(model, image(4))
    finally:
        hook.remove()
    assert entered.is_set()
    assert model.calls == 3
    assert model.seen == [1, 2, 3]
