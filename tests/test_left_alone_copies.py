"""What is done to a copy of a model does nothing to the model."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from dlhelpers.classes import own_classes
from dlhelpers.fusion import fuse_conv_bn
from dlhelpers.quantization import quantize_aware, quantize_static, simulate

X, Y = torch.rand(8, 4), torch.randint(0, 3, (8,))


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def step(aware):
    loss = nn.functional.cross_entropy(aware.train()(X), Y)
    loss.backward()
    with torch.no_grad():
        for parameter in aware.parameters():
            parameter -= 0.1 * parameter.grad
            parameter.grad = None


def trained(aware, after_each_epoch=lambda aware: None):
    for _ in range(4):
        step(aware)
        after_each_epoch(aware)
    return aware.eval()(X)


AFTER_EACH_EPOCH = {
    "finish": lambda aware: aware.finish(),
    "finish of a copy": lambda aware: copy.deepcopy(aware).finish(),
    "finish twice": lambda aware: (aware.finish(), aware.finish()),
    "finish of a copy's copy": lambda aware: copy.deepcopy(copy.deepcopy(aware)).finish(),
    "quantize_static": lambda aware: quantize_static(
        aware, [X], engine="eager", budget_s=0.01, progress=False
    ),
    "simulate of what is finished": lambda aware: simulate(aware.finish(), [X]),
    "aware of what is finished": lambda aware: step(quantize_aware(aware.finish())),
    "finish, then freeze of a copy": lambda aware: (aware.finish(), copy.deepcopy(aware).freeze()),
}


@pytest.mark.parametrize("what", AFTER_EACH_EPOCH)
def test_an_aware_model_trains_on_as_if_nobody_had_looked(what):
    wanted = trained(quantize_aware(small(), bits=4))
    aware = quantize_aware(small(), bits=4)
    assert torch.equal(trained(aware, AFTER_EACH_EPOCH[what]), wanted)
    assert isinstance(aware.finish()(X), torch.Tensor)


def test_a_copy_goes_on_after_its_original_is_finished():
    aware = quantize_aware(small(), bits=4)
    copied = copy.deepcopy(aware)
    finished = aware.finish()
    assert torch.equal(copied(X), aware(X))
    assert [type(layer) for layer in finished] == [nn.Linear, nn.ReLU, nn.Linear]
    assert torch.equal(copied.finish()(X), finished(X))


def test_a_frozen_copy_stays_frozen_by_itself():
    aware = quantize_aware(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))).freeze()
    copied = copy.deepcopy(aware)
    assert copied.model[1].train() is copied.model[1]
    assert not copied.train().model[1].training


def test_a_train_of_the_readers_own_outlives_finish():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval()
    model[1].train = lambda mode=True: model[1]  # the usual way to keep a BatchNorm frozen
    assert not quantize_aware(model).finish().train()[1].training


class Normed(nn.Module):
    """HiFi-GAN's way: weight_norm while it trains, taken off by a method before inference."""

    def __init__(self):
        super().__init__()
        self.conv = parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.conv(x))

    def fuse(self):
        parametrize.remove_parametrizations(self.conv, "weight")
        self.conv = nn.utils.fuse_conv_bn_eval(self.conv, self.bn)
        self.bn = nn.Identity()


def test_a_models_own_fuse_takes_its_parametrizations_off_a_copy_alone():
    model, x = Normed().eval(), torch.rand(1, 3, 6, 6)
    wanted = model(x)
    fused, report = fuse_conv_bn(nn.Sequential(model), x)
    assert torch.equal(model(x), wanted)
    assert report.folded == 1
    assert torch.allclose(fused(x), wanted, atol=1e-5)


MAKES_A_COPY = {
    "fuse_conv_bn": lambda model: fuse_conv_bn(model)[0],
    "own_classes": lambda model: own_classes(copy.deepcopy(model)),
}


@pytest.mark.parametrize("how", MAKES_A_COPY)
@pytest.mark.parametrize(
    "parametrized",
    [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal],
)
def test_parametrizations_may_be_removed_from_a_copy(parametrized, how):
    torch.manual_seed(0)
    model = nn.Sequential(parametrized(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 2)).eval()
    wanted = model(X)
    made = MAKES_A_COPY[how](model)
    for layer in made.modules():
        if parametrize.is_parametrized(layer):
            parametrize.remove_parametrizations(layer, "weight")
            assert type(layer).__mro__[-2] is nn.Module
    assert torch.equal(model(X), wanted)
    assert torch.equal(copy.deepcopy(model)(X), wanted)
