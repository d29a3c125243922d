"""How far has the reader come, lesson by lesson? Predictions, exercises and minutes, not cells."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Any

from dlhelpers.course import exercises, ledger
from dlhelpers.course.claims import Lesson, all_claims, lessons
from dlhelpers.course.claims.said import score_of
from dlhelpers.course.exercises import real

__all__ = ["Learned", "LessonProgress", "learned"]


@dataclass(frozen=True)
class LessonProgress:
    """One lesson, with the notebook of its smaller tips.

    Attributes:
        lesson: the main one.
        right, predicted, asked: predictions that came out right, of those given, of those asked.
        passed, short: short exercises that passed, of all.
        real: whether the real exercise is done; None where there is none.
        minutes: that the lesson takes, its smaller tips included.
    """

    lesson: Lesson
    right: int
    predicted: int
    asked: int
    passed: int
    short: int
    real: bool | None
    minutes: int


@dataclass(frozen=True, repr=False)
class Learned:
    """The reader's progress in every lesson; shows itself."""

    lessons: tuple[LessonProgress, ...]

    @property
    def head(self) -> str:
        """All lessons together, in a line."""
        done = sum(bool(row.real) for row in self.lessons)
        there = sum(row.real is not None for row in self.lessons)
        right, predicted, passed, short = (
            sum(getattr(row, name) for row in self.lessons)
            for name in ("right", "predicted", "passed", "short")
        )
        return (
            f"{right} of {predicted} predictions right, {passed} of {short} short exercises "
            f"passed, {done} of {there} real exercises done"
        )

    def __repr__(self) -> str:
        table = [_HEADS, *map(_cells, self.lessons)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ("  ".join(map(str.ljust, cells, widths)).rstrip() for cells in table)
        return "\n".join([self.head, *lines])

    def _repr_html_(self) -> str:
        left = " style='text-align:left'"
        head = "".join(f"<th{left}>{name}</th>" for name in _HEADS)
        body = ""
        for row in self.lessons:
            _, *cells = map(html.escape, _cells(row))
            link = f"<a href='{row.lesson.stem}.ipynb'>{html.escape(_name(row.lesson))}</a>"
            body += f"<tr>{''.join(f'<td{left}>{cell}</td>' for cell in (link, *cells))}</tr>"
        return (
            f"<p>{self.head}</p><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        )


_HEADS = ("lesson", "predictions", "short exercises", "real exercise", "minutes")


def learned() -> Learned:
    """Return what the ledger of this machine says of the reader's progress.

    Raises:
        LedgerError: the ledger's file is no ledger.
    """
    try:
        found = ledger.read()
    except FileNotFoundError:
        found = {"rows": []}
    main = [lesson for lesson in lessons() if not lesson.continues]
    return Learned(tuple(_progress(lesson, found) for lesson in main))


def _progress(lesson: Lesson, found: dict[str, Any]) -> LessonProgress:
    parts = [other for other in lessons() if other.is_part_of(lesson)]
    stems = {other.stem for other in parts}
    claims = [claim for claim in all_claims() if claim.notebook in stems]
    ids = {claim.id for claim in claims}
    score = score_of(row for row in found["rows"] if row["id"] in ids)
    passed = {row["id"] for row in found.get("short", []) if row["passed"]}
    done = {row["id"]: row for row in found.get("real", [])}.get(lesson.number)
    short = exercises.ids(lesson.number)
    return LessonProgress(
        lesson=lesson,
        right=score.right,
        predicted=score.given + score.open,
        asked=sum(len(claim.asks) for claim in claims),
        passed=len(passed & set(short)),
        short=len(short),
        real=real.is_done(done) if _has_real(lesson) else None,
        minutes=sum(other.minutes for other in parts),
    )


def _has_real(lesson: Lesson) -> bool:
    try:
        return bool(real.names(lesson.number))
    except ValueError:
        return False


def _name(lesson: Lesson) -> str:
    return f"{lesson.number} {lesson.title}"


def _cells(row: LessonProgress) -> tuple[str, ...]:
    predicted = f"{row.right} of {row.predicted} right, {row.asked} asked" if row.asked else ""
    return (
        _name(row.lesson),
        predicted,
        f"{row.passed} of {row.short} passed" if row.short else "",
        "" if row.real is None else "done" if row.real else "to do",
        str(row.minutes),
    )
