"""What does a model or a function reach? Objects, and the random streams that it may draw from.

Followed are attributes, containers, hooks, and what functions hold by closure, default and global.
Streams are Python's ``random``, NumPy's global state, and every generator that is reached
(``random.Random``, ``numpy.random.Generator`` and ``RandomState``, ``torch.Generator``).
"""

from __future__ import annotations

import ctypes
import functools
import random
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from dlhelpers.trees import MAPPINGS

__all__ = [
    "CACHED",
    "generators_in",
    "is_foreign",
    "names_in",
    "objects_in",
    "same_state",
    "streams_of",
]

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
# a search does not walk through a data set that a module holds
_MOST_OBJECTS, _OBJECTS_PER_MODULE = 5000, 20
_OF_EVERY_MODULE = {*vars(nn.Module())}
CACHED = type(functools.cache(len))
"""The type of what ``functools.cache`` and ``lru_cache`` return."""


def objects_in(roots: Iterable[Any]) -> Iterator[Any]:
    """Yield what objects hold, or what their functions reach by closure or global; no tensors.

    >>> bank = []
    >>> any(found is bank for found in objects_in([lambda: bank]))
    True
    """
    seen: dict[int, Any] = {}  # also keeps what was made on the way, so that no id comes twice
    waiting = deque(roots)
    modules = sum(1 for root in waiting if isinstance(root, nn.Module) for _ in root.modules())
    most = _MOST_OBJECTS + _OBJECTS_PER_MODULE * modules
    while waiting and len(seen) < most:
        value = waiting.popleft()  # the nearest first: a search may end before it has all
        if id(value) in seen or isinstance(value, (Tensor, str, bytes, int, float, type(None))):
            continue
        seen[id(value)] = value
        yield value
        waiting += _reached(value)


def generators_in(roots: Iterable[Any]) -> Iterator[Any]:
    """Yield each generator that objects hold, or that their functions reach by closure or global.

    >>> [type(found).__name__ for found in generators_in([{"a": random.Random(0)}, lambda: 1])]
    ['Random']
    """
    numpy = sys.modules.get("numpy.random")
    kinds = (torch.Generator, random.Random)
    if numpy is not None:
        kinds += (numpy.Generator, numpy.RandomState, numpy.BitGenerator)
    for value in objects_in(roots):
        if isinstance(value, kinds) and not isinstance(value, random.SystemRandom):  # has no state
            yield value


def _reached(value: Any) -> list[Any]:
    if isinstance(value, MAPPINGS) and not isinstance(value, nn.Module):
        return list(islice(value.values(), _MOST_OBJECTS))
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return list(islice(value, _MOST_OBJECTS))
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, CACHED):
        return [value.__wrapped__]
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, (staticmethod, classmethod)):
        return [value.__func__]
    if isinstance(value, property):
        return [value.fget]
    if isinstance(value, FunctionType):
        return [] if is_foreign(value) or _is_pythons(value) else _reached_by(value)
    if isinstance(value, type):
        return [] if is_foreign(value) or _is_pythons(value) else list(vars(value).values())
    if isinstance(value, nn.Module) and is_foreign(type(value)):
        own = [v for n, v in vars(value).items() if n not in _OF_EVERY_MODULE]  # an activation
        hooks = (value._forward_hooks, value._forward_pre_hooks)
        return [value._modules, *own, *(hook for hook in hooks if hook)]
    if isinstance(value, ModuleType) or is_foreign(type(value)):
        return []
    kinds = type(value).__mro__
    classes = [cls for cls in kinds if not (is_foreign(cls) or _is_pythons(cls))]
    return [*getattr(value, "__dict__", {}).values(), *classes]


def _reached_by(function: FunctionType) -> list[Any]:
    names = names_in(function.__code__)
    found: list[Any] = [function.__defaults__, function.__kwdefaults__]
    for cell in function.__closure__ or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:  # still empty
            continue
    for name in names:
        value = function.__globals__.get(name)
        if isinstance(value, ModuleType):
            package = value.__name__.partition(".")[0]
            if package not in _FOREIGN and package not in sys.stdlib_module_names:
                found += [vars(value)[inner] for inner in names if inner in vars(value)]
        else:
            found.append(value)
    return found


@functools.lru_cache(maxsize=1024)
def names_in(code: CodeType) -> tuple[str, ...]:
    """Return the names of globals and attributes that code uses, its inner functions' too."""
    inner = (
        name for const in code.co_consts if isinstance(const, CodeType) for name in names_in(const)
    )
    return (*code.co_names, *inner)


def is_foreign(value: Any) -> bool:
    """Whether a library wrote it that keeps no generator of its own in it."""
    module = getattr(value, "__module__", None) or "builtins"
    return module.partition(".")[0] in _FOREIGN


def _is_pythons(value: Any) -> bool:
    """Whether it is of Python's library, whose own variables, as those of threads, are its own."""
    return str(value.__module__).partition(".")[0] in sys.stdlib_module_names


def streams_of(roots: Iterable[Any]) -> Iterator[Access]:
    """Yield (get, set) of the state of each random stream, but for torch's default generators."""
    yield random.getstate, random.setstate
    if (numpy := sys.modules.get("numpy.random")) is not None:
        yield numpy.get_state, numpy.set_state
    found = list(generators_in(roots))
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


def same_state(one: Any, other: Any) -> bool:
    """Whether two states of a stream are the same."""
    if isinstance(one, Mapping):
        return all(same_state(one[key], other[key]) for key in one)
    if isinstance(one, Tensor):  # a generator's: no operator runs that an estimate would play
        states = (ctypes.string_at(state.data_ptr(), state.nbytes) for state in (one, other))
        return next(states) == next(states)
    if hasattr(one, "tobytes"):
        return one.tobytes() == other.tobytes()
    if isinstance(one, tuple) and len(one) < 10:  # NumPy's; Python's of 625 numbers is below
        return len(one) == len(other) and all(map(same_state, one, other))
    return bool(one == other)
