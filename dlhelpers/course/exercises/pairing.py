"""Exercises of notebook 01: a loss by hand, the floor, a fix, the choice, the decision."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from dlhelpers.course.exercises import Case, Exercise
from dlhelpers.course.exercises.watching import unseen

__all__ = ["EXERCISES"]


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean over the batch of log(sum of exp(z)) - z[target], logits [N, C], targets [N]."""
    chosen = logits.gather(1, targets[:, None]).squeeze(1)
    return (torch.logsumexp(logits, dim=1) - chosen).mean()


def _same_loss(logits: torch.Tensor, targets: list[int]) -> Callable[[Any], bool]:
    wanted = torch.tensor(targets)

    def test(f: Any) -> bool:
        expected = F.cross_entropy(logits.double(), wanted)
        return _close(f(logits.clone(), wanted.clone()), expected)

    return test


def _is_one_number(f: Any) -> bool:
    return torch.as_tensor(f(torch.zeros(4, 2), torch.tensor([0, 1, 0, 1]))).shape == ()


def floor(classes: int) -> float:
    """Cross-entropy of a one-hot vector read as logits: -log(e / (e + classes - 1))."""
    return math.log(1 + (classes - 1) / math.e)


def _floor_is(classes: int) -> Callable[[Any], bool]:
    def test(f: Any) -> bool:
        perfect = torch.eye(classes, dtype=torch.float64)[:1]
        return _close(f(classes), F.cross_entropy(perfect, torch.tensor([0])))

    return test


def without_softmax(model: nn.Sequential) -> nn.Sequential:
    """Return a copy without its last layer if that is a Softmax; the layers before stay."""
    layers = list(copy.deepcopy(model))
    if isinstance(layers[-1], nn.Softmax):
        layers.pop()
    return nn.Sequential(*layers)


def _model(*last: nn.Module, first: type[nn.Module] | None = None) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3), *last]
        return nn.Sequential(*([first()] if first else []), *layers)


def _inputs() -> torch.Tensor:
    return torch.linspace(-2, 2, 24).reshape(6, 4)


def _gives_logits(f: Any) -> bool:
    model = _model(nn.Softmax(dim=1))
    fixed = f(model)
    outputs = fixed(_inputs())
    wanted = model[:3](_inputs())
    # log-softmax in place of softmax is right too: its cross-entropy is the same
    return outputs.shape == wanted.shape and _close(outputs.log_softmax(1), wanted.log_softmax(1))


def _keeps_hidden_layers(f: Any) -> bool:
    fixed = f(_model(nn.Softmax(dim=1)))
    return any(isinstance(layer, nn.ReLU) for layer in fixed.modules()) and (
        sum(isinstance(layer, nn.Linear) for layer in fixed.modules()) == 2
    )


def _survives_large_logits(f: Any) -> bool:
    model = _model(nn.Softmax(dim=1))
    found, logits = f(model)(1e4 * _inputs()), model[:3](1e4 * _inputs())
    return _close(found.log_softmax(1), logits.log_softmax(1))


def _looks_at_the_last_layer(f: Any) -> bool:
    long, sound = _model(nn.Softmax(dim=1), first=nn.Flatten), _model(first=nn.Flatten)
    return all(
        _close(f(model)(_inputs()).log_softmax(1), model[:4](_inputs()).log_softmax(1))
        for model in (long, sound)
    )


def _leaves_the_original(f: Any) -> bool:
    model = _model(nn.Softmax(dim=1))
    before = model(_inputs())
    f(model)
    return len(model) == 4 and torch.equal(model(_inputs()), before)


def _leaves_sound_models(f: Any) -> bool:
    model = _model()
    return _close(f(model)(_inputs()), model(_inputs()))


def choose_loss(task: str) -> nn.Module:
    """Return the loss for a task and what the model's last layer emits."""
    return {
        "one of ten classes, raw logits": nn.CrossEntropyLoss(),
        "one of ten classes, log-probabilities": nn.NLLLoss(),
        "several labels at once, raw logits": nn.BCEWithLogitsLoss(),
        "yes or no, probability": nn.BCELoss(),
        "a house's price, no activation": nn.MSELoss(),
    }[task]


def _chosen(task: str, *allowed: type[nn.Module]) -> Callable[[Any], bool]:
    def test(f: Any) -> bool:
        loss = f(task)
        return (loss if isinstance(loss, type) else type(loss)) in allowed

    return test


