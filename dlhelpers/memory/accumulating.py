"""How do I train with a batch too large for the memory? In micro-batches, with one step for all.

The gradient of a mean over N samples is the weighted sum of its micro-batches' gradients:

    grad (1/N) sum_j loss_j  =  sum_i (n_i / N) grad mean_i,      N = sum_i n_i

so each mean loss weighs n_i / N (1 / k only where all k are equally large), and each summed loss
1 / N. Forward and backward run for one micro-batch before the next: k forwards before one backward
would keep k graphs alive, as many bytes as the whole batch. What mixes the samples of a batch
(BatchNorm in train mode) has no such sum.

Source: PyTorch documentation, Automatic Mixed Precision examples, Gradient accumulation; Ott et
al. 2018, arXiv:1806.00187.
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from dlhelpers.fakes import tensors_in

__all__ = ["Micro", "accumulate"]


@dataclass(eq=False)
class Micro:
    """One micro-batch of a group; the group ends in one step.

    Attributes:
        batch: tensor, tuple or dict, as the whole batch was; or one batch of the loader.
        weight: what ``backward`` multiplies the loss by.
        index: place in its group, from 0.
        of: micro-batches in its group.
    """

    batch: Any = field(repr=False)
    weight: float
    index: int
    of: int
    _scaler: GradScaler | None = field(default=None, repr=False)
    _inspects: bool = field(default=False, repr=False)  # look for BatchNorm: once in a loop
    _went_backward: bool = field(default=False, init=False, repr=False)

    @property
    def is_last(self) -> bool:
        """Whether the step follows: after ``backward`` the gradient is complete, clip it here."""
        return self.index == self.of - 1

    def backward(self, loss: Tensor) -> Tensor:
        """Add the weighted gradient of this micro-batch's loss to the parameters'.

        Args:
            loss: one number, mean or sum as told to ``accumulate``.

        Returns:
            The weighted loss without its graph; over a group they sum to the whole batch's loss.
            A mean over nothing (weight 0) is taken as 0, and nothing is propagated.

        Raises:
            ValueError: the loss is not a tensor of one number.
            RuntimeError: called twice.
        """
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
            raise ValueError(f"the loss must be one number, a tensor: take its mean; got {got}")
        if self._went_backward:
            raise RuntimeError("micro.backward was called twice: add the losses, then call it once")
        self._went_backward = True
        if self._inspects and (name := _batch_norm_in_training(loss.grad_fn)):
            warnings.warn(
                f"BatchNorm in train mode ({name}) takes mean and variance from the micro-batch, "
                "so the accumulated gradient is not that of the whole batch: use GroupNorm or "
                "LayerNorm, or freeze the statistics (.eval() on the BatchNorm layers)",
                UserWarning,
                stacklevel=2,
            )
        if not self.weight:
            return torch.zeros_like(loss, requires_grad=False)  # 0 times NaN would be NaN
        weighted = loss * self.weight
        (weighted if self._scaler is None else self._scaler.scale(weighted)).backward()
        return weighted.detach()


def _batch_norm_in_training(node: Any) -> str | None:
    """Name a node that normalizes over the samples; a compiled graph hides it."""
    seen, waiting = {None}, [node]
    while waiting:
        if (node := waiting.pop()) in seen:
            continue
        seen.add(node)
        if "BatchNorm" in node.name() and getattr(node, "_saved_training", True):
            # the output's shape: to read the saved input would run the hooks of a checkpoint
            shape = node._input_metadata[0].shape
            # InstanceNorm is one of [1, N*C, ...] whose gamma, no leaf, is repeated N times
            leaves = [leaf for leaf, _ in node.next_functions[1:] if hasattr(leaf, "variable")]
            if shape[0] > 1 or leaves:
                return node.name()
        waiting += [source for source, _ in node.next_functions]
    return None


def accumulate(
    optimizer: Optimizer,
    batch: Tensor | tuple[Any, ...] | Mapping[str, Any] | Iterable[Any],
    steps: int = 4,
    *,
    count: Callable[[Any], int | float | Tensor] | None = None,
    reduction: str = "mean",
    scaler: GradScaler | None = None,
    scheduler: Any = None,
) -> Iterator[Micro]:
    """Yield micro-batches; after each group of them make one step, that of the whole batch.

    Gradients are None before a group; the step is made when the loop asks for more after
    ``is_last``. A loop that is left early (break, error) makes no step and leaves no gradients; a
    UserWarning says so where a whole group is lost. BatchNorm in train mode mixes the samples: not
    exact, and a UserWarning says so, but for a compiled model. A loss that compares the samples of
    a batch with each other (contrastive ones) is not exact either.

    Args:
        optimizer: over the model's parameters.
        batch: a tensor [N, ...], or a tuple or dict of such (anything else in it goes to every
            micro-batch as it is), is split into ``steps`` parts; a loader or a list is a sequence
            of batches, ``steps`` to a group, the last group with what is left.
        steps: micro-batches to a step.
        count: micro-batch -> what its loss is a mean over, as targets not -100; else its samples.
        reduction: ``mean`` or ``sum``: what the loss does over its micro-batch.
        scaler: scales the loss and makes the step; clip after ``scaler.unscale_(optimizer)``.
        scheduler: of the learning rate, stepped after each of the optimizer's steps; a step of the
            scheduler at ``is_last`` would come too early.

    Raises:
        TypeError: not an optimizer, or not a batch.
        ValueError: bad steps or reduction; N differs or is less than steps; nothing to count.
        RuntimeError: in the loop, where ``micro.backward`` was forgotten.

    Cost: a loader's batches are fetched a group at a time, as all counts must be known before the
    first backward: so many are in memory, and a loader that shall work ahead needs
    ``num_workers * prefetch_factor`` of as many.

    >>> model, loss = torch.nn.Linear(8, 2), torch.nn.functional.mse_loss
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> for micro in accumulate(optimizer, (torch.zeros(10, 8), torch.ones(10, 2)), steps=4):
    ...     inputs, targets = micro.batch
    ...     _ = micro.backward(loss(model(inputs), targets))
    >>> micro.index, micro.of, micro.is_last, micro.weight
    (3, 4, True, 0.2)
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be one of torch.optim, got {type(optimizer).__name__}")
    if isinstance(steps, bool) or not isinstance(steps, Integral) or steps < 1:
        raise ValueError(f"steps must be a whole number, 1 or more, got {steps!r}: steps=4")
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction must be "mean" or "sum", as the loss\'s, got {reduction!r}')
    groups = _groups(_micro_batches(batch, int(steps)), int(steps), count or _samples, reduction)
    first = next(groups, None)  # fetched here, so that a bad batch fails at the call
    if first is None:
        raise ValueError(f"no batch in this {type(batch).__name__}: empty, or read to its end")
    return _loop(optimizer, chain([first], groups), scaler, scheduler)


