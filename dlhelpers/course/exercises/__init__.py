"""Is the learner's answer right, and if not, which mistake is it?

An exercise is a few cases. Each case exposes one mistake and says which; the first case that fails
is the one that is shown. The solution is the package's own code, which an answer may not call where
the task is to write it.

>>> check("01.5", lambda logits: logits > 0.5).failed
'a small positive logit'
"""

from __future__ import annotations

import html
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from dlhelpers.course.claims import lessons

__all__ = ["Case", "Exercise", "Result", "check", "hint", "ids", "solution"]


@dataclass(frozen=True)
class Case:
    """One thing that an answer must get right.

    Attributes:
        name: what is tried.
        mistake: what is wrong with an answer that fails here, and what to look at.
        test: (answer) -> True where it is right; may raise. Makes its own fresh arguments.
    """

    name: str
    mistake: str
    test: Callable[[Any], bool]


@dataclass(frozen=True)
class Exercise:
    """A task, the cases of its check, hints from weak to strong, and the solution.

    Attributes:
        id: notebook's number and its own, such as ``01.2``.
        title, task: as the notebook says them.
        cases: in the order in which they are tried.
        hints: each says a little more than the one before.
        solution: function or class whose source is the answer.
        by_hand: patterns of the functions that an answer must not call, as `watching.Watch`
            takes them.
    """

    id: str
    title: str
    task: str
    cases: tuple[Case, ...]
    hints: tuple[str, ...]
    solution: Any
    by_hand: tuple[str, ...] = ()


@dataclass(frozen=True, repr=False)
class Result:
    """What the check of an answer found; shows itself.

    Attributes:
        exercise: the one that was checked.
        failed: name of the first case that failed, None where all passed or none was tried.
        message: what is wrong there, or how to start.
        attempted: False while the answer is still ``...``.
    """

    exercise: Exercise = field(repr=False)
    failed: str | None
    message: str
    attempted: bool = True

    @property
    def passed(self) -> bool:
        """Whether every case passed."""
        return self.attempted and self.failed is None

    def __str__(self) -> str:
        id = self.exercise.id
        if not self.attempted:
            return f"{id} · not attempted yet · {self.message}"
        if self.passed:
            return f"{id} · passes, {len(self.exercise.cases)} cases"
        return f'{id} · fails "{self.failed}": {self.message}'

    __repr__ = __str__

    def _repr_html_(self) -> str:
        mark = "○" if not self.attempted else "✓" if self.passed else "✗"
        colour = {"○": "currentColor", "✓": "#009e73", "✗": "#d55e00"}[mark]
        return (
            f"<div style='border-left:4px solid {colour};padding:0.3em 0.8em'>"
            f"<b>{mark}</b> {html.escape(str(self))}</div>"
        )


def check(id: str, answer: Any) -> Result:
    """Say what is right and what is not about an answer; never raises because of it.

    Args:
        id: of the exercise, such as ``01.2``.
        answer: the learner's function or value; ``...`` or None, or a function that returns
            either, counts as not attempted.

    Raises:
        ValueError: there is no such exercise.
    """
    exercise = _find(id)
    not_yet = Result(
        exercise,
        None,
        f'replace the ... and run this cell again; exercises.hint("{id}") helps',
        attempted=False,
    )
    if answer is None or answer is ...:
        return not_yet
    watched = _Watched(answer, exercise.by_hand) if callable(answer) else None
    for case in exercise.cases:
        error = ""
        try:
            passed = bool(case.test(watched or answer))
        except Exception as raised:
            passed, error = False, f"it raised {type(raised).__name__}: {raised}. "
        if watched is not None and watched.is_empty:
            return not_yet
        if watched is not None and watched.borrowed:
            return Result(exercise, "in your own code", _borrowed(exercise, watched.borrowed[0]))
        if not passed:
            return Result(exercise, case.name, error + case.mistake)
    return Result(exercise, None, "")


def _borrowed(exercise: Exercise, name: str) -> str:
    return (
        f"the answer calls {name}, but the task is to write this yourself: {exercise.task} "
        f'Compute it from the arguments; exercises.hint("{exercise.id}") shows where to begin'
    )


class _Watched:
    """The learner's function, what it called, and whether it only ever returned ``...``."""

    def __init__(self, function: Callable[..., Any], by_hand: tuple[str, ...]) -> None:
        self.function = function
        self._by_hand = by_hand
        self._calls = self._empty = 0
        self.borrowed: list[str] = []

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from dlhelpers.course.exercises.watching import Watch

        self._calls += 1
        watch = Watch(self._by_hand)
        try:
            with watch:
                result = self.function(*arguments, **options)
        finally:
            self.borrowed += watch.found
        self._empty += result is None or result is ...
        return result

    @property
    def is_empty(self) -> bool:
        return 0 < self._calls == self._empty


def hint(id: str, n: int = 1) -> str:
    """Return the n-th hint of an exercise, 1 the weakest.

    Raises:
        ValueError: there is no such exercise, or no such hint.
    """
    hints = _find(id).hints
    if not 1 <= n <= len(hints):
        raise ValueError(f"exercise {id} has hints 1 to {len(hints)}, got {n}")
    more = f' (more: hint("{id}", {n + 1}))' if n < len(hints) else ""
    return f"{n} of {len(hints)}: {hints[n - 1]}{more}"


def solution(id: str) -> None:
    """Show the source of an exercise's solution.

    Raises:
        ValueError: there is no such exercise.
    """
    from dlhelpers.course.notebook import show_source

    show_source(_find(id).solution)


def ids(notebook: str) -> tuple[str, ...]:
    """Return the ids of a notebook's exercises.

    Args:
        notebook: its number or its stem, such as ``01`` or ``01_pairing``.

    >>> ids("01_pairing")
    ('01.1', '01.2', '01.3', '01.4', '01.5')
    """
    return tuple(_of(notebook.partition("_")[0]))


def _find(id: str) -> Exercise:
    known = _of(str(id).partition(".")[0])
    if id not in known:
        every = [i for number in _modules() for i in _of(number)]
        raise ValueError(f"there is no exercise {id!r}; there are {', '.join(every)}")
    return known[id]


@cache
def _of(number: str) -> dict[str, Exercise]:
    if number not in _modules():
        return {}
    module = importlib.import_module(f"{__name__}.{_modules()[number]}")
    return {exercise.id: exercise for exercise in module.EXERCISES}


@cache
def _modules() -> dict[str, str]:
    """Return a lesson's number -> its module of exercises, which bears the lesson's name."""
    here = {module.name for module in pkgutil.iter_modules(__path__)}
    named = (lesson.stem.partition("_") for lesson in lessons())
    return {number: name for number, _, name in named if name in here}
