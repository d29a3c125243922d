"""How is an interval drawn beside others, so that one sees which side of the threshold it is on?"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dlhelpers.drawing.panel import Panel

if TYPE_CHECKING:
    from dlhelpers.course.claims.conditions import Judged, Tally
    from dlhelpers.course.verdicts import Threshold

__all__ = ["Scale", "bar_colour", "colour_of", "interval", "marks"]

_WIDTH, _HEIGHT, _MARGIN = 220, 24, 8
_AXIS, _ONE = "#c4c4c4", "#6b6b6b"


@dataclass(frozen=True)
class Scale:
    """The axis that the intervals of one card share, in the units of the metric."""

    low: float
    high: float
    log: bool

    @classmethod
    def over(cls, conditions: Iterable[Judged], *, log: bool) -> Scale:
        """Return the axis that shows every finite end and every threshold with some room."""
        values: list[float] = [1.0] if log else []
        for c in conditions:
            values += [c.effect, c.low, c.high]
            values += [] if c.threshold is None else c.threshold.edges
        values = [float(v) for v in values if v is not None and math.isfinite(v)]
        if log:  # an end farther than that runs to the end of the axis
            values = [v for v in values if 1e-6 < v < 1e6]
        low, high = min(values, default=0.0), max(values, default=1.0)
        if log:
            room = max((high / low) ** 0.08, 1.02)
            return cls(low / room, high * room, log)
        room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
        return cls(low - room, high + room, log)

    def x(self, value: float) -> float:
        """Return the place of a value in pixels; what lies beyond the axis is put at its end."""
        if self.log:
            low, high, value = math.log(self.low), math.log(self.high), math.log(max(value, 1e-300))
        else:
            low, high = self.low, self.high
        share = min(max((value - low) / (high - low), 0.0), 1.0)
        return round(_MARGIN + share * (_WIDTH - 2 * _MARGIN), 1)


def interval(
    effect: float | None,
    low: float | None,
    high: float | None,
    threshold: Threshold | None,
    scale: Scale,
    verdict: str = "",
) -> Panel:
    """Draw a point with its interval on a shared axis, the threshold as a dashed line, or two.

    An end that is None or infinite runs to the end of the axis; without an effect only the
    threshold is drawn.
    """
    ends, colour = (scale.low, scale.high), colour_of(verdict)
    has_effect = effect is not None and math.isfinite(effect)
    told = [] if has_effect else ["no number was measured here"]
    if has_effect:
        ends = tuple(
            end if end is not None and math.isfinite(end) else limit
            for end, limit in zip((low, high), ends, strict=True)
        )
        told.append(f"{effect:.3g}, interval {ends[0]:.3g} to {ends[1]:.3g}")
    told += [] if threshold is None else [f"threshold {threshold}"]
    told += [verdict.replace("-", " ")] * bool(verdict)
    panel, middle = Panel(_WIDTH, _HEIGHT, "; ".join(told)), _HEIGHT / 2
    panel.line([(_MARGIN, middle), (_WIDTH - _MARGIN, middle)], colour=_AXIS, wide=1)
    if scale.log:
        one = scale.x(1.0)
        panel.line([(one, 4), (one, _HEIGHT - 4)], colour=_ONE, wide=1)
    for bar in map(scale.x, () if threshold is None else threshold.edges):
        panel.line([(bar, 0), (bar, _HEIGHT)], dashed=True)
    if has_effect:
        left, right = map(scale.x, ends)
        panel.line([(left, middle), (right, middle)], colour=colour, wide=4)
        panel.dot(scale.x(effect), middle, colour=colour, radius=5)
    return panel


def marks(thresholds: Iterable[Threshold | None], scale: Scale) -> Panel:
    """Write the numbers at the lines of the strips below: 1, and the thresholds that have room."""
    numbers = [1.0] * scale.log + [edge for t in thresholds if t for edge in t.edges]
    labels = list(dict.fromkeys(f"{number:.3g}" for number in numbers))
    panel = Panel(_WIDTH, 18, f"the lines below mark {', '.join(labels)}")
    taken: list[tuple[float, float]] = []
    for label in labels:
        x, wide = scale.x(float(label)), 7 * len(label) + 4
        for left in (x - wide / 2, x, x - wide):
            left = min(max(left, 0), _WIDTH - wide)
            if all(left + wide <= start or end <= left for start, end in taken):
                taken.append((left, left + wide))
                panel.text(left + wide / 2, 14, label, anchor="middle", size=12)
                break
    return panel


def colour_of(verdict: str) -> str:
    """Return the colour of a condition's verdict, as in every figure.

    What holds is blue and what fails orange; grey is what nobody can tell.
    """
    from dlhelpers.drawing.style import BASELINE, FAILING, TREATMENT

    return {"holds": TREATMENT, "fails": FAILING}.get(verdict, BASELINE)


def bar_colour(tally: Tally | None) -> str:
    """Return the colour of the bar beside a claim; None was not run.

    What goes against the mechanism stands out in orange; grey is where more conditions are left
    than settled, or where it is unknown what the mechanism said; the others are blue.
    """
    if tally is None or tally.against:
        return colour_of("fails" if tally else "")
    is_grey = tally.unsettled + tally.missing > tally.settled or tally.standing == "unknown"
    return colour_of("" if is_grey else "holds")
