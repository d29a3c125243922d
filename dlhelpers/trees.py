"""What stands inside a nested value? One answer for inputs and outputs of every kind.

Opened are mappings, sequences, named tuples, dataclasses and classes of attrs, each with its
subclasses (the outputs of Hugging Face's models, ``PackedSequence``), and what is registered with
``torch.utils._pytree``. Anything else is a leaf: a tensor, a number, None, a module, a string; a
mapping that makes its values when they are asked for, such as a file of HDF5; and a container
where it stands inside itself, such as the parent of a node.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import ChainMap, OrderedDict, UserDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from types import MappingProxyType, SimpleNamespace
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree

__all__ = [
    "MAPPINGS",
    "entries",
    "flatten",
    "is_record",
    "map_leaves",
    "rebuilt",
    "tensors_in",
]

MAPPINGS = (dict, UserDict, MappingProxyType, ChainMap)
"""Classes of mappings that hold their values; others may compute or load each one."""

_LEAVES = (Tensor, nn.Module, str, bytes, int, float, complex, type(None), type)
_Rebuild = Callable[[list[Any]], Any]
_Opened = tuple[list[Any], list[Any], Callable[[], _Rebuild]]  # keys, values, rebuilding


def flatten(value: Any) -> tuple[list[Any], Callable[[Iterable[Any]], Any]]:
    """Return the leaves in order, and a function that puts as many others in their places.

    The function holds no leaf, so the tensors may be freed.

    >>> leaves, rebuild = flatten({"a": (1, [2]), "b": None})
    >>> leaves, rebuild([3, 4, 5])
    ([1, 2, None], {'a': (3, [4]), 'b': 5})
    """
    leaves: list[Any] = []
    place = _flatten_into(leaves, value, set())
    return leaves, lambda others: place(iter(others))


def _flatten_into(
    leaves: list[Any], value: Any, around: set[int]
) -> Callable[[Iterator[Any]], Any]:
    opened = None if id(value) in around else _opened(value)
    if opened is None:
        leaves.append(value)
        return next
    _, values, rebuilding = opened
    rebuild = rebuilding()
    inside = around | {id(value)}
    places = [_flatten_into(leaves, inner, inside) for inner in values]
    return lambda others: rebuild([place(others) for place in places])


def map_leaves(
    function: Callable[[Any], Any], value: Any, *, leaves: type | tuple[type, ...] = ()
) -> Any:
    """Return a copy of the structure with ``function`` of each leaf in its place.

    Args:
        function: a leaf -> what stands in its place.
        value: anything.
        leaves: classes of containers that are leaves here.

    >>> map_leaves(float, (1, {"a": 2}))
    (1.0, {'a': 2.0})
    """

    def mapped(value: Any, around: frozenset[int]) -> Any:
        is_leaf = id(value) in around or isinstance(value, leaves)
        if is_leaf or (opened := _opened(value)) is None:
            return function(value)
        inside = around | {id(value)}
        return opened[2]()([mapped(inner, inside) for inner in opened[1]])

    return mapped(value, frozenset())


def tensors_in(value: Any, *, once: bool = False) -> Iterator[Tensor]:
    """Yield every tensor among the leaves, in order.

    Args:
        value: anything.
        once: enter no container twice. Objects that all refer to each other, such as the nodes of
            a graph, are then read in the time that one copy of them takes.
    """
    yield from _tensors_in(value, {}, once)


def _tensors_in(value: Any, around: dict[int, Any], once: bool) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
        return
    if id(value) in around:
        return
    if type(value) in (tuple, list):
        inside = value
    elif (opened := _opened(value)) is not None:
        inside = opened[1]
    else:
        return
    around[id(value)] = value
    for inner in inside:
        yield from _tensors_in(inner, around, once)
    if not once:
        del around[id(value)]


def entries(value: Any) -> list[tuple[Any, Any]] | None:
    """Return (key, value) of what stands in a container, one level deep; None for a leaf.

    >>> entries([7, 8]), entries({"a": 7}), entries(7)
    ([(0, 7), (1, 8)], [('a', 7)], None)
    """
    opened = _opened(value)
    return None if opened is None else list(zip(opened[0], opened[1], strict=True))


def rebuilt(value: Any, inner: Iterable[Any]) -> Any:
    """Return a copy of a container with as many other entries; ``value`` is left untouched.

    A mapping or a sequence that cannot be written to becomes a dict or a tuple.

    Raises:
        TypeError: it is a leaf.
    """
    opened = _opened(value)
    if opened is None:
        raise TypeError(f"a {type(value).__name__} holds no entries: give a container")
    return opened[2]()(list(inner))


def is_record(value: Any) -> bool:
    """Whether it is an instance of a dataclass, of a class of attrs, or a ``SimpleNamespace``."""
    return _names_of(value) is not None


def _names_of(value: Any) -> list[str] | None:
    """Return the names of a record's fields that are set."""
    if isinstance(value, type):
        return None
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
    elif hasattr(type(value), "__attrs_attrs__"):
        names = [attribute.name for attribute in type(value).__attrs_attrs__]
    elif isinstance(value, SimpleNamespace):
        return list(vars(value))
    else:
        return None
    return [name for name in names if hasattr(value, name)]


