"""Figures of one axes and one message."""

from __future__ import annotations

import math
import random
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dlhelpers.drawing.contrast import as_text, text_on
from dlhelpers.drawing.style import (
    BASELINE,
    COLOURS,
    FAILING,
    TREATMENT,
    describe,
    log_axis,
    new_axes,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["curves", "dots", "heatmap", "intervals", "pictures", "splits", "timeline"]


def curves(
    series: Mapping[str, tuple[Sequence[float], ...]],
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    alt: str = "",
    mark_x: float | None = None,
    measured: Mapping[str, tuple[float, float]] | None = None,
) -> Figure:
    """Draw named curves, labelled at the curve itself.

    Args:
        series: name -> (x, y), or (x, y, low, high) with an interval around each y; sequences,
            arrays or tensors of equal length. Six at most, in the order of the colours.
        title, xlabel, ylabel: the answer, and the axes with their units.
        alt: what a reader without the picture has to know.
        mark_x: draws a dot on each curve there.
        measured: name -> (x, y) of single points beside the curves.

    Raises:
        ValueError: more than six curves, or one whose sequences differ in length.
    """
    if len(series) > len(COLOURS):
        raise ValueError(
            f"{len(series)} curves are more than the {len(COLOURS)} colours that can be told "
            "apart: draw two figures"
        )
    for name, points in series.items():
        if len({len(values) for values in points}) != 1 or len(points) not in (2, 4):
            raise ValueError(
                f"curve {name!r} must be (x, y) or (x, y, low, high) of equal length, got lengths "
                f"{[len(values) for values in points]}"
            )
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=3, foreground="white")]
    figure, axes = new_axes(title, xlabel, ylabel, alt)
    top = max(max(_floats(points[1])) for points in series.values())
    for colour, (name, points) in zip(COLOURS, series.items(), strict=False):
        x, y, *band = (_floats(values) for values in points)
        axes.plot(x, y, color=colour)
        if band:
            axes.fill_between(x, *band, color=colour, alpha=0.2, linewidth=0)
        # label where the curves are furthest apart
        at = _widest_gap(x, [_floats(other[1]) for other in series.values()])
        axes.annotate(
            name,
            (x[at], y[at]),
            textcoords="offset points",
            xytext=(6, -14 if y[at] > 0.9 * top else 6),
            color=as_text(colour),
            fontweight="bold",
            path_effects=halo,
        )
        if mark_x is not None:
            nearest = min(range(len(x)), key=lambda i: abs(x[i] - mark_x))
            axes.plot(x[nearest], y[nearest], "o", color=colour, markersize=9)
    for name, point in (measured or {}).items():
        axes.plot(*point, "D", color="black", markersize=8)
        axes.annotate(name, point, textcoords="offset points", xytext=(10, 8), fontweight="bold")
    if measured:
        axes.margins(y=0.12)  # room for the names
    return figure


def _floats(values: Any) -> list[float]:
    if hasattr(values, "detach"):
        values = values.detach()
    return [float(value) for value in values]


