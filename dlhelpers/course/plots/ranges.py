"""Which range of values is worth its integers, and which layer costs most when it is rounded?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from dlhelpers.drawing.style import BASELINE, FAILING, TREATMENT, new_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["clipping", "ranking"]


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
        marks: name -> where its upper end lies, drawn as dashed lines.
    """
    figure, axes = new_axes(title, xlabel, "values", alt, figsize=(7.0, 3.6))
    middles = [(a + b) / 2 for a, b in pairwise(edges)]
    colours = [TREATMENT if low <= x <= high else FAILING for x in middles]
    axes.bar(middles, counts, width=edges[1] - edges[0], color=colours)
    axes.set_yscale("symlog", linthresh=1)
    for end in (low, high):
        axes.axvline(end, color="black", linewidth=1.5)
    for number, (name, place) in enumerate((marks or {}).items()):
        axes.axvline(place, color=BASELINE, linewidth=1.2, linestyle="--")
        axes.annotate(
            name,
            (place, 0.97 - 0.08 * number),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            xytext=(-4, 0),
            ha="right",
            va="top",
            fontsize=9,
        )
    axes.set_ylim(bottom=0)
    return figure


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
