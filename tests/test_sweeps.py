"""Does a sweep train as the ordinary loop does, and choose its rate by held-out samples alone?"""

import ast
import copy
import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from dlhelpers.course import training
from dlhelpers.course.sweeps import Sweep, sweep

torch.manual_seed(0)
X = torch.randn(100, 64)
Y = X[:, :3].argmax(1)
TEST = torch.randn(40, 64), torch.randint(0, 3, (40,))


def make(seed):
    return training.digits_mlp(hidden=8, classes=3, seed=seed)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_each_rate_and_seed_ends_where_the_ordinary_loop_ends(optimizer):
    rates, held_out = (0.01, 0.1), torch.arange(100) % 5 == 4
    found = sweep(
        make, F.cross_entropy, (X, Y), TEST, rates=rates, seeds=2, epochs=3, optimizer=optimizer,
        batch_size=32,
    )  # fmt: skip
    for rate, validation, test in zip(rates, found.validation, found.test, strict=True):
        for seed in range(2):
            model = make(seed)
            training.fit(
                model, F.cross_entropy, (X[~held_out], Y[~held_out]), epochs=3, lr=rate,
                optimizer=optimizer, batch_size=32, seed=seed,
            )  # fmt: skip
            wanted = [
                100 * training.accuracy(model, *part) for part in ((X[held_out], Y[held_out]), TEST)
            ]
            assert [validation[seed], test[seed]] == pytest.approx(wanted, abs=2.6)
    assert found.best_rate in rates


def test_the_test_samples_change_nothing_but_the_test_accuracies():
    first, second = (
        sweep(make, F.cross_entropy, (X, Y), test, rates=(0.1, 1.0), seeds=2, epochs=2)
        for test in (TEST, (TEST[0] + 1, (TEST[1] + 1) % 3))
    )
    assert first.validation == second.validation
    assert first.best_rate == second.best_rate
    assert first.test != second.test


@given(st.lists(st.lists(st.integers(0, 100), min_size=2, max_size=2), min_size=2, max_size=5))
def test_the_best_rate_is_the_first_with_the_highest_mean(validation):
    rates = tuple(10.0**-n for n in range(len(validation)))
    test = tuple((float(n), float(n)) for n in range(len(validation)))
    found = Sweep(rates, tuple(map(tuple, validation)), test)
    means = [sum(row) / 2 for row in validation]
    assert found.best_rate == rates[means.index(max(means))]
    assert found.at_best == test[means.index(max(means))]
    logs, middle, low, high = found.curve()
    assert logs == tuple(map(math.log10, rates))
    assert low == middle == high


@pytest.mark.parametrize(("best", "is_bracketed"), [(0, False), (1, True), (2, False)])
def test_a_best_rate_at_an_end_of_the_grid_is_not_bracketed(best, is_bracketed):
    for rates in ((0.1, 1.0, 10.0), (10.0, 1.0, 0.1)):
        validation = tuple((float(n == best),) for n in range(3))
        assert Sweep(rates, validation, validation).is_bracketed is is_bracketed


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_in_float64_it_ends_where_the_ordinary_loop_ends(optimizer):
    start = make(0).double()
    x, y, own = X.double(), Y, torch.arange(100) % 5 != 4
    stepped = copy.deepcopy(start)
    options = {"epochs": 3, "optimizer": optimizer, "batch_size": 32}
    training.fit(stepped, F.cross_entropy, (x[own], y[own]), lr=0.1, **options)
    seen = []
    sweep(
        lambda seed: copy.deepcopy(start), F.cross_entropy, (x, y), (x, y), rates=(0.1,), seeds=1,
        right=lambda outputs, targets: seen.append(outputs) or targets >= 0, **options,
    )  # fmt: skip
    torch.testing.assert_close(seen[-1], stepped(x), rtol=1e-9, atol=1e-9)


def test_a_rule_of_its_own_decides_what_is_right():
    found = sweep(
        lambda seed: nn.Sequential(make(seed), nn.Flatten()), F.cross_entropy, (X, Y), TEST,
        rates=(0.1,), seeds=1, epochs=1, right=lambda outputs, targets: targets >= 0,
    )  # fmt: skip
    assert found.test == ((100.0,),)


