"""How many bytes will a training step need? The step is played through without memory.

Fake tensors have shapes and no data. Of each operator the shapes that it would make are known, of
each storage birth and death, so

    peak = max over operators of (storages alive + bytes inside the kernel)

Source: PyTorch documentation, torch.compiler: Fake tensor.
"""

from __future__ import annotations

import copy
import linecache
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from dlhelpers.arguments import model_inputs
from dlhelpers.fakes import fake_of, tensors_in
from dlhelpers.memory.accounting import BEFORE, Accounting, Op, Storage, user_code
from dlhelpers.memory.allocator import CpuRecord, CudaRecord
from dlhelpers.memory.report import MemoryReport, by_kind, report_of
from dlhelpers.memory.scratch import Scratch, call_of

__all__ = ["estimate"]

_MOST_ANSWERS = 1000


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
        inputs: a tensor; a tuple of positional arguments, or a mapping of keyword ones; a mapping
            that is itself the only argument stands in a tuple of one.
        optimizer: over the model's parameters, whether or not it ever stepped; or what makes one of
            parameters, such as ``torch.optim.AdamW``; None for forward and backward alone.
        loss: model output -> scalar; None for the output's own ``loss`` if it has one, else
            cross-entropy over the classes in dimension 1 of its first tensor.
        dtype: of ``torch.autocast`` around model and loss; None for no autocast.
        checkpoint: segments of ``checkpoint_blocks``; None for no checkpointing.

    Returns:
        The report of ``measure_peak`` in advance. Where a kernel's own buffers can decide the peak,
        that one operator is tried, once for each shape and machine, a large batch from two small
        ones; what cannot be tried counts as nothing, and a note says so. Notes also name the lines
        where the model asked for a value, as ``if x.mean() > 0`` does, and got one at random.

    Raises:
        ValueError: the size of a tensor or the end of a loop depends on data, the optimizer holds
            none of the model's parameters, or wants a closure.
        TypeError: the inputs hold no tensor, or the optimizer is none.

    Cost: about half a second for a network of a hundred layers, whatever its batch; the first time
    on a machine some seconds more for trials, in tens of MiB, of an LSTM or GRU on the CPU at its
    own size, if that is below a sixteenth of the machine's memory.

    >>> model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    >>> report = estimate(model, torch.zeros(32, 64), torch.optim.AdamW(model.parameters()))
    >>> report.at_peak["optimizer state"] == 2 * report.at_peak["parameters"] + 4 * 4
    True
    """
    from torch._subclasses import FakeTensorMode

    args, kwargs = model_inputs(inputs)
    if next(tensors_in((args, kwargs)), None) is None:
        raise TypeError(f"inputs must hold a tensor, got {type(inputs).__name__}")
    _check_optimizer(optimizer, model)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes, numbers = _Fakes(mode), _Numbers()
    model, args, kwargs = fakes.model(model), fakes.value(args), fakes.value(kwargs)
    # under ``with torch.device("meta")`` what the model makes itself would be of that device
    is_meta = torch.get_default_device().type == "meta"
    with mode, numbers, _explained(), torch.device("cpu") if is_meta else nullcontext():
        if checkpoint is not None:
            from dlhelpers.memory.checkpointing import checkpoint_blocks

            model = checkpoint_blocks(model, checkpoint)
        stepper = fakes.optimizer(optimizer, model)
        accounting = Accounting(keep_call=call_of)
        accounting.add_model(model)
        if stepper is not None:
            accounting.add_optimizer(stepper)
        accounting.add("inputs", tensors_in((args, kwargs)))
        with accounting:
            value, targets = _loss(model, args, kwargs, loss, dtype)
            accounting.add("inputs", tensors_in(targets))  # the caller of a true step holds them
            value.backward()
            del value
            if stepper is not None:
                numbers.is_asked_by_optimizer = True
                _step(stepper)
    ops, storages = accounting.ops, accounting.storages
    for storage in storages:
        if storage.kind == "optimizer state":
            storage.born = BEFORE  # what a first step makes, a later one finds
    scratch = Scratch()
    _fill_workspaces(ops, storages, scratch)
    on_cuda = next(tensors_in((args, kwargs))).device.type == "cuda"
    block = (CudaRecord if on_cuda else CpuRecord).granularity
    totals, notes = _with_kernels(ops, storages, scratch, block)
    notes = (*numbers.notes, *notes)
    return report_of(ops, storages, totals, measured=False, notes=notes, granularity=block)


def _check_optimizer(optimizer: Any, model: nn.Module) -> None:
    if isinstance(optimizer, Optimizer):
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(parameter) in held for parameter in model.parameters()):
            raise ValueError(
                "the optimizer holds none of the model's parameters: make it of "
                "model.parameters(), after model.to(...) where that makes new ones"
            )
    elif optimizer is not None and not callable(optimizer):
        raise TypeError(
            "optimizer must be a torch.optim.Optimizer, or what makes one, such as "
            f"torch.optim.AdamW; got {optimizer!r}"
        )


def _step(optimizer: Optimizer) -> None:
    try:
        optimizer.step()
    except TypeError as error:
        if "closure" not in str(error):
            raise
        raise ValueError(
            f"{type(optimizer).__name__} wants a closure, which runs the step it knows itself: run "
            "it under measure_peak"
        ) from error


def _loss(
    model: nn.Module, args: tuple[Any, ...], kwargs: Any, loss: Any, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    device = next((t.device.type for t in tensors_in((args, kwargs))), "cpu")
    with torch.autocast(device, dtype) if dtype is not None else nullcontext():
        output = model(*args, **kwargs)
        if loss is not None:
            return loss(output), None
        own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if isinstance(own, Tensor) and own.numel() == 1:
            return own, None
        main = next(tensors_in(output if not hasattr(output, "to_tuple") else output.to_tuple()))
        targets = torch.zeros(main.shape[:1] + main.shape[2:], dtype=torch.long, device=main.device)
        return nn.functional.cross_entropy(main, targets), targets


def _fill_workspaces(ops: list[Op], storages: list[Storage], scratch: Scratch) -> None:
    """Give oneDNN's recurrent layers the workspace that their fakes lack."""
    for number, op in enumerate(ops):
        if op.name == "aten.mkldnn_rnn_layer.default":
            for storage in storages:
                if storage.born == number and not storage.nbytes:
                    storage.nbytes = scratch.workspace_of(op.call)


