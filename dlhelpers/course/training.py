"""How well does a small network learn with this loss? A training loop that repeats bit for bit.

theta <- theta - lr * d loss / d theta, over shuffled batches; the order of the batches comes from
the seed given, on a fork of torch's random state, so that the caller's is neither read nor moved.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dlhelpers.progress import bar

__all__ = ["History", "accuracy", "digits_mlp", "fit", "seed_everything"]

Loss = Callable[[Tensor, Tensor], Tensor]
_OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}


@dataclass(frozen=True)
class History:
    """What one training run left behind.

    Attributes:
        step_loss: loss of every batch, before its step.
        epoch_loss: mean loss of every epoch.
        diverged_at: number of the step whose loss was not finite, where training stopped; else
            None.
        epoch_accuracy: after every epoch, on the validation data; empty without them.
        seconds: time taken; neither shown nor compared, as it differs from run to run.
    """

    step_loss: tuple[float, ...]
    epoch_loss: tuple[float, ...]
    diverged_at: int | None = None
    epoch_accuracy: tuple[float, ...] = ()
    seconds: float = field(default=0.0, repr=False, compare=False)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy (its global generator) and torch on every device.

    Raises:
        ValueError: the seed is negative or above 2**32 - 1, which NumPy refuses.
    """
    import numpy

    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must lie between 0 and 2**32 - 1, got {seed}")
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def digits_mlp(hidden: int = 32, classes: int = 10, seed: int = 0) -> nn.Sequential:
    """Return 64 pixels -> hidden ReLU units -> raw logits, the same weights for the same seed.

    >>> digits_mlp()(torch.zeros(5, 1, 8, 8)).shape
    torch.Size([5, 10])
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Flatten(), nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, classes)
        )


def fit(
    model: nn.Module,
    loss: Loss,
    data: Iterable[tuple[Tensor, Tensor]] | tuple[Tensor, Tensor],
    *,
    epochs: int = 1,
    lr: float = 0.1,
    optimizer: str | Callable[..., torch.optim.Optimizer] | torch.optim.Optimizer = "sgd",
    batch_size: int = 64,
    seed: int = 0,
    validate: tuple[Tensor, Tensor] | None = None,
    progress: bool | None = None,
) -> History:
    """Train a model in place; return the history of its loss.

    Two calls on equal models with equal arguments end in equal weights on the CPU, to the last
    bit, dropout included. A loss that is not finite stops the training and is recorded, not
    raised.

    Args:
        model: trained in train mode; the mode of every submodule is restored afterwards.
        loss: (model output, targets) -> scalar; a module or a function.
        data: (inputs [N, ...], targets [N, ...]), shuffled anew each epoch; or a loader of
            (inputs, targets) batches, which shuffles for itself.
        epochs: passes over the data.
        lr: learning rate; not used where an optimizer object is given.
        optimizer: ``sgd``, ``adam``, a class such as ``torch.optim.AdamW`` (called with the
            parameters and ``lr``), or an optimizer over the model's parameters.
        batch_size: for tensors.
        seed: of the batches' order and of dropout.
        validate: (inputs, class numbers), whose accuracy each epoch records.
        progress: a bar for runs longer than a second; None draws it in a terminal only, since
            in a notebook a bar stays in the stored output.

    Raises:
        ValueError: an unknown optimizer; epochs, batch_size or the tensors' lengths are off; the
            loss is not one number; or the loader gives no batches, as a generator does in its
            second epoch.

    >>> x, y = torch.randn(256, 64), torch.zeros(256).long()
    >>> history = fit(digits_mlp(), nn.CrossEntropyLoss(), (x, y), epochs=3)
    >>> history.epoch_loss[-1] < history.epoch_loss[0]
    True
    """
    if isinstance(optimizer, str):
        if optimizer not in _OPTIMIZERS:
            raise ValueError(f"optimizer {optimizer!r} is not one of {sorted(_OPTIMIZERS)}")
        optimizer = _OPTIMIZERS[optimizer]
    if not isinstance(optimizer, torch.optim.Optimizer):
        optimizer = optimizer(model.parameters(), lr=lr)
    if epochs < 1 or batch_size < 1:
        raise ValueError(
            f"epochs and batch_size must be 1 or more, got epochs={epochs}, batch_size={batch_size}"
        )
    steps: list[float] = []
    means: list[float] = []
    accuracies: list[float] = []
    start = time.perf_counter()

    def history(diverged_at: int | None = None) -> History:
        took = time.perf_counter() - start
        return History(tuple(steps), tuple(means), diverged_at, tuple(accuracies), took)

    with (
        _modes_kept(model),
        torch.random.fork_rng(),
        bar(range(epochs), progress=progress, leave=False, delay=1, unit="epoch") as shown,
    ):
        torch.manual_seed(seed)
        model.train()
        for epoch in shown:
            first = len(steps)
            for inputs, targets in _batches(data, batch_size):
                optimizer.zero_grad()
                value = _one_number(loss(model(inputs), targets))
                steps.append(value.item())
                if not math.isfinite(steps[-1]):
                    return history(diverged_at=len(steps) - 1)
                value.backward()
                optimizer.step()
            if len(steps) == first:
                raise ValueError(
                    f"the data gave no batch in epoch {epoch + 1} of {epochs}: give a DataLoader, "
                    "a list or tensors, which can be read again (a generator cannot)"
                )
            means.append(sum(steps[first:]) / (len(steps) - first))
            if validate is not None:
                accuracies.append(accuracy(model, *validate))
            shown.set_postfix_str(f"loss {means[-1]:.3f}", refresh=False)
    return history()


@contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    """Give every submodule back its own mode: a frozen BatchNorm in a training model stays so."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _one_number(loss: Tensor) -> Tensor:
    if loss.numel() != 1:
        raise ValueError(
            f"the loss must be one number a batch, got shape {tuple(loss.shape)}: "
            'take its mean, or reduction="mean"'
        )
    return loss


def _batches(data: Any, batch_size: int) -> Iterable[tuple[Tensor, Tensor]]:
    if not (isinstance(data, tuple | list) and len(data) == 2 and isinstance(data[0], Tensor)):
        return data
    inputs, targets = data
    if len(inputs) != len(targets) or not len(inputs):
        raise ValueError(
            f"inputs and targets must be equally many, at least one: got {len(inputs)} and "
            f"{len(targets)}"
        )
    order = torch.randperm(len(inputs))
    return ((inputs[i], targets[i]) for i in order.split(batch_size))


def accuracy(model: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    """Return the share of samples whose largest output is their class, in eval mode.

    Args:
        model: gives [N, C]; mode and gradients are left as they were.
        inputs: [N, ...].
        targets: int64 [N].

    Raises:
        ValueError: targets are not [N]; [N, 1] would be compared with every sample.
    """
    with _modes_kept(model), torch.no_grad():
        model.eval()
        predicted = model(inputs).argmax(dim=1)
    if predicted.shape != targets.shape:
        raise ValueError(
            f"targets must have shape {tuple(predicted.shape)}, one class number a sample, got "
            f"{tuple(targets.shape)}"
        )
    return (predicted == targets).double().mean().item()