def _opened(value: Any) -> _Opened | None:
    """Return keys, values, and what gives the function that makes the container of others."""
    if isinstance(value, _LEAVES):
        return None
    if isinstance(value, tuple | list | deque):
        return [*range(len(value))], list(value), partial(_sequence, value)
    registered = getattr(_pytree, "SUPPORTED_NODES", {}).get(type(value))
    if registered is not None and type(value) is not dict:
        inner, context = registered.flatten_fn(value)
        inner = list(inner)
        return (
            [*range(len(inner))],
            inner,
            lambda: lambda new: registered.unflatten_fn(new, context),
        )
    if isinstance(value, MAPPINGS):
        return list(value.keys()), list(value.values()), partial(_mapping, value)
    if isinstance(value, Mapping) and (name := _name_of_dict(value)) is not None:
        held = getattr(value, name)
        return list(held), list(held.values()), partial(_wrapped, value, name)
    if (names := _names_of(value)) is not None:
        return list(names), [getattr(value, name) for name in names], partial(_record, value, names)
    return None


def _name_of_dict(value: Mapping[Any, Any]) -> str | None:
    """Return the attribute in which a mapping of another class holds its entries as a dict."""
    slots = [getattr(kind, "__slots__", ()) for kind in type(value).__mro__]
    names = [name for some in slots for name in ((some,) if isinstance(some, str) else some)]
    for name in (*getattr(value, "__dict__", ()), *names):
        held = getattr(value, name, None)
        if type(held) in (dict, OrderedDict) and list(held) == list(value):
            return name
    return None


def _sequence(value: Any) -> _Rebuild:
    kind = type(value)
    if kind in (tuple, list):
        return kind
    if isinstance(value, tuple):
        make = getattr(kind, "_make", kind)  # of a named tuple

        def tuple_of(inner: list[Any]) -> Any:
            try:
                return make(inner)
            except Exception:  # a constructor of its own, or a torch.Size of no numbers
                return tuple(inner)

        return tuple_of
    bare: Any = []
    try:
        emptied = copy.copy(value)
        if emptied is not value:
            emptied.clear()
            bare = emptied
    except Exception:  # cannot be written to
        pass

    def extended(inner: list[Any]) -> Any:
        try:
            made = copy.copy(bare)
            made.extend(inner)
            return made
        except Exception:  # it takes no such entries
            return list(inner)

    return extended


def _mapping(value: Mapping[Any, Any]) -> _Rebuild:
    keys = list(value)
    if type(value) is dict:
        return lambda inner: dict(zip(keys, inner, strict=True))
    bare: Any = {}
    for emptied in (_with_nothing, _cleared):
        try:
            copied = copy.copy(value)
            if copied is not value:
                bare = emptied(copied, keys)
                break
        except Exception:  # cannot be written to, or not with None
            continue

    def mapping_of(inner: list[Any]) -> Any:
        try:
            made = copy.copy(bare)
            for key, one in zip(keys, inner, strict=True):
                made[key] = one
            return made
        except Exception:  # it takes no such entries
            return dict(zip(keys, inner, strict=True))

    return mapping_of


def _with_nothing(emptied: Any, keys: list[Any]) -> Any:
    for key in keys:
        emptied[key] = None
    return emptied


def _cleared(emptied: Any, keys: list[Any]) -> Any:
    emptied.clear()
    return emptied


def _wrapped(value: Any, name: str) -> _Rebuild:
    """Return the copies of a mapping that holds its entries in a dict of its own."""
    bare, dicts = copy.copy(value), _mapping(getattr(value, name))
    if bare is value:
        return dicts
    object.__setattr__(bare, name, {})

    def wrapped(inner: list[Any]) -> Any:
        made = copy.copy(bare)
        object.__setattr__(made, name, dicts(inner))
        return made

    return wrapped


def _record(value: Any, names: list[str]) -> _Rebuild:
    def filled(record: Any, inner: Iterable[Any]) -> Any:
        made = copy.copy(record)
        if made is record:  # a class of one instance
            made = object.__new__(type(record))
        for name, one in zip(names, inner, strict=True):
            object.__setattr__(made, name, one)  # a frozen one as well
        return made

    bare = filled(value, [None] * len(names))
    return lambda inner: filled(bare, inner)
