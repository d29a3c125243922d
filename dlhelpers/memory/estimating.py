"""How many bytes will a training step need? The step is played through without memory.

Fake tensors have shapes and no data. Of each operator the shapes that it would make are known, of
each storage birth and death, so

    peak = max over operators of (storages alive + bytes inside the kernel)

Source: PyTorch documentation, torch.compiler: Fake tensor.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from dlhelpers.memory.accounting import BEFORE, Accounting, Op, Storage, tensors_in
from dlhelpers.memory.allocator import CpuRecord, CudaRecord
from dlhelpers.memory.report import MemoryReport, by_kind, report_of
from dlhelpers.memory.scratch import Scratch, call_of

__all__ = ["estimate"]


def estimate(
    model: nn.Module,
    inputs: Any,
    optimizer: Optimizer | Callable[..., Optimizer] | None,
    *,
    loss: Callable[[Any], Tensor] | None = None,
    dtype: torch.dtype | None = None,
    checkpoint: int | None = None,
) -> MemoryReport:
    """Predict the peak of a training step without running it.

    The step is a later one: the optimizer's state exists, gradients are None at its start. Neither
    model, inputs nor optimizer are touched, and none needs memory: they may be of device ``meta``.

    Args:
        model: in the mode, on the device and with the weights' types that it will train with.
        inputs: a tensor, or a tuple of positional arguments (tensors, nested or not).
        optimizer: over the model's parameters, whether or not it ever stepped; or what makes one of
            parameters, such as ``torch.optim.AdamW``; None for forward and backward alone.
        loss: model output -> scalar; None for cross-entropy over the classes in dimension 1 of the
            first tensor in the output.
        dtype: of ``torch.autocast`` around model and loss; None for no autocast.
        checkpoint: segments of ``checkpoint_blocks``; None for no checkpointing.

    Returns:
        The report of ``measure_peak`` in advance. Where a kernel's own buffers can decide the peak,
        that one operator is run, once for each shape and machine; on a machine without the model's
        device they count as nothing, and a note says so.

    Raises:
        ValueError: the size of a tensor depends on data, or the optimizer wants a closure.
        TypeError: the inputs hold no tensor, or the optimizer is none.

    Cost: about a second for a network of a hundred layers, whatever its batch.

    >>> model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    >>> report = estimate(model, torch.zeros(32, 64), torch.optim.AdamW(model.parameters()))
    >>> report.at_peak["optimizer state"] == 2 * report.at_peak["parameters"] + 4 * 4
    True
    """
    from torch._subclasses import FakeTensorMode

    args = inputs if isinstance(inputs, tuple) else (inputs,)
    if next(tensors_in(args), None) is None:
        raise TypeError(f"inputs must hold a tensor, got {type(inputs).__name__}")
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = _Fakes(mode)
    model, args = fakes.model(model), fakes.value(args)
    with mode, _Numbers(), _explained():
        if checkpoint is not None:
            from dlhelpers.memory.checkpointing import checkpoint_blocks

            model = checkpoint_blocks(model, checkpoint)
        stepper = fakes.optimizer(optimizer, model)
        accounting = Accounting(keep_call=call_of)
        accounting.add_model(model)
        if stepper is not None:
            accounting.add_optimizer(stepper)
        accounting.add("inputs", tensors_in(args))
        with accounting:
            value, targets = _loss(model, args, loss, dtype)
            accounting.add("inputs", tensors_in(targets))  # the caller of a true step holds them
            value.backward()
            del value
            if stepper is not None:
                stepper.step()
    ops, storages = accounting.ops, accounting.storages
    for storage in storages:
        if storage.kind == "optimizer state":
            storage.born = BEFORE  # what a first step makes, a later one finds
    totals, notes = _with_kernels(ops, storages)
    device = next(tensors_in(args)).device.type
    return report_of(ops, storages, totals, measured=False, notes=notes, granularity=_block(device))


def _loss(
    model: nn.Module, args: tuple[Any, ...], loss: Any, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    device = next((t.device.type for t in tensors_in(args)), "cpu")
    with torch.autocast(device, dtype) if dtype is not None else nullcontext():
        output = model(*args)
        if loss is not None:
            return loss(output), None
        main = next(tensors_in(output if not hasattr(output, "to_tuple") else output.to_tuple()))
        targets = torch.zeros(main.shape[:1] + main.shape[2:], dtype=torch.long, device=main.device)
        return nn.functional.cross_entropy(main, targets), targets


def _block(device: str) -> int:
    return CudaRecord.granularity if device == "cuda" else CpuRecord.granularity


def _with_kernels(ops: list[Op], storages: list[Storage]) -> tuple[list[int], tuple[str, ...]]:
    """Return bytes alive while each operator runs, its own buffers included where they matter.

    Those can matter only where what is alive and the most that the kernel could take exceed the
    largest sum found so far, so that most operators are never tried.
    """
    device = next((s.device for op in ops for s in op.call.shapes), "cpu")
    block = _block(torch.device(device).type)
    levels = by_kind(ops, storages, block)
    totals = [sum(bytes_at) for bytes_at in zip(*levels.values(), strict=True)]
    scratch = Scratch()
    best = max(totals)
    bounds = [(totals[number] + op.call.at_most, number) for number, op in enumerate(ops)]
    for bound, number in sorted(bounds, reverse=True):
        if bound <= best:
            break
        totals[number] += scratch.bytes_of(ops[number].call)
        best = max(best, totals[number])
    scratch.keep()
    notes = (
        f"the buffers inside {name} are not counted: {why}" for name, why in scratch.untried.items()
    )
    return totals, tuple(notes)


@contextmanager
def _explained() -> Iterator[None]:
    """Say in plain words what fake tensors cannot do."""
    from torch._subclasses.fake_tensor import (
        DynamicOutputShapeException,
        UnsupportedFakeTensorException,
    )

    try:
        yield
    except DynamicOutputShapeException as error:
        raise ValueError(
            f"the size of what {error.func} returns depends on data, which an estimate has not: "
            "run the step under measure_peak"
        ) from error
    except UnsupportedFakeTensorException as error:
        raise ValueError(f"{error}: run the step under measure_peak") from error
    except Exception as error:
        error.add_note("raised while estimate played the step through on tensors without data")
        raise


class _Numbers(TorchDispatchMode):
    """Let ``item()`` give some number where a fake tensor has none, as an optimizer's step."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            kind = args[0].dtype
            return True if kind == torch.bool else 0.5 if kind.is_floating_point else 1
        return func(*args, **(kwargs or {}))