def _with_kernels(
    ops: list[Op], storages: list[Storage], scratch: Scratch, block: int
) -> tuple[list[int], tuple[str, ...]]:
    """Return bytes alive while each operator runs, its own buffers included where they matter.

    Those can matter only where what is alive and the most that the kernel could take exceed the
    largest sum found so far, so that most operators are never tried.
    """
    levels = by_kind(ops, storages, block)
    totals = [sum(bytes_at) for bytes_at in zip(*levels.values(), strict=True)]
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

    log = logging.getLogger("torch._subclasses.fake_tensor")
    was = log.disabled
    log.disabled = True  # it writes thirty lines about what is said below
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
    finally:
        log.disabled = was


class _Numbers(TorchDispatchMode):
    """Let ``item()`` give some number where a fake tensor has none, and note who asked.

    An optimizer asks for its step's number, which changes no tensor's size; ASGD also whether it
    averages already, and is played as if it did, which takes more.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_asked_by_optimizer = False
        self._asked: dict[tuple[str, int], list[Any]] = {}  # line -> answers

    @property
    def notes(self) -> list[str]:
        return [
            f"{Path(file).name}:{line} asked for a tensor's value, which an estimate has not, and "
            f"got {answers[0]}: {linecache.getline(file, line).strip()}"
            for (file, line), answers in self._asked.items()
        ]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            kind = args[0].dtype
            answer = True if kind == torch.bool else 0.5 if kind.is_floating_point else 1
            if not self.is_asked_by_optimizer:
                place = user_code(sys._getframe(1))
                answers = self._asked.setdefault(place, [])
                answers.append(answer)
                if len(answers) > _MOST_ANSWERS:
                    raise ValueError(
                        f"{Path(place[0]).name}:{place[1]} asked for tensors' values "
                        f"{_MOST_ANSWERS} times, as a loop whose end depends on data would: run "
                        "the step under measure_peak"
                    )
            return answer
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
        made = fake_of(self._mode, real)
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
        for tensor in tensors_in(list(vars(optimizer).values())):  # a learning rate can be one
            self.tensor(tensor)
        with self._mode:
            return copy.deepcopy(optimizer, self._memo)
