"""What stands inside a nested value? One answer for inputs and outputs of every kind.

Opened are mappings, sequences, named tuples, dataclasses and classes of attrs, each with its
subclasses (the outputs of Hugging Face's models, ``PackedSequence``), and what is registered with
``torch.utils._pytree``. Anything else is a leaf: a tensor, a number, None, a module, a string.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree

__all__ = ["entries", "flatten", "is_record", "map_leaves", "rebuilt", "tensors_in"]

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
    place = _flatten_into(leaves, value)
    return leaves, lambda others: place(iter(others))


def _flatten_into(leaves: list[Any], value: Any) -> Callable[[Iterator[Any]], Any]:
    opened = _opened(value)
    if opened is None:
        leaves.append(value)
        return next
    _, values, rebuilding = opened
    rebuild = rebuilding()
    places = [_flatten_into(leaves, inner) for inner in values]
    return lambda others: rebuild([place(others) for place in places])


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """Return a copy of the structure with ``function`` of each leaf in its place.

    >>> map_leaves(float, (1, {"a": 2}))
    (1.0, {'a': 2.0})
    """
    opened = _opened(value)
    if opened is None:
        return function(value)
    return opened[2]()([map_leaves(function, inner) for inner in opened[1]])


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Give every tensor among the leaves, in order."""
    if isinstance(value, Tensor):
        yield value
    elif type(value) in (tuple, list):
        for inner in value:
            yield from tensors_in(inner)
    elif (opened := _opened(value)) is not None:
        for inner in opened[1]:
            yield from tensors_in(inner)


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
    if isinstance(value, Mapping):
        return list(value.keys()), list(value.values()), partial(_mapping, value)
    if (names := _names_of(value)) is not None:
        return list(names), [getattr(value, name) for name in names], partial(_record, value, names)
    return None


def _unflattened(unflatten: Callable[..., Any], context: Any, inner: list[Any]) -> Any:
    return unflatten(inner, context)


def _sequence(value: Any) -> _Rebuild:
    kind = type(value)
    if kind in (tuple, list):
        return kind
    if isinstance(value, tuple):
        make = getattr(kind, "_make", kind)  # of a named tuple

        def tuple_of(inner: list[Any]) -> Any:
            try:
                return make(inner)
            except TypeError:  # a constructor of its own, or a torch.Size of no numbers
                return tuple(inner)

        return tuple_of
    bare = copy.copy(value)
    bare.clear()

    def extended(inner: list[Any]) -> Any:
        made = copy.copy(bare)
        made.extend(inner)
        return made

    return extended


def _mapping(value: Mapping[Any, Any]) -> _Rebuild:
    keys = list(value)
    if type(value) is dict:
        return lambda inner: dict(zip(keys, inner, strict=True))
    bare: Any = {}
    try:
        emptied = copy.copy(value)
        for key in keys:
            emptied[key] = None  # type: ignore[index]
        bare = emptied
    except (TypeError, AttributeError):  # cannot be written to
        pass

    def mapping_of(inner: list[Any]) -> Any:
        made = copy.copy(bare)
        for key, one in zip(keys, inner, strict=True):
            made[key] = one
        return made

    return mapping_of


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
