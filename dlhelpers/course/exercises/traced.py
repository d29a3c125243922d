"""Does a dot product use its zero points inside the loop? Integers that record it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

__all__ = ["subtracts_inside"]

_ADDITIVE = (np.add, np.subtract)


def subtracts_inside(
    dot: Any, qx: Sequence[int], qw: Sequence[int], x_zero: int, w_zero: int
) -> bool:
    """Whether a zero point is subtracted from single elements or products, one after another.

    Args:
        dot: called with two lists and two integers, of a class of their own.
        qx, qw: four elements or more.
    """
    seen: list[str] = []
    xs, ws = (
        [_Traced(value, seen, pairs=frozenset([i])) for i, value in enumerate(values)]
        for values in (qx, qw)
    )
    zeros = (
        _Traced(value, seen, zeros=frozenset([name]))
        for name, value in (("x_zero", x_zero), ("w_zero", w_zero))
    )
    with _Vectors(seen):
        dot(xs, ws, *zeros)
    return bool(seen)


class _Traced(int):
    """An integer that knows which pairs of elements and which zero points it was made from."""

    seen: list[str]
    pairs: frozenset[int]
    zeros: frozenset[str]
    casts: int

    def __new__(
        cls,
        value: int,
        seen: list[str],
        pairs: frozenset[int] = frozenset(),
        zeros: frozenset[str] = frozenset(),
    ) -> _Traced:
        self = super().__new__(cls, value)
        self.seen, self.pairs, self.zeros, self.casts = seen, pairs, zeros, 0
        return self

    def _made(self, value: int, other: Any) -> Any:
        if not isinstance(other, int):
            return NotImplemented
        pairs = self.pairs | getattr(other, "pairs", frozenset())
        zeros = self.zeros | getattr(other, "zeros", frozenset())
        return _Traced(value, self.seen, pairs, zeros)

    def _added(self, value: int, other: Any) -> Any:
        made = self._made(value, other)
        parts = (self, other) if isinstance(other, _Traced) and len(made.pairs) == 1 else ()
        # n * x_zero * w_zero may be where a sum begins
        if any(part.zeros and (part.pairs or len(part.zeros) == 1) for part in parts):
            self.seen.append("a single element")
        return made

    def __add__(self, other: Any) -> Any:
        return self._added(super().__add__(other), other)

    def __radd__(self, other: Any) -> Any:
        return self._added(super().__radd__(other), other)

    def __sub__(self, other: Any) -> Any:
        return self._added(super().__sub__(other), other)

    def __rsub__(self, other: Any) -> Any:
        return self._added(super().__rsub__(other), other)

    def __mul__(self, other: Any) -> Any:
        return self._made(super().__mul__(other), other)

    def __rmul__(self, other: Any) -> Any:
        return self._made(super().__rmul__(other), other)

    def __neg__(self) -> _Traced:
        return _Traced(super().__neg__(), self.seen, self.pairs, self.zeros)

    def __pos__(self) -> _Traced:
        return self

    def __int__(self) -> int:
        self.casts += 1
        if self.zeros and self.casts > 3:  # int(x_zero), once per element
            self.seen.append("a cast")
        return super().__int__()

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        return _Array.apply(self.seen, ufunc, method, inputs, options)


class _Array(np.ndarray):
    """What NumPy made of elements and a zero point."""

    seen: list[str]

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        return _Array.apply(self.seen, ufunc, method, inputs, options)

    @staticmethod
    def apply(seen: list[str], ufunc: Any, method: str, inputs: Any, options: Any) -> Any:
        plain = [
            int.__int__(value)
            if isinstance(value, _Traced)
            else value.view(np.ndarray)
            if isinstance(value, _Array)
            else value
            for value in inputs
        ]
        if "out" in options:
            options["out"] = tuple(
                out.view(np.ndarray) if isinstance(out, _Array) else out for out in options["out"]
            )
        found = getattr(ufunc, method)(*plain, **options)
        if np.size(found) > 1:
            if method == "__call__" and ufunc in _ADDITIVE:
                seen.append("an array")
            found = found.view(_Array)
            found.seen = seen
        return found


class _Vectors(TorchFunctionMode):
    """See torch add or subtract tensors of more than one element; a dot product needs neither."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self._seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "").strip("_")
        adds = name in ("add", "iadd", "radd", "sub", "isub", "rsub", "subtract")
        if adds and isinstance(found, torch.Tensor) and found.numel() > 1:
            self._seen.append("a tensor")
        return found
