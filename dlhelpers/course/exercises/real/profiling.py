"""Real exercise of notebook 08: find the largest cost of a slow function and remove it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dlhelpers import measure
from dlhelpers.course.exercises.real.tasks import (
    Reached,
    RefusedError,
    Task,
    given,
    speedup_reached,
)
from dlhelpers.profiling import diagnose

__all__ = ["TASK"]

_GOAL = 5.0
Step = Callable[[], Tensor]


def _draws(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def _network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).eval()


def loop() -> Step:
    """Return a step that scores samples one by one."""
    model, samples = _network(), _draws(512, 64)

    def step() -> Tensor:
        scores = []
        with torch.no_grad():
            for sample in samples:
                scores.append(model(sample[None]).softmax(1)[0])
        return torch.stack(scores)

    return step


def normalise() -> Step:
    """Return a step that normalises images one by one before it scores them."""
    model, images = _network(), _draws(512, 8, 8)

    def step() -> Tensor:
        rows = []
        for image in images:
            centred = image - image.mean()
            rows.append((centred / centred.std()).flatten())
        with torch.no_grad():
            return model(torch.stack(rows))

    return step


def items() -> Step:
    """Return a step that counts right answers number by number."""
    model, samples = _network(), _draws(2048, 64)
    labels = torch.arange(2048) % 10

    def step() -> Tensor:
        with torch.no_grad():
            outputs = model(samples)
        right = 0
        for output, label in zip(outputs, labels, strict=True):
            right += output.argmax().item() == label.item()
        return torch.tensor(right / len(labels))

    return step


def distances() -> Step:
    """Return a step that compares each sample with each centre in turn."""
    samples, centres = _draws(256, 16), _draws(8, 16)

    def step() -> Tensor:
        nearest = []
        for sample in samples:
            far = [((sample - centre) ** 2).sum().item() for centre in centres]
            nearest.append(far.index(min(far)))
        return torch.tensor(nearest)

    return step


def faster(step: Step) -> Step:
    """Return one of the four offered steps on whole tensors; its data are in its closure."""
    names = step.__code__.co_freevars
    had = {name: cell.cell_contents for name, cell in zip(names, step.__closure__, strict=True)}
    model, samples = had.get("model"), had.get("samples")

    @torch.no_grad()
    def whole() -> Tensor:
        if "images" in had:
            rows = had["images"].flatten(1)
            centred = rows - rows.mean(1, keepdim=True)
            return model(centred / centred.std(1, keepdim=True))
        if "centres" in had:
            return (samples[:, None] - had["centres"]).square().sum(2).argmin(1)
        if "labels" in had:
            return (model(samples).argmax(1) == had["labels"]).float().mean()
        return model(samples).softmax(1)

    return whole


def _measure(make: Callable[[], Any], answer: Callable[..., Any]) -> Reached:
    old, handed_out = make(), make()
    new = given(answer, handed_out)
    if not callable(new):
        raise RefusedError(f"the answer must be a function, got {type(new).__name__}")
    _need_same(old(), new(), "the results differ: compare one step after the other with the old")
    for step in (old, handed_out):
        _turn_data_over(step)
    _need_same(old(), new(), "on other data the results differ: compute them at each call")

    def other_data() -> None:
        for step in (old, handed_out):
            _turn_data_over(step)

    compared = measure.compare(old, new, threshold=_GOAL, budget_s=4, setup=other_data)
    _need_same(old(), new(), "on other data the results differ: compute them at each call")
    reached = speedup_reached(compared, _GOAL, "")
    if reached.passed:
        return reached
    named = next(iter(diagnose(new, steps=3, progress=False)), None)
    advice = f"diagnose names {named.name}: {named.what}" if named else (
        "diagnose finds no more in it; profile_lines(f, f) shows which line takes the time"
    )  # fmt: skip
    return speedup_reached(compared, _GOAL, advice)


def _need_same(wanted: Tensor, found: Any, message: str) -> None:
    if not isinstance(found, Tensor) or found.shape != wanted.shape:
        shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise RefusedError(f"the result must be a tensor {list(wanted.shape)}, got {shape}")
    if not torch.allclose(found.double(), wanted.double(), rtol=1e-4, atol=1e-5):
        raise RefusedError(message)


def _turn_data_over(step: Step) -> None:
    """Move the data that a step has in its closure, in place."""
    for cell in getattr(step, "__closure__", None) or ():
        data = cell.cell_contents
        if isinstance(data, Tensor) and data.dim() and not data.requires_grad:
            data.copy_(data.roll(1, 0))


TASK = Task(
    id="08",
    goal="at least 5 times as fast with the same results",
    offered={"loop": loop, "normalise": normalise, "items": items, "distances": distances},
    own="a function without arguments that returns a tensor, the same one at each call",
    measure=_measure,
    rubric=(
        "what the profile named, with its share of the time",
        "what that share allows at most (Amdahl's law), and how near the measured speedup comes",
        "why the results are the same, and what is the largest cost now",
    ),
    explanation="diagnose named the Python loop: each operator worked on a single sample, so "
    "nearly all of the time went into calling operators and hardly any into arithmetic. On whole "
    "tensors the same arithmetic takes a few calls, so what remains is about the share that the "
    "profile did not give to the loop. The sums are the same to within rounding, and the largest "
    "cost is now the matrix product.",
    solution=faster,
)