class _Fakes:
    """Copies of model, inputs and optimizer whose tensors have no memory."""

    def __init__(self, mode: Any) -> None:
        self._mode = mode
        self._memo: dict[int, Any] = {}
        self._kept: list[Any] = []  # an id in the memo is good while its owner lives

    def tensor(self, real: Tensor) -> Tensor:
        if id(real) in self._memo:
            return self._memo[id(real)]
        if real.device.type == "meta":
            with self._mode:
                made = torch.empty_strided(real.shape, real.stride(), dtype=real.dtype)
        else:
            made = self._mode.from_tensor(real.detach(), static_shapes=True)
        if isinstance(real, nn.Parameter):
            made = nn.Parameter(made, requires_grad=real.requires_grad)
        else:
            made = made.requires_grad_(real.requires_grad)
        self._memo[id(real)] = made
        self._kept.append(real)
        return made

    def model(self, model: nn.Module) -> nn.Module:
        for tensor in (*model.parameters(), *model.buffers()):
            self.tensor(tensor)
        for module in model.modules():
            for tensor in tensors_in(list(vars(module).values())):
                self.tensor(tensor)
        with self._mode:
            return copy.deepcopy(model, self._memo)

    def value(self, value: Any) -> Any:
        for tensor in tensors_in(value):
            self.tensor(tensor)
        return copy.deepcopy(value, self._memo)

    def optimizer(self, optimizer: Any, model: nn.Module) -> Optimizer | None:
        if optimizer is None:
            return None
        if not isinstance(optimizer, Optimizer):
            made = optimizer([p for p in model.parameters() if p.requires_grad])
            if not isinstance(made, Optimizer):
                raise TypeError(f"optimizer must make a torch.optim.Optimizer, got {made!r}")
            return made
        for tensor in tensors_in(optimizer.state):
            self.tensor(tensor)
        with self._mode:
            return copy.deepcopy(optimizer, self._memo)
