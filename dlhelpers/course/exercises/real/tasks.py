"""What is a real exercise, and what did an attempt reach?"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dlhelpers.measure import Comparison

__all__ = [
    "BlankError",
    "OwnError",
    "Reached",
    "RefusedError",
    "Task",
    "given",
    "is_blank",
    "speedup_reached",
]


_CONSTANT = {"RESUME", "LOAD_CONST", "RETURN_VALUE", "RETURN_CONST"}


class BlankError(Exception):
    """The answer is still ``...``."""


class OwnError(ValueError):
    """What the reader wanted to work on could not be made."""


class RefusedError(Exception):
    """The answer solves another task; the message says which rule it breaks."""


@dataclass(frozen=True)
class Reached:
    """What an attempt reached, by measurement.

    Attributes:
        value, low, high: the figure and its interval; low and high None for what was counted.
        unit: of the figure, as it is written after it.
        passed: whether the goal is reached.
        advice: one thing to try next, where it is not.
    """

    value: float
    unit: str
    passed: bool
    advice: str = ""
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.low is None:
            return f"{self.value:.3g} {self.unit}"
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}] {self.unit}"


@dataclass(frozen=True)
class Task:
    """A task of 20 to 30 minutes with a goal that is measured.

    Attributes:
        id: the lesson's number, such as ``05``.
        goal: what must be reached, with its number.
        offered: name -> a function that makes what can be worked on, anew at each call.
        own: what the reader's own function must make in its place.
        measure: (such a function, answer) -> what was reached; raises RefusedError or BlankError.
        rubric: what a good explanation says.
        explanation: a model answer in three sentences.
        solution: function whose source is one right answer.
    """

    id: str
    goal: str
    offered: Mapping[str, Callable[[], Any]]
    own: str
    measure: Callable[[Callable[[], Any], Callable[..., Any]], Reached]
    rubric: tuple[str, ...]
    explanation: str
    solution: Callable[..., Any]


def is_blank(answer: Any) -> bool:
    """Whether an answer is ``...``, or a function that can be seen to return nothing else."""
    if answer is None or answer is ...:
        return True
    if not inspect.isfunction(answer):
        return False
    steps = list(dis.get_instructions(answer))
    does = {step.opname for step in steps}
    values = [step.argval for step in steps if step.opname in ("LOAD_CONST", "RETURN_CONST")]
    return does <= _CONSTANT and values[-1:] in ([None], [...])


def given(answer: Callable[..., Any], *arguments: Any) -> Any:
    """Return what the reader's function returns.

    Raises:
        BlankError: that is nothing, or ``...``.
    """
    result = answer(*arguments)
    if result is None or result is ...:
        raise BlankError
    return result


def speedup_reached(found: Comparison, goal: float, advice: str) -> Reached:
    """Return what a comparison says of a goal: its whole interval must lie at it or above."""
    if found.low < goal <= found.high:
        advice = "the interval holds the goal: close other programs and run again. " + advice
    passed = found.low >= goal
    unit = f"times as fast (goal: the interval's lower end at {goal:g} or above)"
    return Reached(found.speedup, unit, passed, "" if passed else advice, found.low, found.high)
