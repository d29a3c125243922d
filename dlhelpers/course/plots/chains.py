"""Which modules of a network are what? A row of boxes, in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dlhelpers.drawing.contrast import text_on
from dlhelpers.drawing.style import BASELINE, FAILING, TREATMENT, new_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["chain"]

_COLOURS = {"gone": TREATMENT, "left": FAILING, "": BASELINE}
_IN_A_ROW = 12


def chain(boxes: Sequence[tuple[str, str]], *, title: str, alt: str = "") -> Figure:
    """Draw modules as boxes, in order, from left to right and on in the next row.

    Args:
        boxes: (label, state) of each; the state is ``gone``, ``left`` or empty.
        title, alt: as in ``plots.curves``.

    Raises:
        ValueError: another state.
    """
    rows = -(-len(boxes) // _IN_A_ROW)
    figure, axes = new_axes(title, "", "", alt, figsize=(8.4, 0.7 + 0.55 * rows))
    for number, (label, state) in enumerate(boxes):
        if state not in _COLOURS:
            raise ValueError(f"state must be one of {sorted(_COLOURS)}, got {state!r}")
        row, column = divmod(number, _IN_A_ROW)
        colour = _COLOURS[state]
        axes.text(
            column,
            -row,
            label,
            ha="center",
            va="center",
            fontsize=9,
            color=text_on(colour if state else "#ffffff"),
            bbox={
                "boxstyle": "round,pad=0.3",
                "facecolor": colour if state else "white",
                "edgecolor": colour,
                "linestyle": ":" if state == "gone" else "-",
            },
        )
        if number + 1 < len(boxes) and column + 1 < _IN_A_ROW:
            axes.annotate(
                "", (column + 0.62, -row), (column + 0.4, -row), arrowprops={"arrowstyle": "->"}
            )
    axes.set(xlim=(-0.6, min(len(boxes), _IN_A_ROW) - 0.4), ylim=(-rows + 0.4, 0.6))
    axes.axis("off")
    return figure