def _micro_batches(batch: Any, steps: int) -> Iterator[Any]:
    if isinstance(batch, Tensor):
        return (micro for (micro,) in _micro_batches((batch,), steps))
    if isinstance(batch, Mapping):
        parts = _micro_batches(tuple(batch.values()), steps)
        return (dict(zip(batch, part, strict=True)) for part in parts)
    if not isinstance(batch, Iterable):
        raise TypeError(f"batch must be tensors, a loader or list, got {type(batch).__name__}")
    if not isinstance(batch, tuple):
        tensors = [e for e in batch if isinstance(e, Tensor)] if isinstance(batch, list) else []
        if len({(entry.dtype, entry.dim()) for entry in tensors}) > 1:
            raise ValueError(
                "a list is many batches, but its tensors differ in dtype or dimensions: "
                "give tuple(batch) where it is one batch, as a DataLoader gives it"
            )
        return iter(batch)
    sizes = [len(entry) for entry in batch if _has_samples(entry)]
    if len(set(sizes)) != 1:
        raise ValueError(
            f"one batch has one first dimension N, got {sizes}; a list is many batches"
        )
    if sizes[0] < steps:
        raise ValueError(f"{sizes[0]} samples cannot make {steps} micro-batches: lower steps")
    columns = [e.tensor_split(steps) if _has_samples(e) else [e] * steps for e in batch]
    named = getattr(batch, "_make", tuple)  # a named tuple stays one
    return (named(row) for row in zip(*columns, strict=True))


def _has_samples(entry: Any) -> bool:
    return isinstance(entry, Tensor) and entry.dim() > 0


def _samples(micro_batch: Any) -> int:
    for tensor in filter(_has_samples, tensors_in(micro_batch)):
        return len(tensor)
    kind = type(micro_batch).__name__
    raise ValueError(f"no tensor [N, ...] in a batch ({kind}): accumulate(..., count=its samples)")


def _groups(
    micro_batches: Iterator[Any], steps: int, count: Callable[[Any], Any], reduction: str
) -> Iterator[deque[tuple[Any, float]]]:
    """Up to ``steps`` micro-batches at a time, with weights."""
    while batches := list(islice(micro_batches, steps)):
        counts = [_counted(count(batch)) for batch in batches]
        if not (total := sum(counts)):
            raise ValueError(f"{len(counts)} micro-batches count 0 in all: leave that group out")
        weights = [n / total if reduction == "mean" else 1 / total for n in counts]
        group = deque(zip(batches, weights, strict=True))
        del batches  # the loop alone holds them, and drops each after its turn
        yield group


def _counted(number: Any) -> Any:
    value = number.item() if isinstance(number, Tensor) and number.numel() == 1 else number
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value < math.inf:
        raise ValueError(f"count must be a number >= 0, as (y != -100).sum(), got {value!r}")
    return value


def _loop(
    optimizer: Optimizer,
    groups: Iterator[deque[tuple[Any, float]]],
    scaler: GradScaler | None,
    scheduler: Any,
) -> Iterator[Micro]:
    inspects, micro = True, None
    try:
        for group in groups:
            optimizer.zero_grad(set_to_none=True)
            of = len(group)
            for index in range(of):
                micro = Micro(*group.popleft(), index, of, scaler, inspects and of > 1)
                inspects = False
                yield micro
                if not micro._went_backward:
                    raise RuntimeError(
                        f"micro-batch {index + 1} of {of} did not go backward: "
                        "call micro.backward(loss) in the loop, not loss.backward()"
                    )
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            if scheduler is not None:
                scheduler.step()
    except BaseException as error:  # GeneratorExit: a break, or an error in the loop's body
        optimizer.zero_grad(set_to_none=True)
        is_whole = micro is not None and micro.is_last and micro._went_backward
        if is_whole and isinstance(error, GeneratorExit):
            warnings.warn(
                "the loop over accumulate was left after the last backward of a group, before its "
                "step: leave it at the next group's index 0, where the step is made",
                UserWarning,
                stacklevel=2,
            )
        raise
