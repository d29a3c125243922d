"""What does a forward read and change besides tensors? Random streams, and attributes of modules.

A recomputation has to start from the state that forward started from, and to leave no trace:

    state before forward -> forward -> ... state found -> (state before, recompute) -> state found

torch.utils.checkpoint does that for torch's default generators. Here it is done for Python's
``random``, NumPy's global state, every generator that the modules or the functions that they call
hold (``random.Random``, ``numpy.random.Generator`` and ``RandomState``, ``torch.Generator``), and
for attributes that a forward rebinds (a counter) or containers that it fills (a cache).
"""

from __future__ import annotations

import ctypes
import functools
import random
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["KEPT_IN_MODULES", "State", "generators_in", "objects_in", "saves_unwritten"]

# attributes that checkpoint_blocks gives to a module: its plan, steady buffers, forward passes
KEPT_IN_MODULES = ("_dlhelpers_checkpointed", "_dlhelpers_steady", "_dlhelpers_passes")

Access = tuple[Callable[[], Any], Callable[[Any], None]]  # get, set

_FOREIGN = {
    "torch",
    "numpy",
    "random",
    "builtins",
    "functools",
    "typing",
    "collections",
    "contextlib",
}
_CONTAINERS = (dict, list, set, deque)
_MISSING = object()
_MOST_OBJECTS = 5000  # a search does not walk through a data set that a module holds


