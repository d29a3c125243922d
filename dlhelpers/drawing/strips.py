"""Paired ratios as a small picture beside a line of text."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from dlhelpers.drawing.style import TREATMENT
from dlhelpers.tables import figures

__all__ = ["strip_svg"]


def strip_svg(
    ratios: Sequence[float],
    low: float,
    high: float,
    *,
    negligible: float,
    estimate: float,
    threshold: float | tuple[float, ...] | None = None,
    width: int = 360,
    height: int = 56,
) -> str:
    """Return paired ratios as a small SVG strip: dots, interval, negligible band, the line at 1.

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
        return round(width / 2 * (1 + min(1.0, max(-1.0, log / reach))), 1)

    left, right = x(1 / (1 + negligible)), x(1 + negligible)
    jitter = random.Random(0)
    marks = "".join(
        f'<circle cx="{x(r)}" cy="{round(jitter.uniform(6, height - 26), 1)}" r="1.6"/>'
        for r in shown
    )
    dashed = "".join(
        f'<line x1="{x(bound)}" x2="{x(bound)}" y1="0" y2="{height - 14}" '
        'stroke="currentColor" stroke-dasharray="3 3"/>'
        for bound in bounds
    )
    interval = f"{figures(low)} to {figures(high)}"
    label = f"paired ratios, speedup {figures(estimate)}, interval {interval}"
    edge = math.exp(reach)
    return (
        f'<svg role="img" aria-label="{label}" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" style="color:var(--jp-ui-font-color1,currentColor)">'
        f"<title>{label}</title>"
        f'<rect x="{left}" y="0" width="{round(right - left, 1)}" height="{height - 14}" '
        'fill="currentColor" opacity="0.12"/>'
        f'<line x1="{width / 2}" x2="{width / 2}" y1="0" y2="{height - 14}" stroke="currentColor" '
        f'opacity="0.6"/>{dashed}<g fill="currentColor" opacity="0.35">{marks}</g>'
        f'<line x1="{x(low)}" x2="{x(high)}" y1="{height - 19}" y2="{height - 19}" '
        f'stroke="{TREATMENT}" stroke-width="4"/>'
        f'<circle cx="{x(estimate)}" cy="{height - 19}" r="4" fill="{TREATMENT}"/>'
        f'<g fill="currentColor" font-size="10"><text x="0" y="{height - 2}">{1 / edge:.3g}</text>'
        f'<text x="{width / 2}" y="{height - 2}" text-anchor="middle">1</text>'
        f'<text x="{width}" y="{height - 2}" text-anchor="end">{edge:.3g}</text></g></svg>'
    )
