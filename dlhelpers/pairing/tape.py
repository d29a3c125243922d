"""What would a loss give for other outputs? Its one call is played again, not made again.

The recorded calls of torch functions are repeated in order with other tensors in the place of its
arguments. Nothing of the reader's code runs, so its counters, files and buffers stay as they are.
What depends on numbers that Python read (``.item()``, an ``if``) is played only as long as the
same numbers are read.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dlhelpers.fakes import tensors_in

from .calls import Inside

__all__ = ["Tape"]


class _OtherPathError(Exception):
    """Another path would be taken, or a tensor of the program would be written to."""


class Tape:
    """The recorded call of a loss.

    Args:
        inside: the call, which raised nothing.
    """

    def __init__(self, inside: Inside):
        self._inside = inside
        value = inside.value[0] if type(inside.value) is tuple and inside.value else inside.value
        self._value = value

    def value(self, places: Sequence[tuple[Tensor, Tensor]]) -> float | None:
        """Return the loss (its mean, if it is unreduced) with other tensors, or None.

        Args:
            places: (tensor among the arguments, tensor of its shape and dtype to stand for it).
        """
        with torch.no_grad():
            made = self.play(places)
        value = None if made is None else made.get(id(self._value))
        if not isinstance(value, Tensor) or value.numel() == 0 or value.is_complex():
            return None
        return value.double().mean().item()

    def play(self, places: Sequence[tuple[Tensor, Tensor]]) -> dict[int, Any] | None:
        """Return the new tensor by the ``id`` of each recorded one; None where it cannot be."""
        if self._inside.is_random or self._inside.error is not None:
            return None
        made: dict[int, Any] = {}
        for tensor in tensors_in(self._inside.arguments):
            new = next((new for old, new in places if old is tensor), tensor.detach())
            made[id(tensor)] = new.clone()
        with warnings.catch_warnings(), contextlib.suppress(Exception):
            warnings.simplefilter("ignore")
            for func, args, kwargs, result in self._inside.steps:
                _need_own(func, args, kwargs, made)
                new = func(*_put(args, made), **_put(kwargs, made))
                _pair(result, new, made)
            return made
        return None


def _put(value: Any, made: Mapping[int, Any]) -> Any:
    """Put new tensors in the place of the recorded ones, in plain containers."""
    if isinstance(value, Tensor):
        if id(value) not in made and value.grad_fn is not None:
            raise _OtherPathError  # made by a step that was not seen
        return made.get(id(value), value)
    if isinstance(value, dict):
        return {key: _put(part, made) for key, part in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_put(part, made) for part in value)
    if isinstance(value, slice):
        return slice(*_put((value.start, value.stop, value.step), made))
    return value


def _need_own(func: Callable, args: tuple, kwargs: Mapping, made: Mapping[int, Any]) -> None:
    """Refuse a step that writes into a tensor of the program, and one that reads the graph."""
    name = getattr(func, "__name__", "")
    writes = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
    writes = writes or name in ("__set__", "__iadd__", "__isub__", "__imul__", "__itruediv__")
    if name in ("backward", "register_hook") or "out" in kwargs:
        raise _OtherPathError
    if writes and args and isinstance(args[0], Tensor) and id(args[0]) not in made:
        raise _OtherPathError


def _pair(old: Any, new: Any, made: dict[int, Any]) -> None:
    """Note what stands for what; what Python read must be the same."""
    if isinstance(old, Tensor):
        made[id(old)] = new
    elif isinstance(old, (tuple, list)) and any(True for _ in tensors_in(old)):
        for one, other in zip(old, new, strict=True):
            _pair(one, other, made)
    elif not bool(old == new):
        raise _OtherPathError
