"""Which tips, lessons and claims are there?

A lesson is a file ``lessons/STEM.toml``: what the list of lessons says of notebook STEM, and its
claims. ``tips.toml`` holds the tips. Both are read strictly: a row with an unknown key, tip or
threshold is an error that names file and entry, never a claim that quietly says something else.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from datetime import date, datetime
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, NoReturn, get_args

from dlhelpers.course.claims.break_even import MOST_POINTS, Axis
from dlhelpers.course.claims.claim import (
    CONFIRMED,
    YES,
    Claim,
    Condition,
    Kind,
    Lesson,
    Tip,
)
from dlhelpers.course.verdicts import Theory, Threshold

__all__ = ["all_claims", "all_tips", "find", "lessons", "load", "load_tips", "tip_of"]

_NEGLIGIBLE = 0.03
_FOLDER = Path(__file__).resolve().parent.parent
_STEM = re.compile(r"\d\d[a-z]?_[a-z0-9_]+")  # 06_fusion; 06b_more continues it


@cache
def lessons() -> tuple[Lesson, ...]:
    """Return the lessons in order, one for each file of ``lessons/``."""
    return tuple(map(_lesson, _lesson_files()))


@cache
def all_tips() -> tuple[Tip, ...]:
    """Return every tip, in order, with the notebooks that have claims of it."""
    treated = [(claim.tip, claim.notebook) for claim in all_claims()]
    return tuple(
        replace(tip, notebooks=tuple(dict.fromkeys(stem for id, stem in treated if id == tip.id)))
        for tip in load_tips(_FOLDER / "tips.toml")
    )


@cache
def all_claims() -> tuple[Claim, ...]:
    """Return every claim of every lesson, in order."""
    tips, found = load_tips(_FOLDER / "tips.toml"), {}
    for path in _lesson_files():
        for claim in load(path, tips):
            if claim.id in found:
                raise ValueError(f"{path.name}: {found[claim.id].notebook} has claim {claim.id!r}")
            found[claim.id] = claim
    return tuple(found.values())


def _lesson_files() -> list[Path]:
    return sorted((_FOLDER / "lessons").glob("*.toml"))


def _lesson(path: Path) -> Lesson:
    if not _STEM.fullmatch(path.stem):
        raise ValueError(f"{path.name}: a lesson's file is named as its notebook: 06_fusion.toml")
    head = _Row(path.name, {k: v for k, v in _document(path).items() if k != "claim"})
    lesson = Lesson(path.stem, head.text("title"), head.text("learn"), head.take("minutes", int))
    head.close()
    return lesson


def find(id: str) -> Claim:
    """Return the claim of that id.

    Raises:
        ValueError: there is none; the message names the nearest ones.
    """
    claims = {claim.id: claim for claim in all_claims()}
    if id in claims:
        return claims[id]
    near = get_close_matches(str(id), claims, n=3, cutoff=0.4) or sorted(claims)[:3]
    raise ValueError(
        f"there is no claim {id!r}; nearest: {', '.join(near)} "
        "(claims.all_claims() gives all of them)"
    )


def tip_of(claim: Claim) -> Tip:
    """Return the tip that a claim belongs to."""
    return next(tip for tip in all_tips() if tip.id == claim.tip)


def load_tips(path: str | Path) -> tuple[Tip, ...]:
    """Read and check a file of tips.

    Raises:
        ValueError: the file is no TOML, or a row breaks the schema; names file and entry.
    """
    tips = []
    for row in _rows(Path(path), "tip"):
        tip = Tip(
            id=row.identifier(r"[a-z0-9]+(-[a-z0-9]+)*", "as in 'pair-failure'"),
            says=row.text("says"),
            said_by=row.text("said_by"),
            note=row.text("note", ""),
            do=row.text("do", ""),
        )
        row.close()
        tips.append(tip)
    return _unique(tips, Path(path))


def load(path: str | Path, tips: tuple[Tip, ...] | None = None) -> tuple[Claim, ...]:
    """Read and check a file of claims.

    Args:
        path: a TOML file of ``[[claim]]`` tables with ``[[claim.condition]]`` tables in them; its
            stem is the claims' notebook.
        tips: the tips that claims may belong to; those of the course where None.

    Raises:
        ValueError: the file is no TOML, or a row breaks the schema; names file and entry.
    """
    known = [tip.id for tip in (all_tips() if tips is None else tips)]
    path = Path(path)
    return _unique([_claim(row, known, path.stem) for row in _rows(path, "claim")], path)


def _claim(row: _Row, tips: list[str], notebook: str) -> Claim:
    id = row.identifier(r"[a-z0-9_]+\.[a-z0-9]+(-[a-z0-9]+)*", "as in 'pairing.softmax-before-ce'")
    kind = row.one_of("kind", row.text("kind"), get_args(Kind))
    threshold = _threshold(row, kind)
    if kind != "time" and {"control", "negligible"} & row.names():
        row.fail(f"control and negligible belong to kind 'time', this one is {kind!r}")
    claim = Claim(
        id=id,
        tip=row.one_of("tip", row.text("tip"), tips),
        says=row.text("says"),
        source=row.text("source"),
        kind=kind,
        metric=row.text("metric"),
        threshold=threshold,
        unit=row.text("unit", ""),
        notebook=notebook,
        conditions=_conditions(row, kind, threshold),
        control=row.take("control", bool, kind == "time"),
        negligible=float(row.take("negligible", (float, int), _NEGLIGIBLE)),
        needs=row.text("needs", ""),
        words=_labels(row, "words", CONFIRMED),
        found=_labels(row, "found", YES),
        asks=tuple(row.take("ask", list, [])),
        sized=row.text("size", ""),
        axis=_axis(row, kind),
    )
    row.close()
    names = [condition.name for condition in claim.conditions]
    for key, asked in (("ask", claim.asks), ("size", (claim.sized,) if claim.sized else ())):
        if foreign := [name for name in asked if name not in names]:
            row.fail(f"{key} names {foreign[0]!r}, the conditions are {names}")
        if len({*asked}) < len(asked):
            row.fail(f"{key} names a condition twice: {list(asked)}")
    if claim.sized and (claim.kind == "accuracy" or isinstance(threshold.bound, bool)):
        row.fail("size asks for a positive number, as times, ratios and counts are")
    if claim.found != YES and not isinstance(threshold.bound, bool):
        row.fail(f"found puts truth values into words, and {threshold} asks for none")
    if not 0 < claim.negligible < 1:
        row.fail(f"negligible must lie between 0 and 1, such as 0.03, got {claim.negligible}")
    return claim


def _axis(row: _Row, kind: str) -> Axis | None:
    if "axis" not in row.names():
        return None
    inner = _Row(f"{row.where}, axis", row.take("axis", dict))
    axis = Axis(inner.text("unit"), tuple(inner.take("points", list)), inner.text("where", ""))
    inner.close()
    points = axis.points
    is_growing = all(type(p) in (int, float) and p > 0 for p in points) and (
        list(points) == sorted(set(points))
    )
    if not is_growing or not 2 <= len(points) <= MOST_POINTS:
        inner.fail(f"points must be 2 to {MOST_POINTS} growing positive numbers, got {points}")
    if kind != "time":
        inner.fail(f"an axis is measured in times, this claim is of kind {kind!r}")
    return axis


def _labels(row: _Row, key: str, usual: Mapping[str, str]) -> Mapping[str, str]:
    """Take a table of labels with the keys of the usual one."""
    labels = row.take(key, dict, dict(usual))
    for name, label in labels.items():
        row.one_of(key, name, usual)
        if not isinstance(label, str) or not label.strip():
            row.fail(f"{key}.{name} must be a label, got {label!r}")
    if missing := [name for name in usual if name not in labels]:
        row.fail(f"{key} lacks {missing[0]!r}, it needs {' and '.join(usual)}")
    return dict(labels)


def _conditions(row: _Row, kind: str, threshold: Threshold) -> tuple[Condition, ...]:
    tables, since, where = row.take("condition", list), row.day("since"), row.before_names("for")
    conditions: dict[str, Condition] = {}
    for number, table in enumerate(tables, start=1):
        inner = _Row(f"{row.where}, condition {number}", table)
        name = inner.text("name")
        if name == "control" or name in conditions:
            inner.fail(f"the name {name!r} is taken; 'control' is kept for the A/A comparison")
        conditions[name] = Condition(
            name=name,
            theory=inner.one_of("theory", inner.text("theory"), get_args(Theory)),
            why=inner.text("why"),
            threshold=_threshold(inner, kind) if "threshold" in inner.names() else threshold,
            since=inner.day("since", since),
            where=inner.before_names(where),
        )
        inner.close()
        if conditions[name].since < since:
            inner.fail(
                f"since {conditions[name].since} lies before the claim's {since}: give the claim "
                "the earliest day of its conditions"
            )
    if not conditions:
        row.fail("needs one [[claim.condition]] at least")
    return tuple(conditions.values())


def _threshold(row: _Row, kind: str) -> Threshold:
    text = row.text("threshold")
    try:
        threshold = Threshold.parse(text)
    except ValueError as error:
        row.fail(f"threshold {error}")
    if isinstance(threshold.bound, bool) and kind != "exact":
        row.fail(f"threshold {text!r} is for kind 'exact', this one is {kind!r}")
    if threshold.op == "within" and kind == "accuracy":
        row.fail(f"threshold {text!r} is a band of a ratio, and kind 'accuracy' is a difference")
    if kind == "time" and (threshold.op == "==" or threshold.bound <= 0):
        row.fail(f"threshold of a time must bound a positive speedup, such as '>= 1.05': {text!r}")
    return threshold


class _Row:
    """A TOML table that knows where it stands and which of its keys were taken."""

    def __init__(self, where: str, table: Any) -> None:
        self.where, self._taken = where, set()
        if not isinstance(table, dict):
            self.fail(f"must be a table, got {table!r}")
        self._table = table

    def fail(self, what: str) -> NoReturn:
        raise ValueError(f"{self.where}: {what}")

    def names(self) -> set[str]:
        return set(self._table)

    def take(self, key: str, types: Any, default: Any = None) -> Any:
        self._taken.add(key)
        if key not in self._table:
            if default is None:
                self.fail(f"lacks the key {key!r}")
            return default
        value = self._table[key]
        wanted = types if isinstance(types, tuple) else (types,)
        if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
            names = " or ".join(t.__name__ for t in wanted)
            names += ", as in 2026-11-30 without quotes" if date in wanted else ""
            self.fail(f"{key} must be of type {names}, got {value!r}")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self.take(key, str, default)
        if key in self._table and not value.strip():
            self.fail(f"{key} is empty")
        return value

    def before_names(self, default: str) -> str:
        """Return what stands before a condition's name; empty is allowed."""
        return self.take("where", str, default).strip()

    def day(self, key: str, default: date | None = None) -> date:
        """Return a day, as TOML writes it: 2026-11-30, without quotes and without a time."""
        value = self.take(key, date, default)
        if isinstance(value, datetime):
            self.fail(f"{key} must be a day without a time, got {value}")
        return value

    def identifier(self, pattern: str, example: str) -> str:
        value = self.text("id")
        if not re.fullmatch(pattern, value):
            self.fail(f"id {value!r} must be lower case with hyphens, {example}")
        return value

    def one_of(self, key: str, value: Any, allowed: Any) -> Any:
        if value not in allowed:
            near = get_close_matches(str(value), list(allowed), n=3, cutoff=0.5)
            known = f"did you mean {near[0]!r}?" if near else f"one of {', '.join(allowed)}"
            self.fail(f"{key} {value!r} is not known: {known}")
        return value

    def close(self) -> None:
        if unknown := sorted(self.names() - self._taken):
            self.fail(f"unknown key {unknown[0]!r}; known: {', '.join(sorted(self._taken))}")


def _document(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path.name} is no TOML: {error}") from error


def _rows(path: Path, kind: str) -> list[_Row]:
    document = _document(path)
    known = {kind, "title", "learn", "minutes"} if kind == "claim" else {kind}
    if unknown := sorted(document.keys() - known):
        raise ValueError(f"{path.name}: unknown key {unknown[0]!r}; known: [[{kind}]]")
    tables = document.get(kind, [])
    if not isinstance(tables, list):
        raise ValueError(f"{path.name}: write [[{kind}]] in double brackets")
    return [_Row(_place(path, number, table), table) for number, table in enumerate(tables, 1)]


def _place(path: Path, number: int, table: Any) -> str:
    name = f' "{table["id"]}"' if isinstance(table, dict) and "id" in table else ""
    return f"{path.name}, entry {number}{name}"


def _unique(entries: list[Any], path: Path) -> tuple[Any, ...]:
    seen: dict[str, int] = {}
    for number, entry in enumerate(entries, start=1):
        if entry.id in seen:
            raise ValueError(
                f'{path.name}, entry {number} "{entry.id}": '
                f"entry {seen[entry.id]} has that id already"
            )
        seen[entry.id] = number
    return tuple(entries)
