"""How does a program stay as it was after code of its own was called? What it reached is put back.

Put back are the attributes of objects (a counter, a cache), the numbers of tensors and arrays in
attributes, closures and globals, and random streams. What a function writes elsewhere stays: a
list of its closure that it fills, a global that it rebinds, files, printed text. Where it ran on
tensors without data, which are good for nothing afterwards, lists and variables are put back, too.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextvars import Context, ContextVar
from functools import partial
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from dlhelpers.models import copied
from dlhelpers.reached import CACHED, is_foreign, objects_in, streams_of

__all__ = ["same_numbers", "shared_untouched", "untouched"]

_MAPPINGS = (OrderedDict, defaultdict, Counter, dict)  # dict last: the others are some
_CONTAINERS = (*_MAPPINGS, list, set, deque)
_LARGEST = 2**26  # elements: of a larger tensor, a data set, no copy is made
_MISSING = object()


@contextlib.contextmanager
def untouched(
    *roots: Any,
    apart: Collection[int] = (),
    without_data: bool = False,
    copies: Mapping[int, Any] | None = None,
) -> Iterator[None]:
    """Put back, after the block, what a call of these objects may have changed.

    Args:
        roots: models, losses, functions.
        apart: the ``id`` of each tensor of which somebody else keeps a copy.
        without_data: whether the block runs on tensors without data. Those change the numbers of
            none that has data, of which no copies are made; lists, dictionaries and sets that are
            reached, variables of closures, globals, context variables and attributes of classes and
            functions are put back as well, and a cache of ``functools.cache`` that the block filled
            is emptied. A generator's own variables are out of reach.
        copies: memo of ``copy.deepcopy`` where a copy of the roots runs. What was copied is left
            alone, as other threads may write to it, unless the copy reaches it, too, as by a
            closure; lists and variables that the copy shares are put back as well, with what
            other threads have written there meanwhile.

    >>> center = torch.zeros(2)
    >>> with untouched(lambda: center.add_(1)):
    ...     _ = center.add_(1)
    >>> center
    tensor([0., 0.])
    """
    undo: list[Callable[[], None]] = []
    tensors: dict[int, Any] = {}
    is_everywhere = without_data or copies is not None
    copies = copies or {}
    roots = tuple(copies.get(id(root), root) for root in roots)
    made = {id(copy) for key, copy in copies.items() if id(copy) != key}
    for value in objects_in(roots):
        if id(value) in made:
            continue
        with contextlib.suppress(Exception):  # objects of any kind
            undo.extend(_undo_of(value, tensors))
            if is_everywhere:
                undo.extend(_undo_elsewhere(value))
    if without_data:
        tensors = {key: array for key, array in tensors.items() if not isinstance(array, Tensor)}
    kept = {*apart, *made}
    undo.extend(_undo_of_numbers([held for key, held in tensors.items() if key not in kept]))
    streams = [(give, get()) for get, give in streams_of(roots)]
    try:
        yield
    finally:
        for put_back in undo:
            with contextlib.suppress(Exception):
                put_back()
        for give, state in streams:
            give(state)


@contextlib.contextmanager
def shared_untouched(model: nn.Module) -> Iterator[None]:
    """Put back, after the block, what a model shares with a copy of it that runs there.

    The model itself is left alone, since copies of it run. Torch's default generators are the
    caller's to put back.

    Raises:
        TypeError: it cannot be copied.
    """
    copies: dict[int, Any] = {}
    copied(model, copies)
    with untouched(model, copies=copies):
        yield


def _undo_of(value: Any, tensors: dict[int, Any]) -> Iterator[Callable[[], None]]:
    """Yield what undoes a change of one object, and collect the tensors and arrays in it."""
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.ndarray):
        tensors[id(value)] = value
    elif type(value) in _CONTAINERS:
        _collect(value.values() if type(value) in _MAPPINGS else value, tensors)
    elif isinstance(value, tuple):
        _collect(value, tensors)
    elif isinstance(value, FunctionType):
        names = _globals_of(value.__code__, "LOAD_GLOBAL") & set(value.__globals__)
        _collect((value.__globals__[name] for name in names), tensors)
        for cell in value.__closure__ or ():
            with contextlib.suppress(ValueError):  # still empty
                _collect([cell.cell_contents], tensors)
    elif _is_changed_by_calls(value):
        _collect(vars(value).values(), tensors)
        yield _undo_of_attributes(vars(value))
        yield from _undo_of_containers(list(vars(value).values()))


def _undo_elsewhere(value: Any) -> Iterator[Callable[[], None]]:
    """Yield what undoes a change of a container, a variable, a class or a cache."""
    if isinstance(value, _CONTAINERS) and value is not sys.modules:
        yield partial(_refill, value, _entries(value))
    elif isinstance(value, FunctionType):
        yield _undo_of_attributes(vars(value))
        yield from _undo_of_variables(value)
        for cell in value.__closure__ or ():
            with contextlib.suppress(ValueError):
                yield partial(setattr, cell, "cell_contents", cell.cell_contents)
    elif isinstance(value, type) and not is_foreign(value):
        yield _undo_of_class(value)
    elif isinstance(value, nn.Module):
        for parameter in value._parameters.values():
            if parameter is not None:
                yield partial(_undo_grad, parameter, parameter.grad)
    elif isinstance(value, CACHED):
        yield partial(_empty, value, value.cache_info().misses)
    elif isinstance(value, ContextVar):
        yield partial(_undo_context, value, value.get(_MISSING))
    for cls in () if isinstance(value, type) or is_foreign(type(value)) else type(value).__mro__:
        names = vars(cls).get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            yield partial(_undo_slot, value, name, getattr(value, name, _MISSING))


def _undo_of_variables(function: FunctionType) -> Iterator[Callable[[], None]]:
    """Yield what undoes a change of a global, or of a variable of a module of the user's."""
    space, code = function.__globals__, function.__code__
    for name in _globals_of(code, "STORE_GLOBAL"):
        yield _undo_of_item(space, name)
    read = _globals_of(code, "LOAD_GLOBAL")
    if "globals" in read:
        yield partial(_undo_tensors, space, dict(space))
    for module in [space[name] for name in read if isinstance(space.get(name), ModuleType)]:
        package = module.__name__.partition(".")[0]
        if package not in ("torch", "numpy") and package not in sys.stdlib_module_names:
            for name in _globals_of(code, "STORE_ATTR"):
                yield _undo_of_item(vars(module), name)


