"""A check leaves model and loss as they were, and says how it called what it was given."""

import functools
import random
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dlhelpers import pairing

N, D, C = 6, 5, 4
SEED = torch.Generator().manual_seed(0)
X = torch.randn(N, D, generator=SEED)
Y = torch.randint(0, C, (N,), generator=SEED)
Z = torch.randn(N, C, generator=SEED).requires_grad_()
CE = nn.CrossEntropyLoss()


class Busy(nn.Module):
    """A model that changes all that it can reach."""

    def __init__(self):
        super().__init__()
        self.fc, self.seen, self.center = nn.Linear(D, C), 0, torch.zeros(3)
        self.cache, self.by_name, self.nested = [1], {"a": 1}, {"rows": [1]}
        self.torch, self.python = torch.Generator().manual_seed(3), random.Random(3)
        self.numpy, self.array = np.random.default_rng(3), np.zeros(2)
        self.bank = {"mean": torch.zeros(2)}

    def forward(self, x):
        self.seen += 1
        self.last = x
        self.center.add_(1)
        self.array[0] += 1
        self.bank["mean"] += 1
        self.cache.append(x)
        self.by_name["b"] = self.nested["rows"].pop()
        x = x + self.python.random() + float(self.numpy.random()) + random.random()
        return self.fc(x + torch.rand(1, generator=self.torch) + torch.rand(1))

    def state(self):
        return (
            self.seen,
            hasattr(self, "last"),
            self.center.tolist(),
            self.array.tolist(),
            self.bank["mean"].tolist(),
            list(self.cache),
            dict(self.by_name),
            list(self.nested["rows"]),
            self.torch.get_state().tolist(),
            self.python.getstate(),
            self.numpy.bit_generator.state,
            random.getstate(),
            torch.get_rng_state().tolist(),
        )


def within(net):
    return nn.Sequential(net)


def called(net):
    return lambda x: net(x)


@pytest.mark.parametrize("wrapped", [lambda net: net, within, called, lambda net: net.forward])
def test_a_model_that_is_run_keeps_generators_counters_and_caches(wrapped):
    net = Busy()
    cache, rows, before = net.cache, net.nested["rows"], net.state()
    assert not pairing.check(wrapped(net), CE, Y, X)
    assert net.state() == before
    assert net.cache is cache
    assert net.nested["rows"] is rows


def test_a_model_that_fails_is_put_back_too():
    class Failing(Busy):
        def forward(self, x):
            super().forward(x)
            raise RuntimeError("no")

    net = Failing()
    before = net.state()
    assert [f.name for f in pairing.check(net, CE, Y, X)] == ["model-raised"]
    assert net.state() == before


CENTER = torch.zeros(C)
HISTORY = np.zeros(2)
NOISE = torch.Generator().manual_seed(1)


def distillation(outputs, targets):
    """In the manner of DINO: Caron et al. 2021."""
    CENTER.mul_(0.9).add_(0.1)
    HISTORY[0] += 1
    torch.rand(1, generator=NOISE)
    return F.cross_entropy(outputs - CENTER, targets)


def with_closure():
    center, bank = torch.zeros(C), {"queue": [torch.zeros(C)]}

    def loss(outputs, targets):
        center.add_(1)
        bank["queue"][0].add_(1)
        return F.cross_entropy(outputs - center, targets)

    return loss, lambda: (center.sum().item(), bank["queue"][0].sum().item())


def test_tensors_and_generators_that_a_loss_reaches_are_put_back():
    noise = NOISE.get_state()
    inner = lambda o, t: (lambda scores: F.cross_entropy(scores - CENTER.add_(1), t))(o)  # noqa: E731
    for loss in (distillation, lambda o, t: 2 * distillation(o, t), inner):
        pairing.check(Z, loss, Y)
        assert CENTER.sum() == 0
        assert HISTORY[0] == 0
        assert torch.equal(NOISE.get_state(), noise)
    loss, state = with_closure()
    pairing.check(Z, loss, Y)
    assert state() == (0, 0)


def test_a_network_inside_of_a_loss_keeps_buffers_modes_and_gradients():
    critic = nn.Sequential(nn.BatchNorm1d(C), nn.Linear(C, 1))

    def loss(outputs, targets):
        critic.eval()
        critic.train()[1].weight.grad = torch.ones(1, C)
        return critic(outputs).mean()

    critic.eval()
    for own in (loss, functools.partial(loss), lambda o, t: 2 * loss(o, t)):
        pairing.check(Z, own, Y)
        assert not any(module.training for module in critic.modules())
        assert critic[0].num_batches_tracked == 0
        assert critic[0].running_mean.abs().sum() == 0
        assert critic[1].weight.grad is None


def test_a_tensor_of_nan_or_of_no_numbers_in_a_closure_hurts_nothing():
    odd = [torch.full((2,), torch.nan), torch.zeros(2, device="meta"), torch.eye(2).to_sparse()]

    def loss(outputs, targets):
        odd[0].zero_()
        return F.cross_entropy(outputs, targets) + 0 * len(odd)

    assert not pairing.check(Z, loss, Y)
    assert odd[0].isnan().all()


class Locked:
    """A loss without a deep copy."""

    def __init__(self):
        self.calls, self.seen, self.lock = 0, [], threading.Lock()

    def __call__(self, outputs, targets):
        self.calls += 1
        self.seen.append(outputs)
        return F.cross_entropy(outputs, targets)

    def method(self, outputs, targets):
        return self(outputs, targets)


class Keeping(nn.Module):
    """One that keeps a tensor with a graph has none after its first call."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, outputs, targets):
        self.calls += 1
        self.last = 2 * outputs
        return F.cross_entropy(outputs, targets)


def test_a_loss_without_a_deep_copy_is_put_back_and_the_result_says_so():
    locked, keeping = Locked(), Keeping()
    keeping(Z, Y)
    last = keeping.last
    for loss in (locked, locked.method, keeping):
        for outputs, said in ((Z, "nothing found\n("), (Z.softmax(1), "error: softmax-into")):
            found = pairing.check(outputs, loss, Y)
            assert str(found).startswith(said)
            assert "cannot be deep-copied" in found.note
    assert (locked.calls, locked.seen) == (0, [])
    assert keeping.calls == 1
    assert keeping.last is last
    assert pairing.check(Z, Keeping(), Y).note == ""


def test_what_a_loss_raises_as_given_is_in_the_note():
    def own(outputs, targets):
        return F.cross_entropy(outputs, targets)

    for outputs, targets, how in (
        ((Z, X), Y, "the first tensor of the outputs"),
        (Z, Y.tolist(), "the targets as a tensor"),
        (Z.tolist(), Y, "the outputs as a tensor"),
        ((Z, X), Y.numpy(), "the first tensor of the outputs and the targets as a tensor"),
    ):
        with pytest.raises(TypeError) as raised:
            own(outputs, targets)
        found = pairing.check(outputs, own, targets)
        assert not found
        assert str(raised.value)[:40] in found.note
        assert found.note.endswith(f"called with {how}")
    pairs = {"logits": Z}, lambda o, t: own(o["logits"], t)
    assert pairing.check(*pairs, Y).note == ""
    assert pairing.check(Z, lambda o, t, w: (own(o, t) * w).mean(), (Y, X)).note == ""
