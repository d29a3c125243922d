"""What would a loss give for other outputs? Its one call is played again, not made again.

The recorded calls of torch functions are repeated in order with other tensors in the place of its
arguments. Nothing of the reader's code runs, so its counters, files and buffers stay as they are.
What depends on numbers that Python read (``.item()``, an ``if``) is played only as long as the
same numbers are read.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dlhelpers.trees import tensors_in

from .calls import NAME_OF, Inside
from .values import Values

__all__ = ["Tape"]


_WRITES = ("__setitem__", "__set__", "__iadd__", "__isub__", "__imul__", "__itruediv__")


class _OtherPathError(Exception):
    """Another path would be taken, or the graph would be used."""


class Tape:
    """The recorded call of a loss.

    Args:
        inside: the call, which raised nothing.
        mute: play torch's own losses as 0, so that only the rest of the loss is left.
    """

    def __init__(self, inside: Inside, *, mute: bool = False):
        self._inside = inside
        self._mute = mute
        value = inside.value[0] if type(inside.value) is tuple and inside.value else inside.value
        self._value = value

    @property
    def is_faithful(self) -> bool:
        """Whether the call is played with the value that it had."""
        if Values(self._value).is_empty:
            return False
        again, value = self.value([]), self._value.detach().double().mean().item()
        close = again is not None and math.isclose(again, value, rel_tol=1e-4, abs_tol=1e-6)
        return close or (again is not None and math.isnan(again) and math.isnan(value))

    def is_constant(self, outputs: Tensor) -> bool:
        """Whether the loss does not depend on these outputs."""
        values = [self.value([(outputs, scale * outputs.detach())]) for scale in (1, -0.5, 3)]
        return None not in values and len(set(values)) == 1

    def value(self, places: Sequence[tuple[Tensor, Tensor]]) -> float | None:
        """Return the loss (its mean, if it is unreduced) with other tensors, or None.

        Args:
            places: (tensor among the arguments, tensor of its shape and dtype to stand for it).
        """
        with torch.no_grad():
            made = self.play(places)
        value = None if made is None else made.get(id(self._value))
        if Values(value).is_empty:
            return None
        return value.double().mean().item()

    def narrowed(self, whole: int, samples: int) -> Inside | None:
        """Return the call as it would be of fewer samples; None where it reads their number.

        Args:
            whole: size of the first axis of the tensors that are cut.
            samples: how many of it are kept.
        """
        arguments = [x for x in tensors_in(self._inside.arguments) if x.ndim and len(x) == whole]
        steps: list[tuple] = []
        with torch.no_grad():
            made = self.play([(x, x.detach()[:samples]) for x in arguments], steps)
        if made is None or id(self._value) not in made:
            return None
        value, kept = made[id(self._value)], _put(self._inside.arguments, made)
        return replace(self._inside, value=value, arguments=kept, steps=steps)

    def play(
        self, places: Sequence[tuple[Tensor, Tensor]], steps: list[tuple] | None = None
    ) -> dict[int, Any] | None:
        """Return the new tensor by the ``id`` of each recorded one; None where it cannot be.

        Args:
            places: as in :meth:`value`.
            steps: gets what is played, in the form of ``Inside.steps``.
        """
        if self._inside.is_random or self._inside.error is not None:
            return None
        made: dict[int, Any] = {}
        for tensor in tensors_in(self._inside.arguments):
            new = next((new for old, new in places if old is tensor), tensor.detach())
            made[id(tensor)] = new.clone()
        with warnings.catch_warnings(), contextlib.suppress(Exception):
            warnings.simplefilter("ignore")
            for func, args, kwargs, result in self._inside.steps:
                _keep_others(func, args, kwargs, made)
                args_, kwargs_ = _put(args, made), _put(kwargs, made)
                new = func(*args_, **kwargs_)
                if steps is not None:
                    steps.append((func, args_, kwargs_, new))
                new = torch.zeros_like(new) if self._mute and func in NAME_OF else new
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


def _keep_others(func: Callable, args: tuple, kwargs: Mapping, made: dict[int, Any]) -> None:
    """Let a step write into a copy where it wrote into a tensor that is not the call's own."""
    name = getattr(func, "__name__", "")
    writes = name in _WRITES or (name.endswith("_") and not name.endswith("__"))
    if name in ("backward", "register_hook") or kwargs.get("out") is not None:
        raise _OtherPathError
    if writes and args and isinstance(args[0], Tensor) and id(args[0]) not in made:
        made[id(args[0])] = args[0].detach().clone()


def _pair(old: Any, new: Any, made: dict[int, Any]) -> None:
    """Note what stands for what; what Python read must be the same."""
    if isinstance(old, Tensor):
        made[id(old)] = new
    elif isinstance(old, (tuple, list)) and any(True for _ in tensors_in(old)):
        for one, other in zip(old, new, strict=True):
            _pair(one, other, made)
    elif not bool(old == new):
        raise _OtherPathError
