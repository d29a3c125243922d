"""Can the reader reach a goal with a lesson's tool, and say why it was reached?

Each lesson has one real exercise: a goal that is measured, on something of the reader's own or one
of four that are offered, then three sentences of explanation. The ledger keeps the figure, the
sentences and the number of attempts; rubric and model answer are shown after a pass or three
attempts.

>>> attempt("05", lambda block: ...)
05 real exercise · not attempted yet · goal: at least 1.2 times as fast with the same multiply-adds
"""

from __future__ import annotations

import html
import importlib
import pkgutil
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from dlhelpers.course import ledger
from dlhelpers.course.claims import lessons
from dlhelpers.course.exercises.real.tasks import (
    BlankError,
    OwnError,
    Reached,
    RefusedError,
    Task,
    is_blank,
)

__all__ = ["Attempt", "attempt", "is_done", "names", "offered", "review"]

_SHOWN_AFTER = 3  # attempts


@dataclass(frozen=True, repr=False)
class Attempt:
    """What one attempt reached; shows itself.

    Attributes:
        task: the one that was attempted.
        reached: what was measured; None where the answer was blank or refused.
        refused: which rule the answer breaks, else empty.
        explained: whether three sentences of explanation are there.
        number: of the attempt, 0 for none.
    """

    task: Task = field(repr=False)
    reached: Reached | None = None
    refused: str = ""
    explained: bool = False
    number: int = 0

    @property
    def passed(self) -> bool:
        """Whether the goal was reached."""
        return self.reached is not None and self.reached.passed

    def __str__(self) -> str:
        head = f"{self.task.id} real exercise · "
        if not self.number:
            return f"{head}not attempted yet · goal: {self.task.goal}"
        if self.reached is None:
            return f"{head}refused: {self.refused}{self._review}"
        if not self.passed:
            advice = f" · try next: {self.reached.advice}" if self.reached.advice else ""
            return f"{head}not there yet: {self.reached}{advice}{self._review}"
        if not self.explained:
            return (
                f"{head}goal reached: {self.reached} · now explain in three sentences why, with "
                "explanation=..., and run again"
            )
        return f"{head}done: {self.reached}{self._review}"

    __repr__ = __str__

    @property
    def _review(self) -> str:
        if self.passed or self.number >= _SHOWN_AFTER:
            return f' · real.review("{self.task.id}") shows the rubric and a model answer'
        return ""

    def _repr_html_(self) -> str:
        colour = "currentColor"
        if self.number:
            colour = "#009e73" if self.passed else "#d55e00"
        style = f"border-left:4px solid {colour};padding:0.3em 0.8em"
        return f"<div style='{style}'>{html.escape(str(self))}</div>"


def attempt(
    id: str, answer: Any, on: str | Callable[[], Any] | None = None, explanation: str = ""
) -> Attempt:
    """Measure an answer and keep what it reached in the ledger; never raises because of it.

    Args:
        id: the lesson's number, such as ``05``.
        answer: the reader's function; ``...``, or a function that returns ``...`` or None, is
            not attempted, and nothing is measured.
        on: one of :func:`names`, or a function that makes something of the reader's own, anew
            at each call; the first of the names where None.
        explanation: three sentences: what made the difference, and how one knows.

    Raises:
        TypeError: answer is no function, or explanation no text.
        ValueError: there is no such exercise, nothing of this name is offered, or ``on`` raised.
    """
    task = _find(id)
    make, name = _made_by(task, on)
    if not isinstance(explanation, str):
        raise TypeError(f"explanation must be text, got {explanation!r}")
    if is_blank(answer):
        return Attempt(task)
    if not callable(answer):
        raise TypeError(f"answer must be a function, as the cell's first lines have it: {answer!r}")
    reached, refused = None, ""
    try:
        reached = task.measure(make, answer)
    except BlankError:
        return Attempt(task)
    except OwnError:  # no fault of the answer: nothing is counted
        raise
    except RefusedError as error:
        refused = str(error)
    except Exception as error:  # an answer may raise anything
        refused = f"it raised {type(error).__name__}: {error}"
    row = _keep(task, name, reached, explanation)
    return Attempt(task, reached, refused, _is_explained(row["explanation"]), row["attempts"])


