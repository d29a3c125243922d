"""Steps of the lesson on memory: bytes against counting, gradients against autograd."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dlhelpers.course import steps
from dlhelpers.memory import estimate


def test_a_step_of_the_wide_network_needs_what_counting_says():
    pixels, _, labels = steps.inputs()
    model = steps.wide()
    parameters = sum(4 * p.numel() for p in model.parameters())
    largest = 4 * 512 * 512  # the gradient of a layer is alive beside those that are done
    found = steps.training_bytes(model, pixels, labels)
    assert 2 * parameters < found < 2 * parameters + largest
    assert steps.training_bytes(model, pixels, labels) == found, "old gradients are dropped"


def test_autocast_spares_activations_and_adds_copies_of_weights():
    pixels, images, labels = steps.inputs()
    for model, inputs, low, high in (
        (steps.chain(8), images, 0.45, 0.6),
        (steps.wide(), pixels, 1.01, 1.3),
    ):
        plain = steps.training_bytes(model, inputs, labels)
        half = steps.training_bytes(
            model, inputs, labels, within=torch.autocast("cpu", torch.bfloat16)
        )
        assert low < half / plain < high


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_a_steady_step_is_the_one_that_an_estimate_predicts(make):
    _, images, labels = steps.inputs()
    model = steps.chain(2)
    optimizer = make(model.parameters())
    predicted = estimate(model, images, optimizer)
    assert steps.steady_step(model, images, labels, optimizer).tensor_bytes == (
        predicted.tensor_bytes
    )


def test_gradients_that_are_kept_as_zeros_are_alive_beside_the_new_ones():
    pixels, _, labels = steps.inputs()
    model = nn.Linear(64, 10)
    optimizer = torch.optim.SGD(model.parameters())
    freed, kept = (
        steps.steady_step(model, pixels, labels, optimizer, set_to_none=way).tensor_bytes
        for way in (True, False)
    )
    assert kept - freed >= 4 * 64 * 10


def test_what_a_second_forward_pass_changes_is_counted_and_the_model_stays():
    _, images, labels = steps.inputs()
    model = steps.chain(2)
    before = copy.deepcopy(model.state_dict())

    def twice(model):
        return lambda x: (model(x), model(x))[1]

    state = torch.get_rng_state()
    assert steps.differing(model, twice, images, labels) == 3 * 2  # three buffers per BatchNorm
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())
    assert model[0].weight.grad is None


@pytest.mark.parametrize(
    ("operation", "in_place", "same"),
    [
        (torch.relu, torch.relu_, True),
        (F.silu, lambda x: F.silu(x, inplace=True), True),
        (torch.relu, torch.sigmoid_, False),  # another function, another gradient
    ],
)
def test_gradients_of_two_forms_are_compared(operation, in_place, same):
    assert steps.same_gradient(torch.sin, operation, in_place) is same


def test_what_autograd_refuses_is_not_the_same():
    assert not steps.same_gradient(torch.sigmoid, lambda x: x * 2, lambda x: x.mul_(2))
