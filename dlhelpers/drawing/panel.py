"""What is a drawing made of? Boxes, arrows and texts on an opaque light panel, written as SVG.

A drawing has no ids and no dates, so it is the same each time and nbval compares it. It is shown as
an image with an alt text, which JupyterLab, GitHub and a plain site all keep; inline SVG is
stripped by the second and takes the theme's colours in the first. Strips beside a line of text are
small drawings without a title.
"""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["BLUE", "GREY", "INK", "ORANGE", "RUST", "Panel", "Words"]

INK, RUST = "#1a1a1a", "#9c3f00"  # of text; both reach 4.5:1 on every fill below
BLUE, ORANGE, GREY = "#cfe6f5", "#fbdcc8", "#e9e9e9"
_GROUND = "#ffffff"
_NARROWEST = 480  # pixels to which a drawing may shrink: its texts are still legible there


@dataclass(frozen=True)
class Words:
    """One text of a drawing: the rectangle that it needs at most, its colours, its size in px."""

    text: str
    left: float
    top: float
    right: float
    bottom: float
    colour: str
    ground: str


class Panel:
    """A drawing under construction; the last line of a cell shows it.

    Args:
        width, height: in pixels.
        alt: what the drawing shows, for those who cannot see it.
        title: its answer in a line, written at the top; a strip has none.
    """

    def __init__(self, width: int, height: int, alt: str, title: str = "") -> None:
        self.width, self.height, self.alt = width, height, " ".join(alt.split())
        self.words: list[Words] = []
        self._parts: list[str] = []
        if title:
            self.text(16, 26, title, size=15, bold=True)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        anchor: str = "start",
        size: int = 13,
        colour: str = INK,
        bold: bool = False,
        ground: str = _GROUND,
    ) -> None:
        """Write a line with its baseline at y; the anchor is start, middle or end."""
        wide = len(text) * size * (0.58 if bold else 0.54)
        left = x - wide * {"start": 0.0, "middle": 0.5, "end": 1.0}[anchor]
        top, bottom = y - 0.8 * size, y + 0.25 * size
        self.words.append(Words(text, left, top, left + wide, bottom, colour, ground))
        weight = ' font-weight="bold"' if bold else ""
        self._parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" '
            f'fill="{colour}"{weight}>{html.escape(text)}</text>'
        )

    def box(
        self,
        x: float,
        y: float,
        wide: float,
        high: float,
        label: str = "",
        *,
        fill: str = BLUE,
        edge: str = INK,
        dashed: bool = False,
        size: int = 13,
    ) -> None:
        """Draw a box with its label in the middle; lines of the label are parted by a line feed."""
        dashes = ' stroke-dasharray="4 3"' if dashed else ""
        self._parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{high:.1f}" rx="3" '
            f'fill="{fill}" stroke="{edge}"{dashes}/>'
        )
        lines = label.split("\n") if label else []
        for row, line in enumerate(lines):
            middle = y + high / 2 + (row - (len(lines) - 1) / 2) * size * 1.25 + size * 0.35
            self.text(x + wide / 2, middle, line, anchor="middle", size=size, ground=fill)

    def line(
        self,
        points: Sequence[tuple[float, float]],
        *,
        colour: str = INK,
        wide: float = 1.5,
        dashed: bool = False,
    ) -> None:
        """Draw straight lines through the points."""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dashes = ' stroke-dasharray="4 3"' if dashed else ""
        self._parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" '
            f'stroke-width="{wide}"{dashes}/>'
        )

    def arrow(
        self, x1: float, y1: float, x2: float, y2: float, *, colour: str = INK, wide: float = 1.5
    ) -> None:
        """Draw an arrow from the first point to the second."""
        turn = math.atan2(y2 - y1, x2 - x1)
        head = [(x2, y2)] + [
            (x2 - 9 * math.cos(turn + side), y2 - 9 * math.sin(turn + side)) for side in (-0.4, 0.4)
        ]
        self.line([(x1, y1), (x2, y2)], colour=colour, wide=wide)
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in head)
        self._parts.append(f'<polygon points="{path}" fill="{colour}"/>')

    def dot(self, x: float, y: float, *, colour: str = INK, radius: float = 4) -> None:
        """Draw a filled circle."""
        self._parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}"/>')

    def cloud(
        self, points: Sequence[tuple[float, float]], *, colour: str, radius: float = 1.6
    ) -> None:
        """Draw many small dots, in few bytes."""
        path = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in points)
        self._parts.append(
            f'<path d="{path}" stroke="{colour}" stroke-width="{2 * radius}" '
            'stroke-linecap="round"/>'
        )

    @property
    def svg(self) -> str:
        """The drawing as a picture file."""
        fonts = ' font-family="Helvetica, Arial, Liberation Sans, sans-serif"' if self.words else ""
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.width}" height="{self.height}" '
            f'viewBox="0 0 {self.width} {self.height}"{fonts}>'
            f'<rect width="{self.width}" height="{self.height}" fill="{_GROUND}"/>'
            f"{''.join(self._parts)}</svg>"
        )

    def _repr_html_(self) -> str:
        data = base64.b64encode(self.svg.encode()).decode()
        alt, least = html.escape(self.alt), min(self.width, _NARROWEST)
        return (
            f'<img alt="{alt}" width="{self.width}" style="min-width:{least}px" '
            f'src="data:image/svg+xml;base64,{data}">'
        )

    def __repr__(self) -> str:
        return self.alt
