"""Between which sizes does a tip begin, or cease, to pay?"""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

from dlhelpers.drawing.style import BASELINE, FAILING, TREATMENT, new_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["break_even"]


def break_even(found: Any, *, ylabel: str, title: str = "", alt: str = "") -> Figure:
    """Draw the effect over an axis with its band, the threshold, and where the break-even lies.

    Args:
        found: a BreakEven, as a verdict holds it (``verdict.break_even``): one that is withdrawn,
            as the control is off, is drawn in grey with hollow points.
        ylabel: what the effect is, such as ``speedup by folding``.
        title: what it says by itself where empty.
        alt: the same and the points where empty.
    """
    from matplotlib.patheffects import withStroke

    told = f"Break-even: {found.told}"
    points = ", ".join(f"{p.effect:.2f} at {p.at:g}" for p in found.points)
    title = title or told
    alt = alt or f"{ylabel} over {found.unit}: {points}. {title}."
    figure, axes = new_axes(
        textwrap.fill(title, 72), f"{found.unit} {found.where}".strip(), ylabel, alt
    )
    at = [point.at for point in found.points]
    ends = [(max(p.low, 1e-3), min(p.high, 1e6)) for p in found.points]
    colour, line = (BASELINE, ":") if found.is_withdrawn else (TREATMENT, "-")
    axes.fill_between(at, *zip(*ends, strict=True), color=colour, alpha=0.25, linewidth=0)
    axes.plot(at, [p.effect for p in found.points], color=colour, marker="o", linestyle=line)
    open_ = [point for point in found.points if point.verdict == "unsettled"]
    axes.plot([p.at for p in open_], [p.effect for p in open_], "o", mfc="white", color=colour)
    axes.axhline(1.0, color=BASELINE, linewidth=1.5)
    for edge in found.threshold.edges:
        axes.axhline(edge, color=BASELINE, linewidth=1.2, linestyle="--")
        axes.annotate(
            f"threshold {edge:.3g}",
            (1.0, edge),
            xycoords=axes.get_yaxis_transform(),
            textcoords="offset points",
            xytext=(-4, 3),
            ha="right",
            fontsize=9,
            color=BASELINE,
            path_effects=[withStroke(linewidth=3, foreground="white")],
        )
    if found.bracket:
        axes.axvspan(*found.bracket, color=FAILING, alpha=0.15, linewidth=0)
    axes.set(xscale="log", yscale="log", xticks=at, xticklabels=[f"{x:g}" for x in at])
    axes.minorticks_off()
    values = [*(e for pair in ends for e in pair), 1.0, *found.threshold.edges]
    low, high = max(min(values), 0.1), min(max(values), 200)
    ticks = (0.1, 0.2, 0.5, 0.8, 1, 1.2, 1.5, 2, 3, 5, 10, 20, 50, 100, 200)
    axes.set(
        yticks=[t for t in ticks if low / 1.2 <= t <= high * 1.2],
        ylim=(low / 1.1, high * 1.1),
    )
    axes.set_yticklabels([f"{t:g}" for t in axes.get_yticks()])
    return figure
