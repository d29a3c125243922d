"""Paired ratios as a small picture beside a line of text."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from dlhelpers.drawing.panel import GREY, Panel
from dlhelpers.drawing.style import TREATMENT
from dlhelpers.tables import figures

__all__ = ["strip"]

_MARGIN = 5  # the radius of the dot at an end, and a pixel
_AXIS, _DOTS = "#6b6b6b", "#8c8c8c"


def strip(
    ratios: Sequence[float],
    low: float,
    high: float,
    *,
    negligible: float,
    estimate: float,
    threshold: float | tuple[float, ...] | None = None,
    width: int = 360,
    height: int = 60,
) -> Panel:
    """Draw paired ratios as a small strip: dots, interval, negligible band, the line at 1.

    Args:
        ratios: paired ratios, positive and finite (others are left out); at most 200 are drawn.
        low, high, estimate: the interval and the typical ratio; 0 and infinity reach the edge.
        negligible: half width of the band around 1.
        threshold: of a claim, drawn as a dashed line; of a band both ends.
        width, height: in pixels.
    """
    shown = [r for r in ratios if 0 < r < math.inf][:: max(1, -(-len(ratios) // 200))]
    inner = sorted(math.log(r) for r in shown) or [0.0]
    cut = max(1, len(inner) // 50)  # a far outlier must not squeeze the rest
    ends = [inner[: cut + 1][-1], inner[-cut - 1 :][0], math.log1p(negligible)]
    bounds = threshold if isinstance(threshold, tuple) else (threshold,) if threshold else ()
    ends += [math.log(v) for v in (low, high, *bounds) if v > 0 and math.isfinite(v)]
    reach = min(max(*map(abs, ends), 1e-3), math.log(1e6)) * 1.1

    def x(ratio: float) -> float:
        log = math.log(ratio) if ratio > 0 else -math.inf
        middle = width / 2
        return round(middle + (middle - _MARGIN) * min(1.0, max(-1.0, log / reach)), 1)

    bottom, row = height - 17, height - 23
    told = [
        f"paired ratios, speedup {figures(estimate)}, interval {figures(low)} to {figures(high)}",
        *([f"threshold {' and '.join(map(figures, bounds))}"] * bool(bounds)),
    ]
    panel = Panel(width, height, "; ".join(told))
    left, right = x(1 / (1 + negligible)), x(1 + negligible)
    panel.box(left, 0, right - left, bottom, fill=GREY, edge="none")
    panel.line([(width / 2, 0), (width / 2, bottom)], colour=_AXIS, wide=1)
    for bound in map(x, bounds):
        panel.line([(bound, 0), (bound, bottom)], dashed=True, wide=1)
    jitter = random.Random(0)
    points = [(x(ratio), round(jitter.uniform(6, height - 32), 1)) for ratio in shown]
    panel.cloud(points, colour=_DOTS)
    panel.line([(x(low), row), (x(high), row)], colour=TREATMENT, wide=4)
    panel.dot(x(estimate), row, colour=TREATMENT)
    edge = math.exp(reach)
    panel.text(2, height - 4, f"{1 / edge:.3g}", size=12)
    panel.text(width / 2, height - 4, "1", anchor="middle", size=12)
    panel.text(width - 2, height - 4, f"{edge:.3g}", anchor="end", size=12)
    return panel
