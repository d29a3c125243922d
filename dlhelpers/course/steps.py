"""Which training steps does the lesson on memory weigh, and what do their tricks change?

Chains of equal blocks, whose activations outweigh their parameters, and a wide network where it
is the other way round; the bytes of a step of theirs, and its gradients.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dlhelpers.course import data
from dlhelpers.memory import MemoryReport, measure_peak

__all__ = [
    "block",
    "chain",
    "differing",
    "inputs",
    "same_gradient",
    "steady_step",
    "training_bytes",
    "wide",
]

Context = AbstractContextManager[Any]
_Op = Callable[[Tensor], Tensor]


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Return eight digits as pixels [8, 64], as images [8, 1, 32, 32], and their classes [8]."""
    digits, classes = data.digits()
    images = F.interpolate(digits[:8], scale_factor=4)
    return digits[:8].flatten(1).clone(), images, classes[:8].clone()


def block(activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """Return convolution, BatchNorm and activation: [N, 16, H, W] -> [N, 16, H, W]."""
    return nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), activation())


def chain(blocks: int, make: Callable[[], nn.Module] = block) -> nn.Sequential:
    """Return a convolution, equal blocks and a head: images [N, 1, H, W] -> logits [N, 10]."""
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)]
    return nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), *(make() for _ in range(blocks)), *head)


def wide() -> nn.Sequential:
    """Return six linear layers, five of them 512 wide: pixels [N, 64] -> logits [N, 10]."""
    first, *others = (nn.Linear(512 if i else 64, 512) for i in range(5))
    return nn.Sequential(first, nn.ReLU(), *others, nn.Linear(512, 10))


def training_bytes(
    model: nn.Module, images: Tensor, labels: Tensor, *, within: Context | None = None
) -> int:
    """Return the most bytes of tensors alive in forward, cross-entropy and backward.

    Gradients are dropped before, and there is no optimizer.

    Args:
        model: images -> logits.
        images: what it takes.
        labels: class numbers [N].
        within: what the forward pass runs in, such as ``torch.autocast("cpu", torch.bfloat16)``.

    >>> pixels, _, labels = inputs()
    >>> training_bytes(wide(), pixels, labels) > 2 * sum(4 * p.numel() for p in wide().parameters())
    True
    """
    model.zero_grad()

    def step() -> None:
        with within or nullcontext():
            loss = F.cross_entropy(model(images), labels)
        loss.backward()

    return measure_peak(step).tensor_bytes


def steady_step(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    optimizer: torch.optim.Optimizer,
    *,
    within: Context | None = None,
    set_to_none: bool = True,
) -> MemoryReport:
    """Measure a training step with an optimizer, after one that has made the optimizer's state.

    Logits and loss are held to its end, as in most loops.

    Args:
        model: images -> logits; trained by two steps.
        images: what it takes.
        labels: class numbers [N].
        optimizer: over the model's parameters.
        within: what the forward pass runs in, such as ``torch.autocast("cpu", torch.bfloat16)``.
        set_to_none: how the step drops the gradients of the step before.
    """

    def step() -> None:
        optimizer.zero_grad(set_to_none=set_to_none)
        with within or nullcontext():
            outputs = model(images)
            loss = F.cross_entropy(outputs, labels)
        loss.backward()
        optimizer.step()

    step()
    optimizer.zero_grad(set_to_none=set_to_none)
    return measure_peak(step)


def differing(
    model: nn.Module, rewritten: Callable[[nn.Module], _Op], images: Tensor, labels: Tensor
) -> int:
    """Count the gradients, buffers and random states that a rewritten step leaves different.

    Args:
        model: where both steps start; untouched.
        rewritten: model -> its forward pass in another form, such as a checkpointed one.
        images: what the model takes.
        labels: class numbers [N].

    >>> _, images, labels = inputs()
    >>> differing(chain(1), lambda model: model, images, labels)
    0
    """

    def after_a_step(model: nn.Module, forward: _Op) -> list[Tensor]:
        torch.manual_seed(0)
        F.cross_entropy(forward(images), labels).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        return [*gradients, *model.buffers(), torch.get_rng_state()]

    with torch.random.fork_rng(devices=[]):
        plain, other = copy.deepcopy(model), copy.deepcopy(model)
        pairs = zip(after_a_step(plain, plain), after_a_step(other, rewritten(other)), strict=True)
        return sum(not torch.equal(one, two) for one, two in pairs)


def same_gradient(before: _Op, plain: _Op, in_place: _Op) -> bool:
    """Whether backward runs through an in-place form and gives the gradient of the plain one.

    Args:
        before: what comes before it, applied to nine numbers that need a gradient.
        plain: the operation, out of place.
        in_place: the same, in place.

    >>> same_gradient(torch.sin, torch.relu, torch.relu_)
    True
    """
    found = []
    for operation in (plain, in_place):
        x = torch.linspace(-1, 1, 9, requires_grad=True)
        try:
            operation(before(x)).sum().backward()
        except RuntimeError:  # autograd refuses
            return False
        found.append(x.grad)
    return torch.equal(*found)