def decide(logits: torch.Tensor) -> torch.Tensor:
    """Return True where the probability sigmoid(z) exceeds 0.5, that is where z > 0."""
    return logits > 0


def _decides(logits: list[float], wanted: list[bool]) -> Callable[[Any], bool]:
    def test(f: Any) -> bool:
        decision = torch.as_tensor(f(torch.tensor(logits)))
        return decision.shape == (len(wanted),) and decision.bool().tolist() == wanted

    return test


def _is_a_module(f: Any) -> bool:
    loss = f("a house's price, no activation")
    return issubclass(loss if isinstance(loss, type) else type(loss), nn.Module)


def _gives_truth_values(f: Any) -> bool:
    return torch.as_tensor(f(torch.tensor([-1.0, 1.0]))).dtype == torch.bool


def _close(a: Any, b: torch.Tensor) -> bool:
    a = torch.as_tensor(a, dtype=torch.float64).detach()
    return a.shape == b.shape and torch.allclose(a, b.double().detach(), rtol=1e-5, atol=1e-6)


EXERCISES = (
    Exercise(
        id="01.1",
        title="Cross-entropy by hand",
        task="Write cross_entropy(logits [N, C], targets [N]) without torch's own loss.",
        cases=(
            Case(
                "one number",
                "the loss of a batch is one number, a tensor of shape (): take the mean over the "
                "samples",
                _is_one_number,
            ),
            Case(
                "one sample",
                "for one sample the loss is log(sum of exp(z)) - z[target]: mind the sign and "
                "which logit is the target's",
                _same_loss(torch.tensor([[2.0, -1.0, 0.5]]), [2]),
            ),
            Case(
                "four samples",
                "the loss of a batch is the mean over its samples, and the sum of exp runs over "
                "the classes (dim 1), not over the batch",
                _same_loss(
                    torch.tensor([[2.0, 0.0], [1.0, 3.0], [0.0, 0.5], [4.0, 1.0]]), [0, 0, 1, 0]
                ),
            ),
            Case(
                "huge logits",
                "the loss is inf or nan: either exp(1000) overflowed, or a probability "
                "became 0 and its log infinite; torch.logsumexp(z, 1) - z[target] avoids both",
                _same_loss(torch.tensor([[1000.0, 0.0], [-1000.0, 0.0]]), [1, 1]),
            ),
        ),
        hints=(
            "loss = -log softmax(z)[target]; write the softmax out and the log turns the "
            "quotient into a difference.",
            "logits.gather(1, targets[:, None]) picks each row's own target logit.",
            "torch.logsumexp(logits, dim=1) survives huge logits.",
        ),
        solution=cross_entropy,
        by_hand=("dlhelpers.*", "torch.*cross_entropy*", "torch.*_loss*", "torch.*.kl_div"),
    ),
    Exercise(
        id="01.2",
        title="The floor (predict, then run)",
        task="Write floor(classes): CrossEntropyLoss of a softmax output that is perfect.",
        cases=(
            Case(
                "2 classes",
                "the loss reads the one-hot output as logits: the right class has logit 1, every "
                "other one 0; it is neither 0 nor the ln C of guessing",
                _floor_is(2),
            ),
            Case(
                "10 classes",
                "there are C - 1 wrong classes, each adding exp(0) = 1 to the sum",
                _floor_is(10),
            ),
            Case(
                "1000 classes",
                "the floor grows with the number of classes: use the argument, not 10",
                _floor_is(1000),
            ),
            unseen(*map(_floor_is, (3, 17, 47, 5000))),
        ),
        hints=(
            "Put logits (1, 0, 0, ..., 0) into -log softmax(z)[0].",
            "The sum of exponentials is e + (C - 1).",
        ),
        solution=floor,
        by_hand=("dlhelpers.*",),
    ),
    Exercise(
        id="01.3",
        title="Fix the model",
        task="Write without_softmax(model): an nn.Sequential that CrossEntropyLoss can use as it "
        "is.",
        cases=(
            Case(
                "what the loss sees",
                "the last layer is still a softmax (or something else changed the logits): the "
                "loss wants what comes out of the last Linear",
                _gives_logits,
            ),
            Case(
                "the hidden layers",
                "only the last activation has to go: the ReLU inside and both Linear layers stay",
                _keeps_hidden_layers,
            ),
            Case(
                "the original",
                "the model that was handed in was changed: build a new Sequential, or copy first",
                _leaves_the_original,
            ),
            Case(
                "large outputs",
                "the softmax is still in the model, with its logarithm taken afterwards: where a "
                "probability becomes 0 its log is infinite. Take the Softmax out",
                _survives_large_logits,
            ),
            Case(
                "a sound model",
                "this model had no softmax at its end, yet a layer was taken off: look at the "
                "last layer before you remove it",
                _leaves_sound_models,
            ),
            Case(
                "another number of layers",
                "a model with one layer more came out wrong, with a softmax at its end or without: "
                "look at the type of the last layer, model[-1], and not at how many layers there "
                "are",
                _looks_at_the_last_layer,
            ),
        ),
        hints=(
            "isinstance(model[-1], nn.Softmax) says whether there is anything to fix.",
            "model[:-1] is a new Sequential without the last layer.",
        ),
        solution=without_softmax,
        by_hand=("dlhelpers.*",),
    ),
    Exercise(
        id="01.4",
        title="Choose the loss",
        task="Write choose_loss(task): a loss of torch.nn for each of the five tasks.",
        cases=(
            Case(
                "a loss of torch.nn",
                "the answer for a price is neither a module nor a class of torch.nn: the task asks "
                "for the loss itself, such as nn.L1Loss(), not for its name or a function of "
                "torch.nn.functional",
                _is_a_module,
            ),
            Case(
                "one of ten classes, raw logits",
                "raw logits of exclusive classes belong to CrossEntropyLoss, which does the "
                "log-softmax itself",
                _chosen("one of ten classes, raw logits", nn.CrossEntropyLoss),
            ),
            Case(
                "one of ten classes, log-probabilities",
                "the log-softmax is done already: NLLLoss only picks (CrossEntropyLoss would do "
                "it twice, harmless and wasted)",
                _chosen("one of ten classes, log-probabilities", nn.NLLLoss, nn.CrossEntropyLoss),
            ),
            Case(
                "several labels at once, raw logits",
                "labels that do not exclude each other are ten yes-or-no questions: no softmax, "
                "and the logits are raw",
                _chosen(
                    "several labels at once, raw logits",
                    nn.BCEWithLogitsLoss,
                    nn.MultiLabelSoftMarginLoss,
                ),
            ),
            Case(
                "yes or no, probability",
                "the output is a probability already: the loss that applies a sigmoid of its own "
                "would do it twice",
                _chosen("yes or no, probability", nn.BCELoss),
            ),
            Case(
                "a house's price, no activation",
                "a price is a number, not a class: a regression loss",
                _chosen(
                    "a house's price, no activation",
                    nn.MSELoss,
                    nn.L1Loss,
                    nn.SmoothL1Loss,
                    nn.HuberLoss,
                ),
            ),
        ),
        hints=(
            "Ask two things: do the classes exclude each other, and has the activation been "
            "applied already?",
            "'WithLogits' in a name means: give it raw numbers.",
        ),
        solution=choose_loss,
        by_hand=("dlhelpers.*",),
    ),
    Exercise(
        id="01.5",
        title="From logits to a decision",
        task="Write decide(logits [N]): True where the probability of yes exceeds one half.",
        cases=(
            Case(
                "clear cases",
                "a positive logit means yes, a negative one no",
                _decides([-3.0, 3.0], [False, True]),
            ),
            Case(
                "a small positive logit",
                "0.2 is a logit, not a probability: sigmoid(0.2) = 0.55, so the answer is yes",
                _decides([0.2, 0.4], [True, True]),
            ),
            Case(
                "a small negative logit",
                "after a sigmoid taken twice every number exceeds 0.5: one sigmoid, or none and "
                "a comparison with 0",
                _decides([-0.2, -4.0], [False, False]),
            ),
            Case(
                "truth values",
                "the answer should be a tensor of truth values, dtype torch.bool",
                _gives_truth_values,
            ),
            Case(
                "near one half",
                "the logit 0 is a probability of exactly one half, which does not exceed it: "
                "False; the logit 0.001 is a little more: True. The threshold is 0 and no other "
                "number, with > and not >=",
                _decides([0.0, 0.001, -0.001, 0.05], [False, True, False, True]),
            ),
        ),
        hints=(
            "Where does sigmoid(z) cross 0.5?",
            "No sigmoid is needed to compare.",
        ),
        solution=decide,
        by_hand=("dlhelpers.*",),
    ),
)
