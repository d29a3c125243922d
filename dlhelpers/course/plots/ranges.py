"""Which range of values is worth its integers, and which layer costs most when it is rounded?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from dlhelpers.drawing.contrast import as_text
from dlhelpers.drawing.style import BASELINE, COLOURS, FAILING, TREATMENT, new_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["clipping", "ranking"]

_STEP = 0.09  # of the height of the axis to a name
_INKS = (*map(as_text, COLOURS[2:]), "#000000")
_DASHES = ("--", "-.", ":", (0, (8, 3)), (0, (1, 3)))


def clipping(
    counts: Sequence[float],
    edges: Sequence[float],
    *,
    low: float,
    high: float,
    title: str,
    xlabel: str,
    alt: str = "",
    marks: Mapping[str, float] | None = None,
) -> Figure:
    """Draw a histogram with a log axis of counts, and what a range clips of it.

    Args:
        counts: [B], of bins between ``edges`` [B + 1].
        low, high: the range; what lies outside is orange.
        title, xlabel, alt: as in ``plots.curves``.
        marks: name -> where its upper end lies: a line with a dot, and the name beside the dot.
    """
    figure, axes = new_axes(title, xlabel, "values", alt, figsize=(7.0, 3.6))
    middles = [(a + b) / 2 for a, b in pairwise(edges)]
    colours = [TREATMENT if low <= x <= high else FAILING for x in middles]
    axes.bar(middles, counts, width=edges[1] - edges[0], color=colours)
    axes.set_yscale("symlog", linthresh=1)
    for end in (low, high):
        axes.axvline(end, color="black", linewidth=1.5)
    _mark(axes, dict(marks or {}), max(counts))
    return figure


def _mark(axes: Any, marks: Mapping[str, float], highest: float) -> None:
    """Draw lines with their names above the bars; line, dot and name have one colour."""
    from matplotlib.patheffects import withStroke

    free = 1 - _STEP * len(marks)  # the share of the axis that the bars take, in decades
    axes.set_ylim(0, max(1.0, 10 ** ((1 + math.log10(max(highest, 1))) / (free - 0.03) - 1)))
    across, (left, right) = axes.get_xaxis_transform(), axes.get_xlim()
    for number, (name, place) in enumerate(sorted(marks.items(), key=lambda mark: -mark[1])):
        ink, height = _INKS[number % len(_INKS)], 1 - _STEP * (number + 0.5)
        style, halo = _DASHES[number % len(_DASHES)], [withStroke(linewidth=4, foreground="white")]
        axes.axvline(place, ymax=height, color="white", linewidth=4)
        axes.axvline(place, ymax=height, color=ink, linestyle=style)
        axes.plot(place, height, "o", color=ink, markersize=7, transform=across, clip_on=False)
        to_left = place > (left + right) / 2
        axes.annotate(
            name,
            (place, height),
            xycoords=across,
            textcoords="offset points",
            xytext=(-8 if to_left else 8, 0),
            ha="right" if to_left else "left",
            va="center",
            fontsize=10,
            color=ink,
            path_effects=halo,
        )


def ranking(
    values: Mapping[str, float],
    *,
    title: str,
    xlabel: str,
    alt: str = "",
    threshold: float | None = None,
) -> Figure:
    """Draw a number for each name as a dot in a row of its own, in the order given.

    Args:
        values: name -> number.
        title, xlabel, alt: as in ``plots.curves``.
        threshold: drawn as a dashed line.
    """
    figure, axes = new_axes(title, xlabel, "", alt, figsize=(7.0, 1.1 + 0.3 * len(values)))
    if threshold is not None:
        axes.axvline(threshold, color=BASELINE, linewidth=1.2, linestyle="--")
    axes.plot(list(values.values()), range(len(values)), "o", color=TREATMENT, markersize=8)
    axes.set(yticks=range(len(values)), yticklabels=list(values), ylim=(len(values) - 0.5, -0.5))
    axes.grid(axis="y", alpha=0.3)
    return figure
