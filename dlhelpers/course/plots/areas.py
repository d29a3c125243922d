"""What fills the memory while a program runs? Kinds of bytes, one on top of the other."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dlhelpers.drawing.style import BASELINE, COLOURS, FAILING, new_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["memory", "memory_bars"]

_MIB = 2**20
_DRAWN = 400  # points along the axis; more cannot be distinguished
_KIND_COLOURS = dict(
    zip(
        ("parameters", "optimizer state", "inputs", "gradients", "activations", "temporaries"),
        (COLOURS[0], COLOURS[4], BASELINE, COLOURS[5], COLOURS[2], COLOURS[3]),
        strict=True,
    )
) | {"kernel buffers": FAILING}


def memory(report: Any, *, title: str, alt: str = "") -> Figure:
    """Draw the bytes alive at each operator of a run, stacked by kind, the peak marked.

    Args:
        report: a ``memory.MemoryReport``.
        title: the answer.
        alt: what a reader without the picture has to know.
    """
    figure, axes = new_axes(
        title, "operators, in order", "bytes alive (MiB)", alt, figsize=(7.4, 3.8)
    )
    kinds = {kind: line for kind, line in report.timeline.items() if max(line)}
    whole = [sum(column) for column in zip(*report.timeline.values(), strict=True)]
    shown = _largest_of_each(whole, _DRAWN)
    stack = [[line[i] / _MIB for i in shown] for line in kinds.values()]
    axes.stackplot(
        shown,
        stack,
        labels=list(kinds),
        colors=[_KIND_COLOURS[kind] for kind in kinds],
        linewidth=0,
    )
    top = report.peak_bytes / _MIB
    start = 0
    for phase, group in itertools.groupby(report.phases):
        length = len(list(group))
        if start:
            axes.axvline(start, color="black", linewidth=0.8, linestyle=":")
        if length > 0.06 * len(whole):
            middle = start + length / 2
            axes.text(middle, top * 1.12, phase, ha="center", va="top", fontsize=10)
        start += length
    axes.plot(whole.index(max(whole)), top, "v", color="black", markersize=8)
    axes.set(xlim=(0, max(1, len(whole) - 1)), ylim=(0, top * 1.14))
    figure.legend(frameon=False, ncols=4, loc="outside lower left", fontsize=10)
    return figure


def _largest_of_each(values: list[int], count: int) -> list[int]:
    """Return places so that in each of ``count`` stretches the largest value is shown."""
    size = max(1, -(-len(values) // count))
    found = {0, len(values) - 1}
    for start in range(0, len(values), size):
        stretch = range(start, min(start + size, len(values)))
        found.add(max(stretch, key=values.__getitem__))
    return sorted(found)


def memory_bars(
    reports: Mapping[str, Any],
    *,
    title: str,
    alt: str = "",
    limit_bytes: float | None = None,
    measured: Mapping[str, float] | None = None,
) -> Figure:
    """Draw the bytes at the peak of several runs as stacked bars.

    Args:
        reports: name -> a ``memory.MemoryReport``.
        title, alt: as in :func:`memory`.
        limit_bytes: of the card, drawn as a line.
        measured: name -> bytes of a measured peak, drawn as a diamond on that bar.
    """
    size = (7.4, 1.7 + 0.5 * len(reports))
    figure, axes = new_axes(title, "bytes alive at the peak (MiB)", "", alt, figsize=size)
    kinds = [k for k in _KIND_COLOURS if any(r.at_peak[k] for r in reports.values())]
    for place, (name, report) in enumerate(reports.items()):
        left = 0.0
        for kind in kinds:
            width = report.at_peak[kind] / _MIB
            label = kind if place == 0 else None
            axes.barh(place, width, left=left, height=0.62, color=_KIND_COLOURS[kind], label=label)
            left += width
        if measured and name in measured:
            axes.plot(measured[name] / _MIB, place, "D", color="black", markersize=9)
    if limit_bytes is not None:
        axes.axvline(limit_bytes / _MIB, color=FAILING, linewidth=2, linestyle="--")
        there = (limit_bytes / _MIB, 1.0)
        axes.annotate(
            f"limit {limit_bytes / _MIB:,.0f}",
            there,
            xycoords=axes.get_xaxis_transform(),
            textcoords="offset points",
            xytext=(-4, -3),
            ha="right",
            va="top",
            fontsize=10,
        )
    axes.set(yticks=range(len(reports)), yticklabels=list(reports))
    axes.set_ylim(len(reports) - 0.5, -0.5 if limit_bytes is None else -0.8)
    axes.grid(False, axis="y")
    figure.legend(frameon=False, ncols=4, loc="outside lower left", fontsize=10)
    return figure