class State:
    """The streams and attributes before one forward, of which those that it changed are kept.

    >>> class Noisy(nn.Module):
    ...     def forward(self, x):
    ...         return x * random.random()
    >>> block = Noisy()
    >>> state, first = State([block]), block(1.0)
    >>> state.keep_changed()
    >>> with state.restored():
    ...     print(block(1.0) == first)
    True
    """

    def __init__(self, blocks: Sequence[Any], modules: Iterable[nn.Module] = ()) -> None:
        self._streams = [(access, access[0]()) for access in _streams(blocks)]
        self._attributes = [(m, _copied(vars(m))) for m in modules if not _is_foreign(type(m))]
        self._changed: list[tuple[dict[str, Any], str, Any]] = []

    def keep_changed(self) -> None:
        """Forget, after forward, what it left alone."""
        self._streams = [
            (access, state) for access, state in self._streams if not _same(access[0](), state)
        ]
        for module, before in self._attributes:
            now = vars(module)
            for name in (before.keys() | now.keys()) - _OWN_NAMES:
                old = before.get(name, _MISSING)
                if not _is_alike(now.get(name, _MISSING), old):
                    if isinstance(old, Tensor):  # values count in a recomputation, not the graph
                        old = old.detach().requires_grad_(old.requires_grad)
                    self._changed.append((now, name, old))
        self._attributes = []

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Put the state before forward in place, and afterwards the state found."""
        found = [(access, access[0]()) for access, _ in self._streams]
        named = [(where, name, where.get(name, _MISSING)) for where, name, _ in self._changed]
        for (_, give), state in self._streams:
            give(state)
        _put((where, name, _copy_of(old)) for where, name, old in self._changed)
        try:
            yield
        finally:
            for (_, give), state in found:
                give(state)
            _put(named)


def generators_in(roots: Iterable[Any]) -> Iterator[Any]:
    """Yield each generator that objects hold, or that their functions reach by closure or global.

    >>> [type(found).__name__ for found in generators_in([{"a": random.Random(0)}, lambda: 1])]
    ['Random']
    """
    numpy = sys.modules.get("numpy.random")
    kinds = (torch.Generator, random.Random)
    if numpy is not None:
        kinds += (numpy.Generator, numpy.RandomState, numpy.BitGenerator)
    for value in _objects(roots):
        if isinstance(value, kinds) and not isinstance(value, random.SystemRandom):  # has no state
            yield value


def saves_unwritten(roots: Iterable[Any]) -> bool:
    """Whether objects or what they call may save memory for backward before it is written.

    ``rrelu`` alone does, of torch's functions: its noise.
    """
    names = {"rrelu", "rrelu_", "RReLU"}
    return any(
        isinstance(value, nn.RReLU)
        or (isinstance(value, BuiltinFunctionType) and value.__name__ in names)
        or (isinstance(value, FunctionType) and not names.isdisjoint(_names(value.__code__)))
        for value in _objects(roots)
    )


def _objects(roots: Iterable[Any]) -> Iterator[Any]:
    """Yield what is reached from objects, tensors and plain values apart."""
    seen: dict[int, Any] = {}  # also keeps what was made on the way, so that no id comes twice
    waiting = list(roots)
    while waiting and len(seen) < _MOST_OBJECTS:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, (Tensor, str, bytes, int, float, type(None))):
            continue
        seen[id(value)] = value
        yield value
        waiting += _reached(value)


def _reached(value: Any) -> list[Any]:
    if isinstance(value, Mapping) and not isinstance(value, nn.Module):
        return list(value.values())[:_MOST_OBJECTS]
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return list(value)[:_MOST_OBJECTS]
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, (staticmethod, classmethod)):
        return [value.__func__]
    if isinstance(value, property):
        return [value.fget]
    if isinstance(value, FunctionType):
        return [] if _is_foreign(value) else _reached_by(value)
    if isinstance(value, type):
        return [] if _is_foreign(value) else list(vars(value).values())
    if isinstance(value, nn.Module) and _is_foreign(type(value)):
        own = [v for name, v in vars(value).items() if name not in _OWN_NAMES]  # an activation
        hooks = (value._forward_hooks, value._forward_pre_hooks)
        return [value._modules, *own, *(hook for hook in hooks if hook)]
    if isinstance(value, ModuleType) or _is_foreign(type(value)):
        return []
    classes = [cls for cls in type(value).__mro__ if not _is_foreign(cls)]
    return [*getattr(value, "__dict__", {}).values(), *classes]


def _reached_by(function: FunctionType) -> list[Any]:
    names = _names(function.__code__)
    found = [function.__defaults__, function.__kwdefaults__]
    for cell in function.__closure__ or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:  # still empty
            continue
    for name in names:
        value = function.__globals__.get(name)
        if isinstance(value, ModuleType):
            if value.__name__.partition(".")[0] not in _FOREIGN:
                found += [vars(value)[inner] for inner in names if inner in vars(value)]
        else:
            found.append(value)
    return found


@functools.lru_cache(maxsize=1024)
def _names(code: CodeType) -> tuple[str, ...]:
    inner = (
        name for const in code.co_consts if isinstance(const, CodeType) for name in _names(const)
    )
    return (*code.co_names, *inner)


def _is_foreign(value: Any) -> bool:
    """Whether a library wrote it that keeps no generator of its own in it."""
    module = getattr(value, "__module__", None) or "builtins"
    return module.partition(".")[0] in _FOREIGN


def _streams(blocks: Sequence[Any]) -> Iterator[Access]:
    yield random.getstate, random.setstate
    if (numpy := sys.modules.get("numpy.random")) is not None:
        yield numpy.get_state, numpy.set_state
    found = list(generators_in(blocks))
    if torch.cuda.is_initialized():  # of other devices than the arguments are on
        found += torch.cuda.default_generators
    for generator in found:
        bits = getattr(generator, "bit_generator", generator)
        if hasattr(generator, "getstate"):
            yield generator.getstate, generator.setstate
        elif hasattr(generator, "set_state"):  # torch.Generator, RandomState
            yield generator.get_state, generator.set_state
        elif hasattr(bits, "state"):
            yield functools.partial(getattr, bits, "state"), functools.partial(_set_state, bits)


def _set_state(bits: Any, state: Any) -> None:
    bits.state = state


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Mapping):
        return all(_same(one[key], other[key]) for key in one)
    if isinstance(one, Tensor):  # a generator's: no operator runs that an estimate would play
        states = (ctypes.string_at(state.data_ptr(), state.nbytes) for state in (one, other))
        return next(states) == next(states)
    if hasattr(one, "tobytes"):
        return one.tobytes() == other.tobytes()
    if isinstance(one, tuple) and len(one) < 10:  # NumPy's; Python's of 625 numbers is below
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


# what an nn.Module keeps itself, and checkpoint_blocks in it
_OWN_NAMES = {*vars(nn.Module()), *KEPT_IN_MODULES}


def _copied(attributes: dict[str, Any]) -> dict[str, Any]:
    return {n: _copy_of(value) for n, value in attributes.items() if n not in _OWN_NAMES}


def _copy_of(value: Any) -> Any:
    return value.copy() if type(value) in _CONTAINERS else value


def _is_alike(now: Any, old: Any) -> bool:
    if type(old) not in _CONTAINERS or type(now) is not type(old):
        return now is old
    if len(now) != len(old):
        return False
    if isinstance(old, set):
        return now == old
    if isinstance(old, dict):
        return all(key in now and now[key] is value for key, value in old.items())
    return all(a is b for a, b in zip(now, old, strict=True))


def _put(values: Iterable[tuple[dict[str, Any], str, Any]]) -> None:
    for where, name, value in values:
        if value is _MISSING:
            where.pop(name, None)
        else:
            where[name] = value


def objects_in(roots: Iterable[Any]) -> Iterator[Any]:
    """Yield what objects hold, or what their functions reach by closure or global; no tensors.

    >>> bank = []
    >>> any(found is bank for found in objects_in([lambda: bank]))
    True
    """
    return _objects(roots)
