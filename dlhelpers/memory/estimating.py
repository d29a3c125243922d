"""How many bytes will a training step need? The step is played through without memory.

Fake tensors have shapes and no data. Of each operator the shapes that it would make are known, of
each storage birth and death, so

    peak = max over operators of (storages alive + bytes inside the kernel)

Source: PyTorch documentation, torch.compiler: Fake tensor.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dlhelpers.arguments import model_inputs, whole_number
from dlhelpers.memory.accounting import BEFORE, Accounting, Op, Storage
from dlhelpers.memory.allocator import CpuRecord, CudaRecord
from dlhelpers.memory.calls import call_of
from dlhelpers.memory.report import MemoryReport, by_kind, report_of
from dlhelpers.memory.scratch import Scratch, whole_of
from dlhelpers.memory.sparse import SparseOps, is_coo
from dlhelpers.memory.values import Numbers, explained
from dlhelpers.models import need_model
from dlhelpers.trees import map_leaves, tensors_in
from dlhelpers.without_data import Fakes

__all__ = ["estimate"]

_HELD = {  # how long variables hold the model's outputs and the loss
    "loop": "outputs and loss held until the next ones replace them",
    "step": "outputs and loss held until the step ends",
    "loss": "outputs not held once the loss is computed",
}


def estimate(
    model: nn.Module,
    inputs: Any,
    optimizer: Optimizer | Callable[..., Optimizer] | None,
    *,
    loss: Callable[[Any], Tensor] | None = None,
    dtype: torch.dtype | None = None,
    checkpoint: int | None = None,
    steps: int = 1,
    hold_outputs: str | None = None,
    training: bool = True,
) -> MemoryReport:
    """Predict the peak of a training step, or of inference, without running it.

    The step is a later one of the usual loop: the optimizer's state exists, gradients are None at
    its start, and two variables outlive the step, so that the former outputs and loss are alive
    until the next ones replace them::

        for inputs, targets in loader:
            optimizer.zero_grad()
            outputs = model(inputs)
            loss = loss_function(outputs, targets)
            loss.backward()
            optimizer.step()

    What else a program holds, such as an averaged copy of the weights, is not counted. Neither
    model, inputs, optimizer nor random states are touched, and none needs memory: they may be of
    device ``meta``.

    Args:
        model: in the mode, on the device and with the weights' types that it will train with.
        inputs: a tensor; a tuple of positional arguments, or a mapping of keyword ones; a mapping
            that is itself the only argument goes into a tuple of one.
        optimizer: over the model's parameters, whether or not it ever stepped; or what makes one of
            parameters, such as ``torch.optim.AdamW``; None for forward and backward alone.
        loss: model output -> scalar; None for the output's own ``loss`` if it has one, else
            cross-entropy over the classes in dimension 1 of its first tensor.
        dtype: of ``torch.autocast`` around model and loss; None for no autocast.
        checkpoint: segments of ``checkpoint_blocks``; None for no checkpointing.
        steps: micro-batches that ``accumulate`` splits the inputs into for one step of the
            optimizer; ``loss`` gets the outputs of one of them. Gradients are alive from the first
            one's backward pass on.
        hold_outputs: how long variables hold the model's outputs and the loss. "loop": until the
            next ones replace them, as above. "step": until the step ends (with ``steps`` the
            micro-batch's backward pass), as in a function that makes one step. "loss": until the
            loss is computed, as in ``loss_function(model(inputs), targets).backward()``. None for
            "loop" in training and "loss" in inference.
        training: False for one forward pass without gradients (``torch.no_grad``,
            ``torch.inference_mode``), and ``loss`` if it is given; the optimizer is not used. With
            ``hold_outputs="loop"`` the former outputs are alive meanwhile.

    Returns:
        The report of ``measure_peak`` in advance; its ``loop`` says what was played. Where a
        kernel's own buffers can decide the peak, that one operator is tried, once for each shape
        and machine, a large batch from two small ones; what cannot be tried counts as nothing, and
        a note says so. Notes also name the lines where the model asked for a value, as
        ``if x.mean() > 0`` does, and got one at random.

    Raises:
        ValueError: the size of a tensor or the end of a loop depends on data, the model
            computes in threads of its own, the optimizer holds none of the model's parameters, or
            wants a closure; steps is not a whole number, splits
            no dimension 0 common to all inputs, or is given for inference; hold_outputs is none of
            the three; the model is a DistributedDataParallel one.
        TypeError: the inputs hold no tensor, or the optimizer is none.

    Cost: about half a second for a network of a hundred layers, whatever its batch; the first time
    on a machine some seconds more for trials, in tens of MiB, of an LSTM or GRU on the CPU at its
    own size, if that is below a sixteenth of the machine's memory.

    >>> model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    >>> report = estimate(model, torch.zeros(32, 64), torch.optim.AdamW(model.parameters()))
    >>> report.at_peak["optimizer state"] == 2 * report.at_peak["parameters"] + 4 * 4
    True
    """
    need_model(model, "estimate")
    args, kwargs = model_inputs(inputs)
    if next(tensors_in((args, kwargs)), None) is None:
        raise TypeError(f"inputs must hold a tensor, got {type(inputs).__name__}")
    steps = whole_number("steps", steps, 1)
    if steps > 1 and not training:
        raise ValueError(f"steps={steps} is of training: leave it out with training=False")
    if hold_outputs is None:
        hold_outputs = "loop" if training else "loss"
    if hold_outputs not in _HELD:
        raise ValueError(f"hold_outputs must be one of {[*_HELD]}, got {hold_outputs!r}")
    _check_optimizer(optimizer, model)
    fakes, numbers, sparse = Fakes(), Numbers(), SparseOps()
    loop = _loop(model, training, hold_outputs, steps)
    original, model = model, fakes.model(model)
    args, kwargs = fakes.value(args), fakes.value(kwargs)
    given_loss, loss = loss, fakes.model(loss) if isinstance(loss, nn.Module) else loss
    # under ``with torch.device("meta")`` what the model makes itself would be of that device
    is_meta = torch.get_default_device().type == "meta"
    device = torch.device("cpu") if is_meta else nullcontext()
    with fakes.running(original, given_loss), numbers, sparse, explained(), device:
        if checkpoint is not None:
            from dlhelpers.memory.checkpointing import checkpoint_blocks

            model = checkpoint_blocks(model, checkpoint)
        stepper = fakes.optimizer(optimizer, model) if training else None
        accounting = Accounting(keep_call=call_of, stand_in=fakes.seen)
        accounting.add_model(model)
        if stepper is not None:
            accounting.add_optimizer(stepper)
        accounting.add("inputs", tensors_in((args, kwargs)))
        parts = _micro_batches(args, kwargs, steps)
        with accounting, torch.set_grad_enabled(training):
            play = functools.partial(_train, stepper=stepper, numbers=numbers)
            play = play if training else _infer
            former = play(accounting, model, parts, loss, dtype, hold_outputs)
    ops, storages = accounting.ops, accounting.storages
    if not ops:
        raise ValueError("the model called no operator of torch: there is nothing to estimate")
    for storage in storages:
        if storage.kind == "optimizer state":
            storage.born = BEFORE  # what a first step makes, a later one finds
    scratch = Scratch()
    _fill_workspaces(ops, storages, scratch)
    for storage, until in former:  # the former step's, alive until this step's replaces it
        storages.append(dataclasses.replace(storage, born=BEFORE, died=until, alive=None))
    on_cuda = next(tensors_in((args, kwargs))).device.type == "cuda"
    block = (CudaRecord if on_cuda else CpuRecord).granularity
    totals, notes = _with_kernels(ops, storages, scratch, block)
    if _keeps_sparse(stepper):
        sparse.notes.append(
            f"{type(stepper).__name__}'s state of a sparse gradient may grow by the gradient's "
            "rows with each step: counted is the second step"
        )
    notes = (*numbers.notes, *sparse.notes, *notes)
    return report_of(
        ops, storages, totals, measured=False, notes=notes, granularity=block, loop=loop
    )


def _loop(model: nn.Module, training: bool, hold_outputs: str, steps: int) -> str:
    """Say in a line what is played."""
    if not training:
        mode = "train" if model.training else "eval"
        held = f", {_HELD['loop']}" if hold_outputs == "loop" else ""
        return f"one forward pass in {mode} mode without gradients{held}"
    of = f"a step of {steps} micro-batches, " if steps > 1 else ""
    return f"{of}{_HELD[hold_outputs]} (hold_outputs={hold_outputs!r})"


def _check_optimizer(optimizer: Any, model: nn.Module) -> None:
    parallel = getattr(nn.parallel, "DistributedDataParallel", None)
    if parallel is not None and isinstance(model, parallel):
        raise ValueError(
            "the model is a DistributedDataParallel one, whose communication an estimate cannot "
            "play: give model.module; the buckets take the bytes of the gradients once more"
        )
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


def _micro_batches(
    args: tuple[Any, ...], kwargs: dict[str, Any], steps: int
) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Split all tensors along dimension 0, as ``accumulate`` does; those without one stay whole."""
    if steps == 1:
        return [(args, kwargs)]
    sizes = sorted({len(tensor) for tensor in tensors_in((args, kwargs)) if tensor.dim()})
    if len(sizes) != 1 or sizes[0] < steps:
        raise ValueError(
            f"steps={steps} splits dimension 0 of all inputs, which must be the same and no "
            f"smaller than steps; got {sizes}: leave steps out and give one micro-batch"
        )
    return [
        map_leaves(
            lambda t, i=i: t.tensor_split(steps)[i] if isinstance(t, Tensor) and t.dim() else t,
            (args, kwargs),
        )
        for i in range(steps)
    ]


def _train(
    accounting: Accounting,
    model: nn.Module,
    parts: list[Any],
    loss: Any,
    dtype: torch.dtype | None,
    hold_outputs: str,
    stepper: Optimizer | None,
    numbers: Numbers,
) -> list[tuple[Storage, int]]:
    """Play one step; return what of the former one is alive until which operator.

    A third micro-batch finds alive what the second one found, but for sparse gradients.
    """
    replaced: list[int] = []  # numbers of the operators at which the former outputs, loss go
    for number, (args, kwargs) in enumerate(parts):
        if number > 1 and not any(is_coo(parameter.grad) for parameter in model.parameters()):
            break
        with _autocast(args, kwargs, dtype):
            outputs = model(*args, **kwargs)
            replaced.append(len(accounting.ops))
            value, targets = _loss(outputs, loss, len(parts))
            replaced.append(len(accounting.ops))
        accounting.add("inputs", tensors_in(targets))  # the caller of a true step holds them
        if hold_outputs == "loss":
            outputs = None
        value.backward()
        if hold_outputs == "loss" or (hold_outputs == "step" and len(parts) > 1):
            outputs = value = None
    if stepper is not None:
        numbers.is_asked_by_optimizer = True
        _step(stepper)
    former: list[tuple[Storage, int]] = []
    if hold_outputs == "loop":
        with _former(accounting, former, until=replaced[0]):
            outputs = None
        with _former(accounting, former, until=replaced[1]):
            value = None  # and its graph
    return former


def _infer(
    accounting: Accounting,
    model: nn.Module,
    parts: list[Any],
    loss: Any,
    dtype: torch.dtype | None,
    hold_outputs: str,
) -> list[tuple[Storage, int]]:
    ((args, kwargs),) = parts
    with _autocast(args, kwargs, dtype):
        outputs = model(*args, **kwargs)
        replaced = len(accounting.ops)
        if loss is not None:
            loss(outputs)
    former: list[tuple[Storage, int]] = []
    if hold_outputs == "loop":
        with _former(accounting, former, until=replaced):
            outputs = None
    return former


@contextmanager
def _former(
    accounting: Accounting, former: list[tuple[Storage, int]], until: int
) -> Iterator[None]:
    """Add what dies inside."""
    held = [storage for storage in accounting.storages if storage.died is None]
    yield
    former += [(storage, until) for storage in held if storage.died is not None]


def _autocast(args: Any, kwargs: Any, dtype: torch.dtype | None) -> Any:
    device = next((t.device.type for t in tensors_in((args, kwargs))), "cpu")
    return torch.autocast(device, dtype) if dtype is not None else nullcontext()


def _step(optimizer: Optimizer) -> None:
    try:
        optimizer.step()
        if _keeps_sparse(optimizer):
            optimizer.step()
    except TypeError as error:
        if "closure" not in str(error):
            raise
        raise ValueError(
            f"{type(optimizer).__name__} wants a closure, which runs the step it knows itself: run "
            "it under measure_peak"
        ) from error


def _keeps_sparse(optimizer: Optimizer | None) -> bool:
    """Whether it keeps sums of sparse gradients, as SGD's momentum: those grow with each step."""
    return optimizer is not None and any(is_coo(t) for t in tensors_in(optimizer.state))


def _loss(outputs: Any, loss: Any, steps: int) -> tuple[Tensor, Tensor | None]:
    if loss is not None:
        try:
            return loss(outputs), None
        except Exception as error:
            if steps > 1:
                error.add_note(
                    f"steps={steps} splits the inputs, and loss gets one micro-batch's outputs: "
                    "take as many of the targets, as targets[:len(outputs)]"
                )
            raise
    own = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if isinstance(own, Tensor) and own.numel() == 1:
        return own, None
    main = next(tensors_in(outputs if not hasattr(outputs, "to_tuple") else outputs.to_tuple()))
    targets = torch.zeros(main.shape[:1] + main.shape[2:], dtype=torch.long, device=main.device)
    return nn.functional.cross_entropy(main, targets), targets


def _fill_workspaces(ops: list[Op], storages: list[Storage], scratch: Scratch) -> None:
    """Give outputs the bytes that their fakes lack.

    Those are the workspace of oneDNN's recurrent layers, and the whole from which some losses take
    their mean: the one number stays in a storage of its size.
    """
    made: dict[int, list[Storage]] = {}
    for storage in storages:
        made.setdefault(storage.born, []).append(storage)
    for number, op in enumerate(ops):
        for storage in made.get(number, ()):
            if op.name == "aten.mkldnn_rnn_layer.default":
                if not storage.nbytes and storage.in_forward:
                    storage.nbytes = scratch.workspace_of(op.call)
            elif "_loss." in op.name or "binary_cross_entropy." in op.name:
                storage.nbytes = max(storage.nbytes, whole_of(op.call))


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