def test_nothing_that_is_given_is_changed():
    model = make(0)
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    sweep(lambda seed: model, F.cross_entropy, (X, Y), TEST, rates=(0.1,), seeds=2, epochs=1)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"rates": ()}, "positive numbers, at least one"),
        ({"rates": (0.1, 0.0)}, "positive numbers, at least one"),
        ({"rates": (0.1, 0.1)}, r"\[0.1, 0.1\] names one twice"),
        ({"optimizer": "adamw"}, "'adamw' is not one of"),
        ({"seeds": 0}, "seeds must be 1 or more, got 0"),
        ({"epochs": 0}, "epochs must be 1 or more, got 0"),
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ({"train": (X[:9], Y)}, "train must have the same number.*got 9 and 100"),
        ({"train": (X[:4], Y[:4])}, "train .* 5 or more: got 4 and 4"),
        ({"test": (TEST[0], TEST[1][:1])}, "test must have the same number.*got 40 and 1"),
        ({"test": (TEST[0], TEST[1][:, None])}, r"for each of 40 samples.*\(40, 40\)"),
        ({"loss": partial(F.cross_entropy, reduction="none")}, r"one number a batch.*\(64,\)"),
        ({"make": lambda seed: nn.Sequential(make(seed), nn.BatchNorm1d(3))}, "with buffers"),
        ({"make": lambda seed: nn.Sequential(make(seed), nn.Dropout())}, "with dropout"),
        ({"make": lambda seed: make(seed).requires_grad_(False)}, "with frozen"),
        ({"make": lambda seed: nn.Sequential(*[nn.Linear(64, 64)] * 2)}, "with shared"),
    ],
)
def test_what_cannot_be_swept_is_refused(options, told):
    given = {"make": make, "loss": F.cross_entropy, "train": (X, Y), "test": TEST, "rates": (0.1,)}
    with pytest.raises(ValueError, match=told):
        sweep(**(given | {"seeds": 1, "epochs": 1} | options))


def test_a_rate_beside_the_grid_is_refused():
    with pytest.raises(ValueError, match="the grid is"):
        Sweep((0.1,), ((1.0,),), ((1.0,),)).at(0.2)


def test_the_lesson_picks_the_best_other_activation_by_held_out_digits():
    lesson = Path(__file__).parent.parent / "notebooks" / "01b_more.ipynb"
    cells = json.loads(lesson.read_text(encoding="utf-8"))["cells"]
    (source,) = ("".join(c["source"]) for c in cells if "best = max(" in "".join(c["source"]))
    names = ("none (raw logits)", "tanh", "ReLU", "sigmoid", "softmax")
    kept = dict(zip(names, (99.0, 80.0, 90.0, 70.0, 60.0), strict=True))
    found = {name: Sweep((0.01,), ((kept[name],),), ((100.0 - kept[name],),)) for name in names}
    picks = [node for node in ast.parse(source).body if isinstance(node, ast.Assign)][-2:]
    values = {"found": found}
    exec(compile(ast.Module(picks, []), "01b_more", "exec"), values)
    assert values["best"] is found["ReLU"], "tanh and sigmoid are better on the test digits"


def test_what_is_lost_is_the_mean_over_seeds_at_one_rate_or_at_each_sides_best():
    weak = Sweep((0.1, 1.0), ((50.0, 50.0), (80.0, 80.0)), ((40.0, 50.0), (81.0, 83.0)))
    strong = Sweep((0.1, 1.0), ((90.0, 90.0), (10.0, 10.0)), ((88.0, 90.0), (20.0, 10.0)))
    assert weak.lost(strong).value == pytest.approx((88 - 81 + 90 - 83) / 2)
    assert weak.lost(strong, rate=0.1).value == pytest.approx((88 - 40 + 90 - 50) / 2)
    assert weak.lost(strong, rate=1.0).value == pytest.approx((20 - 81 + 10 - 83) / 2)
    with pytest.raises(ValueError, match="the grid is"):
        weak.lost(strong, rate=0.2)
