"""How many bytes does a piece of code need, and what are they? Run it and see."""

from __future__ import annotations

import dis
import functools
import gc
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dlhelpers.memory.accounting import Accounting
from dlhelpers.memory.allocator import record_of
from dlhelpers.memory.report import MemoryReport, by_kind, report_of
from dlhelpers.trees import MAPPINGS

__all__ = ["measure_peak"]


def measure_peak(fn: Callable[[], Any], device: torch.device | str | None = None) -> MemoryReport:
    """Run ``fn`` once; return the bytes alive at its peak, of which kind, and where it was.

    Counted is what ``fn`` allocates and what it uses of what was there before: the tensors, models
    and optimizers that it refers to, and all that an operator reads. Other tensors of the program
    are not. On the CPU the total is the allocator's own record, so two runs agree to the byte; the
    kinds come from following each storage. Run a training step once beforehand if the optimizer's
    state shall be there.

    Args:
        fn: takes nothing; what it returns counts as alive at the end.
        device: whose memory; by default where the model's or tensors' memory lies.

    Raises:
        TypeError: fn cannot be called.
        ValueError: the device keeps no record of its memory, or fn called no operator of torch.
        RuntimeError: torch's profiler is at work already, in this thread or another one.

    Cost: a fifth of a second, the run, and 0.3 ms for each of its operators; nothing of it is left
    afterwards. What other threads allocate meanwhile is not seen, but for autograd's.

    >>> model, x = torch.nn.Linear(256, 256), torch.zeros(1024, 256)
    >>> report = measure_peak(lambda: model(x).sum().backward())
    >>> report.at_peak["parameters"], report.phase
    (263168, 'backward')
    """
    if not callable(fn):
        raise TypeError(f"fn must be a function without arguments, got {type(fn).__name__}")
    used = list(_used_by(fn))
    where = torch.device(device) if device is not None else _device_of(used)
    record = record_of(where)
    accounting = Accounting(record.mark, device=where.type)
    gc.collect()  # garbage of before would be freed at some time of its own
    with record, accounting:  # may refuse, before anything is hooked
        for model in (thing for thing in used if isinstance(thing, nn.Module)):
            accounting.add_model(model)
        for optimizer in (thing for thing in used if isinstance(thing, Optimizer)):
            accounting.add_optimizer(optimizer)
        accounting.add("inputs", (thing for thing in used if isinstance(thing, Tensor)))
        del used
        result = fn()
    del result
    ops = accounting.ops
    if not ops:
        raise ValueError("fn called no operator of torch: there is nothing to measure")
    for storage in accounting.storages:
        if storage.born < 0 and storage.address in record.addresses:
            storage.born = 0  # made inside fn, past the dispatcher
    before = [storage for storage in accounting.storages if storage.born < 0]
    base = by_kind(ops, before, record.granularity)
    held = [sum(bytes_at) for bytes_at in zip(*base.values(), strict=True)]
    levels = record.levels(len(ops))
    totals = [there + above for there, above in zip(held, levels, strict=True)]
    return report_of(
        ops, accounting.storages, totals, measured=True, granularity=record.granularity
    )


def _device_of(used: list[Any]) -> torch.device:
    for thing in used:
        tensors = [thing] if isinstance(thing, Tensor) else ()
        tensors = thing.parameters() if isinstance(thing, nn.Module) else tensors
        for tensor in tensors:
            if tensor.device.type != "cpu":
                return tensor.device
    return torch.device("cpu")


def _used_by(fn: Any) -> Iterator[Any]:
    """Give the tensors, modules and optimizers that a function refers to, and those it calls."""
    seen: set[int] = set()
    todo: list[tuple[Any, int]] = [(fn, 0)]
    while todo:
        thing, depth = todo.pop()
        if id(thing) in seen or depth > 4:
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor | nn.Module | Optimizer):
            yield thing
            continue
        todo.extend((inner, depth + 1) for inner in _inside(thing))


def _inside(thing: Any) -> Iterator[Any]:
    if isinstance(thing, functools.partial):
        yield from (thing.func, *thing.args, *thing.keywords.values())
    elif isinstance(thing, FunctionType):
        if (thing.__module__ or "").partition(".")[0] in ("torch", "torchvision"):
            return
        yield from thing.__defaults__ or ()
        for cell in thing.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:
                continue  # not bound yet
        for name in _globals_of(thing.__code__):
            if name in thing.__globals__:
                yield thing.__globals__[name]
    elif isinstance(thing, MAPPINGS) and len(thing) <= 1000:
        yield from thing.values()
    elif isinstance(thing, tuple | list) and len(thing) <= 1000:
        yield from thing
    elif hasattr(thing, "__self__"):  # a bound method
        yield from (thing.__self__, getattr(thing, "__func__", None))


def _globals_of(code: CodeType) -> Iterator[str]:
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield step.argval
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _globals_of(inner)
