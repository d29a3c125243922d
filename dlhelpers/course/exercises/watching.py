"""Does an answer compute what the task asks, or call it, look it up, or change what it was given?

``Watch`` records the functions that an answer calls: Python's by their frames, torch's as they pass
``__torch_function__``. The cases made here apply to many exercises.
"""

from __future__ import annotations

import copy
import dis
import operator
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from fnmatch import fnmatchcase
from types import CodeType, FrameType
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from dlhelpers.course.exercises import Case

__all__ = ["Operators", "Watch", "has_loop", "unchanged", "unseen", "whole"]

_EXERCISES = __name__.rpartition(".")[0]
_MOST_CALLS = 5_000


class Operators(TorchFunctionMode):
    """Hand the name of each torch function that is called to ``note``, such as ``torch.stack``."""

    def __init__(self, note: Callable[[str], object]) -> None:
        super().__init__()
        self._note = note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        module = getattr(func, "__module__", None) or "torch.Tensor"
        self._note(f"{module}.{getattr(func, '__qualname__', '').rpartition('.')[2]}")
        return func(*args, **(kwargs or {}))


class Watch:
    """Record the calls, while it is entered, of functions whose dotted names match a pattern.

    Args:
        patterns: as fnmatch reads them, such as ``torch.*cross_entropy*``. Methods of the objects
            that an exercise hands in never match, its solution and its other functions do.

    Frames are seen for the first 5,000 calls, and not while another profiler runs in this thread.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        self._patterns = patterns
        self._open = ExitStack()
        self._known: dict[CodeType, str] = {}
        self._calls = 0
        self.found: list[str] = []

    def __enter__(self) -> Watch:
        if any(pattern.startswith("torch") for pattern in self._patterns):
            self._open.enter_context(Operators(self._note))
        if self._patterns and sys.getprofile() is None:
            self._open.callback(sys.setprofile, None)
            sys.setprofile(self._see)
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def _see(self, frame: FrameType, event: str, _: Any) -> None:
        if event != "call":
            return
        self._calls += 1
        if self._calls > _MOST_CALLS:
            sys.setprofile(None)  # a long computation would take several times as long
        code = frame.f_code
        if code not in self._known:
            self._known[code] = self._name(frame.f_globals.get("__name__", ""), code.co_qualname)
        if self._known[code]:
            self.found.append(self._known[code])

    def _name(self, module: str, name: str) -> str:
        """Return the dotted name if it counts, else nothing."""
        is_handed_in = module.startswith(_EXERCISES) and "." in name
        is_no_function = name.startswith(("<", "__")) or module == "dlhelpers._former"
        name = f"{module}.{name}"
        return name if not (is_handed_in or is_no_function) and self._matches(name) else ""

    def _matches(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self._patterns)

    def _note(self, name: str) -> None:
        if self._matches(name):
            self.found.append(name)


def has_loop(answer: Any) -> bool:
    """Whether a function has a for, a while or a comprehension, or defines what has one."""
    function = getattr(answer, "function", answer)
    return _loops(getattr(function, "__code__", None))


def _loops(code: Any) -> bool:
    if not isinstance(code, CodeType):
        return False
    names = (instruction.opname for instruction in dis.get_instructions(code))
    return any("FOR_ITER" in name or "JUMP_BACKWARD" in name for name in names) or any(
        map(_loops, code.co_consts)
    )


def unseen(*tests: Callable[[Any], bool]) -> Case:
    """Return the case with values that no message names."""
    return Case(
        "other values",
        "the examples that the messages name come out right, other values do not. The task asks "
        "for any arguments: compute the answer from them, without a table of examples and without "
        "a constant or a special case that fits only those",
        lambda f: all(test(f) for test in tests),
    )


def whole(*arguments: Any) -> Case:
    """Return the case that wants integers where the task counts."""

    def test(f: Any) -> bool:
        found = f(*arguments)
        try:
            for number in found if isinstance(found, (tuple, list)) else (found,):
                operator.index(number)
        except TypeError:
            return False
        return True

    return Case(
        "a whole number",
        "the value is right, but it is a float, and the task asks for integers: a float is "
        "inexact beyond 2^53, and range() and shapes refuse it. Use // in place of /, and int(), "
        "round() or math.ceil() in place of NumPy's rounding",
        test,
    )


def unchanged(make: Callable[[], tuple[Any, ...]]) -> Case:
    """Return the case that compares an answer's arguments with those that it was given."""

    def test(f: Any) -> bool:
        given = make()
        before = copy.deepcopy(given)
        f(*given)
        return all(map(_same, given, before))

    return Case(
        "what was given",
        "the result is right, but an argument was changed in place, so a second call would give "
        "another result. The task asks for a new value: copy before you change anything, and use "
        "a * b in place of a *= b",
        test,
    )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return bool(np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b)
