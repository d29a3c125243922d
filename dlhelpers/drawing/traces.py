"""What happens when, and which part takes how much?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dlhelpers.drawing.contrast import text_on
from dlhelpers.drawing.style import COLOURS, describe, new_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["lanes", "shares"]

_QUIET = ("idle", "waiting", "waiting for the GPU")
_PALE = "#d5d5d5"
_PHASES = {"data loading": 0, "forward": 2, "backward": 3, "optimizer": 4, "copies": 5}


def shares(
    rows: Mapping[str, Mapping[str, float]],
    *,
    title: str,
    xlabel: str = "share of the time (%)",
    alt: str = "",
) -> Figure:
    """Draw each row's parts as shares of its whole, named inside where they are wide enough.

    Args:
        rows: name -> part -> size, such as "CPU" -> {"forward": 5.0, "backward": 6.0}.
        title: the answer.
        xlabel: what the axis shows, with its unit.
        alt: what a reader without the picture has to know.

    Raises:
        ValueError: no rows, a row without size, a size below 0, or more parts than colours.
    """
    _need_rows(rows)
    colours = _colours([part for row in rows.values() for part in row])
    size = (7.4, 1.35 + 0.62 * len(rows))
    figure, axes = new_axes(title, xlabel, "", alt, figsize=size)
    small: dict[str, float] = {}  # the last share of each part without a name inside its bar
    told = []
    for place, (name, row) in enumerate(rows.items()):
        whole = sum(row.values())
        if whole <= 0 or min(row.values()) < 0:
            raise ValueError(f"row {name!r} must have sizes of 0 or more, and one above: {row}")
        left = 0.0
        for part, value in row.items():
            width = 100 * value / whole
            axes.barh(place, width, left=left, color=colours[part], height=0.66, edgecolor="white")
            text = f"{part}\n{width:.0f} %"
            if width > 1.55 * max(map(len, text.split("\n"))):
                axes.text(left + width / 2, place, text, ha="center", va="center",
                          color=text_on(colours[part]), fontsize=10, linespacing=1.1)  # fmt: skip
            elif value:
                small[part] = width
            left += width
        parts = sorted(row, key=row.__getitem__, reverse=True)
        told.append(f"{name}: " + ", ".join(f"{p} {100 * row[p] / whole:.0f} %" for p in parts))
    for part, width in small.items():  # one number cannot be true of several rows
        label = f"{part} {width:.0f} %" if len(rows) == 1 else part
        axes.barh(0, 0, color=colours[part], label=label)
    axes.set(yticks=range(len(rows)), yticklabels=list(rows), xlim=(0, 100))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(False, axis="y")
    if small:
        figure.legend(frameon=False, ncols=min(5, len(small)), loc="outside lower left")
    return figure if alt else describe(figure, f"{title}. {'; '.join(told)}.")


def lanes(
    rows: Mapping[str, Sequence[tuple[float, float, str]]],
    *,
    title: str,
    xlabel: str = "time (ms)",
    alt: str = "",
    marks: Sequence[float] = (),
) -> Figure:
    """Draw who does what when: a lane a row, a box for each span, coloured by its kind.

    Args:
        rows: lane -> spans (start, end, kind).
        title, xlabel, alt: as in :func:`shares`.
        marks: times of thin vertical lines, such as the ends of steps.

    Raises:
        ValueError: no spans, one that ends before it starts, or more kinds than colours.
    """
    spans = [span for row in rows.values() for span in row]
    if not spans:
        raise ValueError("there is no span to draw")
    for start, end, kind in spans:
        if end < start:
            raise ValueError(f"span {kind!r} ends at {end:g}, before it starts at {start:g}")
    colours = _colours([kind for _, _, kind in spans])
    whole = max(end for _, end, _ in spans) - min(start for start, _, _ in spans)
    figure, axes = new_axes(title, xlabel, "", alt, figsize=(7.4, 1.5 + 0.5 * len(rows)))
    for place, row in enumerate(rows.values()):
        for kind, colour in colours.items():
            boxes = _merged([(s, e) for s, e, k in row if k == kind], whole / 2000)
            axes.broken_barh([(s, e - s) for s, e in boxes], (place - 0.36, 0.72), color=colour)
    for mark in marks:
        axes.axvline(mark, color="black", linewidth=0.8)
    for kind, colour in colours.items():
        axes.barh(0, 0, color=colour, label=kind)
    axes.set(yticks=range(len(rows)), yticklabels=list(rows))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(False, axis="y")
    figure.legend(frameon=False, ncols=min(3, len(colours)), loc="outside lower left")
    text = f"{title}. Lanes: {', '.join(rows)}; kinds: {', '.join(colours)}."
    return figure if alt else describe(figure, text)


def _need_rows(rows: Mapping[str, Any]) -> None:
    if not rows or not any(rows.values()):
        raise ValueError("there is nothing to draw: give a row with one part at least")


def _colours(kinds: Sequence[str]) -> dict[str, str]:
    """Give phases their own colours, other kinds the free ones in order; waiting is grey."""
    distinct = list(dict.fromkeys(kinds))
    known = {kind: COLOURS[place] for kind, place in _PHASES.items() if kind in distinct}
    others = [kind for kind in distinct if kind not in known and kind not in _QUIET]
    free = [colour for colour in COLOURS if colour not in known.values()]
    if len(others) > len(free):
        count = len(others) + len(known)
        raise ValueError(f"{count} kinds are more than {len(COLOURS)} colours: {distinct}")
    given = known | dict(zip(others, free, strict=False))
    return {kind: given.get(kind, _PALE) for kind in distinct}


def _merged(spans: Sequence[tuple[float, float]], gap: float) -> list[tuple[float, float]]:
    """Join neighbours that no eye can tell apart."""
    found: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if found and start - found[-1][1] <= gap:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return found
