"""What calls change and later calls read: the fused model agrees with the model call by call."""

import copy
import itertools

import pytest
import torch
from test_fusion import conv, image, lived, norm
from torch import nn

from dlhelpers.fusion import FusionError, fuse_conv_bn


class Pair(nn.Module):
    """A convolution, its norm and a state; ``raw`` says whether a call leaves the norm out."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.state = conv(), norm(), self.start()

    def start(self):
        return None

    def forward(self, x):
        y = self.conv(x)
        return y if self.raw(y) else self.norm(y)


class Grows(Pair):
    def start(self):
        return []

    def raw(self, y):
        self.state.append(1)
        return len(self.state) > 2


class Marks(Pair):
    def start(self):
        return {}

    def raw(self, y):
        return self.state.setdefault("calls", []) or self.state["calls"].append(1)


class Collects(Pair):
    def start(self):
        return set()

    def raw(self, y):
        self.state.add(len(self.state))
        return len(self.state) > 1


class Caches(Pair):
    def raw(self, y):
        is_filled, self.state = self.state is not None, torch.ones(1)
        return is_filled


class CachesOutput(Pair):
    def raw(self, y):
        is_filled, self.state = self.state is not None, y
        return is_filled


class Counter:
    calls = 0


class CountsInAnObject(Pair):
    def start(self):
        return Counter()

    def raw(self, y):
        self.state.calls += 1
        return self.state.calls > 2


class CountsTwice(Pair):
    def start(self):
        return 0

    def raw(self, y):
        self.state += 1
        return self.state > 3


class Modulo(Pair):
    def start(self):
        return 0

    def raw(self, y):
        self.state = (self.state + 1) % 5
        return self.state == 4


class CountsFar(CountsTwice):
    def raw(self, y):
        self.state += 1
        return self.state > 9


class Turns(Pair):
    def start(self):
        return itertools.cycle([0, 1])

    def raw(self, y):
        return next(self.state)


class Buffered(Pair):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def raw(self, y):
        self.calls += 1
        return self.calls > 2


class BufferedNumber(Buffered):
    def raw(self, y):
        self.calls = self.calls + 1
        return int(self.calls) > 2


STATEFUL = [
    *(Grows, Marks, Collects, Caches, CachesOutput, CountsInAnObject, CountsTwice, Modulo),
    *(CountsFar, Turns, Buffered, BufferedNumber),
]


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("kind", STATEFUL)
def test_what_a_later_call_does_without_its_norm_stays(kind, verify):
    torch.manual_seed(0)
    model = lived(kind())
    fused, report = fuse_conv_bn(model, image(4), verify=verify)
    wanted, x = copy.deepcopy(model).eval(), image(4)
    assert report.folded == 0
    assert report.left["norm"] != "it is never called"
    with torch.no_grad():
        for _ in range(12):
            assert torch.allclose(fused(x), wanted(x), atol=1e-5)


def test_the_state_is_named():
    _, report = fuse_conv_bn(lived(Grows()), image(4))
    assert report.left["norm"] == "Grows calls it, and changes state, which later calls of it read"


CALLS = {}


class SelfToldByAFunction(Pair):
    """Counts where no trace looks: only calls on tensors with data count."""

    def raw(self, y):
        if type(y) is not torch.Tensor:
            return False
        CALLS[id(self)] = CALLS.get(id(self), 0) + 1
        return CALLS[id(self)] > 2


def test_calls_in_a_row_are_compared():
    with pytest.raises(FusionError, match="of calls in a row, number 3"):
        fuse_conv_bn(lived(SelfToldByAFunction()), image(4))
    assert not CALLS


class Notes(Pair):
    def start(self):
        return []

    def raw(self, y):
        self.state.append(y)
        self.calls = getattr(self, "count", 0)
        self.last = y
        return False


class Averages(Buffered):
    def forward(self, x):
        self.calls += 1
        return self.norm(self.conv(x)) * self.calls


class Grid(Pair):
    def forward(self, x):
        y = self.norm(self.conv(x))
        if self.state is None or self.state.shape[2:] != y.shape[2:]:
            self.state = torch.ones_like(y[:1])
        return y * self.state


class DrawsEachCall(Pair):
    def forward(self, x):
        y = self.norm(self.conv(x))
        return y + torch.rand_like(y)


@pytest.mark.parametrize("kind", [Notes, Averages, Grid, DrawsEachCall])
def test_a_state_that_decides_nothing_hinders_no_fold(kind):
    _, report = fuse_conv_bn(lived(kind()), image(4))
    assert report.folded == 1