@functools.lru_cache(maxsize=1024)
def _globals_of(code: CodeType, opname: str) -> frozenset[str]:
    """Return names of globals, and not of attributes, which ``co_names`` holds as well."""
    names = {step.argval for step in dis.get_instructions(code) if step.opname == opname}
    inner = [const for const in code.co_consts if isinstance(const, CodeType)]
    return frozenset(names.union(*(_globals_of(one, opname) for one in inner)))


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
            waiting += value.values() if type(value) in _MAPPINGS else value
            yield partial(_refill, value, _entries(value))


def _collect(values: Any, tensors: dict[int, Any]) -> None:
    tensors.update((id(value), value) for value in values if isinstance(value, Tensor))


def _entries(container: Any) -> list[Any]:
    base = _base(container)
    return list((base.items if base in _MAPPINGS else base.__iter__)(container))


def _base(container: Any) -> Any:
    """Return the one of Python's classes whose methods change it, and nothing else."""
    return next(kind for kind in _CONTAINERS if isinstance(container, kind))


def _refill(container: Any, kept: list[Any]) -> None:
    now = _entries(container)
    if len(now) == len(kept) and all(map(_is_same_entry, now, kept)):
        return
    base = _base(container)
    base.clear(container)
    if base is Counter:  # whose update() counts
        base = dict
    (base.update if base in (*_MAPPINGS, set) else base.extend)(container, kept)


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


def _undo_of_item(names: dict[str, Any], name: str) -> Callable[[], None]:
    if name not in names:
        return partial(names.pop, name, None)
    return partial(names.__setitem__, name, names[name])


def _undo_tensors(space: dict[str, Any], before: dict[str, Any]) -> None:
    """Put back the variables that hold a new tensor, whose names no code tells."""
    for name in [name for name, new in space.items() if isinstance(new, Tensor)]:
        if space[name] is not before.get(name):
            if name in before:
                space[name] = before[name]
            else:
                del space[name]


def _undo_context(variable: ContextVar[Any], old: Any) -> None:
    if variable.get(_MISSING) is not old:
        variable.set(Context().run(variable.get) if old is _MISSING else old)


def _undo_slot(owner: Any, name: str, old: Any) -> None:
    if old is not _MISSING:
        if getattr(owner, name, _MISSING) is not old:
            setattr(owner, name, old)
    elif hasattr(owner, name):
        delattr(owner, name)


def _undo_of_class(cls: type) -> Callable[[], None]:
    """Put back a class's attributes; what Python and torch keep there for themselves is left."""
    before = dict(vars(cls))

    def put_back() -> None:
        for name in {name for name in {*vars(cls), *before} if not name.startswith("__")}:
            old = before.get(name, _MISSING)
            if old is _MISSING:
                delattr(cls, name)
            elif vars(cls).get(name, _MISSING) is not old:
                setattr(cls, name, old)

    return put_back


def _undo_grad(parameter: Tensor, grad: Tensor | None) -> None:
    if parameter.grad is not grad:
        parameter.grad = grad


def _empty(cached: Any, misses: int) -> None:
    if cached.cache_info().misses != misses:
        cached.cache_clear()


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
