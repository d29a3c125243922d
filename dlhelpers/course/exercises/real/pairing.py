"""Real exercise of notebook 01: a training set-up that is broken, repaired until it learns."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dlhelpers import pairing
from dlhelpers.course.data import digits
from dlhelpers.course.exercises.real.tasks import Reached, RefusedError, Task, given
from dlhelpers.course.training import fit

__all__ = ["TASK", "Setup"]

_GOAL = 80.0  # % of the error of guessing that has to go
_HELD_OUT = 5  # one sample of so many


@dataclass(frozen=True)
class Setup:
    """What a training loop is given.

    Attributes:
        model: inputs -> outputs.
        loss: (outputs, targets) -> one number; a module of ``torch.nn``.
        inputs: [N, ...].
        targets: class numbers [N], truth values or numbers, [N] or [N, 1].
    """

    model: nn.Module
    loss: nn.Module
    inputs: Tensor
    targets: Tensor


def _network(outputs: int, *last: nn.Module) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first = nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, outputs)
        return nn.Sequential(*first, *last)


def of_digits() -> Setup:
    """Return a classifier of ten digits."""
    return Setup(_network(10, nn.Softmax(dim=1)), nn.CrossEntropyLoss(), *digits("all"))


def of_odd_digits() -> Setup:
    """Return a decision: is the digit odd?"""
    images, labels = digits("all")
    model = _network(1, nn.Sigmoid(), nn.Flatten(0))
    return Setup(model, nn.BCEWithLogitsLoss(), images, (labels % 2).float())


def of_ink() -> Setup:
    """Return a regression: how much ink does the digit's lower half hold?"""
    images, _ = digits("all")
    ink = images[:, 0, 4:].mean((1, 2))
    return Setup(_network(1), nn.MSELoss(), images, (ink - ink.mean()) / ink.std())


def of_probabilities() -> Setup:
    """Return a classifier that hands out probabilities."""
    return Setup(_network(10, nn.Softmax(dim=1)), nn.NLLLoss(), *digits("all"))


def repaired(setup: Setup) -> Setup:
    """Return one of the four offered set-ups with the last activation that its loss wants."""
    if isinstance(setup.loss, nn.MSELoss):
        return replace(setup, targets=setup.targets[:, None])
    layers = [one for one in setup.model if not isinstance(one, nn.Softmax | nn.Sigmoid)]
    if isinstance(setup.loss, nn.NLLLoss):
        layers.append(nn.LogSoftmax(dim=1))
    return replace(setup, model=nn.Sequential(*layers))


def _measure(make: Callable[[], Any], answer: Callable[..., Any]) -> Reached:
    old = make()
    if not pairing.check(old.model, old.loss, old.targets, old.inputs):
        raise RefusedError("pairing.check finds nothing in this set-up: take one that is broken")
    new = given(answer, copy.deepcopy(old))
    if not isinstance(new, Setup):
        raise RefusedError(f"the answer must be a Setup, got {type(new).__name__}")
    if not type(new.loss).__module__.startswith("torch.nn."):
        raise RefusedError(f"the loss must be a module of torch.nn, got {type(new.loss).__name__}")
    same = new.targets.numel() == old.targets.numel() and bool(
        (new.targets.flatten().double() == old.targets.flatten().double()).all()
    )
    if not same or not torch.equal(new.inputs, old.inputs):
        raise RefusedError("inputs and targets must keep their values: shape and type may change")
    if found := pairing.check(new.model, new.loss, new.targets, new.inputs):
        raise RefusedError(f"pairing.check still finds {found[0].name}: {found[0].what}")
    error, guessing = _errors(old, new)
    gone = 100 * (1 - error / guessing)
    return Reached(
        gone,
        f"% of the error of guessing is gone on held-out data (goal: {_GOAL:g} or more)",
        passed=gone >= _GOAL,
        advice="train it by hand and print outputs beside targets: can the last layer give every "
        "target, and does the loss still fall?",
    )


def _errors(old: Setup, new: Setup) -> tuple[float, float]:
    """Train on four fifths; return the error on the last fifth and that of the best constant."""
    held = torch.arange(len(new.inputs)) % _HELD_OUT == 0
    model = copy.deepcopy(new.model)
    data = new.inputs[~held], new.targets[~held]
    fit(model, new.loss, data, epochs=20, lr=0.01, optimizer="adam", progress=False)
    with torch.no_grad():
        outputs = model.eval()(new.inputs[held])
    wanted, known = old.targets[held].flatten(), old.targets[~held].flatten()
    if not old.targets.is_floating_point():  # class numbers
        if outputs.dim() != 2 or len(outputs) != len(wanted):
            raise RefusedError(f"class numbers need outputs [N, C], got {list(outputs.shape)}")
        return _wrong(outputs.argmax(1), wanted), _wrong(known.mode()[0], wanted)
    if outputs.numel() != len(wanted):
        raise RefusedError(f"{len(wanted)} targets need one output each, got {list(outputs.shape)}")
    outputs = outputs.flatten()
    if set(old.targets.unique().tolist()) <= {0.0, 1.0}:  # truth values
        threshold = 0.0 if isinstance(new.loss, nn.BCEWithLogitsLoss) else 0.5
        return _wrong(outputs > threshold, wanted.bool()), _wrong(known.mode()[0], wanted)
    return float((outputs - wanted).square().mean()), float((known.mean() - wanted).square().mean())


def _wrong(found: Tensor, wanted: Tensor) -> float:
    return float((found != wanted).float().mean())


TASK = Task(
    id="01",
    goal="pairing.check finds nothing, and at least 80% of the error of guessing goes",
    offered={
        "digits": of_digits,
        "odd digits": of_odd_digits,
        "ink": of_ink,
        "probabilities": of_probabilities,
    },
    own="a Setup(model, loss, inputs, targets)",
    measure=_measure,
    rubric=(
        "what the loss takes its input for, and what it was given instead",
        "what that did: to the smallest loss that can be reached, to the gradient, or to the "
        "predictions",
        "why nobody saw it: which error message did not come, which curve looked right",
    ),
    explanation="The loss applies its own log-softmax to what it is given, and was given "
    "probabilities, so that it saw logits between 0 and 1. Even a perfect output kept a loss well "
    "above 0, and the gradient was weak where the model was sure and wrong. No shape or type was "
    "wrong, the loss fell a little and the largest output was often the right one, so nothing "
    "raised an error.",
    solution=repaired,
)
