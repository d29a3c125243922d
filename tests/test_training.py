import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dlhelpers.course.data import digits
from dlhelpers.course.training import accuracy, digits_mlp, fit, seed_everything


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_same_call_ends_in_the_same_bits(optimizer):
    def run():
        model = nn.Sequential(digits_mlp(seed=3), nn.Dropout(0.1))
        fit(model, F.cross_entropy, digits("train"), epochs=2, optimizer=optimizer, seed=5)
        return weights(model)

    first = run()
    torch.rand(7)  # whatever the caller drew in between
    assert torch.equal(first, run())


def test_another_seed_shuffles_otherwise():
    models = [digits_mlp(), digits_mlp()]
    for seed, model in enumerate(models):
        fit(model, F.cross_entropy, digits("train"), seed=seed)
    assert not torch.equal(*map(weights, models))


def test_one_epoch_of_sgd_equals_the_formula():
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 1, dtype=torch.float64)
    model = nn.Linear(3, 1, dtype=torch.float64)
    w, b = model.weight.detach().clone(), model.bias.detach().clone()
    fit(model, F.mse_loss, (x, y), lr=0.3, batch_size=6)
    error = x @ w.T + b - y
    assert torch.allclose(model.weight, w - 0.3 * 2 / 6 * (error.T @ x))
    assert torch.allclose(model.bias, b - 0.3 * 2 / 6 * error.sum())


def test_the_callers_random_state_and_the_models_mode_are_left_alone():
    model = digits_mlp().eval()
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    fit(model, F.cross_entropy, digits("train"))
    assert torch.equal(torch.rand(3), expected)
    assert not model.training


def test_it_learns_the_digits():
    model = digits_mlp()
    before = accuracy(model, *digits("test"))
    history = fit(model, F.cross_entropy, digits("train"), epochs=10)
    assert before < 0.3
    assert accuracy(model, *digits("test")) > 0.85
    assert history.epoch_loss[-1] < history.epoch_loss[0]
    assert len(history.step_loss) == 10 * math.ceil(1437 / 64)


def test_a_loss_that_diverges_stops_the_training_and_is_told():
    history = fit(digits_mlp(), lambda out, y: F.cross_entropy(out, y) / 0, digits("train"))
    assert history.diverged_at == 0
    assert not math.isfinite(history.step_loss[0])


def test_a_loader_is_taken_as_it_is():
    x, y = digits("train")
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=100)
    history = fit(digits_mlp(), nn.CrossEntropyLoss(), loader, epochs=2)
    assert len(history.step_loss) == 2 * 15


def test_accuracy_is_a_share_of_right_answers():
    model = nn.Sequential(nn.Identity(), nn.Dropout(0.5))
    outputs = torch.eye(4)
    assert accuracy(model, outputs, torch.tensor([0, 1, 2, 0])) == 0.75
    assert model.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "sdg"}, "optimizer 'sdg' is not one of"),
        ({"epochs": 0}, "got epochs=0"),
        ({"batch_size": -1}, "batch_size=-1"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        fit(digits_mlp(), F.cross_entropy, digits("train"), **options)


def test_unequal_tensors_are_named():
    with pytest.raises(ValueError, match="got 3 and 2"):
        fit(nn.Linear(1, 1), F.mse_loss, (torch.ones(3, 1), torch.ones(2, 1)))


def test_seeding_repeats_every_generator():
    import random

    import numpy as np

    def draw():
        seed_everything(9)
        return random.random(), np.random.rand(), torch.rand(1).item()

    assert draw() == draw()
    with pytest.raises(ValueError, match="got -1"):
        seed_everything(-1)


def test_short_runs_leave_no_bar_behind(capsys):
    fit(digits_mlp(), F.cross_entropy, digits("train"))
    assert capsys.readouterr() == ("", "")


def test_every_submodule_gets_its_own_mode_back():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout())
    model[1].eval()  # a frozen BatchNorm
    modes = [module.training for module in model.modules()]
    x, y = torch.randn(8, 4), torch.zeros(8).long()
    fit(model, F.cross_entropy, (x, y))
    accuracy(model, x, y)
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(ZeroDivisionError):
        fit(model, lambda out, y: 1 / 0, (x, y))
    assert [module.training for module in model.modules()] == modes


def test_a_loader_that_can_be_read_once_is_refused_not_averaged_to_zero():
    batches = ((torch.randn(4, 64), torch.zeros(4).long()) for _ in range(3))
    with pytest.raises(ValueError, match="no batch in epoch 2 of 3: give a DataLoader"):
        fit(digits_mlp(), F.cross_entropy, batches, epochs=3)


def test_a_loss_for_each_sample_is_refused():
    loss = nn.CrossEntropyLoss(reduction="none")
    with pytest.raises(ValueError, match=r"one number a batch, got shape \(64,\)"):
        fit(digits_mlp(), loss, digits("train"))


def test_a_column_of_targets_is_not_compared_with_every_sample():
    with pytest.raises(ValueError, match=r"must have shape \(4,\).* got \(4, 1\)"):
        accuracy(nn.Identity(), torch.eye(4), torch.arange(4)[:, None])


def test_an_optimizers_class_and_object_train_as_their_name_does():
    models = [digits_mlp() for _ in range(3)]
    ways = ["adam", torch.optim.Adam, torch.optim.Adam(models[2].parameters(), lr=0.01)]
    for model, way in zip(models, ways, strict=True):
        fit(model, F.cross_entropy, digits("train"), lr=0.01, optimizer=way)
    assert torch.equal(weights(models[0]), weights(models[1]))
    assert torch.equal(weights(models[0]), weights(models[2]))


def test_validation_records_each_epochs_accuracy_and_changes_nothing():
    models = [nn.Sequential(digits_mlp(), nn.Dropout(0.2)) for _ in range(2)]
    plain = fit(models[0], F.cross_entropy, digits("train"), epochs=3)
    watched = fit(models[1], F.cross_entropy, digits("train"), epochs=3, validate=digits("test"))
    assert torch.equal(*map(weights, models))
    assert plain.step_loss == watched.step_loss
    assert plain.epoch_accuracy == ()
    assert len(watched.epoch_accuracy) == 3
    assert watched.epoch_accuracy[-1] == accuracy(models[1], *digits("test"))


def test_equal_runs_have_equal_histories_that_print_alike():
    histories = [fit(digits_mlp(), F.cross_entropy, digits("train")) for _ in range(2)]
    assert histories[0] == histories[1]
    assert repr(histories[0]) == repr(histories[1])


def test_a_bar_is_drawn_in_a_terminal_alone_unless_asked_for(monkeypatch):
    import tqdm.auto

    hidden = []
    real = tqdm.auto.tqdm

    class Recorded(real):
        def __init__(self, *arguments, disable, **options):
            hidden.append(disable)
            super().__init__(*arguments, disable=True, **options)

    monkeypatch.setattr(tqdm.auto, "tqdm", Recorded)
    for terminal, progress in [(True, None), (False, None), (False, True), (True, False)]:
        monkeypatch.setattr("sys.stderr.isatty", lambda terminal=terminal: terminal, raising=False)
        fit(nn.Linear(1, 1), F.mse_loss, (torch.ones(2, 1), torch.ones(2, 1)), progress=progress)
    assert hidden == [False, True, False, True]
