"""What did each step of a change bring?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dlhelpers.drawing.style import BASELINE, FAILING, TREATMENT, describe, new_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["waterfall"]


def waterfall(
    times: Mapping[str, float],
    *,
    title: str,
    xlabel: str = "time (s)",
    alt: str = "",
    notes: Mapping[str, str] | None = None,
) -> Figure:
    """Draw what each step took away: the first bar whole, then the parts that went, what is left.

    Args:
        times: step -> time after it, in order; the first is the start.
        title, xlabel, alt: as in :func:`~dlhelpers.course.plots.figures.curves`.
        notes: step -> text that is written instead of the factor by which it became faster.

    Raises:
        ValueError: fewer than two times, or one that is not above 0.
    """
    names, values = list(times), list(times.values())
    if len(names) < 2:
        raise ValueError(f"a waterfall needs two times or more, got {len(names)}")
    if min(values) <= 0:
        raise ValueError(f"times must be above 0, got {min(values)!r}")
    figure, axes = new_axes(title, xlabel, "", alt, figsize=(7.4, 1.4 + 0.42 * (len(names) + 1)))
    axes.barh(0, values[0], color=BASELINE, height=0.62)
    _write(axes, values[0], 0, f" {values[0]:.3g}")
    for place, (name, before, after) in enumerate(zip(names[1:], values, values[1:], strict=False)):
        row = place + 1
        colour = TREATMENT if after <= before else FAILING
        axes.barh(row, abs(before - after), left=min(before, after), color=colour, height=0.62)
        axes.plot([before, before], [row - 0.7, row + 0.3], color="black", linewidth=0.8)
        _write(axes, max(before, after), row, " " + (notes or {}).get(name, _factor(before, after)))
    last = len(names)
    axes.plot([values[-1]] * 2, [last - 0.7, last + 0.3], color="black", linewidth=0.8)
    axes.barh(last, values[-1], color=TREATMENT, height=0.62)
    _write(axes, values[-1], last, f" {values[-1]:.3g}")
    axes.set(yticks=range(last + 1), yticklabels=[*names, "now"], xlim=(0, 1.18 * max(values)))
    axes.set_ylim(last + 0.5, -0.5)
    axes.grid(False, axis="y")
    steps = "; ".join(
        f"{name}: {_factor(before, after)}"
        for name, before, after in zip(names[1:], values, values[1:], strict=False)
    )
    text = f"{title}. From {values[0]:.3g} to {values[-1]:.3g}, {xlabel}. {steps}."
    return figure if alt else describe(figure, text)


def _factor(before: float, after: float) -> str:
    ratio = before / after
    text = f"{ratio:.2f}×" if ratio < 2 else f"{ratio:.2g}×"
    return "no gain" if abs(ratio - 1) < 0.02 else text


def _write(axes: Any, x: float, y: float, text: str) -> None:
    axes.text(x, y, text, va="center", ha="left", fontsize=10)
