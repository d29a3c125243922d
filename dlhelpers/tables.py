"""Rows of text as a table, for the terminal and for a notebook; numbers and durations as text."""

from __future__ import annotations

import html
from collections.abc import Sequence

__all__ = ["duration", "facts_table", "figures", "html_table", "text_table"]


def facts_table(rows: list[tuple[str, str]]) -> str:
    """Return rows of (name, value) as an HTML table."""
    body = "".join(
        f"<tr><th style='text-align:left'>{html.escape(name)}</th>"
        f"<td style='text-align:left'>{html.escape(value)}</td></tr>"
        for name, value in rows
    )
    return f"<table><tbody>{body}</tbody></table>"


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, names: int = 0) -> str:
    """Return columns of equal width, the first ``names`` aligned to the left.

    >>> print(text_table(["layer", "MiB"], [["conv1", "12.5"], ["fc", "2.0"]], names=1))
    layer   MiB
    conv1  12.5
    fc      2.0
    """
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return "\n".join(
        "  ".join(
            text.ljust(width) if column < names else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (head, *rows)
    )


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, names: int = 0) -> str:
    """Return the same as HTML."""

    def cells(row: Sequence[str], tag: str) -> str:
        left = " style='text-align:left'"
        return "".join(
            f"<{tag}{left if column < names else ''}>{html.escape(text)}</{tag}>"
            for column, text in enumerate(row)
        )

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f"<table><tr>{cells(head, 'th')}</tr>{body}</table>"


def figures(value: float, digits: int = 3) -> str:
    """Return a number with ``digits`` significant digits, a large one in full.

    >>> figures(0.0123), figures(999.7), figures(1234.5), figures(120, 2)
    ('0.0123', '1,000', '1,234', '120')
    """
    text = f"{value:.{digits}g}"
    return f"{value:,.0f}" if "e+" in text else text


def duration(seconds: float, digits: int = 3) -> str:
    """Return a time in the largest unit in which it is 1 or more once it is rounded.

    >>> duration(0.00099), duration(0.0009996), duration(1.1), duration(4320), duration(0)
    ('990 us', '1 ms', '1.1 s', '4,320 s', '0 s')
    """
    rounded = float(f"{seconds:.{digits - 1}e}")
    scales = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
    unit = next((unit for unit, scale in scales.items() if abs(rounded) >= scale), "ns")
    return f"{figures(rounded / scales.get(unit, 1e-9), digits)} {unit}" if rounded else "0 s"
