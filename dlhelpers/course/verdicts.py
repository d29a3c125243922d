"""What is said of one condition, and what follows from it?

A threshold splits the line in two: an interval [low, high] meets it where both ends do (the
condition *holds*), misses it where neither does (it *fails*), and settles nothing where it
straddles the bound. A two-sided threshold, such as ``within 1.2x``, is a band from 1/1.2 to 1.2: an
interval inside meets it, one wholly outside misses it. Theory says beforehand that the tip must win
in a condition, that it cannot, or leaves it open; a settled condition then agrees with the
mechanism or goes against it:

    theory     holds      fails      unsettled, not-measured
    wins       agrees     against    -
    cannot     against    agrees     -
    open       open       open       -
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

__all__ = [
    "STRADDLES",
    "Agreement",
    "Settled",
    "Theory",
    "Threshold",
    "agreement_of",
    "control_off",
]

Settled = Literal["holds", "fails", "unsettled", "not-measured"]
Theory = Literal["wins", "cannot", "open"]
Agreement = Literal["agrees", "against", "open"]
STRADDLES = "the interval straddles the threshold"
_BAND = "within"
_EXPECTED = {"wins": "holds", "cannot": "fails"}
_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    ">": operator.gt,
    "<": operator.lt,
}


@dataclass(frozen=True)
class Threshold:
    """What a metric must meet, such as ``>= 1.05``, ``== true`` or ``within 1.2x``.

    >>> bar = Threshold.parse(">= 1.05")
    >>> bar.met_by(1.1), bar.settle(1.01, 1.08)
    (True, None)
    >>> band = Threshold.parse("within 1.2x")
    >>> band.met_by(0.9), band.settle(0.9, 1.1), band.settle(0.5, 0.7), band.settle(0.8, 1.1)
    (True, True, False, None)
    """

    op: str
    bound: float | bool

    @classmethod
    def parse(cls, text: str) -> Threshold:
        """Read an operator and a finite number, ``== true``, ``== false`` or a band of a ratio.

        Raises:
            ValueError: the text is neither.
        """
        match = re.fullmatch(r"\s*(>=|<=|==|>|<)\s*(\S+)\s*", text) or re.fullmatch(
            r"\s*(within)\s+(\S+)x\s*", text
        )
        if match:
            op, bound = match.groups()
            if op == "==" and bound in ("true", "false"):
                return cls(op, bound == "true")
            try:
                if math.isfinite(number := float(bound)) and (op != _BAND or number > 1):
                    return cls(op, number)
            except ValueError:
                pass
        raise ValueError(
            f"{text!r} must be one of {', '.join(_OPERATORS)} and a number, as in '>= 1.05', "
            "or '== true', or a band such as 'within 1.2x' of a factor above 1"
        )

    @property
    def edges(self) -> tuple[float, ...]:
        """The numbers at which it changes sides: the bound, of a band both ends."""
        if self.op == _BAND:
            return 1 / self.bound, float(self.bound)
        return (float(self.bound),)

    def met_by(self, value: float | bool) -> bool:
        """Whether a number meets the bound; NaN meets none."""
        if self.op == _BAND:
            low, high = self.edges
            return low <= value <= high
        return bool(_OPERATORS[self.op](value, self.bound))

    def settle(self, low: float, high: float) -> bool | None:
        """Whether a whole interval meets the bound (True) or misses it (False), else None."""
        if self.op == "==":
            inside = low <= self.bound <= high
            return (True if low == high else None) if inside else False
        if self.op == _BAND and low < self.edges[0] and high > self.edges[1]:
            return None
        ends = {self.met_by(low), self.met_by(high)}
        return ends.pop() if len(ends) == 1 else None

    def __str__(self) -> str:
        if isinstance(self.bound, bool):
            return f"{self.op} {str(self.bound).lower()}"
        short = f"{self.bound:g}"
        exact = short if float(short) == self.bound else repr(float(self.bound))
        return f"{self.op} {exact}{'x' if self.op == _BAND else ''}"


def agreement_of(verdict: str, theory: str | None) -> Agreement | None:
    """Return ``agrees``, ``against`` or ``open``; None for what is not settled or not known.

    >>> agreement_of("fails", "cannot"), agreement_of("holds", "open")
    ('agrees', 'open')
    """
    if verdict not in ("holds", "fails") or theory is None:
        return None
    if theory == "open":
        return "open"
    return "agrees" if verdict == _EXPECTED[theory] else "against"


def control_off(outcome: str) -> str:
    """Say why nothing measured beside a control can be trusted; empty where it can.

    >>> control_off("slower"), control_off("no difference")
    ('the control came back slower', '')
    """
    if outcome == "not measured":
        return "the control was not measured"
    return f"the control came back {outcome}" if outcome in ("faster", "slower") else ""
