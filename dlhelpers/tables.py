"""Rows of text as a table, for the terminal and for a notebook."""

from __future__ import annotations

import html
from collections.abc import Sequence

__all__ = ["facts_table", "html_table", "text_table"]


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
