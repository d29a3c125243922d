"""What does a backend lose of the model's accuracy? Both are run on the same test data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dlhelpers.quantization.batches import Batch
from dlhelpers.trees import tensors_in

__all__ = ["Accuracy", "Test", "accuracy_in_batches", "accuracy_of"]

Test = tuple[Tensor, Tensor] | Callable[[nn.Module], float]


@dataclass(frozen=True)
class Accuracy:
    """The test that a backend has to pass.

    Attributes:
        of: a model -> its accuracy.
        wanted: of the model as it was given.
        max_drop: what a backend may lose of it.
    """

    of: Callable[[Any], float]
    wanted: float
    max_drop: float

    def lost(self, found: float) -> str:
        """Return why a backend of this accuracy is refused; empty where it is not."""
        if found >= self.wanted - self.max_drop - 1e-9:
            return ""
        return (
            f"accuracy {found:.1%} is more than max_drop={self.max_drop:g} below "
            f"the model's {self.wanted:.1%}"
        )


def accuracy_of(model: nn.Module, test: Test, batch: Batch, max_drop: float) -> Accuracy:
    """Return the test for the backends, with the accuracy of the model as it was given.

    Args:
        model: in eval mode.
        test: (inputs [N, ...], class numbers [N]), or a function from a model to a number.
        batch: whose size the inputs are given in.
        max_drop: what a backend may lose of it.

    Raises:
        TypeError: test is neither, or inputs and class numbers are no tensors.
        ValueError: inputs and targets are not equally many, targets are not [N], the output is no
            tensor [N, C], or the function returns no finite number.
    """
    if callable(test):
        found = _number(test(model))
        if not math.isfinite(found):
            raise ValueError(f"test must return a finite number for a model, got {found!r}")
        return Accuracy(lambda backend: _number(test(backend)), found, max_drop)
    if not isinstance(test, tuple | list) or len(test) != 2:
        raise TypeError(
            "test must be (inputs, class numbers), two tensors, or a function that takes a model "
            f"and returns its accuracy, got {type(test).__name__}"
        )
    for name, part in zip(("inputs", "class numbers"), test, strict=True):
        if not isinstance(part, Tensor):
            cure = "from_numpy" if type(part).__module__ == "numpy" else "as_tensor"
            raise TypeError(
                f"test's {name} must be a tensor, got {type(part).__name__}: "
                f"torch.{cure}(...) makes one of it"
            )
    measured = partial(accuracy_in_batches, test=test, batch=batch)
    return Accuracy(measured, measured(model), max_drop)


def _number(found: Any) -> float:
    try:
        return float(found)
    except (TypeError, ValueError) as error:
        raise ValueError(f"test must return a finite number for a model, got {found!r}") from error


def accuracy_in_batches(model: nn.Module, test: tuple[Tensor, Tensor], batch: Batch) -> float:
    """Return the accuracy on (inputs, class numbers), in batches of the given one's size."""
    inputs, targets = test
    if len(inputs) != len(targets) or not len(inputs):
        raise ValueError(
            f"test must hold as many targets as inputs, got {len(inputs)} and {len(targets)}"
        )
    size = next(len(t) for t in tensors_in(batch))
    right = 0
    with torch.no_grad():
        for x, y in zip(inputs.split(size), targets.split(size), strict=True):
            output = _filled_up(model, x, size)
            if not isinstance(output, Tensor) or output.dim() != 2:
                found = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
                raise ValueError(
                    f"test needs a model whose output is one tensor [N, C], got {found}: give a "
                    "function that takes the model and returns its accuracy"
                )
            if y.shape != output.shape[:1]:  # [N, 1] would be compared with every sample
                raise ValueError(
                    "test's targets must be class numbers [N], one for each sample, got "
                    f"{list(targets.shape)}"
                )
            right += int((output.argmax(dim=1) == y).sum())
    return right / len(inputs)


def _filled_up(model: nn.Module, x: Tensor, size: int) -> Any:
    """Return the output for fewer samples than a batch, of which a backend may take no other."""
    try:
        return model(x)
    except Exception:
        if len(x) == size:
            raise
        return model(torch.cat((x, x[:1].expand(size - len(x), *x.shape[1:]))))[: len(x)]
