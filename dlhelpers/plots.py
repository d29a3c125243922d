"""How does every figure of the course look?

One axes and one message a figure: the title is the answer, axes carry units, the baseline is grey,
the treatment blue, what fails orange (Okabe & Ito's colours, told apart by colour-blind readers).
Faces are opaque white, so that a figure reads the same in JupyterLab's light and dark theme. Each
figure carries alt text, which `use_style` puts into the notebook beside the picture.

Source: Okabe & Ito 2008, Color Universal Design, https://jfly.uni-koeln.de/color/.
"""

from __future__ import annotations

import base64
import html
import io
import math
import os
import random
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "BASELINE",
    "FAILING",
    "TREATMENT",
    "curves",
    "describe",
    "dots",
    "heatmap",
    "intervals",
    "pair_panel",
    "strip_svg",
    "use_style",
]

BASELINE, TREATMENT, FAILING = "#6b6b6b", "#0072b2", "#d55e00"
_COLOURS = (TREATMENT, FAILING, "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
_STYLE = {
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


def use_style() -> None:
    """Give matplotlib the course's style; show figures in a notebook as pictures with alt text.

    Registers a formatter for the figures of the running IPython, pyplot's included.
    """
    import matplotlib
    from IPython import get_ipython
    from matplotlib.figure import Figure

    shell = get_ipython()
    if shell is not None and "inline" in os.environ.get("MPLBACKEND", ""):
        # else pyplot's first figure would activate it, and it puts its own formatters in
        shell.enable_matplotlib("inline")
    matplotlib.rcParams.update(_STYLE, **{"axes.prop_cycle": matplotlib.cycler(color=_COLOURS)})
    if shell is None:
        return
    formatters = shell.display_formatter.formatters
    formatters["text/html"].for_type(Figure, _picture)
    formatters["text/plain"].for_type(Figure, lambda figure, p, cycle: p.text(_alt(figure)))
    # the inline backend would store the picture a second time
    formatters["image/png"].for_type(Figure, lambda figure: None)


def describe(figure: Figure, alt: str) -> Figure:
    """Attach alt text to a figure; return the figure."""
    figure._dlhelpers_alt = " ".join(alt.split())
    return figure


def _alt(figure: Figure) -> str:
    given = getattr(figure, "_dlhelpers_alt", "")
    parts = [figure.get_suptitle()]
    for axes in figure.axes:
        parts += [axes.get_title(loc=loc) for loc in ("left", "center", "right")]
        parts += [axes.get_xlabel(), axes.get_ylabel()]
    return given or "; ".join(filter(None, parts)) or "a figure without title or labels"


def _picture(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight", pad_inches=0.1)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(_alt(figure))}" src="data:image/png;base64,{data}">'


def _axes(title: str, xlabel: str, ylabel: str, alt: str, **subplots: Any) -> Any:
    """Return (figure, axes) that pyplot knows nothing of, so that nothing is drawn twice."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(layout="constrained", **subplots)
        axes = figure.subplots()
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.set_title(title)
    return describe(figure, alt or f"{title}; {xlabel}; {ylabel}"), axes


def curves(
    series: Mapping[str, tuple[Sequence[float], ...]],
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    alt: str = "",
    mark_x: float | None = None,
) -> Figure:
    """Draw named curves, labelled at the curve itself.

    Args:
        series: name -> (x, y), or (x, y, low, high) with an interval around each y; sequences,
            arrays or tensors of equal length. Six at most, in the order of the colours.
        title, xlabel, ylabel: the answer, and the axes with their units.
        alt: what a reader without the picture has to know.
        mark_x: draws a dot on each curve there.

    Raises:
        ValueError: more than six curves, or one whose sequences differ in length.
    """
    if len(series) > len(_COLOURS):
        raise ValueError(
            f"{len(series)} curves are more than the {len(_COLOURS)} colours that can be told "
            "apart: draw two figures"
        )
    for name, points in series.items():
        if len({len(values) for values in points}) != 1 or len(points) not in (2, 4):
            raise ValueError(
                f"curve {name!r} must be (x, y) or (x, y, low, high) of equal length, got lengths "
                f"{[len(values) for values in points]}"
            )
    figure, axes = _axes(title, xlabel, ylabel, alt)
    top = max(max(_floats(points[1])) for points in series.values())
    for colour, (name, points) in zip(_COLOURS, series.items(), strict=False):
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
            color=colour,
            fontweight="bold",
        )
        if mark_x is not None:
            nearest = min(range(len(x)), key=lambda i: abs(x[i] - mark_x))
            axes.plot(x[nearest], y[nearest], "o", color=colour, markersize=9)
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
    figure, axes = _axes(title, xlabel, "", alt, figsize=(7.0, 1.9))
    heights = [random.Random(i).uniform(-1, 1) for i in range(len(ratios))]
    axes.axvline(1.0, color=BASELINE, linewidth=1.5)
    shown = [min(2.0, max(0.5, ratio)) for ratio in _floats(ratios)]
    axes.scatter(shown, heights, s=22, color=TREATMENT, alpha=0.7, linewidths=0)
    _log_axis(axes, [*shown, 1.0])
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
    figure, axes = _axes(title, xlabel, "", alt, figsize=(7.0, 1.1 + 0.5 * len(items)))
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
    for row, item in enumerate(items.values()):
        value = getattr(item, "value", getattr(item, "speedup", None))
        ends = [item.low, item.high]
        if baseline == 1.0:  # on a log axis an end that is not known lies far outside
            ends = [min(max(end, 1e-9), 1e9) for end in ends]
        axes.plot(ends, [row, row], color=TREATMENT, linewidth=5, alpha=0.35)
        axes.plot(value, row, "o", color=TREATMENT, markersize=8)
    axes.set(yticks=range(len(items)), yticklabels=list(items), ylim=(len(items) - 0.5, -0.7))
    if baseline == 1.0:
        _log_axis(axes, [v for item in items.values() for v in (item.low, item.high)] + [1.0])
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
    from matplotlib.patches import Rectangle

    figure, axes = _axes(title, "", "", alt, figsize=(7.4, 0.9 + 0.42 * len(rows)))
    finite = [v for row in values for v in row if math.isfinite(v)]
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    image = axes.imshow(values, cmap="cividis", aspect="auto", vmin=low, vmax=high)
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            dark = math.isfinite(value) and value <= (low + high) / 2
            text = form.format(value) if math.isfinite(value) else "refused"
            axes.text(j, i, text, ha="center", va="center", color="white" if dark else "black")
    for i, j in framed:
        corner = (j - 0.46, i - 0.44)
        axes.add_patch(Rectangle(corner, 0.92, 0.88, fill=False, edgecolor=FAILING, linewidth=2.5))
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.grid(False)
    figure.colorbar(image, ax=axes, label=unit)
    return figure


def pair_panel(logit: float, right: Callable[..., Any], wrong: Callable[..., Any]) -> Figure:
    """Draw loss and pull of a right and a wrong pair side by side, for two classes.

    Args:
        logit: of the true class, against a fixed 0; a dot marks it.
        right, wrong: (logits [1, 2], targets [1]) -> scalar loss.
    """
    import matplotlib
    import torch
    from matplotlib.figure import Figure

    x = torch.linspace(-8, 8, 161)
    at = min(range(161), key=lambda i: abs(x[i].item() - logit))
    facts, pulls = [], []
    with matplotlib.rc_context(_STYLE | {"figure.figsize": (8.4, 3.2)}):
        figure = Figure(layout="constrained")
        left, centre = figure.subplots(1, 2)
        for name, pair, colour in (("right", right, TREATMENT), ("wrong", wrong, FAILING)):
            loss, pull = _loss_and_pull(pair, x)
            for axes, y in ((left, loss), (centre, pull)):
                axes.plot(x, y, color=colour)
                axes.plot(x[at], y[at], "o", color=colour, markersize=9)
            facts.append(f"{name} pair: loss {loss[at]:.3f}, pull {pull[at]:.3g}")
            pulls.append(pull[at])
            centre.plot([], [], color=colour, label=f"{name}: pull {pull[at]:.3g}")
            left.plot([], [], color=colour, label=f"{name}: loss {loss[at]:.3f}")
        for axes, quantity in ((left, "loss (nats)"), (centre, "pull, -d loss / d logit")):
            axes.set(xlabel="logit of the true class", ylabel=quantity)
            axes.legend(frameon=False)
        facts.append(f"wrong / right pull {pulls[1] / pulls[0]:.3f}")
        figure.suptitle(f"logit {logit:g}: {facts[-1]}")
    return describe(figure, f"Logit {logit:g}. {'; '.join(facts)}.")


def _loss_and_pull(pair: Callable[..., Any], x: Any) -> tuple[list[float], list[float]]:
    import torch

    target, loss, pull = torch.tensor([0]), [], []
    for value in x:
        z = torch.stack([value, torch.zeros(())])[None].requires_grad_()
        result = pair(z, target)
        loss.append(result.item())
        pull.append(-torch.autograd.grad(result, z)[0][0, 0].item())
    return loss, pull


def _log_axis(axes: Any, values: Sequence[float]) -> None:
    """A log axis around 1 with plain numbers on it; an end that is not known leaves the picture."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

    known = (abs(math.log(v)) for v in values if 0 < v < math.inf)
    reach = max(*known, math.log(1.05), 0.0) * 1.15
    axes.set_xscale("log")
    axes.set_xlim(math.exp(-reach), math.exp(reach))
    axes.xaxis.set_major_locator(MaxNLocator(7))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def strip_svg(
    ratios: Sequence[float],
    low: float,
    high: float,
    *,
    negligible: float,
    estimate: float,
    threshold: float | None = None,
    width: int = 360,
    height: int = 56,
) -> str:
    """Return paired ratios as a small SVG strip: dots, interval, negligible band, the line at 1.

    Args:
        ratios: paired ratios, positive and finite (others are left out); at most 200 are drawn.
        low, high, estimate: the interval and the typical ratio; 0 and infinity reach the edge.
        negligible: half width of the band around 1.
        threshold: of a claim, drawn as a dashed line.
        width, height: in pixels.
    """
    shown = [r for r in ratios if 0 < r < math.inf][:: max(1, -(-len(ratios) // 200))]
    inner = sorted(math.log(r) for r in shown) or [0.0]
    cut = max(1, len(inner) // 50)  # a far outlier must not squeeze the rest
    ends = [inner[: cut + 1][-1], inner[-cut - 1 :][0], math.log1p(negligible)]
    ends += [math.log(v) for v in (low, high, threshold or 1.0) if v > 0 and math.isfinite(v)]
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
    dashed = (
        f'<line x1="{x(threshold)}" x2="{x(threshold)}" y1="0" y2="{height - 14}" '
        'stroke="currentColor" stroke-dasharray="3 3"/>'
        if threshold
        else ""
    )
    label = f"paired ratios, speedup {estimate:.3g}, interval {low:.3g} to {high:.3g}"
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
