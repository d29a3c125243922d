"""What do all pages of reports share? Their style, light and dark, without outside requests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from typing import Any
from urllib.parse import quote

from dlhelpers.course.report import picture
from dlhelpers.course.report.cells import Cell

__all__ = ["breakable", "cell_link", "document", "machine_line"]

_STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --jp-ui-font-color1: #1f2328;
  --jp-layout-color2: #f3f4f6; --jp-border-color1: #c3c8cf; --link: #0b5cad; }
@media (prefers-color-scheme: dark) { :root { --page: #15181c; --jp-ui-font-color1: #e4e7eb;
  --jp-layout-color2: #22262c; --jp-border-color1: #4a515b; --link: #7fb7f0; } }
body { background: var(--page); color: var(--jp-ui-font-color1); max-width: 82rem;
  font: 15px/1.45 system-ui, sans-serif; margin: 1.5rem auto; padding: 0 1rem; }
a { color: var(--link); }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: 0.5rem 0.8rem 0.5rem 0; }
thead th { border-bottom: 2px solid var(--jp-border-color1); }
tbody > tr { border-top: 1px solid var(--jp-border-color1); }
td table { width: auto; } td table td { padding: 0 0.8rem 0.2rem 0; }
td table tr { border: none; }
.badge { border-left: 5px solid; padding-left: 0.4rem; font-weight: 600; display: block; }
.badge span { color: var(--jp-ui-font-color1); }
.number { white-space: nowrap; }
.quiet { opacity: 0.75; font-size: 0.9em; }
.filters label { margin-right: 1.2rem; }
.alert { border: 2px solid; padding: 0.5rem 1rem; }
.wide { overflow-x: auto; }
[hidden] { display: none; }
"""


def document(title: str, sections: Iterable[str]) -> str:
    """Return a whole HTML page with the report's style."""
    return (
        "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{_STYLE}{picture.STYLE}</style></head>"
        f"<body><h1>{escape(title)}</h1>{''.join(sections)}</body></html>\n"
    )


def machine_line(ledger: Mapping[str, Any]) -> str:
    """Return the machine of a ledger in a line."""
    return str(ledger["machine"].get("line") or "a machine that is not described")


def breakable(text: str) -> str:
    """Return text as HTML whose lines may end after a slash, as in a list of instruction sets."""
    return escape(text).replace("/", "/<wbr>")


def cell_link(notebook: str, folder: str, cell: Cell | None = None, text: str = "") -> str:
    """Return a link to a notebook in a folder, or to one of its cells, as HTML.

    The text is the notebook's name and the cell's number where none is given.
    """
    address = quote(f"{folder}/{notebook}.ipynb" if folder else f"{notebook}.ipynb")
    address += f"#cell-id={quote(cell.id)}" if cell and cell.id else ""
    text = text or (f"{notebook}, cell [{cell.number}]" if cell else notebook)
    return f"<a href='{escape(address)}'>{escape(text)}</a>"
