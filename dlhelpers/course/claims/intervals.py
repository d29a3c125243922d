"""How is an interval drawn beside others, so that one sees which side of the threshold it is on?"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dlhelpers.course.claims.conditions import Judged, Tally
    from dlhelpers.course.verdicts import Threshold

__all__ = ["Scale", "bar_colour", "colour_of", "interval_svg"]

_WIDTH, _HEIGHT, _MARGIN = 220, 22, 6


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


def interval_svg(
    effect: float | None,
    low: float | None,
    high: float | None,
    threshold: Threshold | None,
    scale: Scale,
    verdict: str = "",
) -> str:
    """Return a point with its interval on a shared axis, the threshold as a dashed line, or two.

    An end that is None or infinite runs to the end of the axis; without an effect only the
    threshold is drawn.
    """
    middle, parts, said = _HEIGHT / 2, [], []
    parts.append(_line(_MARGIN, middle, _WIDTH - _MARGIN, middle, "opacity='0.25'"))
    if scale.log:
        one = scale.x(1.0)
        parts.append(_line(one, 4, one, _HEIGHT - 4, "opacity='0.5'"))
    if threshold is not None:
        for bar in map(scale.x, threshold.edges):
            parts.append(_line(bar, 0, bar, _HEIGHT, "stroke-width='1.5' stroke-dasharray='3 2'"))
        said.append(f"threshold {threshold}")
    if effect is not None and math.isfinite(effect):
        colour = colour_of(verdict)
        ends = [
            end if end is not None and math.isfinite(end) else limit
            for end, limit in ((low, scale.low), (high, scale.high))
        ]
        left, right = map(scale.x, ends)
        parts.append(
            f"<line x1='{left}' y1='{middle}' x2='{right}' y2='{middle}' stroke='{colour}' "
            f"stroke-width='5' stroke-opacity='0.6' stroke-linecap='round'/>"
            f"<circle cx='{scale.x(effect)}' cy='{middle}' r='4' fill='{colour}'/>"
        )
        said.insert(0, f"{effect:.3g}, interval {ends[0]:.3g} to {ends[1]:.3g}")
    return (
        f"<svg role='img' aria-label='{escape('; '.join(said))}' width='{_WIDTH}' "
        f"height='{_HEIGHT}' viewBox='0 0 {_WIDTH} {_HEIGHT}' "
        f"style='vertical-align:middle;color:var(--jp-ui-font-color1, currentColor)'>"
        f"{''.join(parts)}</svg>"
    )


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


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f"<line x1='{x1}' y1='{y1}' x2='{x2}' y2='{y2}' stroke='currentColor' {style}/>"
