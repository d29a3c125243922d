"""What do clip and round do to a number, and what does a scale per channel change?"""

from __future__ import annotations

from dlhelpers.drawing.panel import BLUE, GREY, INK, RUST, Panel
from dlhelpers.drawing.style import FAILING, TREATMENT

__all__ = ["clip_and_round", "scales"]


def clip_and_round() -> Panel:
    """Real numbers above, the eight integers of a 3-bit grid below."""
    alt = """Real numbers on a line above, the eight integers of a 3-bit grid below. Inside the
    range each number moves to the nearest step, at most half a step away; a number beyond the
    range is clipped to its end, however far that is."""
    p = Panel(640, 210, alt, "Inside the range numbers round, outside they are clipped")
    low, scale, zero = -1.0, 0.5, 2  # the grid of the cell beside: range -1 to 2.5

    def x(value: float) -> float:
        return 90 + (value - low) * 110

    p.box(x(low), 62, x(2.5) - x(low), 100, fill=BLUE, edge="none")
    p.line([(40, 70), (620, 70)])
    p.line([(x(low), 150), (x(2.5), 150)])
    p.text(40, 58, "x")
    p.text(40, 155, "q")
    for q in range(8):
        value = (q - zero) * scale
        p.line([(x(value), 144), (x(value), 156)])
        p.text(x(value), 182, str(q), anchor="middle")
    for value in (-0.8, 0.15, 0.6, 1.9, 3.5):
        q = min(max(round(value / scale) + zero, 0), 7)
        clipped = value > 2.5
        colour = FAILING if clipped else TREATMENT
        p.dot(x(value), 70, colour=colour)
        p.arrow(x(value), 74, x((q - zero) * scale), 143, colour=colour)
        p.text(x(value), 58, f"{value:g}", anchor="middle", colour=RUST if clipped else INK)
    p.text(545, 120, "clipped", colour=RUST)
    p.text(x(0), 202, "zero point", anchor="middle", size=12)
    return p


def scales() -> Panel:
    """The same two channels on one grid, and on a grid each."""
    alt = """Two channels of a weight, one wide and one narrow. Per tensor, both share the steps of
    the wide one, and all values of the narrow channel fall on three steps or fewer. Per channel,
    each has its own scale and uses all steps."""
    p = Panel(640, 232, alt, "One scale for all wastes the narrow channel's steps")
    reach = {"wide": 1.0, "narrow": 0.15}
    for column, (name, own) in enumerate((("per-tensor", False), ("per-channel", True))):
        left = 100 + 285 * column
        p.text(left + 110, 56, name, anchor="middle", bold=True)
        for row, (channel, end) in enumerate(reach.items()):
            y = 90 + 70 * row
            step = (end if own else max(reach.values())) / 7
            used = [k for k in range(-7, 8) if abs(k) <= round(end / step)]
            p.box(left + 110 - 100 * end, y - 16, 200 * end, 32, fill=GREY, edge="none")
            p.line([(left, y), (left + 220, y)])
            for k in range(-7, 8):
                at = left + 110 + 100 * k * step
                p.line([(at, y - 8), (at, y + 8)], colour=TREATMENT if k in used else "#9a9a9a")
            p.text(left + 110, y + 34, f"{len(used)} steps used", anchor="middle")
            if not column:
                p.text(16, y + 4, channel)
    p.box(100, 212, 16, 8, fill=GREY, edge="none")
    p.text(122, 220, "where the channel's weights lie", size=12)
    return p
