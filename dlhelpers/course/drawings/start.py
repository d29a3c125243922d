"""How does a tip become a verdict?"""

from __future__ import annotations

from dlhelpers.drawing.panel import BLUE, GREY, INK, ORANGE, Panel
from dlhelpers.drawing.style import BASELINE, TREATMENT

__all__ = ["tip_to_verdict", "verdicts"]


def tip_to_verdict() -> Panel:
    """The four stations of a tip."""
    alt = """Four boxes from left to right. The tip as people say it; the claim, which gives it a
    metric, a threshold and conditions; the experiment, in pairs and with a control; the verdict for
    each condition: holds, fails, unsettled or not measured."""
    p = Panel(640, 160, alt, "A tip becomes a claim, is tried, and gets a verdict")
    stations = (
        ("tip", '"X is faster"', GREY),
        ("claim", "metric, threshold,\nconditions", BLUE),
        ("experiment", "in pairs,\nwith a control", BLUE),
        ("verdict", "for each\ncondition", ORANGE),
    )
    for k, (name, what, fill) in enumerate(stations):
        x = 16 + 158 * k
        p.text(x + 67, 62, name, anchor="middle", bold=True)
        p.box(x, 74, 134, 60, what, fill=fill)
        if k:
            p.arrow(x - 23, 104, x - 2, 104)
    return p


def verdicts() -> Panel:
    """Three intervals against one threshold."""
    alt = """Three intervals beside a dashed threshold, for a claim that the ratio is at least the
    threshold. Wholly to its right: holds. Wholly to its left: fails. Across it: unsettled."""
    p = Panel(640, 210, alt, "The whole interval decides, not its middle")
    threshold = 300

    for y in range(56, 180, 8):
        p.line([(threshold, y), (threshold, y + 4)], colour=BASELINE)
    for row, (low, high) in enumerate(((350, 450), (130, 240), (240, 380))):
        y = 78 + 40 * row
        name = "holds" if low >= threshold else "fails" if high < threshold else "unsettled"
        p.line([(low, y), (high, y)], colour=TREATMENT, wide=5)
        p.dot((low + high) / 2, y, colour=INK)
        p.text(490, y + 5, name, bold=True)
    p.text(threshold, 200, "threshold", anchor="middle", size=12)
    p.arrow(360, 196, 440, 196)
    p.text(450, 200, "faster", size=12)
    return p
