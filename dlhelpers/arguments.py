"""Checks of arguments that many functions need: each names what was given, and what to give."""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

__all__ = [
    "model_inputs",
    "need_callable",
    "need_decibels",
    "need_seconds",
    "shard_of",
    "whole_number",
]


def whole_number(name: str, value: Any, least: int, most: int | None = None) -> int:
    """Return ``value`` as an int; NumPy's integers are whole numbers as well, True is none.

    Raises:
        ValueError: it is no whole number, or out of range.
    """
    try:
        found = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        found = None
    if found is None or not least <= found <= (2**63 - 1 if most is None else most):
        range_ = f", {least} or more" if most is None else f" from {least} to {most}"
        raise ValueError(f"{name} must be a whole number{range_}, got {value!r}")
    return found


def need_seconds(name: str, value: Any) -> None:
    """Raise ValueError where a budget is not a positive, finite number of seconds."""
    if not (isinstance(value, Real) and math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a positive number of seconds, got {value!r}")


def need_decibels(name: str, value: Any) -> None:
    """Raise ValueError where a bound is no number: NaN would let everything pass."""
    if not isinstance(value, Real) or isinstance(value, bool) or math.isnan(value):
        raise ValueError(f"{name} must be a number of decibels, such as 20.0, got {value!r}")


def shard_of(value: Any) -> tuple[int, int]:
    """Return (rank, world) as integers.

    Raises:
        ValueError: it is no such pair.
    """
    try:
        rank, world = (whole_number("shard", part, 0) for part in value)
    except (TypeError, ValueError):
        rank, world = 0, 0
    if not rank < world:
        raise ValueError(f"shard must be (rank, world) with 0 <= rank < world, got {value!r}")
    return rank, world


def model_inputs(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return (positional, keyword) arguments: one rule for what stands for a model's inputs.

    A tuple holds positional arguments, a mapping keyword ones; anything else is the only argument,
    a list as well, and a named tuple such as PackedSequence. A mapping that is itself the only
    argument goes into a tuple of one.

    >>> model_inputs((1, 2)), model_inputs({"x": 1}), model_inputs([1, 2]), model_inputs(({},))
    (((1, 2), {}), ((), {'x': 1}), (([1, 2],), {}), (({},), {}))
    """
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    is_plain = isinstance(inputs, tuple) and not hasattr(inputs, "_fields")
    return inputs if is_plain else (inputs,), {}


def need_callable(fn: object, name: str = "fn") -> Callable[[], Any]:
    """Return ``fn``, or raise TypeError: a profiler runs a function without arguments."""
    if not callable(fn):
        raise TypeError(
            f"{name} must be a function without arguments, got {type(fn).__name__}: write "
            "lambda: train(model)"
        )
    inner = getattr(fn, "func", fn)  # functools.partial
    for function in (inner, type(inner).__call__):
        for is_lazy, run in (
            (inspect.isgeneratorfunction, f"list({name}())"),
            (inspect.isasyncgenfunction, f"asyncio.run(...) of what goes through {name}()"),
            (inspect.iscoroutinefunction, f"asyncio.run({name}())"),
        ):
            if is_lazy(function):
                raise TypeError(
                    f"{name} must be a function that does its work when it is called, but "
                    f"{getattr(inner, '__name__', inner)} only begins it: write lambda: {run}"
                )
    return fn