def names(id: str) -> tuple[str, ...]:
    """Return the names of what an exercise offers to work on.

    Raises:
        ValueError: there is no such exercise.
    """
    return tuple(_find(id).offered)


def offered(id: str, name: str) -> Any:
    """Return one of the things that an exercise offers, to look at and to try.

    Raises:
        ValueError: there is no such exercise, or nothing of this name is offered.
    """
    return _made_by(_find(id), name)[0]()


def review(id: str) -> None:
    """Print the rubric beside the reader's sentences and a model answer; show one solution.

    They are shown after an attempt has passed, or after three attempts.

    Raises:
        ValueError: there is no such exercise.
    """
    from dlhelpers.course.notebook import show_source

    task, row = _find(id), _kept(id)
    if not row or not (row["passed"] or row["attempts"] >= _SHOWN_AFTER):
        print(
            f"The rubric is shown after an attempt that passes, or after {_SHOWN_AFTER} attempts; "
            f"so far: {row['attempts'] if row else 0}."
        )
        return
    print(f"You: {row['explanation'] or 'no explanation yet'}\n")
    print("A good explanation says:", *(f"- {point}" for point in task.rubric), sep="\n")
    print(f"\nOne that does: {task.explanation}\n")
    show_source(task.solution)


def is_done(row: Mapping[str, Any] | None) -> bool:
    """Whether a row of the ledger says that the goal was reached, and why, in three sentences."""
    return bool(row and row["passed"] and _is_explained(row["explanation"]))


def _find(id: str) -> Task:
    here = {module.name for module in pkgutil.iter_modules(__path__)}
    named = (lesson.stem.partition("_") for lesson in lessons())
    modules = {number: name for number, _, name in named if name in here}
    if id not in modules:
        known = ", ".join(sorted(modules))
        raise ValueError(f"there is no real exercise {id!r}; there are {known}")
    return importlib.import_module(f"{__name__}.{modules[id]}").TASK


def _made_by(task: Task, on: str | Callable[[], Any] | None) -> tuple[Callable[[], Any], str]:
    if on is None:
        on = next(iter(task.offered))
    if callable(on) and not isinstance(on, str):
        return partial(_own, on, task), "your own"
    if not isinstance(on, str) or on not in task.offered:
        known = ", ".join(map(repr, task.offered))
        raise ValueError(
            f"on must be one of {known}, or a function without arguments that makes {task.own}, "
            f"got {on!r}"
        )
    return task.offered[on], on


def _own(on: Callable[[], Any], task: Task) -> Any:
    try:
        return on()
    except Exception as error:
        raise OwnError(
            f"on raised {type(error).__name__}: {error}; it must make {task.own}, anew at each call"
        ) from error


def _is_explained(text: str) -> bool:
    """Whether a text has three sentences, of three words or more each."""
    found = re.split(r"(?<=[.!?])\s+", text.strip())
    return sum(len(re.findall(r"\w+", sentence)) > 2 for sentence in found) >= 3


def _kept(id: str) -> dict[str, Any] | None:
    try:
        rows = ledger.read().get("real", [])
    except (OSError, ledger.LedgerError):
        return None
    return next((row for row in rows if row["id"] == id), None)


def _keep(task: Task, on: str, reached: Reached | None, explanation: str) -> dict[str, Any]:
    """Write an attempt to the ledger; a figure that passed stays when a later attempt does not."""
    old = _kept(task.id) or {"attempts": 0, "passed": False, "explanation": ""}
    row = {
        "id": task.id, "on": on, "passed": False, "value": None, "low": None, "high": None,
        "unit": "",
    }  # fmt: skip
    if reached:
        row |= {key: getattr(reached, key) for key in ("passed", "value", "low", "high", "unit")}
    if old["passed"] and not row["passed"]:
        row = dict(old)
    row |= {
        "attempts": old["attempts"] + 1,
        "explanation": explanation.strip() or old["explanation"],
    }
    ledger.record(row, "real")
    return row
