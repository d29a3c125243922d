"""How does every figure look? Colours, axes and alt text, the same for all."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dlhelpers.extras import need

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "BASELINE",
    "COLOURS",
    "FAILING",
    "STYLE",
    "TREATMENT",
    "alt_text",
    "describe",
    "log_axis",
    "new_axes",
    "picture",
]

BASELINE, TREATMENT, FAILING = "#6b6b6b", "#0072b2", "#d55e00"
COLOURS = (TREATMENT, FAILING, "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
_DENSITY = {"png": 2.0, "jpeg": 1.5}  # pixels of the picture to one on the page
STYLE = {
    "figure.facecolor": "white",
    "figure.figsize": (7.0, 3.6),
    "figure.dpi": 80,
    "savefig.facecolor": "white",
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "lines.linewidth": 2.0,
}


def describe(figure: Figure, alt: str) -> Figure:
    """Attach alt text to a figure; return the figure."""
    figure._dlhelpers_alt = " ".join(alt.split())
    return figure


def alt_text(figure: Figure) -> str:
    """Return the alt text given by :func:`describe`, else titles and labels."""
    given = getattr(figure, "_dlhelpers_alt", "")
    parts = [figure.get_suptitle()]
    for axes in figure.axes:
        parts += [axes.get_title(loc=loc) for loc in ("left", "center", "right")]
        parts += [axes.get_xlabel(), axes.get_ylabel()]
    return given or "; ".join(filter(None, parts)) or "a figure without title or labels"


def picture(figure: Figure) -> str:
    """Return an ``img`` element with the figure and its alt text: a PNG, or what it asks for.

    It has two pixels for each one that it takes on the page, so that it is sharp on dense screens;
    256 colours keep a PNG about as small as one of half the width, and photographs have 1.5.
    """
    image = need("PIL.Image", "a figure")
    buffer, form = io.BytesIO(), getattr(figure, "_dlhelpers_format", "png")
    density = _DENSITY[form]
    figure.savefig(
        buffer, format="png", dpi=density * figure.dpi, bbox_inches="tight", pad_inches=0.1
    )
    drawn = image.open(buffer).convert("RGB")
    encoded = io.BytesIO()
    if form == "png":
        drawn.quantize(256, dither=0).save(encoded, "png", optimize=True)
    else:
        drawn.save(encoded, form, quality=60)
    data = base64.b64encode(encoded.getvalue()).decode()
    return (
        f'<img alt="{html.escape(alt_text(figure))}" width="{drawn.width / density:.0f}" '
        f'src="data:image/{form};base64,{data}">'
    )


def new_axes(title: str, xlabel: str, ylabel: str, alt: str, **subplots: Any) -> Any:
    """Return (figure, axes) that pyplot knows nothing of, so that nothing is drawn twice."""
    matplotlib, figures = need("matplotlib", "a figure"), need("matplotlib.figure", "a figure")
    with matplotlib.rc_context(STYLE):
        figure = figures.Figure(layout="constrained", **subplots)
        axes = figure.subplots()
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.set_title(title)
    return describe(figure, alt or f"{title}; {xlabel}; {ylabel}"), axes


def plain_numbers(axes: Any) -> None:
    """Write 0.5, 2, 100 on two log axes, with at most one tick a digit of 1, 2, 5."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        digits = (1.0, 2.0, 5.0) if high / low < 300 else (1.0,)
        axis.set_major_locator(LogLocator(subs=digits))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def log_axis(axes: Any, values: Sequence[float]) -> None:
    """A log axis around 1 with plain numbers on it; an end that is not known leaves the picture."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    known = (abs(math.log(v)) for v in values if 0 < v < math.inf)
    reach = max(*known, math.log(1.05), 0.0) * 1.15
    axes.set_xscale("log")
    axes.set_xlim(math.exp(-reach), math.exp(reach))
    digits = (1, 2, 5) if reach < math.log(50) else (1,)
    ticks = [m * 10.0**e for e in range(-3, 4) for m in digits]
    inside = [tick for tick in ticks if abs(math.log(tick)) <= reach]
    axes.xaxis.set_major_locator(FixedLocator(inside) if len(inside) > 2 else MaxNLocator(7))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
