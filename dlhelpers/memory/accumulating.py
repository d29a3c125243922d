"""How do I train with a batch too large for the memory? In micro-batches, with one step for all.

The gradient of a mean over N samples is the weighted sum of its micro-batches' gradients:

    grad (1/N) sum_j loss_j  =  sum_i (n_i / N) grad mean_i,      N = sum_i n_i

so each mean loss weighs n_i / N (1 / k only where all k are equally large), and each summed loss 1.
n_i is what the loss divides by: samples, targets that are not ignored, or their class weights. Its
graph says so after forward (``divisors``), so that N is known before the last backward alone: until
then it is expected in proportion to the samples, and before the last backward the gradients are
multiplied by what it was expected to be over what it is.

Forward and backward run for one micro-batch before the next: k forwards before one backward would
keep k graphs alive, as many bytes as the whole batch. What mixes the samples of a batch (BatchNorm
in train mode) has no such sum.

Source: PyTorch documentation, Automatic Mixed Precision examples, Gradient accumulation; Ott et
al. 2018, arXiv:1806.00187.
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import chain, islice
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from dlhelpers.memory.sharing import Shares, nothing_in, synchronized_in, unsynchronized
from dlhelpers.memory.splitting import is_one_batch, part_sizes, samples_in, split

__all__ = ["Micro", "accumulate"]


@dataclass(eq=False)
class Micro:
    """One micro-batch of a group; the group ends in one step.

    Attributes:
        batch: nested as the whole batch was; or one batch of the loader.
        weight: what ``backward`` multiplies the loss by; before it, what is expected.
        index: place in its group, from 0.
        of: micro-batches in its group.
    """

    batch: Any = field(repr=False)
    weight: float
    index: int
    of: int
    _shares: Shares = field(repr=False)
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
            loss: one number, mean or sum.

        Returns:
            The weighted loss without its graph; over a group they sum to the whole batch's loss
            (the last one corrects for what the earlier ones could not know). A mean over nothing
            (weight 0) is taken as 0, and nothing is propagated.

        Raises:
            ValueError: the loss is not a tensor of one number, or no micro-batch of the group has
                anything to take a mean over.
            RuntimeError: called twice; or the gradients of a sharded model have to be corrected.
        """
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
            raise ValueError(f"the loss must be one number, a tensor: take its mean; got {got}")
        if self._went_backward:
            raise RuntimeError("micro.backward was called twice: add the losses, then call it once")
        if self._inspects and (name := _batch_norm_in_training(loss.grad_fn)):
            _warn(
                f"BatchNorm in train mode ({name}) takes mean and variance from the micro-batch, "
                "so the accumulated gradient is not that of the whole batch: use GroupNorm or "
                "LayerNorm, or freeze the statistics (.eval() on the BatchNorm layers)"
            )
        if problem := self._shares.look(loss, self.index):
            _warn(problem)
        self.weight = self._shares.weight(self.index)
        correction = self._shares.correct() if self.is_last else 0.0
        self._went_backward = True
        if self.weight or (self.is_last and self._shares.synchronizes):
            weighted = loss * self.weight
            (weighted if self._scaler is None else self._scaler.scale(weighted)).backward()
        # 0 times NaN would be NaN
        value = loss.detach() * self.weight if self.weight else torch.zeros_like(loss.detach())
        return self._shares.returned(value + correction)


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=3)


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
    batch: Any,
    steps: int = 4,
    *,
    count: Callable[[Any], int | float | Tensor] | None = None,
    reduction: str = "mean",
    model: nn.Module | None = None,
    scaler: GradScaler | None = None,
    scheduler: Any = None,
) -> Iterator[Micro]:
    """Yield micro-batches; after each group of them make one step, that of the whole batch.

    Gradients are None before a group; the step is made when the loop asks for more after
    ``is_last``. A loop that is left early (break, error) makes no step and leaves no gradients; a
    UserWarning says so where a whole group is lost. What the loss divides by is read from its
    graph: class weights, ``ignore_index`` and masks are exact. Where it cannot be read (a compiled
    loss, a root, a ratio of two sums, two means over different things), a UserWarning says so. So
    it does for BatchNorm in train mode, which mixes the samples, but for a compiled model. A loss
    that compares the samples of a batch with each other (contrastive ones) is not exact either.

    A term of the parameters alone (a penalty, a divergence from a prior) is exact beside a mean.
    Beside a sum it is added once per micro-batch: write ``loss + penalty / micro.of``; a
    UserWarning says so. Where divisors differ from what was expected, only the gradients of this
    optimizer's parameters are corrected: give one optimizer over all that the loss trains.

    Args:
        optimizer: over the model's parameters.
        batch: a tensor [N, ...], or tuples, mappings and dataclasses of such, nested (lists in
            them as well), is split into ``steps`` parts, with lists and arrays of N entries;
            anything else in it goes to every micro-batch as it is. A loader or a list is a
            sequence of batches, ``steps`` to a group, the last group with what is left. Give a list
            of N tensors [N, ...] as a tensor where they are samples, as a tuple where columns.
        steps: micro-batches to a step.
        count: micro-batch -> what its loss is a mean over, as targets not -100; the graph is then
            not read. With ``reduction="sum"`` sums are divided by the group's count.
        reduction: ``mean`` or ``sum``: what the loss does over its micro-batch. A sum is the whole
            batch's sum, and so is one divided by a number that belongs to the whole batch.
        model: where it is wrapped (DDP, FSDP) or has wrapped parts, gradients are synchronized in
            the last backward of a group only. A mean is then one over the samples of its rank.
        scaler: scales the loss and makes the step; clip after ``scaler.unscale_(optimizer)``.
        scheduler: of the learning rate, stepped after each step that the optimizer makes, not
            after one that the scaler skips; a step of the scheduler at ``is_last`` would come too
            early.

    Raises:
        TypeError: not an optimizer, not a batch, or not a model.
        ValueError: bad steps or reduction; N differs or is less than steps; nothing to count.
        RuntimeError: in the loop, where ``micro.backward`` was forgotten.

    Cost: a loader's batches are fetched a group at a time, as the group's size must be known before
    the first backward: so many are in memory, and a loader that shall work ahead needs
    ``num_workers * prefetch_factor`` of as many. On a GPU, reading a divisor that is a tensor waits
    for the forward; ``count`` of what is on the CPU does not.

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
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if is_one_batch(batch):
        many = split(batch, int(steps))
        sizes = part_sizes(samples_in(batch) or 0, int(steps))
        groups = _groups(many, int(steps), count or (lambda _: next(sizes)))
    else:
        groups = _groups(_batches(batch), int(steps), count)
    first = next(groups, None)  # fetched here, so that a bad batch fails at the call
    if first is None:
        raise ValueError(f"no batch in this {type(batch).__name__}: empty, or read to its end")
    kind = reduction if count is None else f"counted {reduction}"
    shares = Shares(optimizer, kind, synchronized_in(model))
    return _loop(optimizer, chain([first], groups), shares, scaler, scheduler)


def _batches(batches: Any) -> Iterator[Any]:
    if not isinstance(batches, Iterable):
        raise TypeError(f"batch must be tensors, a loader or list, got {type(batches).__name__}")
    tensors = [e for e in batches if isinstance(e, Tensor)] if isinstance(batches, list) else []
    if len({(entry.dtype, entry.dim()) for entry in tensors}) > 1:
        raise ValueError(
            "a list is many batches, but its tensors differ in dtype or dimensions: "
            "give tuple(batch) where it is one batch, as a DataLoader gives it"
        )
    return iter(batches)


def _groups(
    micro_batches: Iterator[Any], steps: int, count: Callable[[Any], Any] | None
) -> Iterator[tuple[deque[Any], list[float]]]:
    """Up to ``steps`` micro-batches at a time, with their counts."""
    while batches := list(islice(micro_batches, steps)):
        counts = [_counted(count(batch)) if count else _samples(batch) for batch in batches]
        if not sum(counts):
            raise ValueError(nothing_in(len(counts)))
        group = deque(batches)
        del batches  # the loop alone holds them, and drops each after its turn
        yield group, counts


def _samples(micro_batch: Any) -> int:
    if (number := samples_in(micro_batch)) is not None:
        return number
    kind = type(micro_batch).__name__
    raise ValueError(f"no tensor [N, ...] in a batch ({kind}): accumulate(..., count=its samples)")


def _counted(number: Any) -> Any:
    value = number.item() if isinstance(number, Tensor) and number.numel() == 1 else number
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value < math.inf:
        raise ValueError(f"count must be a number >= 0, as (y != -100).sum(), got {value!r}")
    return value


def _loop(
    optimizer: Optimizer,
    groups: Iterator[tuple[deque[Any], list[float]]],
    shares: Shares,
    scaler: GradScaler | None,
    scheduler: Any,
) -> Iterator[Micro]:
    inspects, micro = True, None
    try:
        for group, counts in groups:
            optimizer.zero_grad(set_to_none=True)
            of = len(group)
            shares.begin(counts)
            for index in range(of):
                weight, inspects_it = shares.weight(index), inspects and of > 1
                micro = Micro(group.popleft(), weight, index, of, shares, scaler, inspects_it)
                inspects = False
                with nullcontext() if micro.is_last else unsynchronized(shares.synchronizes):
                    yield micro
                if not micro._went_backward:
                    raise RuntimeError(
                        f"micro-batch {index + 1} of {of} did not go backward: "
                        "call micro.backward(loss) in the loop, not loss.backward()"
                    )
            if _step(optimizer, scaler) and scheduler is not None:
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


def _step(optimizer: Optimizer, scaler: GradScaler | None) -> bool:
    """Make a step, and say whether the scaler let the optimizer make it."""
    if scaler is None:
        optimizer.step()
        return True
    made: list[None] = []
    hook = optimizer.register_step_post_hook(lambda *_: made.append(None))
    try:
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
    finally:
        hook.remove()
    # a fused optimizer is called, and leaves the parameters alone; the scale shrinks for both
    return bool(made) and scaler.get_scale() >= before