def _widest_gap(x: Sequence[float], ys: Sequence[Sequence[float]]) -> int:
    inner = range(len(x) // 12, len(x) - len(x) // 4)
    if len({len(x), *map(len, ys)}) > 1 or len(ys) < 2:
        return len(x) // 2
    return max(inner, key=lambda i: min(abs(a[i] - b[i]) for a in ys for b in ys if a is not b))


def dots(ratios: Sequence[float], *, title: str, xlabel: str, alt: str = "") -> Figure:
    """Draw ratios as dots on a log axis around 1; those beyond a factor of 2 lie at its edge."""
    figure, axes = new_axes(title, xlabel, "", alt, figsize=(7.0, 1.9))
    heights = [random.Random(i).uniform(-1, 1) for i in range(len(ratios))]
    axes.axvline(1.0, color=BASELINE, linewidth=1.5)
    shown = [min(2.0, max(0.5, ratio)) for ratio in _floats(ratios)]
    axes.scatter(shown, heights, s=22, color=TREATMENT, alpha=0.7, linewidths=0)
    log_axis(axes, [*shown, 1.0])
    axes.set(yticks=[], ylim=(-2, 2))
    return figure


def intervals(
    items: Mapping[str, Any],
    *,
    title: str,
    xlabel: str,
    alt: str = "",
    baseline: float = 0.0,
    threshold: float | None = None,
) -> Figure:
    """Draw estimates or comparisons with their intervals, one row each.

    Args:
        items: name -> Estimate (value, low, high) or Comparison (speedup, low, high).
        title, xlabel, alt: as in :func:`curves`.
        baseline: where "no effect" stands: 0 for differences, 1 for speedups (then on a log axis).
        threshold: of the claim, drawn as a dashed line.
    """
    figure, axes = new_axes(title, xlabel, "", alt, figsize=(7.0, 1.1 + 0.5 * len(items)))
    axes.axvline(baseline, color=BASELINE, linewidth=1.5)
    if threshold is not None:
        axes.axvline(threshold, color=BASELINE, linewidth=1.2, linestyle="--")
        axes.annotate(
            f"threshold {threshold:g}",
            (threshold, 1.0),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            xytext=(4, -10),
            fontsize=9,
            color=BASELINE,
        )
    values = [getattr(item, "value", getattr(item, "speedup", None)) for item in items.values()]
    for row, (item, value) in enumerate(zip(items.values(), values, strict=True)):
        ends = [item.low, item.high]
        if baseline == 1.0:  # on a log axis an end that is not known lies far outside
            ends = [min(max(end, 1e-9), 1e9) for end in ends]
        axes.plot(ends, [row, row], color=TREATMENT, linewidth=5, alpha=0.35)
        axes.plot(value, row, "o", color=TREATMENT, markersize=8)
    labels = [textwrap.fill(name, 30) for name in items]
    axes.set(yticks=range(len(items)), yticklabels=labels, ylim=(len(items) - 0.5, -0.7))
    if baseline == 1.0:
        ends = [v for item in items.values() for v in (item.low, item.high)]
        log_axis(axes, [*ends, *values, 1.0, threshold or 1.0])
    return figure


def heatmap(
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str,
    unit: str,
    alt: str = "",
    form: str = "{:.0f}",
    framed: Sequence[tuple[int, int]] = (),
) -> Figure:
    """Draw a table of numbers as colours with the numbers in them; NaN is drawn as "refused".

    Args:
        values: one sequence for each row.
        rows, columns: their names.
        title, alt: as in :func:`curves`.
        unit: of the values, beside the colour scale.
        form: how a number is written.
        framed: (row, column) of the fields that get a frame.
    """
    from matplotlib.colors import to_hex
    from matplotlib.patches import Rectangle

    figure, axes = new_axes(title, "", "", alt, figsize=(7.4, 0.9 + 0.42 * len(rows)))
    finite = [v for row in values for v in row if math.isfinite(v)]
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    image = axes.imshow(values, cmap="cividis", aspect="auto", vmin=low, vmax=high)
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            ground = to_hex(image.cmap(image.norm(value))) if math.isfinite(value) else "#ffffff"
            text = form.format(value) if math.isfinite(value) else "refused"
            axes.text(j, i, text, ha="center", va="center", color=text_on(ground))
    for i, j in framed:
        corner = (j - 0.46, i - 0.44)
        axes.add_patch(Rectangle(corner, 0.92, 0.88, fill=False, edgecolor=FAILING, linewidth=2.5))
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.grid(False)
    figure.colorbar(image, ax=axes, label=unit)
    return figure


def pictures(images: Mapping[str, Any], *, title: str, alt: str = "") -> Figure:
    """Draw images side by side, each under its name.

    Args:
        images: name -> uint8 tensor or array [3, H, W], or in grey [H, W]: uint8 from black to
            white, float from its least to its largest value.
        title, alt: as in :func:`curves`.
    """
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained", figsize=(2.4 * len(images), 3.0))
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=12)
    row = figure.subplots(1, len(images), squeeze=False)[0]
    for axes, (name, image) in zip(row, images.items(), strict=True):
        pixels = np.asarray(image)
        full = {"vmin": 0, "vmax": 255} if pixels.dtype == np.uint8 else {}
        if pixels.ndim == 2:
            axes.imshow(pixels, cmap="gray", **full)
        else:
            axes.imshow(pixels.transpose(1, 2, 0))
        axes.set_title(name, fontsize=10)
        axes.axis("off")
    figure._dlhelpers_format = "jpeg"  # photographs are large as PNG
    return describe(figure, alt or f"{title}; {', '.join(images)}")


def splits(
    rows: Mapping[str, Mapping[str, float]],
    *,
    title: str,
    xlabel: str,
    alt: str = "",
    marks: Mapping[str, float] | None = None,
) -> Figure:
    """Draw parts of a whole as stacked bars, one row each, the parts in the same order.

    Args:
        rows: name -> part -> size, such as "files" -> {"open": 5.0, "read": 6.0}.
        title, xlabel, alt: as in :func:`curves`.
        marks: row's name -> a number that is drawn as a line across its bar.

    Raises:
        ValueError: more parts than colours, or a mark without a row.
    """
    parts = list(dict.fromkeys(part for row in rows.values() for part in row))
    if len(parts) > len(COLOURS):
        raise ValueError(f"{len(parts)} parts are more than {len(COLOURS)} colours: {parts}")
    if unknown := set(marks or {}) - set(rows):
        raise ValueError(f"marks {sorted(unknown)} belong to no row of {list(rows)}")
    figure, axes = new_axes(title, xlabel, "", alt, figsize=(7.4, 1.5 + 0.5 * len(rows)))
    for place, (name, row) in enumerate(rows.items()):
        left = 0.0
        for part, colour in zip(parts, COLOURS, strict=False):
            size = row.get(part, 0.0)
            axes.barh(place, size, left=left, color=colour, height=0.62, label=None)
            left += size
        if marks and name in marks:
            x = marks[name]
            axes.plot([x, x], [place - 0.42, place + 0.42], color="black", linewidth=2.5)
    for part, colour in zip(parts, COLOURS, strict=False):
        axes.barh(0, 0, color=colour, label=part)
    axes.set(yticks=range(len(rows)), yticklabels=list(rows), ylim=(len(rows) - 0.5, -0.5))
    axes.grid(False, axis="y")
    figure.legend(frameon=False, ncols=len(parts), loc="outside lower left")
    return figure


def timeline(line: Any, *, title: str, alt: str = "") -> Figure:
    """Draw who works when: a row for each stage, a box for each batch, gaps where it waits.

    Args:
        line: a ``stages.Timeline``.
        title, alt: as in :func:`curves`.
    """
    size = (7.4, 1.3 + 0.55 * len(line.stages))
    figure, axes = new_axes(title, "time (ms)", "", alt, figsize=size)
    for span in line.spans:
        place = line.stages.index(span.stage)
        left, width = 1000 * span.start_s, 1000 * (span.end_s - span.start_s)
        colour = COLOURS[span.batch % 2]  # neighbours differ
        axes.barh(place, width, left=left, color=colour, height=0.7, edgecolor="white")
        ink = text_on(colour)
        axes.text(left + width / 2, place, f"{span.batch}", ha="center", va="center", color=ink)
    names = [f"{name}, {line.busy_share(name):.0%} busy" for name in line.stages]
    axes.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.4, -0.6))
    return figure
