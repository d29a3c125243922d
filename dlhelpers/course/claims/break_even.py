"""From which size on does a tip pay, or up to which?

A claim may declare an axis: a number that its conditions hang on, such as channels or batch, with
up to five points. Each point is measured as a condition is, with all other sizes the same as in the
conditions; a point that is a condition is measured once. The break-even lies between the last point
that surely fails and the first that surely holds (or the other way round, where the tip pays for
the small ones); points between them are unsettled. That it pays everywhere or nowhere on the axis
is an answer as well, and so is that it pays, stops and pays again. Where the control is off, it is
withdrawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from dlhelpers.course.verdicts import Settled, Threshold

if TYPE_CHECKING:
    from dlhelpers.course.claims.claim import Claim

__all__ = ["MOST_POINTS", "Axis", "BreakEven", "Point", "axis_of", "from_points", "read"]

MOST_POINTS = 5


@dataclass(frozen=True)
class Axis:
    """What a claim's conditions hang on.

    Attributes:
        unit: what is counted, in the plural, such as ``channels`` or ``pixels a side``.
        points: where it is measured, growing.
        where: what else is fixed, such as ``at 14 by 14 pixels``; may be empty.
    """

    unit: str
    points: tuple[float, ...]
    where: str = ""


@dataclass(frozen=True)
class Point:
    """One point of an axis and what was measured there."""

    at: float
    effect: float
    low: float
    high: float
    verdict: Settled

    def as_row(self) -> dict[str, Any]:
        """Return it as the ledger holds it."""
        return {
            "at": self.at, "effect": self.effect, "low": self.low, "high": self.high,
            "verdict": self.verdict,
        }  # fmt: skip


@dataclass(frozen=True)
class BreakEven:
    """The points of an axis, and where the tip begins or ends to pay; shows itself as a sentence.

    Attributes:
        unit, where: of the axis.
        threshold: what a point has to meet.
        points: in the order of the axis.
        words: ``holds``, ``fails`` -> what the claim says of the tip there.
    """

    unit: str
    where: str
    threshold: Threshold
    points: tuple[Point, ...]
    words: Mapping[str, str]

    @property
    def settled(self) -> tuple[Point, ...]:
        """Points that hold or fail."""
        return tuple(point for point in self.points if point.verdict in ("holds", "fails"))

    @property
    def is_withdrawn(self) -> bool:
        """Is a point unsettled although its interval does not straddle the threshold?"""
        return any(
            None not in (p.low, p.high) and self.threshold.settle(p.low, p.high) is not None
            for p in self.points
            if p.verdict == "unsettled"
        )

    @property
    def bracket(self) -> tuple[float, float] | None:
        """The two settled neighbours between which it changes; None without exactly one change."""
        changes = [(a.at, b.at) for a, b in pairwise(self.settled) if a.verdict != b.verdict]
        return changes[0] if len(changes) == 1 else None

    def __str__(self) -> str:
        return f"{self.told} ({self.where})" if self.where else self.told

    @property
    def told(self) -> str:
        """The sentence without what else is fixed."""
        if self.is_withdrawn:
            return "withdrawn, as the control is off"
        holds, fails, settled = self.words["holds"], self.words["fails"], self.settled
        ends = f"{_number(self.points[0].at)} to {_number(self.points[-1].at)} {self.unit}"
        if not settled:
            return f"from {ends} nothing is settled"
        if self.bracket:
            below, above = map(_number, self.bracket)
            first, last = self.bracket
            outside = [p for p in self.points if p not in settled and not first < p.at < last]
            rest = f"; unsettled at {', '.join(_number(p.at) for p in outside)}" if outside else ""
            if settled[0].verdict == "fails":
                return f"{holds} from {above} {self.unit} on, {_not(fails)} up to {below}{rest}"
            return f"{holds} up to {below} {self.unit}, {_not(fails)} from {above} on{rest}"
        verdicts = {point.verdict for point in settled}
        if len(verdicts) == 2:
            where = [[_number(p.at) for p in settled if p.verdict == v] for v in self.words]
            return (
                f"not monotone over {ends}: {holds} at {', '.join(where[0])}, "
                f"{_not(fails)} at {', '.join(where[1])}"
            )
        word = holds if verdicts == {"holds"} else fails
        if len(settled) == len(self.points):
            return (
                f"none, {word} {'anywhere' if 'not' in word.split() else 'everywhere'} from {ends}"
            )
        at = ", ".join(_number(point.at) for point in settled)
        return f"{word} at {at} {self.unit}, the rest of {ends} is unsettled"

    def as_row(self) -> dict[str, Any]:
        """Return it as the ledger holds it."""
        return {
            "unit": self.unit,
            "where": self.where,
            "threshold": str(self.threshold),
            "points": [point.as_row() for point in self.points],
        }


def from_points(claim: Claim, found: Mapping[float, Any]) -> BreakEven:
    """Judge comparisons at points of a claim's axis.

    Args:
        claim: one that declares an axis.
        found: point -> Comparison, of each point that the axis declares.

    Raises:
        ValueError: the claim has no axis, or the points are others than it declares.
    """
    axis = axis_of(claim)
    if tuple(found) != axis.points:
        raise ValueError(f"the axis of {claim.id} declares {axis.points}, got {tuple(found)}")
    words = {True: "holds", False: "fails", None: "unsettled"}
    points = tuple(
        Point(
            at, c.speedup, c.low, c.high,
            words[claim.threshold.settle(c.low, c.high)],  # type: ignore[arg-type]
        )
        for at, c in found.items()
    )  # fmt: skip
    return BreakEven(axis.unit, axis.where, claim.threshold, points, claim.words)


def read(row: Mapping[str, Any], words: Mapping[str, str]) -> BreakEven:
    """Return what a ledger's row holds, in a claim's words."""
    points = tuple(Point(**point) for point in row["points"])
    return BreakEven(row["unit"], row["where"], Threshold.parse(row["threshold"]), points, words)


def axis_of(claim: Claim) -> Axis:
    """Return a claim's axis.

    Raises:
        ValueError: it declares none.
    """
    if claim.axis is None:
        raise ValueError(f"{claim.id} declares no axis: add one to {claim.notebook}.toml")
    return claim.axis


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:g}"


def _not(word: str) -> str:
    return "not" if "not" in word.split() else word
