"""Which models and layers lie where? Points on log axes, the roof above them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dlhelpers.drawing.contrast import as_text
from dlhelpers.drawing.style import BASELINE, COLOURS, describe, new_axes, plain_numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["roofline", "scatter"]

_PLACES = (  # of a name beside its point: (offset in points, side that is aligned)
    ((0, -14), "center"), ((0, 14), "center"), ((10, 0), "left"), ((-10, 0), "right"),
    ((10, -12), "left"), ((-10, -12), "right"), ((0, -26), "center"),
)  # fmt: skip


def scatter(
    groups: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    alt: str = "",
    names: Mapping[str, tuple[float, float]] | None = None,
    diagonal: bool = False,
) -> Figure:
    """Draw groups of points on two log axes.

    Args:
        groups: name -> (x, y), positive; six at most. One group is drawn without a legend.
        title, xlabel, ylabel, alt: as in ``plots.curves``.
        names: text -> the point beside which it stands.
        diagonal: draws y = x, for predicted against measured.

    Raises:
        ValueError: more groups than colours.
    """
    if len(groups) > len(COLOURS):
        raise ValueError(
            f"{len(groups)} groups are more than the {len(COLOURS)} distinguishable colours"
        )
    figure, axes = new_axes(title, xlabel, ylabel, alt, figsize=(7.0, 4.2))
    for colour, (name, (x, y)) in zip(COLOURS, groups.items(), strict=False):
        small = len(x) > 50
        axes.scatter(x, y, s=8 if small else 40, color=colour, alpha=0.6, linewidths=0, label=name)
    axes.set(xscale="log", yscale="log")
    if diagonal:
        ends = (
            min(axes.get_xlim()[0], axes.get_ylim()[0]),
            max(axes.get_xlim()[1], axes.get_ylim()[1]),
        )
        axes.plot(ends, ends, color=BASELINE, linewidth=1.5, zorder=0)
    for number, (text, point) in enumerate(sorted((names or {}).items(), key=lambda n: n[1])):
        above = 5 if number % 2 else -11
        axes.annotate(text, point, textcoords="offset points", xytext=(6, above), fontsize=9)
    plain_numbers(axes)
    if len(groups) > 1:
        axes.legend(frameon=False)
    return figure


def roofline(
    peaks: Any, points: Mapping[str, tuple[float, float]], *, title: str, alt: str = ""
) -> Figure:
    """Draw a machine's roof and what some layers reach below it.

    Args:
        peaks: a ``roofline.Roofline``.
        points: name -> (FLOP per byte, 10^9 FLOP a second).
        title: as in ``plots.curves``.
        alt: as in ``plots.curves``; where empty, the roof and where each point lies below or
            above it.
    """
    figure, axes = new_axes(title, "FLOP per byte", "GFLOP a second", alt, figsize=(7.0, 4.2))
    top, ridge = peaks.gflops["fp32"], peaks.ridge_flop_per_byte
    left = min([ridge / 30, *(x / 2 for x, _ in points.values())])
    right = max([ridge * 30, *(x * 2 for x, _ in points.values())])
    roof = [(left, left * peaks.bandwidth_gb_s), (ridge, top), (right, top)]
    axes.plot(*zip(*roof, strict=True), color=BASELINE, linewidth=2)
    axes.annotate(
        f"{peaks.bandwidth_gb_s:.0f} GB/s", roof[0], textcoords="offset points", xytext=(26, 0)
    )
    axes.annotate(
        f"{top:.0f} GFLOP/s", (right, top), textcoords="offset points", xytext=(-4, 6), ha="right"
    )
    axes.set(xscale="log", yscale="log", xlim=(left, right))
    low = min([top / 300, *(y / 2 for _, y in points.values())])
    axes.set_ylim(low, top * 2.5)
    plain_numbers(axes)
    colours = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(points)}
    for name, point in points.items():
        axes.plot(*point, "o", color=colours[name], markersize=9)
    _label(axes, points, {name: as_text(colour) for name, colour in colours.items()})
    return figure if alt else describe(figure, f"{title}. {_told(peaks, points)}")


def _label(
    axes: Any, points: Mapping[str, tuple[float, float]], colours: Mapping[str, str]
) -> None:
    """Write each point's name beside it, where neither a point nor other text is yet."""
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    axes.figure.draw_without_rendering()
    radius, inside = 6 * axes.figure.dpi / 72, axes.get_window_extent()
    taken = [text.get_window_extent() for text in axes.texts]  # those of the roof
    for x, y in map(axes.transData.transform, points.values()):
        taken.append(Bbox([[x - radius, y - radius], [x + radius, y + radius]]))
    for name, point in points.items():
        for number, (offset, ha) in enumerate(_PLACES):
            text = axes.annotate(
                name, point, textcoords="offset points", xytext=offset, ha=ha, va="center",
                color=colours[name], fontsize=10,
                path_effects=[withStroke(linewidth=4, foreground="white")],
            )  # fmt: skip
            box = text.get_window_extent()
            is_free = not any(box.overlaps(other) for other in taken)
            is_inside = inside.x0 <= box.x0 and box.x1 <= inside.x1
            if (is_free and is_inside) or number == len(_PLACES) - 1:
                taken.append(box)
                break
            text.remove()


def _told(peaks: Any, points: Mapping[str, tuple[float, float]]) -> str:
    """Say where the points are; above the roof is what a cache delivered."""
    top, slope = peaks.gflops["fp32"], peaks.bandwidth_gb_s
    told = []
    for name, (x, y) in points.items():
        share = y / min(top, x * slope)
        side = "above" if share > 1 else "below"
        told.append(f"{name} {y:.3g} GFLOP/s at {x:.2g} FLOP per byte, {side} it ({share:.0%})")
    return (
        f"GFLOP a second against FLOP per byte, both axes logarithmic. The roof rises with "
        f"{slope:.0f} GB/s to {top:.0f} GFLOP/s. {'; '.join(told)}."
    )
