"""What does a forward read and change besides tensors? Random streams, and attributes of modules.

A recomputation has to start from the state that forward started from, and to leave no trace:

    state before forward -> forward -> ... state found -> (state before, recompute) -> state found

torch.utils.checkpoint does that for torch's default generators. Here it is done for Python's
``random``, NumPy's global state, every generator that the modules or the functions that they call
hold (``random.Random``, ``numpy.random.Generator`` and ``RandomState``, ``torch.Generator``), and
for attributes that a forward rebinds (a counter) or containers that it fills (a cache).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import BuiltinFunctionType, FunctionType
from typing import Any

from torch import Tensor, nn

from dlhelpers.reached import is_foreign, names_in, objects_in, same_state, streams_of

__all__ = ["KEPT_IN_MODULES", "State", "saves_unwritten"]

# attributes that checkpoint_blocks gives to a module: its plan, steady buffers, forward passes
KEPT_IN_MODULES = ("_dlhelpers_checkpointed", "_dlhelpers_steady", "_dlhelpers_passes")

_CONTAINERS = (dict, list, set, deque)
_MISSING = object()


class State:
    """The streams and attributes before one forward, of which those that it changed are kept.

    >>> import random
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
        self._streams = [(access, access[0]()) for access in streams_of(blocks)]
        self._attributes = [(m, _copied(vars(m))) for m in modules if not is_foreign(type(m))]
        self._changed: list[tuple[dict[str, Any], str, Any]] = []

    def keep_changed(self) -> None:
        """Forget, after forward, what it left alone."""
        self._streams = [
            (access, state) for access, state in self._streams if not same_state(access[0](), state)
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


def saves_unwritten(roots: Iterable[Any]) -> bool:
    """Whether objects or what they call may save memory for backward before it is written.

    ``rrelu`` alone does, of torch's functions: its noise.
    """
    names = {"rrelu", "rrelu_", "RReLU"}
    return any(
        isinstance(value, nn.RReLU)
        or (isinstance(value, BuiltinFunctionType) and value.__name__ in names)
        or (isinstance(value, FunctionType) and not names.isdisjoint(names_in(value.__code__)))
        for value in objects_in(roots)
    )


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
