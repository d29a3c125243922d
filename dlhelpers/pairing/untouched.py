"""How does a program stay as it was after code of its own was called? What it reached is put back.

Put back are the attributes of objects (a counter, a cache), the numbers of tensors and arrays in
attributes, closures and globals, and random streams. What a function writes elsewhere stays: a
list of its closure that it fills, a global that it rebinds, files, printed text.
"""

from __future__ import annotations

import contextlib
import dis
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Iterator
from functools import partial
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from dlhelpers.memory.replaying import State, objects_in

__all__ = ["same_numbers", "untouched"]

_MAPPINGS = (dict, OrderedDict, defaultdict, Counter)
_CONTAINERS = (*_MAPPINGS, list, set, deque)
_LARGEST = 2**26  # elements: of a larger tensor, a data set, no copy is made
_MISSING = object()


@contextlib.contextmanager
def untouched(*roots: Any, apart: Collection[int] = ()) -> Iterator[None]:
    """Put back, after the block, what a call of these objects may have changed.

    Args:
        roots: models, losses, functions.
        apart: the ``id`` of each tensor of which somebody else keeps a copy.

    >>> center = torch.zeros(2)
    >>> with untouched(lambda: center.add_(1)):
    ...     _ = center.add_(1)
    >>> center
    tensor([0., 0.])
    """
    undo: list[Callable[[], None]] = []
    tensors: dict[int, Any] = {}
    for value in objects_in(roots):
        with contextlib.suppress(Exception):  # objects of any kind
            undo.extend(_undo_of(value, tensors))
    numbers = [tensor for key, tensor in tensors.items() if key not in apart]
    undo.extend(_undo_of_numbers(numbers))
    with State(roots).restored():
        try:
            yield
        finally:
            for put_back in undo:
                with contextlib.suppress(Exception):
                    put_back()


def _undo_of(value: Any, tensors: dict[int, Any]) -> Iterator[Callable[[], None]]:
    """Yield what undoes a change of one object, and collect the tensors and arrays in it."""
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.ndarray):
        tensors[id(value)] = value
    elif type(value) in _MAPPINGS:
        _collect(value.values(), tensors)
    elif type(value) in _CONTAINERS or isinstance(value, tuple):
        _collect(value, tensors)
    elif isinstance(value, FunctionType):
        names = _globals_read_by(value.__code__) & set(value.__globals__)
        _collect((value.__globals__[name] for name in names), tensors)
        for cell in value.__closure__ or ():
            with contextlib.suppress(ValueError):  # still empty
                _collect([cell.cell_contents], tensors)
    elif _is_changed_by_calls(value):
        _collect(vars(value).values(), tensors)
        yield _undo_of_attributes(vars(value))
        yield from _undo_of_containers(list(vars(value).values()))


def _globals_read_by(code: CodeType) -> set[str]:
    """Return names of globals, and not of attributes, which ``co_names`` holds as well."""
    names = {step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"}
    inner = [const for const in code.co_consts if isinstance(const, CodeType)]
    return names.union(*map(_globals_read_by, inner))


def _is_changed_by_calls(value: Any) -> bool:
    """Whether an object has attributes, and is not torch's (an iterator, an optimizer)."""
    if isinstance(value, (type, ModuleType)) or not hasattr(value, "__dict__"):
        return False
    return isinstance(value, nn.Module) or not type(value).__module__.startswith("torch.")


def _undo_of_containers(waiting: list[Any]) -> Iterator[Callable[[], None]]:
    seen: dict[int, Any] = {}
    while waiting:
        value = waiting.pop()
        if type(value) in _CONTAINERS and id(value) not in seen:
            seen[id(value)] = value
            kept = list(value.items() if type(value) in _MAPPINGS else value)
            waiting += value.values() if type(value) in _MAPPINGS else kept
            yield partial(_refill, value, kept)


def _collect(values: Any, tensors: dict[int, Any]) -> None:
    tensors.update((id(value), value) for value in values if isinstance(value, Tensor))


def _refill(container: Any, kept: list) -> None:
    is_mapping = type(container) in _MAPPINGS
    now = list(container.items() if is_mapping else container)
    if len(now) == len(kept) and all(map(_is_same_entry, now, kept)):
        return
    container.clear()
    (container.update if is_mapping or isinstance(container, set) else container.extend)(kept)


def _is_same_entry(now: Any, old: Any) -> bool:
    """Whether an item of a sequence, or both parts of a mapping's, are the same objects."""
    if type(now) is tuple and type(old) is tuple and len(now) == len(old) == 2:
        return now is old or all(a is b for a, b in zip(now, old, strict=True))
    return now is old


def _undo_of_attributes(space: dict[str, Any]) -> Callable[[], None]:
    before = dict(space)

    def put_back() -> None:
        for name in set(space) - set(before):
            del space[name]
        for name, old in before.items():
            if space.get(name, _MISSING) is not old:
                space[name] = old

    return put_back


def _undo_of_numbers(tensors: list[Any]) -> Iterator[Callable[[], None]]:
    for tensor in tensors:
        if (tensor.numel() if isinstance(tensor, Tensor) else tensor.size) > _LARGEST:
            continue
        with contextlib.suppress(Exception):  # wrappers that refuse a copy
            kept = tensor.detach().clone() if isinstance(tensor, Tensor) else tensor.copy()
            yield partial(_refill_numbers, tensor, kept)


def _refill_numbers(tensor: Any, kept: Any) -> None:
    if not isinstance(tensor, Tensor):
        if tensor.tobytes() != kept.tobytes():
            tensor[...] = kept
    elif not same_numbers(tensor, kept):  # memory that is read-only must not be written to
        with torch.no_grad():
            tensor.data.copy_(kept)


def same_numbers(tensor: Tensor, kept: Tensor) -> bool:
    """Whether two tensors hold the same numbers, nan in the same places; True for no numbers."""
    try:
        if tensor.device.type == "meta" or torch.equal(tensor, kept):
            return True
        nan = tensor.isnan()
        return torch.equal(nan, kept.isnan()) and torch.equal(tensor[~nan], kept[~nan])
    except Exception:  # wrappers and layouts that compare nothing
        return False
